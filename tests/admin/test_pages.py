"""The list and the page of one job, as HTML."""

import datetime
import html
import json
import re
from functools import partial

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from django_gearman import chain, group
from django_gearman.models import Cancellation, JobAttempt, JobRecord, ServerLease
from tests.app import jobs
from tests.docs import block_of

from .conftest import LIST

HOSTILE = "<script>alert(1)</script>\"'&\u202e\x01"


def text_of(response):
    return response.content.decode()


@pytest.mark.parametrize("status", JobRecord.Status)
class TestEveryStatus:
    def test_list_shows_it(self, admin_page, make_job, status):
        job = make_job(status)
        page = text_of(admin_page())
        assert f"gearman-status-{status.lower()}" in page
        assert f'title="{job.function}">thumbnail<' in page
        assert ("data-gearman-unfinished" in page) is (status in JobRecord.LIVE)

    def test_page_shows_it(self, admin_page, make_job, status):
        job = make_job(status)
        response = admin_page(f"{job.pk}/change/")
        assert response.status_code == 200
        page = text_of(response)
        assert f"gearman-status-{status.lower()}" in page
        assert job.handle in page
        assert "live.js" in page


class TestMoments:
    def test_the_last_that_there_is(self, admin_page, make_job, settings):
        """As one says for never. In the user's zone it may be of a year that none has."""
        settings.TIME_ZONE = "Asia/Tokyo"
        job = make_job("SCHEDULED", run_after=datetime.datetime.max.replace(tzinfo=datetime.UTC))
        assert "9999-12-31" in text_of(admin_page(f"{job.pk}/change/"))


class TestProgress:
    def test_fraction_is_a_bar_with_figures(self, admin_page, make_job):
        make_job("RUNNING", numerator=3, denominator=6)
        page = text_of(admin_page())
        assert re.search(r'<progress max="6" value="3" aria-label="[^"]+"></progress>', page)
        assert ">3/6<" in page

    @pytest.mark.parametrize(("numerator", "denominator"), [(3, 0), (3, -1), (0, 0)])
    def test_no_fraction_is_figures(self, admin_page, make_job, numerator, denominator):
        make_job("RUNNING", numerator=numerator, denominator=denominator)
        page = text_of(admin_page())
        assert "<progress" not in page
        assert f"{numerator}/{denominator}" in page

    def test_bar_stays_within_its_ends(self, admin_page, make_job):
        make_job("RUNNING", numerator=9, denominator=6)
        make_job("RUNNING", numerator=-2, denominator=6)
        page = text_of(admin_page())
        assert '<progress max="6" value="6"' in page
        assert '<progress max="6" value="0"' in page


class TestEarlierAttempts:
    def test_job_of_one_attempt_has_none(self, admin_page, make_job):
        assert "Earlier attempts" not in text_of(admin_page(f"{make_job('FAILED').pk}/change/"))

    def test_each_says_why(self, admin_page, make_job):
        job = make_job("RETRYING", attempts=2)
        for number in (1, 2):
            JobAttempt.objects.create(
                job=job,
                number=number,
                worker="host:7",
                started_at=job.enqueued_at,
                finished_at=job.enqueued_at + datetime.timedelta(seconds=number),
                exception="builtins.ValueError",
                message=f"attempt {number} {HOSTILE}",
                traceback="Traceback: " + HOSTILE,
            )
        page = text_of(admin_page(f"{job.pk}/change/"))
        assert "Earlier attempts" in page
        assert page.index("attempt 2") < page.index("attempt 1")
        assert "ValueError: attempt 1 &lt;script&gt;" in page
        assert "<script>alert" not in page
        assert "Traceback: &lt;script&gt;" in page
        assert "1.00 s" in page


