"""What systemd wants to hear of a service of ``Type=notify``, where it runs one. See sd_notify(3)."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Mapping
from time import monotonic
from typing import Final

VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""Of the environment; for the service's main process alone, not for what it starts."""


class Notifier:
    """
    Tells the service manager how it goes; nothing happens where there is none.

    Args:
        environment: Where the service manager left its ``VARIABLES``.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        every = environment.get("WATCHDOG_USEC", "")
        self._interval = int(every) / 2e6 if self._address and every.isdigit() else math.inf
        self._next_at = monotonic() if self._interval < math.inf else math.inf

    def ready(self) -> None:
        self._say("READY=1")

    def reloading(self) -> None:
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._say(f"STATUS={text}")

    def next_moment(self) -> float:
        """The monotonic time at which ``turn`` is to be called."""
        return self._next_at

    def turn(self) -> None:
        """Sign that the caller is alive, when it is time."""
        now = monotonic()
        if now >= self._next_at:
            self._next_at = now + self._interval
            self._say("WATCHDOG=1")

    def _say(self, text: str) -> None:
        if not self._address:
            return
        # A name that begins with @ is of the abstract kind.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.setblocking(False)
                sock.sendto(text.encode(), address)
        except OSError:
            pass  # to be told is its wish, not ours
