"""Replaces the layers of a transformers model by packed layers over the tensors of a GGUF file.

transformers reads GGUF in two ways. For most architectures, transformers' module ``modeling_gguf_pytorch_utils`` has a
class that turns the file's tensors into the model's (``TENSOR_PROCESSORS``). For a few architectures, transformers'
module ``integrations.gguf`` has conversions of names and tensors; an attribute of each conversion tells whether the
conversion keeps packed bytes. A quantized tensor whose values transformers changes is decoded by :func:`pack`, and
stays dense in the model.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .._imports import required
from ..integrations.forms.digest import Unknown, digest_of
from ..nn import PackedEmbedding, PackedLinear
from ..nn.experts import expert_parameters, is_stored_transposed
from ..nn.packed_experts import hold_packed
from ..weight_reads import weights_read_past
from ..weights.gguf import TYPES, gguf_weight, has_kernel, llama_row_order, permuted_rows
from ..weights.packed import PackedWeight
from .facts import ROTARY_FACTORS
from .header import GgufError, GgufHeader, TensorInfo

with required("transformers", "a model in a GGUF file"):
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.integrations.gguf import get_gguf_conversion_mapping, is_gguf_arch_supported, reader
    from transformers.integrations.gguf.utils import add_gguf_load_ops

_LINEAR = ("FalconLinear",)  # Names of transformers' classes that compute what nn.Linear computes.
# Names of transformers' embeddings that multiply their outputs with a factor, the attribute scalar_embed_scale.
_SCALED = re.compile(r"^Gemma[23]\w*ScaledWordEmbedding$")
_CHANGED = "transformers changes its values as it reads the file"


def _rows_of_llama(name: str, rows: int, config: dict[str, Any]) -> Tensor:
    heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
    return llama_row_order(rows, heads)


def _rows_of_bloom(name: str, rows: int, config: dict[str, Any]) -> Tensor:
    return torch.arange(rows).view(3, config["n_head"], -1).transpose(0, 1).reshape(-1)


class _Changes(NamedTuple):
    """The tensors whose values or rows a class of TENSOR_PROCESSORS changes.

    Attributes:
        digest: the result of :func:`_digest` for the class whose changes the other attributes describe; "" for a class
            of this module, whose code is known.
        names: regular expression for the names of the changed tensors.
        rows: if the class only reorders rows, a function of a tensor's name, the tensor's number of rows and the
            configuration, which returns the order of the rows: row i of transformers' tensor is row ``order[i]`` of the
            file's tensor. ``rows`` is None if the class changes values.
    """

    digest: str
    names: str
    rows: Optional[Callable[[str, int, dict[str, Any]], Tensor]] = None


class _GptOss(legacy.TensorProcessor):
    """Reads the experts of gpt-oss, which transformers 5.24 leaves out.

    The file has three weights, gate, up and down, of all experts of a layer, each ``[E, N, K]``. transformers' model
    has transposed weights, and joins gate and up to one weight in which the columns of gate and up alternate.
    """

    _TENSOR = re.compile(r"blk\.[0-9]+\.ffn_(gate|up|down)_exps\.(weight|bias)")
    _PARAMETER = re.compile(r"(?:model\.)?layers\.([0-9]+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?")

    def perform_fallback_tensor_mapping(
        self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str
    ) -> None:
        if (match := self._PARAMETER.fullmatch(hf_name)) is not None:
            for part in match[2].split("_"):
                gguf_to_hf_name_map[f"blk.{match[1]}.ffn_{part}_exps.{'bias' if match[3] else 'weight'}"] = hf_name

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        if (match := self._TENSOR.fullmatch(name)) is None:
            return legacy.GGUFTensor(weights, name, {})
        values = weights.swapaxes(1, 2) if match[2] == "weight" else weights
        if match[1] == "down":
            return legacy.GGUFTensor(values, name, {})
        tensors, target = kwargs["parsed_parameters"]["tensors"], kwargs["tensor_key_mapping"][name]
        if target not in tensors:
            tensors[target] = torch.zeros(*values.shape[:-1], 2 * values.shape[-1])
        tensors[target][..., int(match[1] == "up") :: 2] = torch.from_numpy(values.copy())
        return legacy.GGUFTensor(values, None, {})


_OWN = {"gpt-oss": _GptOss}  # Architecture -> the class that replaces transformers' class in TENSOR_PROCESSORS.
# For classes of transformers 5.23 and 5.24: the digest of the class's code, and the tensors that the class changes. If
# a class is not in _CHANGES, or its code has another digest, pack assumes that the class changes every tensor.
_CHANGES: dict[type, _Changes] = {
    legacy.TensorProcessor: _Changes("c80f42285de30047244c", r"(?!)"),
    legacy.T5TensorProcessor: _Changes("c1e2e6800447f3993446", r"(?!)"),
    legacy.LlamaTensorProcessor: _Changes("df3d879fd6344fcaa7c1", r"\.attn_[qk]\.", _rows_of_llama),
    legacy.BloomTensorProcessor: _Changes("0ce6fa372cbf05024773", r"attn_qkv", _rows_of_bloom),
    legacy.GPT2TensorProcessor: _Changes("7a553143fa35e6fa37f6", r"(attn_qkv|attn_output|ffn_down|ffn_up)\.weight"),
    legacy.Gemma2TensorProcessor: _Changes("ea9e696f41906083647f", r"norm\.weight"),
    legacy.NemotronTensorProcessor: _Changes("ea9e696f41906083647f", r"norm\.weight"),
    legacy.MambaTensorProcessor: _Changes("2d1c813c2c3a9ad39b69", r"ssm_conv1d\.weight|ssm_a"),
    legacy.Qwen2MoeTensorProcessor: _Changes("5b3f0a131ffd3b9f28ee", r"_exps|ffn_gate_inp_shexp"),
    legacy.MiniMaxM2TensorProcessor: _Changes("5f329bd3c6ef3167b431", r"_exps"),
    _GptOss: _Changes("", r"_exps"),
}
_PARTS = ("gate", "up", "down")  # the three weights of a decoder layer's experts, as GGUF names them
_EXPERTS = re.compile(r"(?P<block>.*)\.ffn_(gate|up|down)_exps\.(?P<leaf>weight|bias)")
# Tensors that are not loaded: rotary factors, which are in the configuration, and rotary frequencies of old files.
_UNUSED = re.compile("|".join((*map(re.escape, ROTARY_FACTORS), r"blk\.[0-9]+\.attn_rot_embd(\.weight)?")))


def _digest(kind: type) -> str:
    """Returns the digest of the functions and regular expressions of a class of TENSOR_PROCESSORS.

    Raises Unknown for a class with attributes of other types, or with source text that is not the code that runs.
    """
    found: list[tuple[str, str]] = []
    for name, value in ((name, value) for one in kind.__mro__[:-1] for name, value in vars(one).items()):
        if isinstance(value, FunctionType):
            found.append((name, digest_of([value])))
        elif isinstance(value, re.Pattern):
            found.append((name, value.pattern))
        elif not name.startswith("__"):
            raise Unknown(f"{name} is a {type(value).__name__}")
    return hashlib.sha256(repr(found).encode()).hexdigest()[:20]


def _changes_of(kind: type) -> Optional[_Changes]:
    """Returns the :class:`_Changes` of a class of TENSOR_PROCESSORS; None for a class whose code is not known."""
    if (found := _CHANGES.get(kind)) is None or not found.digest:
        return found
    try:
        return found if _digest(kind) == found.digest else None
    except Unknown:
        return None


class Packed(NamedTuple):
    """The tensors with which transformers fills a model that :func:`pack` has given packed layers.

    Attributes:
        tensors: the model's state dict, or, where ``conversions`` is given, the file's tensors by their own names.
        conversions: transformers' conversions of the file's tensors; None where ``tensors`` is the state dict.
        dense: a dict that maps the name of each of the model's parameters whose quantized weight was decoded to the
            reason why the weight was decoded.
    """

    tensors: dict[str, Tensor]
    conversions: Optional[list[Any]]
    dense: dict[str, str]


def pack(model: Any, header: GgufHeader, dtype: torch.dtype) -> Packed:
    """Replaces the layers of a model on the meta device by packed layers, and returns the tensors to load.

    Quantized tensors are decoded only if they stay dense in the model. Most other tensors are mapped from the disk;
    copied are, for example, tensors whose rows are reordered or joined. A layer whose weight was decoded gets the
    reason as its attribute ``note``.

    Raises GgufError where a tensor of the file does not fit the model or is not of the model, where the file lacks a
    tensor of the model, and where transformers can't read the tensors. The file may have tensors that the model does
    not use, such as rotary factors, and may lack a tensor that is tied to another one.
    """
    # transformers calls pack in a context that puts new tensors on the meta device.
    with torch.device("cpu"):
        try:
            converted = is_gguf_arch_supported(header.architecture)
            found = _pack_converted(model, header, dtype) if converted else _pack_legacy(model, header, dtype)
        except GgufError:
            raise
        except (ValueError, RuntimeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise header.error(f"transformers can't read the tensors: {type(error).__name__}: {text:.200}") from error
    for parameter, reason in found.dense.items():
        module = model.get_submodule(parameter.rpartition(".")[0])
        module.note = f"the file's packed weight was decoded: {reason}"
    return found


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check_all(model: Any, header: GgufHeader, shapes: dict[str, torch.Size], found: Iterable[str]) -> None:
    """Raises GgufError for a parameter of the model that neither has a tensor in the file nor is tied to a parameter
    with a tensor. Without this check, transformers would allocate memory for such a parameter."""
    found = set(found)
    tied = {name for pair in model.all_tied_weights_keys.items() if set(pair) & found for name in pair}
    if missing := [name for name in shapes if name not in found and name not in tied]:
        raise no_tensor(header, missing, type(model))


def no_tensor(header: GgufHeader, missing: list[str], kind: type) -> GgufError:
    """Returns the error of a file that lacks the tensors of the parameters ``missing`` of the model class ``kind``."""
    more = f" and {len(missing) - 1} more" if missing[1:] else ""
    return header.error(f"no tensor for the parameter {missing[0]}{more} of {kind.__name__}")


def _is_unused(model: Any, name: str) -> bool:
    """Returns whether the model does not use the file's tensor ``name``, for example the head's ``output.weight`` for a
    model class without a head."""
    return _UNUSED.fullmatch(name) is not None or (name == "output.weight" and model.get_output_embeddings() is None)


def _layers(model: Any) -> Callable[[str], Optional[str]]:
    """Returns a function that gets a parameter's name and returns the reason why the parameter's layer can't hold a
    packed weight, or None if the layer can hold a packed weight."""
    read = weights_read_past(model)

    def reason(parameter: str) -> Optional[str]:
        name, _, attribute = parameter.rpartition(".")
        kind = type(model.get_submodule(name))
        known = kind in (nn.Linear, nn.Embedding) or kind.__name__ in _LINEAR or _SCALED.search(kind.__name__)
        if attribute != "weight" or not known:
            return f"a {kind.__name__} can't hold packed weights"
        if name in read:
            return "the code of another module reads its weight"
        return None

    return reason


def _why_type(info: TensorInfo) -> Optional[str]:
    """Returns the reason why no packed layer can hold a weight of the tensor's type; None if a packed layer can."""
    return None if has_kernel(info.type) else f"no kernel decodes the type {info.type_name}"


