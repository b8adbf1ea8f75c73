"""How much memory a process has, and when it has had enough."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

MIB: Final = 1024 * 1024

_STATM: Final = Path("/proc/self/statm")


def resident() -> int:
    """Bytes of this process that are in memory; where that cannot be told, the most that ever were."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


class Allowance:
    """
    When a process has done its share and another is to take its place.

    Args:
        max_jobs: How many jobs it may run; None for any number.
        max_growth: Bytes that it may grow from now on; None for any.
        max_resident: Bytes that it may have; None for any. One that has more already may double:
            a limit below what a process begins with would replace it after every job.
    """

    def __init__(
        self, *, max_jobs: int | None = None, max_growth: int | None = None, max_resident: int | None = None
    ) -> None:
        self._max_jobs = max_jobs
        self._most: int | None = None
        if max_growth is not None or max_resident is not None:
            begins_with = resident()
            limits = []
            if max_growth is not None:
                limits.append(begins_with + max_growth)
            if max_resident is not None:
                limits.append(max_resident if max_resident > begins_with else 2 * begins_with)
            self._most = min(limits)

    def is_spent(self, jobs: int) -> bool:
        """Whether a process that has run so many jobs is to end; the log says why."""
        if self._max_jobs is not None and jobs >= self._max_jobs:
            logger.info("Process %d ends after %d jobs, its limit (--max-jobs)", os.getpid(), jobs)
            return True
        if self._most is None or (has := resident()) <= self._most:
            return False
        limit = self._most // MIB
        logger.info(
            "Process %d ends with %d MiB, more than its limit, %d (--max-memory)",
            os.getpid(),
            has // MIB,
            limit,
        )
        return True
