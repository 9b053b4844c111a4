"""A small vision transformer on the images of ``task=cifar_resnet``, which is trained once and kept.

Run: python -m benchmarks.vit [FOLDER]     (PRUNEFRONT_DATA names the folder of task=cifar_resnet)

timm's ``VisionTransformer``: 16 patches of 8 x 8 pixels, 128 wide, 6 blocks of 4 heads, 1.2 million parameters; six
epochs of prunefront's own recipe, which take twelve minutes on two cores and reach about 51 %.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import prunefront
from prunefront.runners.finetuning import Progress, Recipe
from prunefront.runners.tasks import Task
from prunefront.runners.tasks.cifar_resnet import cifar_resnet

FOLDER = Path("~/.cache/prunefront/vit_cifar10").expanduser()
RECIPE = Recipe(optimizer="adamw", lr=1e-3, weight_decay=0.05, epochs=6, warmup=0.1, clip_norm=1.0)


def cifar_vit(folder: Path = FOLDER) -> Task:
    """The data and the scores of ``task=cifar_resnet``; the model is trained where ``folder`` does not have it."""
    images = cifar_resnet(20)
    assert images.training is not None
    model = prunefront.finetune(
        small_vit(),
        training=images.training,
        loss=images.loss,
        score=images.score,
        test=images.test,
        recipe=RECIPE,
        autocast=images.autocast,
        example_inputs=images.example_inputs,
        run_dir=folder,
        callbacks=[show],
    ).model
    return replace(images, make_model=lambda: model)


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=10)


def show(progress: Progress) -> None:
    if progress.score is not None:
        print(f"epoch {progress.epoch:.0f}: {progress.score:.2%} of the even test images", flush=True)


if __name__ == "__main__":
    cifar_vit(*map(Path, sys.argv[1:2]))