def _put(model: Any, parameter: str, weight: PackedWeight, dtype: torch.dtype, header: GgufHeader) -> None:
    """Replaces the linear layer or the embedding of ``parameter`` by a packed layer on the meta device."""
    name = parameter.rpartition(".")[0]
    module = model.get_submodule(name)
    if weight.shape != module.weight.shape:
        raise header.error(f"the tensor of {parameter} has shape {tuple(weight.shape)}, wanted "
                           f"{tuple(module.weight.shape)}")  # fmt: skip
    weight = weight.to("meta")
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "scalar_embed_scale", 1.0)
        new: Any = PackedEmbedding.from_packed(weight, ("weight",), module.padding_idx, dtype=dtype, scale=scale)
    else:
        new = PackedLinear.from_packed(weight, ("weight",), module.bias, dtype=dtype)
    new.weight._is_hf_initialized = True
    model.set_submodule(name, new.train(module.training))


def _put_experts(module: Any, weights: dict[str, PackedWeight], dtype: torch.dtype) -> None:
    """Replaces the experts' parameters by packed weights on the meta device."""
    hold_packed(module, {name: (weight.to("meta"), (name,)) for name, weight in weights.items()}, dtype)
    for name in weights:
        module._parameters[name]._is_hf_initialized = True


def _tie(model: Any, packed: dict[str, PackedWeight], dtype: torch.dtype, header: GgufHeader) -> None:
    """Gives a head that is tied to a packed embedding the embedding's packed weight."""
    for target, source in model.all_tied_weights_keys.items():
        if source in packed and target not in packed:
            _put(model, target, packed[source], dtype, header)


