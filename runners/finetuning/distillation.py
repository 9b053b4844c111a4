"""Losses: the task's own, label smoothing, and what is learnt from a teacher (Hinton et al. 2015)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...spaces.errors import FinetuneError
from ...spaces.inputs import Inputs, output_tensors
from ...spaces.surgery import dense_names
from ...spaces.trace import evaluating
from .recipe import Distill, Recipe

Loss = Callable[[Any, Any], torch.Tensor]
Hidden = dict[str, torch.Tensor]


class Objective:
    """The loss of one batch, inside the precision that the caller has set. Use it as a context."""

    def __init__(self, model: nn.Module, loss: Loss | None, recipe: Recipe, teacher: nn.Module | None) -> None:
        self.model, self.loss, self.recipe, self.teacher = model, loss, recipe, teacher
        self.stack = ExitStack()
        self.mine: Hidden = {}
        self.theirs: Hidden = {}

    def __enter__(self) -> Objective:
        if self.teacher is not None:
            self.stack.enter_context(evaluating(self.teacher))
            if self.recipe.distill.hidden:
                mine, theirs = layers(self.model), layers(self.teacher)
                names = sorted(mine.keys() & theirs.keys())
                self.mine = self.stack.enter_context(outputs_of_modules(self.model, {n: mine[n] for n in names}))
                self.theirs = self.stack.enter_context(outputs_of_modules(self.teacher, {n: theirs[n] for n in names}))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def __call__(self, inputs: Inputs, batch: Any) -> torch.Tensor:
        self.mine.clear()  # layers may be skipped at random
        self.theirs.clear()
        output = inputs.call(self.model)
        loss = self._own(output, batch)
        text = (inputs.kwargs or {}).get("attention_mask")
        if smoothing := self.recipe.label_smoothing:
            loss = (1 - smoothing) * loss + smoothing * uniform_cross_entropy(logits_of(output), text)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            taught = inputs.call(self.teacher)
        distill = self.recipe.distill
        if distill.weight:
            learnt = distillation_loss(logits_of(output), logits_of(taught), distill, text)
            loss = (1 - distill.weight) * loss + distill.weight * learnt
        if distill.hidden:
            loss = loss + distill.hidden * hidden_loss(self.mine, self.theirs, text)
        return loss

    def _own(self, output: Any, batch: Any) -> torch.Tensor:
        if self.loss is not None:
            return self.loss(output, batch)
        learns_all = self.teacher is not None and self.recipe.distill.weight == 1
        if learns_all and not (isinstance(output, Mapping) and output.get("loss") is not None):
            return logits_of(output).new_zeros(())  # without labels
        return _own_loss(output)


def _own_loss(output: Any) -> torch.Tensor:
    """Hugging Face models return their loss where a batch has labels."""
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(loss, torch.Tensor):
        raise FinetuneError(
            "the model's output has no loss of its own; pass loss=, a function of an output and a batch"
        )
    return loss


def logits_of(output: Any) -> torch.Tensor:
    """What a classifier or a language model returns, classes last; those of a dense prediction ``(n, classes, height,
    width)`` are moved there.

    Raises:
        FinetuneError: there are several outputs, or one number a sample.
    """
    tensors = output_tensors(output)
    if len(tensors) != 1:
        raise FinetuneError(
            f"label smoothing and distillation need a model that returns logits, and this one returns {len(tensors)} "
            "tensors; wrap it, or set finetune.distill.weight=0 and finetune.label_smoothing=0"
        )
    logits = tensors[0].movedim(1, -1) if tensors[0].dim() == 4 else tensors[0]
    if logits.dim() < 2 or logits.shape[-1] == 1:
        raise FinetuneError(
            f"label smoothing and distillation compare classes, and this model returns {tuple(tensors[0].shape)}, one "
            "number a sample; set finetune.distill.weight=0 and finetune.label_smoothing=0"
        )
    return logits


def without_padding(tensor: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    """Of a ``tensor (samples, positions, ...)`` the positions that the mask ``text (samples, positions)`` does not call
    padding, ``(n, ...)``; any other tensor as it is."""
    if text is None or tensor.dim() < 3 or text.shape != tensor.shape[:2]:
        return tensor
    return tensor[text.bool()]


def uniform_cross_entropy(logits: torch.Tensor, text: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy with the uniform distribution: the part that label smoothing mixes in."""
    return -F.log_softmax(without_padding(logits, text).float(), dim=-1).mean()


def distillation_loss(
    mine: torch.Tensor, theirs: torch.Tensor, distill: Distill, text: torch.Tensor | None = None
) -> torch.Tensor:
    """Divergence of softened distributions, ``T**2 * KL(theirs / T || mine / T)``, a mean over all but the classes.

    Positions that the attention mask ``text`` calls padding do not count.
    """
    if mine.shape != theirs.shape:
        raise FinetuneError(
            f"distillation compares logits of one shape: the model gives {tuple(mine.shape)} and the teacher "
            f"{tuple(theirs.shape)}; give a teacher with the same classes, or set finetune.distill.weight=0"
        )
    mine, theirs = (without_padding(logits, text).float() / distill.temperature for logits in (mine, theirs))
    mine, theirs = (F.log_softmax(logits, dim=-1) for logits in (mine, theirs))
    divergence = F.kl_div(mine, theirs, reduction="none", log_target=True).sum(dim=-1).mean()
    return divergence * distill.temperature**2


def hidden_loss(mine: Hidden, theirs: Hidden, text: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over layers of ``|mine - theirs|**2 / |theirs|**2``, where outputs have one shape; without padding."""
    pairs = [
        [without_padding(hidden[name], text).float() for hidden in (mine, theirs)]
        for name in mine
        if name in theirs and mine[name].shape == theirs[name].shape
    ]
    errors = [F.mse_loss(own, taught) / taught.square().mean().clamp(min=1e-12) for own, taught in pairs]
    if not errors:
        raise FinetuneError(
            "no layer of the model and of the teacher has outputs of one shape: the widths between layers were pruned; "
            "set finetune.distill.hidden=0 and learn from the logits alone"
        )
    return torch.stack(errors).mean()


def layers(model: nn.Module) -> dict[str, str]:
    """The layers that follow each other, by their names in the dense model: the outermost modules of several parts
    that are no stack of such."""

    def found(name: str, module: nn.Module) -> Iterator[str]:
        if name and _is_composite(module) and not any(_is_stack(part) for part in module.modules()):
            yield name
            return
        for child, part in module.named_children():
            yield from found(f"{name}.{child}" if name else child, part)

    names = dense_names(model)
    return {names[name]: name for name in found("", model)}


def _is_composite(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential) and any(map(_is_composite, module.children()))


@contextmanager
def outputs_of_modules(model: nn.Module, names: Mapping[str, str]) -> Iterator[Hidden]:
    """Filled by every forward pass with the first output tensor of each module; ``names``: of modules, by the keys that
    their outputs get."""
    kept: Hidden = {}
    modules = dict(model.named_modules())

    def keeper(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            first = next(iter(output_tensors(output)), None)
            if first is not None and first.is_floating_point():
                kept[name] = first

        return keep

    handles = [modules[name].register_forward_hook(keeper(key)) for key, name in names.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
