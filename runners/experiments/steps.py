"""What an interrupted experiment has finished is not done again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...search.files import METRICS, read_json, write_json
from ...search.saved import load, save_model
from ...spaces.errors import SearchError

OPTIONS = "options.json"


class Steps:
    """Keeps the result of every step of one experiment in ``folder``: JSON, and models without pickle.

    Raises:
        SearchError: the folder belongs to an experiment with other ``options``.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / OPTIONS
        if not path.exists():
            write_json(path, dict(options))
        elif (found := read_json(path)) != dict(options):
            differing = sorted(key for key in {*found, *options} if found.get(key) != options.get(key))
            raise SearchError(
                f"{folder} holds an experiment with other values of {', '.join(differing)}; choose another run_dir"
            )

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, as JSON gives it back."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, {"value": make()})
        return read_json(path)["value"]

    def model(self, name: str, make: Callable[[], nn.Module], example_inputs: Any) -> nn.Module:
        """The model that ``make`` returns, or the one that it returned before."""
        path = self.folder / name
        if not (path / METRICS).exists():
            save_model(path, make().eval(), None, {}, example_inputs)
        return load(path)
