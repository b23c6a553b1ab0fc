"""Runs the command ``peft-ext`` as ``python -m peft_ext``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
