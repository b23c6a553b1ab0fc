"""The command line: ``peft-ext`` and ``python -m peft_ext``."""

__all__ = ["CliError"]


class CliError(Exception):
    """What the user can mend: shown as one line, ``error: ...``, with exit code 2."""
