from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


class TestWebProcess:
    def test_pages_need_neither_pillow_nor_pyav(self, tmp_path: Path):
        code = "import project.wsgi, project.urls, sys; sys.exit(bool({'PIL', 'av'} & set(sys.modules)))"
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project.settings",
            "PROJECT_VAR": str(tmp_path),
        }

        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
