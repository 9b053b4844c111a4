"""A target of your own: here a simulated microcontroller, which needs cycles for products and for bytes it moves.

Anything that can say how long a model takes is a target. A program that takes an ONNX file needs no Python at all:
prunefront search target=command 'target.command=[./on_my_board.sh,"{model}"]' budget.latency=5ms

Run: python examples/custom_target.py
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import prunefront


class Microcontroller:
    """200 MHz, a product a cycle, 4 bytes of weights a cycle, 1,000 cycles for a layer."""

    description: Mapping[str, Any] = {"target": "microcontroller", "version": 1}

    def times(
        self, models: Sequence[nn.Module], inputs: Any, settings: Any
    ) -> tuple[list[list[float]], dict[str, Any]]:
        """Seconds of several runs of each model, and facts that belong to the result."""
        return [[self.seconds(model, inputs)] * settings.least_rounds for model in models], {"clock_mhz": 200}

    def seconds(self, model: nn.Module, inputs: Any) -> float:
        cycles = 0.0

        def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
            nonlocal cycles
            weight = layer.weight
            cycles += weight.numel() + 1000 + output.numel() / output.shape[1] * weight.numel()

        hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        with torch.no_grad():
            model(*inputs.args)
        for hook in hooks:
            hook.remove()
        return cycles / 200e6


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    ).eval()
    inputs = torch.randn(1, 3, 32, 32)
    space = prunefront.discover(model, inputs)
    timing = prunefront.Timing(Microcontroller())
    calibration = [torch.randn(64, 3, 32, 32)]
    result = prunefront.search(
        model,
        inputs,
        calibration=calibration,
        budget={"latency": "50%"},
        timing=timing,
        n_trials=15,
        run_dir="runs/microcontroller",
    )
    best = result.best.metrics
    print(f"{best['latency_ms']:.2f} ms, {best['latency_ratio']:.0%} of the dense model's, with {best['macs']:,} MACs")
    print("groups:", [group.name for group in space.groups])


if __name__ == "__main__":
    main()
