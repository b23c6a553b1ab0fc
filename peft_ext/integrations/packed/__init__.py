"""Loads a quantized checkpoint through transformers and keeps its weights packed, as they lie in the files.

config      PackedConfig, which from_pretrained accepts as quantization_config
rules       what a checkpoint's quantization_config says: how the layers are stored, and which layers stay dense
layouts     for each layout: the names of a layer's tensors in the file, and how they make a PackedWeight
merging     how the stored tensors of a mixture's experts become the tensors of one stacked weight
files       names, dtypes and shapes of a checkpoint's tensors, read from the headers of the files
quantizer   replaces the layers of a model on the meta device by packed layers, before transformers reads the weights
"""

from .config import PackedConfig
from .quantizer import PackedQuantizer

__all__ = ["PackedConfig", "PackedQuantizer"]
