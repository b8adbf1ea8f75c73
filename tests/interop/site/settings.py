"""Settings of our own worker among the foreign ones."""

from tests.settings import *  # noqa: F403  # all of them, but for what follows
from tests.settings import INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.interop.site"]
