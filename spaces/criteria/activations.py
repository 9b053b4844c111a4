"""Criteria that look at what consumers multiply."""

from __future__ import annotations

import logging

import numpy as np

from ..groups import Group
from ..least_squares import as_matrix
from ..units import by_unit, columns, positions
from .blocks import adds_itself
from .evidence import Evidence, Scores
from .weights import l2_of

logger = logging.getLogger(__name__)


def activation(evidence: Evidence) -> list[Scores]:
    """Mean square of a unit's activations times the squared norm of the weights on them, summed over its consumers.

    The products are Wanda's (Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models), added
    up by structure as in FLAP (An et al. 2023), which takes variances instead of mean squares, and Minitron
    (Muralidharan et al. 2024), which leaves the weights out; every consumer counts relative to its own mean. Of layers:
    block influence, 1 - cosine similarity of input and output (Men et al. 2024, ShortGPT); of branches: their energy
    relative to that of the stream. Units that no consumer multiplies (experts in one parameter): ``l2``.
    """
    return [activation_of(evidence, index) for index in range(len(evidence.structure.groups))]


def activation_of(evidence: Evidence, index: int) -> Scores:
    """:func:`activation` of the group ``index``."""
    group = evidence.structure.groups[index]
    if group.blocks:
        return np.array([_of_block(evidence, group, unit) for unit in range(group.size)])
    names = consumers_of(evidence, index)
    if not names:
        logger.info("%s: no consumer multiplies its units: scored by their weights", group.name)
        return l2_of(evidence, index)
    return np.sum([_of_consumer(evidence, name, index) for name in names], axis=0)


def consumers_of(evidence: Evidence, index: int) -> list[str]:
    """Names of the consumers whose inputs are made of units of the group ``index``."""
    tensors, moments = evidence.structure.tensors, evidence.statistics.moments
    return [n for n, m in moments.items() if any(index in term for term in tensors[n][m.in_dim])]


def _of_consumer(evidence: Evidence, name: str, index: int) -> Scores:
    moments = evidence.statistics.moments[name]
    weight = evidence.model.get_parameter(name).detach()
    norms = as_matrix(weight, moments).double().square().sum(0)
    places = positions(evidence.structure, name, moments.in_dim, index)
    places = columns(places, len(norms) // weight.shape[moments.in_dim])
    scores: Scores = by_unit(norms * moments.mean_squares, places).cpu().numpy()
    return scores / max(scores.mean(), 1e-30)


def _of_block(evidence: Evidence, group: Group, unit: int) -> float:
    moments = evidence.blocks[group.blocks[unit]]
    if adds_itself(group, unit):
        return moments.turn / max(moments.positions, 1)
    return moments.output / max(moments.stream, 1e-30)
