"""``python -m prunefront``: the same as the ``prunefront`` command."""

import sys

from .runners.cli import main

sys.exit(main())
