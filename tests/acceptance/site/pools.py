"""Jobs that hang, crash and leak, for the tests of worker pools."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from pathlib import Path

from django_gearman import JobContext, job
from django_gearman.exceptions import JobCancelled, JobTimedOut

kept: list[bytes] = []


@job(timeout=1)
def join_thread() -> None:
    """Wait for a thread, which waits in C."""
    thread = threading.Thread(target=time.sleep, args=(3,), daemon=True)
    thread.start()
    thread.join()


@job(timeout=1, max_attempts=1)
def pass_over_base_exceptions() -> None:
    while True:
        try:
            time.sleep(0.01)
        except BaseException:  # what a very careless function does
            pass


@job(timeout=1)
def clean_up(path: str) -> str:
    """It may end well all the same."""
    try:
        time.sleep(30)
    except JobTimedOut:
        Path(path).touch()
    return "cleaned up"


@job
def sleep_for(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@job(max_attempts=1)
def exit_hard(status: int) -> None:
    os._exit(status)


@job(max_attempts=1)
def segfault() -> None:
    ctypes.string_at(0)


@job
def leak(mib: int) -> int:
    kept.append(os.urandom(1024) * 1024 * mib)
    return os.getpid()


@job
def leave_trace_late(path: str, name: str) -> None:
    """Work for a while, and add a line to a file."""
    time.sleep(0.3)
    with open(path, "a") as file:
        file.write(f"{name} {os.getpid()}\n")


@job
def hold(folder: str, name: str) -> list[int]:
    """Leave ``NAME.begun`` with who runs it, and wait for ``NAME.go`` or ``go``."""
    with open(Path(folder) / f"{name}.begun", "a") as file:
        file.write(f"{os.getpid()} {threading.get_ident()}\n")
    while not (Path(folder) / f"{name}.go").exists() and not (Path(folder) / "go").exists():
        time.sleep(0.01)
    with open(Path(folder) / f"{name}.done", "a") as file:
        file.write(f"{os.getpid()}\n")
    return [os.getpid(), threading.get_ident()]


@job
async def hold_task(folder: str, name: str) -> list[int]:
    """``hold``, without a thread."""
    with open(Path(folder) / f"{name}.begun", "a") as file:
        file.write(f"{os.getpid()} {id(asyncio.get_running_loop())}\n")
    while not (Path(folder) / f"{name}.go").exists() and not (Path(folder) / "go").exists():
        await asyncio.sleep(0.01)
    return [os.getpid(), id(asyncio.get_running_loop())]


@job(timeout=1, max_attempts=1)
async def sleep_as_task() -> None:
    await asyncio.sleep(30)


@job(timeout=1, max_attempts=1)
async def block_the_loop() -> None:
    time.sleep(60)


@job(takes_context=True)
def look_at_context(context: JobContext, folder: str, name: str) -> None:
    """Work until it is cancelled, and leave ``NAME.cancelled`` then."""
    (Path(folder) / f"{name}.begun").write_text(str(os.getpid()))
    while not context.cancelled:
        time.sleep(0.01)
    (Path(folder) / f"{name}.cancelled").touch()


@job
def be_interrupted(folder: str, name: str) -> None:
    """Sleep in C until it is cancelled, and leave ``NAME.cancelled`` then."""
    (Path(folder) / f"{name}.begun").write_text(str(os.getpid()))
    try:
        time.sleep(60)
    except JobCancelled:
        (Path(folder) / f"{name}.cancelled").touch()
        raise


@job
def hang_for_ever(folder: str, name: str) -> None:
    """In C, where nothing is heard."""
    (Path(folder) / f"{name}.begun").write_text(str(os.getpid()))
    sum(range(10**13))


@job(queue_name="encoding")
def encode(name: str) -> int:
    return os.getpid()
