"""ResNets of He et al. 2015 for CIFAR-10, with trained weights from a folder that the user names."""

from __future__ import annotations

import io
import os
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ...search.scores import accuracy
from ...spaces.errors import ConfigError
from .base import Epoch, Task, cross_entropy

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEPTHS = (20, 56)
ARCHIVE = "cifar10_jpeg.npz"
PADDING = 4


class BasicBlock(nn.Module):
    """A shortcut that changes shape subsamples in space and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """``(batch, 3, 32, 32)`` to ``(batch, 10)``; stages of ``(depth - 2) / 6`` blocks with 16, 32, 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(BasicBlock(32 if i else 16, 32, 1 if i else 2) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(BasicBlock(64 if i else 32, 64, 1 if i else 2) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(out.mean(dim=(2, 3)))


def cifar_resnet(
    depth: int = 56,
    data: str | None = None,
    calibration_images: int = 2048,
    seed: int = 0,
    batch_size: int = 128,
) -> Task:
    """The weights have seen all training images: candidates are scored on the even test images, the front on the odd.

    ``data`` is the folder with ``cifar10_jpeg.npz`` and ``resnet<depth>_cifar10.safetensors``; by default that of the
    environment variable ``PRUNEFRONT_DATA``, or else ``../shared/data``. Scores run in bfloat16, channels last.

    Raises:
        ConfigError: unknown depth, or a file is missing.
    """
    if depth not in DEPTHS:
        raise ConfigError(f"task.depth must be one of {', '.join(map(str, DEPTHS))}, not {depth}")
    folder = data_folder(data)
    weights, archive = folder / f"resnet{depth}_cifar10.safetensors", folder / ARCHIVE
    for path in (weights, archive):
        if not path.exists():
            raise ConfigError(f"{path} does not exist; set PRUNEFRONT_DATA or task.data to the folder with {path.name}")
    with np.load(archive, allow_pickle=False) as arrays:
        test_labels = torch.from_numpy(arrays["test_label"].astype(np.int64))
        test = decode(arrays["test_jpeg"], arrays["test_offset"], np.arange(len(test_labels)))
        images = len(arrays["train_label"])
        drawn = np.random.default_rng(seed).permutation(images)[:calibration_images]
        calibration = decode(arrays["train_jpeg"], arrays["train_offset"], drawn)
        calibration_labels = torch.from_numpy(arrays["train_label"].astype(np.int64)[drawn])
    return Task(
        make_model=partial(_load_model, depth, weights),
        example_inputs=(test[:1],),
        calibration=list(zip(calibration.split(256), calibration_labels.split(256), strict=True)),
        loss=cross_entropy,
        training=Training(archive, batch_size),
        score=accuracy(test[::2].clone(), test_labels[::2]),
        test=accuracy(test[1::2].clone(), test_labels[1::2]),
        score_name="accuracy",
        autocast=torch.bfloat16,
    )


def data_folder(data: str | None = None) -> Path:
    """``data``, or what the environment variable ``PRUNEFRONT_DATA`` names, or ``../shared/data``."""
    return Path(data or os.environ.get("PRUNEFRONT_DATA", "../shared/data"))


def _load_model(depth: int, weights: Path) -> nn.Module:
    from safetensors.torch import load_file

    model = CifarResNet(depth)
    model.load_state_dict(load_file(weights))
    return model.eval().to(memory_format=torch.channels_last)


class Training:
    """Epochs of the training images, which are decoded when the first one is asked for; 150 MB of memory."""

    def __init__(self, archive: Path, batch_size: int) -> None:
        self.archive, self.batch_size = archive, batch_size

    def __call__(self, seed: int) -> Epoch:
        return Epoch(*self.pixels, augment, self.batch_size, seed)

    @cached_property
    def pixels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Bytes ``(n, 32, 32, 3)`` and labels ``(n,)``."""
        with np.load(self.archive, allow_pickle=False) as arrays:
            labels = torch.from_numpy(arrays["train_label"].astype(np.int64))
            return decode_bytes(arrays["train_jpeg"], arrays["train_offset"], np.arange(len(labels))), labels


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Bytes ``(n, 32, 32, 3)`` to normalised images ``(n, 3, 32, 32)``, channels last in memory: each image is padded
    by four black pixels, cropped to its size at a place of its own, and mirrored or not (He et al. 2015)."""
    count, size = pixels.shape[:2]
    rows, columns = (torch.randint(2 * PADDING + 1, (count, 1), generator=generator) for _ in range(2))
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    along = torch.arange(size)
    columns = columns + torch.where(mirrored, size - 1 - along, along)
    padded = F.pad(pixels, (0, 0, *[PADDING] * 4))
    images = padded[torch.arange(count).view(-1, 1, 1), (rows + along)[:, :, None], columns[:, None, :]]
    return normalised(images.permute(0, 3, 1, 2))


def decode(jpeg: NDArray[np.uint8], offsets: NDArray[np.int64], chosen: NDArray[np.int64]) -> torch.Tensor:
    """JPEG bytes to normalised images ``(len(chosen), 3, 32, 32)``, channels last in memory."""
    return normalised(decode_bytes(jpeg, offsets, chosen).permute(0, 3, 1, 2))


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Bytes to numbers, ``(n, 3, 32, 32)``."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((images / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def decode_bytes(jpeg: NDArray[np.uint8], offsets: NDArray[np.int64], chosen: NDArray[np.int64]) -> torch.Tensor:
    """JPEG bytes to pixels ``(len(chosen), 32, 32, 3)``, one byte each."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("task=cifar_resnet decodes JPEG: pip install 'prunefront[vision]'") from error

    def pixels(index: Any) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(jpeg[offsets[index] : offsets[index + 1]].tobytes())).convert("RGB"))

    return torch.from_numpy(np.stack([pixels(index) for index in chosen]))