class TestPageOfOneJob:
    def test_arguments_stand_in_a_table(self, admin_page, make_job):
        job = make_job(call=((1, "two"), {"size": [200]}))
        page = html.unescape(text_of(admin_page(f"{job.pk}/change/")))
        assert '<th scope="row"><bdi>2</bdi></th><td><pre>"two"</pre></td>' in page
        assert '<th scope="row"><bdi>size=</bdi></th><td><pre>[200]</pre></td>' in page

    def test_arguments_of_a_job_with_a_key_stand_in_a_table(self, admin_page, make_job):
        workload = json.dumps({"args": [], "kwargs": {"size": 2}, "trace": {}, "limit": "site"})
        job = make_job(workload=workload.encode())
        page = html.unescape(text_of(admin_page(f"{job.pk}/change/")))
        assert '<th scope="row"><bdi>size=</bdi></th><td><pre>2</pre></td>' in page

    def test_results_of_a_group_are_an_argument(self, admin_page, make_job):
        job = make_job(workload=json.dumps({"args": [5], "kwargs": {}, "results": [7, 0, 3]}).encode())
        page = html.unescape(text_of(admin_page(f"{job.pk}/change/")))
        assert '<th scope="row"><bdi>1</bdi></th><td><pre>The 3 results of group 7</pre></td>' in page
        assert '<th scope="row"><bdi>2</bdi></th><td><pre>5</pre></td>' in page
        odd = make_job(workload=json.dumps({"args": [5], "kwargs": {}, "results": "<b>"}).encode())
        assert "&lt;b&gt;" in text_of(admin_page(f"{odd.pk}/change/"))

    def test_raw_text_is_shown_as_it_is(self, admin_page, make_job):
        job = make_job(workload=b"hello gearman")
        assert ">hello gearman</pre>" in text_of(admin_page(f"{job.pk}/change/"))

    def test_bytes_are_dumped(self, admin_page, make_job):
        job = make_job(result=b"%PDF\x00\xff\xfe")
        assert "00000000  25 50 44 46 00 ff fe" in text_of(admin_page(f"{job.pk}/change/"))

    def test_null_and_empty_payloads(self, admin_page, make_job):
        job = make_job(result=None, workload=b"")
        page = text_of(admin_page(f"{job.pk}/change/"))
        assert "Empty" in page

    def test_huge_payloads_are_cut(self, admin_page, make_job):
        job = make_job(
            "FAILED",
            workload=json.dumps({"args": ["x" * 50_000], "kwargs": {}}).encode(),
            traceback="line\n" * 100_000,
            message="m" * 100_000,
        )
        page = text_of(admin_page(f"{job.pk}/change/"))
        assert len(page) < 250_000
        assert "500000" in page  # characters of the traceback

    def test_megabytes_are_not_read(self, admin_page, make_job):
        job = make_job(workload=b"z" * 3_000_000, result=b"\x00" * 3_000_000)
        response = admin_page(f"{job.pk}/change/")
        assert len(response.content) < 60_000
        assert "2.9\xa0MB" in text_of(response)

    @pytest.mark.parametrize(
        "payload", [b"[" * 60_000, b"[" * 900 + b"]" * 900, b"9" * 6_000, b'"\\ud800"', b"1e999"]
    )
    def test_awkward_json_does_no_harm(self, admin_page, make_job, payload):
        job = make_job(workload=payload, result=payload)
        response = admin_page(f"{job.pk}/change/")
        assert response.status_code == 200
        assert len(response.content) < 100_000

    def test_failure_shows_traceback_in_place_of_result(self, admin_page, make_job):
        job = make_job("FAILED", message="no <b>", traceback="Traceback …\n  File <stdin>")
        page = text_of(admin_page(f"{job.pk}/change/"))
        assert "builtins.ValueError" in page
        assert "no &lt;b&gt;" in page
        assert "File &lt;stdin&gt;</pre>" in page
        assert "field-result_value" not in page

    @pytest.mark.parametrize("key", ["999", "abc", "-1", "9" * 30, "1_00"])
    def test_missing_job_leads_away(self, admin_page, db, key):
        assert admin_page(f"{key}/change/").status_code == 302


class TestHostileTexts:
    @pytest.fixture
    def job(self, make_job):
        return make_job(
            "FAILED",
            call=((HOSTILE,), {HOSTILE: HOSTILE}),
            function=HOSTILE,
            queue_name=HOSTILE,
            unique=HOSTILE,
            reducer=HOSTILE,
            client=HOSTILE,
            worker=HOSTILE,
            exception=HOSTILE,
            message=HOSTILE,
            traceback=HOSTILE,
        )

    def assert_harmless(self, response):
        page = text_of(response)
        assert "<script>alert" not in page
        assert "\x01" not in page
        assert "\\u202e" in page

    def test_list(self, admin_page, job):
        response = admin_page()
        self.assert_harmless(response)
        assert "\u202e" not in html.unescape(text_of(response)).replace("%E2%80%AE", "")

    @pytest.mark.parametrize("address", ["change", "history"])
    def test_page(self, admin_page, job, address):
        response = admin_page(f"{job.pk}/{address}/")
        self.assert_harmless(response)
        assert "\u202e" not in html.unescape(text_of(response))

    @pytest.mark.parametrize(
        "payload", [b"\xff\xfe<script>", b"<script>\x00", b"<script>\xe2\x80\xae</script>"]
    )
    def test_bytes(self, admin_page, make_job, payload):
        job = make_job(workload=payload, result=payload)
        page = text_of(admin_page(f"{job.pk}/change/"))
        body = page[page.index('<div id="content-main">') :]
        assert "<script>" not in body[: body.index("submit-row")]
        assert "\u202e" not in body


