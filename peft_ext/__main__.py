"""Runs the command ``peft-ext`` as ``python -m peft_ext``."""

from .cli.main import run

if __name__ == "__main__":
    run()
