"""A live bar of a training."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .loop import Progress as Point


class TrainingProgress:
    """A live bar with loss, score and rate; one more point at every call."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task(title, total=None, steps="", told="getting ready")
        self.rate, self.score = "", ""

    def __enter__(self) -> TrainingProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, point: Point) -> None:
        if point.score is not None:
            self.score = f"score {point.score:.4f}"
        if point.steps_per_s is not None:
            self.rate = f"{point.steps_per_s:.3g} steps/s"
        told = ", ".join(part for part in (f"loss {point.loss:.4g}", self.score, self.rate) if part)
        steps = f"{point.step}/{point.steps}"
        self.progress.update(self.bar, completed=point.step, total=point.steps, steps=steps, told=told)
