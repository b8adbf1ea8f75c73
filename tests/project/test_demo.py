"""What the demo command finds out before it becomes supervisord."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import authenticate, get_user_model
from django.core.management import CommandError

from project.gallery.management.commands import demo


class TestAddresses:
    def test_free(self):
        demo.require_free("127.0.0.1:0", "WEB_ADDRESS")

    def test_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            address = "{}:{}".format(*other.getsockname())
            with pytest.raises(CommandError, match=f"Cannot listen at {address}.*WEB_ADDRESS"):
                demo.require_free(address, "WEB_ADDRESS")

    def test_elsewhere(self):
        with pytest.raises(CommandError, match="GEARMAN_SERVERS"):
            demo.require_free("192.0.2.1:4730", "GEARMAN_SERVERS")


class TestExtras:
    def test_installed(self):
        demo.require_extras()

    def test_missing(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(demo, "EXTRAS", ("os", "no_such_module"))
        with pytest.raises(CommandError, match=r"no_such_module\. Please run: pip install -e '\.\[demo\]'"):
            demo.require_extras()


@pytest.mark.django_db
class TestAdminUser:
    def test_created_once(self):
        password = demo.create_admin()

        assert authenticate(username="admin", password=password).is_superuser
        assert demo.create_admin() is None
        assert get_user_model().objects.count() == 1


class TestConfiguration:
    @pytest.fixture
    def checkout(self, tmp_path: Path, settings: Any) -> Path:
        settings.ROOT = tmp_path / "100% mine"
        settings.VAR = tmp_path
        shipped = Path(demo.__file__).parents[4] / "deploy" / "supervisord.conf"
        (settings.ROOT / "deploy").mkdir(parents=True)
        (settings.ROOT / "deploy" / "supervisord.conf").write_text(shipped.read_text())
        return settings.ROOT

    def test_shipped_as_it_stands_without_venv(self, checkout: Path):
        assert demo.configuration() == checkout / "deploy" / "supervisord.conf"

    def test_shipped_as_it_stands_in_the_venv(self, checkout: Path):
        (checkout / ".venv").symlink_to(sys.prefix)
        assert demo.configuration() == checkout / "deploy" / "supervisord.conf"

    def test_another_python_is_named_instead_of_the_venv(self, checkout: Path):
        (checkout / ".venv").mkdir()
        text = demo.configuration().read_text()

        assert f'PATH="{Path(sys.executable).parent}:%(ENV_PATH)s"' in text
        assert "/../.venv/bin" not in text
        assert f"{checkout.parent}/100%% mine/deploy/.." in text
        assert "%(here)s" not in text
