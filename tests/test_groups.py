"""Groups, chains, and what follows them: on the test's database, and by real processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from django_gearman import group
from django_gearman.models import JobRecord
from django_gearman.testing import GearmanJobs
from tests.app import jobs

Status = JobRecord.Status


@pytest.fixture
def gearman_jobs(db: None) -> Iterator[GearmanJobs]:
    with GearmanJobs() as made:
        yield made


def statuses() -> list[str]:
    return list(JobRecord.objects.order_by("pk").values_list("status", flat=True))


class TestEnqueuedGroups:
    def test_members_run_and_then_what_follows(self, gearman_jobs: GearmanJobs) -> None:
        made = group(jobs.add.s(number) for number in range(5)).enqueue(
            on_success=jobs.total.s(), on_complete=jobs.note.si("over")
        )
        assert (made.total, made.finished) == (5, 0)
        gearman_jobs.run_all(check=True)
        made.refresh()
        assert (made.total, made.finished, made.successful, made.failed) == (5, 5, 5, 0)
        assert made.is_finished
        assert made.get() == [1, 2, 3, 4, 5]
        assert made.on_success is not None
        assert made.on_success.return_value == 15
        assert made.on_complete is not None
        assert made.on_complete.return_value == "over"
