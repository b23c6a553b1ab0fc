"""``load_gguf_adapter``: loads llama.cpp's adapter file onto a transformers model."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Union

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._imports import required
from ..gguf.header import GgufHeader, read_header
from ..gguf.names import GgufNames
from ..model import load_adapter
from ..sources.model import base_model, task_of
from ..weights.gguf import gguf_weight

with required("peft", "peft_ext.load_gguf_adapter"):
    from peft import LoraConfig, PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME


def load_gguf_adapter(
    model: nn.Module, file: Union[str, Path], adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Loads llama.cpp's adapter file onto ``model`` as a LoRA adapter of PEFT, then calls :func:`peft_ext.accelerate`.

    The configuration of the new adapter names each adapted module. ``lora_alpha`` is the file's alpha, and rank_pattern
    has the ranks that differ from the most frequent rank. If the file's alpha is 0 or missing, each module's alpha is
    its rank, because llama.cpp then adds ``B @ A`` without a factor. The matrices are converted to float32, and the
    rows of lora_B are reordered to transformers' order. A file that :func:`peft_ext.write_gguf_adapter` wrote in "f32"
    therefore gives exactly the values of the saved adapter, except where the export multiplied a matrix with a factor
    or with AdaLoRA's singular values.

    Args:
        model: a transformers model, or a PeftModel, which gets another adapter.
        file: path of llama.cpp's adapter file, which is a GGUF file.
        adapter_name: the adapter's name in the model.
        kwargs: further arguments of :func:`peft_ext.load_adapter`, such as ``is_trainable``.

    Returns: the PeftModel, which is ``model`` itself where ``model`` is a PeftModel.

    Raises:
        TypeError: ``model`` is no transformers model.
        OSError: the file can't be read.
        peft_ext.gguf.GgufError: the file is damaged, is no adapter file of plain LoRA, holds other tensors than pairs
            of matrices of finite floats, or does not fit the model.
        ValueError: the model's architecture is not known; the errors of :func:`peft_ext.load_adapter`.
    """
    base = base_model(model) if isinstance(model, nn.Module) else model
    if not isinstance(base, nn.Module) or not hasattr(base, "config"):
        raise TypeError(f"load_gguf_adapter: model is {type(model).__name__}, wanted a transformers model")
    names = GgufNames.of_config(base.config)
    header = read_header(file)
    alpha = _checked_alpha(header, names)
    modules = {f"{tensor}.weight": path for path, _ in base.named_modules() if (tensor := names.tensor(path))}
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in _pairs(header):
        if name not in modules:
            raise header.error(f"the adapter changes {name:.80}, which {type(base).__name__} does not have")
        path = modules[name]
        ranks[path] = _read_pair(header, names, name, path, base, tensors)
    rank = Counter(ranks.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank, lora_alpha=int(alpha) if alpha.is_integer() else alpha, target_modules=sorted(ranks),
        rank_pattern={path: r for path, r in ranks.items() if r != rank}, task_type=task_of(base),
        base_model_name_or_path=getattr(base, "name_or_path", None), inference_mode=True,
    )  # fmt: skip
    if alpha == 0:  # with alpha 0, llama.cpp adds B A without a factor
        config.lora_alpha, config.alpha_pattern = rank, {path: r for path, r in ranks.items() if r != rank}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        return load_adapter(model, folder, adapter_name, **kwargs)


def _checked_alpha(header: GgufHeader, names: GgufNames) -> float:
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (value := header.text(key)) != wanted:
            raise header.error(f"{key} is {value!r:.60}, wanted {wanted!r}")
    if header.architecture != names.architecture:
        came = f"{header.architecture!r:.60}"
        raise header.error(f"general.architecture is {came}, the model's architecture is {names.architecture!r}")
    if "adapter.alora.invocation_tokens" in header:
        raise header.error("the file has adapter.alora.invocation_tokens (aLoRA), wanted plain LoRA")
    alpha = header.get("adapter.lora.alpha", 0.0)
    if type(alpha) is not float or not math.isfinite(alpha):
        raise header.error(f"adapter.lora.alpha is {alpha!r:.60}, wanted a finite float32")
    return alpha


def _pairs(header: GgufHeader) -> list[str]:
    """Returns the names of the base's tensors that the file adapts, in the file's order. Raises GgufError where the
    file has other tensors than pairs of lora_a and lora_b."""
    found: dict[str, set[str]] = {}
    for name in header.tensors:
        stem, _, ending = name.rpartition(".")
        if ending not in ("lora_a", "lora_b"):
            raise header.error(f"tensor {name!r:.80} is no lora_a or lora_b")
        found.setdefault(stem, set()).add(ending)
    for stem, endings in found.items():
        if len(endings) != 2:
            raise header.error(f"tensor {stem!r:.80} has {endings.pop()} alone, wanted lora_a and lora_b")
    if not found:
        raise header.error("the file has no tensors")
    return list(found)


def _read_pair(
    header: GgufHeader, names: GgufNames, name: str, path: str, base: nn.Module, tensors: dict[str, Tensor]
) -> int:
    """Puts the two matrices of one module into ``tensors``, under PEFT's names, and returns the rank of the matrices.

    Raises GgufError where the matrices do not fit the module of the model.
    """
    first, second = (_floats(header, f"{name}.{ending}") for ending in ("lora_a", "lora_b"))
    module = base.get_submodule(path)
    embedding = name == "token_embd.weight"
    if embedding:
        first = first.T
    outputs, inputs = second.shape[0], first.shape[1]
    if first.shape[0] != second.shape[1]:
        raise header.error(f"{name}: lora_a has the rank {first.shape[0]}, lora_b has the rank {second.shape[1]}")
    sizes = ("num_embeddings", "embedding_dim") if embedding else ("in_features", "out_features")
    wanted = tuple(getattr(module, size, None) for size in sizes)
    if (inputs, outputs) != wanted:
        raise header.error(f"{name}: the adapter has {inputs} inputs and {outputs} outputs, {path} of the model has "
                           f"{wanted[0]} and {wanted[1]}")  # fmt: skip
    if name in ("token_embd.weight", "output.weight") and getattr(base.config, "tie_word_embeddings", False):
        raise header.error(f"the adapter changes {name}, but the model's embedding and head are one weight")
    try:
        order = names.row_order(name.removesuffix(".weight"), outputs)
    except ValueError as error:
        raise header.error(f"{name}: {error}") from None
    if order is not None:
        second = second[order]
    endings = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    for ending, matrix in zip(endings, (first, second), strict=True):
        tensors[f"base_model.model.{path}.{ending}"] = matrix.contiguous()
    return first.shape[0]


def _floats(header: GgufHeader, name: str) -> Tensor:
    """Returns a matrix of the file in float32, in new memory. Raises GgufError for a tensor that is no matrix of finite
    floats."""
    info = header.tensors[name]
    if len(info.shape) != 2:
        raise header.error(f"tensor {name!r:.80} has the sizes {info.shape}, wanted a matrix")
    if info.dtype is None:
        matrix = gguf_weight(header.data(name), info.type, info.shape).dequantize()
    elif info.dtype.is_floating_point:
        matrix = header.data(name).to(torch.float32, copy=True)
    else:
        raise header.error(f"tensor {name!r:.80} is {info.type_name}, wanted floats")
    if not matrix.isfinite().all():
        raise header.error(f"tensor {name!r:.80} has values that are not finite")
    return matrix
