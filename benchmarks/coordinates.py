"""Does the surrogate search better when it knows what widths lose?

Run: python -m benchmarks.coordinates [--depth 56] [--budget 0.4] [--trials 50] [--seeds 0,1,2]
     (PRUNEFRONT_DATA names the folder of task=cifar_resnet)

The best divergence from the dense model's outputs after so many trials, with the coordinates of search/coordinates.py
and with the logarithms of relative widths; trials that were given up in a race do not count.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import optuna

import prunefront
from benchmarks.search import discovered
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.search.study import is_estimate

CUTS = (10, 20, 30, 40, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--budget", type=float, default=0.4)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = cifar_resnet(options.depth)
    model = task.make_model()
    space = discovered(task, model)
    known = space.lost_outputs()
    print(f"| coordinates | seed | {' | '.join(f'after {cut}' for cut in CUTS if cut <= options.trials)} |")
    for name, lost in (("lost outputs", known), ("widths", [None] * len(known))):
        space.lost_outputs = lambda criterion=None, lost=lost: lost  # type: ignore[method-assign]
        for seed in map(int, options.seeds.split(",")):
            with tempfile.TemporaryDirectory() as run_dir:
                trials = prunefront.search(
                    model,
                    task.example_inputs,
                    score=task.score,
                    budget={"macs": f"{100 * options.budget}%"},
                    n_trials=options.trials,
                    finalists=1,
                    seed=seed,
                    run_dir=run_dir,
                    space=space,
                    autocast=task.autocast,
                ).study.trials
            values = [np.inf if is_estimate(trial) else -trial.values[0] for trial in trials]
            best = np.minimum.accumulate(values)
            cells = " | ".join(f"{best[cut - 1]:.3f}" for cut in CUTS if cut <= options.trials)
            print(f"| {name} | {seed} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
