"""Reads GGUF, the file format of llama.cpp, and loads models whose weights stay packed as in the file.

header    the checked header of a GGUF file: metadata, and the place of each tensor
checks    whether a header is of a model that transformers and the package gguf can read
metadata  the configuration and the tokenizer that a file describes
pre_tokenizers  how a tokenizer in a file splits a text into words
facts     facts of a file that change the model's function and that transformers does not read
names     the names of a model's modules in a file, and the order in which a file stores rows
load      loads a transformers model with packed weights from a file
pack      replaces the layers of a transformers model by packed layers over the file's tensors
"""

from .checks import check_model, check_tokenizer
from .header import GgufError, GgufHeader, TensorInfo, is_gguf, read_header

__all__ = ["GgufError", "GgufHeader", "TensorInfo", "check_model", "check_tokenizer", "is_gguf", "read_header"]
