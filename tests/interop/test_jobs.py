"""What becomes of jobs: order, uniques, status, time, reducers, task sets and lost workers."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from django_gearman import Client
from django_gearman.worker.loop import AssignedJob
from tests import harness
from tests.acceptance.conftest import call

from .languages import (
    CLIENTS,
    LIMIT,
    SCRIPTS,
    WORKERS,
    Event,
    ForeignWorker,
    OurClient,
    ScriptClient,
    Server,
    client_of,
    read_events,
    require_perl,
    start_worker,
    wait_for_pids,
    whole,
)

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]


@contextmanager
def taking(server: Server, function: str, run: Callable[[AssignedJob], bytes]) -> Iterator[None]:
    """Our worker, in this process, with one function."""
    with harness.worker_thread({function: run}, server.port):
        yield


def total(server: Server, function: str) -> int:
    return server.status().get(function, (0, 0, 0))[0]


class TestOrder:
    @pytest.mark.parametrize("language", CLIENTS)
    def test_high_before_normal_before_low(self, either_server: Server, language: str):
        client, function = client_of(language), f"order by {language}".replace(" ", "-")
        for name, priority in (("1", "low"), ("2", "normal"), ("3", "high"), ("4", "normal"), ("5", "high")):
            client.background(either_server, function, name.encode(), priority=priority)
        seen: list[bytes] = []

        def note(job: AssignedJob) -> bytes:
            seen.append(job.workload)
            return b""

        with taking(either_server, function, note):
            harness.wait_until(lambda: len(seen) == 5, what="five jobs")
        assert seen == [b"3", b"5", b"2", b"4", b"1"]

    def test_of_foreground_jobs(self, either_server: Server):
        """Waiting clients of every language, served in the order of their priorities."""
        function = "order-of-all"
        chosen = {"php": "low", "perl": "high", "c": "normal"}
        seen: list[bytes] = []

        def note(job: AssignedJob) -> bytes:
            seen.append(job.workload)
            return job.workload[::-1]

        with ThreadPoolExecutor(3) as pool:
            waiting = {
                language: pool.submit(
                    client_of(language).run,
                    either_server,
                    function,
                    language.encode(),
                    priority=priority,
                )
                for language, priority in chosen.items()
            }
            harness.wait_until(lambda: total(either_server, function) == 3, what="three jobs")
            with taking(either_server, function, note):
                for language, future in waiting.items():
                    assert future.result(LIMIT) == [Event("complete", language.encode()[::-1])]
        assert seen == [b"perl", b"c", b"php"]


class TestUniques:
    @pytest.mark.parametrize("language", ["php", "perl", "c", "ours"])
    def test_equal_ones_have_one_handle(self, either_server: Server, language: str):
        client, function = client_of(language), f"unique-{language}"
        first = client.background(either_server, function, b"first", unique="same")
        assert first.startswith("H:")
        assert client.background(either_server, function, b"second", priority="high", unique="same") == first
        assert client.background(either_server, function, b"third", unique="other") != first
        # Whoever gives none shares with nobody.
        assert len({client.background(either_server, function, b"first") for _ in range(2)}) == 2
        assert total(either_server, function) == 4

    def test_clients_of_all_languages_share_one_run(self, either_server: Server):
        function = "shared"
        ran: list[bytes] = []

        def run(job: AssignedJob) -> bytes:
            ran.append(job.unique)
            job.send_data(b"part ")
            return b"whole"

        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            waiting = [
                pool.submit(
                    client_of(language).run, either_server, function, language.encode(), unique="one run"
                )
                for language in CLIENTS
            ]
            asked = OurClient()
            harness.wait_until(
                lambda: asked.unique_status(either_server, "one run")[4:] == (len(CLIENTS),),
                what="five clients at one job",
            )
            assert ScriptClient("c").unique_status(either_server, "one run") == (1, 0, 0, 0, len(CLIENTS))
            with taking(either_server, function, run):
                results = {whole(future.result(LIMIT)) for future in waiting}
        assert results == {b"part whole"}
        assert ran == [b"one run"]

    @pytest.mark.parametrize("language", ["perl", "tool"])
    def test_dash_stands_for_the_workload(self, either_server: Server, language: str):
        client, function = client_of(language), f"dash-{language}"
        for workload in (b"a", b"a", b"b", b"a"):
            client.background(either_server, function, workload, unique="-")
        assert total(either_server, function) == 2


class TestStatus:
    def test_everybody_is_told_the_same(self, either_server: Server):
        at_work, done = threading.Event(), threading.Event()

        def run(job: AssignedJob) -> bytes:
            job.send_status(1, 3)
            at_work.set()
            assert done.wait(LIMIT)
            return b""

        clients = [ScriptClient("php"), ScriptClient("perl"), ScriptClient("c"), OurClient()]
        handles = [client.background(either_server, "told", unique=client.language) for client in clients]
        for client in clients:
            for handle in handles:
                assert client.status(either_server, handle) == (1, 0, 0, 0)
        with taking(either_server, "told", run):
            assert at_work.wait(LIMIT)
            for client in clients:
                assert client.status(either_server, handles[0]) == (1, 1, 1, 3)
                if client.language != "perl":
                    assert client.unique_status(either_server, "php")[:4] == (1, 1, 1, 3)
            done.set()
            harness.wait_until(lambda: total(either_server, "told") == 0, what="the jobs' ends")
        for client in clients:
            assert client.status(either_server, handles[0]) == (0, 0, 0, 0)
            if client.language != "perl":
                assert client.unique_status(either_server, "php")[:4] == (0, 0, 0, 0)

    def test_echo(self, either_server: Server):
        for language in ("php", "c"):
            for data in (b"a", bytes(range(256)), b"\0" * 70_000):
                ScriptClient(language).ask(either_server, "echo", workload=data)


class TestNames:
    def test_long_uniques_and_handles_do_no_harm(self, stack: ExitStack):
        """libgearman keeps 64 bytes of each."""
        server = stack.enter_context(harness.server(store="memory", name="n" * 40))
        for language in WORKERS:
            start_worker(stack, language, server)
            for client in (client_of(language), OurClient()):
                unique = "u" * 255 if client.language in ("perl", "ours") else "u" * 63
                events = client.run(server, f"{language}.reverse", b"abc", unique=unique)
                assert events == [Event("complete", b"cba")]
        clients = [*map(ScriptClient, SCRIPTS), OurClient()]
        handle = clients[0].background(server, "nobody")
        assert len(handle) > 50
        assert [client.status(server, handle) for client in clients] == [(1, 0, 0, 0)] * 4

    def test_prefix_of_perl_is_refused(self, our_server: Server):
        """It puts a tab into the name, which would forge the columns of ``status``."""
        script = f"""
            use Gearman::Client;
            my $client = Gearman::Client->new(
                job_servers => ["127.0.0.1:{our_server.port}"], prefix => "mine");
            $client->dispatch_background("reverse", "abc");
        """
        done = call([require_perl(), "-e", script], code=None)
        assert b"INVALID_FUNCTION_NAME" in done.stderr
        assert not any("mine" in name for name in our_server.status())


class TestTime:
    def test_job_for_later_wakes_the_worker(self, our_server: Server):
        """libgearman alone knows SUBMIT_JOB_EPOCH; gearmand leaves the worker asleep."""
        ran: list[float] = []

        def run(job: AssignedJob) -> bytes:
            ran.append(time.time())
            return b""

        with taking(our_server, "later", run):
            harness.wait_until(lambda: our_server.status().get("later") == (0, 0, 1), what="the worker")
            due = int(time.time()) + 2
            ScriptClient("c").ask(our_server, "epoch", str(due), "later", "u", workload=b"x")
            far = ScriptClient("c").ask(our_server, "epoch", str(due + 3600), "later", "far", workload=b"x")
            assert ScriptClient("php").status(our_server, far) == (1, 0, 0, 0)
            # By itself it looks again after half a minute.
            harness.wait_until(lambda: ran, what="the job")
        assert due <= ran[0]

    def test_job_for_a_time_that_is_past(self, either_server: Server):
        ScriptClient("c").ask(either_server, "epoch", str(int(time.time()) - 60), "past", "u", workload=b"c")
        with Client([either_server.address]) as client:
            client.do_epoch("past", b"ours", epoch=time.time() - 60)
        seen: list[bytes] = []

        def note(job: AssignedJob) -> bytes:
            seen.append(job.workload)
            return b""

        with taking(either_server, "past", note):
            harness.wait_until(lambda: len(seen) == 2, what="two jobs")
        assert seen == [b"c", b"ours"]

    @pytest.mark.parametrize("language", ["php", "c"])
    def test_limit_in_milliseconds(self, our_server: Server, language: str, stack: ExitStack, tmp_path: Path):
        self.check_limit(our_server, language, 1000, stack, tmp_path)

    def test_limit_in_seconds(self, stack: ExitStack, tmp_path: Path):
        server = stack.enter_context(harness.server(store="memory", options=["--timeout-in-seconds"]))
        self.check_limit(server, "perl", 1, stack, tmp_path)

    def check_limit(self, server: Server, language: str, limit: int, stack: ExitStack, folder: Path) -> None:
        """A worker that takes too long loses its job to another, and its late result counts no more."""
        prefix, path = f"limited.{language}.", folder / "made"
        slow = stack.enter_context(ForeignWorker(language, server, prefix, limit=limit))
        stack.callback(path.touch)
        with ThreadPoolExecutor(1) as pool:
            started = time.monotonic()
            waiting = pool.submit(client_of(language).run, server, f"{prefix}hold", str(path).encode())
            wait_for_pids(path, 1)
            taken: list[float] = []

            def take_over(job: AssignedJob) -> bytes:
                taken.append(time.monotonic() - started)
                return b"in time"

            with taking(server, f"{prefix}hold", take_over):
                assert waiting.result(LIMIT)[-1] == Event("complete", b"in time")
            assert taken[0] > 0.9
        path.touch()
        if language == "perl":
            # It ends on the ERROR that answers its late result.
            harness.wait_until(lambda: not slow.is_alive, what="the end of Perl's worker")
            assert "JOB_NOT_FOUND" in slow.stderr
        else:
            assert client_of("ours").run(server, f"{prefix}reverse", b"abc") == [Event("complete", b"cba")]
            assert slow.is_alive


class TestReduceJobs:
    """Only libgearman has them; the mapper takes a line apart, the reducers may be anybody."""

    @pytest.mark.parametrize("language", WORKERS)
    def test_reducer_of_each_language(self, either_server: Server, language: str, stack: ExitStack):
        prefix = f"reduce.{language}."
        stack.enter_context(ForeignWorker("c", either_server, "mapper."))
        start_worker(stack, language, either_server, prefix)
        reducer = f"{prefix}reverse"
        ((_, outcome, value),) = read_events(
            ScriptClient("c").ask(either_server, "reduce", "mapper.map", reducer, workload=b"ab cd e")
        )
        assert (outcome, sorted(value.split())) == ("complete", [b"ba", b"dc", b"e"])
        with Client([either_server.address]) as client:
            result = client.do_reduce("mapper.map", b"xy z", reducer=reducer, timeout=LIMIT)
        assert sorted(result.split()) == [b"yx", b"z"]


class TestTaskSets:
    @pytest.mark.parametrize("language", [*SCRIPTS, "ours"])
    def test_tasks_run_at_the_same_time(
        self, either_server: Server, language: str, stack: ExitStack, tmp_path: Path
    ):
        """Each of the three jobs ends only when all three are running."""
        workers = {"php": "set.php.meet", "perl": "set.perl.meet", "c": "set.c.meet"}
        for each, function in workers.items():
            start_worker(stack, each, either_server, function.removesuffix("meet"))
        tasks = {function: str(tmp_path) for function in workers.values()}
        if language == "ours":
            with Client([either_server.address]) as client, ThreadPoolExecutor(3) as pool:
                results = pool.map(
                    lambda function: client.do(function, str(tmp_path).encode(), timeout=LIMIT), tasks
                )
                assert list(results) == [b"met"] * 3
        else:
            told = ScriptClient(language).tasks(either_server, tasks)
            assert sorted(told) == sorted((function, "complete", b"met") for function in tasks)

    @pytest.mark.parametrize("language", SCRIPTS)
    def test_many_tasks_of_two_workers(self, either_server: Server, language: str, stack: ExitStack):
        for each in ("perl", "c"):
            start_worker(stack, each, either_server, "many.")
        functions = ["many.reverse", "many.report", "many.fail"] * 20
        client = ScriptClient(language)
        tasks = [f"{function}=abc{number}" for number, function in enumerate(functions)]
        told = read_events(client.ask(either_server, "tasks", *tasks))
        results = sorted(
            value for function, name, value in told if (function, name) == ("many.reverse", "complete")
        )
        assert results == sorted(f"abc{number}"[::-1].encode() for number in range(0, 60, 3))
        assert told.count(("many.report", "complete", b"done")) == 20
        assert told.count(("many.report", "warning", b"almost")) == 20
        assert told.count(("many.fail", "fail", b"")) == 20


class TestLostWorkers:
    """A worker is killed in the middle of a job, which a worker of another language then runs."""

    @pytest.mark.parametrize(
        ("language", "other"),
        [("php", "perl"), ("perl", "c"), ("c", "tool"), ("tool", "ours"), ("ours", "php")],
    )
    def test_job_is_run_again(
        self, either_server: Server, language: str, other: str, stack: ExitStack, tmp_path: Path
    ):
        prefix, path = f"lost.{language}.", tmp_path / "made"
        stack.callback(path.touch)
        first = start_worker(stack, language, either_server, prefix)
        client = client_of(language)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.run, either_server, f"{prefix}hold", str(path).encode())
            (pid,) = wait_for_pids(path, 1)
            start_worker(stack, other, either_server, prefix)
            harness.wait_until(
                lambda: either_server.status()[f"{prefix}hold"] == (1, 1, 2), what="the second worker"
            )
            first.kill()
            again = wait_for_pids(path, 2)
            path.touch()
            result = whole(waiting.result(LIMIT))
        assert again[0] == pid
        assert again[1:] == [
            int(result.split(b"%")[0].removesuffix(b"33")) if language == "tool" else int(result)
        ]
        assert int(again[1]) != pid

    @pytest.mark.parametrize("language", [*SCRIPTS, "tool"])
    def test_job_of_a_client_that_left_is_not_run(self, our_server: Server, language: str):
        """gearmand keeps it in its listings until a worker would have had it."""
        function = f"left-{language}"
        client = client_of(language)
        if language == "tool":
            command = client.command(our_server, "-f", function, "a")
        else:
            command = client.command(our_server, "task", "normal", function, "")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stdin is not None
            process.stdin.write(b"a")
            process.stdin.close()
            harness.wait_until(lambda: total(our_server, function) == 1, what="the job")
            process.kill()
        harness.wait_until(lambda: total(our_server, function) == 0, what="its end")
