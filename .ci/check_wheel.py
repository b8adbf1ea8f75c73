"""The wheel holds what an installed app needs, and nothing else."""

import sys
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "django_gearman"


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/LICENSE")]
    present = {
        f"django_gearman/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing, extra = present - packed, packed - present
    if missing or extra or not licences:
        sys.exit(f"missing: {sorted(missing)}; too much: {sorted(extra)}; licences: {licences}")
    if "django_gearman/py.typed" not in packed:
        sys.exit("py.typed is missing")
    print(f"{len(packed)} files")


if __name__ == "__main__":
    main(sys.argv[1])
