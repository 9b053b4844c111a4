"""Models that must be unwrapped first: refused with what to do."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize

from .errors import ModelError

#: Classes that hide or replace the weights, and what to do about them.
_WRAPPERS = {
    "DataParallel": "pass model.module",
    "DistributedDataParallel": "pass model.module",
    "FullyShardedDataParallel": "prune the model before it is sharded",
    "OptimizedModule": "pass the model that torch.compile was given, and compile the pruned one afterwards",
    "PeftModel": "merge the adapters first: model = model.merge_and_unload()",
    "ScriptModule": "pass the Python model instead of the script",
    "GraphModule": "pass the model that the graph was made from",
}

#: What marks where a model is to be quantised.
_STUBS = {f"torch.ao.quantization.stubs.{name}" for name in ("QuantStub", "DeQuantStub", "QuantWrapper")}
_STUBS |= {"torch.ao.nn.quantized.modules.functional_modules.FloatFunctional"}


def check_model(model: nn.Module) -> None:
    """Refuse models whose weights are not what the forward multiplies with.

    Raises:
        ModelError: with what to do.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"an object of type {type(model).__name__}"
        raise ModelError(f"model must be an instance of torch.nn.Module, not {what}")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and not cls.__module__.startswith("prunefront"):
                raise ModelError(f"{where} is a wrapper: {_WRAPPERS[cls.__name__]}")
        if type(module).__module__.startswith("peft."):
            raise ModelError(f"{where} is an adapter: merge it first: model = model.merge_and_unload()")
        if _is_idle_stub(module):
            continue
        if type(module).__module__.startswith(("torch.ao.quantization", "torchao.quantization")):
            raise ModelError(f"{where} observes for quantisation: prune the model before it is prepared for that")
        if "quantized" in type(module).__module__ or any(_is_quantised(p) for p in module.parameters(recurse=False)):
            raise ModelError(f"{where} is quantised: prune the model first, and quantise the pruned one")
        if parametrize.is_parametrized(module):
            raise ModelError(
                f"{where} computes its weight by a parametrization: make it plain first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, tensor_name)"
            )
        if any(type(hook).__name__ in ("WeightNorm", "SpectralNorm") for hook in module._forward_pre_hooks.values()):
            raise ModelError(
                f"{where} computes its weight in a hook: make it plain first: "
                "torch.nn.utils.remove_weight_norm(module) or remove_spectral_norm(module)"
            )
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(type(hook).__module__ == "torch.nn.utils.prune" for hook in module._forward_pre_hooks.values()):
            raise ModelError(
                f"{where} masks its weight in a hook: make it plain first: "
                "torch.nn.utils.prune.remove(module, tensor_name)"
            )
        if any(isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in tensors):
            raise ModelError(f"{where} has no weights yet: run the model once on the example inputs first")


def _is_idle_stub(module: nn.Module) -> bool:
    """Whether it marks where a model may be quantised and observes nothing yet: identity or plain arithmetic."""
    is_stub = f"{type(module).__module__}.{type(module).__qualname__}" in _STUBS
    return is_stub and type(getattr(module, "activation_post_process", None)) in (nn.Identity, type(None))


def _is_quantised(tensor: torch.Tensor) -> bool:
    subclass = type(tensor) not in (torch.Tensor, nn.Parameter, UninitializedParameter)
    return tensor.is_quantized or (subclass and "quant" in type(tensor).__module__) or not _is_plain(tensor.dtype)


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex or dtype in (torch.bool, torch.int64, torch.int32)
