"""Weights & Biases: one step a trial, pictures and a table now and then, models with what they were made from."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import optuna
from optuna.trial import FrozenTrial, TrialState

from ...search import Result
from ...search.files import DENSE, METRICS, PLAN, SPACE, TUNED, WEIGHTS, folder_of, read_json, write_json
from ...search.front import GrowingFront
from ...search.problem import COLUMNS as COSTS
from ...search.study import name_of
from ..finetuning import Progress
from ..overrides import without_secret
from ..runs import is_multirun
from .figures import coordinates_figure, front_figure, front_of

#: Of a search's time, what pictures and tables on the way may take.
SHARE_OF_TIME = 0.01
LEAST_PAUSE_S = 30.0
#: Seconds that the first pictures take, Plotly's import included.
FIRST_DRAWING_S = 1.5
#: Beside W&B's files: which trials are in the table of an online run.
SENT = "prunefront-sent.json"
#: Columns of the table of trials before those of costs and groups.
FIRST_COLUMNS = ("trial", "state", "value")


class WandbTracker:
    """Weights & Biases: trials, the front so far, the table of trials, and at the end the front with its models.

    ``mode`` is online, offline or None: W&B's own setting (``WANDB_MODE``) where there is one, else online only for
    users who are logged in. A continued search continues its W&B run. A search and its fine-tunings are one group, and
    so are all runs of a multirun. ``tags`` are added to the kind of run, the task and the mode.
    """

    def __init__(
        self,
        project: str = "prunefront",
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        self.project, self.entity, self.name, self.mode, self.tags = project, entity, name, mode, list(tags)

    def start(self, config: dict[str, Any], run_dir: Path, dense: Mapping[str, float], objective: str) -> None:
        tags = [_last(config.get("task")), config.get("mode")]
        self._open(
            {**config, "dense": dict(dense)}, run_dir, self.name or run_dir.name, "search", "prunefront-id", tags
        )
        self.dense, self.objective, self.run_dir = dict(dense), objective, run_dir
        self.history: _History | None = None
        self.run.define_metric("trial")
        for key, best in (("*", "last"), ("best/*", "max"), ("hypervolume", "max")):
            self.run.define_metric(key, step_metric="trial", summary=best)

    def start_finetuning(self, config: dict[str, Any], run_dir: Path, name: str) -> None:
        self.run_dir, self.made = run_dir, name
        tags = [_last(config.get("task")), name.partition(TUNED)[2]]
        title = f"{self.name or run_dir.name}/{name}"
        self._open(config, run_dir, title, "finetune", f"{name}-id", tags)

    def _open(
        self, config: dict[str, Any], run_dir: Path, name: str, kind: str, file: str, tags: Sequence[str | None]
    ) -> None:
        """Start or continue a W&B run."""
        import wandb  # about a second, and only where it is used

        mode = self.mode or os.environ.get("WANDB_MODE")
        if mode is None and not _is_logged_in():
            mode = "offline"
        self.offline = mode == "offline"
        # Of a multirun all runs are together, with their fine-tunings.
        parent = run_dir.resolve().parent
        shared = parent if is_multirun(parent) else run_dir
        self.search_id = _identity(run_dir / "wandb" / "prunefront-id")
        with _arguments_without_secret():
            self.run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=name,
                group=f"{shared.name}-{_identity(shared / 'wandb' / 'prunefront-id')}",
                job_type=kind,
                tags=[kind, *(tag for tag in tags if tag), *self.tags],
                id=_identity(run_dir / "wandb" / file),
                resume=None if self.offline else "allow",  # several offline runs of one id are joined by `wandb sync`
                dir=run_dir,
                mode=cast(Any, mode),  # W&B checks the value
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )

    def step(self, progress: Progress) -> None:
        values = {key: value for key, value in asdict(progress).items() if value is not None and key != "steps"}
        self.run.log(values, step=values.pop("step"))

    def finish_finetuning(self, metrics: Mapping[str, Any] | None) -> None:
        if metrics is not None:
            for key, value in metrics.items():
                if isinstance(value, int | float):
                    self.run.summary[f"final/{key}"] = value
            name, _, recipe = self.made.partition(TUNED)
            made = folder_of(self.run_dir, self.made)
            if (made / METRICS).exists():  # not where Python's API was asked to save it elsewhere
                used = _artifact_name(name, self.search_id)
                self._uses(used, folder_of(self.run_dir, name))
                self._makes(_artifact_name(f"{name}-{recipe}", self.search_id), made, used)
        self.run.finish(exit_code=0 if metrics is not None else 1)

    def trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        if self.history is None:
            before = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and t.number != trial.number]
            sent = _sent(self.run_dir) if self.run.resumed else set()
            self.history = _History(study, self.dense, self.objective, self.run_dir, before, sent)
        # With several workers trials do not end in the order of their numbers, and W&B wants steps to rise.
        self.run.log(self.history.add(trial), step=self.history.ended - 1)
        if self.history.is_time():
            self._draw(self.history)

    def _draw(self, history: _History) -> None:
        """The pictures and the rows of the table that are new."""
        import wandb

        started = time.monotonic()
        front = front_figure(
            history.points,
            front_of(history.points),
            None,
            (self.dense[self.objective], self.dense.get(history.guide)),
            self.objective,
            history.guide,
        )
        pictures: dict[str, Any] = {"front/so far": wandb.Plotly(front)}
        if history.points:
            figure = coordinates_figure(history.rows, history.sizes, history.guide)
            pictures["front/widths"] = wandb.Plotly(figure)
        self.run.log({**pictures, "trials": history.table()}, step=history.ended - 1)
        write_json(self.run_dir / "wandb" / SENT, {"trials": sorted(history.sent)})
        history.took(time.monotonic() - started)

    def finish(self, result: Result | None) -> None:
        import wandb

        if result is None:
            with contextlib.suppress(Exception):  # the run ends whatever else fails
                self._draw_waiting()
            self.run.finish(exit_code=1)
            return
        self._draw_waiting()
        rows = [{"name": entry.name, **entry.metrics} for entry in result.front]
        columns: list[str | int] = list(dict.fromkeys(key for row in rows for key in row))
        table = wandb.Table(columns=columns, data=[[row.get(str(column)) for column in columns] for row in rows])
        points = [(row[result.objective], row["score"], row["name"]) for row in rows]
        dense = (self.dense[self.objective], self.dense.get("score"))
        figure = front_figure([], points, result.best.name, dense, result.objective, "score")
        self.run.log({"front/models": table, "front/score": wandb.Plotly(figure)})
        plans = wandb.Artifact(f"plans-{self.run.id}", type="plans")
        for entry in result.front:
            plans.add_file(str(entry.path / "plan.json"), name=f"{entry.name}/plan.json")
        self.run.log_artifact(plans)
        dense_name = f"dense-{self.search_id}"
        if (self.run_dir / DENSE).is_dir():
            self._uses(dense_name, self.run_dir / DENSE)
        self._makes(f"{result.best.name}-{self.search_id}", result.best.path, dense_name, aliases=["picked"])
        for prefix, metrics in (("picked", result.best.metrics), ("dense", self.dense)):
            for key, value in metrics.items():
                self.run.summary[f"{prefix}/{key}"] = value
        self.run.summary["picked/name"] = result.best.name
        self.run.summary["front/size"] = len(rows)
        self.run.finish()

    def _draw_waiting(self) -> None:
        if self.history is not None and self.history.waiting:
            self._draw(self.history)

    def _makes(self, name: str, folder: Path, made_from: str, aliases: Sequence[str] = ()) -> None:
        """The model in ``folder`` is an output of the run."""
        artifact = _model_artifact(name, folder, made_from)
        self.run.log_artifact(artifact, aliases=[*aliases, "latest"])

    def _uses(self, name: str, folder: Path) -> None:
        """The model in ``folder`` is an input of the run; W&B knows one of the same files by its digest.

        Offline runs can only log outputs: that a model was made from another is then in its metadata alone.
        """
        artifact = _model_artifact(name, folder, None)
        if self.offline:
            self.run.log_artifact(artifact)
        else:
            self.run.use_artifact(artifact)


@contextlib.contextmanager
def _arguments_without_secret() -> Iterator[None]:
    """W&B keeps the arguments of the program."""
    given = sys.argv
    sys.argv = [without_secret(argument) for argument in given]
    try:
        yield
    finally:
        sys.argv = given


def _is_logged_in() -> bool:
    """Without a word of W&B's, and without asking its server."""
    import wandb

    if wandb.run is not None:  # the user's own; nobody can log in beside it
        return not wandb.run.offline
    with contextlib.redirect_stderr(io.StringIO()):
        return wandb.login(prompt=False, verify=False)


