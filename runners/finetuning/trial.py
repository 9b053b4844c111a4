"""A moment of fine-tuning for every candidate of a search."""

from __future__ import annotations

from torch import nn

from ...search.tuning import Report
from ...spaces.errors import ConfigError
from ..tasks import Task
from .engine import finetune
from .recipe import Recipe

#: Reports of one trial.
REPORTS = 3


class TrialTuning:
    """``steps`` of SGD on the task's training split, the same for all candidates; scored after every third of them.

    Raises:
        ConfigError: the task has no training split, or the numbers make no sense.
    """

    def __init__(self, task: Task, steps: int, lr: float, seed: int) -> None:
        if task.training is None:
            raise ConfigError("finetune_steps trains candidates, and the task has no training split: set task.training")
        self.task = task
        self.recipe = Recipe(lr=lr, steps=steps, evaluate_steps=max(1, -(-steps // REPORTS)), seed=seed)
        self.description = f"{steps} steps of sgd, lr {lr:g}"

    def __call__(self, candidate: nn.Module, report: Report) -> nn.Module:
        done = 0

        def score(model: nn.Module) -> float:
            nonlocal done
            done = min(done + (self.recipe.evaluate_steps or 0), self.recipe.steps or 0)
            report(done, model)
            return 0.0

        training, task = self.task.training, self.task
        assert training is not None
        found = finetune(
            candidate,
            training=training,
            loss=task.loss,
            score=score,
            recipe=self.recipe,
            autocast=task.autocast,
            example_inputs=task.example_inputs,
            metrics={"params": 0, "macs": 0},  # nobody asks
        )
        return found.model.eval()
