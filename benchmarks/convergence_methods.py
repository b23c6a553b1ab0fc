"""Lists the methods whose loss curves benchmarks/convergence.py compares, and makes the models of a method's runs."""

from __future__ import annotations

import copy
import pkgutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

MakeBase = Callable[[], nn.Module]


@dataclass(frozen=True)
class Method:
    """The settings of a method's run, and how the method's twin computes. The twin is a second run, without peft_ext's
    kernels, whose losses are compared with those of the accelerated run.

    Attributes:
        config: a function that takes the number of steps of the run and the number of layers of the model, and returns
            the configuration of the adapter, of a class of PEFT or of peft_ext.
        twin: how the twin computes: "PEFT" by PEFT's own layers; "reference" by PyTorch's operators; "parameters"
            without an adapter, by training the model's own parameters, which is an equal function only in float32. ""
            if the method has no twin.
        prune_at: fraction of the run's steps after which Diff Pruning keeps only the fraction ``keep`` of its entries;
            None for every other method.
    """

    config: Callable[[int, int], Any]
    lr: float
    twin: str
    quantized: bool = False
    dropout: float = 0.0
    prune_at: Optional[float] = None
    keep: float = 0.05

    def has_twin(self, dtype: str) -> bool:
        return bool(self.twin) and (self.twin != "parameters" or dtype == "float32")


def _config(name: str, **fields: Any) -> Callable[[int, int], Any]:
    """Returns a function that makes a configuration of the class ``name``, such as "peft:LoraConfig". The value of a
    field may be a function of the numbers of steps and of layers."""

    def config(steps: int, layers: int) -> Any:
        given = {key: value(steps, layers) if callable(value) else value for key, value in fields.items()}
        return pkgutil.resolve_name(name)(task_type="CAUSAL_LM", **given)

    return config


_lora = partial(_config, "peft:LoraConfig", r=16, lora_alpha=32, target_modules="all-linear")
_IA3 = _config("peft:IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
_ADALORA = _config(
    "peft:AdaLoraConfig", init_r=12, target_r=8, lora_alpha=32, target_modules="all-linear", deltaT=1,
    tinit=lambda steps, layers: max(1, steps // 10), tfinal=lambda steps, layers: max(1, steps // 3),
    total_step=lambda steps, layers: steps,
)  # fmt: skip
_DIFF_PRUNING = _config(
    "peft_ext.tuners:DiffPruningConfig", layers_to_transform=lambda steps, layers: [layers - 2, layers - 1]
)
_PARTIAL = _config("peft_ext.tuners:PartialConfig", num_last_layers=2)

METHODS = {
    "LoRA": Method(_lora(), 5e-4, "PEFT"),
    "LoRA, dropout 0.1": Method(_lora(lora_dropout=0.1), 5e-4, "PEFT", dropout=0.1),
    "QLoRA": Method(_lora(), 5e-4, "PEFT", quantized=True),
    "DoRA": Method(_lora(use_dora=True), 5e-4, "PEFT"),
    "AdaLoRA": Method(_ADALORA, 2e-3, "PEFT"),
    "IA3": Method(_IA3, 8e-3, "PEFT"),
    "bottleneck": Method(_config("peft_ext.tuners:BottleneckConfig"), 1e-3, "reference"),
    "prefix": Method(_config("peft:PrefixTuningConfig", num_virtual_tokens=20), 1e-2, "PEFT"),
    "prompt": Method(_config("peft:PromptTuningConfig", num_virtual_tokens=20), 3e-2, "PEFT"),
    "BitFit": Method(_config("peft_ext.tuners:BitFitConfig", add_bias="all-linear"), 3e-3, "parameters"),
    "Diff Pruning": Method(_DIFF_PRUNING, 2e-3, "", prune_at=0.5),
    "partial": Method(_PARTIAL, 2e-4, "parameters"),
}
# FLOAT32 lists the methods that also run in float32. FLOAT32 leaves out LoRA with dropout, whose masks differ from the
# twin's masks, prefix and prompt tuning, which have no layer that peft_ext fuses, and Diff Pruning, which has no twin.
FLOAT32 = ("LoRA", "QLoRA", "DoRA", "AdaLoRA", "IA3", "bottleneck", "BitFit", "partial")
TWINS = {"PEFT": "PEFT", "reference": "PyTorch", "parameters": "the model's own parameters", "": "–"}


def build(method: Method, make_base: MakeBase, steps: int, dtype: str) -> tuple[nn.Module, Optional[nn.Module]]:
    """Returns the accelerated model and its twin: a model with equal weights and without peft_ext's kernels, or None if
    the method has no twin in ``dtype``."""
    import peft_ext
    from peft_ext.nn import BottleneckAdapter

    model = quantized_base(method, make_base, "bfloat16")
    torch.manual_seed(0)
    layers = model.config.num_hidden_layers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_ext.get_peft_model(model, method.config(steps, layers), accelerate=False)
    for key, parameter in model.named_parameters():
        if ".ranknum." in key:  # over a 16-bit base, PEFT would train AdaLoRA's ranknum, but not save it
            parameter.requires_grad_(False)
    if dtype == "float32":
        model = model.float()
    twin = None
    if method.has_twin(dtype):
        twin = _parameters(method, make_base) if method.twin == "parameters" else copy.deepcopy(model)
        if method.twin == "reference":
            for module in twin.modules():
                if isinstance(module, BottleneckAdapter):
                    module.__class__ = _reference_adapter()
    return peft_ext.accelerate(model), twin


def quantized_base(method: Method, make_base: MakeBase, dtype: str) -> nn.Module:
    import peft_ext

    model = make_base()
    if model.dtype is not torch.bfloat16:
        raise ValueError(f"compare: make_base gives {model.dtype}, wanted a model of torch.bfloat16")
    if method.quantized:
        peft_ext.quantize_nf4(model, progress=False)
    return model.float() if dtype == "float32" else model


def _reference_adapter() -> type[nn.Module]:
    from peft_ext import reference
    from peft_ext.nn import BottleneckAdapter

    class ReferenceAdapter(BottleneckAdapter):
        def forward(self, x: Tensor, residual: Optional[Tensor] = None) -> Tensor:
            return reference.bottleneck_adapter(
                x, self.down.weight, self.down.bias, self.up.weight, self.up.bias,
                scale=self.scale, activation=self.activation, residual=residual,
            )  # fmt: skip

    return ReferenceAdapter


def _parameters(method: Method, make_base: MakeBase) -> nn.Module:
    """Returns a float32 base in which only the parameters that BitFit or partial fine-tuning trains require gradients.

    For BitFit each linear layer except the head gets a bias of zeros.
    """
    model = make_base().float().requires_grad_(False)
    if method.config is _PARTIAL:
        for layer in model.base_model.layers[-2:]:
            layer.requires_grad_()
        return model
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.bias = nn.Parameter(torch.zeros(module.out_features))
    return model
