"""
Fixtures for pytest; a plug-in by its entry point, which needs pytest-django.

Loaded by every run of pytest where the package is installed: it imports nothing
of Django's or of the package's before a fixture is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .testing import GearmanCluster, GearmanJobs


@pytest.fixture
def gearman_jobs(db: None) -> Iterator[GearmanJobs]:
    """The jobs that the test enqueues: ``assert_enqueued``, ``enqueued``, ``run_all``."""
    from .testing import GearmanJobs

    with GearmanJobs() as jobs:
        yield jobs


@pytest.fixture
def gearman_cluster(transactional_db: None) -> Iterator[GearmanCluster]:
    """A real job server and a real worker with two processes, on the test's database."""
    from .testing import GearmanCluster

    with GearmanCluster() as cluster:
        yield cluster
        # The test's failure does not come by here; pytest shows with it what was captured.
        print(cluster.log())
