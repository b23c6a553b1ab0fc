"""The table of the methods of parameter-efficient fine-tuning.

The commands ``peft-ext finetune``, ``explain`` and ``recommend``, :func:`peft_ext.estimate_memory` and the documents
read the methods from :data:`METHODS`. The table has the full name of a configuration's class, so that importing this
module does not import PEFT; :func:`make_config` imports the class.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

__all__ = ["KINDS", "METHODS", "Method", "method_config", "make_config"]

# The kinds of methods, and what each kind does to a model.
KINDS = {
    "low-rank": "adds a product of two thin matrices to a frozen weight",
    "vector": "multiplies the outputs of a layer",
    "bottleneck": "adds a small network behind a sublayer",
    "prompt": "adds virtual tokens, and changes no layer",
    "selective": "trains parameters of the model itself",
}

# Tasks for which PEFT trains all weights of the head, and a regular expression for the names of these heads. With
# "all-linear" PEFT would also put an adapter on the heads that _HEADS matches, so method_config excludes these heads.
_HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
_HEADS = r"(.*\.)?(pre_classifier|classifier|score|qa_outputs)"


@dataclass(frozen=True)
class Method:
    """Entry of one method in the table :data:`METHODS`.

    Attributes:
        title, quantized_title: the method's usual name over dense weights, and over NF4.
        kind: the kind of the method, a key of :data:`KINDS`.
        config_class: full name of the class of the method's configuration.
        learning_rate: default learning rate of a run. Methods that train fewer parameters than LoRA, such as IA3 and
            prompt tuning, have larger default rates than LoRA.
        page: name of the page in docs/methods that has the method's formula.
        fields: values that peft_ext sets for fields of the configuration, besides ``task_type``.
        quant: default quantization of a run's frozen base: "nf4" or "none".
        can_quantize: whether the method's target layers may be NF4.
        can_merge: whether the adapter can be merged into the base.
        can_resume: whether a run can resume from a checkpoint.
        can_checkpoint: whether the method works with gradient checkpointing.
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
    # AdaLoRA can't resume: PEFT saves the pruned tensors, whose shapes differ from the shapes of a new adapter.
    "adalora": Method("AdaLoRA", "AdaLoRA over NF4", "low-rank", "peft.AdaLoraConfig", 1e-3, "adalora",
                      {"target_modules": "all-linear", "init_r": 12, "target_r": 8, "total_step": 1000},
                      can_resume=False),
    "ia3": Method("IA3", "IA3 over NF4", "vector", "peft.IA3Config", 8e-3, "ia3"),
    "bottleneck": Method("bottleneck adapters", "bottleneck adapters over NF4", "bottleneck",
                         "peft_ext.tuners.BottleneckConfig", 1e-3, "bottleneck", can_merge=False),
    # Prefix tuning's virtual tokens are entries of the key-value cache, which gradient checkpointing turns off.
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
    """Returns the full name of the class of a method's configuration, and the values that peft_ext sets for its fields.

    For a task for which PEFT trains all weights of the head, the fields of a low-rank method and of BitFit exclude the
    head from the adapted layers.
    """
    entry = METHODS[method]
    fields: dict[str, Any] = {"task_type": task_type, **entry.fields}
    if task_type in _HEAD_TASKS and (entry.kind == "low-rank" or method == "bitfit"):
        fields["exclude_modules"] = _HEADS
    return entry.config_class, fields


def make_config(config_class: str, fields: Mapping[str, Any]) -> Any:
    """Imports the configuration class with the full name ``config_class``, and returns a configuration with the values
    ``fields``."""
    module, _, name = config_class.rpartition(".")
    return getattr(importlib.import_module(module), name)(**fields)
