"""Converts bottleneck adapters from and to the files of AdapterHub's ``adapters`` package.

    AdapterHub:   {place}.adapters.{name}.adapter_down.0.weight     peft_ext:   base_model.model.{place}
                  {place}.adapters.{name}.adapter_up.bias  ...                  .bottleneck_adapters.down.weight  ...

A converted adapter has the same tensor values and computes the same function; only the tensors' names change. Placement
"pfeiffer" is AdapterHub's ``SeqBnConfig``, "houlsby" is ``DoubleSeqBnConfig``, and "after_ffn" is
``SeqBnConfig(original_ln_before=False)``. The module name ``{place}`` depends on the model's architecture and differs
between the two formats. This module supports the architectures that ``adapters`` supports and for which
:class:`~peft_ext.tuners.BottleneckConfig` has defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .bottleneck import BottleneckConfig

__all__ = ["config_from_adapterhub", "from_adapterhub", "to_adapterhub"]

_PLACEMENTS = ("houlsby", "pfeiffer", "after_ffn")

# Maps a model type to the places of adapters within a layer of the model. Each entry holds AdapterHub's place,
# peft_ext's place for an adapter directly after the sublayer, and peft_ext's place of the feed-forward's adapter under
# "pfeiffer". The last item of an entry is None for attention, which has no adapter under "pfeiffer", and "" if the
# place is the layer itself.
_GATED = (("attention_adapters", "self_attn.o_proj", None), ("output_adapters", "mlp.down_proj", ""))
_BERT = (("attention.output", "attention.output.dense", None), ("output", "output.dense", "output.LayerNorm"))
_PLACES: dict[str, tuple[tuple[str, str, Any], ...]] = {
    **dict.fromkeys(("llama", "mistral"), _GATED),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "gpt2": (("attention_adapters", "attn.c_proj", None), ("output_adapters", "mlp.c_proj", "")),
    "whisper": (
        ("attention_adapters", "self_attn.out_proj", None),
        ("cross_attention_adapters", "encoder_attn.out_proj", None),
        ("output_adapters", "fc2", ""),
    ),
    "t5": (
        ("layer.0", "layer.0.SelfAttention.o", None),
        ("layer.1", "layer.1.DenseReluDense.wo", "layer.1"),
    ),
}
_T5_DECODER = (
    ("layer.0", "layer.0.SelfAttention.o", None),
    ("layer.1", "layer.1.EncDecAttention.o", None),
    ("layer.2", "layer.2.DenseReluDense.wo", "layer.2"),
)
_LAYER = r"(?P<layer>(?:.*?\.)??(?:layers?|h|block)\.\d+)"
_TENSORS = {"adapter_down.0.weight": "down.weight", "adapter_down.0.bias": "down.bias",
            "adapter_up.weight": "up.weight", "adapter_up.bias": "up.bias"}  # fmt: skip
_THEIRS = re.compile(rf"{_LAYER}\.(?P<place>.+)\.adapters\.(?P<name>[^.]+)\.(?P<tensor>.+)")
_OURS = re.compile(rf"(?:base_model\.model\.)?{_LAYER}(?:\.(?P<place>.+))?\.bottleneck_adapters\.(?P<tensor>.+)")

# Maps AdapterHub's fields (mh_adapter, output_adapter, original_ln_before) to a placement of BottleneckConfig.
_BY_CONFIG = {(True, True, False): "houlsby", (False, True, True): "pfeiffer", (False, True, False): "after_ffn"}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
                "swish": "silu", "silu": "silu"}  # fmt: skip
# Fields of AdapterHub's BnConfig for features that BottleneckConfig lacks, each with the value under which a
# configuration can be converted.
_PLAIN = {"ln_before": False, "ln_after": False, "is_parallel": False, "use_gating": False, "phm_layer": False,
          "inv_adapter": None, "dropout": 0.0, "stochastic_depth": 0.0, "original_ln_after": True,
          "residual_before_ln": True}  # fmt: skip


def _places(caller: str, model_type: str, placement: str, layer: str) -> list[tuple[str, str]]:
    """Returns, for each adapter in the layer with the name ``layer``, a pair of names within the layer: of AdapterHub's
    module that has the adapter, and of the module that peft_ext adapts ("" for the layer itself)."""
    if model_type not in _PLACES:
        raise ValueError(f"{caller}: model_type is {model_type!r}, wanted one of {tuple(sorted(_PLACES))}")
    if placement not in _PLACEMENTS:
        raise ValueError(f"{caller}: placement is {placement!r}, wanted one of {_PLACEMENTS}")
    decoder = model_type == "t5" and re.search(r"(?:^|\.)decoder\.block\.\d+$", layer) is not None
    found = []
    for theirs, behind, summed in _T5_DECODER if decoder else _PLACES[model_type]:
        if placement == "houlsby" or summed is not None:
            found.append((theirs, summed if placement == "pfeiffer" else behind))
    return found


def from_adapterhub(state: Mapping[str, Tensor], model_type: str, placement: str = "pfeiffer") -> dict[str, Tensor]:
    """Converts the tensor names of AdapterHub's ``pytorch_adapter.bin`` to the names in PEFT's adapter files.

    Write the result as ``adapter_model.safetensors`` next to an adapter configuration, or pass the result to
    ``peft.set_peft_model_state_dict``. The result keeps the names of the model's layers. If the layers of the new model
    have a prefix (such as "bert.") that the layers of the saved model lack, put the prefix before the names of
    ``state``.

    Args:
        state: the tensors of ``pytorch_adapter.bin`` by name, of one adapter.
        model_type: the model type in the model's configuration, for example "bert".
        placement: where the adapters are, "houlsby", "pfeiffer" or "after_ffn", see :class:`peft_ext.BottleneckConfig`.

    Raises: ValueError if model_type or placement is unknown, if a tensor does not belong to a bottleneck adapter at a
    module where ``placement`` puts adapters, or if ``state`` has the tensors of several adapters.
    """
    made, names = {}, set()
    for key, tensor in state.items():
        match = _THEIRS.fullmatch(key)
        places = dict(_places("from_adapterhub", model_type, placement, match["layer"] if match else ""))
        if match is None or match["tensor"] not in _TENSORS or match["place"] not in places:
            raise ValueError(f"from_adapterhub: {key} is no tensor of a {placement!r} adapter of a {model_type} model")
        names.add(match["name"])
        path = ".".join(filter(None, (match["layer"], places[match["place"]])))
        made[f"base_model.model.{path}.bottleneck_adapters.{_TENSORS[match['tensor']]}"] = tensor
    if len(names) > 1:
        raise ValueError(f"from_adapterhub: state has the adapters {sorted(names)}, wanted one")
    return made


def to_adapterhub(
    state: Mapping[str, Tensor], model_type: str, placement: str = "pfeiffer", adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Converts PEFT's tensor names (``peft.get_peft_model_state_dict``) to AdapterHub's, the inverse of
    from_adapterhub.

    ``adapter_name`` is the adapter's name in the result. Raises ValueError if model_type or placement is unknown, or if
    a tensor does not belong to a bottleneck adapter at a module where ``placement`` puts adapters.
    """
    tensors = {ours: theirs for theirs, ours in _TENSORS.items()}
    made = {}
    for key, tensor in state.items():
        match = _OURS.fullmatch(key)
        places = _places("to_adapterhub", model_type, placement, match["layer"] if match else "")
        theirs = {ours: theirs for theirs, ours in places}
        if match is None or match["tensor"] not in tensors or (match["place"] or "") not in theirs:
            raise ValueError(f"to_adapterhub: {key} is no tensor of a {placement!r} adapter of a {model_type} model")
        place = f"{match['layer']}.{theirs[match['place'] or '']}"
        made[f"{place}.adapters.{adapter_name}.{tensors[match['tensor']]}"] = tensor
    return made


