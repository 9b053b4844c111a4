"""Measures models on the machine that it was sent to. Usage: python remote.py FOLDER; prints a line of JSON.

The folder holds ``task.json``, ``inputs.npz``, the models, and protocol.py and runtimes.py beside this file.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    folder = sys.argv[1]
    with open(f"{folder}/task.json", encoding="utf-8") as file:
        task = json.load(file)
    try:
        import numpy
        import protocol
        import runtimes

        arrays = numpy.load(f"{folder}/inputs.npz", allow_pickle=False)
        inputs = [arrays[f"input{index}"] for index in range(len(arrays.files))]
        loaded = [runtimes.load(task["runtime"], f"{folder}/{m}", inputs, **task["options"]) for m in task["models"]]
    except Exception as error:  # told to the other side, which knows what to do about it
        answer = {"error": f"{type(error).__name__}: {error}", "missing": isinstance(error, ImportError)}
    else:
        before = protocol.conditions()
        samples = protocol.time_side_by_side([run for run, _ in loaded], **task["settings"])
        answer = {"samples": samples, "conditions": {**before, **loaded[0][1]}}
    print("prunefront " + json.dumps(answer))


if __name__ == "__main__":
    main()
