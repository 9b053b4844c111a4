"""Modules that compute what a standard module computes, and whose forward also fits sliced parameters.

Some attention modules read their sizes from the width of the input, insist that the heads fill it, or hand everything
to one fused operator; a slice of such a module cannot run. :func:`replace` puts an equivalent in its place: the same
parameters under the same names, and every size of the forward is an attribute or comes from a weight.

This differs from the originals in:

- Forward hooks on the children (``out_proj``, ``qkv``, ``proj``) run; the originals read only the children's weights.
- An :class:`torch.nn.TransformerEncoder` computes padded positions also where its fused path would fill in zeros.
- A query whose keys are all masked gives NaN only with ``need_weights``; the fused path gives NaN in both cases.
- After heads are removed, a 3-D ``attn_mask`` has to have one entry for each head that is left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .copying import copy_model


class MultiheadAttention(nn.Module):
    """What :class:`torch.nn.MultiheadAttention` computes, with ``num_heads`` and ``head_dim`` as free sizes.

    Args:
        original: The module whose parameters, hooks and attributes this one takes over, without copying a tensor.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    scale: float
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    q_proj_weight: Tensor
    k_proj_weight: Tensor
    v_proj_weight: Tensor
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Linear

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        _take_over(self, original)
        # The scale belongs to the trained weights: it stays when channels of the heads go.
        self.scale = self.head_dim**-0.5
        # Transformer layers read this before they bypass the forward with a fused operator.
        self._qkv_same_embed_dim = False
        if type(self.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear:
            self.out_proj = _plain_linear(self.out_proj)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values and, with ``need_weights``, the attention weights.

        Args:
            query: ``(batch, L, width)``, ``(L, batch, width)`` unless ``batch_first``, or ``(L, width)``.
            key: Like ``query``, of length S and ``kdim`` wide.
            value: Like ``key``, ``vdim`` wide.
            key_padding_mask: ``(batch, S)`` or ``(S,)``: True where a key is ignored, or floats to add.
            need_weights: Return the weights too.
            attn_mask: ``(L, S)`` or ``(batch * num_heads, L, S)``: True where not to attend, or floats to add.
            average_attn_weights: Return the mean over the heads, ``(batch, L, S)``, not ``(batch, heads, L, S)``.
            is_causal: The hint that ``attn_mask`` is the causal mask.

        Raises:
            RuntimeError: ``is_causal`` without an ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask: pass the causal mask as attn_mask too")
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        k, v = self._extend(k), self._extend(v)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            attended, weights = _weighted(q * self.scale, k, v, mask, dropout)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            return self._merge(attended, batched), weights if batched else weights.squeeze(0)
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=self.scale)
        return self._merge(attended, batched), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values in the layout of the inputs, with ``bias_k`` and ``bias_v`` as a last position."""
        if self.in_proj_weight is not None and query is key and key is value:
            parts: Sequence[Tensor] = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            packed, separate = self.in_proj_weight, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            weights: Sequence[Tensor] = separate if packed is None else packed.chunk(3)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        if self.bias_k is None or self.bias_v is None:
            return parts
        return parts[0], self._append(parts[1], self.bias_k), self._append(parts[2], self.bias_v)

    def _append(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x`` with ``bias``, ``(1, 1, width)``, as a last position of every sequence."""
        if x.dim() == 2:
            return torch.cat([x, bias.squeeze(0)])
        if self.batch_first:
            return torch.cat([x, bias.expand(x.shape[0], -1, -1)], dim=1)
        return torch.cat([x, bias.expand(-1, x.shape[1], -1)])

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """``(batch, heads, length, head_dim)``, whatever the layout of the inputs."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        batch, length = x.shape[0], x.shape[1]
        return x.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def _merge(self, attended: Tensor, batched: bool) -> Tensor:
        """From ``(batch, heads, length, head_dim)`` to the layout of the inputs, through ``out_proj``."""
        if batched and not self.batch_first:
            merged: Tensor = self.out_proj(attended.permute(2, 0, 1, 3).flatten(2))
        else:
            merged = self.out_proj(attended.transpose(1, 2).flatten(2))
        return merged if batched else merged.squeeze(0)

    def _extend(self, x: Tensor) -> Tensor:
        """Keys or values with a position of zeros, if the module was made to attend to one."""
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks as floats to add to the scores ``(batch, heads, L, S)``, open for the appended positions."""
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            masks.append(mask if mask.dim() == 2 else mask.view(-1, self.num_heads, mask.shape[-2], mask.shape[-1]))
        if padding is not None:
            mask = _additive(padding, q.dtype)
            masks.append(mask.view(-1, 1, 1, mask.shape[-1]))
        if not masks:
            return None
        merged = masks[0] if len(masks) == 1 else masks[0] + masks[1]
        appended = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(merged, (0, appended)) if appended else merged


