"""DESIGN section 4, the promises, in worlds with one server."""

from __future__ import annotations

import os

from . import runner
from .conftest import Tell

SECONDS = float(os.environ.get("GEARMAN_SIMULATION_SECONDS", "4"))
"""For how long new worlds are played, by this file and the other one together."""


class TestOneServer:
    def test_promises_are_kept(self, tell: Tell) -> None:
        tell(runner.play(runner.fresh_seed(), step=2, seconds=SECONDS / 2))
