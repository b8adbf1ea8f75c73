"""Settings of the test suite; ``DATABASE_URL`` chooses another database than SQLite."""

import atexit
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import dj_database_url
import django

# One folder per process: parallel test processes and the servers they start share nothing.
if "GEARMAN_TEST_SCRATCH" in os.environ:
    SCRATCH = Path(os.environ["GEARMAN_TEST_SCRATCH"])
else:
    # Parallel test processes have theirs in that of the one which starts them, and outlives them.
    SCRATCH = Path(tempfile.mkdtemp(prefix="gearman-tests-", dir=os.environ.get("GEARMAN_TEST_ROOT")))
    os.environ.setdefault("GEARMAN_TEST_ROOT", str(SCRATCH))

    def _remove(maker: int) -> None:
        # A forked child comes here too.
        if os.getpid() == maker:
            shutil.rmtree(SCRATCH, ignore_errors=True)

    atexit.register(_remove, os.getpid())
SECRET_KEY = "only for tests"
DEBUG = False
USE_TZ = True
TIME_ZONE = "UTC"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "project.urls"
STATIC_URL = "static/"
MEDIA_URL = "media/"
MEDIA_ROOT = SCRATCH / "media"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

DATABASES = {
    "default": dj_database_url.parse(os.environ.get("DATABASE_URL") or f"sqlite:///{SCRATCH / 'db.sqlite3'}")
}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL",
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
    }
    # A file, since servers and workers of the acceptance tests are processes of their own.
    DATABASES["default"]["TEST"] = {"NAME": str(SCRATCH / "test.sqlite3")}

elif DATABASES["default"]["ENGINE"] == "django.db.backends.mysql":
    DATABASES["default"]["TEST"] = {"CHARSET": "utf8mb4", "COLLATION": "utf8mb4_general_ci"}

if "GEARMAN_TEST_DATABASE" in os.environ:
    # A server or worker that a test has started works on the database of that test.
    DATABASES["default"]["NAME"] = os.environ["GEARMAN_TEST_DATABASE"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_gearman",
    "project.gallery",
    "tests.app",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
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
]
GALLERY_MAIL_TO = "gallery@example.com"
if django.VERSION >= (6, 1):
    # From then on there is no mailer where none is named.
    MAILERS = {"default": {"BACKEND": "django.core.mail.backends.locmem.EmailBackend"}}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# Nobody listens on port 9 (discard): a test that wants a server starts its own.
GEARMAN: dict[str, dict[str, Any]] = {
    "default": {"SERVERS": os.environ.get("GEARMAN_TEST_SERVER", "127.0.0.1:9").split(",")}
}

# A test that starts a server or worker has settings of its own for it.
GEARMAN["default"] |= json.loads(os.environ.get("GEARMAN_TEST_SETTINGS", "{}"))
has_tasks, has_backport = (importlib.util.find_spec(name) for name in ("django.tasks", "django_tasks"))
if has_tasks or has_backport:
    TASKS = {"default": {"BACKEND": "django_gearman.backends.GearmanBackend", "QUEUES": ["default", "slow"]}}
if not has_tasks and has_backport:
    INSTALLED_APPS.append("django_tasks")

if "GEARMAN_TEST_LEASE" in os.environ:
    GEARMAN["default"]["LEASE"] = float(os.environ["GEARMAN_TEST_LEASE"])
if "GEARMAN_TEST_TLS" in os.environ:
    # Servers and workers that a test starts speak TLS, with the files of this folder.
    _folder = Path(os.environ["GEARMAN_TEST_TLS"])
    GEARMAN["default"] |= {
        "TLS_CA": _folder / "ca.pem",
        "TLS_CERTIFICATE": _folder / "good.pem",
        "TLS_KEY": _folder / "good.key",
    }
