"""Exports, each read back by its own program."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.exporting.card import write_card
from prunefront.runners.exporting.formats import export_onnx, export_openvino, export_pt2, export_safetensors
from prunefront.runners.exporting.inputs import stored_inputs
from prunefront.runners.runs import read_run
from prunefront.search.files import PLAN, digest, read_json, resolve, write_json
from prunefront.search.saved import save_model
from prunefront.spaces.errors import ConfigError
from prunefront.spaces.inputs import Inputs


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


def expected(run, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return prunefront.load(run)(images).numpy()


def test_onnx_and_openvino_files_give_the_models_outputs_at_any_batch_size(run, capsys):
    import onnxruntime
    import openvino

    assert main(["export", str(run), "licence=MIT"]) == 0 and main(["export", str(run), "format=openvino"]) == 0
    folder = resolve(run) / "export"
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    compiled = openvino.Core().compile_model(
        folder / "openvino" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for size in (1, 7):
        images = torch.randn(size, 1, 8, 8)
        wanted = expected(run, images)
        assert session.run(None, {"input0": images.numpy()})[0] == pytest.approx(wanted, rel=1e-3, abs=1e-3)
        assert compiled([images.numpy()])[0] == pytest.approx(wanted, rel=1e-3, abs=1e-3)
    card = (folder / "onnx" / "README.md").read_text()
    assert "licence of the model that was pruned: MIT" in card and "macs 50%" in card and "not fine-tuned" in card
    assert not list((folder / "openvino").glob("*.onnx")) and str(folder) in capsys.readouterr().out


def test_programs_of_torch_export_and_weights(run):
    assert (
        main(["export", str(run), "format=pt2", "pick=all"]) == 0
        and main(["export", str(run), "format=safetensors"]) == 0
    )
    folder, images = resolve(run) / "export", torch.randn(5, 1, 8, 8)
    found = torch.export.load(folder / "pt2" / "model.pt2").module()(images)
    assert found.detach().numpy() == pytest.approx(expected(run, images), abs=1e-5)
    assert load_file(folder / "safetensors" / "model.safetensors").keys() == prunefront.load(run).state_dict().keys()


def test_what_cannot_be_exported_says_why(run, capsys):
    assert main(["export", str(run), "format=tflite"]) == 1 and "format must be one of onnx" in capsys.readouterr().err
    assert (
        main(["export", str(run), "format=huggingface"]) == 1 and "no model of transformers" in capsys.readouterr().err
    )
    assert main(["export", str(run), "pick=trial9999+sgd"]) == 1 and "has no trial9999+sgd" in capsys.readouterr().err


def test_several_models_have_a_folder_each(run, tmp_path):
    names = {read_run(run)["picked"], "dense"}
    options = ["format=safetensors", f"pick=[{','.join(names)}]", f"path={tmp_path}/out"]
    assert main(["export", str(run), *options]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert {path.name for path in (tmp_path / "out" / name).iterdir()} == {"model.safetensors", "README.md"}


def test_cards_say_what_a_model_went_through(run, tmp_path):
    assert main(["export", str(run), "pick=dense", "format=safetensors", f"path={tmp_path}/out"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "nothing of it was pruned" in card and "tructurally pruned" not in card and "| 100.0% |" in card
    described = read_run(run)
    described["space"]["search"]["tuning"] = "5 steps of sgd, lr 0.1"
    for metrics, told in (({}, ""), ({"steps": 7}, ", fine-tuned for 7 steps")):
        write_card(tmp_path / "card.md", "a", described, metrics, {"conv": 3}, "MIT")
        assert f"trained in its trial (5 steps of sgd, lr 0.1){told}\n" in (tmp_path / "card.md").read_text()


class Tied(nn.Module):
    """Two names of one weight, and a buffer that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, ids):
        return self.head(self.tokens(ids) * self.scale)


def test_weights_are_loaded_by_load_state_dict(tmp_path):
    model, fresh = Tied(), Tied()
    export_safetensors(model, [], tmp_path / "a.safetensors")
    fresh.load_state_dict(load_file(tmp_path / "a.safetensors"))
    assert torch.equal(fresh.head.weight, model.tokens.weight)


def test_stored_inputs_vary_within_what_the_model_takes(tmp_path):
    ids, mask = torch.arange(8).view(2, 4), torch.ones(2, 4, dtype=torch.long)
    example = {
        "input_ids": ids, "attention_mask": mask, "kinds": torch.zeros_like(ids), "hidden_padding": mask.bool(),
        "label_mask": 5 * mask, "images": torch.ones(2, 3), "use_cache": False,
    }  # fmt: skip
    save_model(tmp_path / "saved", Tied(), None, {}, example)
    made, again = (stored_inputs(tmp_path / "saved", 64).kwargs for _ in range(2))
    assert set(made["input_ids"].unique().tolist()) == set(range(8)) and made["input_ids"].shape == (64, 4)
    assert all(torch.equal(made[name], again[name]) for name in ("input_ids", "images"))
    filled = {"attention_mask": 1, "kinds": 0, "hidden_padding": False, "label_mask": 5}
    assert {name: made[name].unique().item() for name in filled} == filled
    assert made["use_cache"] is False and made["images"].std() > 0
    content = read_json(tmp_path / "saved" / PLAN)
    del content["keyword_inputs"]["input_ids"]["largest"]  # as folders of before
    del content["sha256"]
    write_json(tmp_path / "saved" / PLAN, content | {"sha256": digest(content)})
    assert not stored_inputs(tmp_path / "saved").kwargs["input_ids"].any()


@pytest.mark.parametrize("write", [export_onnx, export_openvino, export_pt2])
def test_models_of_bfloat16_are_exported(write, tmp_path, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).bfloat16().eval()
    examples = [Inputs.of(torch.randn(size, 3, 4, 4).bfloat16()) for size in (2, 3)]
    path = tmp_path / ("a.xml" if write is export_openvino else "a")
    write(model, examples, path)
    assert path.exists() and model[0].weight.dtype == torch.bfloat16
    assert caplog.text.count("the file of float32") == (write is not export_pt2)


class Fixed(nn.Module):
    """Has the batch size written in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x.reshape(2, 4))


def test_a_batch_size_in_the_forward_is_found_out(tmp_path):
    examples = [Inputs.of(torch.randn(size, 4)) for size in (2, 3)]
    with pytest.raises(ConfigError, match="dynamic_batch=false"):
        export_onnx(Fixed().eval(), examples, tmp_path / "a.onnx")
    with pytest.raises(ConfigError, match="dynamic_batch=false"):
        export_pt2(Fixed().eval(), examples, tmp_path / "a.pt2")
    export_onnx(Fixed().eval(), examples[:1], tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").exists()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, scale=None, bias=0.0):
        return {"out": self.linear(x) * (1 if scale is None else scale) + bias}


def test_keyword_inputs_and_plain_values_are_exported(tmp_path):
    examples = [
        Inputs(kwargs={"bias": 0.5, "scale": torch.tensor([2.0]), "x": torch.randn(size, 4)}) for size in (2, 3)
    ]
    export_onnx(Named().eval(), examples, tmp_path / "a.onnx")
    export_pt2(Named().eval(), examples, tmp_path / "a.pt2")
