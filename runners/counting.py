"""Costs by torch's own counter, which knows nothing of spaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..spaces.inputs import Inputs


def counted(model: nn.Module, inputs: Inputs) -> tuple[Any, dict[str, int]]:
    """The output of one forward pass, its MACs, and the model's parameters; ``inputs`` lie where the model does."""
    from torch.utils.flop_counter import FlopCounterMode  # few commands need it, and it imports much

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        output = inputs.call(model)
    params = sum(parameter.numel() for parameter in model.parameters())
    return output, {"macs": counter.get_total_flops() // 2, "params": params}
