"""Exports the public names of ``peft_ext.integrations.trainer`` under a second import path."""

from .trainer import *  # noqa: F403
from .trainer import __all__  # noqa: F401
