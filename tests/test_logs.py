"""What jobs log: whose it is, what is kept of it, and when it leaves."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from django_gearman import JobContext, job, logs, reports
from django_gearman.attempts import perform_assigned
from django_gearman.models import JobRecord
from django_gearman.server.entries import JobLogged
from tests.docs import block_of
from tests.harness import ROOT, environment, wait_until
from tests.test_jobs import Reports, registry  # noqa: F401  # a fixture
from tests.test_store import DatabaseHouse, finished, queued, requeued, started, write

logger = logging.getLogger("tests.photos")


class Caught(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def caught() -> Iterator[list[Any]]:
    """Records of ``logger``, which LOGGING lets pass from INFO on."""
    handler = Caught()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def kept(told: Reports) -> list[str]:
    """The lines that a job's record would have, without their times."""
    texts = [words[1] for words in told.told if words[0] == "log"]
    return [_time.sub("", line) for line in texts[-1].decode().split("\n")] if texts else []


_time = re.compile(r"^\d\d:\d\d:\d\d ")


def run(function: Any, **attributes: Any) -> Reports:
    """Run a function as a job, with a context; what a job server would be told."""
    told = Reports(b'{"args": [], "kwargs": {}}')
    for name, value in attributes.items():
        setattr(told, name, value)
    perform_assigned(job(takes_context=True, name="photos.resize")(function), told)
    return told


def marks(record: Any) -> tuple[str, str, str, int]:
    return record.job_id, record.job_handle, record.job_function, record.job_attempt


def speak(context: JobContext) -> None:
    logger.info("size %d", 7)
    logger.debug("not let pass")
    context.logger.warning("beware of %s", "<b>")


def speak_in_threads(context: JobContext) -> None:
    async def speak_in_tasks() -> None:
        async def task(number: int) -> None:
            await asyncio.sleep(0)
            logger.info("task %d", number)

        await asyncio.gather(task(1), task(2))
        await asyncio.to_thread(logger.info, "thread of a task")

    asyncio.run(speak_in_tasks())
    thread = threading.Thread(target=lambda: context.logger.info("thread without a context"))
    thread.start()
    thread.join()


def speak_badly(context: JobContext) -> None:
    context.logger.info("two %d", "words")
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("it failed")


def speak_much(context: JobContext) -> None:
    for number in range(1000):
        context.logger.info("line %d %s", number, "x" * 100)
    context.logger.info("y" * 100_000)


both = threading.Barrier(2)


def speak_together(context: JobContext) -> None:
    both.wait(30)
    for _ in range(100):
        logger.info(context.handle)


def rebuild(context: JobContext) -> None:
    logging.makeLogRecord({"msg": "from elsewhere"})


def count(context: JobContext) -> None:
    for number in range(1000):
        context.logger.info("%d", number)


def stay_silent(context: JobContext) -> None:
    pass


def speak_and_fail(context: JobContext) -> None:
    context.set_progress(1, 3)
    context.set_progress(2, 3)
    context.logger.info("about to fail")
    raise ValueError("boom")


