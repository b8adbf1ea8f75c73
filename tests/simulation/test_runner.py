"""What is played by hand, and that it would find something."""

from __future__ import annotations

import pytest

from . import defects, runner
from .__main__ import find


class TestRunner:
    def test_a_seed_plays_the_same_world_again(self) -> None:
        for seed in (10, 11):
            first, second = runner.trace(seed), runner.trace(seed)
            assert first == second
            assert "every promise was kept" in first.splitlines()[-1]

    def test_it_is_quick(self) -> None:
        report = runner.play(0, runs=200)
        assert report.failed is None
        # Of a machine that has other things to do, and of a slow interpreter, no more is asked.
        assert report.steps / report.seconds > 4_000

    def test_modules_have_their_own_numbers_afterwards(self) -> None:
        before = [getattr(module, name) for module, name in runner.CONSTANTS]
        runner.play(0, runs=3)
        assert [getattr(module, name) for module, name in runner.CONSTANTS] == before


class TestDefects:
    @pytest.mark.parametrize("name", defects.QUICK)
    def test_is_found(self, name: str) -> None:
        assert find(name, 60.0).startswith("found")

    @pytest.mark.parametrize("defect", defects.DEFECTS, ids=lambda defect: defect.name)
    def test_is_of_the_code_as_it_is(self, defect: defects.Defect) -> None:
        assert defects.edited(defect)

    def test_none_has_the_name_of_another(self) -> None:
        names = [defect.name for defect in defects.DEFECTS]
        assert len(set(names)) == len(names)
        assert set(defects.QUICK) <= set(names)
