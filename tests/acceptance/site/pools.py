"""Jobs that hang, crash and leak, for the tests of worker pools."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

from django_gearman import JobContext, job
from django_gearman.exceptions import JobCancelled, JobTimedOut
from django_gearman.models import JobRecord

logger = logging.getLogger(__name__)

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


@job(timeout=1)
async def clean_up_as_task(path: str, problem: str) -> str:
    """``clean_up`` at an ``await``; the file says what it hears."""
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError as error:
        Path(path).write_text(type(error).__name__)
    if problem:
        raise ValueError(problem)
    return "cleaned up"


@job
def sleep_for(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@job(max_attempts=1)
def exit_hard(status: int) -> None:
    os._exit(status)


@job
def interrupt_itself() -> None:
    raise KeyboardInterrupt("its own")


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


def fork() -> int:
    """``os.fork``, without the warning of what threads may have locked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def say_much(name: str) -> None:
    for number in range(50):
        logger.warning("%s says %d", name, number)
        time.sleep(0.02)


@job(takes_context=True, max_attempts=1)
def speak_in_children(context: JobContext) -> list[int | None]:
    """Log in two processes beside this one, all at once; how they ended."""
    forking = multiprocessing.get_context("fork")
    children = [forking.Process(target=say_much, args=[f"child {number}"]) for number in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for child in children:
            child.start()
    say_much("parent")
    for child in children:
        child.join()
    return [child.exitcode for child in children]


@job(max_attempts=1)
def fork_one_that_exits(how: str) -> int:
    """Fork a process that leaves the function, as few do; its status. The database is still there then."""
    JobRecord.objects.count()
    child = fork()
    if child == 0:
        if how == "raises":
            raise ValueError("a child went wrong")
        if how == "returns":
            return -1
        sys.exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    JobRecord.objects.count()
    return status


@job(max_attempts=1)
def end_others() -> list[int | None]:
    """Start a program, a process and a pool, and have them end; of what the first two did."""
    with subprocess.Popen(["sleep", "600"]) as program:
        program.terminate()
    forking = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = forking.Process(target=time.sleep, args=[600])
        process.start()
        process.terminate()
        process.join()
        with forking.Pool(2) as pool:
            # Its end waits for both of its processes.
            pool.map_async(time.sleep, [600, 600])
    return [program.returncode, process.exitcode]
