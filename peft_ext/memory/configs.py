"""PEFT's configuration for a method by its name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Optional

__all__ = ["METHODS", "make_config", "method_config"]

METHODS = ("full", "bitfit", "bottleneck", "lora", "rslora", "dora", "adalora", "ia3", "prefix", "prompt")

# Heads that PEFT trains whole for these tasks, and would adapt as well where all layers are targets.
_HEADS = {"TOKEN_CLS", "QUESTION_ANS"}
_HEAD_NAMES = r"(.*\.)?(classifier|score|qa_outputs)"

_CONFIGS = {
    "bitfit": "peft_ext.tuners.BitFitConfig",
    "bottleneck": "peft_ext.tuners.BottleneckConfig",
    "lora": "peft.LoraConfig",
    "rslora": "peft.LoraConfig",
    "dora": "peft.LoraConfig",
    "adalora": "peft.AdaLoraConfig",
    "ia3": "peft.IA3Config",
    "prefix": "peft.PrefixTuningConfig",
    "prompt": "peft.PromptTuningConfig",
}


def method_config(method: str, task_type: Optional[str] = None) -> tuple[str, dict[str, Any]]:
    """Returns the full name of a configuration's class and its arguments, for one of the ``METHODS`` but "full"."""
    fields: dict[str, Any] = {"task_type": task_type}
    if method in ("lora", "rslora", "dora", "adalora"):
        fields["target_modules"] = "all-linear"
    if method in ("lora", "rslora", "dora", "adalora", "bitfit") and task_type in _HEADS:
        fields["exclude_modules"] = _HEAD_NAMES
    if method in ("lora", "rslora", "dora"):
        fields |= {"r": 16, "lora_alpha": 32}
    if method in ("rslora", "dora"):
        fields[f"use_{method}"] = True
    if method == "adalora":
        fields |= {"init_r": 12, "target_r": 8, "total_step": 1000}
    if method in ("prefix", "prompt"):
        fields["num_virtual_tokens"] = 20
    return _CONFIGS[method], fields


def make_config(path: str, fields: Mapping[str, Any]) -> Any:
    """Returns the object that :func:`method_config` describes."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(**fields)
