"""The list of schedules, and the form that changes them."""

from __future__ import annotations

import datetime
import json
import re
import time

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test.utils import CaptureQueriesContext

from django_gearman import cron, every
from django_gearman.models import JobRecord, Schedule
from django_gearman.scheduler import synchronise
from tests.app import jobs

LIST = "/admin/django_gearman/schedule/"
HOUR = datetime.timedelta(hours=1)

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def urls(settings):
    settings.ROOT_URLCONF = "tests.admin.urls"


@pytest.fixture
def schedule():
    return Schedule.objects.create(
        name="nightly", function="tests.app.jobs.add", cron="30 2 * * *", tz="Europe/Paris", args=[1]
    )


@pytest.fixture
def declared():
    synchronise("default", {"reverse": ("reverse", every(HOUR, args=["x"]))})
    return Schedule.objects.get(name="reverse")


def page(client, schedule):
    response = client.get(f"{LIST}{schedule.pk}/change/")
    assert response.status_code == 200
    return response


def fields(client, schedule=None):
    """What the form would send unchanged."""
    address = f"{LIST}{schedule.pk}/change/" if schedule else f"{LIST}add/"
    form = client.get(address).context["adminform"].form
    values = {name: form[name].value() for name in form.fields}
    shown = {name: "" if value is None else str(value) for name, value in values.items()}
    # As a browser does with a checkbox.
    return {name: value for name, value in shown.items() if value != "False"}


def save(client, schedule=None, **changes):
    address = f"{LIST}{schedule.pk}/change/" if schedule else f"{LIST}add/"
    sent = {
        name: value for name, value in {**fields(client, schedule), **changes}.items() if value is not None
    }
    return client.post(address, sent)


def refused(response):
    assert response.status_code == 200
    return dict(response.context["adminform"].form.errors)


class TestList:
    def test_shows_when_each_is_due(self, admin_client, schedule, declared):
        Schedule.objects.create(name="off", function="f", interval=HOUR * 36.5, enabled=False)
        text = admin_client.get(LIST).content.decode()
        for part in (
            "30 2 * * *",
            "Europe/Paris",
            "every 1 h",
            "every 1 d 12 h 30 min",
            "Disabled",
            "Enabled",
        ):
            assert part in text
        due = datetime.datetime.fromtimestamp(schedule.next_at, datetime.UTC)
        assert due.isoformat() in text

    def test_says_why_one_cannot_be_fired(self, admin_client, schedule):
        Schedule.objects.update(error="<b>bad</b>", next_at=None)
        text = admin_client.get(LIST).content.decode()
        assert "Cannot be fired:" in text
        assert "&lt;b&gt;bad&lt;/b&gt;" in text

    def test_needs_as_many_queries_for_many(self, admin_client, schedule):
        counts = []
        for name in ("a", "b"):
            with CaptureQueriesContext(connection) as queries:
                admin_client.get(LIST)
            counts.append(len(queries))
            for number in range(20):
                Schedule.objects.create(name=f"{name}{number}", function="f", interval=HOUR)
        assert counts[0] == counts[1]


class TestPage:
    def test_the_next_five_times_on_the_clock_that_is_meant(self, admin_client, schedule):
        # Over the end of winter time, where one time is left out.
        next_at = int(datetime.datetime(2026, 3, 28, 1, 30, tzinfo=datetime.UTC).timestamp())
        Schedule.objects.update(next_at=next_at)
        text = page(admin_client, schedule).content.decode()
        times = re.findall(r'<time datetime="[^"]+">([^<]+) <span class="gearman-quiet">([^<]+)</span>', text)
        assert times == [
            ("Sat 2026-03-28 02:30:00", "CET +0100"),
            ("Sun 2026-03-29 03:00:00", "CEST +0200"),
            ("Mon 2026-03-30 02:30:00", "CEST +0200"),
            ("Tue 2026-03-31 02:30:00", "CEST +0200"),
            ("Wed 2026-04-01 02:30:00", "CEST +0200"),
        ]

    def test_of_one_that_rests_there_are_none(self, admin_client, schedule):
        schedule.enabled = False
        schedule.save()
        assert "gearman-times" not in page(admin_client, schedule).content.decode()

    def test_of_one_that_was_spoilt(self, admin_client, schedule):
        Schedule.objects.update(cron="x")
        assert "five fields" in page(admin_client, schedule).content.decode()

    def test_of_one_that_no_form_would_take(self, admin_client, schedule):
        year_10240 = 261_000_000_000
        Schedule.objects.update(cron="", interval=datetime.timedelta(days=3_000_000), next_at=year_10240)
        assert "every 3000000 d" in admin_client.get(LIST).content.decode()
        assert "36500 days or less" in page(admin_client, schedule).content.decode()

    @pytest.mark.skipif(connection.vendor != "sqlite", reason="others take no half of a pair")
    def test_of_one_whose_arguments_no_page_can_show(self, admin_client, schedule):
        Schedule.objects.update(args=["\ud800"])
        assert "\\ud800" in page(admin_client, schedule).content.decode()

    def test_leads_to_the_last_job(self, admin_client, schedule):
        job = JobRecord.objects.create(function="f")
        Schedule.objects.update(last_job=job.pk, last_at=1_700_000_000)
        text = page(admin_client, schedule).content.decode()
        assert f'href="/admin/django_gearman/jobrecord/{job.pk}/change/"' in text
        assert "2023-11-14" in text

    def test_says_what_the_code_says(self, admin_client, declared):
        assert "as here" in page(admin_client, declared).content.decode()
        declared.interval = HOUR * 2
        declared.save()
        text = page(admin_client, declared).content.decode()
        assert "every 1 h" in text
        assert "edited here" in text

    def test_without_cronsim_it_names_the_extra(self, admin_client, schedule, monkeypatch):
        monkeypatch.setattr("django_gearman.schedules.has_cronsim", lambda: False)
        assert "our extra [schedules]" in page(admin_client, schedule).content.decode()
        errors = refused(save(admin_client, schedule, cron="1 2 * * *"))
        assert "our extra [schedules]" in str(errors["cron"])


