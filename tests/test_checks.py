from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.checks import run_checks
from django.db import OperationalError, ProgrammingError, connection

from django_gearman import cron, every, job
from django_gearman.checks import (
    check_databases,
    check_durability,
    check_settings,
    check_task_backends,
    check_transactions,
)
from django_gearman.durability import durability_problems
from django_gearman.models import JobRecord
from django_gearman.registry import registry
from django_gearman.schedules import Declaration

from .app.jobs import fail
from .harness import ROOT


def ids(**options: Any) -> list[str | None]:
    return [message.id for message in run_checks(tags=["gearman"], **options)]


class TestSettings:
    def test_those_of_the_tests(self) -> None:
        assert ids() == []

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ([], ["django_gearman.E002"]),
            ({"default": {"SERVRES": []}}, ["django_gearman.E002"]),
            ({"default": {}, "other": {"TIMEOUT": -1}, "third": None}, ["django_gearman.E002"] * 2),
            ({"defualt": {"TIMEOUT": 5}, "other": {}}, ["django_gearman.E002"]),
            ({"SERVERS": ["a:1"], "TIMEOUT": 5}, ["django_gearman.E002"]),
            ({"default": {}, "defualt": {"TIMEOUT": 5}}, ["django_gearman.W010"]),
            ({"default": {"DATABASE": "jobs"}}, ["django_gearman.E009"]),
            (
                {"default": {"DATABASE": "jobs"}, "other": {"X": 1}},
                ["django_gearman.E009", "django_gearman.E002"],
            ),
        ],
    )
    def test_each_alias_is_looked_at(self, settings: Any, value: Any, expected: list[str]) -> None:
        settings.GEARMAN = value
        assert ids() == expected
        assert all(message.hint for message in check_settings(app_configs=None))


class TestDatabases:
    @pytest.fixture
    def database(self, settings: Any) -> dict[str, Any]:
        settings.DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "OPTIONS": {}}}
        return settings.DATABASES["default"]

    @pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
    def test_sqlite_wants_immediate_transactions(self, database: dict[str, Any]) -> None:
        assert [message.id for message in check_databases(app_configs=None)] == ["django_gearman.W001"]
        database["OPTIONS"]["transaction_mode"] = "immediate"
        assert check_databases(app_configs=None) == []

    @pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
    def test_a_plain_check_says_so(self, database: dict[str, Any]) -> None:
        """Django leaves out what is tagged as a check of databases; this one only reads settings."""
        assert "django_gearman.W001" in [message.id for message in run_checks()]

    @pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
    def test_sqlite_wants_a_write_ahead_log(self, database: dict[str, Any], tmp_path: Path) -> None:
        database["OPTIONS"]["transaction_mode"] = "IMMEDIATE"
        file = tmp_path / "db.sqlite3"
        for name in (":memory:", "file:memorydb_default?mode=memory&cache=shared", "a\0b", file):
            database["NAME"] = name
            assert check_databases(app_configs=None) == []
        with closing(sqlite3.connect(file)) as plain:
            plain.execute("CREATE TABLE some (id INT)")
        (found,) = check_databases(app_configs=None)
        assert found.id == "django_gearman.W007"
        assert found.hint
        assert "journal_mode=WAL" in found.hint
        database["OPTIONS"]["init_command"] = "PRAGMA synchronous=FULL; pragma JOURNAL_MODE = 'wal'"
        assert check_databases(app_configs=None) == []
        del database["OPTIONS"]["init_command"]
        with closing(sqlite3.connect(file)) as plain:
            plain.execute("PRAGMA journal_mode=WAL")
        assert check_databases(app_configs=None) == []

    @pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
    @pytest.mark.parametrize("door", ["database", "wire"])
    def test_jobs_in_another_database(self, settings: Any, door: str) -> None:
        """By the wire they are submitted after the commit of that one."""
        settings.DATABASES = {"default": {}, "jobs": {}}
        settings.GEARMAN = {"default": {}, "other": {"DATABASE": "jobs", "ENQUEUE": door}}
        (found,) = check_transactions(app_configs=None)
        assert found.id == "django_gearman.W008"
        assert "GEARMAN['other']['DATABASE'] is 'jobs'" in found.msg
        assert found.hint
        settings.GEARMAN = {"default": {"DATABASE": "nowhere"}}
        assert check_transactions(app_configs=None) == []  # E009 tells

    @pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
    def test_other_databases_are_left_alone(self, settings: Any) -> None:
        settings.DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql"}}
        assert check_databases(app_configs=None) == []

    @pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
    def test_wrong_settings_are_another_check(self, database: dict[str, Any], settings: Any) -> None:
        settings.GEARMAN = {"default": {"X": 1}}
        assert check_databases(app_configs=None) == []