@pytest.mark.usefixtures("registry")
class TestRecords:
    def test_each_says_whose_it_is(self, caught: list[Any]):
        told = run(speak, handle=b"H:one:r17", attempt=3)
        (record,) = caught
        assert marks(record) == ("17", "H:one:r17", "photos.resize", 3)
        assert kept(told) == ["INFO tests.photos: size 7", "WARNING photos.resize: beware of <b>"]

    def test_job_of_the_wire_has_its_handle_for_an_id(self, caught: list[Any]):
        run(speak, handle=b"H:one:4.2")
        assert marks(caught[0])[:2] == ("H:one:4.2", "H:one:4.2")

    def test_in_threads_and_tasks(self, caught: list[Any]):
        told = run(speak_in_threads)
        assert [record.job_function for record in caught] == ["photos.resize"] * 3
        assert kept(told) == [
            "INFO tests.photos: task 1",
            "INFO tests.photos: task 2",
            "INFO tests.photos: thread of a task",
            "INFO photos.resize: thread without a context",
        ]

    def test_thread_without_a_context(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO):
            told = run(speak_in_threads, handle=b"H:one:r17")
        assert [record.job_id for record in caplog.records if record.name == "photos.resize"] == ["17"]
        assert kept(told)[-1] == "INFO photos.resize: thread without a context"

    def test_jobs_side_by_side(self, caught: list[Any]):
        threads = [
            threading.Thread(target=run, args=(speak_together,), kwargs={"handle": handle})
            for handle in (b"H:one:r1", b"H:one:r2")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(caught) == 200
        assert all(record.job_handle == record.msg for record in caught)

    def test_outside_of_jobs_they_are_of_none(self, caught: list[Any]):
        run(speak)
        logger.info("after it")
        assert marks(caught[-1]) == ("", "", "", 0)

    def test_filter_is_enough_where_no_jobs_run(self):
        record = logging.LogRecord("web", logging.INFO, "", 0, "x", (), None)
        assert logs.JobFilter().filter(record)
        assert logging.Formatter("{job_function}#{job_attempt} {message}", style="{").format(record) == "#0 x"

    def test_logging_of_the_documentation(self):
        """In a process of its own: it is the whole configuration."""
        script = block_of("monitoring.md", "logging") + (
            "import django, logging, logging.config\n"
            "django.setup()\n"
            "logging.config.dictConfig(LOGGING)\n"
            "logging.getLogger('web').info('hello')\n"
            "from django_gearman.context import JobContext\n"
            "from django_gearman.logs import install, logging_as\n"
            "install()\n"
            "with logging_as(JobContext('H:one:r7', attempt=2, function='f')):\n"
            "    logging.getLogger('web').info('hello')\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert [line.partition(" INFO ")[2] for line in done.stderr.splitlines()] == [
            "web [  #0] hello",
            "web [f 7 #2] hello",
        ]

    def test_filter_leaves_what_another_thread_marked(self):
        record = logging.LogRecord("web", logging.INFO, "", 0, "x", (), None)
        record.job_id = "7"
        logs.JobFilter().filter(record)
        assert record.job_id == "7"

    def test_factory_that_was_there_goes_on(self, caught: list[Any]):
        """And the one of a project that comes later, too; ours is put in once."""
        before = logging.getLogRecordFactory()

        def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
            record = before(*args, **kwargs)
            record.project = "shop"
            return record

        logging.setLogRecordFactory(factory)
        try:
            told = run(speak)
        finally:
            logging.setLogRecordFactory(before)
        assert caught[0].project == "shop"
        assert len(kept(told)) == 2

    def test_record_that_is_made_again_is_not_logged_again(self):
        assert kept(run(rebuild)) == []

    def test_handlers_are_left_alone(self):
        before = list(logging.getLogger().handlers)
        run(speak)
        assert logging.getLogger().handlers == before

    def test_line_of_the_caller(self, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.INFO):
            run(speak_badly_placed)
        (record,) = [record for record in caplog.records if record.name == "photos.resize"]
        assert (record.funcName, getattr(record, "size", None)) == ("speak_badly_placed", 7)


def speak_badly_placed(context: JobContext) -> None:
    context.logger.info("here", extra={"size": 7})


@pytest.mark.usefixtures("registry")
class TestKept:
    def test_traceback_and_wrong_arguments(self, caught: list[Any]):
        first, second, *trace = kept(run(speak_badly))
        assert (first, second) == ("INFO photos.resize: two %d", "ERROR tests.photos: it failed")
        assert trace[-1] == "ValueError: boom"
        assert len(caught) == 1

    def test_last_lines_within_bounds(self):
        told = run(speak_much)
        ((_, text),) = told.told
        lines = text.decode().split("\n")
        assert len(text) < logs.MAX_BYTES + 100
        assert lines[0].endswith("earlier lines are left out]")
        assert lines[-1].endswith("y…")
        assert len(lines[-1]) == logs.MAX_RECORD
        assert " line 999 " in lines[-2]

    def test_many_short_lines(self):
        lines = kept(run(count))
        assert len(lines) == logs.MAX_LINES + 1
        assert lines[-1] == "INFO photos.resize: 999"

    def test_nobody_keeps_them(self):
        assert kept(run(speak, takes_log=False)) == []

    def test_job_that_says_nothing_sends_nothing(self):
        assert run(stay_silent).told == []

    def test_of_a_job_that_fails_all_that_was_held_back_leaves(self):
        told = Reports(b'{"args": [], "kwargs": {}}')
        with pytest.raises(ValueError, match="boom"):
            perform_assigned(job(takes_context=True, name="photos.resize")(speak_and_fail), told)
        assert told.told[:2] == [("status", 1, 3), ("status", 2, 3)]
        assert kept(told) == ["INFO photos.resize: about to fail"]

    def test_called_here_it_goes_to_logging_alone(self, caplog: pytest.LogCaptureFixture):
        made = job(takes_context=True, name="photos.resize")(speak)
        made.call()
        assert [record.getMessage() for record in caplog.records] == ["beware of <b>"]


class TestHeldBack:
    """Nothing more is said, and it leaves all the same."""

    @pytest.fixture
    def told(self) -> Iterator[tuple[JobContext, Reports]]:
        told = Reports()
        context = JobContext("H:one:r1", "", told, function="f")
        yield context, told
        context.close()
        wait_until(lambda: reports.flusher._thread is None, what="the end of the thread")

    def test_progress(self, told: tuple[JobContext, Reports]):
        context, server = told
        context.set_progress(1, 10)
        context.set_progress(2, 10)
        context.set_progress(2, 10)
        wait_until(lambda: server.told == [("status", 1, 10), ("status", 2, 10)])

    def test_lines(self, told: tuple[JobContext, Reports], monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("django_gearman.context.LOG_INTERVAL", 0.1)
        context, server = told
        context.logger.info("one")
        wait_until(lambda: kept(server) == ["INFO f: one"])
        context.logger.info("two")
        wait_until(lambda: kept(server) == ["INFO f: one", "INFO f: two"])

    def test_same_progress_leaves_once(self, told: tuple[JobContext, Reports]):
        context, server = told
        for _ in range(1000):
            context.set_progress(10, 10)
        assert server.told == [("status", 10, 10)]

    def test_nothing_leaves_after_the_end(self, told: tuple[JobContext, Reports]):
        context, server = told
        context.close()
        context.set_progress(1, 10)
        context.send_data("x")
        context.warn("x")
        context.logger.info("x")
        context.flush()
        assert server.told == []

    def test_without_another_thread_it_leaves_at_the_end(
        self, told: tuple[JobContext, Reports], monkeypatch: pytest.MonkeyPatch
    ):
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        context, server = told
        monkeypatch.setattr(threading.Thread, "start", refuse)
        context.set_progress(1, 10)
        context.set_progress(2, 10)
        context.logger.info("one")
        assert server.told == [("status", 1, 10)]
        context.close()
        assert server.told[1] == ("status", 2, 10)
        assert kept(server) == ["INFO f: one"]

    def test_what_ends_meanwhile_may_log(self, told: tuple[JobContext, Reports]):
        """The garbage collector may end something at any moment, whose end is logged."""

        class Ends:
            def __hash__(self) -> int:
                context.logger.info("ended")
                return 0

            def flush(self) -> None:
                pass

        context, server = told
        thread = threading.Thread(target=reports.flusher.flush_at, args=(Ends(), 0.0), daemon=True)
        thread.start()
        thread.join(30.0)
        assert not thread.is_alive()
        context.flush()
        assert kept(server)[-1].endswith("ended")

    def test_broken_report_is_told_and_others_go_on(
        self, told: tuple[JobContext, Reports], caplog: pytest.LogCaptureFixture
    ):
        class Broken:
            def flush(self) -> None:
                raise OSError("broken")

        context, server = told
        reports.flusher.flush_at(Broken(), 0.0)
        context.set_progress(1, 10)
        context.set_progress(2, 10)
        wait_until(lambda: ("status", 2, 10) in server.told)
        assert "What a job reports could not be sent" in caplog.text


@pytest.mark.parametrize(
    ("handle", "id"),
    [
        ("H:one:4730:r17", "17"),
        ("S:r5", "5"),
        ("H:one:4730:3.17", ""),
        ("H:host:17", ""),
        ("H:r", ""),
        ("r17", ""),
        (":r17", ""),
        ("", ""),
    ],
)
def test_id_of_a_handle(handle: str, id: str):
    assert JobContext(handle).id == id


@pytest.mark.django_db(transaction=True)
class TestRows:
    """``DatabaseStore``: entries to columns."""

    @pytest.fixture
    def database(self, transactional_db: None) -> DatabaseHouse:
        return DatabaseHouse()

    def logged(self, text: bytes) -> JobLogged:
        return JobLogged(queued().handle, text)

    def test_last_of_a_batch(self, database: DatabaseHouse):
        write(database.store, queued(), started(), self.logged(b"one"), self.logged(b"two\n\xff\0"))
        assert JobRecord.objects.get().log == "two\n\\xff\\0"
        write(database.store, self.logged(b"three"), finished())
        assert JobRecord.objects.get().log == "three"

    def test_of_an_attempt(self, database: DatabaseHouse):
        write(database.store, queued(), started(), self.logged(b"one"))
        write(database.store, self.logged(b"one\ntwo"), requeued(log=b"one\ntwo"))
        record = JobRecord.objects.get()
        assert record.log == ""
        assert record.past_attempts.get().log == "one\ntwo"

    def test_of_an_attempt_that_the_server_s_end_cut_short(self, database: DatabaseHouse):
        write(database.store, queued(), started(), self.logged(b"one"))
        database.store.resume()
        record = JobRecord.objects.get()
        assert (record.status, record.log) == (JobRecord.Status.READY, "")
        assert record.past_attempts.get().log == "one"
