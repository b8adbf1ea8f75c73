"""Signals, and what hangs on them: error reports; and the trace that travels with a job."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import sentry_sdk
from asgiref.sync import async_to_sync
from django.db import transaction
from django.dispatch import Signal
from django.utils import timezone
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.integrations.logging import LoggingIntegration

from django_gearman import JobContext, JobResult, Retry, job, signals, tracing
from django_gearman.attempts import aperform_assigned, perform_assigned
from django_gearman.attempts import pause_before_retry as decide
from django_gearman.exceptions import TooLarge
from django_gearman.jobs import Job
from django_gearman.models import JobRecord
from django_gearman.results import retry_all
from django_gearman.worker import loop
from tests.app import jobs
from tests.docs import block_of
from tests.test_jobs import Reports, registry  # noqa: F401  # a fixture

NAMES = ("job_enqueued", "job_started", "job_finished", "job_retried")


@pytest.fixture
def heard() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Every signal that is sent, with its arguments."""
    found: list[tuple[str, dict[str, Any]]] = []
    receivers = []
    for name in NAMES:

        def receive(signal: Signal, name: str = name, **arguments: Any) -> None:
            found.append((name, arguments))

        receivers.append((getattr(signals, name), receive))
    for signal, receive in receivers:
        signal.connect(receive)
    yield found
    for signal, receive in receivers:
        assert signal.disconnect(receive)


