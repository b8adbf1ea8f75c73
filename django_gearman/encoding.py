"""
How values and exceptions travel: JSON, strictly, so that every language can read it.

What JSON would change on the way, or cannot carry, is refused where it is
handed in, by name and with the remedy; nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Final

from .exceptions import GearmanError, NotJSON

_MAX_MESSAGE: Final = 8 * 1024
_MAX_TRACEBACK: Final = 64 * 1024
"""Characters of an exception that travel; what a job puts there is bounded before it is sent."""

_MOST_BITS: Final = 14_000
"""Of a whole number; Python takes no more than 4,300 digits of one."""

_EXCEPTION_KEYS: Final = ("exception", "message", "traceback")

_OWN_FRAMES: Final = (f"{__package__}.", "asyncio.", "asgiref.", "concurrent.futures.")
"""Modules whose frames tell a job's author nothing."""

_REMEDIES: Final = {
    "datetime": "its isoformat()",
    "date": "its isoformat()",
    "time": "its isoformat()",
    "timedelta": "its total_seconds()",
    "UUID": "str() of it",
    "Decimal": "str() of it",
    "set": "a list of it",
    "frozenset": "a list of it",
    "bytes": "text, base64 for example",
    "bytearray": "text, base64 for example",
    "QuerySet": "a list of primary keys",
    "__proxy__": "str() of it, which is lazy text",
}


def refuse_unless_json(value: object, what: str) -> None:
    """Raise the ``NotJSON`` that says which part of a value cannot travel, and what can instead."""
    try:
        _refuse_unless_json(value, what)
    except RecursionError:
        problem = "is nested too deeply, or contains itself"
        raise NotJSON(what, problem, "pass something flat, or a reference to it") from None


def _refuse_unless_json(value: object, what: str) -> None:
    if value is None or isinstance(value, str | bool):
        return
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise NotJSON(what, "has more digits than JSON's readers take", "pass a string")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise NotJSON(what, f"is {value!r}, which JSON cannot carry", "pass None or a string")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unless_json(item, f"{what}, item {index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                problem = f"has the key {key!r}, which JSON would make a string"
                raise NotJSON(what, problem, "use str keys or a list of pairs")
            _refuse_unless_json(item, f"{what}, key {key!r}")
    else:
        kind = type(value).__name__
        # Clients without Django read what workers tell: without the module there is no such value either.
        models: Any = sys.modules.get("django.db.models")
        if models is not None and isinstance(value, models.Model):
            remedy = "its primary key (.pk), and fetch it in the job"
        elif isinstance(value, os.PathLike):
            remedy = "str() of it"
        elif isinstance(value, Enum):
            remedy = "its value"
        elif is_dataclass(value) and not isinstance(value, type):
            remedy = "dataclasses.asdict() of it"
        else:
            remedy = _REMEDIES.get(kind, "what JSON has: None, bool, int, float, str, list, dict")
        # "a User", "a UUID": what begins with a u is mostly spoken as with a y.
        article = "an" if kind[0] in "AEIOaeio" else "a"
        raise NotJSON(what, f"is {article} {kind}, which JSON cannot carry", f"pass {remedy}")


def dumps(value: object) -> bytes:
    """A value that was not refused, as compact JSON."""
    return _encode(value).encode()


# json.dumps would make an encoder for each value.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def describe_exception(error: BaseException) -> bytes:
    """An exception as the data of WORK_EXCEPTION: ``{"exception", "message", "traceback"}`` in JSON."""
    kind = type(error)
    # From the function on: the worker's own frames tell its author nothing.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(_OWN_FRAMES):
        trace = trace.tb_next
    if trace is None and not isinstance(error, GearmanError):
        trace = error.__traceback__
    lines = traceback.format_exception(kind, error, trace)
    return dumps(
        {
            "exception": f"{kind.__module__}.{kind.__qualname__}",
            "message": _message_of(error)[:_MAX_MESSAGE],
            # The end says most.
            "traceback": "".join(lines)[-_MAX_TRACEBACK:],
        }
    )


def _message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""  # the traceback says that it cannot be told


def exception_of(data: bytes) -> dict[str, str]:
    """
    What ``describe_exception`` wrote: ``exception``, ``message`` and ``traceback``.

    A worker of another language may send anything: that is the message then.
    """
    try:
        told = json.loads(data)
        if all(isinstance(told.get(key, ""), str) for key in _EXCEPTION_KEYS):
            return {key: told.get(key, "") for key in _EXCEPTION_KEYS}
    except (ValueError, AttributeError, RecursionError):
        pass
    return {"exception": "", "message": data.decode(errors="backslashreplace"), "traceback": ""}
