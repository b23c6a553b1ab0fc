"""GGUF, the file format of llama.cpp: reading files, and models whose weights stay packed as in the file.

header    the checked header of a file: metadata, and the place of each tensor
checks    whether a header is of a model that transformers and the package gguf can read
"""

from .checks import check_model, check_tokenizer
from .header import GgufError, GgufHeader, TensorInfo, is_gguf, read_header

__all__ = ["GgufError", "GgufHeader", "TensorInfo", "check_model", "check_tokenizer", "is_gguf", "read_header"]
