"""Pools: processes, threads, tasks, one process alone; and which of them serves what."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from django_gearman.exceptions import JobFailed
from django_gearman.management.commands.gearman_worker import _cores
from django_gearman.models import JobRecord
from tests import harness, needs
from tests.app import jobs

from .conftest import SITE
from .site import pools
from .site.jobs import ask_database, leave_trace

Server = harness.GearmanServerProcess
Status = JobRecord.Status

pytestmark = [pytest.mark.acceptance, pytest.mark.django_db(transaction=True)]


def begun(folder: Path) -> dict[str, str]:
    """{name: who runs it} of the jobs that have begun."""
    return {path.stem: path.read_text().strip() for path in folder.glob("*.begun")}


def wait_begun(folder: Path, count: int) -> dict[str, str]:
    harness.wait_until(lambda: len(begun(folder)) >= count, 60.0, f"{count} jobs at a time")
    return begun(folder)


class TestThreads:
    def test_so_many_jobs_at_a_time_and_no_more_are_taken(self, site_server: Server, tmp_path: Path):
        options = ["--threads", "3"]
        with harness.worker(site_server, processes=2, options=options, env=SITE) as worker:
            results = [pools.hold.enqueue(str(tmp_path), f"job{number}") for number in range(8)]
            ran = wait_begun(tmp_path, 6)
            assert len({text.split()[0] for text in ran.values()}) == 2
            assert len(set(ran.values())) == 6
            # No prefetch: the other two wait at the server, where others could take them.
            harness.wait_until(lambda: site_server.status()[pools.hold.name] == (8, 6, 2))
            (tmp_path / f"{min(ran)}.go").touch()
            wait_begun(tmp_path, 7)
            harness.wait_until(lambda: site_server.status()[pools.hold.name] == (7, 6, 2))
            worker.signal(signal.SIGTERM)
            harness.wait_until(lambda: "Stopping" in worker.stderr)
            (tmp_path / "go").touch()
            assert worker.wait() == 0
        # An outcome is on disk a moment after the worker has sent it.
        harness.wait_until(
            lambda: sum(bool(result.refresh() or result.is_finished) for result in results) == 7
        )
        assert {result.attempts for result in results} == {0, 1}

    def test_soft_limit(self, site_server: Server):
        options = ["--threads", "2"]
        with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
            worker.wait_connected()
            children = worker.children()
            result = jobs.pass_over_everything.enqueue()
            with pytest.raises(JobFailed, match="the job took longer than 1 s"):
                result.get(timeout=20)
            assert jobs.add.enqueue(1).get(timeout=30) == 2
            assert worker.children() == children

    def test_hard_limit_is_no_fault_of_the_other_threads(self, site_server: Server, tmp_path: Path):
        options = ["--threads", "2"]
        with harness.worker(site_server, processes=1, options=options, env=SITE):
            held = pools.hold.enqueue(str(tmp_path), "held")
            first = wait_begun(tmp_path, 1)["held"]
            hangs = jobs.hang_in_c.enqueue()
            with pytest.raises(JobFailed, match="Time limit of 1 s: killed"):
                hangs.get(timeout=20)
            harness.wait_until(lambda: len(begun(tmp_path)["held"].splitlines()) == 2)
            (tmp_path / "go").touch()
            assert held.get(timeout=30)[0] != int(first.split()[0])
            assert (held.attempts, held.errors) == (1, [])

    def test_database_connections(self, site_server: Server):
        with harness.worker(site_server, processes=1, options=["--threads", "4"], env=SITE):
            results = [ask_database.enqueue() for _ in range(40)]
            for result in results:
                result.get(timeout=20)


class TestTasks:
    def test_so_many_at_a_time_on_one_loop(self, site_server: Server, tmp_path: Path):
        options = ["--concurrency", "5"]
        with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
            results = [pools.hold_task.enqueue(str(tmp_path), f"job{number}") for number in range(7)]
            ran = wait_begun(tmp_path, 5)
            assert len(set(ran.values())) == 1
            assert site_server.status()[pools.hold_task.name] == (7, 5, 1)
            # Functions that are none have a place of their own.
            assert jobs.add.enqueue(1).get(timeout=30) == 2
            (tmp_path / "go").touch()
            for result in results:
                assert result.get(timeout=30)[0] in worker.children()

    def test_limits(self, site_server: Server, tmp_path: Path):
        options = ["--concurrency", "5"]
        with harness.worker(site_server, processes=1, options=options, env=SITE):
            held = pools.hold_task.enqueue(str(tmp_path), "held")
            wait_begun(tmp_path, 1)
            with pytest.raises(JobFailed, match="the job took longer than 1 s"):
                pools.sleep_as_task.enqueue().get(timeout=20)
            with pytest.raises(JobFailed, match="Time limit of 1 s: killed"):
                pools.block_the_loop.enqueue().get(timeout=20)
            (tmp_path / "go").touch()
            held.get(timeout=20)
            assert held.attempts == 1

    def test_one_at_a_time_shares_a_loop_too(self, site_server: Server, tmp_path: Path):
        (tmp_path / "go").touch()
        with harness.worker(site_server, processes=1, env=SITE):
            results = [pools.hold_task.enqueue(str(tmp_path), str(number)) for number in range(3)]
            assert len({tuple(result.get(timeout=30)) for result in results}) == 1
            with pytest.raises(JobFailed, match="the job took longer than 1 s"):
                pools.sleep_as_task.enqueue().get(timeout=20)
            assert pools.hold_task.enqueue(str(tmp_path), "4").get(timeout=30)


class TestRange:
    def test_grows_while_jobs_wait(self, site_server: Server, tmp_path: Path):
        options = ["--processes", "1..4"]
        with harness.worker(site_server, options=options, env=SITE) as worker:
            assert "1 to 4 processes serve" in worker.stdout
            harness.wait_until(lambda: len(worker.children()) == 1)
            results = [pools.hold.enqueue(str(tmp_path), f"job{number}") for number in range(4)]
            wait_begun(tmp_path, 4)
            assert len(worker.children()) == 4
            (tmp_path / "go").touch()
            assert len({result.get(timeout=30)[0] for result in results}) == 4


class TestSolo:
    def test_runs_jobs_in_its_own_process(self, site_server: Server):
        with harness.worker(site_server, options=["--pool", "solo"], env=SITE) as worker:
            assert pools.sleep_for.enqueue(0).get(timeout=30) == worker.pid
            assert worker.children() == []
            with pytest.raises(JobFailed, match="the job took longer than 1 s"):
                jobs.sleep_long.run()

    def test_stops_in_good_order(self, site_server: Server, tmp_path: Path):
        with harness.worker(site_server, options=["--pool", "solo"], env=SITE) as worker:
            result = pools.hold.enqueue(str(tmp_path), "held")
            wait_begun(tmp_path, 1)
            worker.signal(signal.SIGTERM)
            (tmp_path / "go").touch()
            assert worker.wait() == 0
        assert result.get(timeout=30)[0]

    @pytest.mark.parametrize("how", ["twice", "grace"])
    def test_puts_back(self, site_server: Server, tmp_path: Path, how: str):
        options = ["--pool", "solo", "--grace", "0.5" if how == "grace" else "60"]
        with harness.worker(site_server, options=options, env=SITE) as worker:
            result = pools.hold.enqueue(str(tmp_path), "held")
            wait_begun(tmp_path, 1)
            for _ in range(1 if how == "grace" else 2):
                worker.signal(signal.SIGINT)
                # Two signals of one kind that nobody has seen yet are one.
                harness.wait_until(lambda: not pending(worker.pid, signal.SIGINT))
            assert worker.wait() == 0
            assert "1 jobs went back" in worker.stdout
        record = JobRecord.objects.get(pk=result.id)
        harness.wait_until(lambda: (record.refresh_from_db(), record.status == Status.READY)[1])
        assert record.attempts == 0


def pending(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask & 1 << number - 1 for mask in masks)


class TestCores:
    @pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="this system has no control groups")
    def test_no_more_than_a_container_may_use(self, tmp_path: Path):
        all_of_them = _cores(tmp_path)
        assert all_of_them >= 1
        limit = tmp_path / "cpu.max"
        for told, cores in (
            ("max 100000", all_of_them),
            ("99900000 100000", all_of_them),
            ("50000 100000", 1),
        ):
            limit.write_text(f"{told}\n")
            assert _cores(tmp_path) == cores


class TestChoice:
    def names(self, server: Server) -> list[set[str]]:
        """What each connection offers that offers anything."""
        rows = [
            line.partition(" : ")[2] or line.partition(" :")[2] for line in server.ask("workers").splitlines()
        ]
        return sorted((set(row.split()) for row in rows if row.strip()), key=len)

    def test_exclude(self, site_server: Server):
        options = ["--exclude", f"{pools.encode.name},{jobs.add.name}"]
        with harness.worker(site_server, processes=1, options=options, env=SITE) as worker:
            worker.wait_connected()
            (names,) = harness.wait_until(lambda: self.names(site_server))
            assert pools.hold.name in names
            assert not {pools.encode.name, jobs.add.name} & names

    def test_groups_of_the_settings(self, site_server: Server, tmp_path: Path):
        groups = {
            "video": {"PROCESSES": 2, "QUEUES": ["encoding"]},
            "rest": {"PROCESSES": "1..3", "THREADS": 2, "EXCLUDE": [leave_trace.name]},
        }
        env = SITE | {
            "GEARMAN_TEST_SETTINGS": json.dumps({"WORKERS": groups, "SERVERS": [site_server.address]})
        }
        worker = harness.ManagedProcess(["gearman_worker"], started="rest: 1 to 3", env=env)
        with worker:
            harness.wait_until(lambda: len(self.names(site_server)) == 3, 60.0)
            assert len(worker.children()) == 3
            *video, rest = self.names(site_server)
            assert video == [{pools.encode.name}] * 2
            assert jobs.add.name in rest
            assert not {leave_trace.name, pools.encode.name} & rest
            assert pools.encode.enqueue("film").get(timeout=30) in worker.children()
            assert "No group of WORKERS serves" not in worker.stderr
        # When a process is replaced is not whom it serves.
        command = ["gearman_worker", "--max-jobs", "1000", "--max-memory", "900"]
        with harness.ManagedProcess(command, started="rest: 1 to 3", env=env):
            harness.wait_until(lambda: len(self.names(site_server)) == 3, 60.0)
        worker = harness.ManagedProcess(["gearman_worker", "--group", "video"], started="serve", env=env)
        with worker:
            harness.wait_until(lambda: self.names(site_server) == [{pools.encode.name}] * 2, 60.0)
            assert "No group of WORKERS serves" not in worker.stderr

    def test_functions_that_no_group_serves(self, site_server: Server):
        groups = {"video": {"QUEUES": ["encoding"]}, "own": {"FUNCTIONS": [pools.hold.name]}}
        env = SITE | {
            "GEARMAN_TEST_SETTINGS": json.dumps({"WORKERS": groups, "SERVERS": [site_server.address]})
        }
        with harness.ManagedProcess(["gearman_worker"], started="own: 1", env=env) as worker:
            said = re.compile(r"No group of WORKERS serves (.*)")
            found = harness.wait_until(lambda: said.search(worker.stderr))
            harness.wait_until(lambda: len(self.names(site_server)) == 2, 60.0)
            names = found[1].split(", ")
            assert jobs.add.name in names
            assert not {pools.encode.name, pools.hold.name} & {*names}

    @pytest.mark.parametrize(
        "names", [{"FUNCTIONS": ["gone"]}, {"QUEUES": ["gone"]}], ids=["function", "queue"]
    )
    def test_a_group_of_what_is_gone(self, names: dict[str, list[str]]):
        """After a deployment that renamed it, say: the word tells where it stands."""
        env = {"GEARMAN_TEST_SETTINGS": json.dumps({"WORKERS": {"rest": {}, "old": names}})}
        done = subprocess.run(
            [*harness.MANAGE, "gearman_worker", "--skip-checks"],
            cwd=harness.ROOT,
            env=harness.environment() | SITE | env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert "'gone', as WORKERS['old'] says. Known " in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["--processes", "8..2"], "'8..2' is not a number of processes: use 1 to 1000, or a range"),
            (["--threads", "0"], "'0' is not a whole number from 1"),
            (["--max-memory", "much"], "'much' is no limit of memory: use MiB in all, such as 500"),
            (["--exclude", "nothing"], "No job is named 'nothing'. Known are: "),
            (["--queues", "nothing"], "No function is in the queues 'nothing'. Known queues are: "),
            (["--group", "nothing"], "WORKERS has no group 'nothing'. Known are: none."),
            (["--pool", "green"], "invalid choice: 'green'"),
        ],
    )
    def test_mistakes(self, arguments: list[str], sentence: str):
        done = subprocess.run(
            [*harness.MANAGE, "gearman_worker", *arguments],
            cwd=harness.ROOT,
            env=harness.environment() | SITE,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode in (1, 2)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


class TestLaterGroup:
    """What the parent does for its processes, it does for those of every group."""

    @pytest.fixture
    def worker(self, site_server: Server) -> Iterator[harness.ManagedProcess]:
        groups = {"video": {"QUEUES": ["encoding"]}, "slow": {"QUEUES": ["slow"]}, "rest": {}}
        env = SITE | {
            "GEARMAN_TEST_SETTINGS": json.dumps({"WORKERS": groups, "SERVERS": [site_server.address]})
        }
        with harness.ManagedProcess(["gearman_worker"], started="rest: 1", env=env) as process:
            yield process

    @pytest.mark.usefixtures("worker")
    def test_job_is_cancelled(self, tmp_path: Path):
        result = pools.be_interrupted.enqueue(str(tmp_path), "job")
        harness.wait_until(lambda: (tmp_path / "job.begun").exists(), 60.0)
        assert result.cancel()
        harness.wait_until(lambda: (tmp_path / "job.cancelled").exists())
        assert jobs.add.enqueue(1).get(timeout=30) == 2

    @pytest.mark.usefixtures("worker")
    def test_record_says_of_what_a_process_died(self):
        with pytest.raises(JobFailed, match="The worker was lost: exit status 7 at the last of 1 attempts"):
            pools.exit_hard.enqueue(7).get(timeout=60)
        with pytest.raises(JobFailed, match="Time limit of 1 s: killed at the last of 1 attempts"):
            jobs.hang_in_c.enqueue().get(timeout=60)

    def test_job_that_goes_back_keeps_its_attempts(
        self, site_server: Server, worker: harness.ManagedProcess, tmp_path: Path
    ):
        result = pools.hold.enqueue(str(tmp_path), "held")
        wait_begun(tmp_path, 1)
        worker.signal(signal.SIGTERM)
        harness.wait_until(lambda: "Stopping" in worker.stderr)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert "1 jobs went back to the queue" in worker.stdout
        (tmp_path / "go").touch()
        with harness.worker(site_server, processes=1, env=SITE):
            assert result.get(timeout=60)
        assert (result.attempts, result.errors) == (1, [])


def test_titles_say_what_a_process_does(site_server: Server, tmp_path: Path):
    needs.module("setproctitle")

    def titles(pids: list[int]) -> list[str]:
        return [Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0") for pid in pids]

    with harness.worker(site_server, processes=1, env=SITE) as worker:
        worker.wait_connected()
        assert titles([worker.pid]) == ["gearman_worker: supervisor"]
        assert titles(worker.children()) == ["gearman_worker: idle"]
        pools.hold.enqueue(str(tmp_path), "held")
        wait_begun(tmp_path, 1)
        assert titles(worker.children()) == [f"gearman_worker: {pools.hold.name}"]
        (tmp_path / "go").touch()
        harness.wait_until(lambda: titles(worker.children()) == ["gearman_worker: idle"])
        os.kill(worker.pid, signal.SIGTERM)
        worker.wait()
