"""What the demo command finds out before it becomes supervisord."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import authenticate, get_user_model
from django.core.management import CommandError

from project.gallery.management.commands import demo
from tests import needs


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


class TestShippedPrograms:
    """deploy/supervisord.conf on a server."""

    SHIPPED = Path(demo.__file__).parents[4] / "deploy" / "supervisord.conf"

    def test_given_up_by_nobody_while_the_database_is_away(self):
        text = self.SHIPPED.read_text()
        retries = [int(number) for number in re.findall(r"^startretries=(\d+)$", text, re.MULTILINE)]
        assert len(retries) == text.count("\n[program:")
        # Attempt n comes n seconds after the one before.
        assert min(retries) > 10_000

    def test_under_systemd_as_the_comment_says(self, tmp_path: Path):
        """Standard output is a socket there."""
        needs.module("supervisor")
        text = self.SHIPPED.read_text()
        instead = re.search(r"^;stdout_logfile=NONE\n;stdout_syslog=true\n", text, re.MULTILINE)
        assert instead is not None
        theirs = "stdout_logfile=/dev/fd/1\nstdout_logfile_maxbytes=0\n"
        programs = text.count("\n[program:")
        assert text.count(theirs) == programs
        text = text.replace(theirs, instead[0].replace(";", ""))
        text = re.sub(r"^command=.*$", "command=sleep 300", text, flags=re.MULTILINE)
        text = text.replace("%(here)s/../project/var", str(tmp_path)).replace("%(here)s", str(tmp_path))
        (tmp_path / "supervisord.conf").write_text(text)
        ours, its = socket.socketpair()
        with ours:
            with its:
                command = [sys.executable, "-m", "supervisor.supervisord", "-c"]
                supervisord = subprocess.Popen(
                    [*command, str(tmp_path / "supervisord.conf")], stdout=its, stderr=subprocess.STDOUT
                )
            try:
                ours.settimeout(60)
                said = ""
                while said.count("entered RUNNING state") < programs:
                    said += ours.recv(65536).decode()
                    assert "spawnerr" not in said, said
            finally:
                supervisord.terminate()
                supervisord.wait(60)
