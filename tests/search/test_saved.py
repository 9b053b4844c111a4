"""Saved models: what comes back, and what damage does."""

import json
import shutil

import pytest
import torch
from test_search import CALIBRATION, fidelity, make_model, run

import prunefront
from prunefront.search import files
from prunefront.spaces.errors import StorageError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run"), test=fidelity)


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished.best.path, tmp_path / "copy")


def test_a_saved_model_is_the_one_that_was_tested(finished):
    for entry in finished.front:
        loaded = prunefront.load(entry.path)
        assert fidelity(loaded) == pytest.approx(entry.metrics["test"], rel=1e-5)
        assert json.loads((entry.path / "metrics.json").read_text()) == dict(entry.metrics)
    assert torch.equal(
        prunefront.load(finished.run_dir)(CALIBRATION[0]), prunefront.load(finished.best.path)(CALIBRATION[0])
    )


def test_the_front_folder_is_the_front(finished):
    assert {p.name for p in (finished.run_dir / "front").iterdir()} == {entry.name for entry in finished.front}


def test_loading_into_a_dense_model(finished):
    loaded = prunefront.load(finished.best.path, model=make_model())
    assert torch.equal(loaded(CALIBRATION[0]), prunefront.load(finished.best.path)(CALIBRATION[0]))


def test_a_model_that_json_cannot_express_asks_for_the_dense_one(tmp_path):
    def with_lambda():
        model = make_model()
        model.forward_scale = lambda x: x
        model.register_forward_hook(lambda module, args, output: module.forward_scale(output) * 2)
        return model

    result = run(tmp_path, model=with_lambda())
    with pytest.raises(StorageError, match="model=dense_model"):
        prunefront.load(result.best.path)
    loaded = prunefront.load(result.best.path, model=with_lambda())
    assert fidelity(loaded) == pytest.approx(fidelity(result.best.model()), rel=1e-5)


@pytest.mark.parametrize("name", ["weights.safetensors", "plan.json"])
def test_truncated_files_are_refused(folder, name):
    content = (folder / name).read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        (folder / name).write_bytes(content[:length])
        with pytest.raises(StorageError, match=f"{name}.*(damaged|truncated)"):
            prunefront.load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "plan.json"])
def test_a_changed_byte_is_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    position = content.rindex(b"1") if name == "plan.json" else len(content) - 7
    content[position] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(StorageError, match="checksum"):
        prunefront.load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "plan.json"])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(StorageError, match=name):
        prunefront.load(folder)


def test_another_format_is_refused(folder):
    content = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(StorageError, match="format 99"):
        prunefront.load(folder)


def test_a_damaged_saved_model_is_written_again_by_the_next_search(tmp_path):
    first = run(tmp_path)
    (first.best.path / "weights.safetensors").write_bytes(b"")
    assert fidelity(prunefront.load(run(tmp_path).best.path)) == pytest.approx(first.best.metrics["score"], rel=1e-4)


def test_a_json_file_that_is_far_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(files, "JSON_LIMIT", 10)
    with pytest.raises(StorageError, match=r"plan\.json has more than"):
        prunefront.load(folder)
