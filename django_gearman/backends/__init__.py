"""
``django.tasks`` on Gearman: what ``settings.TASKS`` names, and the ``Task`` that ``@task`` makes for it.

Django has ``django.tasks`` from 6.0 on; before, the ``django-tasks`` package is
the same. Nothing else in the package imports either. A backend may be made
while the apps are loading, so what needs models is in ``performing``, and is
imported when it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import wraps
from types import ModuleType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import autodiscover_modules

from .. import conf
from ..context import JobContext

try:
    from django.tasks import TaskContext, TaskResult, TaskResultStatus, task_backends
    from django.tasks import task as _task
    from django.tasks.backends.base import BaseTaskBackend
    from django.tasks.backends.dummy import DummyBackend as _DummyBackend
    from django.tasks.backends.immediate import ImmediateBackend as _ImmediateBackend
    from django.tasks.base import Task, TaskError
    from django.tasks.exceptions import InvalidTask, InvalidTaskBackend, TaskResultDoesNotExist
    from django.tasks.signals import task_enqueued, task_finished, task_started
    from django.utils.json import normalize_json
except ImportError:
    try:
        # Each name is defined once, whatever the type checker makes of the two places.
        from django_tasks import TaskContext, TaskResult, TaskResultStatus, task_backends  # type: ignore[no-redef]
        from django_tasks import task as _task  # type: ignore[no-redef]
        from django_tasks.backends.base import BaseTaskBackend  # type: ignore[no-redef]
        from django_tasks.backends.dummy import DummyBackend as _DummyBackend  # type: ignore[no-redef]
        from django_tasks.backends.immediate import ImmediateBackend as _ImmediateBackend  # type: ignore[no-redef]
        from django_tasks.base import Task, TaskError  # type: ignore[no-redef]
        from django_tasks.exceptions import InvalidTaskBackendError as InvalidTaskBackend  # type: ignore[no-redef]
        from django_tasks.exceptions import InvalidTaskError as InvalidTask  # type: ignore[no-redef]
        from django_tasks.exceptions import TaskResultDoesNotExist  # type: ignore[no-redef]
        from django_tasks.signals import task_enqueued, task_finished, task_started  # type: ignore[no-redef]
        from django_tasks.utils import normalize_json  # type: ignore[no-redef]
    except ModuleNotFoundError as error:
        raise ImportError(
            "the task backends of django_gearman need Django 6 or the django-tasks package: "
            "pip install django-tasks (our extra [tasks])"
        ) from error

__all__ = [
    "DummyBackend",
    "GearmanBackend",
    "GearmanTask",
    "GearmanTaskContext",
    "ImmediateBackend",
    "InvalidTask",
    "InvalidTaskBackend",
    "Task",
    "TaskContext",
    "TaskError",
    "TaskResult",
    "TaskResultDoesNotExist",
    "TaskResultStatus",
    "discover",
    "normalize_json",
    "task",
    "task_backends",
    "task_enqueued",
    "task_finished",
    "task_started",
]

_OF_JOBS: Final = ("s", "si", "run", "arun", "stream", "astream", "enqueue_many", "aenqueue_many")
"""What a ``@job`` has and a task has not."""

Backoff: TypeAlias = "Callable[[BaseException, TaskResult[Any, Any]], float | timedelta | None]"
"""Seconds until the next attempt of a task that raised; None when there is to be none."""

MODULES: Final = ("tasks", "jobs")
"""Modules of each app that are looked through for tasks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GearmanTaskContext(TaskContext):  # type: ignore[type-arg, misc]  # as GearmanTask; frozen there too
    """Django's, and ``job``: the ``JobContext`` with ``set_progress``, ``warn`` and ``send_data``."""

    job: JobContext


