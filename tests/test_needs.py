"""A test that cannot run is skipped, and has failed in CI."""

from __future__ import annotations

import pytest

from tests import needs


def test_a_module_that_is_there() -> None:
    assert needs.module("json").loads("1") == 1


@pytest.mark.parametrize(("ci", "how"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_one_that_is_not(monkeypatch: pytest.MonkeyPatch, ci: str, how: type[BaseException]) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(how, match=r"no_such_module is not installed; .*\.\[demo\]"):
        needs.module("no_such_module", "demo")
