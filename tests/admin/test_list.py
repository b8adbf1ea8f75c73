"""Which jobs the list finds, and what it costs."""

import datetime

import pytest
from django.contrib import admin
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_gearman.admin import filters, paginator
from django_gearman.models import JobRecord


def ids(response):
    return [job.pk for job in response.context["cl"].result_list]


class TestSearch:
    def test_by_id_handle_and_unique(self, admin_page, make_job):
        first, second, third = make_job(), make_job(unique="album-7"), make_job(unique="album-7")
        assert ids(admin_page(q=str(first.pk))) == [first.pk]
        assert ids(admin_page(q=f" {second.handle} ")) == [second.pk]
        assert ids(admin_page(q="album-7")) == [third.pk, second.pk]

    def test_a_number_may_be_a_unique(self, admin_page, make_job):
        first = make_job()
        second = make_job(unique=str(first.pk))
        assert ids(admin_page(q=str(first.pk))) == [second.pk, first.pk]

    @pytest.mark.parametrize(
        "term", ["thumb", "album", "H:", "0", "9" * 19, "9" * 40, "²", "%", "a\0b", "H:\0"]
    )
    def test_finds_nothing_else(self, admin_page, make_job, term):
        make_job(unique="album-7")
        response = admin_page(q=term)
        assert response.status_code == 200
        assert "\0" in term or ids(response) == []

    def test_jobs_without_unique_are_not_its_matches(self, admin_page, make_job):
        job = make_job(unique="")
        assert ids(admin_page(q="  ")) == [job.pk]


class TestFilters:
    def test_each_narrows_the_list(self, admin_page, make_job):
        now = timezone.now()
        old = make_job(finished_at=now - datetime.timedelta(days=3))
        failed = make_job("FAILED", function="mail.jobs.send", queue_name="mail", priority=50)
        waiting = make_job("READY", background=False, priority=-50)
        assert ids(admin_page(status="FAILED")) == [failed.pk]
        assert ids(admin_page(function="mail.jobs.send")) == [failed.pk]
        assert ids(admin_page(queue="mail")) == [failed.pk]
        assert ids(admin_page(kind="foreground")) == [waiting.pk]
        assert ids(admin_page(priority="high")) == [failed.pk]
        assert ids(admin_page(priority="low")) == [waiting.pk]
        assert ids(admin_page(priority="normal")) == [old.pk]
        assert ids(admin_page(finished="hour")) == [failed.pk]
        assert ids(admin_page(finished="week")) == [failed.pk, old.pk]
        assert ids(admin_page(finished="week", status="SUCCESSFUL", queue="default")) == [old.pk]

    @pytest.mark.parametrize(
        "parameters",
        [{"status": "NONE"}, {"kind": "x"}, {"priority": "9"}, {"finished": "year"}, {"function": "a\0"}],
    )
    def test_nonsense_is_ignored(self, admin_page, make_job, parameters):
        make_job()
        response = admin_page(**parameters)
        assert response.status_code == 302
        assert response.url.endswith("?e=1")

    @pytest.mark.parametrize("lookup", ["message__contains", "traceback__regex", "server__name", "workload"])
    def test_no_lookup_of_anybody_s_own(self, admin_page, db, lookup):
        assert admin_page(**{lookup: "x"}).status_code == 400

    def test_without_an_index_only_recent_jobs_are_looked_at(self, admin_page, make_job, monkeypatch):
        monkeypatch.setattr("django_gearman.admin.change_list.RECENT", 2)
        make_job(background=False)
        second, third = make_job(background=False), make_job(background=False)
        response = admin_page(kind="foreground")
        assert ids(response) == [third.pk, second.pk]
        assert "newest" in response.content.decode()
        assert len(ids(admin_page(status="SUCCESSFUL"))) == 3


class TestFunctionNames:
    def test_sorted_and_without_duplicates(self, make_job):
        for function in ("b.two", "a.one", "b.two", "c.three", "a.one"):
            make_job(function=function)
        assert filters.functions(JobRecord.objects.all()) == ["a.one", "b.two", "c.three"]

    def test_bounded(self, make_job, monkeypatch):
        monkeypatch.setattr(filters, "CHOICES", 3)
        for number in range(5):
            make_job(function=f"f{number}")
        assert filters.functions(JobRecord.objects.all()) == ["f0", "f1", "f2"]

    def test_none(self, db):
        assert filters.functions(JobRecord.objects.all()) == []

    def test_same_names_are_told_apart(self, admin_page, make_job):
        make_job(function="mail.jobs.send")
        make_job(function="sms.jobs.send")
        make_job(function="sms.jobs.receive")
        shown = [display for _value, display in admin_page().context["cl"].filter_specs[1].lookup_choices]
        assert shown == [
            "mail.jobs.send",
            "receive",
            "sms.jobs.send",
        ]


