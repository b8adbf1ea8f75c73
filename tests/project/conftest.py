from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def media(tmp_path: Path, settings: Any) -> Path:
    """Every test has a MEDIA_ROOT of its own."""
    settings.MEDIA_ROOT = tmp_path / "media"
    return tmp_path / "media"
