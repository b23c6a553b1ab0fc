"""The methods of parameter-efficient fine-tuning, in one table that everything else reads.

``peft-ext finetune``, ``explain`` and ``recommend``, :func:`peft_ext.estimate_memory` and the documents take their
methods from :data:`METHODS`. A configuration's class stands here by its full name, so that importing this module needs
neither PEFT nor torch; :func:`make_config` imports it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

__all__ = ["KINDS", "METHODS", "Method", "method_config", "make_config"]

# What a method does to a model.
KINDS = {
    "low-rank": "adds a product of two thin matrices to a frozen weight",
    "vector": "multiplies the outputs of a layer",
    "bottleneck": "adds a small network behind a sublayer",
    "prompt": "adds virtual tokens, and changes no layer",
    "selective": "trains parameters of the model itself",
}

# Heads that PEFT trains whole for these tasks, and would adapt as well where all layers are targets.
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HEADS = r"(.*\.)?(pre_classifier|classifier|score|qa_outputs)"


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title, quantized_title: what people call it, over dense weights and over NF4.
        kind: one of :data:`KINDS`.
        config_class: the full name of its configuration's class.
        learning_rate: of a run where none is given. Few parameters want a larger one.
        page: of docs/methods, where its formula stands.
        fields: the configuration's fields, beside ``task_type``, where nothing else is asked for.
        quant: of a run's frozen base where none is given: "nf4" or "none".
        can_quantize: whether it can train over NF4 layers that are its targets.
        can_merge: whether it can be merged into the base.
        can_resume: whether a run can go on from a checkpoint of it.
        can_checkpoint: whether it works with gradient checkpointing.
    """

    title: str
    quantized_title: str
    kind: str
    config_class: str
    learning_rate: float
    page: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    quant: str = "nf4"
    can_merge: bool = True
    can_resume: bool = True
    can_checkpoint: bool = True

    @property
    def can_quantize(self) -> bool:
        return self.quant == "nf4"


_LORA = {"target_modules": "all-linear", "r": 16, "lora_alpha": 32}
_TOKENS = {"num_virtual_tokens": 20}

METHODS: dict[str, Method] = {
    "lora": Method("LoRA", "QLoRA", "low-rank", "peft.LoraConfig", 2e-4, "lora", _LORA),
    "rslora": Method("rsLoRA", "QLoRA with rsLoRA's scale", "low-rank", "peft.LoraConfig", 2e-4, "lora",
                     {**_LORA, "use_rslora": True}),
    "qlora": Method("QLoRA", "QLoRA", "low-rank", "peft.LoraConfig", 2e-4, "lora", _LORA),
    "dora": Method("DoRA", "QDoRA", "low-rank", "peft.LoraConfig", 2e-4, "dora", {**_LORA, "use_dora": True}),
    # PEFT saves the ranks that are left in tensors of other shapes than a new adapter's.
    "adalora": Method("AdaLoRA", "AdaLoRA over NF4", "low-rank", "peft.AdaLoraConfig", 1e-3, "adalora",
                      {"target_modules": "all-linear", "init_r": 12, "target_r": 8, "total_step": 1000},
                      can_resume=False),
    "ia3": Method("IA3", "IA3 over NF4", "vector", "peft.IA3Config", 8e-3, "ia3"),
    "bottleneck": Method("bottleneck adapters", "bottleneck adapters over NF4", "bottleneck",
                         "peft_ext.tuners.BottleneckConfig", 1e-3, "bottleneck", can_merge=False),
    # Prefixes go through the cache, which checkpointing turns off.
    "prefix": Method("prefix tuning", "prefix tuning over NF4", "prompt", "peft.PrefixTuningConfig", 1e-2,
                     "prefix-and-prompt", _TOKENS, can_merge=False, can_checkpoint=False),
    "prompt": Method("prompt tuning", "prompt tuning over NF4", "prompt", "peft.PromptTuningConfig", 3e-2,
                     "prefix-and-prompt", _TOKENS, can_merge=False),
    "bitfit": Method("BitFit", "BitFit over NF4", "selective", "peft_ext.tuners.BitFitConfig", 1e-3, "bitfit"),
    "diff-pruning": Method("Diff Pruning", "Diff Pruning", "selective", "peft_ext.tuners.DiffPruningConfig", 2e-4,
                           "diff-pruning", {"target_modules": "all-linear"}, quant="none"),
    "partial": Method("partial fine-tuning", "partial fine-tuning", "selective", "peft_ext.tuners.PartialConfig", 5e-5,
                      "partial", {"num_last_layers": 2}, quant="none"),
}  # fmt: skip


def method_config(method: str, task_type: Optional[str] = None) -> tuple[str, dict[str, Any]]:
    """Returns the full name of a method's configuration and its fields, where nothing else is asked for.

    For a task whose head PEFT trains whole, the head is left out of what the method adapts.
    """
    entry = METHODS[method]
    fields: dict[str, Any] = {"task_type": task_type, **entry.fields}
    if task_type in _HEAD_TASKS and (entry.kind == "low-rank" or method == "bitfit"):
        fields["exclude_modules"] = _HEADS
    return entry.config_class, fields


def make_config(config_class: str, fields: Mapping[str, Any]) -> Any:
    """Returns an object of the class of that full name, made with ``fields``."""
    module, _, name = config_class.rpartition(".")
    return getattr(importlib.import_module(module), name)(**fields)
