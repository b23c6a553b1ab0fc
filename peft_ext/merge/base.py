"""Reads the base of a merge, from a folder, a GGUF file or memory, dense or packed, as a model of dense modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from .. import ops
from .._imports import required
from ..nn import NF4Experts, NF4Linear
from ..nn.experts import FrozenExperts, dense_experts, expert_parameters, is_stored_transposed
from ..nn.packed import HoldsPacked
from ..quantize import HEADS, check_packable, experts_to_quantize, linear_groups
from ..sources.adapter import training_options
from ..sources.gguf_file import gguf_dtype, read_gguf
from ..sources.model import SourceError, load_model
from ..weights.nf4 import NF4Weight
from ..weights.packed import PackedWeight
from ..weights.quantizers import quantized
from .errors import MergeError, as_merge_error, fail

with required("peft", "peft_ext.merge_to_dense"):
    from peft import PeftConfig, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
with required("transformers", "peft_ext.merge_to_dense"):
    from transformers import PreTrainedModel


@dataclass
class Base:
    """The base of a merge: a transformers model of dense modules.

    ``dense`` maps the id of a parameter to a function that returns the float32 weight to read in place of the
    parameter.
    ``kept``: dtype of the output where no dtype is asked for; None: each tensor keeps its own dtype.
    """

    model: PreTrainedModel
    dense: dict[int, Callable[[], Tensor]]
    name: str
    folder: Optional[Path]
    quant: str = "none"
    quant_text: str = "none"
    absent: tuple[str, ...] = ()  # names of parameters that are missing in the base's files
    kept: Optional[torch.dtype] = None

    def read(self, tensor: Tensor) -> Tensor:
        """Returns ``tensor`` on the CPU, or the float32 weight that the function of ``tensor`` in ``dense`` returns."""
        made = self.dense.get(id(tensor))
        if made is not None:
            return made()
        return tensor.detach().cpu()


def base_of(
    model: Union[PreTrainedModel, str, Path, None],
    config: PeftConfig,
    adapter: Path,
    weights: dict[str, Tensor],
    base_quant: Optional[str],
    blocksize: Optional[int],
    double_quant: bool,
) -> Base:
    with as_merge_error(SourceError):
        trained = training_options(adapter)
    if isinstance(model, (str, Path)) or model is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        with as_merge_error(SourceError):
            loaded = load_model(model, config, adapter, shapes, trained, exact=True)
        base = Base(loaded.model, {}, loaded.name, loaded.folder, absent=loaded.absent)
        if loaded.folder.is_file() and not trained:
            base.kept = gguf_dtype(read_gguf(loaded.folder, MergeError))
    elif isinstance(model, PeftModel):
        fail("model is a PeftModel, wanted its base: save the adapter, and give the base's folder or model.unload()")
    elif isinstance(model, PreTrainedModel):
        base = _from_memory(model)
    else:
        raise TypeError(f"merge_to_dense: model is {type(model).__name__}, wanted a transformers model or its folder")
    held, formats = _stand_in(base)
    if held:
        base.quant = "nf4" if formats == {"nf4"} else "checkpoint"
        if base_quant not in (None, base.quant):
            name = "NF4" if base.quant == "nf4" else f"packed weights ({', '.join(sorted(formats))})"
            fail(f"base_quant is {base_quant!r}, but the base itself is held in {name}")
        base.quant_text = f"{'+'.join(sorted(formats))}, as the base is held ({held} layers)"
        return base
    by = "as asked for"
    if base_quant is None:
        by = "as the adapter's run.json has it" if trained else "as the adapter's folder has no run.json"
        base_quant = trained.get("quant", "none")
    base.quant, base.quant_text = base_quant, f"{base_quant}, {by}"
    if base_quant == "checkpoint":
        fail(f"base_quant is 'checkpoint', {by}, but the base's weights are dense")
    if base_quant == "nf4":
        blocksize = blocksize or int(trained.get("blocksize", 64))
        _quantize(base, lambda weight: ops.nf4_quantize(weight, blocksize, double_quant))
        double = "double quantization, " if double_quant else ""
        base.quant_text = f"nf4, {double}blocks of {blocksize}, {by}"
    elif base_quant != "none":
        with as_merge_error(ValueError):
            check_packable(base.model, base_quant, on_meta=False)
        _quantize(base, lambda weight: quantized(weight, base_quant))
    return base


def _from_memory(model: PreTrainedModel) -> Base:
    if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules()):
        fail(f"the {type(model).__name__} has adapter layers already, wanted it without: model.unload()")
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        fail(f"the {type(model).__name__} has weights on the meta device, wanted them loaded and not offloaded")
    # `shared` is a copy of the model with new modules, which hold the tensors of `model` itself.
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    where = Path(model.name_or_path) if model.name_or_path else None
    folder = where if where is not None and where.is_dir() else None
    return Base(shared, {}, model.name_or_path or type(model).__name__, folder)


def _packed_of(module: nn.Module, name: str) -> Optional[PackedWeight]:
    """Returns the packed weight of a layer; None for a dense module. Raises MergeError for a layer that is quantized,
    but neither to NF4 nor in a packed format."""
    if isinstance(module, NF4Linear):
        return module.nf4
    if isinstance(module, HoldsPacked):
        return module.packed
    kind = type(module).__name__
    if kind == "Linear4bit":
        with as_merge_error(ValueError, about=f"{name}: "):
            return NF4Weight.from_bitsandbytes(module.weight)
    if kind == "Linear8bitLt" or (isinstance(module, nn.Linear) and not module.weight.is_floating_point()):
        fail(f"{name} is a {kind} with {module.weight.dtype} weights; wanted dense weights, NF4 or a PackedLinear")
    return None


def _stand_in(base: Base) -> tuple[int, set[str]]:
    """Replaces each packed layer, and each module of packed experts, by a dense one without data, and removes the
    model's marks of a quantized model. Returns the number of replaced modules, and the names of their formats."""
    count, formats = 0, set()
    # Maps the address of a packed weight's codes, with the weight's shape, to the new parameter, so that tied layers
    # stay tied.
    made: dict[tuple[int, torch.Size], nn.Parameter] = {}
    for parent_name, parent in list(base.model.named_modules()):
        for attribute, child in list(parent.named_children()):
            packed = _packed_of(child, f"{parent_name}.{attribute}".lstrip("."))
            if packed is None:
                continue
            key = packed.parts[0].data_ptr(), packed.shape
            if key not in made:
                made[key] = without_memory(getattr(child, "compute_dtype", None) or packed.dtype, packed.shape)
            weight = made[key]
            if isinstance(child, nn.Embedding):
                dense: nn.Module = nn.Embedding(*packed.shape, child.padding_idx, device="meta")
            else:
                dense = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                dense.bias = child.bias
            dense.weight = weight
            base.dense[id(weight)] = lambda packed=packed: packed.to("cpu").dequantize(torch.float32)
            setattr(parent, attribute, dense)
            count += 1
            formats.add(packed.format.name)
    for module in base.model.modules():
        if isinstance(module, FrozenExperts):
            formats |= {module.frozen(name).format.name for name in module.frozen_shapes()}
            _stand_in_of_experts(base, module)
            count += 1
    model = base.model
    # A model of a GGUF file has the marks of a quantized model also if all weights of the file are dense.
    if count or getattr(model, "peft_ext_dense", None) is not None:
        for mark in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "hf_device_map"):
            if mark in model.__dict__:
                delattr(model, mark)
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        kept = getattr(model, "_weight_conversions", None)
        if kept is not None:
            model._weight_conversions = [conversion for conversion in kept if _reverses(conversion)]
    return count, formats


