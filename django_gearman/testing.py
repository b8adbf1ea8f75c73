"""
What the tests of a project need: jobs that are recorded and run in the test's process, or by real processes.

``GearmanJobs`` looks at the rows that ``enqueue`` made, and runs them through a
job server without sockets on the test's own database connection.
``GearmanCluster`` starts a job server and workers as processes. The mixins give
both to ``unittest``, ``pytest_plugin`` gives them to pytest.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Any, Final, TypeAlias, cast

from asgiref.sync import sync_to_async
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.migrations.loader import MigrationLoader
from django.test import override_settings

from . import conf
from .client.admin_client import AdminClient
from .exceptions import ConnectionFailed, GearmanError
from .jobs import Job
from .models import JobRecord
from .registry import registry
from .results import JobResult
from .testing_process import VARIABLE
from .testing_runner import Runner

if TYPE_CHECKING:
    from .backends import DummyBackend as DummyBackend
    from .backends import ImmediateBackend as ImmediateBackend
    from .backends import Task

    Which: TypeAlias = Job[Any, Any] | Task[Any, Any] | str
    """A function: as ``@job`` or ``@task`` made it, or its name on the wire."""

# Without the backends of tasks, which not everybody can import.
__all__ = [
    "GearmanCluster",
    "GearmanClusterMixin",
    "GearmanJobs",
    "GearmanJobsMixin",
    "RecordedJob",
    "override_gearman",
]

NOBODY: Final = "127.0.0.1:9"
"""Where no job server listens: a test that has none of its own must not reach a developer's."""

NOBODY_HINT: Final = (
    "with gearman_jobs no server is asked; run what is enqueued by its run_all(), "
    "call the function as f.call(...), or ask for gearman_cluster"
)

START_LIMIT: Final = 60.0
"""Seconds in which a cluster is up."""

STOP_LIMIT: Final = 20.0
"""Seconds in which a process of a cluster ends after TERM, before it is killed."""


