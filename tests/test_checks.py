from __future__ import annotations

from typing import Any

import pytest
from django.core.checks import run_checks

from django_gearman.checks import check_databases, check_settings


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
    def test_other_databases_are_left_alone(self, settings: Any) -> None:
        settings.DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql"}}
        assert check_databases(app_configs=None) == []

    @pytest.mark.filterwarnings("ignore:Overriding setting DATABASES")
    def test_wrong_settings_are_another_check(self, database: dict[str, Any], settings: Any) -> None:
        settings.GEARMAN = {"default": {"X": 1}}
        assert check_databases(app_configs=None) == []
