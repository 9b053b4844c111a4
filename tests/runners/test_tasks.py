"""Every task keeps the contract; the CIFAR loader reads the published file format."""

import pytest
import torch

import prunefront
from prunefront.runners.tasks.base import Epoch
from prunefront.runners.tasks.cifar_resnet import (
    MEAN,
    STD,
    Training,
    augment,
    cifar_resnet,
    normalised,
)
from prunefront.runners.tasks.custom import custom
from prunefront.runners.tasks.digits import DigitsNet, digits, splits
from prunefront.search.candidates import checked_score, precision
from prunefront.search.scores import accuracy
from prunefront.spaces.errors import ConfigError


def batches():
    return [(torch.zeros(130, 1, 8, 8), torch.zeros(130))]


def constant(model):
    return 1.0


@pytest.fixture(params=["digits", "cifar_resnet", "custom"])
def task(request, cifar_folder):
    makers = {
        "digits": lambda: digits(width=4, epochs=1),
        "cifar_resnet": lambda: cifar_resnet(20, str(cifar_folder), calibration_images=140),
        "custom": lambda: custom(
            DigitsNet(4),
            f"{__name__}.constant",
            calibration=batches(),
            loss="prunefront.runners.tasks.base.cross_entropy",
            training=[(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))],
            autocast="bfloat16",
        ),
    }
    return makers[request.param]()


def test_every_task_can_be_searched(task, tmp_path):
    model = task.make_model().eval()
    model(*task.example_inputs)
    with precision(model, task.autocast):
        for function in filter(None, (task.score, task.test)):
            checked_score(function(model), "score")
    result = prunefront.search(
        model,
        task.example_inputs,
        score=task.score,
        test=task.test,
        budget={"macs": "60%"},
        calibration=task.calibration,
        n_trials=1,
        run_dir=tmp_path,
        autocast=task.autocast,
    )
    assert prunefront.load(tmp_path)(*task.example_inputs).shape == model(*task.example_inputs).shape
    assert result.space.groups


def test_every_task_gives_epochs_of_training_batches(task):
    model = task.make_model().train()
    first, again, other = (list(task.training(seed)) for seed in (1, 1, 2))
    assert len(first) == len(task.training(1)) and len(other) == len(first)
    for batch, same in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
    loss = task.loss(model(first[0][0]), first[0])
    assert loss.dim() == 0 and loss.requires_grad


def test_an_epoch_has_every_image_once_in_another_order():
    images = torch.arange(10)
    seen = [torch.cat([y for _, y in Epoch(images, images, lambda x, _: x, 4, seed)]) for seed in (0, 1)]
    assert [sorted(labels.tolist()) for labels in seen] == [images.tolist()] * 2 and not torch.equal(*seen)


def test_cifar_augmentation_crops_padded_images_and_mirrors_half():
    pixels = torch.randint(1, 256, (64, 32, 32, 3), dtype=torch.uint8)
    made = augment(pixels, torch.Generator().manual_seed(0))
    assert made.shape == (64, 3, 32, 32) and made.is_contiguous(memory_format=torch.channels_last)
    padded = torch.nn.functional.pad(pixels.permute(0, 3, 1, 2), (4, 4, 4, 4))
    mirrored, places = 0, set()
    for image, whole in zip(made, padded, strict=True):
        crops = {
            (down, right, flip): whole[:, down : down + 32, right : right + 32].flip((2,) if flip else ())
            for down in range(9)
            for right in range(9)
            for flip in (False, True)
        }
        (found,) = (key for key, crop in crops.items() if torch.allclose(normalised(crop[None])[0], image))
        mirrored += found[2]
        places.add(found[:2])
    assert 16 < mirrored < 48 and len(places) > 25


def test_cifar_training_images_are_those_of_the_archive(cifar_folder):
    (images, labels), *_ = Training(cifar_folder / "cifar10_jpeg.npz", 150)(0)
    assert len(images) == 150 and sorted(labels.tolist()) == sorted(i % 10 for i in range(150))


def test_cifar_images_are_decoded_normalised_and_split_by_parity(cifar_folder):
    task = cifar_resnet(20, str(cifar_folder), calibration_images=140)
    (_, search_labels), (test_images, test_labels) = task.score.batches[0], task.test.batches[0]
    assert search_labels.tolist() == [0, 2, 4, 6, 8, 0] and test_labels.tolist() == [1, 3, 5, 7, 9, 1]
    third = test_images[2] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert torch.allclose(third.mean(dim=(1, 2)) * 255, torch.tensor([5.0, 10.0, 100.0]), atol=2)
    assert sum(len(images) for images, _ in task.calibration) == 140


def test_digits_splits_share_no_image():
    parts = splits(seed=0)
    assert [len(labels) for _, labels in parts] == [1078, 359, 360]
    assert all(set(labels.tolist()) == set(range(10)) for _, labels in parts)


def test_digits_training_learns_and_is_reproducible():
    first, second = (digits(width=4, epochs=4) for _ in range(2))
    model = first.make_model()
    assert first.score(model) > 0.6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.make_model().parameters(), strict=True))


def test_accuracy_counts_right_answers():
    images, labels = torch.eye(5), torch.tensor([0, 1, 2, 0, 0])
    assert accuracy(images, labels, batch_size=2)(torch.nn.Identity()) == pytest.approx(3 / 5)


def test_bad_tasks(cifar_folder, tmp_path):
    with pytest.raises(ConfigError, match="20, 56"):
        cifar_resnet(18, str(cifar_folder))
    with pytest.raises(ConfigError, match="resnet56_cifar10"):
        cifar_resnet(56, str(cifar_folder))
    with pytest.raises(ConfigError, match="cannot be imported"):
        custom(DigitsNet(4), "nowhere.accuracy", calibration=batches())
    with pytest.raises(ConfigError, match="example_inputs"):
        custom(DigitsNet(4), f"{__name__}.constant")
    with pytest.raises(ConfigError, match="bfloat16, float16"):
        custom(DigitsNet(4), f"{__name__}.constant", calibration=batches(), autocast="int8")
