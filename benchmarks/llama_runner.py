"""Runs a GGUF file and an adapter file in llama.cpp, through the C functions of the package llama-cpp-python.

llama.cpp rounds the input of a product with a weight: to 8 bits if the weight is quantized, and to float16 if the
weight is float16. The cache of keys and values is float32 and attention is not fused, so that the weights' types alone
decide how llama.cpp rounds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

# Names of llama.cpp's file types -> names of their constants in the package llama_cpp.
FILE_TYPES = {
    "F32": "LLAMA_FTYPE_ALL_F32", "F16": "LLAMA_FTYPE_MOSTLY_F16", "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "Q6_K": "LLAMA_FTYPE_MOSTLY_Q6_K", "Q4_K_M": "LLAMA_FTYPE_MOSTLY_Q4_K_M", "Q4_1": "LLAMA_FTYPE_MOSTLY_Q4_1",
    "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
}  # fmt: skip
_CONTEXT = 512
_WARN = 2  # GGML_LOG_LEVEL_WARN
_said: list[str] = []
_callbacks: list[Any] = []


class LlamaError(RuntimeError):
    """Raised if llama.cpp refuses a file or a call. The message ends with the last lines that llama.cpp printed."""


def _library() -> Any:
    """Returns the package llama_cpp, whose messages go into ``_said`` and not to standard error."""
    import llama_cpp

    if not _callbacks:

        def say(level: int, text: bytes, data: Any) -> None:
            if level >= _WARN:
                _said.append(text.decode(errors="replace").strip())

        _callbacks.append(llama_cpp.llama_log_callback(say))
        llama_cpp.llama_backend_init()
    # The package llama_cpp sets its own log callback when it is imported, and again for each of its Llama objects.
    llama_cpp.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
    return llama_cpp


def _error(what: str) -> LlamaError:
    return LlamaError(f"{what}: {' '.join(_said[-3:])}")


def quantize_file(source: Path, target: Path, kind: str, threads: int = 1) -> None:
    """Lets llama.cpp's own quantizer write the GGUF file ``target`` of the file type ``kind`` from the file ``source``.
    Raises LlamaError if llama.cpp fails."""
    llama = _library()
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = getattr(llama, FILE_TYPES[kind]), threads
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise _error(f"quantizing {source} to {kind}")


class Runner:
    """A model in llama.cpp, and a context manager that frees the model.

    Args:
        model: the GGUF file.
        adapter: an adapter file, which is applied with scale 1; None: no adapter.
        threads: number of llama.cpp's threads. More threads than free cores are slow, because the threads wait for each
            other in a busy loop.

    Raises: LlamaError if llama.cpp cannot load the model or the adapter, or cannot make a context.
    """

    def __init__(self, model: Path, adapter: Optional[Path] = None, threads: int = 1) -> None:
        self._llama = llama = _library()
        self._model = self._context = None
        _said.clear()
        options = llama.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama.llama_model_load_from_file(str(model).encode(), options)
        if not self._model:
            raise _error(f"loading {model}")
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = _CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # The adapter is loaded before the context is made, because llama.cpp sizes the context's graph by the loaded
        # adapters.
        loaded = None
        if adapter is not None:
            loaded = llama.llama_adapter_lora_init(self._model, str(adapter).encode())
            if not loaded:
                raise _error(f"loading {adapter}")
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise _error(f"a context for {model}")
        if loaded:
            adapters, scales = (llama.llama_adapter_lora_p_ctypes * 1)(loaded), (ctypes.c_float * 1)(1.0)
            if llama.llama_set_adapters_lora(self._context, adapters, 1, scales):
                raise _error(f"applying {adapter}")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)  # also frees the model's adapter
        self._context = self._model = None

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns the logits, float32 ``[tokens, vocabulary]``, of one prompt of at most 512 tokens. Raises LlamaError
        if llama.cpp fails."""
        llama, count = self._llama, len(tokens)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch = llama.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            if llama.llama_decode(self._context, batch):
                raise _error("llama_decode")
            found = llama.llama_get_logits(self._context)
            return np.ctypeslib.as_array(found, shape=(count, self._vocabulary)).copy()
        finally:
            llama.llama_batch_free(batch)

    def greedy(self, tokens: Sequence[int], count: int, stop: int) -> list[int]:
        """Returns up to ``count`` generated tokens, each the most likely next token. Ends after the token ``stop``."""
        found: list[int] = []
        while len(found) < count and stop not in found:
            found.append(int(self.logits([*tokens, *found])[-1].argmax()))
        return found