class ShiftedWindowAttention(nn.Module):
    """What torchvision's ``ShiftedWindowAttention`` computes, with ``num_heads`` and ``head_dim`` as free sizes.

    Swin Transformer, https://arxiv.org/abs/2103.14030.

    Args:
        original: The module whose parameters, buffers, hooks and attributes this one takes over, without copies.
    """

    num_heads: int
    head_dim: int
    scale: float
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    qkv: nn.Linear
    proj: nn.Linear

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        _take_over(self, original)
        self.head_dim = self.qkv.weight.shape[0] // (3 * self.num_heads)
        # The scale belongs to the trained weights: it stays when channels of the heads go.
        self.scale = self.head_dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, height, width, proj.out_features)`` for an ``x`` of ``(batch, height, width, channels)``."""
        height, width = x.shape[1], x.shape[2]
        x = _pad_to_windows(x, self.window_size)
        padded = (x.shape[1], x.shape[2])
        # A window that covers the whole side has nothing to shift in.
        shift = [0 if w >= side else s for s, w, side in zip(self.shift_size, self.window_size, padded, strict=True)]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), dims=(1, 2))
        windows = self._attend(_to_windows(x, self.window_size), padded, shift)
        x = _from_windows(windows, self.window_size, padded)
        if any(shift):
            x = torch.roll(x, (shift[0], shift[1]), dims=(1, 2))
        return x[:, :height, :width].contiguous()

    def _attend(self, windows: Tensor, padded: tuple[int, int], shift: list[int]) -> Tensor:
        """Attention within each of ``windows``, ``(batch * windows, area, channels)``."""
        q, k, v = (self._heads(part) for part in self._project(windows))
        scores = self._scores(q, k) + self._position_bias()
        if any(shift):
            apart = _apart(padded, self.window_size, shift, windows.device)
            by_image = scores.unflatten(0, (-1, apart.shape[0]))
            # -100 and not -inf: the trained weights saw this value.
            scores = (by_image + apart.to(scores.dtype).mul(-100.0).unsqueeze(1)).flatten(0, 1)
        weights = F.dropout(F.softmax(scores, dim=-1), self.attention_dropout, self.training)
        attended = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return F.dropout(attended, self.dropout, self.training)

    def _project(self, windows: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = self.qkv(windows).chunk(3, dim=-1)
        return parts

    def _heads(self, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        return x.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.transpose(-2, -1)

    def _position_bias(self) -> Tensor:
        """``(heads, area, area)``: what the relative position of two places in a window adds to their score."""
        return self._by_pair(self.relative_position_bias_table)

    def _by_pair(self, table: Tensor) -> Tensor:
        area = self.window_size[0] * self.window_size[1]
        return table[self.relative_position_index].view(area, area, self.num_heads).permute(2, 0, 1)


class RelativePositionalMultiHeadAttention(nn.Module):
    """What torchvision's module of this name computes, with ``n_heads`` and ``head_dim`` as free sizes.

    MaxViT, https://arxiv.org/abs/2204.01697.

    Args:
        original: The module whose parameters, buffers, hooks and attributes this one takes over, without copies.
    """

    n_heads: int
    head_dim: int
    max_seq_len: int
    scale_factor: float
    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    to_qkv: nn.Linear
    merge: nn.Linear

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        _take_over(self, original)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, windows, area, merge.out_features)`` for an ``x`` of ``(batch, windows, area, channels)``."""
        q, k, v = (self._heads(part) for part in self.to_qkv(x).chunk(3, dim=-1))
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self._position_bias()
        attended: Tensor = self.merge((F.softmax(scores, dim=-1) @ v).transpose(2, 3).flatten(3))
        return attended

    def _heads(self, x: Tensor) -> Tensor:
        batch, windows, area = x.shape[:3]
        return x.reshape(batch, windows, area, self.n_heads, self.head_dim).transpose(2, 3)

    def _position_bias(self) -> Tensor:
        """``(heads, area, area)``: what the relative position of two places in a window adds to their score."""
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(self.max_seq_len, self.max_seq_len, self.n_heads).permute(2, 0, 1)


