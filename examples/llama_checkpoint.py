"""A Llama model cut to a shape of your choice, written as a standard checkpoint that plain transformers loads.

Run: python examples/llama_checkpoint.py [checkpoint] [folder to write to]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import prunefront


def small_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))


def main(checkpoint: str | None = None, folder: str = "runs/llama") -> None:
    torch.manual_seed(0)
    model = (AutoModelForCausalLM.from_pretrained(checkpoint) if checkpoint else small_model()).eval()
    inputs = {"input_ids": torch.randint(0, model.config.vocab_size, (1, 32))}
    calibration = [{"input_ids": torch.randint(0, model.config.vocab_size, (4, 32))}]  # better: your own texts
    space = prunefront.discover(model, inputs, uniform=True, calibration=calibration)
    print("what can be set:", ", ".join(space.dimensions))
    # Sheared LLaMA 1.3B has these shares of LLaMA 2 7B (Xia et al. 2023): hidden 2048, 24 layers, 16 heads, 5504.
    plan = space.plan(
        {
            "hidden": model.config.hidden_size // 2,
            "model.layers": 3 * model.config.num_hidden_layers // 4,
            "model.layers.*.self_attn.heads": model.config.num_attention_heads // 2,
            "model.layers.*.mlp.gate_proj": model.config.intermediate_size // 2,
        }
    )
    smaller = space.apply(plan)
    smaller.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)  # knows nothing of prunefront
    with torch.no_grad():
        difference = (again(**inputs).logits - smaller(**inputs).logits).abs().max().item()
    print(f"{space.dense_cost.params:,} -> {space.cost(plan).params:,} parameters, read back within {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main(*sys.argv[1:])
