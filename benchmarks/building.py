"""A part of benchmarks.candidate: seconds to build one candidate.

Every round draws a fresh plan, with a width of every group between its smallest and its whole size, and measures all
ways one after the other, each with cold caches. The floor is one contiguous copy of exactly the bytes that the
candidate keeps, into memory that is allocated for it: by torch, and by numpy, which asks the kernel for huge pages.
Torch-Pruning (`pip install torch-pruning`) needs a new graph for every candidate: its seconds are those to build it and
to prune, without the copy of the dense model. Weights are random: the time does not depend on them.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import prunefront
from benchmarks.zoo import TorchPruning, explain, least_width, timed

Built = tuple[nn.Module, Any]
Row = dict[str, Any]

#: What is measured in every round, in this order, and its heading.
WAYS = {
    "plan_s": "plan",
    "cost_s": "cost",
    "apply_s": "build",
    "floor_s": "floor (torch)",
    "floor_huge_pages_s": "floor (huge pages)",
    "deepcopy_s": "deepcopy of the dense model",
}
#: Torch-Pruning's rounds: it takes seconds.
PEER_ROUNDS = 3
#: Plans that are made and costed a round; the first is built.
PLANS = 20
#: More bytes than the caches hold.
_BUFFER = torch.zeros(1 << 28, dtype=torch.uint8)


def resnet50() -> Built:
    import torchvision

    return torchvision.models.resnet50(weights=None).eval(), torch.randn(1, 3, 64, 64)


def vit_b_16() -> Built:
    import torchvision

    return torchvision.models.vit_b_16(weights=None).eval(), torch.randn(1, 3, 224, 224)


def bert_base() -> Built:
    import transformers

    return transformers.BertModel(transformers.BertConfig()).eval(), {"input_ids": torch.arange(1, 17).view(1, 16)}


def llama_1b() -> Built:
    """The shape of TinyLlama, in bfloat16."""
    import transformers
    from transformers.initialization import no_init_weights

    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=4)
    # Initialising a billion weights in single precision takes longer than the benchmark.
    with no_init_weights():
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.eval(), {"input_ids": torch.arange(1, 9).view(1, 8)}


MODELS: dict[str, Callable[[], Built]] = {
    "resnet50": resnet50,
    "vit_b_16": vit_b_16,
    "bert_base": bert_base,
    "llama_1b": llama_1b,
}


def draw_widths(space: prunefront.Space, generator: np.random.Generator, whole_depth: bool = False) -> dict[str, int]:
    """A width between the smallest and the whole for every group; ``whole_depth``: groups of blocks stay whole."""
    widths = {}
    for group in space.groups:
        if group.blocks and whole_depth:
            continue
        width = int(generator.integers(least_width(group), group.size + 1))
        widths[group.name] = max(least_width(group), width // group.multiple_of * group.multiple_of)
    return widths


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def floors(size: int) -> tuple[float, float]:
    """Seconds to copy ``size`` bytes to memory allocated by torch, and by numpy."""
    source = torch.ones(size, dtype=torch.uint8)
    in_numpy = source.numpy()
    return cold(lambda: torch.empty_like(source).copy_(source))[0], cold(in_numpy.copy)[0]


def cold(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result, with nothing of what it reads in the caches: a search evaluates between two candidates."""
    _BUFFER.add_(1)
    return timed(function)


def mean_s(function: Callable[[Any], Any], arguments: Sequence[Any]) -> float:
    """Mean seconds of calls one after the other, as a search makes them."""
    return timed(lambda: [function(argument) for argument in arguments])[0] / len(arguments)


def measure_round(space: prunefront.Space, generator: np.random.Generator, whole_depth: bool) -> Row:
    """Seconds of every way for one fresh plan, and what it keeps."""
    widths = [draw_widths(space, generator, whole_depth) for _ in range(PLANS)]
    plans = [space.plan(drawn) for drawn in widths]
    plan_s, cost_s = mean_s(space.plan, widths), mean_s(space.cost, plans)
    apply_s, candidate = cold(lambda: space.apply(plans[0]))
    size = bytes_of(candidate)
    del candidate
    floor_s, floor_huge_pages_s = floors(size)
    deepcopy_s, _ = cold(lambda: copy.deepcopy(space.model))
    found = (plan_s, cost_s, apply_s, floor_s, floor_huge_pages_s, deepcopy_s)
    return {**dict(zip(WAYS, found, strict=True)), "kept_bytes": size}