class ShiftedWindowAttentionV2(ShiftedWindowAttention):
    """What torchvision's ``ShiftedWindowAttentionV2`` computes, with ``num_heads`` and ``head_dim`` as free sizes.

    Swin Transformer V2, https://arxiv.org/abs/2111.09883: cosine scores, and a network makes the position bias.

    Args:
        original: The module whose parameters, buffers, hooks and attributes this one takes over, without copies.
    """

    logit_scale: Tensor
    relative_coords_table: Tensor
    cpb_mlp: nn.Module

    def _project(self, windows: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values; the bias of the keys is a parameter that the model does not use."""
        q, k, v = F.linear(windows, self.qkv.weight).chunk(3, dim=-1)
        if self.qkv.bias is None:
            return q, k, v
        query_bias, _, value_bias = self.qkv.bias.chunk(3)
        return q + query_bias, k, v + value_bias

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * self.logit_scale.clamp(max=math.log(100.0)).exp()

    def _position_bias(self) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(self._by_pair(table))


#: From the full name of a type to what makes the equivalent of a module of exactly that type. By name, so that
#: nothing is imported for it.
EQUIVALENTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.nn.modules.activation.MultiheadAttention": MultiheadAttention,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": RelativePositionalMultiHeadAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ShiftedWindowAttention,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ShiftedWindowAttentionV2,
}


def equivalent_of(module: nn.Module) -> nn.Module | None:
    """The equivalent of ``module``, which shares its parameters and children; None if its type needs none."""
    make = _maker(module)
    return None if make is None else make(module)


def replace(model: nn.Module) -> nn.Module:
    """``model`` itself if nothing in it needs an equivalent, else a copy in which all such modules are replaced.

    The copy has its own modules and shares every parameter and buffer with ``model``, which is not changed.
    """
    if not any(_maker(module) for module in model.modules()):
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    copied = copy_model(model, memo)
    for module in list(copied.modules()):
        if (equivalent := equivalent_of(module)) is not None:
            _become(module, equivalent)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoder):
            _without_nested_tensors(module)
    return copied


def _maker(module: nn.Module) -> Callable[[nn.Module], nn.Module] | None:
    return EQUIVALENTS.get(f"{type(module).__module__}.{type(module).__qualname__}")


def _take_over(new: nn.Module, original: nn.Module) -> None:
    """Give ``new`` all that ``original`` holds: the same tensors, children, hooks and attributes, in own containers."""
    for key, value in vars(original).items():
        vars(new)[key] = copy.copy(value) if isinstance(value, dict | set | list) else value


def _become(module: nn.Module, equivalent: nn.Module) -> None:
    """Turn ``module`` into ``equivalent`` in place: whatever else refers to it, also outside of the tree, follows."""
    module.__class__ = type(equivalent)
    vars(module).clear()
    vars(module).update(vars(equivalent))


def _plain_linear(original: nn.Linear) -> nn.Linear:
    """An :class:`torch.nn.Linear` that holds all that ``original`` holds."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    _take_over(linear, original)
    return linear


def _without_nested_tensors(encoder: nn.TransformerEncoder) -> None:
    """The encoder packs padded sequences for the layers' fused path without asking whether they will take it."""
    if any(isinstance(module, MultiheadAttention) for module in encoder.modules()):
        encoder.use_nested_tensor = False


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` as floats to add to scores: minus infinity where a boolean mask is True."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """The attended values and the weights, after dropout, of scaled queries."""
    scores = q @ k.transpose(-2, -1)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    return weights @ v, weights


def _pad_to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """``x``, ``(batch, height, width, channels)``, with zeros below and to the right up to whole windows."""
    below, right = -x.shape[1] % window[0], -x.shape[2] % window[1]
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def _to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """``(batch * windows, area, channels)`` from ``(batch, height, width, channels)``."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _from_windows(windows: Tensor, window: Sequence[int], padded: tuple[int, int]) -> Tensor:
    """``(batch, height, width, channels)`` from ``(batch * windows, area, channels)``."""
    rows, columns, channels = padded[0] // window[0], padded[1] // window[1], windows.shape[-1]
    batch = windows.shape[0] // (rows * columns)
    x = windows.view(batch, rows, columns, window[0], window[1], channels)
    return x.transpose(2, 3).reshape(batch, padded[0], padded[1], channels)


def _apart(padded: tuple[int, int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Tensor:
    """``(windows, area, area)``: whether two places of a shifted window come from opposite edges of the image."""
    rows, columns = (_regions(*sides, device) for sides in zip(padded, window, shift, strict=True))
    regions = 3 * rows.unsqueeze(1) + columns
    places = _to_windows(regions[None, :, :, None], window).squeeze(-1)
    return places.unsqueeze(1) != places.unsqueeze(2)


def _regions(side: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Along one side: 0 in front of the last window, then 1, and 2 where the roll brought in the other edge."""
    place = torch.arange(side, device=device)
    if not shift:
        return torch.zeros_like(place)
    return (place >= side - window).long() + (place >= side - shift).long()
