"""A small vision transformer on the images of ``task=cifar_resnet``, which is trained once and kept.

Run: python -m benchmarks.vit [FILE]     (PRUNEFRONT_DATA names the folder of task=cifar_resnet)

timm's ``VisionTransformer``: 16 patches of 8 x 8 pixels, 128 wide, 6 blocks of 4 heads, 1.2 million parameters; six
epochs of prunefront's own recipe.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import prunefront
from prunefront.runners.finetuning import Recipe
from prunefront.runners.tasks import Task
from prunefront.runners.tasks.cifar_resnet import cifar_resnet

WEIGHTS = Path("~/.cache/prunefront/vit_cifar10.safetensors").expanduser()
RECIPE = Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.05, epochs=6, warmup=0.1, clip_norm=1.0)


def cifar_vit(weights: Path = WEIGHTS) -> Task:
    """The data and the scores of ``task=cifar_resnet``; the model is trained where ``weights`` is missing."""
    images = cifar_resnet(20)
    if not weights.exists():
        train(images, weights)
    return replace(images, make_model=partial(load, weights))


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=10)


def load(weights: Path) -> nn.Module:
    model = small_vit()
    model.load_state_dict(load_file(weights))
    return model.eval()


def train(images: Task, weights: Path) -> None:
    assert images.training is not None and images.loss is not None
    found = prunefront.finetune(
        small_vit(),
        training=images.training,
        loss=images.loss,
        score=images.score,
        test=images.test,
        recipe=RECIPE,
        run_dir=weights.parent / "vit_cifar10",  # a killed training goes on
        callbacks=[lambda progress: progress.score is not None and print(progress, flush=True)],
        autocast=images.autocast,
        example_inputs=images.example_inputs,
    )
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(found.model.state_dict(), weights)
    print(f"trained a vision transformer: {found.metrics['test']:.2%} on the odd test images; kept in {weights}")


if __name__ == "__main__":
    cifar_vit(*map(Path, sys.argv[1:2]))