def _with_job(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a function that takes a context, which has a ``job`` that nobody listens to."""
    if not args or type(args[0]) is not TaskContext:
        return args
    result = args[0].task_result
    context: Any = GearmanTaskContext(task_result=result, job=JobContext(function=result.task.module_path))
    return context, *args[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class GearmanTask(Task):  # type: ignore[type-arg]  # not generic at run time before it is subscripted
    """What ``@task`` makes of a function for our backends: a ``Task`` with three options more."""

    max_attempts: int | None = None
    """How often it is run at the most, when it raises or its worker is lost; None as for ``@job``."""

    backoff: Backoff | None = None
    """Called with the exception and the ``TaskResult``; None for about 2, 4, 8, ... seconds up to an hour."""

    timeout: int | None = None
    """Seconds that one attempt may take; None for the setting ``JOB_TIMEOUT``."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in _OF_JOBS:
                raise AttributeError(
                    f"a task has no {name}(): group, chain, map_reduce and what waits by run() take a @job; "
                    "enqueue() the task, or declare it with @job"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __post_init__(self) -> None:
        # Of the class by name: dataclasses make another class for the slots, which super() does not know.
        Task.__post_init__(self)
        if isinstance(self.get_backend(), GearmanBackend):
            _declare(self)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function here, as the ``ImmediateBackend`` does."""
        return Task.call(self, *(_with_job(args) if self.takes_context else args), **kwargs)

    async def acall(self, *args: Any, **kwargs: Any) -> Any:
        """As ``call``."""
        return await Task.acall(self, *(_with_job(args) if self.takes_context else args), **kwargs)


# Django's decorator, with types for our options. The callable classes make the overloads tell `async def`
# from `def`.

P = ParamSpec("P")
R = TypeVar("R")


class TaskOptions(TypedDict, total=False):
    """What ``@task`` may be told beside ``takes_context``."""

    priority: int
    queue_name: str
    backend: str
    max_attempts: int | None
    backoff: Backoff | None
    timeout: int | None


class _TakesContext(Protocol):
    @overload
    def __call__(
        self, function: Callable[Concatenate[GearmanTaskContext, P], Coroutine[Any, Any, R]], /
    ) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[GearmanTaskContext, P], R], /) -> Task[P, R]: ...


class _TakesNone(Protocol):
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


if TYPE_CHECKING:

    @overload
    def task(function: Callable[P, Coroutine[Any, Any, R]], /) -> Task[P, R]: ...
    @overload
    def task(function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(*, takes_context: Literal[True], **options: Unpack[TaskOptions]) -> _TakesContext: ...
    @overload
    def task(*, takes_context: Literal[False] = ..., **options: Unpack[TaskOptions]) -> _TakesNone: ...
    def task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """Django's own ``task``, of which its types know no more options."""

else:
    task = _task


_OPTIONS_OF_JOBS: Final = {
    "rate_limit": "limit it in the admin, under its import path",
    "concurrency": "limit it in the admin, under its import path",
    "limit_key": "limits of @job alone have keys",
    "unique": "declare it with @job, which can run beside tasks",
    "schedule": "declare it with @job, or add its schedule in the admin",
    "raw": "declare it with @job, which can run beside tasks",
    "name": "a task's name is its import path",
}
"""Options of ``@job`` that tasks do not have, and what to do."""


class _UnknownOption(InvalidTask, TypeError):
    """As of any function that is called with an argument that it does not have."""


def _refuse_unknown(make: Callable[..., None]) -> Callable[..., None]:
    """A dataclass would name its own ``__init__``."""
    known = [each.name for each in fields(GearmanTask)]

    @wraps(make)
    def __init__(self: GearmanTask, **options: Any) -> None:
        for name in options:
            if name not in known:
                function = options.get("func")
                path = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
                remedy = _OPTIONS_OF_JOBS.get(name, f"it has {', '.join(sorted({*known} - _NOT_TO_DECLARE))}")
                raise _UnknownOption(f"@task of {path} has no option {name!r}; {remedy}")
        make(self, **options)

    return __init__


_NOT_TO_DECLARE: Final = {"func", "run_after"}
GearmanTask.__init__ = _refuse_unknown(GearmanTask.__init__)  # type: ignore[method-assign]


class _WithOptions(BaseTaskBackend):
    """A backend whose tasks have our options."""

    task_class = GearmanTask

    def validate_task(self, task: Task[Any, Any]) -> None:
        """
        Whether the task can be run by this backend.

        Raises:
            InvalidTask: It cannot; the sentence says why.
        """
        priority: object = task.priority
        if not isinstance(priority, int | float):
            raise InvalidTask(f"priority of {task.module_path} must be a whole number, not {priority!r}")
        run_after: object = task.run_after
        if run_after is not None and not isinstance(run_after, datetime):
            raise InvalidTask(
                f"run_after of {task.module_path} must be a datetime, such as timezone.now() + "
                f"timedelta(hours=1), not {run_after!r}"
            )
        super().validate_task(task)
        path = task.module_path
        for option, highest in (("max_attempts", 32_767), ("timeout", 2**31 - 1)):
            number = getattr(task, option, None)
            if number is not None and (type(number) is not int or not 1 <= number <= highest):
                kind = "whole number of seconds" if option == "timeout" else "whole number"
                raise InvalidTask(f"{option} of {path} must be a {kind} from 1 to {highest}, not {number!r}")
        backoff = getattr(task, "backoff", None)
        if backoff is not None and not callable(backoff):
            raise InvalidTask(
                f"backoff of {path} must be a function of the exception and the TaskResult, not {backoff!r}"
            )


class GearmanBackend(_WithOptions):
    """
    Tasks are jobs: rows of the same table, run by the same workers, seen in the same admin.

    ``enqueue`` inserts a row in the caller's transaction, as ``@job`` does: the
    task is run exactly if that commits. A worker runs only functions that its
    own code declares; what comes over the wire is looked up, never imported.
    """

    supports_defer = True
    supports_async_task = True
    supports_priority = True

    @property
    def supports_get_result(self) -> bool:  # type: ignore[override]  # a class attribute there
        """Whether results are kept; they are, unless jobs go to foreign servers by ``ENQUEUE = "wire"``."""
        return conf.settings_for().enqueue == "database"

    def validate_task(self, task: Task[Any, Any]) -> None:
        super().validate_task(task)
        if not 0 < len(task.queue_name) <= 100:
            raise InvalidTask(
                f"queue_name of {task.module_path} must be 1 to 100 characters, not {task.queue_name!r}"
            )

    def enqueue(self, task: Task[Any, Any], args: Any, kwargs: Any) -> TaskResult[Any, Any]:
        """
        Have the task run by a worker.

        Raises:
            InvalidTask: This backend cannot run it.
            TypeError: The arguments do not fit the function, or JSON cannot carry one.
        """
        self.validate_task(task)
        result: TaskResult[Any, Any] = _performing().enqueue(self, task, args, kwargs)
        return result

    def get_result(self, result_id: str) -> TaskResult[Any, Any]:
        """
        The result with that id, of any task.

        Raises:
            TaskResultDoesNotExist: There is none, or this process does not know its task.
            NotImplementedError: With ``ENQUEUE = "wire"`` nothing is kept.
        """
        if not self.supports_get_result:
            return super().get_result(result_id)
        result: TaskResult[Any, Any] = _performing().get_result(self, result_id)
        return result

    def check(self, **kwargs: Any) -> list[CheckMessage]:
        """What `manage.py check` says of the alias."""
        return list(self._problems())

    def _problems(self) -> Iterable[CheckMessage]:
        where = f"TASKS[{self.alias!r}]"
        if not apps.is_installed("django_gearman"):
            yield Error(
                f"{where} is a backend of django_gearman, which is not in INSTALLED_APPS: it has no tables.",
                hint='Add "django_gearman" to INSTALLED_APPS and run `manage.py migrate`.',
                id="django_gearman.E014",
            )
        if self.options:
            names = ", ".join(map(repr, self.options))
            yield Error(
                f"{where}['OPTIONS'] has {names}, which the backend does not know: it has no options.",
                hint="Servers, database and time limits are in the setting GEARMAN.",
                id="django_gearman.E015",
            )
        queues: list[object] = sorted(self.queues, key=str)
        for queue in queues:
            if not is_queue_name(queue):
                yield Error(
                    f"{where}['QUEUES'] has {queue!r}, which is no name for a queue.",
                    hint="Use 1 to 100 characters, without control characters.",
                    id="django_gearman.E016",
                )


def is_queue_name(queue: object) -> bool:
    """Whether ``QUEUES`` may have it."""
    return isinstance(queue, str) and queue.isprintable() and 0 < len(queue) <= 100


class ImmediateBackend(_WithOptions, _ImmediateBackend):
    """Django's, for tasks with our options, which have no effect: a task runs at once, and once."""


class DummyBackend(_WithOptions, _DummyBackend):
    """Django's, for tasks with our options: it remembers what was enqueued, and runs nothing."""


# Which functions a worker may run.

_waiting: dict[str, Task[Any, Any]] = {}
"""Tasks that were declared before models could be imported, by import path."""


def _declare(task: Task[Any, Any]) -> None:
    """Let the workers of this process run the task's function."""
    if not apps.apps_ready:
        _waiting.setdefault(task.module_path, task)
    elif apps.is_installed("django_gearman"):
        _performing().register(task, gearman_backends())


def discover(*, import_modules: bool) -> None:
    """
    Declare the tasks in the ``tasks.py`` and ``jobs.py`` of every installed app.

    Those of other backends too: ``using(backend=...)`` may send them to ours.

    Args:
        import_modules: Whether a ``tasks.py`` that nobody has imported is imported.
    """
    if import_modules:
        # An error inside a tasks.py is the developer's to see: it is not caught.
        autodiscover_modules("tasks")
    for task in _waiting.values():
        _declare(task)
    _waiting.clear()
    for config in apps.get_app_configs():
        for name in MODULES:
            module = sys.modules.get(f"{config.name}.{name}")
            for task in _tasks_of(module) if module is not None else ():
                _declare(task)


def _tasks_of(module: ModuleType) -> list[Task[Any, Any]]:
    return [
        thing
        for thing in vars(module).values()
        if isinstance(thing, Task) and thing.func.__module__ == module.__name__
    ]


def gearman_backends() -> list[GearmanBackend]:
    """Our backends among those of ``TASKS``, in its order."""
    found = []
    for alias in getattr(settings, "TASKS", None) or ():
        try:
            backend = task_backends[alias]
        except InvalidTaskBackend:
            continue  # Django's own check tells
        if isinstance(backend, GearmanBackend):
            found.append(backend)
    return found


def _performing() -> Any:
    if not apps.is_installed("django_gearman"):
        raise ImproperlyConfigured(
            'TASKS names a backend of django_gearman: add "django_gearman" to INSTALLED_APPS '
            "and run `manage.py migrate`"
        )
    from . import performing

    return performing
