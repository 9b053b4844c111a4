"""How cheaply a candidate may be repaired and still be ranked rightly.

Run: python -m benchmarks.efforts [--depth 56] [--budget 0.5] [--trials 80] [--plans 30]     (PRUNEFRONT_DATA names the
     folder of task=cifar_resnet)

A search makes plans like those that a search has to compare; ``--plans`` of them that it scored in full are repaired
with each effort, and also by cheaper methods, and their fidelity to the dense model on 1,000 images is compared with
that after the thorough repair: Spearman's rank correlation, and Pearson's of the logarithms of the divergence.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import optuna
from scipy.stats import pearsonr, spearmanr

import prunefront
from benchmarks.search import discovered
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.search.guidance import guidance
from prunefront.search.study import PARTLY, finished
from prunefront.spaces.calibration import precision
from prunefront.spaces.sequential import EFFORTS, Effort

PAIRS = ((128, 2048), (128, 4096), (256, 2048), (256, 4096), (512, 2048), (512, 4096))
CHEAPER = ("bn", "least_squares")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--trials", type=int, default=80)
    parser.add_argument("--plans", type=int, default=30)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = cifar_resnet(options.depth)
    model = task.make_model()
    space = discovered(task, model)
    with tempfile.TemporaryDirectory() as run_dir:
        study = prunefront.search(
            model,
            task.example_inputs,
            score=task.score,
            budget={"macs": f"{100 * options.budget}%"},
            n_trials=options.trials,
            finalists=1,
            run_dir=run_dir,
            space=space,
            autocast=task.autocast,
        ).study
        trials = [trial for trial in finished(study) if PARTLY not in trial.user_attrs]
    chosen = np.random.default_rng(0).permutation(len(trials))[: options.plans]
    widths = [trials[index].user_attrs["plan"]["widths"] for index in chosen]
    guide = guidance(space, task.score, "fidelity", task.autocast).guide
    EFFORTS.update({f"{samples:,} samples, {rows:,} vectors": Effort(samples, rows) for samples, rows in PAIRS})
    ways = [(space, name) for name in EFFORTS if name != "quick"]
    ways += [(discovered(task, model, "reconstruction", method), method) for method in CHEAPER]
    values, seconds = {}, {}
    for own, name in ways:
        effort = name if own is space else "thorough"
        own.apply(own.plan(widths[0]), effort)  # what is done once
        values[name], seconds[name] = [], 0.0
        for row in widths:
            start = time.perf_counter()
            candidate = own.apply(own.plan(row), effort)
            seconds[name] += time.perf_counter() - start
            with precision(candidate, task.autocast):
                values[name].append(-guide(candidate))
    print("| repair | seconds | divergence | rank correlation | correlation of logarithms |")
    print("| --- " * 5 + "|")
    truth = values["thorough"]
    for name, found in values.items():
        ranks, logs = spearmanr(found, truth).statistic, pearsonr(np.log(found), np.log(truth)).statistic
        print(f"| {name} | {seconds[name] / len(widths):.2f} | {np.mean(found):.3f} | {ranks:.2f} | {logs:.2f} |")


if __name__ == "__main__":
    main()
