"""Prepares a model for the trace of :func:`peft_ext.estimate_memory`: adds an adapter on the meta device, turns on
gradient checkpointing, and fuses layers or restores the stock layers."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Optional

import torch
from torch import nn

from ..integrations import peft as integration
from ..integrations.adapter_layers.base import STOCK
from ..methods import METHODS, make_config, method_config
from ..nn import NF4Experts, NF4Linear, PackedExperts
from ..nn.packed import HoldsPacked
from ..sources.model import task_of, text_targets
from .stand_ins import Dequantized


def adapt_on_meta(
    model: nn.Module, config: Any, method: Optional[str], task_type: Optional[str], wants_checkpointing: bool
) -> nn.Module:
    """Returns the model with the adapter of ``config``, or of the method's own configuration, on the meta device.

    Without a config, method "full" makes all parameters trainable, and method None changes nothing.
    """
    if config is None and method in (None, "full"):
        return model.requires_grad_(True) if method else model
    import peft

    from ..model import freeze_ranknum, register_layers

    if isinstance(model, peft.PeftModel):
        raise ValueError("estimate_memory: model is a PeftModel already, wanted no config and no method beside it")
    if config is None:
        path, fields = method_config(method, task_type or task_of(model))
        config = make_config(path, fields | text_targets(model, method, fields.get("exclude_modules")))
    if not isinstance(config, peft.PeftConfig):
        raise TypeError(f"estimate_memory: config is {type(config).__name__}, wanted a PEFT configuration or one of "
                        f"{('full', *METHODS)}")  # fmt: skip
    if wants_checkpointing and config.peft_type == peft.PeftType.PREFIX_TUNING:
        raise ValueError("estimate_memory: gradient_checkpointing is True, but prefix tuning does not work with it")
    config = copy.deepcopy(config)
    config.inference_mode = False
    if isinstance(getattr(config, "init_lora_weights", None), str):
        # PEFT's default initialization gives tensors of the same shapes as any other initialization
        config.init_lora_weights = True
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = peft.PromptTuningInit.RANDOM
    register_layers(config, model)
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, config)
    freeze_ranknum(adapted)
    return adapted


def put_on_ops(model: nn.Module, accelerated: bool) -> None:
    """Accelerates the model if ``accelerated``; else restores PEFT's and transformers' own layers.

    A model that has a fused adapter layer already stays as it is if ``accelerated``.
    """
    if not accelerated:
        integration.restore(model)
    # A second call of peft_ext.accelerate would reset the dora_dropout of fused layers.
    elif not any(type(module) in STOCK for module in model.modules()):
        with warnings.catch_warnings():  # hides the warning of peft_ext.accelerate about a model without adapters
            warnings.filterwarnings("ignore", "accelerate: .* has no adapter layer")
            integration.accelerate(model)


def set_checkpointing(model: nn.Module, wanted: bool) -> None:
    """Turns gradient checkpointing on if ``wanted`` or if the model has checkpointing on already.

    Checkpointed layers do not save the state of the random generator, because a trace draws no random numbers. Raises
    ValueError if the model has no method that turns checkpointing on.
    """
    if not wanted and not is_checkpointing(model):
        return
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    for what in ("activation", "gradient"):  # old versions of transformers have only gradient_checkpointing_enable
        enable = getattr(model, f"{what}_checkpointing_enable", None)
        if enable is not None:
            enable(**{f"{what}_checkpointing_kwargs": kwargs})
            return
    raise ValueError(f"estimate_memory: gradient_checkpointing is True, but {type(model).__name__} has no "
                     "gradient_checkpointing_enable")  # fmt: skip


def is_checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def name_of(model: nn.Module, method: Optional[str]) -> str:
    held = getattr(model, "peft_config", None)
    if not isinstance(held, dict):
        return method or "as it is"
    config = held[model.active_adapter]
    name = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "use_dora", False):
        name = "DORA"
    rank = getattr(config, "init_r", None) or getattr(config, "r", None)
    return f"{name} r={rank}" if isinstance(rank, int) else name


def quantization_of(model: nn.Module) -> Optional[str]:
    """Returns the name of the quantization of the model's weights, or several names joined by "+"; None for dense
    weights."""
    names = {name: None for module in model.modules() for name in _formats(module)}
    return "+".join(names) or None


def _formats(module: nn.Module) -> list[str]:
    if isinstance(module, HoldsPacked):
        return [module.packed.format.name]
    if isinstance(module, PackedExperts):
        return [module.frozen(name).format.name for name in module.frozen_shapes()]
    if isinstance(module, (NF4Linear, NF4Experts, Dequantized)):
        return ["int8" if "CB" in module._buffers else "nf4"]
    return []