def assigned(*args: Any, **attributes: Any) -> Reports:
    made = Reports(json.dumps({"args": args, "kwargs": {}}).encode())
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.mark.django_db
class TestEnqueued:
    def test_arguments(self, heard: list[Any]):
        result = jobs.add.using(priority=5).enqueue(1)
        assert heard == [("job_enqueued", {"sender": jobs.add, "result": result})]

    def test_submission_that_joins_another_is_none(self, heard: list[Any]):
        jobs.append_once.enqueue("a", "b")
        jobs.append_once.enqueue("a", "c")
        assert len(heard) == 1

    def test_enqueued_again(self, heard: list[Any]):
        old = jobs.append_once.enqueue("a", "b")
        old.cancel()
        del heard[:]
        again = old.retry()
        assert heard == [("job_enqueued", {"sender": jobs.append_once, "result": again})]
        # This one joins it.
        assert old.retry() == again
        assert len(heard) == 1

    def test_enqueued_again_by_the_admin(self, heard: list[Any]):
        old = [jobs.add.enqueue(number) for number in range(2)]
        for result in old:
            result.cancel()
        del heard[:]
        assert retry_all([int(result.id) for result in old], "default") == (2, 0, 0)
        made = JobRecord.objects.filter(status="READY").order_by("pk")
        assert heard == [
            ("job_enqueued", {"sender": jobs.add, "result": JobResult(record)}) for record in made
        ]

    def test_enqueued_again_where_the_function_is_not_known(self, heard: list[Any]):
        old = JobRecord.objects.create(function="resize", status="FAILED", finished_at=timezone.now())
        assert JobResult(old).retry().function == "resize"
        assert heard == []

    def test_wire(self, heard: list[Any], settings: Any):
        settings.GEARMAN = {"default": {"ENQUEUE": "wire"}}
        with transaction.atomic():
            result = jobs.add.enqueue(1)
            transaction.set_rollback(True)
        assert heard == [("job_enqueued", {"sender": jobs.add, "result": result})]

    def test_receiver_that_raises_costs_no_job(self, caplog: pytest.LogCaptureFixture):
        def fail(**arguments: Any) -> None:
            raise ZeroDivisionError

        signals.job_enqueued.connect(fail)
        try:
            jobs.add.enqueue(1)
        finally:
            signals.job_enqueued.disconnect(fail)
        assert JobRecord.objects.count() == 1
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.usefixtures("registry")
class TestAttempt:
    def test_success(self, heard: list[Any]):
        perform_assigned(jobs.add, assigned(1))
        (first, begun), (last, ended) = heard
        assert (first, last) == ("job_started", "job_finished")
        assert begun.keys() == {"sender", "context"}
        context = begun["context"]
        assert isinstance(context, JobContext)
        assert (context.handle, context.attempt, context.function) == ("H:one:1.1", 1, jobs.add.name)
        assert ended["context"] is context
        assert ended["exception"] is None
        assert 0 <= ended["seconds"] < 1

    def test_failure(self, heard: list[Any]):
        with pytest.raises(ValueError, match="boom") as raised:
            perform_assigned(jobs.fail, assigned("boom"))
        assert [name for name, _ in heard] == ["job_started", "job_finished"]
        assert heard[1][1]["exception"] is raised.value

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_result_that_fits_in_no_packet(self, heard: list[Any], settings: Any, is_async: bool):
        """The job has failed, and is not tried again: its result would be as large."""
        settings.GEARMAN = {"default": {"MAX_PACKET": 70_000}}
        large = job(name="large", max_attempts=3)(areturn_much if is_async else return_much)
        perform: Any = async_to_sync(aperform_assigned) if is_async else perform_assigned
        room = 70_000 - len("H:one:1.1") - 1 - len('""')
        assert len(perform(large, assigned(room))) == room + 2
        del heard[:]
        told = assigned(room + 1)
        with pytest.raises(TooLarge, match=r"result of large .* more than MAX_PACKET=70000; store it"):
            perform(large, told)
        assert [name for name, _ in heard] == ["job_started", "job_finished"]
        assert isinstance(heard[1][1]["exception"], TooLarge)
        assert told.decision == (None,)

    @pytest.mark.parametrize("hears", [False, True], ids=["function", "terminal"])
    def test_keyboard_interrupt(self, heard: list[Any], hears: bool):
        """Its end, unless it comes from the terminal: then the job goes back to the queue."""
        with pytest.raises(KeyboardInterrupt):
            perform_assigned(job(name="interrupt")(interrupt), assigned(hears_interrupts=hears))
        assert [name for name, _ in heard] == ["job_started"] + ["job_finished"] * (not hears)

    def test_arguments_that_do_not_fit(self, heard: list[Any]):
        with pytest.raises(TypeError):
            perform_assigned(jobs.add, assigned())
        assert [name for name, _ in heard] == ["job_started", "job_finished"]

    def test_another_attempt(self, heard: list[Any]):
        patient = job(max_attempts=2, name="patient", takes_context=True)(ask_again)
        first = assigned(1)
        with pytest.raises(Retry) as raised:
            perform_assigned(patient, first)
        (_, _), (name, told) = heard
        assert name == "job_retried"
        assert (told["exception"], told["pause"]) == (raised.value, 7.0)
        # The worker's loop asks once more.
        assert decide(patient, first, raised.value) == 7.0
        del heard[:]
        with pytest.raises(Retry):
            perform_assigned(patient, assigned(1, attempt=2))
        assert [name for name, _ in heard] == ["job_started", "job_finished"]

    def test_backoff_is_asked_once(self, transactional_db: None):
        asked: list[object] = []
        patient = job(max_attempts=2, name="patient", backoff=lambda *told: asked.append(told) or 3.0)(
            raise_error
        )
        told = assigned()
        with pytest.raises(ValueError, match="boom") as raised:
            perform_assigned(patient, told)
        assert decide(patient, told, raised.value) == 3.0
        assert len(asked) == 1

    def test_server_that_takes_no_job_back(self, heard: list[Any]):
        patient = job(max_attempts=2, name="patient")(raise_error)
        with pytest.raises(ValueError, match="boom"):
            perform_assigned(patient, assigned(may_return=False))
        assert heard[-1][0] == "job_finished"

    def test_receivers_that_raise_cost_no_job(self, caplog: pytest.LogCaptureFixture):
        def fail(**arguments: Any) -> None:
            raise ZeroDivisionError

        for name in NAMES:
            getattr(signals, name).connect(fail)
        try:
            assert perform_assigned(jobs.add, assigned(1)) == b"2"
            with pytest.raises(ValueError, match="boom"):
                perform_assigned(jobs.fail, assigned("boom"))
        finally:
            for name in NAMES:
                getattr(signals, name).disconnect(fail)

    def test_what_receivers_log_is_the_job_s(self):
        def note(context: JobContext, **arguments: Any) -> None:
            logging.getLogger("tests.receivers").warning("seen")

        signals.job_finished.connect(note)
        told = assigned(1)
        try:
            perform_assigned(jobs.add, told)
        finally:
            signals.job_finished.disconnect(note)
        ((_, text),) = told.told
        assert text.endswith(b"WARNING tests.receivers: seen")


def ask_again(context: JobContext, number: int) -> None:
    raise Retry("not yet", after=7)


def return_much(size: int) -> str:
    return "x" * size


async def areturn_much(size: int) -> str:
    return return_much(size)


def interrupt() -> None:
    raise KeyboardInterrupt


def raise_error() -> None:
    raise ValueError("boom")


def say(name: str) -> None:
    sentry_sdk.set_tag(name, name)
    logging.getLogger("shop").warning("of %s", name)
    raise ValueError(name)


async def asay(name: str) -> None:
    say(name)