def measure(model: nn.Module, inputs: Any, rounds: int, whole_depth: bool = False, seed: int = 0) -> Row:
    """All rounds, and the medians of what they found."""
    space = prunefront.discover(model, inputs, proof="shapes")
    generator = np.random.default_rng(seed)
    measure_round(space, generator, whole_depth)  # what is made once a space
    found = [measure_round(space, generator, whole_depth) for _ in range(rounds)]
    medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
    ratios = {
        "apply_per_floor": statistics.median(row["apply_s"] / row["floor_s"] for row in found),
        "apply_per_floor_huge_pages": statistics.median(row["apply_s"] / row["floor_huge_pages_s"] for row in found),
    }
    tensors = len([*model.parameters(), *model.buffers()])
    return {"groups": len(space.groups), "tensors": tensors, "dense_bytes": bytes_of(model), **medians, **ratios,
            "rounds": found}  # fmt: skip


def measure_peer(model: nn.Module, inputs: Any, rounds: int) -> Row:
    """Torch-Pruning: seconds to build its graph and to prune half of every group."""
    try:
        config: Any = getattr(model, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # its graph fails on key-value caches
        peer = LlamaPruning(model, inputs) if hasattr(model, "lm_head") else TorchPruning(model, inputs)
        found = [peer.time_candidate() for _ in range(rounds)]
    except Exception as error:  # the tool's errors are what is being measured
        return {"error": explain(error)}
    return {key: statistics.median(row[key] for row in found) for key in found[0]}


class LlamaPruning(TorchPruning):
    """Torch-Pruning as its ``examples/LLMs/prune_llm.py`` prunes language models."""

    def pruner(self, model: nn.Module, ratio: float) -> Any:
        import torch_pruning

        config: Any = model.config
        heads: dict[nn.Module, int] = {}
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                heads[module.q_proj] = config.num_attention_heads
                heads[module.k_proj] = heads[module.v_proj] = config.num_key_value_heads
        return torch_pruning.pruner.BasePruner(
            model,
            example_inputs=self.inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=[model.lm_head],
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=ratio,
            output_transform=lambda output: output.logits.sum(),
            in_channel_groups={},
            out_channel_groups={},
        )


def time_cell(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
    return f"{seconds:.1f} s"


def table(rows: dict[str, Row]) -> str:
    columns = ["model", "tensors", "dense", "kept", *WAYS.values(), "build / floor", "Torch-Pruning"]
    lines = [columns, ["---"] * len(columns)]
    for name, row in rows.items():
        peer = row.get("torch_pruning", {})
        line = [name, str(row["tensors"]), f"{row['dense_bytes'] / 1e6:.0f} MB", f"{row['kept_bytes'] / 1e6:.1f} MB"]
        line += [time_cell(row[way]) for way in WAYS]
        line.append(f"{row['apply_per_floor']:.1f} ({row['apply_per_floor_huge_pages']:.1f} of huge pages)")
        line.append(f"fails: {peer['error']}" if "error" in peer else time_cell(peer.get("candidate_s")))
        lines.append([cell.replace("|", "/") for cell in line])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(rounds: int = 15) -> dict[str, Row]:
    """All models; plans keep all blocks."""
    if importlib.util.find_spec("torch_pruning") is None:
        sys.exit("this compares with Torch-Pruning: pip install torch-pruning")
    warnings.filterwarnings("ignore")
    rows: dict[str, Row] = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, inputs = make()
        rows[name] = measure(model, inputs, rounds, whole_depth=True)
        rows[name]["torch_pruning"] = measure_peer(model, inputs, 1 if name == "llama_1b" else PEER_ROUNDS)
        print(f"{name}: {time_cell(rows[name]['apply_s'])}", file=sys.stderr, flush=True)
        del model
        gc.collect()
    return rows
