"""Converts adapters between PEFT's folders and llama.cpp's adapter files.

For each adapted weight W, llama.cpp computes ``y = x Wᵀ + alpha / r · (x Aᵀ) Bᵀ``, where all pairs (A, B) of a file
have one ``alpha``, and r is the rank of the weight's own pair. :func:`write_gguf_adapter` writes a file of these pairs;
:func:`load_gguf_adapter` loads a file onto a transformers model.

Source: llama.cpp ``src/llama-adapter.cpp`` and ``convert_lora_to_gguf.py``.
"""

from .errors import ExportError
from .reader import load_gguf_adapter
from .writer import ExportReport, write_gguf_adapter

__all__ = ["ExportError", "ExportReport", "load_gguf_adapter", "write_gguf_adapter"]
