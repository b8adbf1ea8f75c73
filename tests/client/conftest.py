from __future__ import annotations

import pytest

from django_gearman.client import aio, sync


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer to ask a server than a view is to wait for that."""
    for module in (sync, aio):
        monkeypatch.setattr(module, "NUDGE_TIMEOUT", 60.0)