def _weight(header: GgufHeader, info: TensorInfo, dtype: torch.dtype) -> PackedWeight:
    return gguf_weight(header.data(info.name), info.type, info.shape, dtype)


def _values(header: GgufHeader, info: TensorInfo) -> Tensor:
    """Returns the values of a tensor: in float32 where the tensor is quantized, else in the tensor's own dtype."""
    if info.dtype is not None:
        return header.data(info.name)
    return _weight(header, info, torch.float32).dequantize(torch.float32).reshape(info.shape)


# --- the architectures of modeling_gguf_pytorch_utils ----------------------------------------------------------------


def _names(model: Any, header: GgufHeader, processor: Any) -> dict[str, str]:
    """Returns a dict from the names of the file's tensors to the names of the model's parameters.

    The dict equals that of transformers' ``get_gguf_hf_weights_map``, which is slower because it builds gguf's table of
    names anew for each module of the model; this function builds the table once.
    """
    with required("gguf", "a model in a GGUF file"):
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    architecture = header.architecture
    table = get_tensor_name_map(numbers["llama" if architecture == "mistral" else architecture], 1)
    found: dict[str, str] = {}

    def add(name: str, full: str) -> None:
        local, suffix = name, ""
        if name.endswith((".weight", ".bias")):
            local, leaf = name.rsplit(".", 1)
            suffix = f".{leaf}"
        layer = re.search(r"(?:^|\.)([0-9]+)(?=\.|$)", local)
        own = table.get_name(local if layer is None else f"{local[: layer.start(1)]}0{local[layer.end(1) :]}")
        if own is None:
            more: dict[str, str] = {}
            processor.perform_fallback_tensor_mapping(more, suffix, "", name)
            for key in more:
                found.setdefault(key, full)
        else:
            own = own if layer is None else re.sub(r"\.0(?=\.|$)", f".{layer[1]}", own, count=1)
            found.setdefault(own + suffix, full)

    names = [(processor.preprocess_name(name), name) for name in model.state_dict()]
    prefix = model.base_model_prefix
    if not any(full.startswith(f"{prefix}.") for _, full in names):  # the model is a base model without a head
        names = [(f"{prefix}.{name}", full) for name, full in names]
    for depth in range(max((name.count(".") for name, _ in names), default=0)):
        for name, full in names:
            if name.count(".") > depth:
                add(name.split(".", depth)[depth], full)
    return found


