"""Hydra's configuration: one file a command, one folder a choice."""
