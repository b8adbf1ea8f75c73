"""System checks: what `manage.py check` says of a project's Gearman settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.apps import AppConfig
from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.core.exceptions import ImproperlyConfigured

from . import conf


@register("gearman")
def check_settings(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """Every alias of ``GEARMAN`` can be read."""
    messages: list[CheckMessage] = []
    configured = getattr(settings, "GEARMAN", {})
    for alias in configured if isinstance(configured, dict) else [conf.DEFAULT_ALIAS]:
        try:
            options = conf.settings_for(alias)
        except ImproperlyConfigured as error:
            messages.append(
                Error(str(error), hint="The README lists every setting.", id="django_gearman.E002")
            )
            continue
        if options.database not in settings.DATABASES:
            messages.append(
                Error(
                    f"GEARMAN[{alias!r}]['DATABASE'] is {options.database!r}, which is not in DATABASES.",
                    hint=f"Use one of {', '.join(settings.DATABASES)}.",
                    id="django_gearman.E009",
                )
            )
    return messages


@register("gearman")
def check_databases(*, app_configs: Sequence[AppConfig] | None, **kwargs: Any) -> list[CheckMessage]:
    """SQLite is set up so that views and the job server can write side by side."""
    messages: list[CheckMessage] = []
    try:
        alias = conf.settings_for().database
    except ImproperlyConfigured:
        return messages  # check_settings tells
    database = settings.DATABASES.get(alias, {})
    if database.get("ENGINE") == "django.db.backends.sqlite3":
        options = database.get("OPTIONS", {})
        if str(options.get("transaction_mode", "")).upper() != "IMMEDIATE":
            messages.append(
                Warning(
                    f"Transactions of the SQLite database {alias!r} may end with 'database is locked'.",
                    hint=(
                        "Add OPTIONS = {'transaction_mode': 'IMMEDIATE', "
                        "'init_command': 'PRAGMA journal_mode=WAL'} to the database."
                    ),
                    id="django_gearman.W001",
                )
            )
    return messages
