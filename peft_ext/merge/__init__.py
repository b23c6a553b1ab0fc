"""Merges an adapter into its base: writes a dense transformers model, which needs neither PEFT nor peft_ext, or a GGUF
file, see :mod:`peft_ext.merge.gguf`.

    W' = merge(W, adapter) W, W' [N, K]; a packed W is dequantized; merge: the method's own, in float32

One module at a time is widened to float32, merged by its layer's own ``merge`` (PEFT's, or that of
:mod:`peft_ext.tuners`), rounded once to the output's dtype, and written. The files of a base on disk are memory-mapped,
so that modules take no memory before their merge, with three exceptions. A base that is loaded in another dtype than
the dtype of its files is wholly in memory. A tied embedding and head, of which the adapter changes one, are in memory
until both are written. Modules whose tensors transformers joins when it saves a model are in memory together.
"""

from .dense import DTYPES, MergeReport, merge_to_dense
from .errors import MergeError
from .gguf import GgufMergeReport, merge_to_gguf

__all__ = ["DTYPES", "GgufMergeReport", "MergeError", "MergeReport", "merge_to_dense", "merge_to_gguf"]
