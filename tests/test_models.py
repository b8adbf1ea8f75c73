from __future__ import annotations

import hashlib
from datetime import timedelta
from io import StringIO

import pytest
from django.apps import apps
from django.core.management import call_command
from django.db import IntegrityError, connection
from django.utils import timezone

from django_gearman.models import JobRecord, ServerLease, unique_key_of
from django_gearman.server.entries import Outcome

Status = JobRecord.Status


class TestStatuses:
    def test_each_is_live_or_the_outcome_of_a_job(self) -> None:
        assert {str(outcome) for outcome in Outcome} == set(Status.values) - {
            str(each) for each in JobRecord.LIVE
        }

    @pytest.mark.parametrize("status", Status)
    def test_finished(self, status: Status) -> None:
        assert JobRecord(status=status).is_finished is (status not in JobRecord.LIVE)


class TestDuration:
    def test_none_before_the_first_attempt(self) -> None:
        assert JobRecord().duration is None

    def test_of_the_last_attempt(self) -> None:
        now = timezone.now()
        record = JobRecord(
            started_at=now - timedelta(hours=1),
            last_attempted_at=now - timedelta(seconds=5),
            finished_at=now - timedelta(seconds=2),
        )
        assert record.duration == timedelta(seconds=3)

    def test_so_far(self) -> None:
        record = JobRecord(last_attempted_at=timezone.now() - timedelta(seconds=5))
        assert record.duration is not None
        assert timedelta(seconds=5) <= record.duration < timedelta(seconds=60)


class TestText:
    def test_rows_say_what_they_are(self) -> None:
        assert str(JobRecord(pk=7, function="reverse")) == "reverse #7"
        assert str(ServerLease(name="one:4730")) == "one:4730"


@pytest.mark.django_db
class TestTables:
    def test_the_migrations_tell_the_whole_model(self) -> None:
        call_command("makemigrations", "django_gearman", check=True, dry_run=True, stdout=StringIO())

    def test_texts_are_bytes_in_each_table(self) -> None:
        """A table that comes with a new migration has to be converted, too."""
        if connection.vendor != "mysql":
            pytest.skip("MySQL's own")
        tables = [model._meta.db_table for model in apps.get_app_config("django_gearman").get_models()]
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT table_name, table_collation FROM information_schema.tables "
                "WHERE table_schema = DATABASE() AND table_name IN %s",
                [tables],
            )
            found = dict(cursor.fetchall())
            cursor.execute(
                "SELECT table_name, column_name, collation_name FROM information_schema.columns "
                "WHERE table_schema = DATABASE() AND table_name IN %s AND collation_name NOT LIKE %s",
                [tables, "utf8mb4%bin"],
            )
            others = cursor.fetchall()
        wanted = "utf8mb4_nopad_bin" if connection.mysql_is_mariadb else "utf8mb4_0900_bin"
        assert found == dict.fromkeys(tables, wanted)
        assert not others

    @pytest.mark.parametrize("priority", [-101, 101])
    def test_priorities_have_bounds(self, priority: int) -> None:
        with pytest.raises(IntegrityError):
            JobRecord.objects.create(function="f", priority=priority)

    def test_a_handle_is_used_once(self) -> None:
        JobRecord.objects.create(function="f", handle="H:1")
        with pytest.raises(IntegrityError):
            JobRecord.objects.create(function="f", handle="H:1")

    def test_many_rows_may_have_none(self) -> None:
        JobRecord.objects.create(function="f")
        JobRecord.objects.create(function="f")

    def test_a_server_with_jobs_cannot_be_deleted(self) -> None:
        lease = ServerLease.objects.create(name="one")
        JobRecord.objects.create(function="f", server=lease)
        with pytest.raises(IntegrityError):
            lease.delete()


class TestUniqueKeys:
    """``unique_key_of`` tells jobs apart by function and unique, within the column."""

    UNIQUES = (
        "1",
        "2",
        "1 ",
        "A",
        "a",
        "a:b",
        "é",
        "\x01-",
        "x" * 40,
        "x" * 41,
        "x" * 256,
        "f" * 64,
        hashlib.sha256(b"f\x001").hexdigest(),
    )

    def test_no_two_are_the_same(self) -> None:
        keys = [
            unique_key_of(function, unique) for function in ("f", "F", "f:1", "") for unique in self.UNIQUES
        ]
        keys += [unique_key_of("f", "-", workload) for workload in (b"1", b"2", b"-")]
        assert len(set(keys)) == len(keys)
        assert all(key is not None and key.isascii() and len(key) <= 64 and " " not in key for key in keys)

    def test_those_that_follow_each_other_lie_together(self) -> None:
        keys = [str(unique_key_of("f", str(number))) for number in range(1000, 1010)]
        assert sorted(keys) == keys

    def test_jobs_without_a_unique_have_none(self) -> None:
        assert unique_key_of("f", "", b"abc") is None
        assert unique_key_of("f", "-", b"") is None
