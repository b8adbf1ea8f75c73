"""Our client and our worker at the C gearmand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from django_gearman import Client, Data, Progress, Value, Warned
from django_gearman.encoding import describe_exception
from django_gearman.exceptions import ConnectionLost, JobFailed, NoWorker
from django_gearman.worker.loop import AssignedJob, Worker
from tests import harness
from tests.acceptance.conftest import call, program
from tests.app.jobs import add, fail, shout
from tests.client.awaited import AwaitedClient

from .gearmand import Gearmand

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]


@pytest.fixture
def gearmand() -> Iterator[Gearmand]:
    with Gearmand() as server:
        yield server


@pytest.fixture
def client(gearmand: Gearmand) -> Iterator[Client]:
    with Client([gearmand.address], timeout=30) as client:
        yield client


class TestClient:
    """Nobody works here but what the test itself sends."""

    def test_echo(self, client: Client):
        for data in (b"", b"a", bytes(range(256)), bytes(1024 * 1024)):
            assert client.echo(data) == data

    def test_background_and_status(self, client: Client, gearmand: Gearmand):
        handle = client.do_background("later", b"data")
        assert handle.startswith("H:")
        status = client.job_status(handle)
        assert (status.known, status.running) == (True, False)
        assert not client.job_status("H:nobody:1").known
        assert client.do_background("later", b"other", unique="same") == client.do_high_background(
            "later", b"joins", unique="same"
        )
        assert "later\t2\t0\t0" in gearmand.ask("status")

    def test_priorities(self, client: Client, gearmand: Gearmand):
        client.do_low_background("order", b"low")
        client.do_background("order", b"normal")
        client.do_high_background("order", b"high")
        seen: list[bytes] = []

        def note(job: AssignedJob) -> bytes:
            seen.append(job.workload)
            if len(seen) == 3:
                worker.stop()
            return b""

        worker = worker_for(gearmand, order=note)
        worker.run()
        assert seen == [b"high", b"normal", b"low"]

    def test_broken_connection(self, gearmand: Gearmand):
        client = Client([gearmand.address], timeout=30)
        assert client.echo(b"before") == b"before"
        gearmand.stop()
        gearmand.start()
        # It is noticed before anything is sent.
        assert client.echo(b"after") == b"after"
        client.close()

    def test_server_killed_while_waiting(self, gearmand: Gearmand):
        client = Client([gearmand.address], timeout=30)
        errors: list[Exception] = []

        def wait() -> None:
            try:
                client.do("nobody", b"", timeout=20.0)
            except ConnectionLost as error:
                errors.append(error)
            client.close()

        thread = threading.Thread(target=wait)
        thread.start()
        harness.wait_until(lambda: "nobody\t1" in gearmand.ask("status"), what="the job")
        gearmand.stop()
        thread.join(10.0)
        assert len(errors) == 1


class TestBothClients:
    """What is newer than gearmand, by threads and by asyncio."""

    @pytest.fixture(params=["Client", "AsyncClient"])
    def either(self, request: pytest.FixtureRequest, gearmand: Gearmand) -> Iterator[Any]:
        kind = Client if request.param == "Client" else AwaitedClient
        with kind([gearmand.address], timeout=30) as made:
            yield made

    def test_tasks(self, either: Any, gearmand: Gearmand):
        def raise_error(job: AssignedJob) -> bytes:
            raise ValueError("no")

        functions = {"reverse": lambda job: job.workload[::-1], "raise": raise_error}
        with harness.worker_thread(functions, gearmand.port):
            tasks = [either.add_task("reverse", b"%d" % number) for number in range(200)]
            raised = either.add_task("raise")
            kept = either.add_task_low_background("later")
            either.run_tasks(timeout=20)
            asked = either.add_task_status(kept.handle)
            either.run_tasks(timeout=20)
        assert [task.result() for task in tasks] == [(b"%d" % number)[::-1] for number in range(200)]
        with pytest.raises(JobFailed):
            raised.result()
        assert raised.data == b"ValueError('no')"
        assert (asked.known, asked.running) == (True, False)

    def test_stream(self, either: Any, gearmand: Gearmand):
        def tell(job: AssignedJob) -> bytes:
            job.send_data(b"part")
            job.send_warning(b"careful")
            job.send_status(1, 2)
            return b"end"

        with harness.worker_thread({"tell": tell}, gearmand.port):
            parts = list(either.stream("tell", timeout=20))
        assert parts == [Data(b"part"), Warned(b"careful"), Progress(1, 2), Value(b"end")]

    def test_it_lets_nobody_listen(self, either: Any):
        handle = either.do_background("later")
        assert either.wait_for(handle, timeout=30) is False
        assert either.job_status(handle).known

    def test_nobody_comes(self, either: Any):
        either.do_background("nobody offers it")

        limits = iter((0.2, 1.0, 3.0, 9.0))

        def check() -> None:
            with pytest.raises(NoWorker, match="2 jobs wait for nobody offers it and no worker offers it"):
                either.do("nobody offers it", timeout=next(limits))

        harness.in_one_try(check, tries=4)

    def test_the_next_one_helps(self, either: Any, gearmand: Gearmand):
        with Gearmand() as other, type(either)([gearmand.address, other.address], timeout=30) as client:
            assert client.echo(b"x") == b"x"
            gearmand.stop()
            assert client.do_background("moved").startswith("H:")
            assert other.status()["moved"] == (1, 0, 0)


def worker_for(gearmand: Gearmand, **functions: Any) -> Worker:
    return Worker(
        functions, [("127.0.0.1", gearmand.port)], client_id="test-worker", describe=describe_exception
    )


class TestWorker:
    """The loop itself, in this process."""

    @pytest.fixture
    def working(self, gearmand: Gearmand) -> Iterator[None]:
        def parts(job: AssignedJob) -> bytes:
            for step in range(1, 4):
                job.send_status(step, 3)
                job.send_data(b"part %d" % step)
            job.send_warning(b"almost")
            return job.unique + b":" + job.workload[::-1]

        def broken(job: AssignedJob) -> bytes:
            raise ValueError("no luck")

        ours, its = socket.socketpair()
        worker = worker_for(gearmand, parts=parts, broken=broken)
        thread = threading.Thread(target=worker.run, args=(its.fileno(),))
        thread.start()
        yield
        ours.close()
        thread.join(10.0)
        its.close()
        assert not thread.is_alive()

    @pytest.mark.usefixtures("working")
    def test_everything_a_worker_sends(self, client: Client):
        seen: list[Any] = []
        result = client.do(
            "parts",
            b"a\0b",
            unique="mine",
            timeout=30,
            on_data=seen.append,
            on_warning=seen.append,
            on_status=lambda *step: seen.append(step),
        )
        assert result == b"mine:b\0a"
        assert seen == [
            (b"1", b"3"),
            b"part 1",
            (b"2", b"3"),
            b"part 2",
            (b"3", b"3"),
            b"part 3",
            b"almost",
        ]
        assert client.do_high("parts", b"abc", timeout=30).endswith(b":cba")
        assert client.do_low("parts", b"abc", timeout=30).endswith(b":cba")

    @pytest.mark.usefixtures("working")
    def test_exception(self, client: Client):
        with pytest.raises(JobFailed) as caught:
            client.do("broken", timeout=30)
        assert b"no luck" in caught.value.data

    @pytest.mark.usefixtures("working")
    def test_foreign_client(self, gearmand: Gearmand):
        command = [program("gearman"), "-h", "127.0.0.1", "-p", str(gearmand.port), "-f", "parts", "xyz"]
        assert b":zyx" in call(command).stdout

    @pytest.mark.usefixtures("working")
    def test_listed_by_its_name(self, gearmand: Gearmand):
        harness.wait_until(lambda: "test-worker : " in gearmand.ask("workers"))


@pytest.mark.django_db
class TestCommand:
    """``manage.py gearman_worker``, and ``.run()`` of our jobs."""

    @pytest.fixture(autouse=True)
    def _lead_there(self, gearmand: Gearmand, settings: Any) -> None:
        settings.GEARMAN = {"default": {"SERVERS": [gearmand.address]}}

    def test_jobs(self, gearmand: Gearmand):
        with harness.worker(gearmand.address, processes=2):
            assert add.run(2, 3) == 5
            assert shout.run(b"hello") == b"HELLO"
            with pytest.raises(JobFailed) as caught:
                fail.run("no luck")
            assert (caught.value.exception, caught.value.message) == ("builtins.ValueError", "no luck")

    def test_reconnects(self, gearmand: Gearmand):
        with harness.worker(gearmand.address, processes=2) as worker:
            harness.wait_until(
                lambda: gearmand.status().get(shout.name, (0, 0, 0))[2] == 2, what="two workers"
            )
            gearmand.stop()
            harness.wait_until(lambda: worker.stderr.count("connecting again") == 2, what="two notices")
            gearmand.start()
            harness.wait_until(
                lambda: gearmand.status().get(shout.name, (0, 0, 0))[2] == 2, what="two workers again"
            )
            assert shout.run(b"again") == b"AGAIN"
