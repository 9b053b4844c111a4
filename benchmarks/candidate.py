"""What a candidate costs, how good it is at once, and what its score is worth.

Run: python -m benchmarks.candidate [--parts building,cifar,preparation,transformer,ranking] [--out candidate.json]

``building``: seconds to build a candidate of four models, beside the copy of as many bytes, ``copy.deepcopy`` and
Torch-Pruning. ``cifar``: the CIFAR ResNets of ``task=cifar_resnet`` (``PRUNEFRONT_DATA`` names the folder with the
weights), inner channels of all blocks at one ratio, accuracy on the reporting half of the test images for all criteria
and compensations. ``preparation``: seconds to slice, to compensate and to recalibrate a fresh plan, beside a pass of
the dense model over 1,000 images in the same precision, interleaved. ``transformer``: a small vision transformer
trained here on scikit-learn's digits, heads and neurons, accuracy on the 40 % of the images that it was not trained on.
``ranking``: Kendall's tau of the one-shot score with the accuracy after an epoch of fine-tuning.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import building, ranking, repair
from benchmarks.zoo import machine

DEPTHS = (20, 56)
PARTS = {
    "building": lambda: building.run(),
    "cifar": lambda: [repair.cifar(depth) for depth in DEPTHS],
    "preparation": lambda: [repair.preparation(depth) for depth in DEPTHS],
    "transformer": repair.transformer,
    "ranking": ranking.measure,
}
TABLES = {
    "building": building.table,
    "cifar": lambda results: "\n\n".join(repair.table(result) for result in results),
    "preparation": repair.preparation_table,
    "transformer": repair.table,
    "ranking": ranking.table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, help="JSON; parts that are not run again stay as they are")
    chosen = parser.parse_args()
    parts = chosen.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}; expected some of {', '.join(PARTS)}")
    results: dict[str, Any] = {}
    if chosen.out and chosen.out.exists():
        results = json.loads(chosen.out.read_text(encoding="utf-8"))
    results["machine"] = machine()
    for part in parts:
        results[part] = PARTS[part]()
        print(f"## {part}\n\n{TABLES[part](results[part])}\n", flush=True)
        if chosen.out:
            chosen.out.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
