"""Tells which methods of PEFT compute with the codes of a packed layer as if the codes were the values of the weight.

The codes are the ``weight`` of an NF4Linear, a PackedLinear or a PackedEmbedding. The layers of a method give right
results over a packed layer if they call the base layer and do not read the weight, or if peft_ext fuses them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..._imports import optional
from ...nn import NF4Linear
from ...nn.packed import HoldsPacked

BaseTunerLayer = None
with optional("peft", "adapters that read the weight of a packed layer are not found"):
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["adapters_that_read_codes", "code_reader"]

# Methods whose layers in PEFT 0.21 read nothing of the base layer but its result, its sizes and its device, and the
# methods of peft_ext, which check packed layers themselves. A method that is neither listed here nor in `code_reader`
# counts as one that reads the codes.
_CALLS_BASE = frozenset(
    "ADALORA BEFT BOFT C3A FOURIERFT GRALORA IA3 LILY OFT POLY PVERA RANDLORA ROAD VBLORA VERA WAVEFT "
    "BITFIT BOTTLENECK DIFF_PRUNING PARTIAL".split()
)

# Values of LoRA's `init_lora_weights`, in lower case, with which PEFT reads neither the base weight nor its dtype.
_LORA_INITS = ("true", "false", "none", "gaussian", "eva")


def code_reader(config: Any, layer: nn.Module, made: bool = False) -> str:
    """Returns the name of the method of ``config`` if PEFT's code for the method reads the weight of the packed layer
    ``layer``, with the field that makes the method read the weight; otherwise "".

    ``made``: whether the adapter exists already, so that its initial values do not count.
    """
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method in _CALLS_BASE:
        return ""
    if method == "LORA":
        if getattr(config, "kasa_config", None):
            return "LORA with kasa_config"
        init = getattr(config, "init_lora_weights", True)
        if not made and getattr(config, "use_bdlora", None):
            return "LORA with use_bdlora"
        return "" if made or str(init).lower() in _LORA_INITS else f"LORA with init_lora_weights {init!r}"
    if method == "MISS":
        return "MISS with init_weights 'bat'" if config.init_weights == "bat" else ""
    codes = layer.weight
    if method in ("LOHA", "LOKR"):  # LoHa and LoKr read the shape of the weight
        shape = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
        return "" if tuple(codes.shape) == shape else method
    if method == "ADAPTION_PROMPT":  # the method reads the weight's dtype: int8 and uint8 count as quantized
        return "" if codes.dtype in (torch.int8, torch.uint8) else method
    return method


def adapters_that_read_codes(model: nn.Module) -> dict[int, str]:
    """Returns a dict that maps ``id(layer)`` of each adapter layer of ``model`` over a packed layer, if an active
    adapter reads the codes of the packed layer, to the name of this adapter's method."""
    configs = next(filter(None, (module.__dict__.get("peft_config") for module in model.modules())), None)
    found: dict[int, str] = {}
    for module in model.modules() if isinstance(configs, dict) and BaseTunerLayer is not None else ():
        if not isinstance(module, BaseTunerLayer) or not isinstance(
            base := module.get_base_layer(), (HoldsPacked, NF4Linear)
        ):
            continue
        held = [getattr(module, name, ()) for name in module.adapter_layer_names]
        for name in module.active_adapters:
            if name in configs and any(name in one for one in held):
                if method := code_reader(configs[name], base, made=True):
                    found[id(module)] = method
    return found
