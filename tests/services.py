"""Programs that some tests need."""

import os
from typing import NoReturn

import pytest


def missing(program: str) -> NoReturn:
    """Skip the test, or fail it where all programs must be there."""
    reason = f"{program} is not installed"
    pytest.fail(reason) if os.environ.get("PRUNEFRONT_REQUIRE_SERVICES") == "1" else pytest.skip(reason)
