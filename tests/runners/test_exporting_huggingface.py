"""Uniform candidates as checkpoints that plain transformers loads."""

import json

import pytest
import torch

import prunefront
from prunefront.runners.exporting.huggingface import export_huggingface
from prunefront.runners.exporting.inputs import stored_inputs
from prunefront.search.saved import save_model
from prunefront.spaces.errors import ConfigError, StorageError
from tests.models import build

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "auto"),
    [("llama", "AutoModelForCausalLM"), ("gpt2", "AutoModelForCausalLM"),
     ("bert", "AutoModelForSequenceClassification"), ("t5", "AutoModelForSeq2SeqLM")],
)  # fmt: skip
def test_plain_transformers_loads_what_was_exported(name, auto, tmp_path):
    model, inputs = build(name)
    space = prunefront.discover(model, inputs, uniform=True)
    plan = space.uniform(0.5)
    candidate = space.apply(plan).eval()
    folder = export_huggingface(candidate, tmp_path / "out", inputs, widths=plan.widths)
    loaded = getattr(transformers, auto).from_pretrained(folder).eval()
    assert type(loaded) is type(model)
    assert sum(p.numel() for p in loaded.parameters()) == space.cost(plan).params < space.dense_cost.params
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, candidate(**inputs).logits)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}
    with pytest.raises(StorageError, match="exists already"):
        export_huggingface(candidate, folder, inputs)


def test_the_configuration_says_the_widths(tmp_path):
    model, inputs = build("llama")
    space = prunefront.discover(model, inputs, uniform=True)
    widths = {"hidden": 24, "model.layers": 2, "model.layers.*.mlp.gate_proj": 30}
    candidate = space.apply(space.plan(widths))
    export_huggingface(candidate, tmp_path / "out", inputs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]) == (24, 2, 30)
    assert config["head_dim"] == model.config.hidden_size // model.config.num_attention_heads


def test_layers_that_differ_are_named(tmp_path):
    model, inputs = build("llama")
    space = prunefront.discover(model, inputs)
    plan = space.plan({"model.layers.0.mlp.gate_proj": 30, "model.layers.1.mlp.gate_proj": 20})
    size = model.config.intermediate_size
    told = rf"model\.layers\.\*\.mlp\.gate_proj keeps 20, 30, {size}.* space=uniform"
    with pytest.raises(ConfigError, match=told):
        export_huggingface(space.apply(plan), tmp_path / "out", inputs, widths=plan.widths)
    with pytest.raises(ConfigError, match=r"gate_proj.weight has \(30, .* space=uniform"):
        export_huggingface(space.apply(plan), tmp_path / "out", inputs)
    assert not list(tmp_path.iterdir())


def test_a_rotary_that_the_configuration_cannot_say_is_seen_on_stored_inputs(tmp_path):
    """Attention alone depends on it: with one token everywhere nothing would."""
    model, inputs = build("llama")
    model.model.rotary_emb.inv_freq.mul_(3.0)
    save_model(tmp_path / "saved", model, None, {}, inputs)
    with pytest.raises(StorageError, match="another function"):
        export_huggingface(model, tmp_path / "out", stored_inputs(tmp_path / "saved"))


def test_options_of_generating_that_transformers_refuses_are_explained(tmp_path):
    model, inputs = build("llama")
    model.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(ConfigError, match=r"does not save the model: .*do_sample = True"):
        export_huggingface(model, tmp_path / "out", inputs)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_configuration_says_another_function_is_refused(tmp_path):
    model, inputs = build("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()  # its configuration still says silu
    with pytest.raises(StorageError, match="another function"):
        export_huggingface(model, tmp_path / "out", inputs)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no model of transformers"):
        export_huggingface(torch.nn.Linear(2, 2), tmp_path / "out", torch.ones(1, 2))
