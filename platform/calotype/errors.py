"""What a user is told: one sentence that says what, where, and what to change."""

from __future__ import annotations


class CalotypeError(Exception):
    """A failure that the user can do something about; printed without a traceback."""


class ConfigError(CalotypeError, ValueError):
    """A setting that cannot be; raised before anything starts."""


class Unreachable(CalotypeError):
    """A store that does not answer, after all patience: another attempt may find it back."""


class DataError(CalotypeError):
    """Stored bytes that are not what their manifest says, or input that cannot be used."""
