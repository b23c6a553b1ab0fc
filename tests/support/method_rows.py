"""The rows of docs/methods.md: the configuration, the base model, and the module of peft_ext.nn of each method."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional

import torch
import transformers as hf
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from tiny_models import ARCHITECTURES, HIDDEN
from torch import Tensor, nn

from peft_ext import BitFitConfig, BottleneckConfig, DiffPruningConfig, PartialConfig, reference
from peft_ext.integrations.trainer import AdaLoraCallback, DiffPruningCallback
from peft_ext.nn import (
    AdaLoRALinear,
    BottleneckAdapter,
    DoRALinear,
    IA3Linear,
    LoRALinear,
    NF4Linear,
    PrefixEncoder,
    PromptEmbedding,
)

LLAMA = ARCHITECTURES["Llama"]
BATCH = LLAMA.batch()
INPUTS = LLAMA.inputs()  # The inputs have no labels: PEFT's loss raises for an AdaLoRA loaded for inference.
STEPS = 4  # Number of optimizer steps of a run with Trainer.


@dataclass(frozen=True)
class Alone:
    """A module of peft_ext.nn with values as after some training, its inputs, a call, and the oracle of its result.

    ``oracle`` gets float64 copies of the module and of the inputs, and calls no operator of peft_ext.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    oracle: Callable[..., Tensor]
    call: Callable[..., Tensor] = lambda module, *inputs: module(*inputs)


@dataclass(frozen=True)
class Method:
    """A row of docs/methods.md: a configuration for a Llama, the kind of base, and modules of peft_ext.nn, if any."""

    config: Callable[[], PeftConfig]
    alone: tuple[Callable[[], Alone], ...] = ()
    base: str = "dense"
    callback: Callable[[], hf.TrainerCallback] = hf.TrainerCallback

    @property
    def in_peft(self) -> bool:
        """Whether PEFT itself has the method."""
        return type(self.config()).__module__.partition(".")[0] == "peft"


def _linear(nf4: bool) -> nn.Linear:
    linear = nn.Linear(HIDDEN, 2 * HIDDEN)
    return NF4Linear.from_linear(linear, double_quant=True) if nf4 else linear


def _weight(module: nn.Module) -> Tensor:
    """Returns the frozen weight of a module's base layer. An NF4 weight is dequantized to float64."""
    base = module.base_layer
    return base.nf4.dequantize(torch.float32).double() if isinstance(base, NF4Linear) else base.weight


def moved_away(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return module


def _tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, HIDDEN)


def _linear_alone(kind: type[nn.Module], oracle: Callable[..., Tensor], nf4: bool = False, **arguments: Any) -> Alone:
    return Alone(moved_away(kind.from_linear(_linear(nf4), **arguments)), (_tokens(21),), oracle)


def _lora(nf4: bool = False, **arguments: Any) -> Alone:
    def oracle(m: Any, x: Tensor) -> Tensor:
        return reference.lora_linear(x, _weight(m), m.lora_A, m.lora_B, m.base_layer.bias, scaling=m.scaling)

    return _linear_alone(LoRALinear, oracle, nf4, r=4, **arguments)


def _dora() -> Alone:
    def oracle(m: Any, x: Tensor) -> Tensor:
        return reference.dora_linear(
            x, _weight(m), m.lora_A, m.lora_B, m.lora_magnitude_vector, m.base_layer.bias, scaling=m.scaling
        )

    return _linear_alone(DoRALinear, oracle, r=4)


def _adalora() -> Alone:
    def oracle(m: Any, x: Tensor) -> Tensor:
        delta = m.lora_B @ torch.diag(m.lora_E[:, 0] / (m.ranknum + 1e-5)) @ m.lora_A
        return nn.functional.linear(x, _weight(m) + m.scaling * delta, m.base_layer.bias)

    return _linear_alone(AdaLoRALinear, oracle, r=4)


def _ia3(feedforward: bool) -> Alone:
    def oracle(m: Any, x: Tensor) -> Tensor:
        return reference.ia3_linear(x, _weight(m), m.ia3_l, m.base_layer.bias, feedforward=feedforward)

    return _linear_alone(IA3Linear, oracle, feedforward=feedforward)


