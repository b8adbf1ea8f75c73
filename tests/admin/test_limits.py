"""The list of limits, and the form that changes them."""

from __future__ import annotations

import time

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_gearman.limiting import synchronise
from django_gearman.models import FunctionLimit, JobRecord, LimitUse
from django_gearman.permits import Limit, Request, Use

from .test_schedules import refused

LIST = "/admin/django_gearman/functionlimit/"

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def urls(settings):
    settings.ROOT_URLCONF = "tests.admin.urls"


def limit(function: str = "f", **columns: object) -> FunctionLimit:
    return FunctionLimit.objects.create(function=function, **(columns or {"concurrency": 2}))


def use(function: str = "f", key: str = "", held: int = 1, begun: int = 0) -> None:
    """So many run now, and began just now."""
    now = time.time()
    book = Use()
    request = Request(key.encode(), held, 0, 0, tuple((n + 1, 0.0) for n in range(begun)))
    book.decide(Limit(1000, 60.0), "1.1", request, now, 0.0, lambda name: True)
    LimitUse.objects.create(
        digest=f"{function} {key}", function=function, key=key, book=book.dump(), touched=now
    )


def page(client, row) -> str:
    response = client.get(f"{LIST}{row.pk}/change/")
    assert response.status_code == 200
    return response.content.decode()


def save(client, row=None, **sent):
    return client.post(f"{LIST}{row.pk}/change/" if row else f"{LIST}add/", sent)


class TestList:
    def test_shows_what_is_in_use(self, admin_client):
        limit("f", concurrency=7, rate="10/m")
        use("f", held=3, begun=4)
        text = admin_client.get(LIST).content.decode()
        for part in ("10/m, 7 at once", "3 / 7", "4 / 10", "Enabled"):
            assert part in text

    def test_shows_each_key(self, admin_client):
        limit("f", concurrency=2, by_key=True)
        use("f", "a", held=1)
        use("f", "<b>", held=2)
        assert "&lt;b&gt;: 2 / 2, a: 1 / 2" in admin_client.get(LIST).content.decode()

    def test_needs_as_many_queries_for_many(self, admin_client):
        limit()
        use()
        counts = []
        for name in ("a", "b"):
            with CaptureQueriesContext(connection) as queries:
                admin_client.get(LIST)
            counts.append(len(queries))
            for number in range(20):
                limit(f"{name}{number}")
                use(f"{name}{number}")
        assert counts[0] == counts[1]


class TestPage:
    def test_counts_what_waits_and_not_the_history(self, admin_client):
        row = limit("f")
        for status, number in (("READY", 3), ("SUCCESSFUL", 5), ("RUNNING", 1)):
            JobRecord.objects.bulk_create(JobRecord(function="f", status=status) for _ in range(number))
        JobRecord.objects.create(function="g")
        with CaptureQueriesContext(connection) as queries:
            text = page(admin_client, row)
        assert '<div class="readonly">3</div>' in text
        (counted,) = [query["sql"] for query in queries if "COUNT" in query["sql"]]
        # A condition of the row, for which there are indexes.
        assert "status" in counted.rpartition("WHERE")[2]


class TestForm:
    def test_a_limit_is_made(self, admin_client):
        save(admin_client, function="foreign", rate=" 5/30s ", concurrency="", enabled="on")
        row = FunctionLimit.objects.get()
        assert (row.function, row.rate, row.concurrency, row.enabled) == ("foreign", "5/30s", None, True)
        assert row.limit == Limit(5, 30.0, None)

    @pytest.mark.parametrize(
        ("sent", "field", "said"),
        [
            ({"rate": "many"}, "rate", "is no rate"),
            ({"rate": "0/m"}, "rate", "is no rate"),
            ({"rate": "10/w"}, "rate", "is no rate"),
            ({"concurrency": "0"}, "concurrency", "from 1"),
            ({"concurrency": "-1"}, "concurrency", "greater than or equal to 0"),
            ({}, "__all__", "Give a rate, or how many at once, or both."),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, admin_client, sent, field, said):
        errors = refused(save(admin_client, function="f", **sent))
        assert said in str(errors[field])
        assert not FunctionLimit.objects.exists()

    def test_an_edit_leaves_what_the_code_says(self, admin_client):
        synchronise("default", {"f": {"rate": "10/m", "concurrency": None, "by_key": False}})
        row = FunctionLimit.objects.get()
        assert "as here" in page(admin_client, row)
        save(admin_client, row, rate="20/m", enabled="on")
        row.refresh_from_db()
        assert (row.rate, row.declared["rate"]) == ("20/m", "10/m")
        assert "edited here" in page(admin_client, row)
        synchronise("default", {"f": {"rate": "10/m", "concurrency": None, "by_key": False}})
        row.refresh_from_db()
        assert row.rate == "20/m"
        admin_client.post(LIST, {"action": "reset_to_code", "_selected_action": [row.pk]})
        row.refresh_from_db()
        assert row.rate == "10/m"

    def test_what_the_code_changes_is_taken(self):
        for rate in ("10/m", "30/m"):
            synchronise("default", {"f": {"rate": rate, "concurrency": None, "by_key": False}})
            assert FunctionLimit.objects.get().rate == rate
        synchronise("default", {})
        row = FunctionLimit.objects.get()
        assert row.withdrawn
        synchronise("default", {"f": {"rate": "30/m", "concurrency": None, "by_key": False}})
        assert not FunctionLimit.objects.get().withdrawn

    def test_switched_off_and_on(self, admin_client):
        row = limit()
        for action, enabled in (("disable", False), ("enable", True)):
            admin_client.post(LIST, {"action": action, "_selected_action": [row.pk]})
            row.refresh_from_db()
            assert row.enabled is enabled