class TestSchedules:
    @pytest.fixture(autouse=True)
    def restore(self) -> Iterator[None]:
        before = dict(registry)
        yield
        registry.clear()
        registry.update(before)

    @pytest.mark.parametrize(
        ("declared", "said"),
        [
            (cron("61 * * * *", args=["x"]), "the cron '61 * * * *' cannot be read: Bad minute"),
            (cron("* * * * *", tz="Europe/Pari", args=["x"]), "'Europe/Pari' is no time zone"),
            (every(timedelta(0), args=["x"]), "an interval is one second or more"),
            (every(timedelta(40_000), args=["x"]), "an interval is 36500 days or less"),
            (every(timedelta(1)), "missing a required argument: 'message'"),
            (
                every(timedelta(1), args=[timedelta(1)]),
                "argument 'message' of tests.app.jobs.fail is a timedelta",
            ),
        ],
    )
    def test_what_does_not_work(self, declared: Declaration, said: str) -> None:
        job(schedule=[declared, every(timedelta(1), args=["x"], name="fine")])(fail.function)
        (found,) = run_checks(tags=["gearman"])
        assert found.id == "django_gearman.E006"
        assert "The schedule of tests.app.jobs.fail does not work" in found.msg
        assert said in found.msg
        assert found.hint

    def test_a_unique_that_raises(self) -> None:
        def of(message: str) -> str:
            return {}[message]

        job(schedule=every(timedelta(1), args=["x"]), unique=of)(fail.function)
        (found,) = run_checks(tags=["gearman"])
        assert found.id == "django_gearman.E006"
        assert "the unique of tests.app.jobs.fail raised KeyError: 'x'" in found.msg

    @pytest.mark.parametrize("fault", [OperationalError, ProgrammingError])
    def test_a_unique_that_asks_a_database_without_tables(self, fault: type[Exception]) -> None:
        """The check runs before the first migration, too."""

        def of(message: str) -> str:
            raise fault("no such table")

        job(schedule=every(timedelta(1), args=["x"]), unique=of)(fail.function)
        assert ids() == []

    def test_what_works(self) -> None:
        job(schedule=cron("*/5 * * * *", tz="Europe/Paris", args=["x"]))(fail.function)
        assert ids() == []

    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        job(schedule=every(timedelta(1), args=["x"]))(fail.function)
        monkeypatch.setattr("django_gearman.schedules.has_cronsim", lambda: False)
        assert ids() == []
        job(schedule=[cron("* * * * *", args=["x"]), cron("1 * * * *", args=["x"], name="b")])(fail.function)
        (found,) = run_checks(tags=["gearman"])
        assert found.id == "django_gearman.E011"
        assert "pip install cronsim (our extra [schedules];" in found.msg


