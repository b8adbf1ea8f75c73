"""``add_task`` and ``run_tasks``, in the words of PHP's and Perl's clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from django_gearman.client.sync import Client
from django_gearman.client.tasks import Task
from django_gearman.exceptions import (
    ConnectionFailed,
    ConnectionLost,
    GearmanError,
    JobFailed,
    NoWorker,
    ResponseTimeout,
    ResultTooLarge,
    ServerError,
)
from django_gearman.protocol.packets import PacketType
from django_gearman.worker.loop import AssignedJob
from tests import harness

from .fake_server import Peer, fake_server, play
from .test_sync import TAKEN, server, worker

__all__ = ["server", "worker"]

P = PacketType


@pytest.fixture
def client(server: harness.GearmanServerProcess) -> Iterator[Any]:
    with Client([server.address], timeout=10) as made:
        yield made


class Log:
    """What call-backs were told, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    @property
    def callbacks(self) -> dict[str, Any]:
        return {
            "on_created": lambda task: self.note("created", task, bool(task.handle), bool(task.server)),
            "on_data": lambda task: self.note("data", task, task.data),
            "on_warning": lambda task: self.note("warning", task, task.data),
            "on_status": lambda task: self.note("status", task, task.numerator, task.denominator),
            "on_complete": lambda task: self.note("complete", task, task.data),
            "on_fail": lambda task: self.note("fail", task, type(task.error)),
            "on_exception": lambda task: self.note("exception", task, task.data),
        }

    def note(self, event: str, task: Task, *values: Any) -> None:
        self.lines.append((event, task.context, *values))

    def of(self, context: object) -> list[tuple[Any, ...]]:
        return [(event, *values) for event, about, *values in self.lines if about == context]


