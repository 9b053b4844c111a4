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
