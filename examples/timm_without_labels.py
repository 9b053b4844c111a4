"""A timm model and unlabelled images: the search keeps the outputs of the dense model, in two thirds of its MACs.

Run: python examples/timm_without_labels.py [model] [folder of images]
"""

import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config

import prunefront


def batches(model: torch.nn.Module, folder: Path | None, size: int = 16) -> list[torch.Tensor]:
    """Your images as the model wants them; without a folder, crops of two photographs."""
    config = resolve_model_data_config(model)
    if folder is None:
        transform = create_transform(**config, is_training=True, scale=(0.2, 1.0))
        images = [Image.fromarray(image) for image in load_sample_images().images] * 64
    else:
        transform = create_transform(**config)
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        images = [Image.open(path).convert("RGB") for path in paths]
    return list(torch.stack([transform(image) for image in images]).split(size))


def main(name: str = "test_resnet", folder: str | None = None) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=folder is not None).eval()
    calibration = batches(model, folder and Path(folder))
    result = prunefront.search(
        model,
        calibration[0][:1],
        budget={"macs": "67%"},
        calibration=calibration,  # no score: trials are guided by the fidelity to the dense outputs on these
        n_trials=10,
        run_dir=f"runs/{name}",
    )
    best = result.best
    print(f"{name}: fidelity {best.metrics['score']:.4f} (0 is the dense model) with {best.metrics['macs']:,} MACs")


if __name__ == "__main__":
    main(*sys.argv[1:])
