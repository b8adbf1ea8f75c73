"""The whole site with one command: database, static files, an admin user, then supervisord."""

from __future__ import annotations

import errno
import importlib.util
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.db import connections

EXTRAS = ("PIL", "av", "gunicorn", "supervisor", "whitenoise")
"""Modules of the extra ``demo`` that the programs below import."""


class Command(BaseCommand):
    help = "Prepare the example site and run all of its programs, until Ctrl-C."

    def handle(self, *args: Any, **options: Any) -> None:
        require_extras()
        gearman = settings.GEARMAN["default"]["SERVERS"][0]
        require_free(settings.WEB_ADDRESS, "WEB_ADDRESS")
        require_free(gearman, "GEARMAN_SERVERS")

        call_command("migrate", verbosity=0)
        call_command("collectstatic", interactive=False, verbosity=0)
        self._say_where(gearman, create_admin())
        self._become_supervisord()

    def _say_where(self, gearman: str, password: str | None) -> None:
        site = f"http://{settings.WEB_ADDRESS}"
        manage = f"{python()} manage.py"
        if password is None:
            login = f"user admin is there already; for another password: {manage} changepassword admin"
        else:
            login = f"user admin, password {self.style.SUCCESS(password)}"
        self.stdout.write(
            f"""
    Gallery      {self.style.SUCCESS(site + "/")}
    Videos       {site}/videos/
    Admin        {self.style.SUCCESS(site + "/admin/")}
                 {login}
    Job records  {site}/admin/django_gearman/jobrecord/
    Gearman      {gearman}

    No photo or video at hand?  {manage} make_sample_photos --submit
                                {manage} make_sample_video --submit

    Ctrl-C stops everything.
"""
        )

    def _become_supervisord(self) -> None:
        """Replace this process, so that Ctrl-C and signals reach supervisord itself."""
        connections.close_all()
        self.stdout.flush()
        command = [sys.executable, "-m", "supervisor.supervisord", "--nodaemon"]
        command += ["--configuration", str(configuration())]
        # supervisord wants the folder of the shipped pidfile even when it is told another.
        (settings.ROOT / "project" / "var").mkdir(mode=0o700, exist_ok=True)
        command += ["--pidfile", str(settings.VAR / "supervisord.pid")]
        if os.geteuid() == 0:
            command += ["--user", "root"]  # as it is; without this supervisord complains
        os.execve(sys.executable, command, environment())  # noqa: S606  # our own command line


def python() -> str:
    """This Python, as one would call it from here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def require_extras() -> None:
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"Not installed: {', '.join(missing)}. Please run: pip install -e '.[demo]'")


def require_free(address: str, variable: str) -> None:
    """Find out now, and not from a program that supervisord starts again and again."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, int(port)))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "another program listens there" if taken else error.strerror
            raise CommandError(
                f"Cannot listen at {address}: {reason}. "
                f"Stop it, or choose another address with the environment variable {variable}."
            ) from error


def create_admin() -> str | None:
    """The password of the new user ``admin``, or None if there is one already."""
    users = get_user_model()._default_manager
    if users.filter(username="admin").exists():
        return None
    password = secrets.token_urlsafe(9)
    users.create_superuser("admin", password=password)
    return password


def configuration() -> Path:
    """
    deploy/supervisord.conf, which runs the programs of the checkout's ``.venv``.

    When this is another Python although there is a ``.venv``, a copy that
    names this one.
    """
    shipped = settings.ROOT / "deploy" / "supervisord.conf"
    venv = settings.ROOT / ".venv"
    if not venv.exists() or venv.resolve() == Path(sys.prefix).resolve():
        return shipped
    text = shipped.read_text()
    text = text.replace("%(here)s/../.venv/bin", quoted(Path(sys.executable).parent))
    text = text.replace("%(here)s", quoted(shipped.parent))
    copy = settings.VAR / "supervisord.conf"
    copy.write_text(text)
    return copy


def quoted(path: Path) -> str:
    return str(path).replace("%", "%%")


def environment() -> dict[str, str]:
    # The configuration puts .venv/bin before it; without .venv this Python's programs are found.
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
