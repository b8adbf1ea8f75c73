"""
OpenTelemetry's context, from who submits a job to who runs it.

It travels beside the arguments, as ``{"args": [...], "kwargs": {...}, "trace":
{"traceparent": "..."}}``, so that it comes along by both doors and through any
job server, and programs in other languages find it under its W3C name.
Nothing of this happens where opentelemetry-api is not installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, Final

KEY: Final = "trace"
"""Name of the context in the envelope of a workload."""

_NOTHING: Final = nullcontext()

LONGEST: Final = 8 * 1024
"""Characters of a context that is sent along, baggage included."""


@cache
def _api() -> tuple[ModuleType, ModuleType] | None:
    """``opentelemetry.propagate`` and ``opentelemetry.trace``; None where they are not installed."""
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        return None
    return propagate, trace


def current() -> dict[str, str]:
    """What is to travel of the current context, as ``OTEL_PROPAGATORS`` says; empty for nothing."""
    api = _api()
    carrier: dict[str, str] = {}
    if api is not None:
        api[0].inject(carrier)
        if sum(map(len, carrier.values())) > LONGEST:
            return {}
    return carrier


def continued(function: str, workload: bytes, handle: str) -> AbstractContextManager[object]:
    """Run the block in a span of its own, in the trace that the workload tells of, or in a new one."""
    api = _api()
    if api is None:
        return _NOTHING
    propagate, trace = api
    attributes = {
        "messaging.system": "gearman",
        "messaging.operation.type": "process",
        "messaging.destination.name": function,
        "messaging.message.id": handle,
    }
    parent = propagate.extract(_carried(workload))
    tracer = trace.get_tracer("django_gearman")
    kind = trace.SpanKind.CONSUMER
    span: AbstractContextManager[object] = tracer.start_as_current_span(
        f"process {function}", parent, kind, attributes=attributes
    )
    return span


def _carried(workload: bytes) -> Mapping[str, str]:
    # Mostly there is none, and a large workload is not read twice to find that out.
    if f'"{KEY}"'.encode() not in workload:
        return {}
    try:
        envelope: Any = json.loads(workload)
        found = envelope.get(KEY)
    except (ValueError, AttributeError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}
