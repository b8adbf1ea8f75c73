"""Programs of other projects as clients and workers of our job server, beside our own worker."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

import django_gearman
from django_gearman import Client
from django_gearman.exceptions import JobFailed
from django_gearman.models import JobRecord
from tests import harness

from .conftest import SITE, Trace, call, missing, program
from .site.jobs import leave_trace

pytestmark = [pytest.mark.acceptance, pytest.mark.foreign]

Status = JobRecord.Status
Start = Callable[[list[str]], "subprocess.Popen[bytes]"]
Server = harness.GearmanServerProcess


def gearman(server: Server, *options: str) -> list[str]:
    return [program("gearman"), "-h", "127.0.0.1", "-p", str(server.port), *options]


def gearadmin(server: Server, *options: str) -> str:
    command = [program("gearadmin"), "-h", "127.0.0.1", "-p", str(server.port), *options]
    return call(command).stdout.decode()


def wait_for_worker(server: Server, function: str, count: int = 1) -> None:
    harness.wait_until(
        lambda: server.status().get(function, (0, 0, 0))[2] == count, what=f"{count} workers for {function}"
    )


def wait_for_end(**filters: object) -> JobRecord:
    """The one job of the test, once it ended."""
    records = JobRecord.objects.filter(**filters)
    harness.wait_until(lambda: records.exclude(status__in=JobRecord.LIVE).exists(), what="the job's end")
    return records.get()


class TestGearmanAsClient:
    """``gearman`` without -w, our server, our worker."""

    def test_foreground(self, site_server: Server):
        with harness.worker(site_server, processes=1, env=SITE):
            done = call(gearman(site_server, "-f", "shout"), b"hello")
            assert done.stdout == b"HELLO"
            assert call(gearman(site_server, "-f", "shout", "as an argument")).stdout == b"AS AN ARGUMENT"
            assert call(gearman(site_server, "-s", "-f", "shout")).stdout == b""
            assert call(gearman(site_server, "-I", "-f", "shout"), b"high").stdout == b"HIGH"
            assert call(gearman(site_server, "-L", "-f", "shout"), b"low").stdout == b"LOW"

            # Every byte there is, and more than any buffer on the way. (The program
            # itself takes half a minute to read 8 MB: see TestPerl for those.)
            every_byte = bytes(range(256))
            assert call(gearman(site_server, "-f", "shout"), every_byte).stdout == every_byte.upper()
            large = random.Random(1).randbytes(1024 * 1024)
            assert call(gearman(site_server, "-f", "shout"), large).stdout == large.upper()

            records = JobRecord.objects.filter(function="shout", background=False)
            harness.wait_until(lambda: records.filter(status=Status.SUCCESSFUL).count() == 7)
            assert list(records.order_by("id").values_list("priority", flat=True)) == [0, 0, 0, 50, -50, 0, 0]

    def test_one_job_per_line(self, site_server: Server):
        with harness.worker(site_server, processes=1, env=SITE):
            lines = b"".join(b"line %d\n" % number for number in range(20))
            assert call(gearman(site_server, "-n", "-f", "shout"), lines).stdout == lines.upper()

            record = JobRecord.objects.filter(function="shout")
            harness.wait_until(lambda: record.filter(status=Status.SUCCESSFUL).count() == 20)

    def test_background(self, site_server: Server):
        call(gearman(site_server, "-b", "-f", "shout"), b"later")
        record = JobRecord.objects.get()
        assert (record.status, record.background, bytes(record.workload)) == (Status.READY, True, b"later")

        with harness.worker(site_server, processes=1, env=SITE):
            record = wait_for_end()
        assert record.status == Status.SUCCESSFUL
        assert bytes(record.result or b"") == b"LATER"
        assert record.attempts == 1

    def test_priorities(self, site_server: Server, trace: Trace):
        for name, option in (("low", "-L"), ("normal", ""), ("high", "-I"), ("normal again", "")):
            workload = trace.workload(name.replace(" ", "-"))
            options = [option] if option else []
            call(gearman(site_server, "-b", *options, "-f", leave_trace.name), workload)

        with harness.worker(site_server, processes=1, env=SITE):
            harness.wait_until(lambda: len(trace.names()) == 4, what="four runs")
        assert trace.names() == ["high", "normal", "normal-again", "low"]

    def test_equal_uniques_are_one_job(self, site_server: Server):
        for text in (b"first", b"second"):
            call(gearman(site_server, "-b", "-u", "same", "-f", "shout"), text)
        assert bytes(JobRecord.objects.get(unique="same").workload) == b"first"

    def test_failure(self, site_server: Server):
        workload = json.dumps({"args": ["no luck"], "kwargs": {}}).encode()
        with harness.worker(site_server, processes=1, env=SITE):
            call(gearman(site_server, "-f", "tests.app.jobs.fail"), workload, code=None)
            record = wait_for_end()
        assert (record.status, record.exception, record.message) == (
            Status.FAILED,
            "builtins.ValueError",
            "no luck",
        )


class TestGearmanAsWorker:
    """``gearman -w``, our server, our client."""

    def test_jobs_of_our_client(self, site_server: Server, background_program: Start):
        background_program(gearman(site_server, "-w", "-f", "upper", "tr", "a-z", "A-Z"))
        wait_for_worker(site_server, "upper")

        with Client([site_server.address]) as client:
            assert client.do("upper", b"hello", timeout=10) == b"HELLO"
            handle = client.do_background("upper", b"later")
        record = wait_for_end(handle=handle)
        assert (record.status, bytes(record.result or b"")) == (Status.SUCCESSFUL, b"LATER")

    def test_jobs_of_its_own_kind(self, site_server: Server, background_program: Start):
        background_program(gearman(site_server, "-w", "-f", "upper", "tr", "a-z", "A-Z"))
        wait_for_worker(site_server, "upper")
        assert call(gearman(site_server, "-f", "upper"), b"hello").stdout == b"HELLO"

    def test_failing_program(self, site_server: Server, background_program: Start):
        background_program(gearman(site_server, "-w", "-f", "fail", "false"))
        wait_for_worker(site_server, "fail")
        with Client([site_server.address]) as client, pytest.raises(JobFailed):
            client.do("fail", b"", timeout=10)

    def test_killed_worker_leaves_its_job_to_the_next(
        self, site_server: Server, background_program: Start, tmp_path: Path
    ):
        # The first says that it has the job, and reads what nobody writes until the test ends.
        busy, never = tmp_path / "busy", tmp_path / "never"
        os.mkfifo(never)
        script = tmp_path / "script"
        script.write_text(f"touch {busy}; exec cat {never}")
        first = background_program(gearman(site_server, "-w", "-f", "upper", "sh", str(script)))
        with Client([site_server.address]) as client:
            handle = client.do_background("upper", b"late")
            harness.wait_until(busy.exists, what="the first worker's start")
            assert client.job_status(handle).running
            background_program(gearman(site_server, "-w", "-f", "upper", "tr", "a-z", "A-Z"))
            wait_for_worker(site_server, "upper", 2)
            first.kill()
        record = wait_for_end(handle=handle)
        assert (record.status, record.attempts) == (Status.SUCCESSFUL, 2)
        assert bytes(record.result or b"") == b"LATE"
        # What the killed program had started ends here.
        os.close(os.open(never, os.O_WRONLY))


class TestGearadmin:
    def test_status_and_workers(self, site_server: Server, tmp_path: Path):
        hold = tmp_path / "hold"
        function = "tests.app.jobs.wait_for_file"
        workload = json.dumps({"args": [str(hold)], "kwargs": {}}).encode()
        with Client([site_server.address]) as client:
            for _ in range(3):
                client.do_background(function, workload)
            client.do_background("nobody", b"")

        with harness.worker(site_server, processes=1, functions=[function, "shout"], env=SITE) as worker:
            harness.wait_until(lambda: Path(f"{hold}.pid").exists(), what="the first job's start")

            lines = gearadmin(site_server, "--status").splitlines()
            assert lines.pop() == "."
            rows = {name: tuple(map(int, rest)) for name, *rest in (line.split("\t") for line in lines)}
            assert rows == {function: (3, 1, 1), "nobody": (1, 0, 0), "shout": (0, 0, 1)}

            lines = gearadmin(site_server, "--workers").splitlines()
            assert lines.pop() == "."
            (line,) = (line for line in lines if function in line)
            connection, functions = line.split(" :")
            number, address, name = connection.split()
            assert int(number) > 2
            assert address == "127.0.0.1"
            assert name.endswith(f":{worker.children()[0]}")
            assert set(functions.split()) == {function, "shout"}

            hold.touch()
            harness.wait_until(lambda: site_server.status()[function] == (0, 0, 1), what="the jobs' ends")

    def test_version(self, memory_server: Server):
        assert gearadmin(memory_server, "--server-version").strip() == django_gearman.__version__

    def test_process(self, memory_server: Server):
        assert gearadmin(memory_server, "--getpid").split() == [str(memory_server.pid)]
        assert gearadmin(memory_server, "--server-verbose").split() == ["INFO"]

    def test_jobs(self, memory_server: Server):
        with Client([memory_server.address]) as client:
            high = client.do_high_background("held", b"", unique="a unique")
            low = client.do_low_background("held", b"")
            assert "held\t1\t0\t1\t0" in gearadmin(memory_server, "--priority-status").splitlines()
            rows = gearadmin(memory_server, "--show-jobs").splitlines()
            assert rows == [f"{high}\t0\t0\t1", f"{low}\t0\t0\t1", "."]
            assert gearadmin(memory_server, "--show-unique-jobs").splitlines() == ["a unique", "", "."]

            for handle in (high, low):
                assert "OK" in gearadmin(memory_server, "--cancel-job", handle)
                assert not client.job_status(handle).known
        assert gearadmin(memory_server, "--show-jobs") == ".\n"

    def test_functions(self, memory_server: Server):
        assert "OK" in gearadmin(memory_server, "--create-function", "made")
        assert memory_server.status()["made"] == (0, 0, 0)
        assert "OK" in gearadmin(memory_server, "--drop-function", "made")
        assert "made" not in memory_server.status()

    def test_what_the_server_refuses(self, memory_server: Server):
        for options in (["--cancel-job", "H:nobody:1"], ["--drop-function", "nobody"]):
            command = [program("gearadmin"), "-h", "127.0.0.1", "-p", str(memory_server.port), *options]
            done = subprocess.run(command, capture_output=True, timeout=30, check=False)
            assert b"OK" not in done.stdout


class TestPhp:
    """libgearman, by way of the extension of PHP."""

    def php(self, server: Server, script: str) -> list[str]:
        path = program("php")
        if "gearman" not in call([path, "-m"]).stdout.decode().split():
            missing("the gearman extension of PHP is not installed")
        return [path, "-d", "display_errors=stderr", "-r", dedent(script).replace("PORT", str(server.port))]

    def test_client(self, site_server: Server):
        script = """
            $client = new GearmanClient();
            $client->addServer("127.0.0.1", PORT);
            $client->setTimeout(10000);
            echo json_encode([
                "normal" => $client->doNormal("shout", "normal"),
                "code" => $client->returnCode(),
                "high" => $client->doHigh("shout", "high"),
                "ping" => $client->ping("are you there?"),
                "handle" => $client->doBackground("shout", "later"),
                "reverse" => $client->doNormal("reverse", "abc"),
            ]);
        """
        with harness.worker(site_server, processes=1, env=SITE):
            answer = json.loads(call(self.php(site_server, script)).stdout)
            record = wait_for_end(handle=answer.pop("handle"))
        assert answer == {"normal": "NORMAL", "code": 0, "high": "HIGH", "ping": True, "reverse": "cba"}
        assert (record.status, bytes(record.result or b"")) == (Status.SUCCESSFUL, b"LATER")

    def test_tasks_side_by_side(self, site_server: Server):
        script = """
            $client = new GearmanClient();
            $client->addServer("127.0.0.1", PORT);
            $results = [];
            $client->setCompleteCallback(function ($task) use (&$results) {
                $results[$task->unique()] = $task->data();
            });
            for ($i = 0; $i < 50; $i++) {
                $client->addTask("shout", "text $i", null, "key $i");
            }
            $client->runTasks();
            echo json_encode($results);
        """
        with harness.worker(site_server, processes=2, env=SITE):
            answer = json.loads(call(self.php(site_server, script)).stdout)
        assert answer == {f"key {number}": f"TEXT {number}" for number in range(50)}

    def test_worker(self, memory_server: Server, background_program: Start):
        script = """
            $worker = new GearmanWorker();
            $worker->addServer("127.0.0.1", PORT);
            $worker->addFunction("count", function ($job) {
                for ($i = 1; $i <= 3; $i++) {
                    $job->sendStatus($i, 3);
                    $job->sendData("part $i");
                }
                return $job->unique() . ":" . strrev($job->workload());
            });
            while ($worker->work());
        """
        background_program(self.php(memory_server, script))
        wait_for_worker(memory_server, "count")
        parts: list[bytes] = []
        steps: list[tuple[bytes, bytes]] = []
        with Client([memory_server.address]) as client:
            result = client.do(
                "count",
                b"a\0b",
                unique="mine",
                timeout=10,
                on_data=parts.append,
                on_status=lambda *step: steps.append(step),
            )
        assert result == b"mine:b\0a"
        assert parts == [b"part 1", b"part 2", b"part 3"]
        assert steps == [(b"1", b"3"), (b"2", b"3"), (b"3", b"3")]


class TestPerl:
    """The other family: pure Perl, one of the first."""

    def perl(self, server: Server, script: str) -> list[str]:
        path = program("perl")
        found = subprocess.run([path, "-MGearman::Client", "-e1"], capture_output=True, check=False)
        if found.returncode:
            missing("Perl's Gearman::Client is not installed")
        return [path, "-e", dedent(script).replace("PORT", str(server.port))]

    def test_client(self, site_server: Server):
        script = """
            use strict; use warnings FATAL => "all";
            use Gearman::Client;
            my $client = Gearman::Client->new(job_servers => ["127.0.0.1:PORT"]);
            my $handle = $client->dispatch_background("shout", "later", {});
            my $result = $client->do_task("reverse", "abc", {timeout => 10});
            print "$$result $handle";
        """
        with harness.worker(site_server, processes=1, env=SITE):
            result, handle = call(self.perl(site_server, script)).stdout.decode().split()
            # Its handles begin with the server: "127.0.0.1:4730//H:...".
            record = wait_for_end(handle=handle.partition("//")[2])
        assert result == "cba"
        assert (record.status, bytes(record.result or b"")) == (Status.SUCCESSFUL, b"LATER")

    def test_large_binary_workload(self, site_server: Server, tmp_path: Path):
        large = random.Random(1).randbytes(8 * 1024 * 1024)
        (tmp_path / "large").write_bytes(large)
        script = f"""
            use strict; use warnings FATAL => "all";
            use Gearman::Client;
            use Digest::SHA "sha256_hex";
            open(my $file, "<:raw", "{tmp_path / "large"}"); local $/; my $data = <$file>;
            my $client = Gearman::Client->new(job_servers => ["127.0.0.1:PORT"]);
            my $handle = $client->dispatch_background("shout", $data, {{}});
            my $result = $client->do_task("shout", $data, {{timeout => 30}});
            print sha256_hex($$result), " $handle";
        """
        with harness.worker(site_server, processes=1, env=SITE):
            checksum, handle = call(self.perl(site_server, script)).stdout.decode().split()
            record = wait_for_end(handle=handle.partition("//")[2])
        assert checksum == hashlib.sha256(large.upper()).hexdigest()
        assert record.status == Status.SUCCESSFUL
        assert bytes(record.workload) == large
        assert bytes(record.result or b"") == large.upper()

    def test_worker_goes_on_after_an_exception(self, site_server: Server, background_program: Start):
        script = """
            use strict; use warnings;
            use Gearman::Worker;
            my $worker = Gearman::Worker->new(job_servers => ["127.0.0.1:PORT"]);
            $worker->register_function(flip => sub {
                my $text = $_[0]->arg;
                die "no flip today\\n" if $text eq "fail";
                return scalar reverse $text;
            });
            $worker->work while 1;
        """
        background_program(self.perl(site_server, script))
        wait_for_worker(site_server, "flip")
        with Client([site_server.address]) as client:
            assert client.do("flip", b"abc", timeout=10) == b"cba"
            with pytest.raises(JobFailed):
                client.do("flip", b"fail", timeout=10)
            assert client.do("flip", b"def", timeout=10) == b"fed"
            handle = client.do_background("flip", b"later")
        assert wait_for_end(handle=handle).status == Status.SUCCESSFUL
