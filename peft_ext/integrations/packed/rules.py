"""Reads a checkpoint's ``quantization_config``: how its layers are stored, and which layers it leaves dense.

``quantizer`` calls :meth:`Rules.scheme` for each layer whose tensors in the file are packed. A config with a setting
that is not supported raises a ValueError that names the setting, before a tensor of the checkpoint is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

__all__ = ["Rules", "Scheme", "read_rules"]

# The note of a packed layer whose input the checkpoint's own library quantizes while the model runs. Packed layers
# multiply unquantized inputs.
DYNAMIC = "its input is not quantized, although the checkpoint's activation scheme is dynamic"


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint stores the weights of a group of layers.

    Attributes:
        layout: name of the layout in ``layouts.LAYOUTS``.
        bits: number of bits of one code of a weight.
        group: number of columns that share a scale; 0 for all columns of a row.
        rows: number of rows that share a scale; 0 for all rows.
        symmetric: whether the codes have no zero points.
        version: version of the layout: GPTQ's ``checkpoint_format``, or the axis of HQQ's groups.
        note: what the packed layer leaves out of the computation of the checkpoint's own layer; "" if it leaves out
            nothing.
        quantizes: whether the checkpoint's own layer quantizes its input as :class:`peft_ext.nn.Float8Linear` does: to
            e4m3, with a scale for each token and for the columns that share a scale in the weight.
    """

    layout: str
    bits: int = 0
    group: int = 0
    rows: int = 1
    symmetric: bool = True
    version: str = ""
    note: str = ""
    quantizes: bool = False


@dataclass(frozen=True)
class Rules:
    """The rules of a ``quantization_config``: which layers are packed, and how.

    Attributes:
        method: the checkpoint's ``quant_method``.
        schemes: a dict from the name of a group of layers to the group's scheme.
        find: a function of a layer's name and module, which returns the key of the layer's scheme in ``schemes``, or
            None if the config leaves the layer dense.
    """

    method: str
    schemes: Mapping[str, Scheme]
    find: Callable[[str, nn.Module], Optional[str]]

    @property
    def layouts(self) -> set[str]:
        return {scheme.layout for scheme in self.schemes.values()}

    def scheme(self, name: str, module: nn.Module) -> Optional[Scheme]:
        group = self.find(name, module)
        return None if group is None else self.schemes[group]


def read_rules(config: Mapping[str, Any]) -> Rules:
    """Returns the rules of a checkpoint's ``quantization_config``. Raises ValueError if the config is not supported."""
    method = getattr(config.get("quant_method"), "value", config.get("quant_method"))
    if method not in _READERS:
        wanted = f"{', '.join(_READERS)}, or bitsandbytes in 4 bits"
        raise ValueError(f"PackedConfig: quant_method is {method!r}, wanted one of {wanted}")
    return _READERS[method](config)


def _wanted(method: str, config: Mapping[str, Any], key: str, default: Any, allowed: Iterable[Any]) -> Any:
    """Returns ``config[key]``, or ``default`` if ``config`` lacks the key. Raises ValueError if the value is none of
    ``allowed``."""
    value = config.get(key, default)
    if value not in allowed:
        wanted = ", ".join(map(repr, allowed))
        raise ValueError(f"PackedConfig: {key} of {method} is {value!r}, wanted {wanted}")
    return value


# --- transformers' rule -----------------------------------------------------------------------------------------------


def _is_skipped(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether a layer's name matches ``modules_to_not_convert``, by the rule of transformers'
    ``quantizers_utils.should_convert_module``: a pattern matches, as a string or a regular expression, from the start
    of the name up to a dot or the end, or matches as the end of the name."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{key}){boundary}", name) or name.endswith(key) for key in patterns)


def _of_one_scheme(method: str, scheme: Scheme, skipped: Optional[Sequence[str]]) -> Rules:
    patterns = tuple(skipped or ())
    return Rules(method, {"": scheme}, lambda name, module: None if _is_skipped(name, patterns) else "")


def _fp8(config: Mapping[str, Any]) -> Rules:
    _wanted("fp8", config, "fmt", "e4m3", ("e4m3", None))
    _wanted("fp8", config, "expert_dtype", "fp8", ("fp8", None))
    scheme = str(config.get("activation_scheme", "dynamic")).lower()
    _wanted("fp8", {"activation_scheme": scheme}, "activation_scheme", "dynamic", ("dynamic",))
    block = config.get("weight_block_size", (128, 128))
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise ValueError(f"PackedConfig: weight_block_size of fp8 is {block!r}, wanted two sizes or null")
    rows, columns = (0, 0) if block is None else block
    skipped = config.get("modules_to_not_convert") or config.get("ignored_layers")
    # transformers does not say for weights with one scale which columns of x share a scale.
    scheme = Scheme("fp8", 8, columns, rows, note=DYNAMIC, quantizes=block is not None)
    return _of_one_scheme("fp8", scheme, skipped)