class TestPaginator:
    @pytest.fixture
    def few(self, monkeypatch):
        monkeypatch.setattr(paginator, "LIMIT", 4)

    def pages(self, jobs=None):
        return paginator.JobPaginator((jobs or JobRecord.objects).order_by("-id"), 2)

    def test_small_tables_are_counted(self, make_job):
        for _ in range(3):
            make_job()
        assert str(self.pages().count) == "3"
        assert self.pages().num_pages == 2

    def test_large_tables_are_estimated(self, few, make_job):
        jobs = [make_job() for _ in range(6)]
        JobRecord.objects.filter(pk=jobs[2].pk).delete()
        assert self.pages().count == jobs[-1].pk - jobs[0].pk + 1
        assert str(self.pages().count) == "6+"

    def test_filtered_lists_are_counted_up_to_the_limit(self, few, make_job):
        for _ in range(6):
            make_job()
        assert str(self.pages(JobRecord.objects.filter(status="SUCCESSFUL")).count) == "4+"

    def test_digits_are_grouped_without_the_sign(self, few, make_job, settings):
        settings.USE_THOUSAND_SEPARATOR = True
        assert str(paginator.Roughly(10_000)) == "10000"

    def test_pages_end_at_the_limit(self, few, make_job):
        for _ in range(9):
            make_job()
        pages = self.pages()
        assert pages.num_pages == 2
        assert [job.pk for job in pages.page(99)] == [job.pk for job in pages.page(2)]

    @pytest.mark.parametrize("number", ["99", "0", "-5", "x"])
    def test_list_shows_the_nearest_page(self, admin_page, make_job, monkeypatch, number):
        monkeypatch.setattr(admin.site.get_model_admin(JobRecord), "list_per_page", 2)
        for _ in range(5):
            make_job()
        response = admin_page(p=number)
        assert response.status_code == 200
        assert response.context["cl"].page_num == (3 if number == "99" else 1)

    def test_empty(self, admin_page, db):
        assert ids(admin_page()) == []


class TestOrder:
    def test_newest_first_or_oldest_first(self, admin_page, make_job):
        made = [make_job().pk for _ in range(3)]
        assert ids(admin_page()) == made[::-1]
        assert ids(admin_page(o="1")) == made

    @pytest.mark.parametrize("column", ["2", "3", "9", "99", "x"])
    def test_by_nothing_else(self, admin_page, make_job, column):
        made = [make_job(worker=name).pk for name in "bca"]
        assert ids(admin_page(o=column)) == made[::-1]


class TestCost:
    def queries(self, fetch):
        with CaptureQueriesContext(
            connection,
        ) as captured:
            assert fetch().status_code == 200
        table = connection.ops.quote_name("django_gearman")[:-1]
        return [query["sql"] for query in captured if f"FROM {table}" in query["sql"]]

    @pytest.mark.parametrize("parameters", [{}, {"status": "SUCCESSFUL"}, {"queue": "default", "q": "1"}])
    def test_list_asks_the_same_for_one_job_and_for_many(self, admin_page, make_job, parameters):
        make_job()
        few = self.queries(lambda: admin_page(**parameters))
        for _ in range(30):
            make_job()
        assert len(self.queries(lambda: admin_page(**parameters))) == len(few) <= 7

    def test_list_leaves_payloads_alone(self, admin_page, make_job):
        make_job()
        for query in self.queries(admin_page):
            assert "workload" not in query
            assert "traceback" not in query

    def test_nothing_is_counted_without_a_limit(self, admin_page, make_job):
        make_job()
        for query in self.queries(lambda: admin_page(status="FAILED")):
            assert "COUNT" not in query or "LIMIT" in query

    def test_page_takes_one_query(self, admin_page, make_job):
        job = make_job()
        assert len(self.queries(lambda: admin_page(f"{job.pk}/change/"))) == 1
