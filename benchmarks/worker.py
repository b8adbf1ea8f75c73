"""
What running jobs costs the workers, beside Celery, RQ, huey and django-tasks-db in the same run.

    python benchmarks/worker.py [--jobs 5000] [--rounds 3] [--only gearman,huey] [--venv FOLDER]

Two worker processes of each run a backlog of jobs that do next to nothing: they
add two numbers, and a byte to a file, by which the jobs that are done are
counted in the same way for all. Told are jobs per second from the moment when a
tenth is done to the end, CPU of the workers and of their server per job, and the memory of an idle
worker command afterwards (PSS: what processes share is counted once).

Not equal is what they promise: ours writes what becomes of each job to SQLite, synced; the
Redis of Celery, RQ and huey keeps nothing on disk, and a job that huey's worker had in
hand is lost with it. All log errors alone: ours, as Celery's and huey's, would write two
lines for each job, which cost as much as the rest of what the worker does.

Peers, environments and databases are those of ``benchmarks/client.py``. Only
ratios taken in one run mean anything.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import client

TRACED = """
import os
_trace = os.open(os.environ["BENCH_TRACE"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
"""
TICKS = os.sysconf("SC_CLK_TCK")
TITLES = {
    "rate": "jobs/s, 2 processes",
    "each": "jobs/s per process",
    "cpu": "CPU of the workers, us per job",
    "server": "CPU of their server, us per job",
    "memory": "PSS of all when idle, MB",
    "child": "PSS per process, MB",
}


def traced(source: str) -> str:
    """The peer's module, whose job leaves a byte."""
    job = 'def add(left, right):\n    os.write(_trace, b".")\n    return left + right'
    return TRACED + source.replace("def add(left, right): return left + right", job)


class Workers:
    """The worker processes of one peer."""

    def __init__(self, scene: client.Scene) -> None:
        self._commands: list[subprocess.Popen[bytes]] = []
        self._log = (scene.folder / "workers.log").open("ab")
        for command in scene.worker_commands():
            self._commands.append(
                subprocess.Popen(
                    [scene.python, *command],
                    env=scene.env,
                    cwd=scene.folder,
                    stdout=self._log,
                    stderr=self._log,
                    start_new_session=True,
                )
            )

    def processes(self) -> list[Path]:
        """Folders in /proc of all of them, children too."""
        sessions = {str(command.pid) for command in self._commands}
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    session = (folder / "stat").read_text().rpartition(")")[2].split()[3]
                except OSError:
                    continue
                if session in sessions:
                    found.append(folder)
        return found

    def cpu_seconds(self) -> float:
        return sum(map(cpu_seconds, self.processes()))

    def megabytes(self) -> float:
        total = 0
        for folder in self.processes():
            lines = (folder / "smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def stop(self) -> None:
        for command in self._commands:
            os.killpg(command.pid, signal.SIGTERM)
        for command in self._commands:
            try:
                command.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(command.pid, signal.SIGKILL)
                command.wait()
        self._log.close()


def cpu_seconds(folder: Path) -> float:
    """Of a process, by its folder in /proc."""
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def wait_for(trace: Path, count: int) -> None:
    deadline = time.monotonic() + client.LIMIT
    while not trace.exists() or trace.stat().st_size < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"only {trace.stat().st_size} of {count} jobs were run: see {trace.parent}")
        time.sleep(0.002)


def measure(scene: client.Scene, jobs: int) -> dict[str, float]:
    """Fill the queue, let the workers drain it, and say what that cost."""
    trace = scene.folder / "trace"
    trace.unlink(missing_ok=True)
    scene.measure("backlog", jobs, 0)
    workers = Workers(scene)
    try:
        wait_for(trace, jobs // 10)
        server = None if scene.server is None else Path("/proc") / str(scene.server)
        began, cpu, done = time.monotonic(), workers.cpu_seconds(), trace.stat().st_size
        of_server = 0.0 if server is None else -cpu_seconds(server)
        wait_for(trace, jobs)
        seconds, spent = time.monotonic() - began, workers.cpu_seconds() - cpu
        of_server += 0.0 if server is None else cpu_seconds(server)
        time.sleep(1.0)  # nothing to wait for: what they need when they have nothing to do
        megabytes, processes = workers.megabytes(), len(workers.processes())
        assert trace.stat().st_size == jobs, "a job was run twice"
    finally:
        workers.stop()
    rate = (jobs - done) / seconds
    return {
        "rate": rate,
        "each": rate / 2,
        "cpu": spent / (jobs - done) * 1e6,
        "server": of_server / (jobs - done) * 1e6,
        "memory": megabytes,
        "child": megabytes / processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(client.PEERS))
    parser.add_argument(
        "--venv", type=Path, help="a virtual environment to use, and to make if it is missing"
    )
    options = parser.parse_args()
    chosen = client.chosen_peers(parser, options.only)
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="gearman-bench-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        python = client.environment(options.venv or folder / "venv")
        scenes = [client.Scene(name, python, folder, source=traced(client.APP[name])) for name in chosen]
        for scene in scenes:
            scene.env["BENCH_TRACE"] = str(scene.folder / "trace")
            stack.callback(scene.stack.close)
            scene.start()
        for _ in range(options.rounds):
            for scene in scenes:
                for key, figure in measure(scene, options.jobs).items():
                    figures.setdefault(TITLES[key], {}).setdefault(scene.name, []).append(figure)
    client.print_table(figures, chosen)
    if "gearman" in chosen:
        mine = statistics.median(figures[TITLES["rate"]]["gearman"])
        for name in chosen:
            if name != "gearman":
                ratio = mine / statistics.median(figures[TITLES["rate"]][name])
                print(f"jobs/s, beside {name}: {ratio:.1f}x", file=sys.stdout)


if __name__ == "__main__":
    main()
