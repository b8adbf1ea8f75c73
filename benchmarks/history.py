"""
What a history costs: claim, replay, the admin list and pruning, with hardly any and with a million records.

    python benchmarks/history.py                      SQLite, in a folder of its own
    DATABASE_URL=postgres://... python benchmarks/history.py --records 1000000

The database must be empty: tables are made, filled and left. Figures are the best of nine, in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROUNDS = 9
FEW = 1_000
"""Finished records to compare with: some pages of the admin's list."""

LIVE = 1_000
"""Jobs that wait, or belong to the server."""


def configure(folder: str) -> None:
    import dj_database_url
    import django
    from django.conf import settings

    database = dj_database_url.parse(os.environ.get("DATABASE_URL") or f"sqlite:///{folder}/db.sqlite3")
    if database["ENGINE"] == "django.db.backends.sqlite3":
        database["OPTIONS"] = {"init_command": "PRAGMA journal_mode=WAL", "transaction_mode": "IMMEDIATE"}
    apps = ["admin", "auth", "contenttypes", "sessions", "messages"]
    settings.configure(
        SECRET_KEY="only for a benchmark",
        DATABASES={"default": database},
        INSTALLED_APPS=[*(f"django.contrib.{app}" for app in apps), "django_gearman"],
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": [
                        "django.template.context_processors.request",
                        "django.contrib.auth.context_processors.auth",
                        "django.contrib.messages.context_processors.messages",
                    ]
                },
            }
        ],
        ROOT_URLCONF="tests.admin.urls",
        STATIC_URL="static/",
        ALLOWED_HOSTS=["*"],
        USE_TZ=True,
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    )
    django.setup()


def fill(count: int) -> None:
    """Finished records of the last 40 days, in the order of their ends, of twenty functions."""
    from django.db import connection, transaction
    from django.utils import timezone

    from django_gearman.models import JobRecord

    begin, step = timezone.now() - timedelta(days=40), timedelta(days=40) / max(count, 1)
    sample = JobRecord(workload=b'{"args": [1], "kwargs": {}}', result=b"null", attempts=1)
    fields = [field for field in JobRecord._meta.concrete_fields if not field.primary_key]
    names = [field.name for field in fields]
    common = [field.get_db_prep_save(getattr(sample, field.attname), connection) for field in fields]
    columns = ", ".join(connection.ops.quote_name(field.column) for field in fields)
    insert = f"INSERT INTO django_gearman_jobrecord ({columns}) VALUES ({', '.join(['%s'] * len(fields))})"
    times = [names.index(name) for name in ("enqueued_at", "started_at", "last_attempted_at", "finished_at")]
    function, status, handle = (names.index(name) for name in ("function", "status", "handle"))

    def rows(numbers: range) -> Iterator[list[object]]:
        for number in numbers:
            row = list(common)
            moment = connection.ops.adapt_datetimefield_value(begin + step * number)
            for index in times:
                row[index] = moment
            row[function] = f"app.jobs.function{number % 20}"
            row[status] = "FAILED" if number % 50 == 0 else "SUCCESSFUL"
            row[handle] = f"H:bench:0.{number}"
            yield row

    for first in range(0, count, 50_000):
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.executemany(insert, list(rows(range(first, min(first + 50_000, count)))))


def best(work: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    """Milliseconds that it takes when nothing else is in the way."""
    figures = []
    for _ in range(ROUNDS):
        prepare()
        began = time.perf_counter()
        work()
        figures.append((time.perf_counter() - began) * 1000)
    return min(figures)


def measure() -> dict[str, float]:
    from django.contrib.auth.models import User
    from django.db import connection
    from django.test import Client

    from django_gearman.history import History, Retention, lanes_of
    from django_gearman.job_declarations import scheduled_record
    from django_gearman.models import JobRecord, Schedule
    from django_gearman.scheduler import Scheduler
    from django_gearman.store import DatabaseStore

    store = DatabaseStore(
        "default",
        "bench",
        history=History(
            "default", lanes_of(Retention(successful=timedelta(days=99), failed=timedelta(days=99)))
        ),
    )
    store.take_lease("")
    live = JobRecord.objects.filter(status__in=JobRecord.LIVE)

    def put() -> None:
        live.delete()
        JobRecord.objects.bulk_create(JobRecord(function="app.jobs.live") for _ in range(LIVE))

    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("VACUUM ANALYZE django_gearman_jobrecord")
    figures = {f"claim of {LIVE}": best(lambda: store.claim(LIVE, []), put)}
    figures[f"replay of {LIVE}"] = best(store.replay)
    live.delete()
    figures["claim of nothing"] = best(lambda: store.claim(LIVE, []))
    scheduler = Scheduler("default", scheduled_record)
    for number in range(100):
        Schedule.objects.get_or_create(name=str(number), function="f", interval=timedelta(days=number + 1))
    other = DatabaseStore("default", "other", scheduler=scheduler)
    other.take_lease("")
    other.claim(LIVE, [])
    figures["... with 100 schedules"] = best(lambda: other.claim(LIVE, []))
    figures["look for what may be pruned"] = best(store.tend)
    user, _ = User.objects.get_or_create(username="admin", is_staff=True, is_superuser=True)
    client = Client()
    client.force_login(user)
    base = "/admin/django_gearman/jobrecord/"
    for name, address in {
        "admin: list": base,
        "admin: of one status": f"{base}?status=FAILED",
        "admin: of one function": f"{base}?function=app.jobs.function7",
        "admin: last page": f"{base}?p=200",
    }.items():
        client.get(address)
        figures[name] = best(lambda address=address: client.get(address))
    return figures


def prune() -> None:
    """Let a server's store prune what is older than a day, as fast as it can."""
    from django_gearman.history import SOON, History, Retention, lanes_of
    from django_gearman.models import JobRecord
    from django_gearman.store import DatabaseStore

    day = timedelta(days=1)
    store = DatabaseStore(
        "default", "bench", history=History("default", lanes_of(Retention(successful=day, failed=day)))
    )
    store.take_lease("")
    count, began, batches = JobRecord.objects.count(), time.perf_counter(), []
    while True:
        at = time.perf_counter()
        pause = store.tend()
        if pause != SOON:
            break
        batches.append((time.perf_counter() - at) * 1000)
    seconds = time.perf_counter() - began
    gone = count - JobRecord.objects.count()
    batches.sort()
    print(
        f"pruned {gone} records in {len(batches)} batches, {gone / seconds:.0f}/s; a batch takes "
        f"{statistics.median(batches):.0f} ms, 99 of 100 up to {batches[len(batches) * 99 // 100]:.0f} ms, "
        f"the longest {batches[-1]:.0f} ms; one a second is {gone / len(batches):.0f}/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--records", type=int, default=1_000_000, help="finished records (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        configure(folder)
        from django.core.management import call_command
        from django.db import connection

        from django_gearman.models import JobRecord

        call_command("migrate", verbosity=0)
        fill(FEW)
        few = measure()
        JobRecord.objects.all().delete()
        began = time.perf_counter()
        fill(options.records)
        print(f"{connection.vendor}: {options.records} records filled in {time.perf_counter() - began:.0f} s")
        with_history = measure()
        print(f"{'ms':32}{FEW:>10}{options.records:>10}")
        for name, figure in few.items():
            print(f"{name:32}{figure:10.2f}{with_history[name]:10.2f}")
        prune()
        connection.close()


if __name__ == "__main__":
    main()