class TestContentSecurityPolicy:
    """No page of ours needs 'unsafe-inline'."""

    @pytest.mark.parametrize("address", ["", "{}/change/"])
    def test_nothing_inline(self, admin_page, make_job, address):
        job = make_job("RUNNING", numerator=1, denominator=2)
        make_job("FAILED", traceback="boom")
        page = text_of(admin_page(address.format(job.pk)))
        assert not re.search(r"<script(?![^>]*\bsrc=)", page)
        assert "<style" not in page
        assert not re.search(r"<[a-z][^>]*\s(style|on[a-z]+)=", page)
        assert "javascript:" not in page
        assert re.search(r'<script src="[^"]*django_gearman/live[^"]*\.js" type="module"', page)


class TestReadOnly:
    @pytest.mark.parametrize("method", ["get", "post"])
    def test_add_change_delete_are_refused(self, admin_page, admin_client, make_job, server, method):
        job = make_job()
        request = getattr(admin_client, method)
        refused = [LIST + "add/", f"{LIST}{job.pk}/delete/"]
        leases = LIST.replace("jobrecord", "serverlease")
        refused += [leases + "add/", f"{leases}{server.pk}/delete/"]
        if method == "post":
            refused += [f"{LIST}{job.pk}/change/", f"{leases}{server.pk}/change/"]
        for address in refused:
            assert request(address, {"status": "READY"}).status_code == 403, address
        job.refresh_from_db()
        assert job.status == "SUCCESSFUL"

    def test_delete_action_is_not_offered(self, admin_page, admin_client, make_job):
        job = make_job()
        assert "delete_selected" not in text_of(admin_page())
        admin_client.post(LIST, {"action": "delete_selected", "_selected_action": [job.pk], "post": "yes"})
        assert JobRecord.objects.filter(pk=job.pk).exists()

    def test_looking_takes_the_view_permission(self, client, settings, make_job):
        settings.ROOT_URLCONF = "tests.admin.urls"
        user = User.objects.create_user("op", password="x", is_staff=True)
        client.force_login(user)
        job = make_job()
        assert client.get(LIST).status_code == 403
        assert client.get(f"{LIST}{job.pk}/change/").status_code == 403
        user.user_permissions.add(Permission.objects.get(codename="view_jobrecord"))
        assert client.get(LIST).status_code == 200
        assert client.get(f"{LIST}{job.pk}/change/").status_code == 200


@pytest.fixture
def act(admin_client, settings):
    """Do what the list offers to jobs, and return what it says then."""
    settings.ROOT_URLCONF = "tests.admin.urls"

    def do(action, *jobs, client=admin_client, **more):
        data = {"action": action, "_selected_action": [job.pk for job in jobs], **more}
        response = client.post(LIST, data, follow=True)
        return [str(message) for message in response.context["messages"]]

    return do


class TestCancel:
    """With job servers it is tried in acceptance/test_pool_cancel.py."""

    def test_only_so_many_the_newest_first(self, act, make_job, monkeypatch):
        monkeypatch.setattr("django_gearman.admin.job_record.AT_ONCE", 2)
        jobs = [make_job("READY", server=None) for _ in range(3)]
        newest = "Only the 2 newest of the jobs were looked at: cancel the others once more."
        assert act("cancel", jobs[0], select_across="1") == [newest, "2 jobs were cancelled."]
        assert [JobRecord.objects.get(pk=job.pk).status for job in jobs] == [
            "READY",
            "CANCELLED",
            "CANCELLED",
        ]
        assert act("cancel", jobs[0], select_across="1") == ["1 job was cancelled."]

    def test_each_as_it_stands(self, act, make_job):
        ended, held, free = (
            make_job("FAILED"),
            make_job("RUNNING"),
            make_job("READY", server=None, unique="a"),
        )
        JobRecord.objects.filter(pk=free.pk).update(unique_key="a")
        members = group(jobs.add.s(1), jobs.add.s(2)).enqueue(on_complete=jobs.note.si("over"))
        chained = chain(jobs.add.s(1), jobs.note.s()).enqueue()
        chosen = [
            ended,
            held,
            free,
            *JobRecord.objects.filter(group__isnull=False, group_index__isnull=False),
        ]
        # What a job server has is asked for.
        assert act("cancel", *chosen) == ["6 jobs were cancelled."]
        assert list(Cancellation.objects.values_list("job_id", flat=True)) == [held.pk]
        for job, status in ((ended, "FAILED"), (held, "RUNNING"), (free, "CANCELLED")):
            job.refresh_from_db()
            assert (job.status, job.unique_key) == (status, None)
        for result in (members, chained):
            result.refresh()
            assert (result.is_finished, result.failed) == (True, 2)
        assert members.on_complete.status == "READY"

    def test_takes_as_many_queries_for_many(self, act, make_job):
        counts = []
        for number in (2, 40):
            jobs = [make_job(status, server=None) for status in ("READY", "SCHEDULED") for _ in range(number)]
            jobs += [make_job("RUNNING") for _ in range(number)]
            with CaptureQueriesContext(connection) as queries:
                assert act("cancel", *jobs) == [f"{3 * number} jobs were cancelled."]
            counts.append(len(queries))
        assert counts[0] == counts[1]


