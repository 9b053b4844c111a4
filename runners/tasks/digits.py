"""The default task: scikit-learn's handwritten digits and a small residual network, trained on the spot."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ...search.scores import accuracy
from .base import Epoch, Task, cross_entropy


class Block(nn.Module):
    """A residual block; the shortcut is a strided 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class DigitsNet(nn.Module):
    """``(batch, 1, 8, 8)`` to ``(batch, 10)``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.block1 = Block(width, width, stride=1)
        self.block2 = Block(width, 2 * width, stride=2)
        self.block3 = Block(2 * width, 4 * width, stride=2)
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.block3(self.block2(self.block1(F.relu(self.bn(self.conv(x))))))
        return self.linear(out.mean(dim=(2, 3)))


def digits(width: int = 16, epochs: int = 20, seed: int = 0, batch_size: int = 64) -> Task:
    """1,797 images of 8 x 8 pixels: 60 % to train and calibrate, 20 % to score candidates, 20 % to test the front."""
    train, search, test = splits(seed)
    return Task(
        make_model=partial(fit, *train, width=width, epochs=epochs, seed=seed),
        example_inputs=(train[0][:1],),
        calibration=list(zip(*(values[:512].split(256) for values in train), strict=True)),
        loss=cross_entropy,
        training=partial(Epoch, *train, shifted, batch_size),
        score=accuracy(*search),
        test=accuracy(*test),
        score_name="accuracy",
        trains=True,
    )


def splits(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training, search and test images ``(n, 1, 8, 8)`` with labels ``(n,)``, stratified."""
    from sklearn.datasets import load_digits  # only this task needs scikit-learn's data sets
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 1, 8, 8) / 16).astype("float32")
    train, rest, train_labels, rest_labels = train_test_split(
        images, labels, test_size=0.4, stratify=labels, random_state=seed
    )
    search, test, search_labels, test_labels = train_test_split(
        rest, rest_labels, test_size=0.5, stratify=rest_labels, random_state=seed
    )
    pairs = [(train, train_labels), (search, search_labels), (test, test_labels)]
    return [(torch.from_numpy(x.copy()), torch.from_numpy(y.copy())) for x, y in pairs]


def fit(images: torch.Tensor, labels: torch.Tensor, width: int, epochs: int, seed: int) -> DigitsNet:
    """Train from scratch, with images shifted by up to a pixel."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitsNet(width)
        batches = max(1, len(images) // 64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=epochs * batches)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).tensor_split(batches):
                loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def shifted(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """The batch moved by -1, 0 or 1 pixels on each axis."""
    down, right = (int(n) for n in torch.randint(3, (2,), generator=generator))
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + images.shape[2], right : right + images.shape[3]]
