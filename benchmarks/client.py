"""
What submitting costs one Django process, beside Celery, RQ, huey and django-tasks-db in the same run.

    python benchmarks/client.py [--jobs 2000] [--many 10000] [--rounds 3] [--only gearman,huey]

Makes a virtual environment of its own in a temporary folder (``--venv`` keeps
one for the next time), installs the peers there, and starts what each needs on
free ports of the loopback: two worker processes, and a redis-server without
persistence, which must be on the PATH for those that want one. Databases are
SQLite files with WAL and FULL sync.

Only ratios taken in one run mean anything. Rows that a peer has no call for
stay empty. Rounds are interleaved; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("gearman", "celery", "rq", "huey", "tasks-db")
NEEDS_REDIS = ("celery", "rq", "huey")
REQUIREMENTS = ("celery[redis]", "rq", "huey", "django", "django-tasks-db")
LIMIT = 600
"""Seconds in which what was submitted before is worked off."""

LATENCIES = 300
"""Round trips of which the median is told."""

THREADS = 8
"""Of a web process, say, which run jobs side by side."""

SETTINGS = """
import os
SECRET_KEY = "only for a benchmark"
USE_TZ = True
DATABASES = {{"default": {{
    "ENGINE": "django.db.backends.sqlite3", "NAME": {folder!r} + "/db.sqlite3",
    "OPTIONS": {{"transaction_mode": "IMMEDIATE", "timeout": 20,
                 "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL"}},
}}}}
INSTALLED_APPS = {apps!r}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
GEARMAN = {{"default": {{"SERVERS": ["127.0.0.1:{port}"]}}}}
if "django_tasks_db" in INSTALLED_APPS:
    TASKS = {{"default": {{"BACKEND": "django_tasks_db.DatabaseBackend"}}}}
REDIS = "redis://127.0.0.1:{redis}/0"
"""

APP = {
    "gearman": """
from django_gearman import job
@job
def add(left, right): return left + right
""",
    "celery": """
import os
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bench_settings")
from celery import Celery
from django.conf import settings
app = Celery("bench", broker=settings.REDIS, backend=settings.REDIS)
app.conf.update(broker_connection_retry_on_startup=True)
@app.task
def add(left, right): return left + right
""",
    "rq": """
def add(left, right): return left + right
""",
    "huey": """
import os
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "bench_settings")
from django.conf import settings
from huey import RedisHuey
huey = RedisHuey("bench", url=settings.REDIS)
@huey.task()
def add(left, right): return left + right
""",
    "tasks-db": """
