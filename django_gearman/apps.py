"""The app: checks, and the ``jobs.py`` and ``tasks.py`` of every installed app."""

import sys

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules, import_string
from django.utils.translation import gettext_lazy as _


class GearmanConfig(AppConfig):
    name = "django_gearman"
    verbose_name = _("Gearman")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks, conf  # noqa: F401  # they register themselves

        # An error inside a jobs.py is the developer's to see: it is not caught.
        if conf.settings_for().autodiscover:
            autodiscover_modules("jobs")
        self._discover_tasks()

    def _discover_tasks(self) -> None:
        from . import conf

        for _alias, path in conf.task_backend_paths():
            try:
                import_string(path)
            except ImportError:
                pass  # a check tells
        # Whoever has none of our backends needs no django.tasks either.
        backends = sys.modules.get("django_gearman.backends")
        if backends is not None:
            backends.discover(import_modules=conf.settings_for().autodiscover)
