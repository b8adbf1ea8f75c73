"""The admin where the jobs are in another database than the default one."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.db import connections
from django.db.models.signals import post_init
from django.db.utils import load_backend
from django.test import Client

from django_gearman import every, group
from django_gearman.limiting import synchronise
from django_gearman.models import FunctionLimit, JobAttempt, JobGroup, JobRecord, Schedule, ServerLease
from django_gearman.scheduler import synchronise as synchronise_schedules
from tests.app import jobs

HOUR = datetime.timedelta(hours=1)
OURS = "/admin/django_gearman/"
SCHEDULE = {"name": "s", "function": "f", "interval": "60", "catch_up": "one", "enabled": "on"}
LIMIT = {"function": "f", "rate": "10/m", "enabled": "on"}


@pytest.fixture(autouse=True)
def jobs_database(db: None, tmp_path: Path, settings: Any) -> Iterator[None]:
    """A database beside the default one, with our tables alone."""
    settings.ROOT_URLCONF = "tests.admin.urls"
    backend = load_backend("django.db.backends.sqlite3")
    path = str(tmp_path / "jobs.sqlite3")
    wanted = {**connections["default"].settings_dict, "ENGINE": backend.__name__, "NAME": path, "OPTIONS": {}}
    connection = backend.DatabaseWrapper(wanted, "jobs")
    # Before it is known: Django's test case would let nobody connect to what is not one of its own.
    connection.ensure_connection()
    connections.databases["jobs"], connections["jobs"] = wanted, connection
    try:
        with connection.schema_editor() as editor:
            for model in apps.get_app_config("django_gearman").get_models():
                editor.create_model(model)
        settings.GEARMAN = {"default": {**settings.GEARMAN["default"], "DATABASE": "jobs"}}
        yield
    finally:
        del connections["jobs"], connections.databases["jobs"]
        connection.close()


def refused(response: Any) -> dict[str, Any]:
    assert response.status_code == 200
    return dict(response.context["adminform"].form.errors)


class TestPages:
    def test_lists_and_pages_show_what_is_there(self, admin_client: Client) -> None:
        server = ServerLease.objects.using("jobs").create(name="one:4730")
        made = group(jobs.add.s(1)).enqueue(on_complete=jobs.note.si("over"))
        job = JobRecord.objects.using("jobs").earliest("pk")
        job.server = server
        job.save()
        JobAttempt.objects.using("jobs").create(job=job, number=1, finished_at=job.enqueued_at, worker="w.77")
        schedule = Schedule(name="hourly", function="f", interval=HOUR, last_job=job.pk)
        schedule.save(using="jobs")
        limit = FunctionLimit.objects.using("jobs").create(function="limited", concurrency=2)
        for address, shown in (
            ("jobrecord/", "tests.app.jobs.add"),
            (f"jobrecord/?group={made.id}&queue=default&q={job.pk}", "tests.app.jobs.add"),
            (f"jobrecord/{job.pk}/change/", f"jobgroup/{made.id}/change/"),
            (f"jobrecord/{job.pk}/change/", "w.77"),
            (f"jobrecord/{job.pk}/history/", "tests.app.jobs.add"),
            ("jobgroup/", f"jobgroup/{made.id}/change/"),
            (f"jobgroup/{made.id}/change/", f"jobrecord/{made.on_complete.id}/change/"),
            ("serverlease/", "one:4730"),
            (f"serverlease/{server.pk}/change/", "one:4730"),
            ("schedule/", "hourly"),
            (f"schedule/{schedule.pk}/change/", f"jobrecord/{job.pk}/change/"),
            ("functionlimit/", "limited"),
            (f"functionlimit/{limit.pk}/change/", "limited"),
        ):
            response = admin_client.get(OURS + address)
            assert response.status_code == 200, address
            assert shown in response.content.decode(), address
        assert not JobGroup.objects.using("default").exists()

    def test_actions_on_jobs(self, admin_client: Client) -> None:
        job = jobs.add.enqueue(1)
        for action, status in (("cancel", "CANCELLED"), ("enqueue_again", "READY")):
            admin_client.post(f"{OURS}jobrecord/", {"action": action, "_selected_action": [job.id]})
            assert JobRecord.objects.using("jobs").latest("pk").status == status
        assert JobRecord.objects.using("jobs").count() == 2


class Elsewhere:
    """A router as of sites with replicas, which knows nothing of ``DATABASE``."""

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return "default"

    db_for_write = db_for_read


@pytest.fixture
def routed(settings: Any) -> None:
    settings.DATABASE_ROUTERS = [Elsewhere()]


@pytest.mark.usefixtures("routed")
class TestRouted:
    """``DATABASE`` says where our rows are, and not a router, which may name a replica."""

    def test_attempts(self, admin_client: Client) -> None:
        result = jobs.add.enqueue(1)
        record = JobRecord.objects.using("jobs").get()
        past = JobAttempt(job_id=record.pk, number=1, finished_at=record.enqueued_at, message="it was lost")
        past.save(using="jobs")
        assert [error.message for error in result.errors] == ["it was lost"]
        assert b"it was lost" in admin_client.get(f"{OURS}jobrecord/{record.pk}/change/").content

    def test_refresh_where_somebody_listens(self) -> None:
        result = jobs.add.enqueue(1)
        JobRecord.objects.using("jobs").update(status=JobRecord.Status.RUNNING)
        listen = partial(dict)
        post_init.connect(listen, sender=JobRecord)
        try:
            result.refresh()
        finally:
            post_init.disconnect(listen, sender=JobRecord)
        assert result.status == "RUNNING"

    @pytest.mark.parametrize("model", [Schedule, FunctionLimit])
    def test_rows(self, admin_client: Client, model: Any) -> None:
        limit = {"rate": "10/m", "concurrency": None, "by_key": False}
        if model is Schedule:
            synchronise_schedules("jobs", {"f": ("f", every(HOUR))})
            model.objects.using("jobs").update(interval=2 * HOUR)
        else:
            synchronise("jobs", {"f": limit})
            model.objects.using("jobs").update(rate="20/m")
        row = model.objects.using("jobs").get()
        address = f"{OURS}{model._meta.model_name}/"
        for action in ("disable", "reset_to_code"):
            admin_client.post(address, {"action": action, "_selected_action": [row.pk]})
        row = model.objects.using("jobs").get()
        assert not row.enabled
        assert row.interval == HOUR if model is Schedule else row.rate == "10/m"
        model.objects.using("jobs").update(declared=None)
        assert admin_client.post(f"{address}{row.pk}/delete/", {"post": "yes"}).status_code == 302
        assert not model.objects.using("jobs").exists()


class TestRows:
    """Schedules and limits."""

    @pytest.mark.parametrize(
        ("model", "sent", "key"), [(Schedule, SCHEDULE, "name"), (FunctionLimit, LIMIT, "function")]
    )
    def test_made_once_changed_and_deleted(
        self, admin_client: Client, model: Any, sent: dict[str, Any], key: str
    ) -> None:
        address = f"{OURS}{model._meta.model_name}/"
        # One of the same name in the default database is another.
        row = model(**{key: sent[key]}, **({"cron": "* * * * *"} if model is Schedule else {"rate": "1/m"}))
        row.save(using="default")
        assert admin_client.post(f"{address}add/", sent).status_code == 302
        assert "already exists" in str(refused(admin_client.post(f"{address}add/", sent))[key])
        made = model.objects.using("jobs").get()
        for action, enabled in (("disable", False), ("enable", True)):
            admin_client.post(address, {"action": action, "_selected_action": [made.pk]})
            made.refresh_from_db()
            assert made.enabled is enabled
        changed = {**sent, key: "g"}
        assert admin_client.post(f"{address}{made.pk}/change/", changed).status_code == 302
        made.refresh_from_db()
        assert getattr(made, key) == "g"
        assert admin_client.post(f"{address}{made.pk}/change/", changed).status_code == 302
        assert b"Changed" in admin_client.get(f"{address}{made.pk}/history/").content
        assert admin_client.get(f"{address}{made.pk}/delete/").status_code == 200
        assert admin_client.post(f"{address}{made.pk}/delete/", {"post": "yes"}).status_code == 302
        assert not model.objects.using("jobs").exists()
        assert model.objects.using("default").count() == 1
        # The default database keeps what was done here; no link of it breaks.
        assert admin_client.get("/admin/").status_code == 200

    def test_several_are_deleted(self, admin_client: Client) -> None:
        row = FunctionLimit.objects.using("jobs").create(function="f", rate="1/m")
        chosen = {"action": "delete_selected", "_selected_action": [row.pk]}
        assert admin_client.post(f"{OURS}functionlimit/", chosen).status_code == 200
        admin_client.post(f"{OURS}functionlimit/", {**chosen, "post": "yes"})
        assert not FunctionLimit.objects.using("jobs").exists()

    def test_what_the_code_says(self, admin_client: Client) -> None:
        synchronise("jobs", {"f": {"rate": "10/m", "concurrency": None, "by_key": False}})
        row = FunctionLimit.objects.using("jobs").get()
        admin_client.post(f"{OURS}functionlimit/{row.pk}/change/", {"rate": "20/m", "enabled": "on"})
        row.refresh_from_db()
        assert row.rate == "20/m"
        admin_client.post(f"{OURS}functionlimit/", {"action": "reset_to_code", "_selected_action": [row.pk]})
        row.refresh_from_db()
        assert row.rate == "10/m"

    def test_a_job_now(self, admin_client: Client) -> None:
        row = Schedule(name="s", function="tests.app.jobs.add", interval=HOUR, args=[1])
        row.save(using="jobs")
        admin_client.post(f"{OURS}schedule/", {"action": "enqueue_now", "_selected_action": [row.pk]})
        assert JobRecord.objects.using("jobs").get().client == "schedule s"
