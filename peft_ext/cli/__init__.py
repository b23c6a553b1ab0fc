"""The command line: ``peft-ext`` and ``python -m peft_ext``."""

__all__ = ["CliError"]


class CliError(Exception):
    """An error that the user can fix. The command line prints ``error: ...`` in one line and ends with exit code 2."""
