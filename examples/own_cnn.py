"""A network of your own with a data loader of your own: half the MACs, then a little training.

Run: python examples/own_cnn.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunefront


def loader(part: slice, shuffle: bool = False) -> DataLoader:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return DataLoader(TensorDataset(images[part], torch.tensor(labels[part])), batch_size=64, shuffle=shuffle)


def train(model: nn.Module, batches: DataLoader, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, batches: DataLoader) -> float:
    with torch.no_grad():
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    return right / len(batches.dataset)


def main() -> None:
    torch.manual_seed(0)
    training, searching, testing = (
        loader(slice(0, 1000), shuffle=True),
        loader(slice(1000, 1400)),
        loader(slice(1400, None)),
    )
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    train(model, training, epochs=10)
    result = prunefront.search(
        model,
        torch.zeros(1, 1, 8, 8),
        # A mean over samples is better given sample by sample: losers are given up early.
        score=prunefront.SampleScore(list(searching), lambda output, batch: output.argmax(1) == batch[1]),
        test=lambda candidate: accuracy(candidate, testing),
        budget={"macs": "50%"},
        calibration=list(loader(slice(0, 1000))),
        n_trials=30,
        show_progress_bar=True,
        run_dir="runs/own_cnn",
    )
    smaller = train(result.best.model(), training, epochs=3)
    print(result)
    print(f"after three more epochs: {accuracy(smaller, testing):.4f}")


if __name__ == "__main__":
    main()