def _bottleneck(parallel: bool) -> Alone:
    def oracle(m: Any, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
        return (x if residual is None else residual) + m.scale * m.up(nn.functional.gelu(m.down(x)))

    inputs = (_tokens(21), _tokens(21)) if parallel else (_tokens(21),)
    return Alone(moved_away(BottleneckAdapter(HIDDEN, scale=2.0)), inputs, oracle)


def _prompt() -> Alone:
    def oracle(m: Any, x: Tensor) -> Tensor:
        return torch.stack([torch.cat((m.embedding.weight, row)) for row in x])

    return Alone(moved_away(PromptEmbedding(4, HIDDEN)), (_tokens(3, 5),), oracle)


def _prefix() -> Alone:
    """Returns the Alone of a PrefixEncoder in a Llama. The Llama's logits are wrong if keys or values are in wrong
    places."""
    model = LLAMA.build().requires_grad_(False)
    ids, size = BATCH["input_ids"], len(BATCH["input_ids"])

    def call(m: PrefixEncoder) -> Tensor:
        return model(ids, past_key_values=m.past_key_values(size, model.config)).logits

    def oracle(m: Any) -> Tensor:
        # A row of the embedding holds the layers one after the other. A layer's part of the row has the keys, then the
        # values, each ordered by head.
        heads, width = m.num_kv_heads, m.head_dim
        pieces = m.embedding.weight.split(width, dim=1)
        halves = [torch.stack(pieces[i : i + heads]).expand(size, -1, -1, -1) for i in range(0, len(pieces), heads)]
        cache = hf.DynamicCache(list(zip(halves[::2], halves[1::2], strict=True)))
        return copy.deepcopy(model).double()(ids, past_key_values=cache).logits

    return Alone(moved_away(PrefixEncoder.from_config(model.config, 4)), (), oracle, call)


_CAUSAL = {"task_type": "CAUSAL_LM"}
_ALL_LINEAR = {**_CAUSAL, "target_modules": "all-linear"}
_SCHEDULE = {"init_r": 4, "target_r": 2, "total_step": STEPS, "tinit": 1, "tfinal": 1, "deltaT": 1}
_VIRTUAL = {**_CAUSAL, "num_virtual_tokens": 4}

METHODS = {
    "LoRA": Method(lambda: LoraConfig(r=4, **_ALL_LINEAR), (_lora,)),
    "rsLoRA": Method(
        lambda: LoraConfig(r=4, use_rslora=True, **_ALL_LINEAR), (functools.partial(_lora, use_rslora=True),)
    ),
    "QLoRA": Method(lambda: LoraConfig(r=4, **_ALL_LINEAR), (functools.partial(_lora, nf4=True),), base="nf4"),
    "DoRA": Method(lambda: LoraConfig(r=4, use_dora=True, **_ALL_LINEAR), (_dora,)),
    "AdaLoRA": Method(lambda: AdaLoraConfig(**_SCHEDULE, **_ALL_LINEAR), (_adalora,), callback=AdaLoraCallback),
    "IA3": Method(lambda: IA3Config(**_CAUSAL), (functools.partial(_ia3, False), functools.partial(_ia3, True))),
    "bottleneck, Houlsby": Method(lambda: BottleneckConfig(**_CAUSAL), (functools.partial(_bottleneck, False),)),
    "bottleneck, Pfeiffer": Method(
        lambda: BottleneckConfig(placement="pfeiffer", **_CAUSAL), (functools.partial(_bottleneck, False),)
    ),
    "bottleneck, parallel": Method(
        lambda: BottleneckConfig(placement="parallel", **_CAUSAL), (functools.partial(_bottleneck, True),)
    ),
    "prefix tuning": Method(lambda: PrefixTuningConfig(**_VIRTUAL), (_prefix,)),
    "prompt tuning": Method(lambda: PromptTuningConfig(**_VIRTUAL), (_prompt,)),
    "BitFit": Method(lambda: BitFitConfig(add_bias="all-linear", **_CAUSAL)),
    "Diff Pruning": Method(
        lambda: DiffPruningConfig(target_modules=["mlp"], **_CAUSAL),
        callback=functools.partial(DiffPruningCallback, target=0.02),
    ),
    "partial fine-tuning": Method(lambda: PartialConfig(num_last_layers=1, **_CAUSAL)),
}
