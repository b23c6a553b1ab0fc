"""``python -m peft_ext``: the same as ``peft-ext``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