def _pack_legacy(model: Any, header: GgufHeader, dtype: torch.dtype) -> Packed:
    """Implements :func:`pack` for the architectures of ``modeling_gguf_pytorch_utils``."""
    fields, shapes = model.config.to_dict(), _shapes(model)
    kind = _OWN.get(header.architecture) or legacy.TENSOR_PROCESSORS.get(header.architecture, legacy.TensorProcessor)
    processor = kind(config=fields)
    names = _names(model, header, processor)
    changed = _changes_of(kind)
    why_dense, found = _layers(model), Packed({}, None, {})
    packed: dict[str, PackedWeight] = {}
    for info in header.tensors.values():
        target = names.get(info.name) or names.get(info.name.removesuffix(".weight"))
        if target is None:
            if not _is_unused(model, info.name):
                raise header.error(f"the tensor {info.name!r:.80} is none of {type(model).__name__}'s")
            continue
        touched = changed is None or re.search(changed.names, info.name) is not None
        if (expert := _EXPERTS.fullmatch(info.name)) is not None:
            _check_halves(header, expert["block"], expert["leaf"])
        if info.dtype is None:
            if changed is None:
                reason = f"transformers' {kind.__name__} is not known and may change its values as it reads the file"
            elif expert is not None:
                name = target.rpartition(".")[0]
                parts = [header.tensors.get(f"{expert['block']}.ffn_{part}_exps.weight") for part in _PARTS]
                reason = _why_experts(model.get_submodule(name), parts)
                # The experts' three weights gate, up and down of a layer are put into the module together, when the
                # loop comes to the first of the three.
                if reason is None and target not in found.tensors:
                    found.tensors.update(_packed_experts(model, header, name, parts, dtype))
            else:
                changes = _CHANGED if touched and changed.rows is None else None
                reason = why_dense(target) or _why_type(info) or changes
                if reason is None:
                    weight = _weight(header, info, dtype)
                    if touched:
                        weight = permuted_rows(weight, changed.rows(info.name, weight.out_features, fields))
                    _put(model, target, weight, dtype, header)
                    packed[target], found.tensors[target] = weight, weight.parts[0]
            if reason is None:
                continue
            found.dense[target] = reason
        _decode(header, info, target, names, processor, touched, dtype, found.tensors)
        made = found.tensors.get(target)
        # Some converters of a model to GGUF keep dimensions of size 1 and some do not, for example in the gate of Qwen
        # 2's shared expert.
        if made is not None and _without_ones(made.shape) == _without_ones(shapes[target]):
            found.tensors[target] = made = made.reshape(shapes[target])
        if made is not None and made.shape != shapes[target]:
            raise header.error(f"the tensor of {target} has shape {tuple(found.tensors[target].shape)}, wanted "
                               f"{tuple(shapes[target])}")  # fmt: skip
    _tie(model, packed, dtype, header)
    _check_all(model, header, shapes, found.tensors)
    return found


