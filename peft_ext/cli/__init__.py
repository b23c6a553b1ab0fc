"""The command line: ``peft-ext`` and ``python -m peft_ext``."""
