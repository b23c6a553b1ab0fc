"""Loads a quantized checkpoint through transformers and keeps its weights packed, as the files store the weights.

``config`` has PackedConfig, which ``from_pretrained`` accepts as quantization_config.

``rules`` reads from a checkpoint's quantization_config how the layers are stored, and which layers stay dense.

``layouts`` has, for each layout, the names of a layer's tensors in the file, and a function that makes a PackedWeight
of the tensors.

``merging`` merges the stored tensors of a mixture's experts to the tensors of one stacked weight.

``files`` reads names, dtypes and shapes of a checkpoint's tensors from the headers of the files.

``quantizer`` replaces the layers that a checkpoint stores packed, in a model on the meta device, by packed layers,
before transformers reads the weights.
"""

from .config import PackedConfig
from .quantizer import PackedQuantizer

__all__ = ["PackedConfig", "PackedQuantizer"]
