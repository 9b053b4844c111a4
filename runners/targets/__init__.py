"""Targets: where latency is measured."""

from .command import CommandTarget
from .local import OnnxTarget, TorchTarget
from .ssh import SshTarget

__all__ = ["CommandTarget", "OnnxTarget", "SshTarget", "TorchTarget"]
