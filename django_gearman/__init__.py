"""
Background jobs for Django over the Gearman protocol.

The public names are imported when they are first used, so that the four
packages beside this file can be imported without Django.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "AdminClient",
    "AsyncClient",
    "Client",
    "Data",
    "Discard",
    "GroupResult",
    "Job",
    "JobContext",
    "JobResult",
    "Progress",
    "Retry",
    "Signature",
    "Task",
    "Value",
    "Warned",
    "amap_reduce",
    "chain",
    "cron",
    "every",
    "group",
    "job",
    "map_reduce",
]

_HOMES = {
    "AdminClient": "client.admin_client",
    "AsyncClient": "client.aio",
    "Client": "client.sync",
    "Data": "client.tasks",
    "Discard": "exceptions",
    "GroupResult": "group_results",
    "Job": "jobs",
    "JobContext": "context",
    "JobResult": "results",
    "Progress": "client.tasks",
    "Retry": "exceptions",
    "Signature": "jobs",
    "Task": "client.tasks",
    "Value": "client.tasks",
    "Warned": "client.tasks",
    "amap_reduce": "reduction",
    "chain": "groups",
    "cron": "schedules",
    "every": "schedules",
    "group": "groups",
    "job": "jobs",
    "map_reduce": "reduction",
}

if TYPE_CHECKING:
    from .client.admin_client import AdminClient as AdminClient
    from .client.aio import AsyncClient as AsyncClient
    from .client.sync import Client as Client
    from .client.tasks import Data as Data
    from .client.tasks import Progress as Progress
    from .client.tasks import Task as Task
    from .client.tasks import Value as Value
    from .client.tasks import Warned as Warned
    from .context import JobContext as JobContext
    from .exceptions import Discard as Discard
    from .exceptions import Retry as Retry
    from .group_results import GroupResult as GroupResult
    from .groups import chain as chain
    from .groups import group as group
    from .jobs import Job as Job
    from .jobs import Signature as Signature
    from .jobs import job as job
    from .reduction import amap_reduce as amap_reduce
    from .reduction import map_reduce as map_reduce
    from .results import JobResult as JobResult
    from .schedules import cron as cron
    from .schedules import every as every


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)
