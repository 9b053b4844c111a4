"""The zoo's table, shown when all tests have run: what is printed earlier is captured."""

import pytest

HEADS = ["model", "groups", "kinds", "units", "prunable parameters", "trace s", "proof s"]
ROWS = pytest.StashKey[list[list[str]]]()


@pytest.fixture(scope="session")
def zoo_rows(request) -> list[list[str]]:
    """Rows for the table of the zoo; append one a model."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter) -> None:
    rows = terminalreporter.config.stash.get(ROWS, [])
    for line in [HEADS, ["---"] * len(HEADS), *rows] if rows else []:
        terminalreporter.write_line(f"| {' | '.join(line)} |")