def without_memory(dtype: torch.dtype, shape: torch.Size) -> nn.Parameter:
    """Returns a parameter of ``shape`` whose elements share one element of memory; for PEFT, this parameter is a dense
    CPU weight."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)


def _stand_in_of_experts(base: Base, experts: FrozenExperts) -> None:
    """Turns a module of packed experts into a module of dense experts without data, in place. ``experts`` is the
    merge's own copy of the module."""
    held = {name: experts.frozen(name) for name in experts.frozen_shapes()}
    dtype = experts.__dict__.get("compute_dtype")
    transposed = is_stored_transposed(experts)
    for name, packed in held.items():
        if isinstance(experts, NF4Experts):
            experts.set_nf4(name, packed.to("meta"))
        else:
            experts.set_packed(name, packed.to("meta"), experts.packed_names[name])
    dense_experts(experts)  # all tensors are on the meta device, so no data is dequantized
    for name, packed in held.items():
        shape = experts._parameters[name].shape
        parameter = experts._parameters[name] = without_memory(dtype or packed.dtype, shape)

        def read(packed: PackedWeight = packed) -> Tensor:
            dense = packed.to("cpu").dequantize(torch.float32)
            return dense.transpose(1, 2).contiguous() if transposed else dense

        base.dense[id(parameter)] = read


def _reverses(conversion: Any) -> bool:
    """Returns whether transformers can undo a weight conversion. A conversion that joins a quantizer's tensors can't be
    undone."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


def _quantize(base: Base, quantize: Callable[[Tensor], PackedWeight]) -> None:
    """Makes ``Base.read`` apply ``quantize`` to each weight that quantize_nf4 would quantize, and dequantize the
    result."""

    def through(weight: Tensor) -> Tensor:
        return quantize(weight).dequantize(torch.float32)

    with as_merge_error(TypeError, ValueError):
        places, experts = linear_groups(base.model, set(HEADS)), experts_to_quantize(base.model, set(HEADS))
    for same in places:
        weight = same[0].linear.weight
        base.dense[id(weight)] = lambda weight=weight: through(weight.detach().cpu())
    for _, module in experts:
        transposed = is_stored_transposed(module)
        for name in expert_parameters(module):
            parameter = module._parameters[name]

            def read(parameter: Tensor = parameter, transposed: bool = transposed) -> Tensor:
                dense = torch.empty(parameter.shape, dtype=torch.float32)
                # The blocks of a packed format run along the input features, so an expert that is stored transposed is
                # transposed before it is quantized.
                for expert, into in zip(parameter.detach().cpu(), dense, strict=True):
                    if transposed:
                        expert, into = expert.T, into.T
                    into.copy_(through(expert.contiguous()))
                return dense

            base.dense[id(parameter)] = read
