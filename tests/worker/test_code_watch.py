"""``--reload``: what counts as a change of the code."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import pytest

from django_gearman.management.commands import gearman_worker

NAME = "made_for_the_watch"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gearman_worker, "RELOAD_INTERVAL", 0.0)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, NAME, sys)  # so that it is as before at the end
    monkeypatch.delitem(sys.modules, NAME)
    path = tmp_path / f"{NAME}.py"
    path.write_text("")
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))
    return path


def test_module_that_is_only_imported_is_no_change(module: Path) -> None:
    """Python itself imports some late, such as the codec of host names: each reload began another."""
    watch = gearman_worker._CodeWatch()
    importlib.import_module(NAME)
    assert not watch()
    assert not watch()
    os.utime(module)
    assert watch()
    assert not watch()


def test_module_that_is_new_is_a_change(module: Path) -> None:
    watch = gearman_worker._CodeWatch()
    os.utime(module, (time.time() + 1, time.time() + 1))
    importlib.import_module(NAME)
    assert watch()
    assert not watch()