def _mxfp4(config: Mapping[str, Any]) -> Rules:
    return _of_one_scheme("mxfp4", Scheme("mxfp4 experts", 4, 32), config.get("modules_to_not_convert"))


# The keys of a GPTQ config whose value may be the version of the layout, "gptq" or "gptq_v2".
_GPTQ_FORMAT = ("checkpoint_format", "format")


def _gptq_format(config: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the key of a GPTQ config under which the version of the layout is given, and the version in lower case.

    GPTQModel writes the version as ``checkpoint_format`` and as ``format``, and reads either. Raises ValueError if the
    two keys differ.
    """
    given = {key: str(config[key]).lower() for key in _GPTQ_FORMAT if config.get(key) is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"PackedConfig: checkpoint_format of gptq is {given['checkpoint_format']!r} and format is "
                         f"{given['format']!r}, wanted equal values")  # fmt: skip
    return next(iter(given.items()), ("checkpoint_format", "gptq"))


def _gptq_scheme(config: Mapping[str, Any]) -> Scheme:
    bits = _wanted("gptq", config, "bits", None, (2, 4, 8))
    key, version = _gptq_format(config)
    _wanted("gptq", {key: version}, key, "gptq", ("gptq", "gptq_v2"))
    group = int(config.get("group_size", 128))
    return Scheme("gptq", bits, max(group, 0), version=version)


def _gptq(config: Mapping[str, Any]) -> Rules:
    """Returns the rules of a GPTQ config, whose ``dynamic`` maps patterns to settings. The first pattern that matches
    the start of a layer's name gives the layer other settings.

    A pattern of ``dynamic`` that begins with "-:" leaves the layers that the pattern matches dense. Source: GPTQModel's
    ``quantization/config.py``.
    """
    schemes, patterns = {"": _gptq_scheme(config)}, []
    for key, changed in (config.get("dynamic") or {}).items():
        patterns.append((key.removeprefix("-:").removeprefix("+:"), None if key.startswith("-:") else key))
        if not key.startswith("-:"):
            # The version that a pattern sets replaces the model's version, also if the two versions are under different
            # keys of _GPTQ_FORMAT.
            unset = dict.fromkeys(_GPTQ_FORMAT) if any(name in changed for name in _GPTQ_FORMAT) else {}
            schemes[key] = _gptq_scheme({**config, **unset, **changed})

    def find(name: str, module: nn.Module) -> Optional[str]:
        return next((group for pattern, group in patterns if re.match(pattern, name)), "")

    return Rules("gptq", schemes, find)


def _awq(config: Mapping[str, Any]) -> Rules:
    bits = _wanted("awq", config, "bits", config.get("w_bit"), (4,))
    version = str(config.get("format", config.get("version", "gemm"))).lower()
    _wanted("awq", {"version": version}, "version", "gemm", ("gemm",))
    zero = bool(config.get("zero_point", True))
    group = int(config.get("group_size", config.get("q_group_size", 128)))
    return _of_one_scheme(
        "awq", Scheme("awq", bits, max(group, 0), symmetric=not zero), config.get("modules_to_not_convert")
    )


def _hqq(config: Mapping[str, Any]) -> Rules:
    given = config.get("quant_config") or {}
    params = given.get("weight_quant_params")
    if not isinstance(params, Mapping):
        raise ValueError(f"PackedConfig: quant_config of hqq is {given!r}, wanted weight_quant_params for all layers")
    bits = _wanted("hqq", params, "nbits", 4, (4, 8))
    axis = _wanted("hqq", params, "axis", 1, (0, 1))
    for key in ("quant_scale", "quant_zero", "view_as_float"):
        _wanted("hqq", params, key, False, (False, None))
    for key in ("scale_quant_params", "zero_quant_params"):
        _wanted("hqq", given, key, None, (None,))
    scheme = Scheme("hqq", bits, params.get("group_size") or 0, version=f"axis {axis}")
    return _of_one_scheme("hqq", scheme, config.get("skip_modules"))


# --- compressed-tensors -----------------------------------------------------------------------------------------------

# Maps a format of compressed-tensors and a type of the weights to a layout.
_COMPRESSED = {
    ("pack-quantized", "int"): "pack-quantized",
    ("int-quantized", "int"): "int-quantized",
    ("naive-quantized", "int"): "int-quantized",
    ("float-quantized", "float"): "float-quantized",
    ("naive-quantized", "float"): "float-quantized",
    ("nvfp4-pack-quantized", "float"): "nvfp4-pack-quantized",
    ("mxfp4-pack-quantized", "float"): "mxfp4-pack-quantized",
}


def _compressed_scheme(name: str, group: Mapping[str, Any], default: str) -> Scheme:
    weights, format = group.get("weights"), group.get("format") or default
    where = f"config_groups.{name} of compressed-tensors"
    if not weights:
        raise ValueError(f"PackedConfig: {where} has no weights, wanted quantized weights")
    kind, bits = weights.get("type", "int"), int(weights.get("num_bits", 8))
    layout = _COMPRESSED.get((format, kind))
    wanted = (2, 4, 8) if layout == "pack-quantized" else (8,) if kind == "int" else (4, 8)
    if layout is None or bits not in wanted:
        raise ValueError(f"PackedConfig: {where} has format {format!r} with {kind} weights of {bits} bits, wanted one "
                         f"of {', '.join(sorted({known for known, _ in _COMPRESSED}))}")  # fmt: skip
    note = ""
    for argument in ("input_activations", "output_activations"):
        given = group.get(argument)
        if not given:
            continue
        # Packed layers do not quantize activations. Dynamic activations of 8 bits are close to unquantized ones; with
        # any other quantized activations the packed layer would compute another function.
        if argument == "output_activations" or given.get("dynamic") is not True or int(given.get("num_bits", 8)) < 8:
            came = (
                f"{given.get('type', 'int')} of {given.get('num_bits', 8)} bits, dynamic {given.get('dynamic', False)}"
            )
            raise ValueError(f"PackedConfig: {argument} of {where} are quantized ({came}), wanted dense activations or "
                             "dynamic ones of 8 bits")  # fmt: skip
        note = DYNAMIC
    rows, columns = 1, max(int(weights.get("group_size") or 0), 0)
    strategy = weights.get("strategy") or ("group" if columns else "tensor")
    if strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
        raise ValueError(f"PackedConfig: {where} has the strategy {strategy!r}, wanted tensor, channel, group, "
                         "tensor_group or block")  # fmt: skip
    if strategy == "block":
        rows, columns = weights.get("block_structure") or (128, 128)
    elif strategy == "tensor":
        rows = 0
    given = group.get("input_activations") or {}
    # Maps the strategy of the inputs to the number of columns of x that share a scale.
    shared = {"token": 0, "group": int(given.get("group_size") or 0)}.get(given.get("strategy"))
    quantizes = layout == "float-quantized" and given.get("type") == "float" and shared == columns
    symmetric = bool(weights.get("symmetric", True))
    return Scheme(layout, bits, columns, rows, symmetric, note=note, quantizes=quantizes)


def _matches_name(name: str, target: str) -> bool:
    """Returns whether ``target`` stands for the layer ``name``, as compressed-tensors' ``utils.match.match_name``
    does."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _matches_class(module: nn.Module, target: str) -> bool:
    """Returns whether ``target`` is the name of a class of ``module``, as compressed-tensors'
    ``utils.match._match_class`` does."""
    return any(issubclass(kind, nn.Module) and kind.__name__ == target for kind in type(module).__mro__)


def _compressed(config: Mapping[str, Any]) -> Rules:
    if config.get("kv_cache_scheme"):
        raise ValueError("PackedConfig: compressed-tensors' kv_cache_scheme is not supported, wanted a dense cache")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError(f"PackedConfig: compressed-tensors' sparsity_config is {config['sparsity_config']!r}, wanted "
                         "dense weights")  # fmt: skip
    if config.get("transform_config"):
        raise ValueError("PackedConfig: compressed-tensors' transform_config is not supported")
    groups = config.get("config_groups") or {}
    if not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ValueError(f"PackedConfig: config_groups of compressed-tensors is {groups!r}, wanted groups with targets")
    default = config.get("format") or "pack-quantized"
    schemes = {name: _compressed_scheme(name, group, default) for name, group in groups.items()}
    ignore = tuple(config.get("ignore") or ())
    # A target that several of the `config_groups` name belongs to the last of these groups. If several targets match a
    # layer, the layer's exact name comes first, then a regular expression, then a class, as in compressed-tensors'
    # apply_quantization_config and match_targets.
    owner = {target: name for name, group in groups.items() for target in group.get("targets") or ()}
    targets = sorted(owner, key=lambda target: ("re:" in target, target))

    def find(name: str, module: nn.Module) -> Optional[str]:
        if any(_matches_name(name, target) or _matches_class(module, target) for target in ignore):
            return None
        named = [target for target in targets if _matches_name(name, target)]
        found = named or [target for target in targets if _matches_class(module, target)]
        return owner[found[0]] if found else None

    return Rules("compressed-tensors", schemes, find)


_READERS: dict[str, Callable[[Mapping[str, Any]], Rules]] = {
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
    "hqq": _hqq,
}