class TestSaving:
    def test_a_new_one(self, admin_client):
        response = save(
            admin_client, name="n", function="resize", cron="*/5 * * * *", args='["a"]', kwargs=""
        )
        assert response.status_code == 302
        made = Schedule.objects.get()
        assert (made.args, made.kwargs, made.catch_up, made.declared) == (["a"], {}, "one", None)
        assert 0 < made.next_at - time.time() <= 300

    def test_an_edit_is_never_for_a_time_that_has_passed(self, admin_client, schedule):
        Schedule.objects.update(next_at=5)
        assert save(admin_client, schedule, cron="* * * * *").status_code == 302
        schedule.refresh_from_db()
        assert 0 < schedule.next_at - time.time() <= 60

    def test_other_fields_leave_the_time_alone(self, admin_client, schedule):
        save(admin_client, schedule, args="[7]", queue_name="slow", priority="3", catch_up="all")
        now = Schedule.objects.get()
        assert now.next_at == schedule.next_at
        assert (now.args, now.queue_name, now.priority, now.catch_up) == ([7], "slow", 3, "all")

    def test_a_server_that_fires_meanwhile_is_not_undone(self, admin_client, schedule, monkeypatch):
        original = Schedule.clean

        def clean(self):
            original(self)
            Schedule.objects.filter(pk=self.pk).update(next_at=9_000_000_000, last_at=8_000_000_000)

        monkeypatch.setattr(Schedule, "clean", clean)
        save(admin_client, schedule, args="[7]")
        now = Schedule.objects.get()
        assert (now.args, now.next_at, now.last_at) == ([7], 9_000_000_000, 8_000_000_000)

    def test_nothing_changed(self, admin_client, schedule):
        before = Schedule.objects.values().get()
        assert save(admin_client, schedule).status_code == 302
        assert Schedule.objects.values().get() == before

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"cron": "61 * * * *"}, "cron"),
            ({"tz": "Europe/Pari"}, "tz"),
            ({"args": "{}"}, "args"),
            ({"args": "[1"}, "args"),
            ({"args": "[1, 2, 3]"}, "args"),
            ({"kwargs": '{"middle": 1}'}, "args"),
            ({"interval": "1:00"}, "cron"),
            ({"cron": ""}, "__all__"),
            ({"priority": "101"}, "__all__"),
            ({"cron": "", "interval": "36501 00:00:00"}, "interval"),
            ({"cron": "", "interval": "106751992 00:00:00"}, "interval"),
            ({"args": '["\\u0000"]'}, "args"),
            ({"kwargs": '{"\\u0000": 1}'}, "kwargs"),
            ({"args": '[{"a": "\\ud800"}]'}, "args"),
            ({"args": "[" * 31 + "]" * 31}, "args"),
            ({"args": "[" * 3_000 + "]" * 3_000}, "args"),
            ({"args": "[" * 100_000 + "]" * 100_000}, "args"),
            ({"args": f"[{'9' * 5_000}]"}, "args"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_what_is_refused(self, admin_client, schedule, changes, field):
        response = save(admin_client, schedule, **changes)
        assert field in refused(response)
        # What was typed is there to be mended.
        (typed,) = (response.context["adminform"].form[name].value() for name in list(changes)[-1:])
        assert typed == list(changes.values())[-1]
        assert Schedule.objects.get().cron == "30 2 * * *"

    @pytest.mark.parametrize(
        "args",
        [
            "[" * 30 + "1" + "]" * 30,
            f"[{'9' * 4_000}]",
            '["\\u202e\\u001b"]',
            '["\\ud83d\\ude00", "\\\\u0000"]',
        ],
        ids=range(4),
    )
    def test_what_is_odd_and_taken(self, admin_client, schedule, args):
        # Of a function that is not known here any arguments may be right.
        Schedule.objects.update(function="elsewhere")
        assert save(admin_client, schedule, args=args).status_code == 302
        assert Schedule.objects.get().args == json.loads(args)
        text = page(admin_client, schedule).content.decode()
        assert "\u202e" not in text
        assert admin_client.get(LIST).status_code == 200
        assert save(admin_client, schedule).status_code == 302
        assert Schedule.objects.get().args == json.loads(args)

    def test_a_unique_that_raises(self, admin_client, schedule, monkeypatch):
        monkeypatch.setattr(jobs.add, "unique", lambda left, right=1: {}[left])
        errors = refused(save(admin_client, schedule, args="[7]"))
        assert errors["args"] == ["the unique of tests.app.jobs.add raised KeyError: 7"]

    def test_what_the_code_names_keeps_its_name(self, admin_client, declared):
        save(admin_client, declared, name="other", function="other", args='["y"]')
        now = Schedule.objects.get()
        assert (now.name, now.function, now.args) == ("reverse", "reverse", ["y"])


class TestActions:
    def act(self, client, action, *schedules):
        sent = {"action": action, "_selected_action": [each.pk for each in schedules]}
        response = client.post(LIST, sent, follow=True)
        assert response.status_code == 200
        return response.content.decode()

    def test_disable_and_enable(self, admin_client, schedule, declared):
        self.act(admin_client, "disable", schedule, declared)
        assert set(Schedule.objects.values_list("enabled", "next_at")) == {(False, None)}
        self.act(admin_client, "enable", schedule)
        schedule.refresh_from_db()
        assert schedule.next_at > time.time()

    def test_enqueue_now(self, admin_client, schedule):
        text = self.act(admin_client, "enqueue_now", schedule)
        assert "1 job was enqueued." in text
        assert JobRecord.objects.get().client == "schedule nightly"
        assert Schedule.objects.get().next_at == schedule.next_at

    def test_enqueue_those_whose_last_job_is_to_do(self, admin_client, schedule):
        function = jobs.append_once.name
        for name in ("a", "b"):
            Schedule.objects.create(name=name, function=function, interval=HOUR, args=["path", name])
        chosen = list(Schedule.objects.all())
        text = self.act(admin_client, "enqueue_now", *chosen)
        assert "2 jobs were enqueued." in text
        assert "Schedule b: its last job is still to do" in text
        assert "Schedule a: its last job" not in text
        clients = JobRecord.objects.values_list("client", flat=True)
        assert sorted(clients) == ["schedule a", "schedule nightly"]
        text = self.act(admin_client, "enqueue_now", *chosen)
        assert "1 job was enqueued." in text
        assert "Schedule a: its last job is still to do" in text

    def test_enqueue_what_cannot_be(self, admin_client, schedule):
        Schedule.objects.update(args=[1, 2, 3])
        assert "too many positional arguments" in self.act(admin_client, "enqueue_now", schedule)
        assert not JobRecord.objects.exists()

    def test_take_what_the_code_says(self, admin_client, schedule, declared):
        declared.interval, declared.args = None, ["z"]
        declared.cron = "1 2 3 4 *"
        declared.save()
        self.act(admin_client, "reset_to_code", schedule, declared)
        now = Schedule.objects.get(name="reverse")
        assert (now.interval, now.cron, now.args) == (HOUR, "", ["x"])
        assert 3500 < now.next_at - time.time() <= 3600
        schedule.refresh_from_db()
        assert schedule.cron == "30 2 * * *"

    def test_those_of_the_code_are_not_deleted(self, admin_client, schedule, declared):
        assert admin_client.post(f"{LIST}{declared.pk}/delete/", {"post": "yes"}).status_code == 403
        selected = {"_selected_action": [schedule.pk, declared.pk]}
        admin_client.post(LIST, {"action": "delete_selected", "post": "yes", **selected})
        assert Schedule.objects.count() == 2
        assert admin_client.post(f"{LIST}{schedule.pk}/delete/", {"post": "yes"}).status_code == 302
        synchronise("default", {})
        assert admin_client.post(f"{LIST}{declared.pk}/delete/", {"post": "yes"}).status_code == 302
        assert not Schedule.objects.exists()

    def test_who_may_only_look(self, client, schedule):
        user = User.objects.create_user("looker", is_staff=True)
        user.user_permissions.add(Permission.objects.get(codename="view_schedule"))
        client.force_login(user)
        text = client.get(LIST).content.decode()
        assert "enqueue_now" not in text
        assert client.get(f"{LIST}{schedule.pk}/change/").status_code == 200
        assert client.post(f"{LIST}{schedule.pk}/change/", {"name": "x"}).status_code == 403
        client.post(LIST, {"action": "enqueue_now", "_selected_action": [schedule.pk]})
        assert not JobRecord.objects.exists()


class TestCron:
    def test_one_that_the_code_declares(self, admin_client):
        synchronise("default", {"c": ("c", cron("5 4 * * *", tz="Asia/Tokyo"))})
        assert "5 4 * * * Asia/Tokyo" in page(admin_client, Schedule.objects.get()).content.decode()
