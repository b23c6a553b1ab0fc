"""An adapter and its base made one: a dense transformers model on disk, which needs neither PEFT nor this package.

    W' = merge(W, adapter)          W, W' [N, K]; W dequantized where it is NF4; merge: the method's own, in float32

The base's files are mapped, not read. One module at a time is widened to float32, merged by its layer's own ``merge``
(PEFT's, or that of :mod:`peft_ext.tuners`), rounded once to the dtype asked for, and written out; nothing else of the
model is held. The exceptions: a base whose files have another dtype than the one it is used in is held in that, and an
embedding tied to a head of which one is adapted is held until both are written.
"""

from .dense import DTYPES, MergeReport, merge_to_dense
from .errors import MergeError

__all__ = ["DTYPES", "MergeError", "MergeReport", "merge_to_dense"]
