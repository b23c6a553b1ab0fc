"""The command line: ``peft-ext`` and ``python -m peft_ext``."""

__all__ = ["CliError"]


class CliError(Exception):
    """An error that the user can mend. The command prints one line, ``error: ...``, and ends with exit code 2."""
