"""Reads a GGUF file as the base of a merge: a model of transformers whose weights are read when they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn

from .._imports import required
from ..gguf import GgufError, GgufHeader, read_header
from ..gguf.names import GgufNames
from ..sources.json_file import first_line
from ..weights.gguf import TYPES, gguf_weight
from .base import Base, without_memory
from .errors import as_merge_error, fail

with required("transformers", "peft_ext.merge_to_gguf"):
    from transformers import AutoModelForCausalLM, PreTrainedModel

# Architectures whose files hold the weights of norms with 1 added.
_NORMS_PLUS_ONE = ("gemma2", "gemma3", "nemotron")


class GgufBase:
    """A GGUF file as the base of a merge, with the transformers model that the file describes.

    Attributes:
        header: the file's header.
        base: the model, whose parameters take no memory. ``base.read`` decodes a parameter from the file.
        tensors: maps names in the model's ``state_dict`` to the names of the tensors in the file, for all tensors of
            the file that the model has.

    Raises: MergeError for a file whose model can't be read; OSError where the file can't be opened.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        with as_merge_error(GgufError):
            self.header = header = read_header(path)
            # gguf.metadata is imported here and not at the top, because it needs a version of transformers that reads
            # GGUF.
            from ..gguf.metadata import read_config

            config = read_config(header)
            names = GgufNames.of_file(header)
        self._names = names
        model = _model(header, config)
        self.tensors: dict[str, str] = {}
        self._orders: dict[str, Tensor] = {}
        held: set[int] = set()  # ids of the parameters for which the file has a tensor; tied parameters have one id
        state = model.state_dict(keep_vars=True)
        for name, parameter in state.items():
            module, _, leaf = name.rpartition(".")
            tensor = f"{names.tensor(module)}.{leaf}"
            if tensor in header.tensors:
                self.tensors[name] = tensor
                held.add(id(parameter))
        absent = [name for name, parameter in state.items() if id(parameter) not in held]
        dense = self._stand_in(model)
        self.base = Base(model, dense, str(header.path), None, absent=tuple(absent))

    def _stand_in(self, model: PreTrainedModel) -> dict[int, Any]:
        """Replaces the model's parameters by parameters without memory; tied parameters stay tied. Returns a dict that
        maps the id of a new parameter to a function that reads the parameter's values from the file."""
        made: dict[int, nn.Parameter] = {}
        dense: dict[int, Any] = {}
        for prefix, module in model.named_modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = without_memory(torch.float32, parameter.shape)
                module._parameters[leaf] = now = made[id(parameter)]
                name = f"{prefix}.{leaf}".lstrip(".")
                if name in self.tensors:
                    self._check_shape(name, parameter.shape)
                    dense[id(now)] = lambda name=name, shape=parameter.shape: self.read(name).view(shape)
        return dense

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        """Checks the sizes of the file's tensor of a parameter, and stores the order of the tensor's rows if
        transformers has the rows in another order."""
        tensor = self.tensors[name]
        came = self.header.tensors[tensor].shape
        if [size for size in came if size != 1] != [size for size in shape if size != 1]:
            fail(f"{self.header.path}: {tensor} has the sizes {came}, wanted {tuple(shape)} for {name}")
        with as_merge_error(ValueError, about=f"{self.header.path}: {tensor}: "):
            order = self._names.row_order(tensor.rpartition(".")[0], came[0])
        if order is not None:
            self._orders[tensor] = order

    def read(self, name: str) -> Tensor:
        """Returns a tensor of the model in float32, with its rows in transformers' order."""
        tensor = self.tensors[name]
        values = decoded(self.header.data(tensor), self.header.tensors[tensor].type)
        order = self._orders.get(tensor)
        return values if order is None else values[order]

    def in_file_order(self, name: str, values: Tensor) -> Tensor:
        """Returns the values of the model's tensor ``name`` in the file's order of rows and with the file's sizes.

        Raises MergeError for a norm that the file stores with 1 added.
        """
        tensor = self.tensors[name]
        if self.header.architecture in _NORMS_PLUS_ONE and "norm" in tensor:
            fail(f"the adapter changes {name}, which files of {self.header.architecture} store with 1 added: "
                 "wanted an adapter that changes no norm")  # fmt: skip
        order = self._orders.get(tensor)
        values = values if order is None else values[torch.argsort(order)]
        return values.reshape(self.header.tensors[tensor].shape)


def decoded(data: Tensor, type: int) -> Tensor:
    """Returns the values of a tensor in float32. ``data`` is the bytes of a quantized tensor, or a dense tensor."""
    if type in TYPES:
        return gguf_weight(data, type).dequantize()
    return data.to(torch.float32, copy=True)


def _model(header: GgufHeader, config: Any) -> PreTrainedModel:
    """Returns the model of a file on the meta device. Sets ``tie_word_embeddings``, ``vocab_size`` and ``head_dim`` in
    ``config`` as the file has them, and ``pad_token_id`` to None."""
    architecture, embedding = header.architecture, header.tensors["token_embd.weight"]
    config.tie_word_embeddings = "output.weight" not in header.tensors
    config.vocab_size, config.pad_token_id = embedding.shape[0], None
    size = header.get(f"{architecture}.attention.key_length")
    if size is not None and getattr(config, "head_dim", None) is not None:
        config.head_dim = size
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception as error:  # an untrusted file can make transformers raise any error
        fail(f"{header.path}: {first_line(error)}")
