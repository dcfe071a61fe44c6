"""What telltale raises when it is given something it cannot use.

Every message is one sentence or two that say what was given, what was expected and what to do. Values that
are wrong in kind or range also derive from ``ValueError`` (or ``NotImplementedError``), so that code which
knows nothing of telltale still catches what it expects.
"""

from __future__ import annotations


class TelltaleError(Exception):
    """Base of every error that telltale raises on purpose; the CLI prints it and exits with code 2."""


class ConfigError(TelltaleError, ValueError):
    """An argument or a config field is outside what is allowed; names field, value and allowed range."""


class CheckpointError(TelltaleError):
    """A checkpoint or run directory is missing, incomplete, or could not be written."""


class DataError(TelltaleError, ValueError):
    """A corpus, dataset, prompt or tokenizer cannot be used as given."""


class PlanError(TelltaleError, ValueError):
    """No pipeline plan satisfies the constraints."""


class BudgetError(TelltaleError, ValueError):
    """A budget of time, bytes or tokens cannot be kept."""


class CalibrationError(TelltaleError, ValueError):
    """A calibration cannot be made from what was recorded, or belongs to other models; says which and why."""


class NumericalError(TelltaleError, ArithmeticError):
    """A model produced NaN or infinite values where finite ones are needed."""


class UnsupportedModelError(TelltaleError, NotImplementedError):
    """The model's family or one of its features is not supported; names it and lists what is."""


class MissingExtraError(TelltaleError, ImportError):
    """An optional dependency is not installed; the message is the ``pip install`` line that adds it."""
