"""
Settings of the example site.

They run as they stand, under gunicorn or ``runserver``, for visitors of this
machine. What the site keeps lies in ``project/var/``. The environment changes:

    DJANGO_DEBUG          1 for Django's debugging pages (default 0)
    DJANGO_ALLOWED_HOSTS  comma-separated (default: the names of this machine)
    DJANGO_HTTPS          1 behind a proxy that speaks HTTPS (default 0)
    DJANGO_SECRET_KEY     (default: generated once into project/var/secret_key)
    DATABASE_URL          e.g. postgres://user@/site (default: SQLite)
    GEARMAN_SERVERS       comma-separated (default 127.0.0.1:4730)
    PROJECT_VAR           another place for project/var/
    WEB_ADDRESS           where gunicorn listens (default 127.0.0.1:8000)
"""

import os
import tempfile
from pathlib import Path

import django
from django.core.management.utils import get_random_secret_key


def flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def comma_separated(name: str, default: str) -> list[str]:
    return [part.strip() for part in os.environ.get(name, default).split(",") if part.strip()]


def secret_key(path: Path) -> str:
    """The key in this file, which only its owner may read; generated once."""
    if not path.exists():
        # mkstemp creates files with mode 0600.
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with open(descriptor, "w") as file:
                file.write(get_random_secret_key())
            # The programs of the site start together: the first one's key stays.
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    return path.read_text()


ROOT = Path(__file__).resolve().parent.parent
VAR = Path(os.environ.get("PROJECT_VAR") or ROOT / "project" / "var").absolute()
VAR.mkdir(mode=0o700, parents=True, exist_ok=True)

SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY") or secret_key(VAR / "secret_key")
DEBUG = flag("DJANGO_DEBUG")
ALLOWED_HOSTS = comma_separated("DJANGO_ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]")

if flag("DJANGO_HTTPS"):
    SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = True
    # The proxy has to set this header itself, and drop one that a visitor sent.
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
    SECURE_SSL_REDIRECT = True

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_gearman",
    "project.gallery",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "project.middleware.content_security_policy",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "project.urls"
WSGI_APPLICATION = "project.wsgi.application"
ASGI_APPLICATION = "project.asgi.application"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

if "DATABASE_URL" in os.environ:
    import dj_database_url

    DATABASES = {"default": dj_database_url.config(conn_max_age=60, conn_health_checks=True)}
else:
    DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": VAR / "db.sqlite3"}}

if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    # Readers do not wait for the writer (WAL), and writers take turns from the
    # start of their transactions, for 20 seconds at most, instead of failing
    # in the middle with "database is locked".
    DATABASES["default"]["OPTIONS"] = {
        "init_command": "PRAGMA journal_mode=WAL;",
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
    }

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# The same addresses tell gearman_server where to listen (the first), and
# clients and workers where to connect.
GEARMAN = {
    "default": {
        "SERVERS": comma_separated("GEARMAN_SERVERS", "127.0.0.1:4730"),
        # Seconds: no page waits longer for a job server that does not answer.
        "TIMEOUT": 10.0,
        # What `gearman_worker` runs: a video of half an hour keeps no photo waiting.
        "WORKERS": {
            "video": {"PROCESSES": 1, "QUEUES": ["video"], "MAX_MEMORY": "+500"},
            "rest": {"PROCESSES": 2},
        },
    }
}

WEB_ADDRESS = os.environ.get("WEB_ADDRESS", "127.0.0.1:8000")

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]

LANGUAGE_CODE = "en-gb"
TIME_ZONE = "UTC"
USE_TZ = True

STATIC_URL = "static/"
STATIC_ROOT = VAR / "static"
MEDIA_URL = "media/"
MEDIA_ROOT = VAR / "media"
WHITENOISE_USE_FINDERS = WHITENOISE_AUTOREFRESH = DEBUG
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}

# The form allows fewer, and says so in a sentence; at this number there is none, just "Bad Request".
DATA_UPLOAD_MAX_NUMBER_FILES = 1000
# Beside MEDIA_ROOT, so that a large upload is renamed into place, not copied.
FILE_UPLOAD_TEMP_DIR = VAR / "uploads"
FILE_UPLOAD_TEMP_DIR.mkdir(mode=0o700, exist_ok=True)

# Of one video; what is larger or longer fails with a sentence that says so.
VIDEO_LIMITS = {
    "max_bytes": 512 * 1024 * 1024,
    "max_seconds": 30 * 60,
    "max_pixels": 4096 * 2304,  # of one frame
    "size": 1280,  # longest side of what is made for the web
}

# Mail goes into files, one each, in place of a server for it.
GALLERY_MAIL_TO = "gallery@example.com"
MAIL_FOLDER = VAR / "mail"
if django.VERSION >= (6, 1):
    MAILERS = {
        "default": {
            "BACKEND": "django.core.mail.backends.filebased.EmailBackend",
            "OPTIONS": {"file_path": MAIL_FOLDER},
        }
    }
else:
    EMAIL_BACKEND = "django.core.mail.backends.filebased.EmailBackend"
    EMAIL_FILE_PATH = MAIL_FOLDER

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {"format": "{asctime} {process:>7} {levelname:<7} {name}: {message}", "style": "{"},
    },
    "handlers": {
        "stdout": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout", "formatter": "line"},
    },
    "root": {"handlers": ["stdout"], "level": "INFO"},
    # Without Django's own handlers, which would say everything twice.
    "loggers": {"django": {"level": "INFO", "handlers": []}},
}
