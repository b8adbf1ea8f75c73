"""A queue larger than its window in memory, as ``benchmarks/depth.py`` tries it with a million jobs."""

from __future__ import annotations

import sys

import pytest

from tests import harness

sys.path.append(str(harness.ROOT / "benchmarks"))

import depth

pytestmark = pytest.mark.acceptance


@pytest.mark.django_db(transaction=True)
def test_many_windows_of_jobs():
    """In order, all of them and each once, counted, within memory, and with a restart in between."""
    depth.run(30_000, 1000, print)
