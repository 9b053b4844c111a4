"""Uniform spaces of Hugging Face models: what the configuration says is what the candidate is."""

import pytest
import torch

import prunefront
from tests.models import build

transformers = pytest.importorskip("transformers")

#: What a uniform space of each model searches.
DIMENSIONS = {
    "llama": {"hidden", "model.layers.*.self_attn.kv_groups", "model.layers.*.self_attn.query_heads",
              "model.layers.*.mlp.gate_proj", "model.layers"},
    "qwen3": {"hidden", "model.layers.*.self_attn.kv_groups", "model.layers.*.self_attn.query_heads",
              "model.layers.*.mlp.gate_proj", "model.layers"},
    "mixtral": {"hidden", "model.layers.*.self_attn.kv_groups", "model.layers.*.self_attn.query_heads",
                "model.layers.*.mlp.experts", "model.layers.*.mlp.gate.experts", "model.layers"},
    "gpt2": {"transformer.h.*.mlp.c_fc", "transformer.h"},
    "bert": {"bert.encoder.layer.*.intermediate.dense", "bert.encoder.layer"},
    "t5": {"head:4", "neuron:80"},
}  # fmt: skip


@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_uniform_candidate_loads_again_from_its_configuration(name, tmp_path):
    model, inputs = build(name)
    space = prunefront.discover(model, inputs, uniform=True)
    assert set(space.dimensions) == DIMENSIONS[name]
    for ratio in (0.3, 0.6):
        candidate = space.apply(space.uniform(ratio)).eval()
        candidate.save_pretrained(tmp_path / str(ratio))
        again = type(model).from_pretrained(tmp_path / str(ratio)).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, candidate(**inputs).logits)
    assert model.config.to_dict() == build(name)[0].config.to_dict()


def test_lists_of_the_configuration_are_cut_if_they_are_of_layers():
    model, inputs = build("llama")
    layers = model.config.num_hidden_layers
    model.config.eos_token_id, model.config.layer_types = list(range(layers)), ["full_attention"] * layers
    candidate = prunefront.discover(model, inputs, uniform=True)
    candidate = candidate.apply(candidate.plan({"model.layers": layers - 1}))
    assert candidate.config.eos_token_id == list(range(layers)) and len(candidate.config.layer_types) == layers - 1


@pytest.mark.parametrize("extra", [{}, {"use_cache": False}, {"attention_mask": torch.ones(2, 10, dtype=torch.long)}])
def test_shapes_alone_prove_what_numbers_do(extra):
    """The attention mask's code asks for values, which the meta device does not have."""
    model, inputs = build("llama")
    spaces = [prunefront.discover(model, inputs | extra, proof=proof) for proof in ("full", "shapes")]
    assert spaces[0].groups == spaces[1].groups and spaces[0].groups


def test_a_pruned_language_model_generates():
    model, inputs = build("llama")
    space = prunefront.discover(model, inputs)
    candidate = space.apply(space.uniform(0.4)).eval()
    tokens = candidate.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(tokens[:, -1], candidate(tokens[:, :-1]).logits[:, -1].argmax(-1))


LLAMA_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 4096, "head_dim": 128}  # fmt: skip


def test_a_llama_of_seven_billion_is_planned_without_weights():
    """The shapes of LLM-Shearing (Xia et al. 2023): 1.3B and 2.7B from Llama-2-7B."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B))
        tokens = torch.ones(1, 16, dtype=torch.long)
    space = prunefront.discover(model, {"input_ids": tokens, "use_cache": False}, uniform=True)
    assert space.dense_cost.params == 6_738_415_616
    for hidden, heads, layers, neurons in ((2048, 16, 24, 5504), (2560, 20, 32, 6912)):
        plan = space.plan(
            {
                "hidden": hidden,
                "model.layers": layers,
                "model.layers.*.self_attn.heads": heads,
                "model.layers.*.mlp.gate_proj": neurons,
            }
        )
        sizes = {"hidden_size": hidden, "intermediate_size": neurons}
        sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads}
        with torch.device("meta"):
            fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_7B | sizes))
        expected = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
        candidate = space.apply(plan)
        assert {name: tuple(tensor.shape) for name, tensor in candidate.state_dict().items()} == expected
        assert space.cost(plan).params == sum(parameter.numel() for parameter in fresh.parameters())
        assert all(getattr(candidate.config, key) == value for key, value in sizes.items())