from django.tasks import task
@task
def add(left, right): return left + right
""",
}


# In the virtual environment, one peer at a time.


class Gearman:
    def __init__(self) -> None:
        from bench.jobs import add

        self.add = add
        self.enqueue = add.enqueue
        self.enqueue_many = lambda calls: add.enqueue_many([(call, {}) for call in calls])
        self.run = add.run

    def round_trip(self) -> None:
        assert self.add.enqueue(1, 2).get(timeout=LIMIT) == 3

    def bare_insert(self) -> None:
        """What Django alone takes for such a row."""
        from django_gearman import conf
        from django_gearman.models import JobRecord

        record = self.add._new_record((1, 2), {}, conf.settings_for())
        record.status = JobRecord.Status.CANCELLED
        record.save(force_insert=True)


class Celery:
    enqueue_many = run = bare_insert = None

    def __init__(self) -> None:
        from bench.jobs import add

        self.enqueue = add.delay

    def round_trip(self) -> None:
        assert self.enqueue(1, 2).get(timeout=LIMIT) == 3


class RQ:
    run = bare_insert = None

    def __init__(self) -> None:
        import redis
        from bench.jobs import add
        from django.conf import settings
        from rq import Queue

        self.add = add
        self.queue = Queue(connection=redis.Redis.from_url(settings.REDIS))

    def enqueue(self, left: int, right: int) -> Any:
        return self.queue.enqueue(self.add, left, right)

    def enqueue_many(self, calls: list[tuple[int, int]]) -> None:
        from rq import Queue

        self.queue.enqueue_many([Queue.prepare_data(self.add, args=call) for call in calls])

    def round_trip(self) -> None:
        job = self.enqueue(1, 2)
        until(lambda: job.return_value(refresh=True) is not None)
        assert job.return_value() == 3


class Huey:
    enqueue_many = run = bare_insert = None

    def __init__(self) -> None:
        from bench.jobs import add

        self.enqueue = add

    def round_trip(self) -> None:
        assert self.enqueue(1, 2).get(blocking=True, timeout=LIMIT, backoff=1.0, max_delay=0.001) == 3


class TasksDB:
    enqueue_many = run = bare_insert = None

    def __init__(self) -> None:
        from bench.jobs import add

        self.enqueue = add.enqueue

    def round_trip(self) -> None:
        result = self.enqueue(1, 2)

        def is_finished() -> bool:
            result.refresh()
            return bool(result.is_finished)

        until(is_finished)
        assert result.return_value == 3


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.001)


def measure(name: str, phase: str, jobs: int, many: int) -> dict[str, float]:
    """Figures of one peer, in this process."""
    import django

    django.setup()
    kinds: dict[str, type[Any]] = {
        "gearman": Gearman, "celery": Celery, "rq": RQ, "huey": Huey, "tasks-db": TasksDB
    }  # fmt: skip
    peer = kinds[name]()
    if phase == "backlog":
        for _ in range(jobs):
            peer.enqueue(1, 2)
        return {}
    if phase == "submit":
        for _ in range(50):
            peer.enqueue(1, 2)
        found = {"enqueue/s, one by one": per_second(lambda: [peer.enqueue(1, 2) for _ in range(jobs)], jobs)}
        each = latencies(lambda: peer.enqueue(1, 2))
        found["  enqueue, p50 ms"] = each[len(each) // 2]
        if peer.bare_insert is not None:
            found["  bare insert of such a row/s"] = per_second(
                lambda: [peer.bare_insert() for _ in range(jobs)], jobs
            )
        if peer.enqueue_many is not None:
            calls = [(number, 1) for number in range(many)]
            found[f"enqueue/s, {many} at once"] = per_second(lambda: peer.enqueue_many(calls), many)
        return found
    for _ in range(30):
        peer.round_trip()
    trips = latencies(peer.round_trip)
    found = {
        "enqueue, then its value, p50 ms": trips[len(trips) // 2],
        "enqueue, then its value, p95 ms": trips[len(trips) * 95 // 100],
    }
    if peer.run is not None:
        peer.run(1, 2)
        trips = latencies(lambda: peer.run(1, 2))
        found["run (foreground), p50 ms"] = trips[len(trips) // 2]
        found["run (foreground), p95 ms"] = trips[len(trips) * 95 // 100]
        calls = 4 * LATENCIES
        with ThreadPoolExecutor(THREADS) as pool:
            found[f"run/s, {THREADS} threads"] = per_second(
                lambda: list(pool.map(lambda number: peer.run(number, 2), range(calls))), calls
            )
    return found


def per_second(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    call()
    return times / (time.perf_counter() - began)


def latencies(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each call, sorted."""
    found = []
    for _ in range(LATENCIES):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1000)
    return sorted(found)