@pytest.mark.usefixtures("worker")
class TestTasks:
    def test_every_callback(self, client: Any) -> None:
        log = Log()
        client.add_task("tell", context="told")
        client.add_task("fail", context="failed")
        client.add_task("fail", b"no", context="raised")
        client.add_task_background("nobody serves this", context="kept")
        client.run_tasks(timeout=10, **log.callbacks)
        created = ("created", True, True)
        assert log.of("told") == [
            created,
            ("data", b"part"),
            ("warning", b"careful"),
            ("status", 1, 3),
            ("complete", b"end"),
        ]
        assert log.of("failed") == [created, ("fail", JobFailed)]
        assert log.of("raised") == [created, ("exception", b"ValueError('no')")]
        assert log.of("kept") == [created]

    def test_on_fail_hears_of_what_was_raised_where_nothing_else_does(self, client: Any) -> None:
        told: list[object] = []
        client.add_task("fail", b"no")
        client.add_task("fail", b"no", on_exception=lambda task: told.append("exception"))
        client.run_tasks(timeout=10, on_fail=lambda task: told.append(type(task.error)))
        assert sorted(told, key=str) == [JobFailed, "exception"]

    def test_results_come_in_order(self, client: Any) -> None:
        tasks = [client.add_task("reverse", b"%d" % number) for number in range(300)]
        assert client.run_tasks(timeout=20) == tasks
        assert [task.result() for task in tasks] == [(b"%d" % number)[::-1] for number in range(300)]
        assert all(task.is_done and task.error is None for task in tasks)
        assert client.run_tasks() == []

    def test_a_task_s_own_callback_goes_first(self, client: Any) -> None:
        told: list[str] = []
        client.add_task("reverse", on_complete=lambda task: told.append("own"))
        client.add_task("reverse", b"x")
        client.run_tasks(timeout=10, on_complete=lambda task: told.append("common"))
        assert sorted(told) == ["common", "own"]

    def test_they_run_side_by_side(self, server: harness.GearmanServerProcess, client: Any) -> None:
        together = threading.Barrier(3)

        def meet(job: AssignedJob) -> bytes:
            together.wait(20)
            return b"met"

        functions = {"meet": meet}
        with (
            harness.worker_thread(functions, server),
            harness.worker_thread(functions, server),
            harness.worker_thread(functions, server),
        ):
            for _ in range(3):
                client.add_task("meet")
            assert [task.result() for task in client.run_tasks(timeout=20)] == [b"met"] * 3

    @pytest.mark.parametrize(
        ("add", "kind"),
        [
            ("add_task", P.SUBMIT_JOB),
            ("add_task_high", P.SUBMIT_JOB_HIGH),
            ("add_task_low", P.SUBMIT_JOB_LOW),
            ("add_task_background", P.SUBMIT_JOB_BG),
            ("add_task_high_background", P.SUBMIT_JOB_HIGH_BG),
            ("add_task_low_background", P.SUBMIT_JOB_LOW_BG),
        ],
    )
    def test_each_has_its_packet(self, add: str, kind: PacketType) -> None:
        seen: list[list[bytes]] = []

        def script(peer: Peer) -> None:
            seen.append(peer.expect(kind))
            peer.send(*TAKEN)
            peer.send(P.WORK_COMPLETE, b"H:1", b"r")
            peer.wait_for_end()

        with fake_server(script) as port, Client([f"127.0.0.1:{port}"], timeout=30) as client:
            task = getattr(client, add)("f", b"w", unique="u")
            client.run_tasks(timeout=30)
        assert seen == [[b"f", b"u", b"w"]]
        assert task.result() == (b"" if "background" in add else b"r")

    def test_status(self, server: harness.GearmanServerProcess, client: Any) -> None:
        log = Log()
        go_on = threading.Event()

        def work(job: AssignedJob) -> bytes:
            job.send_status(2, 5)
            go_on.wait(20)
            return b""

        with harness.worker_thread({"asked of": work}, server):
            handle = client.do_background("asked of")
            try:
                harness.wait_until(lambda: client.job_status(handle).denominator == 5)
                known = client.add_task_status(handle, context="known")
                unknown = client.add_task_status("H:nothing:1", context="unknown")
                client.run_tasks(timeout=10, **log.callbacks)
            finally:
                go_on.set()
        assert (known.known, known.running) == (True, True)
        assert (unknown.known, unknown.running) == (False, False)
        assert sorted(log.lines) == [("status", "known", 2, 5), ("status", "unknown", 0, 0)]

    def test_so_many_are_in_flight_at_the_most(self) -> None:
        most: list[int] = []

        def script(peer: Peer) -> None:
            for _ in range(10):
                for number in range(2):
                    peer.expect(P.SUBMIT_JOB)
                    peer.send(P.JOB_CREATED, b"H:%d" % number)
                peer.socket.settimeout(0.05)
                try:
                    peer.receive()
                    most.append(3)
                except TimeoutError:
                    most.append(2)
                peer.socket.settimeout(None)
                for number in range(2):
                    peer.send(P.WORK_COMPLETE, b"H:%d" % number, b"")
            peer.wait_for_end()

        with fake_server(script) as port, Client([f"127.0.0.1:{port}"], timeout=30) as client:
            for _ in range(20):
                client.add_task("f")
            assert all(task.is_done for task in client.run_tasks(timeout=10, limit=2))
        assert most == [2] * 10

    def test_large_ones_both_ways(self, client: Any) -> None:
        """More than the kernels and the server's buffers hold."""
        for _ in range(40):
            client.add_task("reverse", bytes(range(256)) * 4096)
        assert {task.result() for task in client.run_tasks(timeout=60)} == {bytes(range(256))[::-1] * 4096}

    def test_time_out(self, server: harness.GearmanServerProcess, client: Any) -> None:
        limits = iter((0.3, 1.0, 3.0, 9.0))
        harness.in_one_try(lambda: self.check_time_out(client, next(limits)), tries=4)
        # Nobody waits for it any more, and nobody will run it.
        harness.wait_until(lambda: server.status()["nobody takes this"] == (0, 0, 0))

    def check_time_out(self, client: Any, limit: float) -> None:
        log = Log()
        late = client.add_task("nobody takes this", context="late")
        client.add_task("reverse", b"ab", context="in time")
        began = time.monotonic()
        client.run_tasks(timeout=limit, **log.callbacks)
        assert time.monotonic() - began < 25
        assert log.of("late") == [("created", True, True), ("fail", NoWorker)]
        assert log.of("in time")[-1] == ("complete", b"ba")
        with pytest.raises(
            ResponseTimeout, match=r"took longer than [\d.]+ s: 1 job waits for nobody takes this"
        ):
            late.result()

    def test_what_had_no_turn_in_time_is_not_submitted(
        self, server: harness.GearmanServerProcess, client: Any
    ) -> None:
        """A background job would stay with the server, though it is said to have failed."""
        first = client.add_task("nobody takes this either")
        others = [client.add_task_background("never submitted") for _ in range(3)]
        others.append(client.add_task("never submitted"))
        client.run_tasks(timeout=0.3, limit=1)
        assert isinstance(first.error, ResponseTimeout)
        assert [(type(task.error), task.handle) for task in others] == [(ResponseTimeout, "")] * 4
        assert "never submitted" not in server.status()

    def test_a_callback_that_fails(self, client: Any) -> None:
        client.add_task("tell", on_data=lambda task: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            client.run_tasks(timeout=10)
        client.add_task("reverse", on_complete=lambda task: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            client.run_tasks(timeout=10)
        assert client.do("reverse", b"ab", timeout=10) == b"ba"

    @pytest.mark.parametrize("event", ["on_created", "on_data", "on_complete"])
    @pytest.mark.parametrize(
        "error",
        [
            JobFailed("another"),
            ServerError("127.0.0.1:1", "CODE", "text"),
            ConnectionLost("127.0.0.1:1", "gone"),
            ResponseTimeout("another job", 1.0),
            ResultTooLarge("127.0.0.1:1", 9),
        ],
    )
    def test_a_callback_that_raises_what_tasks_do(self, client: Any, event: str, error: GearmanError) -> None:
        """It is none of the task's own errors."""
        told: list[Task] = []

        def callback(task: Task) -> None:
            raise error

        task = client.add_task("tell", on_fail=told.append, **{event: callback})
        with pytest.raises(type(error)) as caught:
            client.run_tasks(timeout=10, resubmit=True)
        assert caught.value is error
        assert task.error is None
        assert told == []
        assert client.do("reverse", b"ab", timeout=10) == b"ba"

    @pytest.mark.parametrize("error", [JobFailed("another"), ConnectionLost("127.0.0.1:1", "gone")])
    def test_one_that_fails_when_a_task_has(self, client: Any, error: GearmanError) -> None:
        def callback(task: Task) -> None:
            raise error

        for function in ("fail", "refused\n"):
            task = client.add_task(function, on_fail=callback)
            with pytest.raises(type(error)) as caught:
                client.run_tasks(timeout=10)
            assert caught.value is error
            assert task.error is not error

    def test_a_refusal_is_of_one(self, client: Any) -> None:
        refused = client.add_task("a\nb")
        taken = client.add_task("reverse", b"ab")
        client.run_tasks(timeout=10)
        assert taken.result() == b"ba"
        with pytest.raises(ServerError, match="INVALID_FUNCTION_NAME"):
            refused.result()

    def test_a_unique_is_shared(self, server: harness.GearmanServerProcess, client: Any) -> None:
        ran: list[bytes] = []

        def work(job: AssignedJob) -> bytes:
            ran.append(job.workload)
            time.sleep(0.1)
            return b"for all"

        tasks = [client.add_task("one for all", b"%d" % number, unique="u") for number in range(5)]
        with harness.worker_thread({"one for all": work}, server):
            client.run_tasks(timeout=10)
        assert [task.result() for task in tasks] == [b"for all"] * 5
        assert len(ran) == 1

    def test_what_is_wrong_is_told_at_once(self, client: Any) -> None:
        with pytest.raises(TypeError, match="must be bytes"):
            client.add_task("f", "text")
        with pytest.raises(ValueError, match="has a NUL"):
            client.add_task_status("a\0b")
        assert client.run_tasks() == []


class TestLargeResults:
    """More than ``max_packet``: of one task, and not of those beside it."""

    def test_the_others_go_on(self, server: harness.GearmanServerProcess) -> None:
        functions = {"large": lambda job: b"x" * int(job.workload)}
        sizes = (0, 900, 3_000_000, 1000, 800, 3_000_000, 700)
        with Client([server.address], max_packet=1000) as client, harness.worker_thread(functions, server):
            tasks = [client.add_task("large", b"%d" % size) for size in sizes]
            kept = [client.add_task_background("kept", b"%d" % number) for number in range(100)]
            client.run_tasks(timeout=60)
            assert [type(task.error) if task.error else len(task.data) for task in tasks] == [
                0,
                900,
                ResultTooLarge,
                ResultTooLarge,
                800,
                ResultTooLarge,
                700,
            ]
            assert not any(task.error for task in kept)
            assert client.do("large", b"9", timeout=60) == b"x" * 9

    def test_a_part_is_of_all(self, server: harness.GearmanServerProcess) -> None:
        """What came after it would look as if it was whole."""
        with Client([server.address], max_packet=1000) as client:
            task = client.add_task("large part")
            functions = {"large part": lambda job: job.send_data(b"x" * 2000)}
            with harness.worker_thread(functions, server):
                client.run_tasks(timeout=60)
        assert type(task.error) is ResultTooLarge


class TestLostTasks:
    def test_nobody_listens(self) -> None:
        with Client([f"127.0.0.1:{harness.free_port()}"]) as client:
            tasks = [client.add_task("f") for _ in range(3)]
            client.run_tasks(timeout=30)
        for task in tasks:
            with pytest.raises(ConnectionFailed):
                task.result()

    def test_the_server_goes_away(self) -> None:
        """One server: what it had is nobody's."""
        script = play(P.SUBMIT_JOB_BG, TAKEN, P.SUBMIT_JOB)
        with fake_server(script) as port, Client([f"127.0.0.1:{port}"], timeout=30) as client:
            kept = client.add_task_background("f")
            lost = client.add_task("f")
            client.run_tasks(timeout=30)
        assert (kept.handle, kept.result()) == ("H:1", b"")
        with pytest.raises(ConnectionLost):
            lost.result()

    def test_a_silent_server(self) -> None:
        with fake_server(play(None)) as port, Client([f"127.0.0.1:{port}"], timeout=0.2) as client:
            tasks = [client.add_task_background("f") for _ in range(3)]
            began = time.monotonic()
            client.run_tasks()
            assert time.monotonic() - began < 25
        for task in tasks:
            with pytest.raises(ResponseTimeout):
                task.result()