def __getattr__(name: str) -> object:
    # Only who names them needs django.tasks.
    if name in ("DummyBackend", "ImmediateBackend"):
        from . import backends

        return getattr(backends, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class override_gearman(override_settings):  # as override_settings
    """
    Settings of ``GEARMAN["default"]`` for a test: a decorator of functions and test classes, and a context.

        @override_gearman(RUN_TIMEOUT=1)

    What is not named stays as it is. What is no setting, or no value of one, is an ``ImproperlyConfigured``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._given = options

    def enable(self) -> None:
        self.options = {"GEARMAN": self._changed(getattr(settings, "GEARMAN", {}))}
        super().enable()

    def save_options(self, test_func: Any) -> None:
        already = test_func._overridden_settings or {}
        self.options = {"GEARMAN": self._changed(already.get("GEARMAN", getattr(settings, "GEARMAN", {})))}
        super().save_options(test_func)

    def _changed(self, configured: Mapping[str, Any]) -> dict[str, Any]:
        default = {**configured.get(conf.DEFAULT_ALIAS, {}), **self._given}
        # Here, and not where the test comes to read them.
        conf.checked(conf.DEFAULT_ALIAS, default)
        return {**configured, conf.DEFAULT_ALIAS: default}


class RecordedJob(JobResult[Any]):
    """A ``JobResult``, and how the job was called."""

    @property
    def args(self) -> list[Any]:
        """Positional arguments, as they travelled; of a raw job its workload."""
        return self._envelope[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Named arguments, as they travelled."""
        return self._envelope[1]

    @property
    def queue_name(self) -> str:
        return self._record.queue_name

    @property
    def priority(self) -> int:
        return self._record.priority

    @property
    def run_after(self) -> Any:
        """The moment before which it does not run; None for none."""
        return self._record.run_after

    @property
    def unique(self) -> str:
        return self._record.unique

    @property
    def _envelope(self) -> tuple[list[Any], dict[str, Any]]:
        workload = bytes(self._record.workload)
        known = registry.get(self.function)
        if known is None or not known.raw:
            try:
                envelope = json.loads(workload)
                return list(envelope["args"]), dict(envelope["kwargs"])
            except (ValueError, TypeError, KeyError):
                pass  # of another language
        return [workload], {}

    def __str__(self) -> str:
        given = [*map(repr, self.args), *(f"{name}={value!r}" for name, value in self.kwargs.items())]
        return f"{self.function}({', '.join(given)}) [{self.id}, {self.status}]"


class GearmanJobs:
    """
    The jobs that a test enqueued: what they are, and what becomes of them.

    They are the rows that ``enqueue`` inserted since this was made: no ``on_commit``
    is needed to see them, and they are gone when the test's transaction is rolled
    back. While it is open (a context), no job server is reached.
    """

    def __init__(self) -> None:
        self._after = 0
        self._runner: Runner | None = None
        self._raised: dict[str, BaseException] = {}
        self._stack = ExitStack()

    def __enter__(self) -> GearmanJobs:
        self._connection = connections[self._using]
        self._stack.enter_context(override_gearman(SERVERS=[NOBODY], ENQUEUE="database"))
        ConnectionFailed.HINTS[NOBODY] = NOBODY_HINT
        self._stack.callback(ConnectionFailed.HINTS.pop, NOBODY, None)
        self.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    # What was enqueued.

    def enqueued(self, job: Which | None = None) -> list[RecordedJob]:
        """The jobs of a function, or of all, in the order in which they were enqueued."""
        records = self._records().order_by("pk")
        if job is not None:
            name = _name_of(job)
            # Of a task, those in other queues too.
            records = records.filter(function__startswith=name)
            return [
                RecordedJob(record)
                for record in records
                if record.function == name or record.function.startswith(f"{name}@")
            ]
        return [RecordedJob(record) for record in records]

    @property
    def pending(self) -> list[RecordedJob]:
        """Those that have not ended yet."""
        return [job for job in self.enqueued() if not job.is_finished]

    def assert_enqueued(self, job: Which, *args: Any, **kwargs: Any) -> RecordedJob:
        """
        Fail unless the function was enqueued with these arguments, however they were written.

        Without arguments, any will do. ``unittest.mock.ANY`` stands for any single one.

        Returns:
            The last such job, to look at its ``priority``, ``queue_name``, ``run_after``.
        """
        __tracebackhide__ = True
        candidates = self.enqueued(job)
        wanted = _bound(job, args, kwargs)
        for candidate in reversed(candidates):
            if not (args or kwargs) or wanted == _bound(job, candidate.args, candidate.kwargs):
                return candidate
        call = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        wish = f"{_name_of(job)}({call})" if args or kwargs else _name_of(job)
        raise AssertionError(f"{wish} was not enqueued.\n{_told(self.enqueued())}")

    def assert_not_enqueued(self, job: Which | None = None) -> None:
        """Fail if the function, or without one any function, was enqueued."""
        __tracebackhide__ = True
        found = self.enqueued(job)
        if found:
            what = "A job" if job is None else _name_of(job)
            raise AssertionError(f"{what} was enqueued.\n{_told(found)}")

    def clear(self) -> None:
        """Forget what was enqueued so far: the rows stay, and are neither looked at nor run any more."""
        self._after = self._last()
        # The next one lays back at the door what this has taken.
        self._runner = None

    # What becomes of it.

    def run_all(self, *, scheduled: bool = False, check: bool = False) -> list[RecordedJob]:
        """
        Run what is to do, and what that enqueues, until nothing is left.

        A job server takes the rows, hands them out by priority and writes their
        outcomes; a job that is to be tried again is, without the pause before.
        Jobs that raise end as they would anywhere: look at their results.

        Args:
            scheduled: Run jobs for later too, as if their time had come, and so later steps of chains.
            check: Raise ``JobFailed``, with the traceback, for the first that ended without a value.
        Returns:
            Those that ended, in the order of their ends.
        """
        __tracebackhide__ = True
        # Not what jobs enqueue for later meanwhile: of some that would have no end.
        last = self._last() if scheduled else 0
        self._make_due(last)
        ended = []
        while (handle := self._run_next()) is not None or self._make_due(last):
            if handle is None:
                continue
            record = JobRecord.objects.using(self._using).get(handle=handle)
            if record.is_finished:
                ended.append(RecordedJob(record))
                if check:
                    _ = ended[-1].return_value
        return ended

    async def arun_all(self, *, scheduled: bool = False, check: bool = False) -> list[RecordedJob]:
        """As ``run_all``."""
        return await sync_to_async(self.run_all)(scheduled=scheduled, check=check)

    def run_one(self) -> RecordedJob | None:
        """Make one attempt at the job that is next; None when nothing is to do."""
        handle = self._run_next()
        if handle is None:
            return None
        return RecordedJob(JobRecord.objects.using(self._using).get(handle=handle))

    def fail_with(self, job: Which, error: BaseException) -> None:
        """
        From now on, every attempt at the function raises this instead of running it.

        Raises:
            TypeError: That is no exception.
        """
        given: object = error
        if not isinstance(given, BaseException):
            raise TypeError(
                f"what the function is to raise is an exception, such as ValueError(), not {given!r}"
            )
        self._raised[_name_of(job)] = error

    def _make_due(self, last: int) -> bool:
        """As if the time of jobs for later had come, up to an id; whether there were any."""
        if not last:
            return False
        waiting = self._records().filter(status=JobRecord.Status.SCHEDULED, server=None, pk__lte=last)
        return bool(waiting.update(status=JobRecord.Status.READY))

    def _run_next(self) -> str | None:
        self._refuse_other_threads()
        if self._runner is None:
            self._runner = Runner(self._using, self._raised)
        return self._runner.run_next(self._after)

    def _last(self) -> int:
        """The highest id that there is."""
        self._refuse_other_threads()
        last = JobRecord.objects.using(self._using).order_by("-pk").first()
        return last.pk if last is not None else 0

    def _refuse_other_threads(self) -> None:
        """Raise where the test's transaction is not that of the connection which would be asked."""
        if self._connection.in_atomic_block and connections[self._connection.alias] is not self._connection:
            raise ImproperlyConfigured(
                "The test's transaction is of another thread than this, and is neither seen nor written to "
                "here. Coroutines make their queries in a thread of their own with pytest-asyncio and anyio: "
                "mark the test with django_db(transaction=True)"
            )

    @property
    def _using(self) -> str:
        return conf.settings_for().database

    def _records(self) -> Any:
        self._refuse_other_threads()
        return JobRecord.objects.using(self._using).filter(pk__gt=self._after)


def _name_of(job: Which) -> str:
    given: object = job
    if isinstance(given, str):
        return given
    name = given.name if isinstance(given, Job) else getattr(given, "module_path", None)
    if not isinstance(name, str):
        raise TypeError(f"a function is a @job, a @task or a name on the wire, not {given!r:.200}")
    return name


def _bound(job: Which, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Arguments by name, so that it does not matter how they were given."""
    known = registry.get(_name_of(job))
    plain = [list(args), dict(kwargs)]
    if known is None or known.raw:
        return plain
    try:
        bound = known._signature.bind(*args, **kwargs)
    except TypeError:
        return plain
    bound.apply_defaults()
    return {name: _as_handed_on(value) for name, value in bound.arguments.items()}


def _as_handed_on(value: object) -> Any:
    """A value with lists for tuples, as JSON hands it on; ``mock.ANY`` may be anywhere in it."""
    if isinstance(value, list | tuple):
        return [_as_handed_on(each) for each in value]
    if isinstance(value, dict):
        return {key: _as_handed_on(each) for key, each in value.items()}
    return value


def _told(found: Sequence[RecordedJob]) -> str:
    if not found:
        return "Nothing was."
    return "\n".join(["These were:", *(f"  {each}" for each in found)])


# Real processes.


class GearmanCluster:
    """
    A real job server and real workers on a free port, on the test's database. A context.

    Tests must see what the processes write: use ``TransactionTestCase``, or
    ``gearman_cluster`` with pytest.

    Args:
        processes: How many processes the worker has.
        options: More options of ``gearman_worker``, such as ``--queues video``.
        database: Alias of the database; None for that of ``GEARMAN``.
    """

    def __init__(
        self, *, processes: int = 2, options: Sequence[str] = (), database: str | None = None
    ) -> None:
        self._processes = processes
        self._options = list(options)
        self._database = database
        self._stack = ExitStack()
        self.address = ""
        """``host:port`` of the job server."""

    def __enter__(self) -> GearmanCluster:
        with self._stack:
            port = free_port()
            self.address = f"127.0.0.1:{port}"
            changes: dict[str, Any] = {"SERVERS": [self.address], "ENQUEUE": "database"}
            if self._database is not None:
                changes["DATABASE"] = self._database
            self._stack.enter_context(override_gearman(**changes))
            environment = _environment()
            server = ["gearman_server", "--listen", "127.0.0.1", "--port", str(port)]
            worker = ["gearman_worker", "--processes", str(self._processes), *self._options]
            # Both at once: a worker waits for its server.
            self._running = [
                self._stack.enter_context(_Process(arguments, environment)) for arguments in (server, worker)
            ]
            self._wait()
            stack, self._stack = self._stack.pop_all(), ExitStack()
        self._stack = stack
        return self

    def __exit__(self, *exception: object) -> None:
        error = exception[1]
        if isinstance(error, BaseException):
            error.add_note(self.log())
        self._stack.close()

    def log(self) -> str:
        """All that the server and the worker said."""
        return "\n".join(process.story() for process in self._running)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while True:
            ended = [process for process in self._running if not process.is_running]
            if ended:
                raise AssertionError(f"A process of the cluster ended at once.\n{self.log()}")
            if self._workers() >= self._processes:
                return
            if time.monotonic() >= deadline:
                raise AssertionError(f"The cluster was not up after {START_LIMIT:g} s.\n{self.log()}")
            time.sleep(0.02)

    def _workers(self) -> int:
        """How many workers the server knows."""
        options = conf.settings_for()
        try:
            with AdminClient(
                self.address, connect_timeout=1.0, timeout=5.0, tls=conf.client_tls(options)
            ) as admin:
                return sum(bool(worker.functions) for worker in admin.workers())
        except GearmanError:
            return 0


class _Process:
    """A command of ``manage.py`` on the test's databases and settings; ends with the block."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._arguments = list(arguments)
        self._environment = environment

    def __enter__(self) -> _Process:
        self._output: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", "django_gearman.testing_process", *self._arguments],
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._process.terminate()
            try:
                self._process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        finally:
            self._output.close()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def story(self) -> str:
        # At a place of its own: the descriptor is the process's too, which appends by it.
        size = os.fstat(self._output.fileno()).st_size
        said = os.pread(self._output.fileno(), size, 0).decode(errors="replace")
        return f"$ manage.py {' '.join(self._arguments)}\n{said}"


def _environment() -> dict[str, str]:
    """Variables of a process that is to work on the test's databases."""
    names = {}
    for alias in connections:
        name = connections[alias].settings_dict["NAME"]
        if connections[alias].vendor == "sqlite" and (
            not name or "mode=memory" in str(name) or name == ":memory:"
        ):
            raise ImproperlyConfigured(
                f"A cluster's processes cannot open the test database {alias!r}, which is in this process's "
                f"memory: give DATABASES[{alias!r}] a file for it, such as "
                "'TEST': {'NAME': BASE_DIR / 'test.sqlite3'}; where `manage.py test --parallel` does not "
                "fork, its copies are in memory all the same"
            )
        names[alias] = str(name)
    told = {
        "databases": names,
        "gearman": getattr(settings, "GEARMAN", {}),
        "unmigrated": _unmigrated(),
        "path": sys.path,
        "parent": os.getpid(),
    }
    module = os.environ.get("DJANGO_SETTINGS_MODULE") or settings.SETTINGS_MODULE
    return os.environ | {VARIABLE: json.dumps(told, default=os.fspath), "DJANGO_SETTINGS_MODULE": module}


def _unmigrated() -> list[str]:
    """Labels of apps whose tables no migration made: ``--nomigrations``, ``TEST = {"MIGRATE": False}``."""
    is_migrated = connections[conf.settings_for().database].settings_dict["TEST"]["MIGRATE"]
    labels = [app.label for app in apps.get_app_configs()]
    return [
        label for label in labels if not is_migrated or MigrationLoader.migrations_module(label)[0] is None
    ]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, outside of those that the kernel gives to clients."""
    # In the kernel's range, a worker that tries again before its server is up may connect to itself.
    for _ in range(1000):
        port = random.randrange(12_000, 32_000)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise RuntimeError("no port of 127.0.0.1 is free")


# unittest.


class _BeforeTestCase:
    """What ``TestCase`` must not stand before: its ``setUp`` does not call that of who comes after it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        order = cls.__mro__
        if unittest.TestCase in order and order.index(unittest.TestCase) < order.index(_BeforeTestCase):
            case = next(each for each in order[1:] if issubclass(each, unittest.TestCase))
            after = order[order.index(unittest.TestCase) :]
            mixin = next(each for each in after if issubclass(each, _BeforeTestCase))
            raise TypeError(
                f"{cls.__qualname__} must name {mixin.__name__} before {case.__name__}, which would not set "
                f"it up: class {cls.__name__}({mixin.__name__}, {case.__name__})"
            )


class GearmanJobsMixin(_BeforeTestCase):
    """For ``TestCase``, and named before it: ``self.gearman_jobs``, assertions as in ``unittest``."""

    gearman_jobs: GearmanJobs

    def setUp(self) -> None:
        cast(Any, super()).setUp()
        self.gearman_jobs = cast(Any, self).enterContext(GearmanJobs())

    def assertJobEnqueued(self, job: Which, *args: Any, **kwargs: Any) -> RecordedJob:
        """As ``GearmanJobs.assert_enqueued``."""
        return self.gearman_jobs.assert_enqueued(job, *args, **kwargs)

    def assertJobNotEnqueued(self, job: Which | None = None) -> None:
        """As ``GearmanJobs.assert_not_enqueued``."""
        self.gearman_jobs.assert_not_enqueued(job)


class GearmanClusterMixin(_BeforeTestCase):
    """For ``TransactionTestCase``, and named before it: a cluster for each test, ``self.gearman_cluster``."""

    gearman_cluster: GearmanCluster
    gearman_processes = 2
    """How many processes the worker has."""

    def setUp(self) -> None:
        cast(Any, super()).setUp()
        self.gearman_cluster = cast(Any, self).enterContext(GearmanCluster(processes=self.gearman_processes))

    def doCleanups(self) -> Any:
        """Show what the processes said, where the test failed."""
        # unittest keeps it in an attribute of its own. Where that is missing, nothing is shown.
        has_failed = getattr(getattr(self, "_outcome", None), "success", True) is False
        if has_failed and hasattr(self, "gearman_cluster"):
            print(self.gearman_cluster.log())
        return cast(Any, super()).doCleanups()