class TestSentry:
    """The hooks of docs/monitoring.md, with Sentry's own client."""

    @pytest.fixture
    def sent(self) -> Iterator[list[Any]]:
        events: list[Any] = []

        class Transport(sentry_sdk.transport.Transport):
            def capture_envelope(self, envelope: Any) -> None:
                if event := envelope.get_event():
                    events.append(event)

        with sentry_sdk.isolation_scope():
            # That of logging as it comes by default; the others reach into more than a test should.
            options: Any = {"default_integrations": False, "integrations": [LoggingIntegration()]}
            sentry_sdk.init("https://key@sentry.example/1", transport=Transport, **options)
            hooks: dict[str, Any] = {}
            exec(block_of("monitoring.md", "sentry"), hooks)
            try:
                yield events
            finally:
                assert signals.job_started.disconnect(hooks["begin"])
                assert signals.job_finished.disconnect(hooks["report"])
                sentry_sdk.init()

    def test_failure_is_reported_once(self, sent: list[Any]):
        with pytest.raises(ValueError, match="boom"):
            perform_assigned(jobs.fail, assigned("boom", handle=b"H:one:r7", attempt=2))
        # As the worker's loop says of each.
        loop.logger.error("Job H:one:r7 (%s) failed", jobs.fail.name)
        perform_assigned(jobs.add, assigned(1))
        (event,) = sent
        assert event["exception"]["values"][-1]["type"] == "ValueError"
        assert event["tags"] == {"gearman.function": "tests.app.jobs.fail"}
        assert event["contexts"]["job"] == {"id": "7", "handle": "H:one:r7", "attempt": 2}

    @pytest.mark.parametrize("is_async", [False, True])
    def test_jobs_are_told_apart(self, sent: list[Any], registry: dict[str, Any], is_async: bool):  # noqa: F811
        made: Job[Any, Any] = Job(asay if is_async else say, name="say")
        perform: Any = async_to_sync(aperform_assigned) if is_async else perform_assigned
        for name in ("first", "second"):
            with pytest.raises(ValueError, match=name):
                perform(made, assigned(name))
        for event, name in zip(sent, ("first", "second"), strict=True):
            assert event["tags"] == {name: name, "gearman.function": "say"}
            assert [crumb["message"] for crumb in event["breadcrumbs"]["values"]] == [f"of {name}"]


class TestTrace:
    """OpenTelemetry's own SDK at both ends."""

    @pytest.fixture
    def spans(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        yield exporter
        provider.shutdown()

    @pytest.mark.django_db
    def test_from_the_view_to_the_job(self, spans: Any):
        with trace.get_tracer("view").start_as_current_span("view") as view:
            jobs.add.enqueue(1)
        workload = bytes(JobRecord.objects.get().workload)
        envelope = json.loads(workload)
        assert envelope.keys() == {"args", "kwargs", "trace"}
        assert envelope["trace"]["traceparent"].split("-")[1] == f"{view.get_span_context().trace_id:032x}"
        assert perform_assigned(jobs.add, Reports(workload)) == b"2"
        _, span = spans.get_finished_spans()
        assert span.name == "process tests.app.jobs.add"
        assert span.kind == trace.SpanKind.CONSUMER
        assert span.parent.span_id == view.get_span_context().span_id
        assert span.context.trace_id == view.get_span_context().trace_id
        assert span.attributes["messaging.message.id"] == "H:one:1.1"

    def test_error_is_the_span_s(self, spans: Any):
        with pytest.raises(ValueError, match="boom"):
            perform_assigned(jobs.fail, assigned("boom"))
        (span,) = spans.get_finished_spans()
        assert span.status.description == "ValueError: boom"
        assert span.parent is None

    @pytest.mark.django_db
    def test_without_a_trace_nothing_goes_along(self, spans: Any):
        jobs.add.enqueue(1)
        assert json.loads(bytes(JobRecord.objects.get().workload)) == {"args": [1], "kwargs": {}}

    @pytest.mark.django_db
    def test_equal_jobs_stay_equal(self, spans: Any):
        for _ in range(2):
            with trace.get_tracer("view").start_as_current_span("view"):
                jobs.add.using(unique="-").enqueue(1)
        assert JobRecord.objects.count() == 1

    @pytest.mark.parametrize(
        "workload",
        [b'{"trace"', b'["trace"]', b'"trace"', b'{"trace": 7}', b'{"trace": {"traceparent": ["00"]}}'],
    )
    def test_what_strangers_send_begins_a_new_one(self, spans: Any, workload: bytes):
        with tracing.continued("f", workload, "H:1"):
            pass
        (span,) = spans.get_finished_spans()
        assert span.parent is None

    def test_raw_jobs_are_not_looked_into(self, spans: Any):
        parent = b'{"trace": {"traceparent": "00-%s-%s-01"}}' % (b"a" * 32, b"b" * 16)
        perform_assigned(jobs.shout, Reports(parent))
        (span,) = spans.get_finished_spans()
        assert span.parent is None

    def test_without_opentelemetry(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(tracing, "_api", lambda: None)
        assert tracing.current() == {}
        assert perform_assigned(jobs.add, assigned(1)) == b"2"


def test_functions_of_the_app_are_jobs():
    """Else ``sender`` would be something else."""
    assert isinstance(jobs.add, Job)
