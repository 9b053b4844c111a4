"""Exports, each read back by its own program."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import prunefront
from prunefront.runners.cli import main
from prunefront.runners.exporting.formats import export_onnx, export_pt2
from prunefront.search.files import resolve
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
    from safetensors.torch import load_file

    assert load_file(folder / "safetensors" / "model.safetensors").keys() == prunefront.load(run).state_dict().keys()


def test_what_cannot_be_exported_says_why(run, capsys):
    assert main(["export", str(run), "format=tflite"]) == 1 and "format must be one of onnx" in capsys.readouterr().err
    assert (
        main(["export", str(run), "format=huggingface"]) == 1 and "no model of transformers" in capsys.readouterr().err
    )
    assert main(["export", str(run), "pick=trial9999+sgd"]) == 1 and "has no trial9999+sgd" in capsys.readouterr().err


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
        Inputs(kwargs={"x": torch.randn(size, 4), "scale": torch.tensor([2.0]), "bias": 0.5}) for size in (2, 3)
    ]
    export_onnx(Named().eval(), examples, tmp_path / "a.onnx")
    export_pt2(Named().eval(), examples, tmp_path / "a.pt2")
