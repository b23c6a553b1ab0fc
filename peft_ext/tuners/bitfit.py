"""BitFit trains only biases.

    Y = base(x; b)          b: the adapter's bias, used instead of the module's own bias

Source: BitFit, arXiv 2106.10199.
"""

from __future__ import annotations

import itertools
import re
import sys
import warnings
from dataclasses import dataclass, field
from typing import Optional, Union

import torch
from torch import Tensor, nn

from .layer import ReplacingLayer, ReplacingTuner, tree
from .register import peft_type, register
from .targets import (
    FLOATS,
    Plan,
    TargetConfig,
    base_modules,
    excluded,
    expand_all_linear,
    in_layers,
    matches,
    plan,
    targeted,
)

__all__ = ["BIAS_KINDS", "BitFitConfig", "BitFitLayer", "BitFitModel", "bias_kinds_of"]

BIAS_KINDS = ("all", "attention", "query", "mlp", "mlp_up", "norm", "other")

_QUERY = re.compile(r"(q|wq|query|q_(proj|lin|[ab]_proj))", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|densereludense|intermediate|expert|^output$|^fc_?\d+$|^lin\d$", re.IGNORECASE)


def bias_kinds_of(name: str, module: nn.Module) -> set[str]:
    """Returns the members of ``BIAS_KINDS`` that describe a module's bias.

    A module whose class name contains "norm" has the kinds "all" and "norm", whatever the module's name is. For a
    module whose class name does not contain "norm", the module's full name decides the kinds; "mlp_up" also requires
    more output features than input features.
    """
    parts = name.split(".")
    if "norm" in type(module).__name__.lower():
        return {"all", "norm"}
    if any(_ATTENTION.search(part) for part in parts):
        return {"all", "attention", "query"} if _QUERY.fullmatch(parts[-1]) else {"all", "attention"}
    if any(_MLP.search(part) for part in parts):
        # Conv1D calls its numbers of input and output features nx and nf.
        inner = getattr(module, "in_features", getattr(module, "nx", 0))
        widens = getattr(module, "out_features", getattr(module, "nf", 0)) > inner
        return {"all", "mlp", "mlp_up"} if widens else {"all", "mlp"}
    return {"all", "other"}


@dataclass
class BitFitConfig(TargetConfig):
    """BitFit: trains a bias ``b`` for each target module. ``b`` replaces the module's own parameter ``bias``.

    Args:
        bias_kinds: which biases of the targets are trained: one kind or a list of kinds, out of "all", "attention" (the
            attention's output layer included), "query" (a layer that computes only queries; the paper's b_q), "mlp",
            "mlp_up" (the feed-forward layer that widens; the paper's b_m2), "norm" and "other". The paper's smaller set
            of trained biases is ["query", "mlp_up"].
        add_bias: linear layers that get a bias of zeros if these layers have no bias, like Llama's layers. ``add_bias``
            is a list of names, a regular expression, or "all-linear" for all linear layers but the output head.
            ``add_bias`` may name quantized layers (NF4Linear, bitsandbytes' 4 and 8 bits). If a layer that ``add_bias``
            names already has a bias, that bias is trained, whether or not ``target_modules`` names the layer. The other
            fields that choose biases (``bias_kinds``, ``exclude_modules`` and so on) apply to the layers of
            ``add_bias`` too. Merging keeps the new biases in the model; to reload the merged model, its config may need
            a field such as ``attention_bias``.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: see
            :class:`~peft_ext.tuners.targets.TargetConfig`. By default every module with a parameter ``bias`` is a
            target. A classification head belongs in modules_to_save, where task_type="SEQ_CLS" puts the head.

    Raises: TypeError or ValueError if a field has a value of a wrong type, or a value that is not allowed.
    """

    bias_kinds: Union[list[str], str] = field(
        default="all", metadata={"help": f"Which biases of the targets: any of {', '.join(BIAS_KINDS)}."}
    )
    add_bias: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Linear layers that get a bias: names, a regular expression or 'all-linear'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type("BITFIT")
        self.add_bias = self._names("add_bias", self.add_bias)
        kinds = [self.bias_kinds] if isinstance(self.bias_kinds, str) else self.bias_kinds
        if not isinstance(kinds, (list, tuple)) or not kinds or not set(kinds) <= set(BIAS_KINDS):
            self._fail("bias_kinds", self.bias_kinds, f"one or a list of {BIAS_KINDS}")


class BitFitLayer(ReplacingLayer):
    """Runs ``base_layer`` with the active adapter's bias ``[N]`` in place of the layer's own bias.

    In an adapter's file the bias has the key ``bitfit_tensors.bias`` after the layer's name.
    """

    adapter_layer_names = ("bitfit_tensors",)

    def own(self, adapter: str, training: bool, x: Optional[Tensor] = None) -> dict[str, Tensor]:
        if not self.names[adapter]:  # the bias is shared, and another layer's adapter owns the bias
            return {}
        base, bias = self.base_layer, self.adapters[adapter].bias
        weight, replaced = base._parameters.get("weight"), base._parameters["bias"]
        dense = weight is not None and weight.dtype in FLOATS
        if replaced is not None or dense:
            bias = bias.to((weight if replaced is None else replaced).dtype)
        if not dense and x is not None:
            # bitsandbytes casts its layer's bias to the compute dtype in place. This code casts the bias to the compute
            # dtype first, so that bitsandbytes does not cast the adapter's own parameter.
            if not getattr(base, "compute_type_is_set", True):
                base.set_compute_type(x)
                base.compute_type_is_set = True
            bias = bias.to(getattr(base, "compute_dtype", None) or x.dtype)
        return {"bias": bias}


class BitFitModel(ReplacingTuner):
    """A model whose biases are trained, made by ``peft.get_peft_model``; see :class:`peft_ext.BitFitConfig`.

    A bias that several modules share, as in BERT's output head, is one trained tensor. If a module holds submodules
    with parameters, the module's own bias stays frozen, with a warning, unless a trained module shares that bias.

    Raises: ValueError if no bias is found, if ``add_bias`` names no linear layer among the targets, if a bias is a
    shard, if a target is transformers' FP8Linear over an FP8 weight, or if a shared bias belongs both to a target and
    to a module that is not a target.
    """

    prefix = "bitfit_"
    trains_biases = True
    tuner_layer_cls = BitFitLayer

    def make_plan(self, config: BitFitConfig, model: nn.Module) -> Plan:
        added = expand_all_linear(model, config.add_bias, config)
        kinds = {config.bias_kinds} if isinstance(config.bias_kinds, str) else set(config.bias_kinds)
        units: dict[str, list[str]] = {}
        holders: dict[str, nn.Parameter] = {}
        found_added = added is None
        for name, module in base_modules(model):
            bias = module._parameters.get("bias")
            gets_one = isinstance(module, nn.Linear) and matches(added, name)
            gets_one = gets_one and in_layers(config, name) and not excluded(config, name)
            found_added |= gets_one
            wanted = gets_one or (bias is not None and targeted(config, name))
            if not wanted or not kinds & bias_kinds_of(name, module):
                continue
            if not _bias_trains(module):
                raise ValueError(
                    f"BitFitConfig: {name} is a {type(module).__name__}, whose backward computes no gradient of the "
                    "bias; exclude the module, or load the model with peft_ext.PackedConfig()"
                )
            if any(True for child in module.children() for _ in child.parameters()):
                holders[name] = bias
            else:
                units[name] = ["bias"]
        if not found_added:
            raise ValueError(
                f"BitFitConfig: add_bias is {config.add_bias!r}, which is no linear layer among the targets"
            )
        if not units:
            raise ValueError(
                f"BitFitConfig: no bias of kind {' or '.join(sorted(kinds))} among the targets in "
                f"{type(model).__name__}; add_bias adds biases to linear layers"
            )
        modules = dict(base_modules(model))
        trained = {id(modules[name]._parameters["bias"]) for name in units}
        for name, bias in holders.items():
            if id(bias) not in trained:
                warnings.warn(
                    f"BitFit: {name}.bias stays frozen: modules with parameters of their own are below it", stacklevel=2
                )
        return plan(model, config, units, skip_tied={f"{name}.bias" for name in holders})

    def make(self, layer: BitFitLayer, key: str, names: list[str], config: BitFitConfig) -> nn.Module:
        base = layer.base_layer
        bias = base._parameters["bias"]
        if bias is None:
            held = next(itertools.chain(base.parameters(), base.buffers()))
            dtype = held.dtype if held.dtype in FLOATS else _quantized_from(base)
            bias = torch.zeros(base.out_features, dtype=dtype, device=held.device)
        return tree({name: nn.Parameter(bias.detach().clone()) for name in names})


def _bias_trains(base: nn.Module) -> bool:
    """Returns whether the backward of ``base`` computes the gradient of the bias. The backward of transformers'
    FP8Linear over an FP8 weight computes only the gradient of the layer's input."""
    library = sys.modules.get("transformers.integrations.finegrained_fp8")
    return not isinstance(base, getattr(library, "FP8Linear", ())) or base.weight.element_size() > 1


def _quantized_from(base: nn.Module) -> torch.dtype:
    """Returns a quantized layer's dtype before quantizing if known, else the compute dtype if known, else float32."""
    return getattr(base, "quant_dtype", None) or getattr(base, "compute_dtype", None) or torch.float32


register("bitfit", BitFitConfig, BitFitModel)
