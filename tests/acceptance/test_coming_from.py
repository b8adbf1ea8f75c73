"""``docs/coming-from.md``: what is ours in it is run as it stands there, and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import harness

from .test_testing_docs import PRINTED, SETTINGS, blocks, environment, write

pytestmark = [pytest.mark.acceptance]

PROGRAMS = ["later.py", "refused.py", "reverse.py"]
PYTHON = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c"]
SETUP = "import django, runpy, sys; django.setup(); runpy.run_path(sys.argv[1])"


def test_every_program_prints_what_it_says(transactional_db: None, tmp_path: Path) -> None:
    files = blocks("coming-from.md")
    assert set(files) == {"shop/jobs.py", *PROGRAMS}
    own = {"shop_settings.py": SETTINGS.replace("TEST_NAME", "None"), "shop/urls.py": "urlpatterns = []\n"}
    env = environment(tmp_path)
    with harness.server() as server:
        write(
            tmp_path, {name: code.replace("4730", str(server.port)) for name, code in (files | own).items()}
        )
        with harness.worker(server, processes=1, env=env) as worker:
            worker.wait_connected()
            for name in PROGRAMS:
                done = subprocess.run(
                    [*PYTHON, SETUP, tmp_path / name],
                    env=env | {"GEARMAN_TEST_SERVER": server.address},
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, done.stderr
                assert done.stdout.splitlines() == PRINTED.findall(files[name])


def test_every_block_is_marked() -> None:
    text = (harness.ROOT / "docs" / "coming-from.md").read_text()
    marked = re.findall(r"^<!-- (?:file: \S+|before|here) -->\n```python$", text, re.M)
    assert len(marked) == len(re.findall(r"^```\w+$", text, re.M))


PAGES = sorted([*harness.ROOT.glob("*.md"), *(harness.ROOT / "docs").glob("*.md")])
CODE = re.compile(r"^```.*?^```$", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What a link may lead to within a page: its headings, as the forges write them."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", text)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target
    for path in re.findall(r"`((?:docs|project|deploy|benchmarks|tests|\.ci)/[\w./-]+)`", text):
        # What is made when the example site runs is not there yet.
        assert (harness.ROOT / path).exists() or path.startswith("project/var/"), path