def config_from_adapterhub(config: Mapping[str, Any], model_type: str, **kwargs: Any) -> BottleneckConfig:
    """Converts AdapterHub's adapter configuration to a BottleneckConfig.

    Args:
        config: the object "config" in AdapterHub's ``adapter_config.json``: a dictionary with ``original_ln_before``,
            ``mh_adapter``, ``output_adapter``, ``non_linearity``, ``reduction_factor`` and the other fields of
            ``BnConfig``.
        model_type: the model type in the model's configuration, for example "bert".
        kwargs: further fields of BottleneckConfig, such as ``task_type`` and ``inference_mode``.

    Raises: ValueError if the model type is unknown, or if config asks for a feature that BottleneckConfig lacks, such
    as norms inside of the adapter, gates, dropout or a learned scale.
    """
    for name, plain in _PLAIN.items():
        if config.get(name, plain) != plain:
            raise ValueError(f"config_from_adapterhub: {name} is {config[name]!r}, wanted {plain!r}")
    where = tuple(bool(config.get(name)) for name in ("mh_adapter", "output_adapter", "original_ln_before"))
    placement = _BY_CONFIG.get(where)
    if placement is None:
        raise ValueError("config_from_adapterhub: mh_adapter, output_adapter and original_ln_before are "
                         f"{where}, wanted one of {tuple(_BY_CONFIG)}")  # fmt: skip
    activation = _ACTIVATIONS.get(str(config.get("non_linearity")).lower())
    if activation is None:
        raise ValueError(f"config_from_adapterhub: non_linearity is {config.get('non_linearity')!r}, wanted one of "
                         f"{tuple(_ACTIVATIONS)}")  # fmt: skip
    numbers = {}
    for name, field in (("reduction_factor", "reduction_factor"), ("scaling", "scale")):
        value = config.get(name, 1.0 if name == "scaling" else 16)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"config_from_adapterhub: {name} is {value!r}, wanted a number")
        numbers[field] = float(value)
    if config.get("leave_out"):
        raise ValueError(f"config_from_adapterhub: leave_out is {config['leave_out']!r}, wanted an empty list; name "
                         "the layers that have adapters in layers_to_transform")  # fmt: skip
    _places("config_from_adapterhub", model_type, placement, "")
    if placement == "houlsby" and not config.get("cross_adapter", False) and model_type in ("t5", "whisper"):
        behind = {"t5": r"SelfAttention\.o|DenseReluDense\.wo", "whisper": r"self_attn\.out_proj|fc2"}[model_type]
        kwargs.setdefault("target_modules", rf"(?:.*\.)?(?:{behind})")
    return BottleneckConfig(placement=placement, activation=activation, **numbers, **kwargs)