def _decode(
    header: GgufHeader, info: TensorInfo, target: str, names: dict[str, str], processor: Any, touched: bool,
    dtype: torch.dtype, tensors: dict[str, Tensor],
) -> None:  # fmt: skip
    """Puts the decoded values of a file's tensor into ``tensors``. If ``touched`` is true, ``processor``, an object of
    a class of TENSOR_PROCESSORS, converts the values first."""
    values = _values(header, info)
    if not touched:
        tensors[target] = values
        return
    made = processor.process(weights=values.float().numpy(), name=info.name, tensor_key_mapping=names,
                             parsed_parameters={"tensors": tensors})  # fmt: skip
    if made.name is not None:
        tensors[target] = torch.from_numpy(made.weights.copy()).to(dtype)


def _packed_experts(
    model: Any, header: GgufHeader, name: str, parts: list[TensorInfo], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gives the experts' module ``name`` the packed weights that the file has for gate, up and down, and returns a dict
    that maps the names of the experts' parameters to the tensors to load.

    ``parts`` are the file's tensors gate, up and down, for which :func:`_why_experts` is None. transformers' model has
    gate and up in one weight: first the rows of gate and then those of up, or, in gpt-oss, a row of gate and a row of
    up in turns.
    """
    module, (gate, up, down) = model.get_submodule(name), parts
    experts, rows, columns = gate.shape
    halves = [header.data(gate.name), header.data(up.name)]
    turns = header.architecture in _OWN  # whether the rows of gate and up alternate
    joined = torch.stack(halves, 2).flatten(1, 2) if turns else torch.cat(halves, 1)
    weights = {
        "gate_up_proj": gguf_weight(joined, gate.type, (experts, 2 * rows, columns), dtype),
        "down_proj": _weight(header, down, dtype),
    }
    for parameter, weight in weights.items():
        wanted = tuple(getattr(module, parameter).shape)
        wanted = (wanted[0], wanted[2], wanted[1]) if is_stored_transposed(module) else wanted
        if tuple(weight.shape) != wanted:
            raise header.error(f"the tensor of {name}.{parameter} has shape {tuple(weight.shape)}, wanted {wanted}")
    _put_experts(module, weights, dtype)
    return {f"{name}.{parameter}": weight.parts[0] for parameter, weight in weights.items()}


def _check_halves(header: GgufHeader, block: str, leaf: str) -> None:
    """Raises GgufError where a decoder layer lacks the experts' gate or up, or where gate and up have different
    sizes."""
    gate, up = (header.tensors.get(f"{block}.ffn_{part}_exps.{leaf}") for part in ("gate", "up"))
    if gate is None or up is None or gate.shape != up.shape:
        came = ["missing" if one is None else one.shape for one in (gate, up)]
        raise header.error(f"{block}.ffn_gate_exps.{leaf} is {came[0]} and {block}.ffn_up_exps.{leaf} is {came[1]}, "
                           "wanted equal sizes")  # fmt: skip


def _why_experts(module: Any, parts: list[Optional[TensorInfo]]) -> Optional[str]:
    """Returns the reason why the experts' module ``module`` can't hold the file's tensors gate, up and down packed;
    None if the module can."""
    if any(info is None or info.dtype is not None or len(info.shape) != 3 for info in parts):
        return "another weight of the experts is not quantized"
    if (reason := next(filter(None, map(_why_type, parts)), None)) is not None:
        return reason
    if set(expert_parameters(module)) != {"gate_up_proj", "down_proj"}:
        return f"a {type(module).__name__} can't hold packed weights"
    gate, up, _ = parts
    if gate.type != up.type or gate.shape != up.shape:
        return f"gate is {gate.type_name} and up is {up.type_name}, wanted one type"
    return None


# --- the architectures of integrations.gguf ---------------------------------------------------------------------------


class _Source(NamedTuple):
    """The file's tensors from which transformers' conversion makes one parameter, and the reason why these tensors have
    to be decoded before the conversion; the reason is None if the conversion keeps packed bytes."""

    tensors: list[TensorInfo]
    reason: Optional[str]


def _plan(header: GgufHeader, mapping: list[Any]) -> dict[str, _Source]:
    """Returns a dict that maps the name of each parameter of the model to the file's tensors from which the parameter
    is made.

    The tensors of a parameter are those that transformers' ``get_gguf_plan`` finds.
    """
    mapping = copy.deepcopy(mapping)  # a copy, because rename_source_key changes the conversions
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, _Source] = {}
    for info in header.tensors.values():
        parameter, pattern = rename_source_key(info.name, renamings, converters)
        operations = getattr(by_pattern.get(pattern), "operations", ())
        keeps = all(getattr(one, "supports_packed", False) and not hasattr(one, "input_permutation")
                    for one in operations)  # fmt: skip
        found.setdefault(parameter, _Source([], None if keeps else _CHANGED)).tensors.append(info)
    return found


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """Returns a shape without its sizes of 1, because the file and the model may have them in different places."""
    return tuple(size for size in shape if size != 1)


def _joined(tensors: list[TensorInfo]) -> Optional[tuple[int, ...]]:
    """Returns the sizes, other than 1, of tensors joined along their rows; None where the tensors can't be joined."""
    shape = tensors[0].shape
    if len(tensors) == 1:
        return _without_ones(shape)
    if len(shape) != 3 or any((info.shape[0], info.shape[2:]) != (shape[0], shape[2:]) for info in tensors):
        return None
    return _without_ones((shape[0], sum(info.shape[1] for info in tensors), shape[2]))


def _own_name(model: Any, parameter: str, shapes: dict[str, torch.Size]) -> str:
    """Returns the parameter's name in a model that is the base model itself, such as ``Lfm2Model``."""
    own = parameter.removeprefix(f"{model.base_model_prefix}.")
    return own if parameter not in shapes and own in shapes else parameter


def _pack_converted(model: Any, header: GgufHeader, dtype: torch.dtype) -> Packed:
    """Implements :func:`pack` for the architectures of ``integrations.gguf``."""
    mapping, shapes = get_gguf_conversion_mapping(header.architecture, model.config), _shapes(model)
    plan = {_own_name(model, name, shapes): source for name, source in _plan(header, mapping).items()}
    why_dense, packed, experts = _layers(model), {}, {}
    tensors = {name: header.data(name) for name in header.tensors}
    dense: dict[str, str] = {}
    for parameter, source in plan.items():
        if parameter not in shapes:
            if not parameter.startswith("mtp.") and not all(_is_unused(model, one.name) for one in source.tensors):
                raise header.error(f"the tensor {source.tensors[0].name!r:.80} is none of {type(model).__name__}'s")
            for info in source.tensors:
                tensors.pop(info.name)
            continue
        came = _joined(source.tensors)
        if came != _without_ones(shapes[parameter]):
            listed = " and ".join(str(info.shape) for info in source.tensors)
            raise header.error(f"the tensors of {parameter} have the sizes {listed}, wanted those of "
                               f"{tuple(shapes[parameter])}")  # fmt: skip
        if all(info.dtype is not None for info in source.tensors):
            continue
        reason = source.reason
        if reason is None and parameter.endswith((".gate_up_proj", ".down_proj")):
            name = parameter.rpartition(".")[0]
            parts = [info for each in ("gate_up_proj", "down_proj") for info in plan[f"{name}.{each}"].tensors]
            if (reason := _why_experts(model.get_submodule(name), parts)) is None:
                experts.setdefault(name, {})[parameter.rpartition(".")[2]] = source.tensors[0].type
        elif reason is None and (reason := why_dense(parameter) or _why_type(source.tensors[0])) is None:
            packed[parameter] = _empty(source.tensors[0].type, shapes[parameter], dtype)
            _put(model, parameter, packed[parameter], dtype, header)
        if reason is not None:
            dense[parameter] = reason
            for info in source.tensors:
                tensors[info.name] = _values(header, info).to(dtype)
    for name, types in experts.items():
        weights = {each: _empty(type, shapes[f"{name}.{each}"], dtype) for each, type in types.items()}
        _put_experts(model.get_submodule(name), weights, dtype)
    _tie(model, packed, dtype, header)
    _check_all(model, header, shapes, plan)
    listed = tuple(reader.TensorInfo(info.name, info.shape, info.type, info.offset, info.nbytes)
                   for info in header.tensors.values() if info.name in tensors)  # fmt: skip
    about = reader.GgufHeader(str(header.path), header.architecture, listed, header.data_start)
    return Packed(tensors, add_gguf_load_ops(mapping, {}, about, dtype), dense)


def _empty(type: int, shape: torch.Size, dtype: torch.dtype) -> PackedWeight:
    """Returns a packed weight on the meta device, into which transformers loads the bytes."""
    columns, size = TYPES[type].columns, TYPES[type].bytes
    if shape[-1] % columns:
        raise ValueError(f"{shape[-1]} columns are no multiple of {columns}, the block of {TYPES[type].name}")
    data = torch.empty(*shape[:-1], shape[-1] // columns * size, dtype=torch.uint8, device="meta")
    return gguf_weight(data, type, shape, dtype)
