"""Makes a model on the meta device, with the plan by which its tensors are read from files."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from torch import nn

from ..quantize import quantize_meta
from ..sources.conversion import Group, plan
from ..sources.json_file import raised_as
from ..sources.model import SourceError, widen
from ..sources.tensor_files import TensorFiles

_LISTS = ("layers", "layer", "h", "blocks")  # usual names of a list of decoder layers


@dataclass
class MetaBase:
    """A model on the meta device, and the plan by which its tensors are made from the files.

    Attributes:
        model: the transformers model. Buffers that are in no file have values, on the CPU.
        folder: the folder of the files.
        layers: the decoder layers, which are the units of FSDP2.
        groups: the plan, in the order of the decoder layers. Each item of the plan is a group and the index of the
        group's decoder layer, or -1.
        places: name in the state dict of the dense model -> the module and its attribute that hold the tensor.
    """

    model: Any
    folder: Path
    files: TensorFiles
    layers: list[nn.Module]
    groups: list[tuple[Group, int]]
    places: dict[str, tuple[nn.Module, str]]


def meta_base(
    folder: Union[str, Path], config: Any, *, dtype: torch.dtype, quant: str = "none", blocksize: int = 64
) -> MetaBase:
    """Returns the frozen causal language model of ``folder`` on the meta device, in eval mode.

    The function reads the headers of the files and no weight, and communicates with no other process. The weights are
    rounded to bfloat16 when they are read, and then cast to ``dtype``.

    Args:
        folder: a folder with config.json and safetensors files.
        config: the transformers configuration, which is copied.
        dtype: bfloat16 or float32, the dtype of dense weights.
        quant: "nf4" puts :class:`peft_ext.nn.NF4Linear` and NF4 experts where :func:`peft_ext.quantize_nf4` puts them;
            "none" does not.
        blocksize: see :func:`peft_ext.quantize_nf4`. The scales are quantized too.

    Raises: SourceError where a file is missing or broken, where the files lack a tensor or have a tensor of a wrong
    shape or dtype, where transformers converts the files in a way that needs the whole model, where the files are
    quantized, or where the decoder layers are not found. ValueError for another ``dtype`` or ``quant``.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in (torch.bfloat16, torch.float32) or quant not in ("nf4", "none"):
        raise ValueError(f"meta_base: dtype is {dtype} and quant {quant!r}, wanted bfloat16 or float32, nf4 or none")
    folder, config = Path(folder), copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        raise SourceError(f"model {folder}: the weights are quantized, wanted dense weights")
    config.name_or_path = str(folder)
    with raised_as(SourceError, f"model {folder}: ", ValueError, TypeError, KeyError, RuntimeError):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    if not all(parameter.is_meta for parameter in model.parameters()):
        model.to("meta")  # some models make parameters on the CPU
        model.tie_weights()
    model.eval().requires_grad_(False)
    files, known = TensorFiles(folder), set(model.state_dict())
    groups, initialized = plan(model, files, torch.bfloat16)
    _initialize_buffers(model, initialized)
    _read_generation_config(model, folder)
    layers = decoder_layers(model)
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    if quant == "nf4":
        quantize_meta(model, blocksize)
    if dtype != torch.bfloat16:
        widen(model)
    places = {}
    for group in groups:
        for name in known.intersection(group.shapes):
            owner, _, attribute = name.rpartition(".")
            places[name] = (model.get_submodule(owner), attribute)
    units = [next((i for i, name in enumerate(names) if group.name.startswith(f"{name}.")), -1) for group in groups]
    in_order = sorted(zip(groups, units, strict=True), key=lambda item: item[1])
    return MetaBase(model, folder, files, layers, in_order, places)


def _initialize_buffers(model: Any, names: set[str]) -> None:
    """Gives values to the buffers that are in no file, as ``from_pretrained`` does: with the model's ``_init_weights``.

    ``names``: buffers of the state dict that the files lack.
    """
    kept = {name for name, _ in model.named_non_persistent_buffers()} | names
    for name, buffer in list(model.named_buffers()):
        if name in kept:
            owner, _, local = name.rpartition(".")
            model.get_submodule(owner)._buffers[local] = torch.empty_like(buffer, device="cpu")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in kept:
            tensor._is_hf_initialized = True  # transformers initializes only tensors without this mark
    model.initialize_weights()


def _read_generation_config(model: Any, folder: Path) -> None:
    """Sets the generation configuration as ``from_pretrained`` does."""
    if hasattr(model, "adjust_generation_fn"):
        hub = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
        model.adjust_generation_fn(None, True, None, str(folder), force_download=False, local_files_only=True,
                                   subfolder="", trust_remote_code=False, **hub)  # fmt: skip


def decoder_layers(model: Any) -> list[nn.Module]:
    """Returns the decoder layers of a transformers model: the items of the lists of ``_no_split_modules``.

    For a model whose class names no such modules, returns the items of the lists with a name of ``_LISTS``. A list
    inside of another list does not count. Raises SourceError where there is no list of decoder layers.
    """
    whole = set(getattr(model, "_no_split_modules", None) or ())
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    chosen = [(name, module) for name, module in lists if all(type(item).__name__ in whole for item in module)]
    if not chosen:
        chosen = [(name, module) for name, module in lists if name.rpartition(".")[2] in _LISTS]
    if not chosen:
        raise SourceError(f"{type(model).__name__}: no list of decoder layers, wanted a list of "
                          f"{', '.join(sorted(whole)) or 'layers'}")  # fmt: skip
    outer = [module for name, module in chosen if not any(name.startswith(f"{above}.") for above, _ in chosen)]
    return [layer for module in outer for layer in module]
