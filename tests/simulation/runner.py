"""Plays worlds one after the other, counts them, and tells of the one that broke a promise."""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from django_gearman.server import core, journal, window

from .world import World

TRACED = 40000
"""Lines of a failed world that are shown, the last."""

CONSTANTS = [
    (core, "ENDED_LIMIT"),
    (core, "CANCELLED_LIMIT"),
    (journal, "MAX_BATCH"),
    (journal, "CLAIM_LIMIT"),
    (window, "LEAST_SHARE"),
    (window, "MAX_QUESTIONS"),
    (journal, "COMPACT_AT"),
]
"""What a world sets to its size."""


@dataclass
class Report:
    """What was played."""

    runs: int = 0
    steps: int = 0
    seconds: float = 0.0
    """Of processor time."""
    failed: int | None = None
    """Seed of the world that broke a promise."""
    why: str = ""

    def add(self, other: Report) -> None:
        self.runs += other.runs
        self.steps += other.steps
        self.seconds += other.seconds

    def __str__(self) -> str:
        rate = self.steps / self.seconds if self.seconds else 0.0
        return f"{self.runs:,} interleavings, {self.steps:,} steps, {rate:,.0f} steps/s"


@contextmanager
def constants() -> Iterator[None]:
    """Give the modules their own numbers back, and let the journal speak to nobody."""
    kept = [(module, name, getattr(module, name)) for module, name in CONSTANTS]
    log = logging.getLogger("django_gearman")
    disabled = log.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for module, name, value in kept:
            setattr(module, name, value)


def fresh_seed() -> int:
    """One that nobody has played before, most likely; of a world with one server."""
    return random.SystemRandom().randrange(10**12) * 2


def play(first: int, *, step: int = 1, runs: float = float("inf"), seconds: float = float("inf")) -> Report:
    """
    Play worlds until there were so many, or so many seconds have passed, or one broke a promise.

    Args:
        first: The first seed. Even ones have one server, odd ones several.
        step: From one seed to the next.
    """
    report = Report()
    began, end = time.process_time(), time.monotonic() + seconds
    seed = first
    with constants():
        while report.runs < runs and time.monotonic() < end:
            world = World(seed)
            try:
                world.run()
            except Exception as error:
                report.failed = seed
                report.why = f"{type(error).__name__}: {error}"
            report.runs += 1
            report.steps += world.events
            if report.failed is not None:
                break
            seed += step
    gc.collect()
    report.seconds = time.process_time() - began
    return report


def trace(seed: int) -> str:
    """What happened in a world, in lines; the last tells how it ended."""
    lines: list[str] = []
    with constants():
        try:
            world = World(seed, trace=lines)
            world.run()
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
        else:
            lines.append(f"every promise was kept, in {world.events} steps")
    if len(lines) > TRACED:
        lines = [f"... {len(lines) - TRACED} lines before", *lines[-TRACED:]]
    return "\n".join(lines)


def tell(report: Report) -> str:
    """A failure, so that it can be played again."""
    assert report.failed is not None
    return (
        f"{trace(report.failed)}\n\nSeed {report.failed} breaks a promise: {report.why}\n"
        f"Play it again: python -m tests.simulation --seed {report.failed}"
    )
