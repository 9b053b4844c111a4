"""What our own modes of torch have in common."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class EagerMode(TorchDispatchMode):
    """A mode that no compiled code runs in. torch guards its modes against its compiler otherwise, which takes two
    seconds to import."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
