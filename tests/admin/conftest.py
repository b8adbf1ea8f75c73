import datetime
import itertools
import json

import pytest
from django.utils import timezone

from django_gearman.models import JobRecord, ServerLease

LIST = "/admin/django_gearman/jobrecord/"


@pytest.fixture
def admin_page(admin_client, settings):
    """Fetch a page of the admin by its address below the list of jobs."""
    settings.ROOT_URLCONF = "tests.admin.urls"

    def get(address="", **parameters):
        return admin_client.get(LIST + address, parameters)

    return get


@pytest.fixture
def server(db):
    return ServerLease.objects.create(name="one:4730", epoch=1)


@pytest.fixture
def make_job(server):
    """Insert a job that looks as its status says; keyword arguments override columns."""
    numbers = itertools.count(1)

    def make(status=JobRecord.Status.SUCCESSFUL, *, call=((), {}), **columns):
        args, kwargs = call
        now = timezone.now()
        attempted = status not in ("SCHEDULED", "READY", "CANCELLED")
        finished = status not in JobRecord.LIVE
        defaults = {
            "function": "photos.jobs.thumbnail",
            "workload": json.dumps({"args": list(args), "kwargs": kwargs}).encode(),
            "handle": f"H:one:4730:1.{next(numbers)}",
            "server": server,
            "server_epoch": 1,
            "worker": "host.77" if attempted else "",
            "attempts": int(attempted),
            "enqueued_at": now - datetime.timedelta(seconds=10),
            "started_at": now - datetime.timedelta(seconds=5) if attempted else None,
            "last_attempted_at": now - datetime.timedelta(seconds=5) if attempted else None,
            "finished_at": now if finished else None,
            "result": b'{"width": 200}' if status == "SUCCESSFUL" else None,
            "exception": "builtins.ValueError" if status in ("FAILED", "DEAD", "RETRYING") else "",
        }
        return JobRecord.objects.create(status=status, **{**defaults, **columns})

    return make
