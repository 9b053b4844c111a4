"""Fail unless the wheel holds every source file: a checkout without symbolic links would build an empty one."""

import sys
import zipfile
from pathlib import Path

names = set(zipfile.ZipFile(sys.argv[1]).namelist())
wanted = {f"prunefront/{path}" for folder in ("spaces", "search") for path in Path(folder).rglob("*.py")}
wanted |= {"prunefront/__init__.py", "prunefront/py.typed"}
if missing := sorted(wanted - names):
    sys.exit(f"the wheel lacks {', '.join(missing)}")
print(f"the wheel holds all {len(wanted)} files")
