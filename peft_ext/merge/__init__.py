"""Merges an adapter into its base: a dense transformers model on disk, which needs neither PEFT nor this package.

    W' = merge(W, adapter)          W, W' [N, K]; an NF4 W is dequantized; merge: the method's own, in float32

The base's files are memory-mapped. One module at a time is widened to float32, merged by its layer's own ``merge``
(PEFT's, or that of :mod:`peft_ext.tuners`), rounded once to the output's dtype, and written; no other module is in
memory. There are two exceptions: a base that is used in another dtype than its files have is wholly in memory, and an
embedding and a head that are tied, where the adapter changes one of them, are in memory until both are written.
"""

from .dense import DTYPES, MergeReport, merge_to_dense
from .errors import MergeError

__all__ = ["DTYPES", "MergeError", "MergeReport", "merge_to_dense"]