@pytest.mark.skipif(not hasattr(settings, "TASKS"), reason="needs django.tasks or django-tasks")
class TestTaskBackends:
    def test_one_that_is_not_there(self, settings: Any) -> None:
        settings.TASKS = {
            "default": {"BACKEND": "django_gearman.backends.GearmanBackend"},
            "misspelt": {"BACKEND": "django_gearman.backends.GaermanBackend"},
            "missing": {"BACKEND": "does.not.exist"},
        }
        found = check_task_backends(app_configs=None)
        assert [message.id for message in found] == ["django_gearman.E017"] * 2
        assert "TASKS['misspelt']['BACKEND'] is 'django_gearman.backends.GaermanBackend'" in found[0].msg
        assert "No module named 'does'" in found[1].msg

    def test_settings_that_are_not_ours(self, settings: Any) -> None:
        for tasks in (None, {}, [], {"default": None}, {"default": {}}, {"default": {"BACKEND": 3}}):
            settings.TASKS = tasks
            assert check_task_backends(app_configs=None) == []

    def test_the_backport_without_its_app(self, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        settings.TASKS = {"default": {"BACKEND": "django_gearman.backends.GearmanBackend"}}
        assert check_task_backends(app_configs=None) == []
        monkeypatch.setattr("django_gearman.checks.find_spec", lambda name: None)
        monkeypatch.setattr("django.apps.apps.is_installed", lambda name: name != "django_tasks")
        (found,) = check_task_backends(app_configs=None)
        assert found.id == "django_gearman.W009"
        assert found.hint == 'Add "django_tasks" to INSTALLED_APPS.'


class TestWorkers:
    def test_what_groups_name_that_is_not_there(self, settings: Any) -> None:
        groups = {
            "some": {"FUNCTIONS": ["tests.app.jobs.add", "tests.app.jobs.ad"]},
            "rest": {"QUEUES": ["default", "vidoe"], "EXCLUDE": ["shuot"]},
        }
        settings.GEARMAN = {"default": {"WORKERS": groups}}
        found = run_checks(tags=["gearman"])
        assert [message.id for message in found] == ["django_gearman.W011"] * 3
        assert "['WORKERS']['some']['FUNCTIONS'] names 'tests.app.jobs.ad', which is no" in found[0].msg
        assert "['WORKERS']['rest']['EXCLUDE'] names 'shuot', which is no function" in found[1].msg
        assert all(message.msg.endswith("gearman_worker does not start with it.") for message in found[:2])
        assert "['WORKERS']['rest']['QUEUES'] names 'vidoe', a queue without functions" in found[2].msg
        assert all("tests.app.jobs.add" in str(message.hint) for message in found[:2])


class TestTLS:
    def test_files_that_are_not_there(self, settings: Any, tmp_path: Path) -> None:
        there = tmp_path / "ca.pem"
        there.touch()
        files = {"TLS_CA": there, "TLS_CERTIFICATE": "/nowhere/a.pem", "TLS_KEY": str(tmp_path)}
        settings.GEARMAN = {"default": files}
        found = run_checks(tags=["gearman"])
        assert [message.id for message in found] == ["django_gearman.E010"] * 2
        assert "GEARMAN['default']['TLS_CERTIFICATE'] is '/nowhere/a.pem'" in found[0].msg
        assert "['TLS_KEY']" in found[1].msg

    @pytest.mark.parametrize(
        ("servers", "warned"),
        [
            (["127.0.0.1:4730", "127.9.9.9", "localhost", "[::1]:4730"], False),
            (["127.0.0.1", "192.0.2.1:4730"], True),
            (["jobs.example.org"], True),
            (["[2001:db8::1]:4730"], True),
        ],
    )
    def test_plain_text_over_a_network(self, settings: Any, servers: list[str], warned: bool) -> None:
        settings.GEARMAN = {"default": {"SERVERS": servers}}
        assert ids() == []
        assert ids(include_deployment_checks=True) == ["django_gearman.W003"] * warned

    def test_with_tls_there_is_nothing_to_say(self, settings: Any, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").touch()
        settings.GEARMAN = {"default": {"SERVERS": ["a.example:1"], "TLS_CA": tmp_path / "ca.pem"}}
        assert ids(include_deployment_checks=True) == []

    def test_wrong_settings_are_another_check(self, settings: Any) -> None:
        settings.GEARMAN = {"default": {"X": 1}}
        assert ids(include_deployment_checks=True) == ["django_gearman.E002"]


@pytest.mark.django_db(transaction=True)
class TestDurability:
    """What the database itself tells; each database shows its own part."""

    @pytest.fixture(autouse=True)
    def packets(self, settings: Any) -> Iterator[None]:
        settings.GEARMAN = {"default": {"MAX_PACKET": 4_000_000}}
        if connection.vendor != "mysql":
            yield
        else:
            # The database of a test run may have been told to be quick.
            with connection.cursor() as cursor:
                cursor.execute("SELECT @@innodb_flush_log_at_trx_commit")
                (before,) = cursor.fetchone()
                cursor.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
                yield
                cursor.execute("SET GLOBAL innodb_flush_log_at_trx_commit = %s", [before])
        connection.close()

    @staticmethod
    def told() -> list[str]:
        return [
            f"{message.id} {message.msg} {message.hint}"
            for message in check_durability(app_configs=None, databases=["default"])
        ]

    def test_it_asks_only_databases_that_are_named(self) -> None:
        assert check_durability(app_configs=None, databases=None) == []
        assert check_durability(app_configs=None, databases=["other"]) == []

    def test_the_database_of_the_tests_syncs(self) -> None:
        assert self.told() == []

    @pytest.mark.parametrize("level", ["OFF", "NORMAL"])
    def test_sqlite_that_does_not_sync(self, level: str) -> None:
        if connection.vendor != "sqlite":
            pytest.skip("SQLite's own")
        with connection.cursor() as cursor:
            cursor.execute(f"PRAGMA synchronous={level}")
        (told,) = self.told()
        assert "W004" in told
        assert "does not sync commits" in told
        assert "synchronous=FULL" in told

    def test_sqlite_without_a_log(self, tmp_path: Path, settings: Any) -> None:
        if connection.vendor != "sqlite":
            pytest.skip("SQLite's own")
        other = connection.copy()
        other.settings_dict = {**other.settings_dict, "NAME": str(tmp_path / "db"), "OPTIONS": {}}
        try:
            ((id, problem, _),) = durability_problems(other, 1024)
        finally:
            other.close()
        assert id == "django_gearman.W004"
        assert "no write-ahead log" in problem

    def test_postgresql_that_does_not_sync(self) -> None:
        if connection.vendor != "postgresql":
            pytest.skip("PostgreSQL's own")
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit TO off")
        (told,) = self.told()
        assert "W004" in told
        assert "synchronous_commit is off" in told

    def test_mysql_that_does_not_sync(self) -> None:
        if connection.vendor != "mysql":
            pytest.skip("MySQL's own")
        with connection.cursor() as cursor:
            cursor.execute("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
        (told,) = self.told()
        assert "W004" in told
        assert "innodb_flush_log_at_trx_commit is 2" in told

    def test_mysql_whose_packets_are_small(self, settings: Any) -> None:
        if connection.vendor != "mysql":
            pytest.skip("MySQL's own")
        settings.GEARMAN = {"default": {"MAX_PACKET": 1024**3}}
        (told,) = self.told()
        assert "W006" in told
        assert "max_allowed_packet" in told

    def test_mysql_without_transactions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if connection.vendor != "mysql":
            pytest.skip("MySQL's own")
        monkeypatch.setattr(JobRecord._meta, "db_table", "of_another_engine")
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE of_another_engine (id INT) ENGINE = MyISAM")
            try:
                (told,) = self.told()
            finally:
                cursor.execute("DROP TABLE of_another_engine")
        assert "W005" in told
        assert "MyISAM" in told


def test_every_check_is_listed():
    code = "".join(path.read_text() for path in (ROOT / "django_gearman").rglob("*.py"))
    ids = set(re.findall(r"\bdjango_gearman\.([EW]\d{3})\b", code))
    table = set(re.findall(r"^\| ([EW]\d{3}) \|", (ROOT / "docs" / "upgrading.md").read_text(), re.M))
    assert table == ids