class TestEnqueueAgain:
    """The action that does what ``JobResult.retry`` does."""

    @pytest.fixture
    def enqueue_again(self, act):
        return partial(act, "enqueue_again")

    def made_after(self, job):
        return list(JobRecord.objects.filter(pk__gt=job.pk).order_by("pk"))

    def test_each_that_has_ended_oldest_first(self, enqueue_again, make_job):
        old = [
            make_job(
                "FAILED", call=((number,), {}), queue_name="slow", priority=5, max_attempts=3, timeout=60
            )
            for number in range(2)
        ]
        old += [make_job(status) for status in ("DEAD", "CANCELLED", "SUCCESSFUL")]
        assert enqueue_again(*reversed(old)) == ["5 jobs were enqueued again."]
        made = self.made_after(old[-1])
        assert [bytes(job.workload) for job in made] == [bytes(job.workload) for job in old]
        for job in made:
            assert (job.status, job.function) == ("READY", "photos.jobs.thumbnail")
            assert (job.handle, job.server_id, job.attempts, job.worker) == (None, None, 0, "")
        assert (made[0].queue_name, made[0].priority, made[0].max_attempts, made[0].timeout) == (
            "slow",
            5,
            3,
            60,
        )
        assert {job.status for job in JobRecord.objects.filter(pk__lte=old[-1].pk)} == {
            "FAILED", "DEAD", "CANCELLED", "SUCCESSFUL",
        }  # fmt: skip

    def test_what_has_not_ended_is_passed_over(self, enqueue_again, make_job):
        jobs = [make_job("FAILED"), make_job("READY"), make_job("RETRYING")]
        assert enqueue_again(*jobs) == [
            "2 jobs have not ended, and were not enqueued again.",
            "1 job was enqueued again.",
        ]
        assert len(self.made_after(jobs[-1])) == 1

    def test_what_has_a_unique_joins_the_job_that_is_to_do(self, enqueue_again, make_job):
        jobs = [make_job("FAILED", unique="album-7") for _ in range(3)]
        assert enqueue_again(*jobs) == [
            "2 jobs were not enqueued again: jobs of their uniques are still to do.",
            "1 job was enqueued again.",
        ]
        (made,) = self.made_after(jobs[-1])
        assert made.unique == "album-7"

    def test_of_too_many_none(self, enqueue_again, make_job, monkeypatch):
        monkeypatch.setattr("django_gearman.admin.job_record.AT_ONCE", 2)
        jobs = [make_job("FAILED") for _ in range(3)]
        for _ in range(2):
            (said,) = enqueue_again(jobs[0], select_across="1")
            assert said.startswith("More than 2 jobs were chosen, and none was enqueued again.")
        assert not self.made_after(jobs[-1])
        assert enqueue_again(*jobs[:2]) == ["2 jobs were enqueued again."]

    def test_failures_by_code(self, make_job):
        """The loop of docs/monitoring.md."""
        hour = datetime.timedelta(hours=2)
        old = [make_job(status, function="tests.app.jobs.add") for status in ("FAILED", "DEAD", "SUCCESSFUL")]
        old.append(make_job("FAILED", function="tests.app.jobs.add", finished_at=timezone.now() - hour))
        old.append(make_job("FAILED"))
        code = block_of("monitoring.md", "failures")
        exec(code.replace("from photos.jobs import transcode", "from tests.app.jobs import add as transcode"))
        made = self.made_after(old[-1])
        assert [(job.function, job.status) for job in made] == [("tests.app.jobs.add", "READY")] * 2

    def test_takes_the_permission_of_cancelling(self, enqueue_again, client, make_job):
        user = User.objects.create_user("op", password="x", is_staff=True)
        user.user_permissions.add(Permission.objects.get(codename="view_jobrecord"))
        client.force_login(user)
        job = make_job("FAILED")
        assert "enqueue_again" not in text_of(client.get(LIST))
        enqueue_again(job, client=client)
        assert not self.made_after(job)
        user.user_permissions.add(Permission.objects.get(codename="change_jobrecord"))
        assert "enqueue_again" in text_of(client.get(LIST))
        assert enqueue_again(job, client=client) == ["1 job was enqueued again."]
        assert len(self.made_after(job)) == 1


class TestServers:
    def test_list_and_page(self, admin_page, admin_client, server):
        leases = LIST.replace("jobrecord", "serverlease")
        assert "one:4730" in text_of(admin_client.get(leases))
        ServerLease.objects.update(renewed_at="2026-01-01T00:00:00Z")
        assert " ago" in text_of(admin_client.get(f"{leases}{server.pk}/change/"))
