"""``prunefront export``: a picked model of a run as a file of other programs, checked, with a card beside it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.filesize import decimal

from ...search.files import METRICS, read_json, read_plan
from ...search.saved import load
from ...spaces.errors import ConfigError
from ..display import console, errors
from ..modules import import_modules
from ..picking import picks
from ..runs import folder_of, models_of, read_run
from .card import write_card
from .formats import FORMATS
from .huggingface import export_huggingface
from .inputs import stored_inputs

HUGGINGFACE = "huggingface"
CARD = "README.md"


def command(config: DictConfig) -> None:
    """Write a picked model as ONNX, a torch.export program, safetensors, OpenVINO or a Hugging Face checkpoint."""
    known = [*FORMATS, HUGGINGFACE]
    if config.format not in known:
        raise ConfigError(f"format must be one of {', '.join(known)}, not {config.format!r}")
    import_modules(config.modules)
    run_dir = Path(config.run)
    run = read_run(run_dir)
    names = picks(run, config.pick, models_of(run))
    for name in names:
        source = folder_of(run_dir, name)
        folder = Path(config.path) if config.path else source / "export" / config.format
        if config.path and len(names) > 1:
            folder /= name
        with errors.status(f"exporting {source}"):
            export(source, folder, config.format, config.dynamic_batch)
            widths = read_plan(source)["widths"]
            write_card(
                folder / CARD, f"{run_dir.name}/{name}", run, read_json(source / METRICS), widths, config.licence
            )
        console.print(f"{config.format}  {folder}", soft_wrap=True, highlight=False)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        told = f"{decimal(size)}, read again and compared with the model"
        alone = "; weights alone, without the model's structure" if config.format == "safetensors" else ""
        console.print(told + alone, style="dim", highlight=False)


def export(source: Path, folder: Path, name: str, dynamic_batch: bool) -> None:
    """The saved model in ``source`` in the format ``name``, run and compared, in ``folder``.

    Raises:
        ConfigError: the format cannot take the model.
        StorageError: the model cannot be loaded, or the folder holds something else.
    """
    model = load(source)
    if name == HUGGINGFACE:
        export_huggingface(model, folder, stored_inputs(source), widths=read_plan(source)["widths"])
        return
    write, ending = FORMATS[name]
    folder.mkdir(parents=True, exist_ok=True)
    sizes, path = (2, 3, 1) if dynamic_batch else (None,), folder / f"model{ending}"
    try:
        write(model.cpu(), [stored_inputs(source, size) for size in sizes], path)
    except ConfigError:
        path.unlink(missing_ok=True)  # what differs from the model must not be taken for it
        raise
