"""Pieces of the documentation, for tests that try them."""

from __future__ import annotations

import re

from tests.harness import ROOT


def block_of(file: str, name: str) -> str:
    """The code block of a page below docs/ that stands under the comment ``<!-- try: NAME -->``."""
    text = (ROOT / "docs" / file).read_text()
    found = re.search(rf"<!-- try: {re.escape(name)} -->\n```\w*\n(.*?)```", text, re.DOTALL)
    assert found is not None, f"docs/{file} has no block {name}"
    return found[1]
