"""The settings file, read anew with another environment."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.test import Client

import project
from tests.project.images import upload

Read = Callable[..., dict[str, Any]]

VARIABLES = (
    "DATABASE_URL",
    "DJANGO_ALLOWED_HOSTS",
    "DJANGO_DEBUG",
    "DJANGO_HTTPS",
    "DJANGO_SECRET_KEY",
    "GEARMAN_SERVERS",
    "WEB_ADDRESS",
)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def read(**environment: str) -> dict[str, Any]:
        for name, value in {"PROJECT_VAR": str(tmp_path / "var"), **environment}.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(Path(project.__file__).parent / "settings.py"))

    return read


class TestDefaults:
    def test_safe_and_for_this_machine(self, read: Read):
        settings = read()

        assert settings["DEBUG"] is False
        assert settings["ALLOWED_HOSTS"] == ["localhost", "127.0.0.1", "[::1]"]
        assert settings["GEARMAN"]["default"]["SERVERS"] == ["127.0.0.1:4730"]
        assert settings["WEB_ADDRESS"] == "127.0.0.1:8000"

    @pytest.mark.django_db
    def test_more_photos_than_may_be_chosen_reach_the_form(self, read: Read, client: Client, settings: Any):
        settings.DATA_UPLOAD_MAX_NUMBER_FILES = read()["DATA_UPLOAD_MAX_NUMBER_FILES"]
        # By itself Django refuses the whole request above a hundred.
        response = client.post("/", {"photos": [upload(f"{number}.jpg", b"") for number in range(101)]})

        assert "Please choose at most 50 photos at a time." in response.content.decode()

    def test_everything_kept_lies_in_one_folder_of_its_owner(self, read: Read, tmp_path: Path):
        settings = read()

        assert (tmp_path / "var").stat().st_mode & 0o777 == 0o700
        for name in ("MEDIA_ROOT", "STATIC_ROOT", "FILE_UPLOAD_TEMP_DIR"):
            assert settings[name].parent == tmp_path / "var"
        assert settings["DATABASES"]["default"]["NAME"] == tmp_path / "var" / "db.sqlite3"

    def test_sqlite_waits_its_turn(self, read: Read):
        assert read()["DATABASES"]["default"]["OPTIONS"] == {
            "init_command": "PRAGMA journal_mode=WAL;",
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
        }


class TestEnvironment:
    def test_another_database(self, read: Read):
        database = read(DATABASE_URL="postgres://me@db.example:5433/site")["DATABASES"]["default"]

        assert (database["ENGINE"], database["HOST"]) == ("django.db.backends.postgresql", "db.example")
        assert "transaction_mode" not in database.get("OPTIONS", {})

    def test_another_sqlite_file(self, read: Read):
        database = read(DATABASE_URL="sqlite:////tmp/other.sqlite3")["DATABASES"]["default"]

        assert database["NAME"] == "/tmp/other.sqlite3"
        assert database["OPTIONS"]["transaction_mode"] == "IMMEDIATE"

    def test_lists(self, read: Read):
        settings = read(GEARMAN_SERVERS="a:1, b:2,", DJANGO_ALLOWED_HOSTS="photos.example")

        assert settings["GEARMAN"]["default"]["SERVERS"] == ["a:1", "b:2"]
        assert settings["ALLOWED_HOSTS"] == ["photos.example"]

    def test_https(self, read: Read):
        assert "SESSION_COOKIE_SECURE" not in read()
        assert read(DJANGO_HTTPS="1")["SESSION_COOKIE_SECURE"] is True


class TestSecretKey:
    def test_generated_once_for_its_owner_alone(self, read: Read, tmp_path: Path):
        key = read()["SECRET_KEY"]

        assert len(key) == 50
        assert read()["SECRET_KEY"] == key
        assert (tmp_path / "var" / "secret_key").stat().st_mode & 0o777 == 0o600
        assert {path.name for path in (tmp_path / "var").iterdir()} == {"secret_key", "uploads"}

    def test_from_the_environment(self, read: Read, tmp_path: Path):
        assert read(DJANGO_SECRET_KEY="from outside")["SECRET_KEY"] == "from outside"
        assert not (tmp_path / "var" / "secret_key").exists()
