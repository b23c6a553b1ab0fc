"""The Trainer's callbacks under the import path that they have always had; they live in :mod:`.trainer`."""

from .trainer import *  # noqa: F403
from .trainer import __all__  # noqa: F401
