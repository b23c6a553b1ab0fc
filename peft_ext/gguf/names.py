"""The names of a model's modules in GGUF files, and the order in which a file stores the rows of a weight.

The package ``gguf`` has the names for each architecture. llama.cpp's converter reorders the rows of a few weights, so
that llama.cpp's rotary positions can rotate pairs of neighbouring features. The class :class:`GgufNames` gives the
names, and the order of reordered rows.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor

from .._imports import required
from ..weights.gguf import llama_row_order
from .checks import MOST_LAYERS
from .header import GgufError, GgufHeader

# transformers' model type -> architecture of GGUF, and whether the file interleaves the rows of attn_q and attn_k. All
# other matrices of the architectures in this table have the layout of transformers' model.
# Source: llama.cpp convert_hf_to_gguf.py (modify_tensors), transformers modeling_gguf_pytorch_utils.py.
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "phi3": ("phi3", False),
    "stablelm": ("stablelm", False),
    "starcoder2": ("starcoder2", False),
    "gemma2": ("gemma2", False),
    "gemma3_text": ("gemma3", False),
    "nemotron": ("nemotron", False),
    "lfm2": ("lfm2", False),
}
_INTERLEAVED = {architecture for architecture, interleaved in ARCHITECTURES.values() if interleaved}


class GgufNames:
    """The names of one model's tensors in GGUF files, and the order of the rows of these tensors.

    Args:
        architecture: GGUF's name of the model's architecture, such as "llama"; see ``ARCHITECTURES``.
        layers: number of layers of the model.
        heads, kv_heads: numbers of attention heads and of key-value heads of each layer.

    Raises: ValueError for an architecture that ``ARCHITECTURES`` or the installed package gguf does not have;
        ImportError without the package gguf.
    """

    def __init__(self, architecture: str, layers: int, heads: int, kv_heads: int) -> None:
        with required("gguf", "names of GGUF tensors"):
            from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        known = {name for name, _ in ARCHITECTURES.values()}
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        if architecture not in known or architecture not in numbers:
            wanted = ", ".join(sorted(known))
            raise ValueError(f"gguf: the architecture is {architecture!r:.60}, wanted one of {wanted}")
        self.architecture, self.layers, self.heads, self.kv_heads = architecture, layers, heads, kv_heads
        self._map = get_tensor_name_map(numbers[architecture], layers)

    @classmethod
    def of_file(cls, header: GgufHeader) -> GgufNames:
        """Returns the names of the tensors of the model in a GGUF file.

        Raises GgufError for an architecture that ``ARCHITECTURES`` does not have, and where the metadata has no number
        of layers or heads, or a number below 1 or above ``MOST_LAYERS``.
        """
        architecture = header.architecture

        def size(key: str, default: Optional[int] = None) -> int:
            value = header.get(f"{architecture}.{key}", default)
            if isinstance(value, list):  # the metadata has a number for each layer
                value = max(value, default=0)
            if type(value) is not int or value < 1:
                raise header.error(f"{architecture}.{key} is {value!r:.60}, wanted a positive integer")
            if value > MOST_LAYERS:  # the package gguf makes a name for each layer
                raise header.error(f"{architecture}.{key} is {value}, wanted at most {MOST_LAYERS}")
            return value

        heads = size("attention.head_count")
        try:
            return cls(architecture, size("block_count"), heads, size("attention.head_count_kv", heads))
        except GgufError:
            raise
        except ValueError as error:
            raise header.error(str(error).removeprefix("gguf: ")) from None

    @classmethod
    def of_config(cls, config: Any) -> GgufNames:
        """Returns the names for the model of a transformers configuration. Raises ValueError for a model type that
        ``ARCHITECTURES`` does not have."""
        if config.model_type not in ARCHITECTURES:
            wanted = ", ".join(ARCHITECTURES)
            raise ValueError(f"gguf: the model type is {config.model_type!r:.60}, wanted one of {wanted}")
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(ARCHITECTURES[config.model_type][0], config.num_hidden_layers, heads, kv_heads)

    def tensor(self, module: str) -> Optional[str]:
        """Returns the name in GGUF files of the module ``module`` of transformers' model, without ".weight"; None if
        GGUF has no name for the module.

        For example, the name of "model.layers.0.self_attn.q_proj" is "blk.0.attn_q".
        """
        return self._map.get_name(module)

    def row_order(self, tensor: str, rows: int) -> Optional[Tensor]:
        """Returns int64 ``[rows]``: row i of transformers' weight is row ``order[i]`` of the file's ``tensor``.

        Returns None if the file has the rows in the order of transformers' weight.

        Raises ValueError if the rows of ``tensor`` are reordered and ``rows`` is not a multiple of twice the number of
        the tensor's heads.
        """
        kind = tensor.rpartition(".")[2]
        if self.architecture not in _INTERLEAVED or kind not in ("attn_q", "attn_k"):
            return None
        return llama_row_order(rows, self.heads if kind == "attn_q" else self.kv_heads)
