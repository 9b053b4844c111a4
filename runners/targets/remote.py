"""Measures models in a process of its own, here or on another machine. Usage: python remote.py FOLDER

The folder holds ``task.json``, ``inputs.npz``, the models, and protocol.py and runtimes.py beside this file. Prints one
line, ``prunefront`` and JSON: samples, conditions and the outputs of every model, or an error.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from typing import Any


def main() -> None:
    folder = sys.argv[1]
    with open(f"{folder}/task.json", encoding="utf-8") as file:
        task = json.load(file)
    try:
        answer = measure(folder, task)
    except Exception as error:  # told to the other side, which knows what to do about it
        answer = {"error": f"{type(error).__name__}: {error}", "missing": isinstance(error, ImportError)}
    print("\nprunefront " + json.dumps(answer))


def measure(folder: str, task: dict[str, Any]) -> dict[str, Any]:
    import numpy
    import protocol
    import runtimes

    conditions = protocol.conditions()
    inputs = dict(numpy.load(f"{folder}/inputs.npz", allow_pickle=False))
    loaded = [runtimes.load(task["runtime"], f"{folder}/{m}", inputs, **task["options"]) for m in task["models"]]
    outputs = [[encoded(output) for output in run()] for run, _ in loaded]
    samples, load = protocol.time_side_by_side([run for run, _ in loaded], **task["settings"])
    return {"samples": samples, "conditions": {**conditions, **loaded[0][1], **load}, "outputs": outputs}


def encoded(output: Any) -> str:
    """An array as text: base64 of numpy's file format."""
    import numpy

    held = io.BytesIO()
    numpy.save(held, numpy.asarray(output.cpu() if hasattr(output, "cpu") else output), allow_pickle=False)
    return base64.b64encode(held.getvalue()).decode()


if __name__ == "__main__":
    main()