# Outside of it.


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], env: dict[str, str], folder: Path) -> Iterator[int]:
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Scene:
    """A peer's project, in a folder of its own."""

    def __init__(self, name: str, python: str, folder: Path, source: str | None = None) -> None:
        self.name = name
        self.python = python
        self.folder = folder / name
        self.port, self.redis = free_port(), free_port()
        self.stack = ExitStack()
        self.server: int | None = None
        """Process id of redis-server or gearman_server."""
        (self.folder / "bench").mkdir(parents=True)
        (self.folder / "bench" / "__init__.py").touch()
        (self.folder / "bench" / "jobs.py").write_text(APP[name] if source is None else source)
        apps = {"gearman": ["django_gearman", "bench"], "tasks-db": ["django_tasks_db", "bench"]}
        (self.folder / "bench_settings.py").write_text(
            SETTINGS.format(
                folder=str(self.folder), apps=apps.get(name, ["bench"]), port=self.port, redis=self.redis
            )
        )
        self.env = os.environ | {
            "DJANGO_SETTINGS_MODULE": "bench_settings",
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}",
        }

    def start(self) -> None:
        """The server, where there is one; no workers yet."""
        if self.name in NEEDS_REDIS:
            command = ["redis-server", "--port", str(self.redis), "--bind", "127.0.0.1", "--save", ""]
            self.server = self.stack.enter_context(
                running([*command, "--appendonly", "no"], self.env, self.folder)
            )
            self._wait_for(self.redis)
        else:
            self.call("-m", "django", "migrate", "-v0")
        if self.name == "gearman":
            command = ["-m", "django", "gearman_server", "--port", str(self.port)]
            self.server = self.stack.enter_context(running([self.python, *command], self.env, self.folder))
            self._wait_for(self.port)

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise SystemExit(f"{self.name} did not start: see {self.folder}/log") from None
                time.sleep(0.05)

    def worker_commands(self) -> list[list[str]]:
        """Of two processes."""
        commands: dict[str, list[list[str]]] = {
            "gearman": [["-m", "django", "gearman_worker", "--processes", "2", "-v", "0"]],
            "celery": [["-m", "celery", "-A", "bench.jobs", "worker", "-c", "2", "-l", "ERROR"]],
            "rq": [
                ["-m", "rq.cli", "worker", "-w", "rq.worker.SimpleWorker", "--quiet",
                 "--url", f"redis://127.0.0.1:{self.redis}/0"]
            ] * 2,
            "huey": [
                ["-m", "huey.bin.huey_consumer", "bench.jobs.huey", "-w", "2", "-k", "process",
                 "-d", "0.01", "-q"]
            ],
            "tasks-db": [["-m", "django", "db_worker", "--interval", "0.05", "--no-startup-delay"]] * 2,
        }  # fmt: skip
        return commands[self.name]

    def workers(self) -> ExitStack:
        stack = ExitStack()
        for command in self.worker_commands():
            stack.enter_context(running([self.python, *command], self.env, self.folder))
        return stack

    def call(self, *command: str) -> str:
        done = subprocess.run(
            [self.python, *command],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(command)} failed\n{done.stderr}")
        return done.stdout

    def measure(self, phase: str, jobs: int, many: int) -> dict[str, float]:
        told = self.call(
            str(Path(__file__).resolve()), "--measure", self.name, "--phase", phase,
            "--jobs", str(jobs), "--many", str(many),
        )  # fmt: skip
        found: dict[str, float] = json.loads(told.splitlines()[-1])
        return found


def environment(folder: Path) -> str:
    """The interpreter of the virtual environment, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(REQUIREMENTS)} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    return str(python)


def chosen_peers(parser: argparse.ArgumentParser, names: str) -> list[str]:
    """Those that were asked for and can be run here."""
    chosen = [name for name in names.split(",") if name]
    if unknown := set(chosen) - set(PEERS):
        parser.error(f"--only knows {', '.join(PEERS)}, not {', '.join(sorted(unknown))}")
    if shutil.which("redis-server") is None and (left_out := set(chosen) & set(NEEDS_REDIS)):
        print(f"! redis-server is not installed: without {', '.join(sorted(left_out))}", file=sys.stderr)
        chosen = [name for name in chosen if name not in NEEDS_REDIS]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(PEERS))
    parser.add_argument(
        "--venv", type=Path, help="a virtual environment to use, and to make if it is missing"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        # The script's folder has modules that are named as packages are.
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
        print(json.dumps(measure(options.measure, options.phase, options.jobs, options.many)))
        return
    # What was started is ended, too, when somebody loses patience.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    chosen = chosen_peers(parser, options.only)
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="gearman-bench-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        python = environment(options.venv or folder / "venv")
        scenes = [Scene(name, python, folder) for name in chosen]
        for scene in scenes:
            stack.callback(scene.stack.close)
            scene.start()
        for _ in range(options.rounds):
            for scene in scenes:
                found = scene.measure("submit", options.jobs, options.many)
                with scene.workers():
                    # Its first round trip waits until what was submitted is worked off.
                    found |= scene.measure("trips", 0, 0)
                for title, figure in found.items():
                    figures.setdefault(title, {}).setdefault(scene.name, []).append(figure)
    print_table(figures, chosen)


def print_table(figures: dict[str, dict[str, list[float]]], names: list[str]) -> None:
    width = max(map(len, figures)) + 2
    print(" " * width + "".join(f"{name:>12}" for name in names))
    for title, row in figures.items():
        cells = [f"{statistics.median(row[name]):>12,.2f}" if name in row else " " * 12 for name in names]
        print(f"{title:<{width}}" + "".join(cells))


if __name__ == "__main__":
    main()
