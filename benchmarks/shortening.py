"""What it gives to take off sequential fits what they explain of noise (``sequential.reliable_share``).

Run: python -m benchmarks.shortening [--depth 56] [--budgets 0.5,0.35]     (PRUNEFRONT_DATA names the data folder)

Divergence from the dense model's outputs on 1,000 search images, and test accuracy, of the uniform plan within each
budget and of one that is drawn at random with a third of the layers starved; for both efforts, with whole fits
and with shortened ones.
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import numpy as np

import prunefront
from benchmarks.search import discovered, test_accuracy
from prunefront.runners.tasks.cifar_resnet import cifar_resnet
from prunefront.search.budget import parse_budget
from prunefront.search.candidates import Candidates
from prunefront.search.guidance import guidance
from prunefront.search.projection import Projector, named_widths
from prunefront.search.scores import SampleScore
from prunefront.spaces import sequential


def plans_of(space: prunefront.Space, budget: float) -> dict[str, prunefront.Plan]:
    """By name; the starved one keeps the first layer whole, as good plans do."""
    projector = Projector(space, parse_budget({"macs": f"{100 * budget}%"}, space.dense_cost))
    rng = np.random.default_rng(5)
    count = len(space.dimensions)
    starved = np.exp(0.4 * rng.standard_normal(count))
    starved[rng.random(count) < 1 / 3] *= 0.2
    starved[0] = starved.max()
    shares = {"uniform": np.ones(count), "starved": starved}
    return {name: space.plan(named_widths(space, projector.fill(each))) for name, each in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--budgets", default="0.5,0.35")
    options = parser.parse_args()
    task = cifar_resnet(options.depth)
    model = task.make_model()
    space = discovered(task, model)
    candidates = Candidates(space, task.autocast)
    guide = guidance(space, task.score, "fidelity", task.autocast).guide
    assert isinstance(guide, SampleScore)
    print("| MACs | plan | effort | fits | divergence | test, % | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for budget in map(float, options.budgets.split(",")):
        for name, plan in plans_of(space, budget).items():
            for effort in sequential.EFFORTS:
                space.apply(plan, effort)  # targets are recorded once
                for fits, share in (("whole", lambda *_: 1.0), ("shortened", sequential.reliable_share)):
                    started = time.perf_counter()
                    with mock.patch.object(sequential, "reliable_share", share):
                        candidate = space.apply(plan, effort)
                    seconds = time.perf_counter() - started
                    divergence = -candidates.race(candidate, guide, None).score
                    cells = f"{divergence:.3f} | {test_accuracy(task, candidate):.2f} | {seconds:.1f}"
                    print(f"| {budget:.0%} | {name} | {effort} | {fits} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
