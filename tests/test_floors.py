"""The floors of the house: a file imports only from floors below its own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_gearman

ROOT = Path(django_gearman.__file__).parent
PACKAGES = ("protocol", "server", "client", "worker")
"""Gearman without Django."""

FLOORS: dict[str, int] = {
    "__init__": 0,
    "exceptions": 0,
    "addresses": 0,
    "tls": 0,
    "migrations": 0,
    "schedules": 1,
    "permits": 1,
    "conf": 1,
    "models": 2,
    "protocol": 2,
    "encoding": 2,
    "logs": 2,
    "signals": 2,
    "tracing": 2,
    "reports": 2,
    "registry": 2,
    "durability": 3,
    "insertion": 3,
    "rows": 3,
    "declarations": 3,
    "history": 3,
    "continuations": 3,
    "context": 3,
    "server": 3,
    "client": 3,
    "scheduler": 4,
    "limiting": 4,
    "worker": 5,
    "store": 5,
    "submission": 5,
    "waiting": 5,
    "results": 6,
    "job_options": 6,
    "job_declarations": 7,
    "jobs": 7,
    "group_results": 7,
    "attempts": 8,
    "groups": 9,
    "reduction": 9,
    "admin": 9,
    "backends": 9,
    "checks": 9,
    "management": 9,
    "apps": 10,
    "health": 10,
    "testing_process": 9,
    "testing_runner": 10,
    "testing": 11,
    "pytest_plugin": 12,
}
"""{first part of a module's name: its floor}; names on one floor do not import each other."""

MAY_USE: dict[str, set[str]] = {
    "asyncio": {
        "server/journal_thread.py",
        "server/transport.py",
        "server/connection.py",
        "server/http_connection.py",
        "server/door.py",
        "client/aio.py",
        "client/links.py",
        "worker/pool.py",
        # A job written as `async def` runs in a loop of its own, made by asyncio.run.
        "jobs.py",
        "attempts.py",
        # Their twins for asyncio pause between two looks.
        "results.py",
        "waiting.py",
        # Its functions for asyncio wait for several jobs at once.
        "group_results.py",
        "reduction.py",
        # Where the event loop is chosen and run.
        "management/commands/gearman_server.py",
    },
    "signal": {
        "worker/supervisor.py",
        "worker/pool.py",
        "management/daemon.py",
        "testing_process.py",
    },
    "os.fork": {"worker/supervisor.py", "management/daemon.py"},
}
"""{module or function: files that may use it}; commands may use the last two as well."""


def modules() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def house_name(file: str) -> str:
    """The name that stands in ``FLOORS``."""
    return file.split("/")[0].removesuffix(".py")


class Imports(ast.NodeVisitor):
    """Every import that happens at run time, as a full dotted name, wherever in the file it stands."""

    def __init__(self, package: list[str]) -> None:
        self.package = package
        self.names: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        start = self.package[: len(self.package) - node.level + 1] if node.level else []
        module = ".".join([*start, *([node.module] if node.module else [])])
        self.names.update(f"{module}.{alias.name}" for alias in node.names)


def imports(file: str) -> set[str]:
    visitor = Imports(["django_gearman", *file.split("/")[:-1]])
    visitor.visit(ast.parse((ROOT / file).read_text()))
    return visitor.names


def of_the_house(file: str) -> Iterator[str]:
    """Names in ``FLOORS`` that the file imports from."""
    for name in imports(file):
        first, *rest = name.split(".")
        if first == "django_gearman":
            # Any other name is defined by the package itself, as its version is.
            yield rest[0] if rest and rest[0] in FLOORS else "__init__"


def uses(file: str, thing: str) -> bool:
    """Whether the file imports the module or calls the function."""
    if any(name == thing or name.startswith(f"{thing}.") for name in imports(file)):
        return True
    tree = ast.parse((ROOT / file).read_text())
    return any(ast.unparse(node) == thing for node in ast.walk(tree) if isinstance(node, ast.Attribute))


class TestFloors:
    """DESIGN section 1, "Import floors"."""

    def test_every_file_stands_on_a_floor(self):
        assert {house_name(file) for file in modules()} <= set(FLOORS)

    @pytest.mark.parametrize("file", modules())
    def test_imports_go_down(self, file):
        name = house_name(file)
        above = {other for other in of_the_house(file) if other != name and FLOORS[other] >= FLOORS[name]}
        assert not above, f"{file} imports from its own floor or above"

    @pytest.mark.parametrize("file", [file for file in modules() if house_name(file) in PACKAGES])
    def test_the_four_packages_use_the_standard_library_alone(self, file):
        roots = {name.split(".")[0] for name in imports(file)}
        assert roots <= {"django_gearman", *sys.stdlib_module_names}

    @pytest.mark.parametrize("thing", MAY_USE)
    def test_what_only_few_files_may_use(self, thing):
        users = {file for file in modules() if uses(file, thing)}
        if thing != "asyncio":
            users = {file for file in users if not file.startswith("management/commands/")}
        assert users <= MAY_USE[thing]

    def test_check_sees_imports_wherever_they_stand(self):
        """Else all of the above would hold of nothing."""
        assert "django_gearman.protocol.packets.ATTEMPTS" in imports("server/core.py")
        assert "django_gearman.server.core.JobServer" in imports("management/commands/gearman_server.py")
        assert "uvloop" in imports("management/commands/gearman_server.py")
        assert "client" not in of_the_house("__init__.py")
        assert uses("worker/supervisor.py", "os.fork")
        assert uses("worker/supervisor.py", "signal")
        assert not uses("server/core.py", "asyncio")


WITHOUT_DJANGO = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"django", "uvloop"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


class TestWithoutDjango:
    """DESIGN section 1: four packages are Gearman and know no Django."""

    def run(self, *names: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_DJANGO, *names],
            cwd=ROOT.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def test_the_four_packages_can_be_imported(self):
        names = [
            f"django_gearman.{file.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}"
            for file in modules()
            if house_name(file) in PACKAGES
        ]
        done = self.run(*names)
        assert done.returncode == 0, done.stderr

    def test_django_is_blocked_there(self):
        assert "django is blocked" in self.run("django_gearman.jobs").stderr
