"""The Trainer's callbacks under the import path that they have always had; ``trainer.py`` beside this file has them."""

from .trainer import *  # noqa: F403
from .trainer import __all__  # noqa: F401
