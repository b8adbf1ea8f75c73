"""
What more workers gain: counting the status codes of web logs by ``map_reduce``.

    python benchmarks/map_reduce.py [--megabytes 1024] [--workers 1 2 4] [--rounds 3]

The jobs are those of docs/parallel.md, run by one ``gearman_worker`` with so many
processes, from a job server that keeps nothing. Told are the best of the rounds,
which are taken in turn, and the CPU seconds that the workers spent: with more
processes than cores these stay the same, and nothing is gained.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BLOCK = re.compile(r"^<!-- file: (weblogs/\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)
SETTINGS = """
from tests.settings import *
from tests.settings import INSTALLED_APPS
INSTALLED_APPS = [app for app in INSTALLED_APPS if app not in ("project.gallery", "tests.app")] + ["weblogs"]
ROOT_URLCONF = "tests.admin.urls"
"""
STATUSES = ["200"] * 15 + ["304"] * 9 + ["404"] * 6
LINE = '10.0.0.{} - - [10/Oct/2026:13:55:{:02} +0000] "GET /photos/{}/ HTTP/1.1" {} {} "-" "Mozilla/5.0"\n'
TICKS = os.sysconf("SC_CLK_TCK")


def write_log(path: Path, megabytes: float) -> dict[str, int]:
    """A log of about that size; how often each status is in it."""
    lines = [
        LINE.format(
            number % 256, number % 60, number * 7919 % 100_000, STATUSES[number % 30], number * 31 % 10**6
        )
        for number in range(30_000)
    ]
    block = "".join(lines).encode()
    times = max(1, round(megabytes * 2**20 / len(block)))
    with path.open("wb") as file:
        for _ in range(times):
            file.write(block)
    return {status: STATUSES.count(status) * 1000 * times for status in ("200", "304", "404")}


def cpu_seconds(pids: list[int]) -> float:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gearman-bench-") as temporary:
        folder = Path(temporary)
        (folder / "weblogs").mkdir()
        (folder / "weblogs" / "__init__.py").touch()
        for name, code in BLOCK.findall((ROOT / "docs" / "parallel.md").read_text()):
            (folder / name).write_text(code)
        (folder / "weblogs_settings.py").write_text(SETTINGS)
        sys.path.insert(0, temporary)
        os.environ["DJANGO_SETTINGS_MODULE"] = "weblogs_settings"
        os.environ["PYTHONPATH"] = f"{temporary}{os.pathsep}{ROOT}"
        measure(folder, options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    import django

    django.setup()

    from django.test import override_settings
    from weblogs.jobs import count_statuses, merge, ranges  # type: ignore[import-not-found]  # of the document

    from django_gearman import map_reduce
    from tests import harness

    log = folder / "access.log"
    expected = write_log(log, options.megabytes)
    size = log.stat().st_size / 2**20
    best: dict[int, tuple[float, float]] = {}
    env = {"DJANGO_SETTINGS_MODULE": "weblogs_settings"}
    with harness.server(store="memory", env=env) as server, override_settings(GEARMAN=server.setting):
        for _ in range(options.rounds):
            for count in options.workers:
                with harness.worker(server, processes=count, env=env) as worker:
                    worker.wait_connected()
                    pids = worker.children()
                    cpu, began = cpu_seconds(pids), time.monotonic()
                    counts = map_reduce(count_statuses, merge, ranges(str(log)), chunk=1, timeout=3600)
                    seconds = time.monotonic() - began
                    assert counts == expected, f"miscounted: {counts}"
                    best[count] = min(best.get(count, (1e9, 0.0)), (seconds, cpu_seconds(pids) - cpu))
    print(
        f"{size:,.0f} MB, {sum(expected.values()):,} lines, {os.cpu_count()} cores, best of {options.rounds}"
    )
    first = best[options.workers[0]][0] * options.workers[0]
    for count, (seconds, cpu) in best.items():
        print(
            f"  {count:2} processes: {seconds:7.2f} s {size / seconds:7,.0f} MB/s, "
            f"{first / seconds:5.2f} times one, {cpu:6.2f} s of CPU"
        )


if __name__ == "__main__":
    main()
