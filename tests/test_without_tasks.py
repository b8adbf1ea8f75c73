"""Without ``django.tasks``, and with the backend before everything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

ROOT = Path(__file__).resolve().parents[1]

SITE = """
import importlib, json, sys
from django.conf import settings

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(OPTIONS.pop("blocked"))
sys.meta_path.insert(0, Blocked())
settings.configure(
    DATABASES={"default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": ":memory:",
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},
    }},
    USE_TZ=True,
    GEARMAN={"default": {"SERVERS": ["127.0.0.1:9"]}},
    **OPTIONS,
)
"""

BLOCKED = ["django.tasks", "django_tasks"]
OURS = {"default": {"BACKEND": "django_gearman.backends.GearmanBackend"}}


def run(code: str, **options: Any) -> list[Any]:
    """What a process of its own printed, as JSON, with these settings."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"OPTIONS = {options!r}{SITE}{textwrap.dedent(code)}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestWithout:
    def test_all_else_works(self) -> None:
        names = sorted(
            f"django_gearman.{path.stem}"
            for path in (ROOT / "django_gearman").glob("*.py")
            if path.stem != "__init__"
        )
        assert "django_gearman.testing" in names
        (told,) = run(
            f"""
            import django
            django.setup()
            for name in {names!r}:
                importlib.import_module(name)
            from django.core.management import call_command
            call_command("migrate", verbosity=0)
            from django_gearman import job
            from django_gearman.testing import *
            def double(number):
                return 2 * number
            double.__module__ = "somewhere"
            with GearmanJobs() as jobs:
                job(double).enqueue(4)
                print(json.dumps([each.return_value for each in jobs.run_all()]))
            """,
            blocked=BLOCKED,
            INSTALLED_APPS=["django_gearman"],
        )
        assert told == [8]

    def test_a_check_says_what_is_missing(self) -> None:
        (told,) = run(
            """
            import django
            django.setup()
            from django_gearman.checks import check_task_backends
            print(json.dumps([[each.id, each.msg] for each in check_task_backends(app_configs=None)]))
            """,
            blocked=BLOCKED,
            INSTALLED_APPS=["django_gearman"],
            TASKS=OURS,
        )
        ((id, message),) = told
        assert id == "django_gearman.E017"
        assert (
            "need Django 6 or the django-tasks package: pip install django-tasks (our extra [tasks])"
            in message
        )

    def test_nothing_of_it_is_imported_for_other_backends(self) -> None:
        (told,) = run(
            """
            import django
            django.setup()
            import django_gearman.checks, django_gearman.jobs
            print(json.dumps("django_gearman.backends" in sys.modules))
            """,
            blocked=[],
            INSTALLED_APPS=["django_gearman"],
        )
        assert told is False


@pytest.mark.skipif(not hasattr(settings, "TASKS"), reason="needs django.tasks or django-tasks")
class TestLoading:
    def test_tasks_that_are_declared_while_the_apps_are_loading(self, tmp_path: Path) -> None:
        """An app's ``__init__`` is imported before there are models."""
        for name, code in {
            "__init__": "from early.declared import one",
            "declared": """
                try:
                    from django.tasks import task
                except ImportError:
                    from django_tasks import task

                @task
                def one():
                    return 1
            """,
            "tasks": """
                from early.declared import task

                @task
                def two():
                    return 2

                @task(backend="other")
                def three():
                    return 3
            """,
        }.items():
            (tmp_path / "early").mkdir(exist_ok=True)
            (tmp_path / "early" / f"{name}.py").write_text(textwrap.dedent(code))
        code = f"""
            sys.path.append({str(tmp_path)!r})
            import django
            settings.GEARMAN = {{"default": {{"AUTODISCOVER": WHETHER}}}}
            django.setup()
            from django_gearman.registry import registry
            print(json.dumps(sorted(registry)))
        """
        tasks = OURS | {"other": {"BACKEND": "django_gearman.testing.DummyBackend", "QUEUES": ["default"]}}
        options = {"blocked": [], "INSTALLED_APPS": ["early", "django_gearman"], "TASKS": tasks}
        assert run(code.replace("WHETHER", "True"), **options) == [
            ["early.declared.one", "early.tasks.three", "early.tasks.two"]
        ]
        assert run(code.replace("WHETHER", "False"), **options) == [["early.declared.one"]]

    def test_the_backend_without_the_app(self) -> None:
        (told,) = run(
            """
            import django
            django.setup()
            from django.core.checks import run_checks
            try:
                import django.tasks
            except ImportError:
                import django_tasks.checks
            print(json.dumps([[each.id, each.hint] for each in run_checks()]))
            """,
            blocked=[],
            INSTALLED_APPS=["django.contrib.contenttypes"],
            TASKS=OURS,
        )
        assert told == [
            ["django_gearman.E014", 'Add "django_gearman" to INSTALLED_APPS and run `manage.py migrate`.']
        ]
