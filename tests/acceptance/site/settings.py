"""The settings of the test suite, with this site's jobs and addresses."""

from __future__ import annotations

import os
import sys

from tests.settings import *  # noqa: F403  # all of them, but for what follows
from tests.settings import DATABASES, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.acceptance.site"]
ROOT_URLCONF = "tests.acceptance.site.urls"

if "GEARMAN_TEST_NO_JOBS" in os.environ:
    with_jobs = ("project.gallery", "tests.app", "tests.acceptance.site")
    INSTALLED_APPS = [app for app in INSTALLED_APPS if app not in with_jobs]
    ROOT_URLCONF = "tests.admin.urls"

if "GEARMAN_TEST_NO_CRONSIM" in os.environ:
    # As where the schedules extra is not installed.
    sys.modules["cronsim"] = None

if "GEARMAN_TEST_CONN_MAX_AGE" in os.environ:
    # Connections that stay open between jobs, and are looked at before they are used again.
    DATABASES["default"]["CONN_MAX_AGE"] = int(os.environ["GEARMAN_TEST_CONN_MAX_AGE"])
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
