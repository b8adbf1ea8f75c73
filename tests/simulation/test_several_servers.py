"""DESIGN section 4, the promises, in worlds with several servers on one database."""

from __future__ import annotations

from . import runner
from .conftest import Tell
from .test_one_server import SECONDS


class TestSeveralServers:
    def test_promises_are_kept(self, tell: Tell) -> None:
        tell(runner.play(runner.fresh_seed() + 1, step=2, seconds=SECONDS / 2))
