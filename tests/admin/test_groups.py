"""The pages of groups, and what pages of jobs say of them."""

from collections.abc import Callable
from typing import Any

import pytest
from django.test import Client

from django_gearman import chain, group
from django_gearman.models import JobGroup, JobRecord
from tests.app import jobs

GROUPS = "/admin/django_gearman/jobgroup/"


@pytest.fixture
def page(admin_client: Client, settings: Any) -> Callable[..., str]:
    settings.ROOT_URLCONF = "tests.admin.urls"

    def get(address: str, **parameters: Any) -> str:
        response = admin_client.get(address, parameters)
        assert response.status_code == 200
        return response.content.decode()

    return get


class TestPages:
    def test_list(self, page: Callable[..., str]) -> None:
        group(jobs.add.s(1), jobs.add.s(2), jobs.fail.s("no")).enqueue()
        JobGroup.objects.update(successful=1, failed=1)
        chain(jobs.add.s(1), jobs.note.s()).enqueue()
        shown = page(GROUPS)
        assert "2 add, fail" in shown
        assert "add | note" in shown
        assert '<progress max="3" value="2" aria-label="Progress of group' in shown
        assert "add | note" not in page(GROUPS, standing="failed")
        assert "add | note" in page(GROUPS, standing="live")
        assert "add | note" not in page(GROUPS, standing="over")

    def test_detail(self, page: Callable[..., str]) -> None:
        made = group(jobs.add.s(1)).enqueue(on_success=jobs.total.s(), on_complete=jobs.note.si("over"))
        shown = page(f"{GROUPS}{made.id}/change/")
        assert f"/admin/django_gearman/jobrecord/?group={made.id}" in shown
        assert shown.count("gearman-status-waiting") == 2
        assert "delete" not in shown.lower().replace("deletelink", "")
        JobRecord.objects.all().delete()
        assert "gearman-status-waiting" not in page(f"{GROUPS}{made.id}/change/")

    def test_jobs_of_a_group(self, page: Callable[..., str]) -> None:
        made = group(jobs.add.s(1)).enqueue(on_complete=jobs.note.si("over"))
        other = jobs.fail.enqueue("other")
        shown = page("/admin/django_gearman/jobrecord/", group=made.id)
        assert 'title="tests.app.jobs.add"' in shown
        assert 'title="tests.app.jobs.note"' in shown
        assert 'title="tests.app.jobs.fail">fail<' not in shown
        member, following = JobRecord.objects.filter(group=made.id).order_by("pk")
        assert f"{GROUPS}{made.id}/change/" in page(f"/admin/django_gearman/jobrecord/{member.pk}/change/")
        assert "member 0 of 1, counted from 0" in page(f"/admin/django_gearman/jobrecord/{member.pk}/change/")
        assert "follows it" in page(f"/admin/django_gearman/jobrecord/{following.pk}/change/")
        assert GROUPS not in page(f"/admin/django_gearman/jobrecord/{other.id}/change/").partition("<main")[2]

    def test_a_group_that_is_none(self, admin_client: Client, settings: Any) -> None:
        settings.ROOT_URLCONF = "tests.admin.urls"
        response = admin_client.get("/admin/django_gearman/jobrecord/", {"group": "x"})
        assert response.status_code == 302
