"""Every error that prunefront raises on purpose."""


class PrunefrontError(Exception):
    """Root of all errors that tell the user what to do next."""


class TraceError(PrunefrontError):
    """The model could not be run on the example inputs."""


class ModelError(PrunefrontError, TypeError):
    """The model is wrapped, quantised or parametrised, and must be unwrapped first."""


class EmptySpaceError(PrunefrontError, ValueError):
    """The model has nothing that may be pruned."""


class PlanError(PrunefrontError, ValueError):
    """A plan does not belong to the space, or its widths are out of range."""


class StorageError(PrunefrontError, ValueError):
    """A file is missing, truncated, tampered with, or cannot be written."""


class BudgetError(PrunefrontError, ValueError):
    """A budget has an unknown key or unit, or no plan can meet it."""


class CalibrationError(PrunefrontError, ValueError):
    """Calibration data is empty, too small, or does not fit the model."""


class SearchError(PrunefrontError, RuntimeError):
    """The search cannot start or cannot go on."""


class ConfigError(PrunefrontError, ValueError):
    """An option has an unknown name or a value of the wrong kind."""


class TargetError(PrunefrontError):
    """A target cannot measure: unreachable, its runtime is missing, an export failed, a model hangs."""


class FinetuneError(PrunefrontError, RuntimeError):
    """Fine-tuning cannot start or cannot go on."""
