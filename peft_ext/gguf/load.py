"""Loads a model from a GGUF file through transformers and keeps its quantized weights packed, as they lie in the file.

:func:`pack` replaces the layers of a model on the meta device by packed layers, and returns the model's state dict: the
quantized weights are views of the file, mapped from the disk. transformers then loads this state dict.

transformers reads GGUF in two ways. For most architectures, ``modeling_gguf_pytorch_utils`` has a class that turns the
file's tensors into the model's (``TENSOR_PROCESSORS``). For some, ``integrations.gguf`` has conversions of names and
tensors, which say themselves whether they keep packed bytes. A tensor whose conversion would change packed bytes is
decoded and stays dense.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from .._imports import required
from ..nn import PackedEmbedding, PackedLinear
from ..nn.experts import expert_parameters
from ..nn.packed_experts import hold_packed
from ..weight_reads import weights_read_past
from ..weights.gguf import TYPES, gguf_weight, llama_row_order, permuted_rows
from ..weights.packed import PackedWeight
from .header import GgufHeader, TensorInfo, read_header
from .metadata import read_config

with required("transformers", "a model in a GGUF file"):
    from transformers import AutoModelForCausalLM
    from transformers import modeling_gguf_pytorch_utils as legacy
    from transformers.integrations.gguf import (
        GgufHeader as TransformersHeader,
    )
    from transformers.integrations.gguf import (
        get_gguf_conversion_mapping,
        get_gguf_plan,
        is_gguf_arch_supported,
    )
    from transformers.integrations.gguf.utils import add_gguf_load_ops
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["METHOD", "Packed", "load_gguf", "pack"]

# Name of the quantization method under which transformers finds the quantizer of this module.
METHOD = "peft_ext_gguf"

_ROWS = "rows"
# What a class of TENSOR_PROCESSORS changes: names of tensors, and _ROWS where it reorders whole rows of attn_q and
# attn_k. A class that is not in this table may change every tensor.
_CHANGES: dict[type, tuple[str, str]] = {
    legacy.TensorProcessor: (r"(?!)", ""),
    legacy.T5TensorProcessor: (r"(?!)", ""),
    legacy.LlamaTensorProcessor: (r"\.attn_[qk]\.weight$", _ROWS),
    legacy.Gemma2TensorProcessor: (r"norm\.weight", ""),
    legacy.NemotronTensorProcessor: (r"norm\.weight", ""),
    legacy.BloomTensorProcessor: (r"attn_qkv", ""),
    legacy.MambaTensorProcessor: (r"ssm_conv1d\.weight|ssm_a", ""),
    legacy.Lfm2TensorProcessor: (r"shortconv\.conv\.weight", ""),
    legacy.Qwen2MoeTensorProcessor: (r"_exps|ffn_gate_inp_shexp", ""),
    legacy.MiniMaxM2TensorProcessor: (r"_exps", ""),
}
_EXPERTS = re.compile(r"(?P<block>.*)\.ffn_(?P<part>gate|up|down)_exps\.weight")
# Tensors that no parameter of a model holds: factors of the rotary frequencies, and Llama's old frequencies.
_OF_ROTARY = ("rope_freqs.weight",)


class Packed(NamedTuple):
    """A model on the meta device whose layers hold packed weights.

    Attributes:
        tensors: the model's state dict, or, where ``conversions`` is given, the file's tensors by their own names.
        conversions: transformers' conversions of the file's tensors; None where ``tensors`` needs none.
        dense: names of the model's layers whose quantized weight was decoded, with the reason.
        frequencies: factors by which the model's rotary frequencies are divided, or None.
    """

    tensors: dict[str, Tensor]
    conversions: Optional[list[Any]]
    dense: dict[str, str]
    frequencies: Optional[Tensor]


def load_gguf(
    path: Union[str, Path],
    *,
    dtype: torch.dtype = torch.bfloat16,
    model_class: Optional[Any] = None,
    device_map: Any = None,
    **kwargs: Any,
) -> Any:
    """Returns the transformers model in a GGUF file, with the file's quantized weights packed and mapped from the disk.

    Linear layers are :class:`peft_ext.nn.PackedLinear`, the embedding a :class:`peft_ext.nn.PackedEmbedding`, and
    experts a :class:`peft_ext.nn.PackedExperts`; the model's adapters are trained over these layers. A tied head
    shares the embedding's packed weight. A weight whose rows the file stores in another order (``attn_q`` and
    ``attn_k`` of Llama and Mistral) and the joined weights of experts are copied, without being decoded. Norms and
    biases, and weights that the file stores in F32, F16 or BF16, are dense.

    Args:
        path: the file. All architectures are supported whose GGUF files transformers reads.
        dtype: dtype of the dense weights and of the computation.
        model_class: the transformers class; default ``AutoModelForCausalLM``.
        device_map, kwargs: as for transformers' ``from_pretrained``.

    Raises:
        OSError: the file can't be read.
        ValueError: the file is damaged, is no model, or its model is not supported. The message names the file.
    """
    header = read_header(path)
    config = read_config(header)
    about = GgufPackedConfig()
    about.header = header
    loaded, info = _class_of(model_class or AutoModelForCausalLM, config, header).from_pretrained(
        None, config=config, state_dict=about.tensors, quantization_config=about, dtype=dtype, device_map=device_map,
        output_loading_info=True, **kwargs,
    )  # fmt: skip
    if wrong := sorted(map(str, info["missing_keys"])):
        raise header.error(f"no tensor for the model's parameter {wrong[0]}, and {len(wrong) - 1} more")
    loaded.config._name_or_path = loaded.name_or_path = str(header.path)
    return loaded


def _class_of(model_class: Any, config: Any, header: GgufHeader) -> Any:
    """Returns ``model_class``, or the class that the Auto class ``model_class`` chooses for the configuration."""
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    if type(config) not in mapping:
        raise header.error(f"{model_class.__name__} has no class for {config.model_type}")
    found = mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


@register_quantization_config(METHOD)
class GgufPackedConfig(QuantizationConfigMixin):
    """The quantization_config of a model that :func:`load_gguf` has loaded."""

    header: Optional[GgufHeader] = None

    def __init__(self, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.tensors: dict[str, Tensor] = {}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "file": None if self.header is None else str(self.header.path)}

    def __deepcopy__(self, memo: Any) -> GgufPackedConfig:
        return self


@register_quantizer(METHOD)
class GgufPackedQuantizer(HfQuantizer):
    """Keeps the weights of a GGUF file packed; see :func:`load_gguf`."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.header is None:
            raise ValueError("a model with packed GGUF weights is loaded by peft_ext.load_gguf")
        self._packed: Optional[Packed] = None

    def _process_model_before_weight_loading(
        self, model: Any, dtype: Optional[torch.dtype] = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self._packed = pack(model, config.header, dtype or torch.get_default_dtype())
        config.tensors.update(self._packed.tensors)
        model.peft_ext_dense = self._packed.dense

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Returns the file's conversions. The model's own describe a safetensors checkpoint."""
        return self._packed.conversions or []

    def get_new_dtype(self, converter: Any, param: Any, dtype: Optional[torch.dtype]) -> Optional[torch.dtype]:
        """Returns None for packed bytes, so that transformers does not cast them."""
        return None if getattr(param, "dtype", None) is torch.uint8 else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.quantization_config.tensors.clear()  # the model holds the tensors now
        for parameter in model.parameters():
            if parameter.dtype is torch.uint8:
                parameter.requires_grad_(False)
        if self._packed.frequencies is not None:
            _divide_frequencies(model, self._packed.frequencies, self.quantization_config.header)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return False


# --- a model on the meta device ---------------------------------------------------------------------------------------


def pack(model: Any, header: GgufHeader, dtype: torch.dtype) -> Packed:
    """Replaces the layers of a model on the meta device by packed layers, and returns the tensors to load.

    No tensor is decoded or copied but those that stay dense, and those whose rows are reordered or joined.

    Raises GgufError where a tensor of the file does not fit the model or is not of the model.
    """
    with torch.device("cpu"):  # transformers calls this in a context in which new tensors are on meta
        if is_gguf_arch_supported(header.architecture):
            return _pack_converted(model, header, dtype)
        return _pack_legacy(model, header, dtype)


def _layers(model: Any) -> Callable[[str], Optional[str]]:
    """Returns a function of a parameter's name: the reason why its layer can't hold a packed weight, or None."""
    read = weights_read_past(model)

    def reason(parameter: str) -> Optional[str]:
        name, _, attribute = parameter.rpartition(".")
        kind = type(model.get_submodule(name))
        if attribute != "weight" or kind not in (nn.Linear, nn.Embedding):
            return f"a {kind.__name__} can't hold packed weights"
        if name in read:
            return "the code of another module reads its weight"
        return None

    return reason


def _put(model: Any, parameter: str, weight: PackedWeight, dtype: torch.dtype, header: GgufHeader) -> None:
    """Replaces the linear layer or the embedding of ``parameter`` by a packed layer on the meta device."""
    name = parameter.rpartition(".")[0]
    module = model.get_submodule(name)
    if weight.shape != module.weight.shape:
        raise header.error(f"the tensor of {parameter} has shape {tuple(weight.shape)}, wanted "
                           f"{tuple(module.weight.shape)}")  # fmt: skip
    weight = weight.to("meta")
    if isinstance(module, nn.Embedding):
        new: Any = PackedEmbedding.from_packed(weight, ("weight",), module.padding_idx, dtype=dtype)
    else:
        new = PackedLinear.from_packed(weight, ("weight",), module.bias, dtype=dtype)
    new.weight._is_hf_initialized = True
    model.set_submodule(name, new.train(module.training))


def _tie(model: Any, packed: dict[str, PackedWeight], dtype: torch.dtype, header: GgufHeader) -> None:
    """Gives a head that is tied to a packed embedding the embedding's packed weight."""
    for target, source in model.all_tied_weights_keys.items():
        if source in packed and target not in packed:
            _put(model, target, packed[source], dtype, header)


def _weight(header: GgufHeader, info: TensorInfo, dtype: torch.dtype) -> PackedWeight:
    return gguf_weight(header.data(info.name), info.type, info.shape, dtype)


# --- the architectures of modeling_gguf_pytorch_utils ----------------------------------------------------------------


def _pack_legacy(model: Any, header: GgufHeader, dtype: torch.dtype) -> Packed:
    fields = model.config.to_dict()
    kind = legacy.TENSOR_PROCESSORS.get(header.architecture, legacy.TensorProcessor)
    processor = kind(config=fields)
    names = legacy.get_gguf_hf_weights_map(model, processor)
    changed, how = _CHANGES.get(kind, (r"", ""))
    why_dense, found = _layers(model), Packed({}, None, {}, _frequencies(header))
    packed: dict[str, PackedWeight] = {}
    for info in header.tensors.values():
        target = names.get(info.name) or names.get(info.name.removesuffix(".weight"))
        if target is None:
            if info.name not in _OF_ROTARY:
                raise header.error(f"the tensor {info.name!r:.80} is none of {type(model).__name__}'s")
            continue
        touched = re.search(changed, info.name) is not None
        expert = _EXPERTS.fullmatch(info.name)
        if info.dtype is None and expert is not None:
            if _pack_experts(model, header, target, expert["block"], dtype, found.tensors):
                continue
        elif info.dtype is None and (not touched or how == _ROWS):
            if (reason := why_dense(target)) is None:
                weight = _weight(header, info, dtype)
                if touched:
                    heads = fields["num_attention_heads" if ".attn_q." in info.name else "num_key_value_heads"]
                    weight = permuted_rows(weight, llama_row_order(weight.out_features, heads))
                _put(model, target, weight, dtype, header)
                packed[target], found.tensors[target] = weight, weight.parts[0]
                continue
            found.dense[target] = reason
        elif info.dtype is None:
            found.dense[target] = "transformers changes its values as it reads the file"
        _decode(header, info, target, names, processor, touched, dtype, found.tensors)
    _tie(model, packed, dtype, header)
    return found


def _decode(
    header: GgufHeader, info: TensorInfo, target: str, names: dict[str, str], processor: Any, touched: bool,
    dtype: torch.dtype, tensors: dict[str, Tensor],
) -> None:  # fmt: skip
    """Adds the dense tensor ``target`` to the state dict, as transformers' processor makes it from the values."""
    if info.dtype is None:
        values = _weight(header, info, torch.float32).dequantize(torch.float32).reshape(info.shape)
    else:
        values = header.data(info.name)
    if not touched:
        tensors[target] = values
        return
    made = processor.process(weights=values.float().numpy(), name=info.name, tensor_key_mapping=names,
                             parsed_parameters={"tensors": tensors})  # fmt: skip
    if made.name is not None:
        tensors[target] = torch.from_numpy(made.weights.copy()).to(dtype)


def _pack_experts(
    model: Any, header: GgufHeader, target: str, block: str, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> bool:
    """Packs the experts of a block. Returns False where their weights can't be packed and joined.

    The rows of gate and up of an expert are joined, as transformers' model has them.
    """
    name = target.rpartition(".")[0]
    module = model.get_submodule(name)
    parts = {part: header.tensors.get(f"{block}.ffn_{part}_exps.weight") for part in ("gate", "up", "down")}
    if any(info is None or info.dtype is not None or len(info.shape) != 3 for info in parts.values()):
        return False
    gate, up, down = parts.values()
    if (
        gate.type != up.type
        or gate.shape != up.shape
        or set(expert_parameters(module)) != {"gate_up_proj", "down_proj"}
    ):
        return False
    if f"{name}.gate_up_proj" in tensors:
        return True
    experts, rows, columns = gate.shape
    joined = torch.cat([header.data(gate.name), header.data(up.name)], 1)
    weights = {
        "gate_up_proj": gguf_weight(joined, gate.type, (experts, 2 * rows, columns), dtype),
        "down_proj": _weight(header, down, dtype),
    }
    for parameter, weight in weights.items():
        wanted = tuple(getattr(module, parameter).shape)
        if tuple(weight.shape) != wanted:
            raise header.error(f"the tensor of {name}.{parameter} has shape {tuple(weight.shape)}, wanted {wanted}")
        tensors[f"{name}.{parameter}"] = weight.parts[0]
    hold_packed(module, {key: (weight.to("meta"), (key,)) for key, weight in weights.items()}, dtype)
    for parameter in weights:
        module._parameters[parameter]._is_hf_initialized = True
    return True


# --- the architectures of integrations.gguf ---------------------------------------------------------------------------


def _pack_converted(model: Any, header: GgufHeader, dtype: torch.dtype) -> Packed:
    about = TransformersHeader.from_file(str(header.path))
    mapping = get_gguf_conversion_mapping(header.architecture, model.config)
    quantized, packable, permuted = get_gguf_plan(about, mapping)
    why_dense, packed = _layers(model), {}
    dense: dict[str, str] = {}
    for parameter, type in quantized.items():
        if parameter not in packable or parameter in permuted:
            dense[parameter] = "transformers changes its values as it reads the file"
        elif (reason := _why_missing(model, parameter) or why_dense(parameter)) is not None:
            dense[parameter] = reason
        else:
            module = model.get_parameter(parameter)
            packed[parameter] = _empty(type, module.shape, dtype)
            _put(model, parameter, packed[parameter], dtype, header)
    _tie(model, packed, dtype, header)
    needs = {name: type for name, type in quantized.items() if name in dense}
    conversions = add_gguf_load_ops(mapping, needs, about, dtype)
    return Packed({name: header.data(name) for name in header.tensors}, conversions, dense, None)


def _why_missing(model: Any, parameter: str) -> Optional[str]:
    try:
        model.get_parameter(parameter)
    except AttributeError:
        return "the model has no such parameter"
    return None


def _empty(type: int, shape: torch.Size, dtype: torch.dtype) -> PackedWeight:
    kind = TYPES[type]
    data = torch.empty(*shape[:-1], shape[-1] // kind.columns * kind.bytes, dtype=torch.uint8, device="meta")
    return gguf_weight(data, type, shape, dtype)


# --- rotary positions -------------------------------------------------------------------------------------------------


def _frequencies(header: GgufHeader) -> Optional[Tensor]:
    """Returns the file's factors of the rotary frequencies, which Llama 3.1 and later have; transformers reads none."""
    name = _OF_ROTARY[0]
    return header.data(name).float().clone() if name in header.tensors else None


def _divide_frequencies(model: Any, factors: Tensor, header: GgufHeader) -> None:
    """Divides the frequencies of the model's rotary embedding by the factors of the file."""
    found = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if len(found) != 1 or found[0].inv_freq.shape != factors.shape:
        raise header.error(f"rope_freqs.weight has {factors.numel()} factors, wanted one for each rotary frequency of "
                           "one rotary embedding")  # fmt: skip
    module = found[0]
    for name in ("inv_freq", "original_inv_freq"):
        held = getattr(module, name, None)
        if isinstance(held, Tensor):
            held.copy_(held / factors.to(held.device))
