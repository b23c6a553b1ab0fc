"""Makes a model on the meta device, and plans how the tensors in the model's files become the model's tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from torch import nn

from ..nn import PackedExperts
from ..nn.packed import HoldsPacked
from ..quantize import quantize_meta
from ..sources.conversion import Group, plan
from ..sources.json_file import raised_as
from ..sources.model import SourceError, pack_as_stored, stored_quant, widen
from ..sources.tensor_files import TensorFiles
from ..weights.quantizers import PACKED_FORMATS

_LISTS = ("layers", "layer", "h", "blocks")  # usual names of a list of decoder layers


@dataclass
class MetaBase:
    """A model on the meta device, and the plan of how to make the model's tensors from the files.

    Attributes:
        model: the transformers model. Buffers that are in no file are on the CPU and have their values.
        folder: the folder of the model's files.
        layers: the decoder layers, which are the units of FSDP2.
        groups: the plan, a list in the order of the decoder layers. Each item is a tuple of a group of tensors and the
            index of the group's decoder layer; the index is -1 for a group outside of the decoder layers.
        places: a dict that maps each name in the dense model's state dict that a group makes to a tuple: the module
            that holds the tensor of this name, and the name of the module's attribute.
        quant: the format to which dense weights are quantized when they are read: "nf4" or one of ``PACKED_FORMATS``;
            "none" where the tensors stay as the files have them.
        quantizer, packed: for a packed checkpoint, the quantizer of :class:`peft_ext.PackedConfig`, and each packed
            linear layer and embedding with the name that it has before an adapter is added; None and [] for a dense
            checkpoint.
    """

    model: Any
    folder: Path
    files: TensorFiles
    layers: list[nn.Module]
    groups: list[tuple[Group, int]]
    places: dict[str, tuple[nn.Module, str]]
    quant: str = "none"
    quantizer: Any = None
    packed: list[tuple[str, HoldsPacked]] = field(default_factory=list)


def meta_base(
    folder: Union[str, Path], config: Any, *, dtype: torch.dtype, quant: str = "none", blocksize: int = 64
) -> MetaBase:
    """Returns the frozen causal language model of ``folder`` on the meta device, in eval mode.

    The function reads the headers of the files and no weight, and communicates with no other process. Dense weights
    (except those that transformers keeps in float32) are rounded to bfloat16 when they are read, and then cast to
    ``dtype``. Weights that the files store packed, in a way that :class:`peft_ext.PackedConfig` supports, stay packed.

    Args:
        folder: a folder with config.json and safetensors files.
        config: the transformers configuration, which is copied.
        dtype: bfloat16 or float32, the dtype of dense weights.
        quant: "nf4" quantizes the layers and experts that :func:`peft_ext.quantize_nf4` quantizes; one of
            ``PACKED_FORMATS`` quantizes the layers and experts that :func:`peft_ext.quantize_packed` quantizes; "none"
            quantizes nothing.
        blocksize: see :func:`peft_ext.quantize_nf4`. NF4 weights are double-quantized: their scales are quantized too.

    Raises: SourceError where a file is missing or broken, where the files lack a tensor or have a tensor of a wrong
    shape or dtype, where transformers converts the files in a way that needs the whole model, where the files are
    quantized by bitsandbytes or in a way that is not supported, where a layer's shape does not fit ``quant``, where
    ``quant`` is not "none" and the files are packed already, or where the decoder layers are not found. ValueError for
    another ``dtype`` or ``quant``.
    """
    from transformers import AutoModelForCausalLM

    formats = ("nf4", *PACKED_FORMATS, "none")
    if dtype not in (torch.bfloat16, torch.float32) or quant not in formats:
        raise ValueError(f"meta_base: dtype is {dtype} and quant {quant!r}, wanted bfloat16 or float32, and one of "
                         f"{', '.join(formats)}")  # fmt: skip
    folder, config = Path(folder), copy.deepcopy(config)
    stored = stored_quant(folder, config)
    if stored == "nf4" or (stored == "checkpoint" and quant != "none"):
        raise SourceError(f"model {folder}: the weights are quantized, wanted dense weights")
    config.name_or_path = str(folder)
    with raised_as(SourceError, f"model {folder}: ", ValueError, TypeError, KeyError, RuntimeError):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    if not all(parameter.is_meta for parameter in model.parameters()):
        # Some models make parameters on the CPU, also under torch.device("meta").
        model.to("meta")
        model.tie_weights()
    model.eval().requires_grad_(False)
    quantizer = pack_as_stored(model, folder, config, torch.bfloat16) if stored == "checkpoint" else None
    files, known = TensorFiles(folder), set(model.state_dict())
    groups, initialized = plan(model, files, torch.bfloat16, quantizer)
    _initialize_buffers(model, initialized)
    _read_generation_config(model, folder)
    layers = decoder_layers(model)
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    packed = dict(model.named_modules()) if quantizer is not None else {}
    packed = {name: module for name, module in packed.items() if isinstance(module, (HoldsPacked, PackedExperts))}
    of_packed = {f"{name}.{key}": (module, attribute) for name, module in packed.items()
                 for key, attribute in module.places().items()}  # fmt: skip
    if quant != "none":
        with raised_as(SourceError, f"model {folder}: ", ValueError, TypeError):
            quantize_meta(model, quant, blocksize)
    if dtype != torch.bfloat16:
        widen(model)
    places = {}
    for group in groups:
        for name in known.intersection(group.shapes):
            owner, _, attribute = name.rpartition(".")
            places[name] = of_packed.get(name) or (model.get_submodule(owner), attribute)
    units = [next((i for i, name in enumerate(names) if group.name.startswith(f"{name}.")), -1) for group in groups]
    in_order = sorted(zip(groups, units, strict=True), key=lambda item: item[1])
    layers_packed = [(name, module) for name, module in packed.items() if isinstance(module, HoldsPacked)]
    return MetaBase(model, folder, files, layers, in_order, places, quant, quantizer, layers_packed)


def _initialize_buffers(model: Any, names: set[str]) -> None:
    """Gives values, by the model's ``_init_weights``, to the buffers that are in no file, as ``from_pretrained`` does.

    The buffers in no file are the buffers outside of the state dict, and the buffers ``names``, which the files lack.
    """
    kept = {name for name, _ in model.named_non_persistent_buffers()} | names
    for name, buffer in list(model.named_buffers()):
        if name in kept:
            owner, _, local = name.rpartition(".")
            model.get_submodule(owner)._buffers[local] = torch.empty_like(buffer, device="cpu")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in kept:
            tensor._is_hf_initialized = True  # transformers initializes tensors without _is_hf_initialized
    model.initialize_weights()


def _read_generation_config(model: Any, folder: Path) -> None:
    """Sets the model's generation configuration as ``from_pretrained`` does."""
    if hasattr(model, "adjust_generation_fn"):
        hub = dict.fromkeys(("cache_dir", "proxies", "token", "revision"))
        model.adjust_generation_fn(None, True, None, str(folder), force_download=False, local_files_only=True,
                                   subfolder="", trust_remote_code=False, **hub)  # fmt: skip


def decoder_layers(model: Any) -> list[nn.Module]:
    """Returns the decoder layers: the items of the nn.ModuleLists whose items all have a class that the model's
    ``_no_split_modules`` names.

    If no nn.ModuleList has only items of the classes in ``_no_split_modules``, the function returns the items of the
    nn.ModuleLists that have a name in ``_LISTS``. Empty lists, and lists inside of a returned item, are left out.
    Raises SourceError if no list of decoder layers is found.
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
