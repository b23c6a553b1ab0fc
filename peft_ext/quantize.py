"""Converts a model's linear layers, and the experts of mixtures, to packed formats and back, in place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Optional, TypeVar

import torch
from torch import nn

from . import ops
from .nn import BottleneckAdapter, Float8Linear, NF4Experts, NF4Linear, PackedEmbedding, PackedLinear, PrefixEncoder
from .nn.experts import FrozenExperts, dense_experts, expert_parameters, is_stored_transposed, nf4_experts
from .nn.nf4 import is_zero3_shard
from .nn.packed import ScaledEmbedding
from .nn.packed_experts import PackedExperts, hold_packed
from .ops import checks
from .weight_reads import weights_read_past
from .weights.quantizers import PACKED_FORMATS, quantized

__all__ = ["PACKED_FORMATS", "dequantize_nf4", "dequantize_packed", "quantize_nf4", "quantize_packed"]

_Model = TypeVar("_Model", bound=nn.Module)

# Names of the tensors of a quantized layer. fp8 has the names of transformers' files, nvfp4 the names of ModelOpt's
# files, and other formats the names of compressed-tensors' files. In ModelOpt's nvfp4 the second scale is a factor; in
# compressed-tensors' nvfp4 this scale is the reciprocal of the factor.
_NAMES = {"fp8": ("weight", "weight_scale_inv"), "nvfp4": ("weight", "weight_scale", "weight_scale_2")}
_OTHER_NAMES = ("weight_packed", "weight_scale")
_Item = TypeVar("_Item")

# Names of heads, which stay dense by default.
HEADS = ("lm_head", "score", "classifier", "pre_classifier", "classification_head", "qa_outputs")

# Names of routers, and names of modules that are routers if the parent module also has a child "experts".
_ROUTERS, _GATES = ("router", "shared_expert_gate"), ("gate",)

# Attributes of an NF4Linear or of a PackedLinear that an nn.Linear does not have.
_PACKED_ATTRIBUTES = ("blocksize", "merge_error", "quant_dtype", "names", "extra", "compute_dtype", "note", "_template",
                      "_packed")  # fmt: skip

# Names of the children that hold the base model in PEFT's tuners.
_BASES = ("model", "lora_model")

_HOOKS = tuple(name for name in vars(nn.Module()) if re.match("_(forward|backward|is_full_backward)_", name))


def quantize_nf4(
    model: _Model,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] = HEADS,
    progress: bool = True,
) -> _Model:
    """Replaces the ``nn.Linear`` layers of ``model`` by frozen :class:`peft_ext.nn.NF4Linear` layers, in place.

    The experts of a mixture, which transformers keeps as 3-D parameters of one module, become
    :class:`peft_ext.nn.NF4Experts`; each expert is quantized separately and the router stays dense.

    A layer's dense weight is freed before the next layer is quantized, so that the peak memory is the model plus one
    layer. Layers that share one weight share the quantized weight. Forward and backward hooks are kept. Weights and
    biases are frozen, except that the bias of a layer under an adapter keeps ``requires_grad``.

    These layers stay dense: subclasses of ``nn.Linear``; layers under a name in ``skip`` or under a name that a
    transformers model keeps in float32 (``_keep_in_fp32_modules``); layers whose weight another module's code reads
    directly, as found in the source of the classes (T5's ``wo``, Mamba's ``dt_proj``); routers; the layers that a PEFT
    adapter adds, such as PEFT's prompt encoders, and the layers of ``nn.BottleneckAdapter`` and ``nn.PrefixEncoder``;
    the modules under ``modules_to_save``, and the base layer under ``target_parameters`` (other base layers are
    quantized); layers whose weight an adapter replaces (partial fine-tuning, Diff Pruning); and a layer whose weight is
    tied to a dense weight, such as a head's weight to the embedding's weight.

    Args:
        model: any module, on any device except meta.
        blocksize, double_quant: see :func:`peft_ext.ops.nf4_quantize`.
        skip: names; a layer stays dense if one of these names is a component of the layer's dotted name. By default,
            the heads of language models and of classifiers stay dense.
        progress: whether to show a progress bar on a terminal, if tqdm is installed.

    Returns: ``model``. Warns if ``model`` has neither an nn.Linear nor experts to quantize. :func:`dequantize_nf4`
    converts the model back.

    Raises:
        TypeError: ``model`` is itself an ``nn.Linear``, or no module; a weight is not a plain float parameter.
        ValueError: a wrong blocksize; a weight on the meta device or partitioned by ZeRO-3; a weight with values that
            are not finite; a merged adapter; a layer with a replaced ``forward``.
        MemoryError or RuntimeError (torch.OutOfMemoryError on a GPU): no memory for a weight.

    A TypeError or ValueError is raised before the model changes. If memory runs out for a weight, the layers before
    this weight are replaced, and the layers of this weight and of all later weights are unchanged. After a lack of
    memory, a second call of ``quantize_nf4`` continues with the first weight that is still dense.

    Source: QLoRA, arXiv 2305.14314.
    """
    checks.check_module("quantize_nf4", model)
    if type(model) is nn.Linear:
        raise TypeError("quantize_nf4: model is an nn.Linear and can't be replaced in place, use NF4Linear.from_linear")
    checks.check_blocksize("quantize_nf4", blocksize)
    return _quantize(model, blocksize, double_quant, {skip} if isinstance(skip, str) else set(skip), progress)


def quantize_meta(model: _Model, format: str, blocksize: int = 64, double_quant: bool = True) -> _Model:
    """Replaces layers as :func:`quantize_nf4` or :func:`quantize_packed` does, in a model on the meta device, in place.

    The new layers have the shapes and dtypes of packed weights and no values. ``format``: "nf4", to which ``blocksize``
    and ``double_quant`` belong, or one of ``PACKED_FORMATS``.
    """
    if format != "nf4":
        return _pack(model, format, set(HEADS), on_meta=True)
    return _quantize(model, blocksize, double_quant, set(HEADS), progress=False, on_meta=True)


def quantize_packed(
    model: _Model, format: str = "mxfp4", *, skip: Sequence[str] = HEADS, progress: bool = True
) -> _Model:
    """Replaces the ``nn.Linear`` layers of ``model`` by frozen :class:`peft_ext.nn.PackedLinear` layers, in place.

    ``quantize_packed`` quantizes the same layers and experts as :func:`quantize_nf4`, and treats hooks, tied weights,
    memory and errors as :func:`quantize_nf4` does. The tensors of a layer have the names and the layout of
    transformers' files for fp8, of ModelOpt's files for nvfp4, and of compressed-tensors' files for the other formats.

    Args:
        model: any module, on any device except meta.
        format: "mxfp4" (4-bit floats, a power of two as the scale of each 32 columns), "nvfp4" (4-bit floats, an 8-bit
            float as the scale of each 16 columns), "fp8" (8-bit floats e4m3, a float32 scale for each 128 x 128
            elements), or "int4" (4-bit integers, a scale for each 128 columns, or for each 64 or 32 columns where 128
            does not divide a layer's input features).
        skip, progress: as in :func:`quantize_nf4`.

    Returns: ``model``. Warns if ``model`` has neither an nn.Linear nor experts to quantize.

    Raises:
        TypeError: ``model`` is itself an ``nn.Linear``, or no module; a weight is not a plain float parameter.
        ValueError: an unknown format; a layer whose input features the format's groups do not divide; a weight on the
            meta device or partitioned by ZeRO-3; a weight with values that are not finite; a merged adapter; a layer
            with a replaced ``forward``.
        MemoryError or RuntimeError (torch.OutOfMemoryError on a GPU): no memory for a weight.

    Sources: OCP Microscaling Formats 1.0 (mxfp4); compressed-tensors (nvfp4, int4); DeepSeek-V3, arXiv 2412.19437
    (fp8).
    """
    checks.check_module("quantize_packed", model)
    if format not in PACKED_FORMATS:
        raise ValueError(f"quantize_packed: format is {format!r}, wanted one of {', '.join(PACKED_FORMATS)}")
    if type(model) is nn.Linear:
        raise TypeError("quantize_packed: model is an nn.Linear and can't be replaced in place")
    return _pack(model, format, {skip} if isinstance(skip, str) else set(skip), progress)


def _pack(model: _Model, format: str, skip: set[str], progress: bool = False, on_meta: bool = False) -> _Model:
    """Replaces layers and experts of ``model`` by packed ones, as :func:`quantize_packed` does. ``on_meta``: whether
    weights may be on the meta device."""
    names = _NAMES.get(format, _OTHER_NAMES)
    places, experts = check_packable(model, format, skip, on_meta)
    _check_finite("quantize_packed", places, experts)

    def make(linear: nn.Linear, first: Optional[nn.Module]) -> PackedLinear:
        weight = quantized(linear.weight, format) if first is None else first.packed
        module = PackedLinear.from_packed(weight, names, linear.bias, dtype=linear.weight.dtype).train(linear.training)
        # Tied layers hold the same Parameter, so that a copy of the model keeps the layers tied.
        if first is not None:
            module._parameters[names[0]] = first._parameters[names[0]]
        _carry_over(linear, module)
        return module

    if places or not experts:
        _replace_all("quantize_packed", "nn.Linear", model, places, make, progress)
    for _, module in _progress(experts) if progress else experts:
        weights = {}
        for parameter, dense in _dense_stacks(module):
            held = tuple(f"{parameter}_{part}" for part in names[1:])
            weights[parameter] = (quantized(dense, format), (parameter, *held))
        hold_packed(module, weights, dense.dtype)
    return model


def check_packable(
    model: nn.Module, format: str, skip: set[str] = frozenset(HEADS), on_meta: bool = True
) -> tuple[list[list[Place]], list[tuple[str, nn.Module]]]:
    """Checks that :func:`quantize_packed` can quantize ``model``; returns the layers and the experts that would be
    quantized.

    ``on_meta``: whether weights may be on the meta device.
    """
    op = "quantize_packed"
    places, experts = linear_groups(model, skip, on_meta, op), experts_to_quantize(model, skip, on_meta, op)
    for same in places:
        _check_columns(format, same[0].name, same[0].linear.in_features)
    for name, module in experts:
        for parameter, dense in _dense_stacks(module):
            _check_columns(format, f"{name}.{parameter}", dense.shape[-1])
    return places, experts


def _check_columns(format: str, name: str, columns: int) -> None:
    step = {"mxfp4": 32, "nvfp4": 16, "int4": 32}.get(format, 1)
    if columns % step:
        raise ValueError(f"quantize_packed: {name} has {columns} input features, wanted a multiple of {step} for "
                         f"{format} (skip=[...] leaves a layer dense)")  # fmt: skip


def _dense_stacks(experts: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and the dense weights ``[E, N, K]`` of each parameter of a mixture's experts."""
    for name in expert_parameters(experts):
        dense = experts._parameters[name].detach()
        yield name, dense.transpose(1, 2) if is_stored_transposed(experts) else dense


def _quantize(
    model: _Model, blocksize: int, double_quant: bool, skip: set[str], progress: bool, on_meta: bool = False
) -> _Model:
    places, experts = linear_groups(model, skip, on_meta), experts_to_quantize(model, skip, on_meta)
    _check_finite("quantize_nf4", places, experts)

    def make(linear: nn.Linear, first: Optional[nn.Module]) -> NF4Linear:
        if first is None:
            nf4 = ops.nf4_quantize(linear.weight, blocksize, double_quant)
        else:
            nf4 = first.nf4
        module = NF4Linear.from_nf4(nf4, linear.bias).train(linear.training)
        if first is not None:
            # Tied layers hold the same Parameter, so that a copy of the model keeps the layers tied.
            module.weight = first.weight
        _carry_over(linear, module)
        return module

    if places or not experts:
        _replace_all("quantize_nf4", "nn.Linear", model, places, make, progress)
    for _, module in _progress(experts) if progress else experts:
        nf4_experts(module, blocksize, double_quant)
    return model


def dequantize_nf4(model: _Model, *, dtype: Optional[torch.dtype] = None, progress: bool = True) -> _Model:
    """Replaces every :class:`peft_ext.nn.NF4Linear` of ``model`` by an ``nn.Linear``, in place: ``W = code ∘ absmax``.

    :class:`peft_ext.nn.NF4Experts` become dense experts.

    The dense W is the weight that the quantized layer multiplied with, not the weight from before quantizing; the model
    computes the same results up to rounding.

    Call ``dequantize_nf4`` before ``merge_adapter`` or ``merge_and_unload`` of an adapter that was trained over NF4. A
    merge into NF4 rounds W plus adapter to 4 bits again, which moves the weights about as much as quantizing did; a
    merge into the dense W rounds to W's dtype. :func:`peft_ext.merge_to_dense` merges into files, usually one layer at
    a time.

    A layer's NF4 weight is freed before the next layer is dequantized. Adapters stay, and fused layers stay fused;
    layers that shared one weight share the dense weight; hooks are kept. The dense weights stay frozen. The biases get
    the weight's dtype and keep ``requires_grad``. bitsandbytes' layers and subclasses of NF4Linear are not changed.

    Args:
        model: any module, on any device except meta; also a PeftModel, if no adapter is merged into its NF4 weights.
        dtype: dtype of the new layers' weights and biases: float32, bfloat16, float16 or float64. By default, each
            weight gets the dtype from which it was quantized.
        progress: whether to show a progress bar on a terminal, if tqdm is installed.

    Returns: ``model``. Warns if ``model`` has neither an NF4Linear nor NF4Experts to dequantize.

    Raises:
        TypeError: ``model`` is itself an NF4Linear, or no module; ``dtype`` is none of the four dtypes.
        ValueError: a weight on the meta device; an adapter that is merged into an NF4 weight; a layer with a replaced
            ``forward``.
        MemoryError or RuntimeError (torch.OutOfMemoryError on a GPU): no memory for a weight.

    A TypeError or ValueError is raised before the model changes. If memory runs out for a weight, the layers before
    this weight are replaced, and the layers of this weight and of all later weights are unchanged. After a lack of
    memory, a second call of ``dequantize_nf4`` continues with the first weight that is still NF4.

    Source: QLoRA, arXiv 2305.14314.
    """
    return _dequantize("dequantize_nf4", (NF4Linear,), NF4Experts, model, dtype, progress)


def dequantize_packed(model: _Model, *, dtype: Optional[torch.dtype] = None, progress: bool = True) -> _Model:
    """Replaces every :class:`peft_ext.nn.PackedLinear` of ``model`` by an ``nn.Linear`` with the decoded weight, in
    place.

    A :class:`peft_ext.nn.PackedEmbedding` becomes an ``nn.Embedding`` (if it has a scale, a subclass of
    ``nn.Embedding`` that multiplies by the scale), and :class:`peft_ext.nn.PackedExperts` become dense experts. The
    dense layer that replaces a :class:`peft_ext.nn.Float8Linear` does not quantize its input.
    Adapters, merging, tied weights, hooks, memory and errors are treated as in :func:`dequantize_nf4`.

    Args:
        model: any module, on any device except meta; also a PeftModel, if no adapter is merged into its packed weights.
        dtype: dtype of the new layers' weights and biases: float32, bfloat16, float16 or float64. By default, each
            dense weight gets the ``compute_dtype`` of the packed layer.
        progress: whether to show a progress bar on a terminal, if tqdm is installed.

    Returns: ``model``. Warns if ``model`` has no packed layer to dequantize.

    Raises:
        TypeError: ``model`` is itself a packed layer, or no module; ``dtype`` is none of the four dtypes.
        ValueError: a weight on the meta device; an adapter that is merged into a packed weight; a layer with a replaced
            ``forward``.
        MemoryError or RuntimeError (torch.OutOfMemoryError on a GPU): no memory for a weight.
    """
    kinds = (PackedLinear, PackedEmbedding, Float8Linear)
    return _dequantize("dequantize_packed", kinds, PackedExperts, model, dtype, progress)


def _dequantize(
    op: str, kinds: tuple[type, ...], of_experts: type, model: _Model, dtype: Optional[torch.dtype], progress: bool
) -> _Model:
    """Replaces the layers of the classes ``kinds``, and the experts of the class ``of_experts``, by dense layers and
    experts. ``op``: the public function's name, for error texts."""
    checks.check_module(op, model)
    kind = kinds[0].__name__
    if type(model) in kinds:
        raise TypeError(f"{op}: model is {'an' if kind == 'NF4Linear' else 'a'} {type(model).__name__} and can't be "
                        "replaced in place, its dequantize() gives the dense weight")  # fmt: skip
    if dtype is not None:
        checks.check_dtype(op, dtype)

    def make(layer: Any, first: Optional[nn.Module]) -> nn.Module:
        weight = nn.Parameter(layer.dequantize(dtype), False) if first is None else first.weight
        if isinstance(layer, nn.Embedding):
            kind = nn.Embedding if getattr(layer, "scale", 1.0) == 1 else ScaledEmbedding
            module: Any = kind(*weight.shape, layer.padding_idx, _weight=weight)
            module.weight = weight
            if kind is ScaledEmbedding:
                module.scale = layer.scale
        else:
            module = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            module.weight = weight
        if (bias := getattr(layer, "bias", None)) is not None:
            # The bias stays the same Parameter object, because an optimizer or another layer may hold this object.
            # F.linear needs weight and bias of one dtype.
            module.bias = bias
            module.bias.data = bias.data.to(weight.dtype)
        _carry_over(layer, module.train(layer.training))
        return module

    places = _packed_places(op, kinds, model)
    experts = [module for module in model.modules() if isinstance(module, of_experts)]
    if places or not experts:
        _replace_all(op, kind, model, places, make, progress)
    for module in experts:
        dense_experts(module, dtype)
    return model


class Place:
    """The place of a linear or embedding layer in a model: an attribute of the parent module. A Place holds no
    reference to the layer itself.

    ``name``: the layer's dotted name in the model. ``keeps_bias``: whether the new bias keeps ``requires_grad``.
    """

    def __init__(self, name: str, parent: nn.Module, attribute: str, keeps_bias: bool) -> None:
        self.name, self.parent, self.attribute, self.keeps_bias = name, parent, attribute, keeps_bias

    @property
    def linear(self) -> nn.Linear:
        return self.parent._modules[self.attribute]


def _replaces_weights(module: nn.Module) -> bool:
    """Returns whether an adapter replaces the base layer's weight, so that the base layer must stay dense."""
    names = getattr(module, "names", {}) if hasattr(type(module), "replacements") else {}
    return any(name.rpartition(".")[2] == "weight" for owned in names.values() for name in owned)


def _is_of_adapter(module: nn.Module) -> bool:
    """Returns whether all layers below ``module`` belong to an adapter, such as those of PEFT's prompt encoders."""
    if isinstance(module, (BottleneckAdapter, PrefixEncoder)):
        return True
    # PEFT's tuners hold the base model as "model", or, in X-LoRA, as "lora_model".
    return type(module).__module__.startswith("peft.tuners.") and module._modules.keys().isdisjoint(_BASES)


def _walk(module: nn.Module, prefix: str, adapted: bool, seen: set[int], op: str) -> Iterator[Place]:
    if id(module) in seen:
        return
    seen.add(id(module))
    children = module._modules
    # The test finds tuner layers and wrappers of PEFT and of peft_ext without importing PEFT.
    if hasattr(type(module), "adapter_layer_names") or "base_layer" in children:
        if getattr(module, "merged", False):
            raise ValueError(f"{op}: {prefix} has a merged adapter, unmerge it first")
        if _replaces_weights(module):
            return
        # PEFT's layer for target_parameters adds LoRA's product to the dense weight of the base layer.
        if isinstance(getattr(module, "parameter_name", None), str):
            return
        adapted = True
        children = {"base_layer": module._modules["base_layer"]} if "base_layer" in module._modules else {}
    elif _is_of_adapter(module):
        return
    for attribute, child in children.items():
        if child is None:
            continue
        name = f"{prefix}.{attribute}" if prefix else attribute
        # peft_ext.accelerate may have replaced the layer's class by a fused class.
        if getattr(type(child), "stock_class", type(child)) is nn.Linear:
            yield Place(name, module, attribute, adapted)
        else:
            yield from _walk(child, name, adapted, seen, op)


def linear_groups(
    model: nn.Module, skip: set[str], on_meta: bool = False, op: str = "quantize_nf4"
) -> list[list[Place]]:
    """Checks the layers to quantize, and returns their Places as a list of groups; the layers of a group share one
    weight.

    ``on_meta``: whether weights may be on the meta device. ``op``: the public function's name, for error texts.
    """
    skip, past = skip.union(_ROUTERS, *_kept_in_float32(model)), weights_read_past(model) | _gates(model)
    groups: dict[int, list[Place]] = {}
    layers: dict[int, set[int]] = {}  # maps the id of a weight to the ids of the layers that hold it
    for place in _walk(model, "", False, set(), op):
        name, linear = place.name, place.linear
        if name not in past and not any(f".{part}." in f".{name}." for part in skip):
            weight = linear._parameters.get("weight", getattr(linear, "weight", None))
            _check_weight(op, f"{name}.weight", weight, on_meta)
            _check_forward(op, name, linear)
            groups.setdefault(id(linear.weight), []).append(place)
            layers.setdefault(id(linear.weight), set()).add(id(linear))
    # A weight stays dense if a module that is not in `layers[id(weight)]` holds the weight too, because this module
    # would keep the dense weight.
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in groups and id(module) not in layers[id(parameter)]:
                del groups[id(parameter)]
    return list(groups.values())


def _kept_in_float32(model: nn.Module) -> Iterator[Iterable[str]]:
    """Yields the names, which may have dots, of modules that transformers keeps in float32."""
    for module in model.modules():
        yield getattr(module, "_keep_in_fp32_modules", None) or ()
        yield getattr(module, "_keep_in_fp32_modules_strict", None) or ()


def _gates(model: nn.Module) -> set[str]:
    """Returns the dotted names of gates whose parent module also has a child "experts", and of all modules in these
    gates."""
    found = set()
    for name, module in model.named_modules():
        if "experts" not in module._modules:
            continue
        for gate in _GATES:
            below = module._modules.get(gate)
            for inner, _ in below.named_modules() if below is not None else ():
                found.add(".".join(filter(None, (name, gate, inner))))
    return found


def _packed_places(op: str, kinds: tuple[type, ...], model: nn.Module) -> list[list[Place]]:
    """Checks the layers to dequantize, and returns their Places as a list of groups; the Places of a group share one
    layer or one weight."""
    groups: dict[Any, list[Place]] = {}
    for prefix, parent in model.named_modules():
        below = parent._modules.get("base_layer") if getattr(parent, "merged", False) else None
        if below is not None and any(type(module) in kinds for module in below.modules()):
            raise ValueError(f"{op}: {prefix or 'model'} has a merged adapter, unmerge it first")
        for attribute, child in parent._modules.items():
            if type(child) not in kinds:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            if child.weight.is_meta:
                raise ValueError(f"{op}: {name}.weight is on the meta device, load the model's weights first")
            _check_forward(op, name, child)
            weight = child.nf4 if type(child) is NF4Linear else child.packed
            addresses = [tensor.data_ptr() for tensor in weight.tensors().values()]
            # A weight without elements has no address, by which layers that share the weight are found.
            key = (*addresses, weight.shape, weight.dtype) if child.weight.numel() else id(child)
            groups.setdefault(key, []).append(Place(name, parent, attribute, keeps_bias=True))
    return list(groups.values())


def experts_to_quantize(
    model: nn.Module, skip: set[str], on_meta: bool = False, op: str = "quantize_nf4"
) -> list[tuple[str, nn.Module]]:
    """Checks the modules of experts to quantize, and returns the modules with their dotted names.

    ``on_meta``: whether weights may be on the meta device. ``op``: the public function's name, for error texts.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, FrozenExperts) or not (parameters := expert_parameters(module)):
            continue
        if any(f".{part}." in f".{name}." for part in skip):
            continue
        for parameter in parameters:
            _check_weight(op, f"{name}.{parameter}", module._parameters.get(parameter), on_meta)
        _check_forward(op, name, module)
        found.append((name, module))
    return found


def _check_forward(op: str, name: str, linear: nn.Module) -> None:
    if "forward" in linear.__dict__:
        raise ValueError(f"{op}: {name} has its forward replaced (an offloading hook?), remove that first")


def _check_weight(op: str, name: str, weight: Any, on_meta: bool) -> None:
    if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
        raise TypeError(f"{op}: {name} is a {type(weight).__name__}, wanted a plain parameter")
    if weight.is_meta and not on_meta:
        raise ValueError(f"{op}: {name} is on the meta device, load the model's weights first")
    if is_zero3_shard(weight):
        raise ValueError(f"{op}: {name} is partitioned by ZeRO-3, quantize before deepspeed.initialize")
    checks.check_float(op, name, weight)


def _check_finite(op: str, places: list[list[Place]], experts: list[tuple[str, nn.Module]]) -> None:
    """Raises ValueError if a weight to quantize has a value that is not finite."""
    weights = [(f"{same[0].name}.weight", same[0].linear.weight) for same in places]
    for name, module in experts:
        weights += [(f"{name}.{parameter}", module._parameters[parameter]) for parameter in expert_parameters(module)]
    for name, weight in weights:
        # aminmax gives NaN if a value is NaN, and needs no memory of the weight's size.
        if weight.numel() and not weight.is_meta and not all(value.isfinite() for value in weight.detach().aminmax()):
            raise ValueError(f"{op}: {name} has values that are not finite")


def _replace_all(
    op: str, kind: str, model: nn.Module, places: list[list[Place]], make: Callable[..., nn.Module], progress: bool
) -> None:
    if not places:
        # The warning names the line that calls the public function.
        warnings.warn(f"{op}: {type(model).__name__} has no {kind} to replace; the model is unchanged", stacklevel=4)
    for done, same in enumerate(_progress(places) if progress else places):
        try:
            replace_group(same, make)
        except (MemoryError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            text = (
                f"{op}: {same[0].name}: {lines[0]} ({done} of {len(places)} weights are replaced, this weight and "
                f"the others are unchanged; another call of {op} continues with this weight)"
            )
            kind = type(error) if type(error) in (MemoryError, torch.OutOfMemoryError) else RuntimeError
            raise kind(text) from error
        for place in same:
            _choose_dora(place.parent)


def _choose_dora(layer: nn.Module) -> None:
    """Chooses the DoRA variant of a fused LoRA layer again after the layer's base layer was replaced.

    The variant is DoraNF4Variant over an NF4Linear, and PEFT's DoraLinearVariant over a dense layer.
    """
    if getattr(layer, "lora_variant", None):
        from .integrations.adapter_layers.dora import DORA_DROPOUT, clear_dora, prepare_dora
        from .integrations.adapter_layers.lora import Lora

        if isinstance(layer, Lora):
            dora_dropout = layer.__dict__.get(DORA_DROPOUT, "peft")
            clear_dora(layer)
            prepare_dora(layer, dora_dropout)


def replace_group(same: list[Place], make: Callable[[nn.Linear, Optional[nn.Module]], nn.Module]) -> None:
    """Replaces each linear layer of a group by ``make(linear, first)``.

    ``first`` is the first new layer of the group; None in the call that makes this layer. All new layers are made
    before the first new layer is put in place: if a layer can't be made, no layer of the group is replaced.
    """
    done: dict[int, nn.Module] = {}
    for place in same:
        linear = place.linear
        if id(linear) not in done:
            done[id(linear)] = make(linear, next(iter(done.values()), None))
    for place in same:
        module = done[id(place.linear)]
        if getattr(module, "bias", None) is not None and not place.keeps_bias:
            module.bias.requires_grad_(False)
        setattr(place.parent, place.attribute, module)


def _carry_over(linear: nn.Linear, module: nn.Linear) -> None:
    for hooks in _HOOKS:
        # The new layer gets the old layer's own dicts of hooks, so that the handles of the hooks still work.
        setattr(module, hooks, getattr(linear, hooks))
    for name, value in linear.__dict__.items():
        if name not in module.__dict__ and name not in _PACKED_ATTRIBUTES:
            # Attributes that other code stored on the old layer are copied.
            setattr(module, name, value)


def _progress(items: list[_Item]) -> Iterable[_Item]:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc="quantizing", unit="layer", leave=False, disable=None)
