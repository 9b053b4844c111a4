"""Views, permutations, slices and concatenations: the operators that only move elements."""

from __future__ import annotations

from torch import nn

from ..labels import SELECTOR, Dimension, Term, concatenate, fixed, fresh, is_frozen, multiply, resolve, size, unify
from ..trace import Call, IntegerSite, Label
from .unknown import unknown


def view(call: Call) -> list[Label]:
    """Align blocks of dimensions with equal products; a block of several output dimensions splits factors."""
    source = call.label("self")
    before, after = [size(d) for d in source], list(call.outputs[0].shape)
    output: Label = []
    for block, lengths in _blocks(before, after):
        dimensions = [source[position] for position in block]
        output.extend(_reshape(call, dimensions, lengths))
    return [output]


def _blocks(before: list[int], after: list[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of (input positions, output lengths) with equal products, as short as possible."""
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        positions, lengths, left, right = [], [], 1, 1
        if i < len(before):
            positions, left, i = [i], before[i], i + 1
        if j < len(after) and (not positions or after[j] != 1 or left == 1):
            lengths, right, j = [after[j]], after[j], j + 1
        while left != right:
            if left < right:
                positions.append(i)
                left, i = left * before[i], i + 1
            else:
                lengths.append(after[j])
                right, j = right * after[j], j + 1
        blocks.append((positions, lengths))
    return blocks


def _reshape(call: Call, dimensions: Label, lengths: list[int]) -> Label:
    if len(dimensions) == 1 and len(lengths) == 1:
        call.integer(lengths[0], dimensions[0])
        return dimensions
    merged = multiply(dimensions)
    if len(lengths) == 1:
        call.integer(lengths[0], merged)
        return [merged]
    if is_frozen(merged):
        return [fixed(length) for length in lengths]
    parts = [fixed(1) if length == 1 else fresh(length) for length in lengths]
    call.unify(multiply(parts), merged)
    for part, length in zip(parts, lengths, strict=True):
        call.integer(length, part)
    return parts


def permute(call: Call) -> list[Label]:
    source = call.label("self")
    return [[source[position] for position in call["dims"]]]


def transpose(call: Call) -> list[Label]:
    source = list(call.label("self"))
    if source:
        one, other = call["dim0"], call["dim1"]
        source[one], source[other] = source[other], source[one]
    return [source]


def t(call: Call) -> list[Label]:
    return [call.label("self")[::-1]]


def unsqueeze(call: Call) -> list[Label]:
    source = list(call.label("self"))
    source.insert(call["dim"] % (len(source) + 1), fixed(1))
    return [source]


def squeeze(call: Call) -> list[Label]:
    source, dims = call.label("self"), call.arguments.get("dim")
    dims = range(len(source)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(source) for d in dims if size(source[d]) == 1}
    return [[dimension for position, dimension in enumerate(source) if position not in gone]]


def expand(call: Call) -> list[Label]:
    """A dimension of size 1 that is repeated becomes a new factor."""
    source, lengths = call.label("self"), list(call.outputs[0].shape)
    padded = [fixed(1)] * (len(lengths) - len(source)) + list(source)
    output = [d if size(d) == n else fresh(n) for d, n in zip(padded, lengths, strict=True)]
    for dimension, length in zip(output, lengths, strict=True):
        call.integer(length, dimension)
    return [output]


def repeat(call: Call) -> list[Label]:
    source, repeats = call.label("self"), call["repeats"]
    padded = [fixed(1)] * (len(repeats) - len(source)) + list(source)
    return [[_repeated(call, dimension, count) for dimension, count in zip(padded, repeats, strict=True)]]


def _repeated(call: Call, dimension: Dimension, count: int) -> Dimension:
    if count == 1 or size(dimension) != 1:
        return dimension if count == 1 else multiply([fixed(count, f"repeated ({call.why})"), dimension])
    repeated = fresh(count)
    call.integer(count, repeated)
    return repeated


def cat(call: Call) -> list[Label]:
    labels = [call.recorder.label(tensor) for tensor in call["tensors"] if tensor.numel()]
    if not labels:
        return created(call)
    dim = call["dim"] % len(labels[0])
    output = list(labels[0])
    for label in labels[1:]:
        for position, dimension in enumerate(label):
            if position != dim:
                call.unify(output[position], dimension)
    output[dim] = concatenate([label[dim] for label in labels])
    return [output]


def stack(call: Call) -> list[Label]:
    labels = [call.recorder.label(tensor) for tensor in call["tensors"]]
    output = list(labels[0])
    for label in labels[1:]:
        for dimension, other in zip(output, label, strict=True):
            call.unify(dimension, other)
    output.insert(call["dim"] % (len(output) + 1), fixed(len(labels)))
    return [output]


def select(call: Call) -> list[Label]:
    source = list(call.label("self"))
    dim = call["dim"] % len(source)
    call.freeze(source.pop(dim), "one element of it is selected")
    return [source for _ in call.outputs]


def split(call: Call) -> list[Label]:
    """Equal parts share their units (a frozen selector times them); unequal ones are the terms of a sum."""
    source = call.label("self")
    dim = call["dim"] % len(source)
    lengths = [tensor.shape[dim] for tensor in call.outputs]
    if is_frozen(source[dim]):
        parts = [fixed(length) for length in lengths]
    elif len(set(lengths)) == 1:
        part = fresh(lengths[0])
        call.unify(source[dim], multiply([fixed(len(lengths), SELECTOR), part]))
        parts = [part] * len(lengths)
    else:
        parts = [fresh(length) for length in lengths]
        call.unify(source[dim], concatenate(parts))
    for part, length in zip(parts, lengths, strict=True):
        call.integer(length, part)
    return [[*source[:dim], part, *source[dim + 1 :]] for part in parts]


def glu(call: Call) -> list[Label]:
    """One half of the dimension gates the other: they share their units."""
    source = list(call.label("self"))
    dim = call["dim"] % len(source)
    half = size(source[dim]) // 2
    part = fixed(half) if is_frozen(source[dim]) else fresh(half)
    call.unify(source[dim], multiply([fixed(2, SELECTOR), part]))
    source[dim] = part
    return [source]


def view_as_complex(call: Call) -> list[Label]:
    """The last dimension is that of the real and the imaginary part."""
    source = call.label("self")
    call.freeze(source[-1], "real and imaginary part")
    return [source[:-1]]


def view_as_real(call: Call) -> list[Label]:
    return [[*call.label("self"), fixed(2, "real and imaginary part")]]


def slice_(call: Call) -> list[Label]:
    """A slice cuts the dimension into a sum; a step or a fixed dimension stays fixed."""
    source = list(call.label("self"))
    dim = call["dim"] % len(source)
    length = size(source[dim])
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(length)
    if (start, stop, step) == (0, length, 1):
        return [source]
    equal = None if is_frozen(source[dim]) else _equal_part(call, source[dim], start, stop, step)
    if equal is not None:
        source[dim] = equal
        return [source]
    if stop <= start:  # nothing of it is taken, as where all of a head is rotated
        source[dim] = fixed(0)
        return [source]
    if step != 1:
        call.freeze(source[dim], "sliced with a step")
    if is_frozen(source[dim]):
        source[dim] = fixed(call.outputs[0].shape[dim])
        return [source]
    parts = [fresh(n) for n in (start, stop - start, length - stop)]
    whole = concatenate([part for part in parts if size(part)])
    is_product = len(resolve(source[dim])) == 1
    unify(source[dim], whole, call.why)
    for bound, dimensions in ((start, parts[:1]), (stop, parts[:2])):
        if 0 < bound < length:
            call.integer(bound, concatenate([part for part in dimensions if size(part)]), is_bound=True)
    if is_product and _is_half(length, start, stop, step):
        call.hint(whole, "half", str(start))
    source[dim] = parts[1]
    return [source]


def _is_half(length: int, start: int, stop: int, step: int) -> bool:
    return step == 1 and 2 * (stop - start) == length and start in (0, length // 2)


def _equal_part(call: Call, dimension: Dimension, start: int, stop: int, step: int) -> Dimension | None:
    """One half of a product, or every n-th element of it: the parts share their units, as those of :func:`split`.

    Rotary embeddings turn the halves of a head, or its even and odd elements, into each other. The first half alone may
    as well be the queries beside keys and values: what is left is known to be the other half when it is sliced too.
    """
    length, terms = size(dimension), resolve(dimension)
    halves = _is_half(length, start, stop, step)
    interleaved = step > 1 and length % step == 0 and start < step and stop > length - step + start
    if halves and (other := _other_half(call, terms, start)) is not None:
        call.unify(*other)
        call.integer(length // 2, other[0])
        return other[0]
    if len(terms) != 1 or not (interleaved or (halves and _is_halved(terms[0]))):
        return None
    count = 2 if halves else step
    part, selector = fresh(length // count), fixed(count, SELECTOR)
    call.unify(dimension, multiply([selector, part] if halves else [part, selector]))
    call.integer(length // count, part)
    return part


def _is_halved(term: Term) -> bool:
    """Whether the halves share their units already."""
    return bool(term) and term[0].frozen == SELECTOR and term[0].size % 2 == 0


def _other_half(call: Call, terms: Dimension, start: int) -> tuple[Dimension, Dimension] | None:
    """Both halves of ``terms``, if the one that does not begin at ``start`` was sliced before."""
    for hint in reversed(call.recorder.trace.hints):
        if hint.role == "half" and hint.text != str(start) and resolve(hint.dimension) == terms:
            return hint.dimension[:1], hint.dimension[1:]
    return None


def embedding(call: Call) -> list[Label]:
    """Rows are looked up: the looked-up dimension is fixed, the others pass."""
    return [[*call.label("indices"), _looked_up(call)]]


def embedding_bag(call: Call) -> list[Label]:
    """Rows are looked up and reduced bag by bag; the other outputs are places in the table."""
    width = _looked_up(call)
    if isinstance(call.recorder.modules.get(call.module), nn.EmbeddingBag):
        call.recorder.trace.known_sites.append(IntegerSite(call.module, "embedding_dim", width))
    bags, *others = call.outputs
    return [[fixed(len(bags)), width], *([fixed(length) for length in tensor.shape] for tensor in others)]


def _looked_up(call: Call) -> Dimension:
    """What remains of the rows of a table."""
    weight = call.label("weight")
    call.freeze(weight[0], "rows are looked up")
    call.hint(weight[1], "producer")
    call.hint(weight[1], "embedding")
    return weight[1]


def unfold(call: Call) -> list[Label]:
    """Windows along a dimension: their elements become the last dimension."""
    source = list(call.label("self"))
    dim = call["dimension"] % max(len(source), 1)
    call.freeze(source[dim], "windows are cut out of it")
    source[dim] = fixed(call.outputs[0].shape[dim])
    return [[*source, fixed(call["size"])]]


def as_strided(call: Call) -> list[Label]:
    """Kernels restride their outputs; anything that changes the shape is beyond the rules."""
    source = call.label("self")
    same = [size(dimension) for dimension in source] == list(call.outputs[0].shape)
    return [source] if same and call.name == "as_strided_" else unknown(call)


def created(call: Call) -> list[Label]:
    """Elements have their values by their places."""
    return [[fixed(n, f"made by {call.why}") for n in tensor.shape] for tensor in call.outputs]


RULES = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), view),
    "permute": permute,
    "transpose": transpose,
    "t": t,
    "unsqueeze": unsqueeze,
    "squeeze": squeeze,
    "expand": expand,
    "repeat": repeat,
    "cat": cat,
    "as_strided": as_strided,
    "stack": stack,
    **dict.fromkeys(("select", "unbind"), select),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    **dict.fromkeys(("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"), split),
    "slice": slice_,
    "glu": glu,
    "view_as_complex": view_as_complex,
    "view_as_real": view_as_real,
    "embedding": embedding,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), embedding_bag),
    "unfold": unfold,
    **dict.fromkeys(("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full"), created),
    **dict.fromkeys(("arange", "randn", "rand", "scalar_tensor", "linspace", "empty_strided"), created),
}
