"""Fail unless the wheel holds every source file: a checkout without symbolic links would build an empty one."""

import sys
import zipfile
from pathlib import Path

SUFFIXES = (".py", ".yaml", ".html", ".css", ".js")
FOLDERS = ("spaces", "search", "runners", "conf")
names = set(zipfile.ZipFile(sys.argv[1]).namelist())
wanted = {f"prunefront/{path}" for folder in FOLDERS for path in Path(folder).rglob("*.*") if path.suffix in SUFFIXES}
wanted |= {"prunefront/__init__.py", "prunefront/__main__.py", "prunefront/py.typed"}
if missing := sorted(wanted - names):
    sys.exit(f"the wheel lacks {', '.join(missing)}")
print(f"the wheel holds all {len(wanted)} files")
