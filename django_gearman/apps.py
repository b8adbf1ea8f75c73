"""The app: checks, and the ``jobs.py`` of every installed app."""

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules
from django.utils.translation import gettext_lazy as _


class GearmanConfig(AppConfig):
    name = "django_gearman"
    verbose_name = _("Gearman")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import checks, conf  # noqa: F401

        # An error inside a jobs.py is the developer's to see: it is not caught.
        if conf.settings_for().autodiscover:
            autodiscover_modules("jobs")
