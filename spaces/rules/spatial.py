"""Pooling, resizing and padding: channels pass through, space is fixed."""

from __future__ import annotations

import math

from ..labels import SELECTOR, concatenate, fixed, fresh, multiply, size
from ..trace import Call, Label


def spatial(call: Call) -> list[Label]:
    """Leading dimensions pass; those whose length changes, and all spatial ones, are fixed."""
    source = call.label("input") if "input" in call.arguments else call.label("self")
    channels = len(source) - (1 if "1d" in call.name else 3 if "3d" in call.name else 2)
    for dimension in source[channels:]:
        call.freeze(dimension, "spatial")
    return [[*source[:channels], *(fixed(n) for n in output.shape[channels:])] for output in call.outputs]


def constant_pad(call: Call) -> list[Label]:
    """Padding adds frozen terms: the amounts stay as they are written in the forward."""
    output = list(call.label("self"))
    pad = call["pad"]
    for position in range(len(pad) // 2):
        before, after = pad[2 * position], pad[2 * position + 1]
        where = -1 - position
        if before == after == 0:
            continue
        if before < 0 or after < 0:
            call.freeze(output[where], "cropped")
            output[where] = fixed(call.outputs[0].shape[where], f"cropped ({call.why})")
            continue
        reason = f"zero padding ({call.why})"
        parts = [fixed(before, reason)] if before else []
        parts += [output[where]]
        parts += [fixed(after, reason)] if after else []
        output[where] = concatenate(parts)
    return [output]


def grid_sampler(call: Call) -> list[Label]:
    source = call.label("input")
    for dimension in [*source[2:], *call.label("grid")]:
        call.freeze(dimension, "spatial")
    return [[*source[:2], *(fixed(n) for n in call.outputs[0].shape[2:])]]


def pixel_shuffle(call: Call) -> list[Label]:
    source, factor = call.label("self"), call["upscale_factor"]
    channels = fresh(size(source[-3]) // factor**2)
    call.unify(source[-3], multiply([channels, fixed(factor**2, SELECTOR)]))
    return [[*source[:-3], channels, *(fixed(n) for n in call.outputs[0].shape[-2:])]]


def pixel_unshuffle(call: Call) -> list[Label]:
    source, factor = call.label("self"), call["downscale_factor"]
    for dimension in source[-2:]:
        call.freeze(dimension, "spatial")
    channels = multiply([source[-3], fixed(factor**2, SELECTOR)])
    return [[*source[:-3], channels, *(fixed(n) for n in call.outputs[0].shape[-2:])]]


def im2col(call: Call) -> list[Label]:
    """The elements of each window stand side by side: ``(..., channels x kernel, windows)``."""
    source = call.label("self")
    for dimension in source[-2:]:
        call.freeze(dimension, "spatial")
    kernel = fixed(math.prod(call["kernel_size"]), SELECTOR)
    return [[*source[:-3], multiply([source[-3], kernel]), fixed(call.outputs[0].shape[-1])]]


def col2im(call: Call) -> list[Label]:
    source = call.label("self")
    call.freeze(source[-1], "spatial")
    kernel = math.prod(call["kernel_size"])
    channels = fresh(size(source[-2]) // kernel)
    call.unify(source[-2], multiply([channels, fixed(kernel, SELECTOR)]))
    return [[*source[:-2], channels, *(fixed(n) for n in call.outputs[0].shape[-2:])]]


def channel_shuffle(call: Call) -> list[Label]:
    source, groups = call.label("self"), call["groups"]
    outer, inner = fixed(groups, SELECTOR), fresh(size(source[1]) // groups)
    call.unify(source[1], multiply([outer, inner]))
    return [[source[0], multiply([inner, outer]), *source[2:]]]


_POOLS = [f"{kind}_pool{n}d" for kind in ("avg", "adaptive_avg", "max", "_adaptive_avg") for n in (1, 2, 3)]
_WITH_INDICES = [
    f"{kind}{n}d{end}" for n in (2, 3) for kind, end in (("max_pool", "_with_indices"), ("adaptive_max_pool", ""))
]
_UPSAMPLES = [f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "bicubic2d")]
_UPSAMPLES += ["upsample_linear1d", "upsample_trilinear3d"]
_UPSAMPLES += ["_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
_PADS = [f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)]

RULES = {
    **dict.fromkeys([*_POOLS, *_WITH_INDICES, *_UPSAMPLES, *_PADS], spatial),
    "constant_pad_nd": constant_pad,
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d"), grid_sampler),
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": im2col,
    "col2im": col2im,
    "channel_shuffle": channel_shuffle,
    "native_channel_shuffle": channel_shuffle,
}
