"""Operators and layers beyond the usual: candidates are right, and what can be pruned is found."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

import prunefront
from tests.models import build
from tests.spaces.test_idioms import check


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SEQUENCES, OTHERS = random(3, 5, 4), [random(2, 7, 4), random(1, 1, 4)]


class Recurrent(nn.Module):
    """A linear layer of 10, a recurrent one of 8, and a readout."""

    def __init__(self, cls, **options):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.r = nn.Linear(4, 10), cls(10, 8, **options)
        width = (options.get("proj_size") or 8) * (2 if options.get("bidirectional") else 1)
        self.c = nn.Linear(width, 3)

    def forward(self, x):
        return self.c(self.r(F.relu(self.a(x)))[0])


class OverTime(Recurrent):
    """A cell in a loop, whose first state it makes itself."""

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.r(F.relu(self.a(step)), state)
        return self.c(state[0] if isinstance(state, tuple) else state)


class Packed(Recurrent):
    def forward(self, x):
        lengths = torch.arange(1, len(x) + 1).clamp(max=x.shape[1])
        packed = pack_padded_sequence(F.relu(self.a(x)), lengths, batch_first=True, enforce_sorted=False)
        states, last = self.r(packed)
        last = last[0] if isinstance(last, tuple) else last
        return self.c(pad_packed_sequence(states, batch_first=True)[0]), last.sum()


class GivenState(Recurrent):
    """The first state comes from another layer."""

    def __init__(self, cls, **options):
        super().__init__(cls, **options)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        state = F.relu(self.first(x.mean(0)))
        state = torch.stack([state] * (2 if self.r.bidirectional else 1))
        states, last = self.r(F.relu(self.a(x)), (state, state / 2) if isinstance(self.r, nn.LSTM) else state)
        return self.c(states), self.last(last[1] if isinstance(last, tuple) else last)


DEEP = {"num_layers": 2, "bidirectional": True}


@pytest.mark.parametrize("options", [{}, DEEP, {"batch_first": True, "bias": False}])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(cls, options):
    assert check(Recurrent(cls, **options).eval(), SEQUENCES, OTHERS) == {"a": 10, "r": 8}


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_states_that_come_from_elsewhere(cls):
    groups = check(GivenState(cls, bidirectional=True).eval(), SEQUENCES, OTHERS)
    assert sorted(groups.values()) == [8, 10]


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_packed_sequences(cls):
    model = Packed(cls, batch_first=True, bidirectional=True).eval()
    assert check(model, SEQUENCES, OTHERS) == {"a": 10, "r": 8}


@pytest.mark.parametrize("cls", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(cls):
    assert check(OverTime(cls).eval(), SEQUENCES, OTHERS) == {"a": 10, "r": 8}


def test_projections_stay_narrower_than_the_state():
    model = Recurrent(nn.LSTM, proj_size=3, num_layers=2, bidirectional=True).eval()
    space = prunefront.discover(model, SEQUENCES)
    assert check(model, SEQUENCES, OTHERS) == {"a": 10, "r": 8}
    assert [group.at_least for group in space.groups] == [1, 4]
    assert any("narrower than the state" in frozen.reason for frozen in space.frozen)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_candidates_of_recurrent_layers_in_single_precision_have_their_sizes(cls):
    """oneDNN's kernels run LSTMs here, not the ones of the proof."""
    space = prunefront.discover(Recurrent(cls, **DEEP).eval(), SEQUENCES)
    plan = space.plan({"a": 6, "r": 5})
    candidate, masked = space.slice(plan), space.mask(plan)
    assert (candidate.r.input_size, candidate.r.hidden_size) == (6, 5)
    assert all(flat is held for flat, held in zip(candidate.r._flat_weights, candidate.r.parameters(), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(candidate(SEQUENCES), masked(SEQUENCES), rtol=0, atol=1e-6)
    candidate(SEQUENCES).sum().backward()
    assert all(parameter.grad is not None for parameter in candidate.parameters())


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_macs_of_recurrent_layers(cls):
    space = prunefront.discover(Recurrent(cls, **DEEP).eval(), SEQUENCES)
    for plan in (space.plan({}), space.plan({"a": 6, "r": 5})):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            space.slice(plan).double()(SEQUENCES.double())
        assert space.cost(plan).macs == counter.get_total_flops() // 2


def test_pruned_experts_run_in_half_precision_although_found_in_single():
    pytest.importorskip("transformers")
    model, inputs = build("mixtral")
    space = prunefront.discover(model, inputs)
    experts = [group for group in space.groups if group.name.endswith("mlp.experts")]
    assert {group.multiple_of for group in experts} == {8}
    plan = space.plan({group.name: 5 * group.multiple_of for group in experts})
    with torch.no_grad():
        logits = space.slice(plan).to(torch.bfloat16)(**inputs).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


class Forward(nn.Module):
    """Layers of 8 and 6, a readout of 3, and whatever the forward needs more."""

    def __init__(self, forward, inputs=4, **extra):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(inputs, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        for name, value in extra.items():
            setattr(self, name, value)
        self.run = forward

    def forward(self, *given):
        return self.run(self, *given)


def prunable(forward, x, others=(), inputs=4, **extra):
    return check(Forward(forward, inputs, **extra).eval(), x, others)


NODES, MORE_NODES = random(5, 4), random(9, 4)
TARGETS, MORE_TARGETS = torch.tensor([0, 1, 1, 0, 2, 4]), torch.tensor([3, 1, 1, 8, 2, 4, 0, 0, 1, 2])
GRAPH, OTHER_GRAPHS = (NODES, TARGETS), [(MORE_NODES, MORE_TARGETS)]


def passing(send):
    """One round of messages: from each edge's node to the ones that ``send`` adds them to."""

    def forward(self, x, targets):
        h = F.relu(self.a(x))
        sent = send(self.b(h)[targets.flip(0)], targets, len(x))
        return self.c(F.relu(sent))

    return forward


def columns(targets, messages):
    return targets[:, None].expand(-1, messages.shape[1])


SENDERS = {
    "scatter_add_": lambda m, to, n: torch.zeros(n, m.shape[1], dtype=m.dtype).scatter_add_(0, columns(to, m), m),
    "scatter_add": lambda m, to, n: m.new_zeros(n, m.shape[1]).scatter_add(0, columns(to, m), m),
    "expand_as": lambda m, to, n: m.new_zeros(n, m.size(1)).scatter_add(0, to[:, None].expand_as(m), m),
    "repeat": lambda m, to, n: m.new_zeros(n, m.size(1)).scatter_add(0, to[:, None].repeat(1, m.size(1)), m),
    "transposed": lambda m, to, n: m.new_zeros(m.size(1), n).scatter_add_(1, to.expand(m.size(1), -1), m.T).T,
    "scatter": lambda m, to, n: m.new_zeros(n, m.shape[1]).scatter(0, columns(to, m), m),
    "mean": lambda m, to, n: m.new_zeros(n, m.shape[1]).scatter_reduce(0, columns(to, m), m, "mean"),
    "amax": lambda m, to, n: m.new_zeros(n, m.shape[1]).scatter_reduce_(
        0, columns(to, m), m, "amax", include_self=False
    ),
    "index_add": lambda m, to, n: torch.zeros(n, m.shape[1], dtype=m.dtype).index_add(0, to, m),
    "index_add_": lambda m, to, n: m.new_zeros((n, m.shape[-1])).index_add_(0, to, m),
    "index_reduce": lambda m, to, n: m.new_ones(n, m.shape[1]).index_reduce(0, to, m, "prod"),
    "index_copy": lambda m, to, n: m.new_zeros(n, m.shape[1]).index_copy(0, to, m),
    "index_fill": lambda m, to, n: m.index_fill(0, to[:1], 0.5),
    "gather": lambda m, to, n: m.gather(0, columns(to % len(m), m)),
    "take_along_dim": lambda m, to, n: torch.take_along_dim(m, to[:, None] % len(m), 0),
    "segments": lambda m, to, n: torch.segment_reduce(m, "sum", lengths=torch.tensor([2, len(m) - 2])),
    "unfold": lambda m, to, n: m.unfold(0, 3, 2).sum(-1),
}


@pytest.mark.parametrize("name", SENDERS)
@pytest.mark.filterwarnings("ignore:index_reduce")
def test_messages_between_nodes(name):
    assert prunable(passing(SENDERS[name]), GRAPH, OTHER_GRAPHS) == {"a": 8, "b": 6}


WRITTEN = {
    "the target's width": lambda m, to, n: m.new_zeros(n, 6).scatter_add_(0, columns(to, m), m),
    "the index's width": lambda m, to, n: m.new_zeros(n, 6).scatter_add_(0, to[:, None].expand(-1, 6), m),
    "columns": lambda m, to, n: m.scatter(1, to[:, None] % 6, 1.0),
    "looked-up columns": lambda m, to, n: m.gather(1, (to[:, None] + torch.arange(6)) % 6),
    "a part of the columns": lambda m, to, n: m.gather(0, to[:, None].expand(-1, 4) % len(m)).repeat(1, 2)[:, :6],
}


@pytest.mark.parametrize("name", WRITTEN)
def test_widths_and_places_that_are_written_in_the_forward_stay(name):
    assert prunable(passing(WRITTEN[name]), GRAPH, OTHER_GRAPHS) == {"a": 8}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_embeddings(mode):
    def forward(self, tokens):
        return self.c(F.relu(self.b(self.bag(tokens))))

    model = Forward(forward, bag=nn.EmbeddingBag(20, 8, mode=mode)).eval()
    del model.a
    tokens = torch.arange(12).reshape(3, 4) % 7
    assert check(model, tokens, [tokens[:1], tokens.T + 5]) == {"b": 6, "bag": 8}
    space = prunefront.discover(model, tokens)
    assert space.slice(space.plan({"bag": 5})).bag.embedding_dim == 5


def test_bilinear_layers():
    def forward(self, x):
        h = F.relu(self.a(x))
        return self.c(F.relu(self.pair(h, F.relu(self.b(h)))))

    model = Forward(forward, pair=nn.Bilinear(8, 6, 6)).eval()
    assert check(model, NODES, [MORE_NODES, random(2, 3, 4)]) == {"a": 8, "b": 6, "pair": 6}
    space = prunefront.discover(model, NODES)
    pair = space.slice(space.plan({"a": 5, "b": 4, "pair": 3})).pair
    assert (pair.in1_features, pair.in2_features, pair.out_features) == (5, 4, 3)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_distances(p):
    def forward(self, x):
        h = self.a(x)
        return torch.cdist(h, self.codes, p=p), (h - h.flip(0)).norm(p, -1)

    codes = nn.Parameter(random(7, 8))
    for count in (5, 30):  # many go another way
        assert prunable(forward, random(count, 4), OTHERS[1:], codes=codes)["a"] == 8
    assert prunable(lambda self, x: torch.dist(self.b(F.relu(self.a(x))), self.b(self.a(x))), NODES) == {"a": 8, "b": 6}


def test_windows_of_images():
    def forward(self, x):
        windows = F.unfold(self.conv(x), 2, stride=2)
        return self.mix(F.fold(F.relu(windows), (x.shape[2], x.shape[3]), 2, stride=2))

    model = Forward(forward, conv=nn.Conv2d(3, 8, 3, padding=1), mix=nn.Conv2d(8, 2, 1)).eval()
    del model.a, model.b, model.c
    assert check(model, random(2, 3, 8, 8), [random(1, 3, 6, 10)]) == {"conv": 8}


@pytest.mark.parametrize("family", ["GPTNeoX", "Phi"])
def test_heads_of_which_a_part_is_rotated(family):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rotated = {"rotary_pct": 0.25} if family == "GPTNeoX" else {"partial_rotary_factor": 0.25}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, **rotated
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(12).reshape(2, 6) % 7
    groups = check(model, tokens, [tokens.reshape(1, 12), tokens.reshape(4, 3) + 5])
    assert [size for name, size in groups.items() if name.endswith(".heads")] == [4, 4]
    reasons = {frozen.reason for frozen in prunefront.discover(model, tokens).frozen}
    assert any("side by side" in reason for reason in reasons)  # the parts of a head


class SlicedQueries(nn.Module):
    """Queries are one half of what one layer makes, keys and values a quarter each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.groups, self.width = 4, 2, 6
        self.qkv, self.out = nn.Linear(4, 48), nn.Linear(24, 3)

    def forward(self, x):
        made, edge = self.qkv(x), self.heads * self.width
        q = made[..., :edge].view(*x.shape[:2], self.heads, self.width)
        k = made[..., edge : edge + self.groups * self.width].view(*x.shape[:2], self.groups, self.width)
        v = made[..., edge + self.groups * self.width :].view(*x.shape[:2], self.groups, self.width)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, passed = q[..., : self.width], q[..., self.width :]  # all of it
        q = torch.cat([q, passed], -1)
        attended = F.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(2))


def test_queries_that_are_half_of_a_layer_are_not_tied_to_keys_and_values():
    assert sorted(check(SlicedQueries().eval(), SEQUENCES, OTHERS).values()) == [2, 2, 6]


def test_halves_of_a_head_share_their_units_in_either_order():
    def first(self, x):
        h = self.a(x)
        return self.c(F.relu(self.b(torch.cat([h[..., :4] * x[..., :1], h[..., 4:] * x[..., 1:2]], -1) + h)))

    def second(self, x):
        h = self.a(x)
        return self.c(F.relu(self.b(torch.cat([-h[..., 4:], h[..., :4]], -1) + h)))

    for forward in (first, second):
        assert "b" in prunable(forward, NODES, [MORE_NODES])

    def by_width(self, x):
        h = self.a(x)
        half = h.shape[-1] // 2
        return self.c(F.relu(self.b(torch.cat([-h[..., half:], h[..., :half]], -1) + h)))

    assert prunable(by_width, NODES, [MORE_NODES]) == {"a": 4, "b": 6}
