"""Whether the machine is as fast as it was: what no counter of its own shows.

Other virtual machines on the same hardware take caches and memory bandwidth, and a processor that is hot or out of
battery slows down. Then the dense model takes some percent longer, and another model perhaps a third: ratios measured
then are not those of before (docs/latency.md has an example). The dense model is measured beside every other one, so
its time tells; what was measured in a slow spell is measured again.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from .measurement import Measurement

logger = logging.getLogger(__name__)

#: The dense model may take so much longer than at its best, or what single measurements may be off where that is more.
SLOWER = 0.04
#: Seconds before another attempt, and that attempts of one search may take beyond as long as all good measurements did.
PAUSE_S, PATIENCE_S = 2.0, 180.0


class Pace:
    """Remembers the best time of every dense model."""

    def __init__(self) -> None:
        self._best_ms: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
        self._good_s = self._lost_s = 0.0

    def expect(self, dense: nn.Module, milliseconds: float) -> None:
        """``dense`` was measured with so many before."""
        self._best_ms[dense] = min(milliseconds, self._best_ms.get(dense, milliseconds))

    def kept(
        self, dense: nn.Module, measure: Callable[[], Sequence[Measurement]], slower: float = SLOWER
    ) -> list[Measurement]:
        """What ``measure`` finds, ``dense`` first, at the best pace that is known, or ``slower`` by at most this share.

        When that does not come back, the present pace is the one to compare with from then on, and measurements say so.
        """
        while True:
            start = time.monotonic()
            found = list(measure())
            now_ms, best_ms = found[0].median_ms, self._best_ms.get(dense)
            if best_ms is None or found[0].low_ms <= (1 + slower) * best_ms:
                self._good_s += time.monotonic() - start
                self.expect(dense, now_ms)
                return found
            if self._lost_s > self._good_s + PATIENCE_S:
                self._best_ms[dense], self._lost_s = now_ms, 0.0
                told = f"the machine has become slower: the dense model takes {now_ms / best_ms - 1:.0%} longer"
                logger.warning("%s; what was measured before may not agree with what follows", told)
                return [replace(one, warnings=(*one.warnings, told)) for one in found]
            # Said aloud once a spell: it may take minutes.
            level = logging.INFO if self._lost_s else logging.WARNING
            told_s = self._good_s + PATIENCE_S - self._lost_s
            text = "%.3g ms for the dense model instead of %.3g: a slow spell is waited for, up to %.0f s more"
            logger.log(level, text, now_ms, best_ms, told_s)
            time.sleep(PAUSE_S)
            self._lost_s += time.monotonic() - start


def steady(times_ms: Sequence[float], slower: float = SLOWER) -> list[bool]:
    """Which of the dense model's times belong to its usual pace: at most this share above their lower quartile.

    What was measured first had nothing to be compared with.
    """
    reference = sorted(times_ms)[len(times_ms) // 4]
    return [value <= (1 + slower) * reference for value in times_ms]