class _History:
    """What was told so far: a new trial costs the same after ten and after ten thousand."""

    def __init__(
        self,
        study: optuna.Study,
        dense: Mapping[str, float],
        objective: str,
        run_dir: Path,
        before: Sequence[FrozenTrial],
        sent: Set[int],
    ) -> None:
        self.guide = (study.metric_names or ["score"])[0]
        self.dense, self.objective = dense, objective
        self.sizes = {group["name"]: group["size"] for group in read_json(run_dir / SPACE)["groups"]}
        self.points: list[tuple[float, float, str]] = []
        self.rows: list[dict[str, Any]] = []
        self.costs = [key for key in dense if key in COSTS]
        self.front: GrowingFront | None = None
        self.ended = 0
        self.data: Any = None
        self.drawing, self.drawn_at = FIRST_DRAWING_S, time.monotonic()
        #: Numbers of the trials that are in W&B's table, and rows that are not yet.
        self.sent, self.waiting = set(sent), list[list[Any]]()
        for trial in before:
            self.add(trial)

    def add(self, trial: FrozenTrial) -> dict[str, Any]:
        """What is logged of the trial."""
        costs, is_complete = trial.user_attrs.get("costs", {}), trial.state == TrialState.COMPLETE
        widths = trial.user_attrs.get("plan", {}).get("widths", {})
        self.ended += 1
        value = trial.values[0] if is_complete else None
        state = "complete" if is_complete else trial.user_attrs.get("error", trial.state.name.lower())
        numbers = [costs.get(key) for key in self.costs]
        if trial.number not in self.sent:
            self.waiting.append([trial.number, str(state), value, *numbers, *(widths.get(name) for name in self.sizes)])
        values: dict[str, Any] = {"trial": trial.number, "feasible": is_complete}
        values |= {f"cost/{key}": cost for key, cost in costs.items()}
        if is_complete:
            values[self.guide] = value
            self._complete(trial.values[0], costs[self.objective], trial.number, widths)
        if self.front is not None:
            values[f"best/{self.guide}"] = max(value for value, _ in self.front.points)
            values["hypervolume"] = self.front.volume
        return values

    def _complete(self, value: float, cost: float, number: int, widths: Mapping[str, int]) -> None:
        self.points.append((cost, value, name_of(number)))
        self.rows.append({"value": value, "widths": widths})
        # The hypervolume counts from 0, or from twice the first value where values are negative (losses).
        self.front = self.front or GrowingFront((min(0.0, 2 * value), self.dense[self.objective]))
        self.front.add(value, cost)

    def table(self) -> Any:
        """W&B's incremental table, with the rows that it has not got yet."""
        import wandb

        if self.data is None:
            columns = [*FIRST_COLUMNS, *self.costs, *self.sizes]
            self.data = wandb.Table(columns=cast(Any, columns), log_mode="INCREMENTAL", allow_mixed_types=True)
        for row in self.waiting:
            self.data.add_data(*row)
            self.sent.add(row[0])
        self.waiting = []
        return self.data

    def is_time(self) -> bool:
        """Whether drawing again, if it takes as long as the last time, keeps to its share of the time since then."""
        return time.monotonic() - self.drawn_at > max(LEAST_PAUSE_S, self.drawing / SHARE_OF_TIME)

    def took(self, seconds: float) -> None:
        self.drawing, self.drawn_at = seconds, time.monotonic()


def _sent(run_dir: Path) -> set[int]:
    """Numbers of the trials that earlier processes have put into the table of the W&B run, which goes on growing."""
    path = run_dir / "wandb" / SENT
    return set(read_json(path)["trials"]) if path.exists() else set()


def _artifact_name(*parts: str) -> str:
    """Of the letters that W&B takes; its end, which tells runs apart, is kept."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", "-".join(parts))[-128:]


def _model_artifact(name: str, folder: Path, made_from: str | None) -> Any:
    import wandb

    known = read_json(folder / METRICS)
    metadata = {key: value for key, value in known.items() if isinstance(value, int | float)}
    artifact = wandb.Artifact(
        name, type="model", metadata={**metadata, **({"made_from": made_from} if made_from else {})}
    )
    for file in (PLAN, WEIGHTS, METRICS):
        artifact.add_file(str(folder / file))
    return artifact


def _last(task: Any) -> str | None:
    """The name of the function that makes a task."""
    target = task.get("_target_") if isinstance(task, Mapping) else None
    return None if target is None else str(target).rpartition(".")[2]


def _identity(path: Path) -> str:
    """The name of a W&B run or group, drawn once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text()
