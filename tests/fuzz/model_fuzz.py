"""The model fuzzer: random models, adapters and lives of both; accelerated they do what PEFT alone does.

A case is its seed. Drawn from it: an architecture of ``tiny_models`` and its sizes, the base layers (dense, NF4,
bitsandbytes'; float32, bfloat16, float16), a PEFT configuration, and a life: training steps, evaluations, generation;
adapters added, weighted, toggled, disabled, merged, deleted, saved and loaded; hooks, layers whose output is changed in
place, checkpointing, autocast, a base that trains, copies, pickles, restore. One model lives it under PEFT alone, an
accelerated one beside it, from the same weights and seeds. A failure prints the one line that repeats it.

    python tests/fuzz/model_fuzz.py --cases 300                 from seed 0
    python tests/fuzz/model_fuzz.py --minutes 60 [--seed N]     from a seed of the clock; what `make model-fuzz` does
    python tests/fuzz/model_fuzz.py --case 17                   one case, told step by step

What is compared: outputs, the loss and every gradient; parameters and buffers, bit for bit, after each step that
changes them; files, byte for byte; errors. What PEFT refuses has to be refused in the same words, and nothing else.

Cases run in a process of their own, which is ended where one takes longer than ``LIMIT``: a hang is a failure too.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import functools
import json
import math
import os
import pickle
import random
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import bitsandbytes as bnb
import peft
import torch
import transformers
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners import adalora, ia3
from peft_models import PhiloxDropout, quantize, spread, tuners
from tiny_models import FAMILIES, Sizes, architecture
from torch import Tensor, nn

import peft_ext
from peft_ext.nn import NF4Linear
from peft_ext.quantize import HEADS

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()

LIMIT = 60.0  # seconds of a case, which takes some 0.3: more than the slowest machine's import of an architecture
WARM_UP = -1  # a case before the first, for what is imported as it is needed
METHODS = {"LoRA": 5, "DoRA": 3, "AdaLoRA": 1, "IA3": 2}
BASES = {
    "float32": 8, "bfloat16": 3, "float16": 1, "nf4": 3, "nf4 bfloat16": 1, "bnb": 2, "bnb nested": 1,
    "bnb bfloat16": 1,
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# --- how far apart ----------------------------------------------------------------------------------------------------

# float32. Sums of at most some 200 terms in another order, through two layers and back; most are 1e-7 to 1e-6 of a
# tensor's norm.
TIGHT = 2e-5
NO_FLOAT64 = ("XGLM",)  # whose mask raises there
# What is further apart is judged by float64: a gradient that is zero but for rounding (a key's bias, which the softmax
# does not see) has no digits, and neither has PEFT's. Our error may be so many times PEFT's, beside this share of
# the tensor and that of the largest gradient there is.
AGAINST_FLOAT64, OF_TENSOR, OF_LARGEST = 4.0, 2e-5, 1e-6

# 16 bits, against the same model in float32, by PEFT's error there. Two roundings of one model are two draws, whose
# quotient spreads with how few numbers they go through: the gradients of a query and a key, all through the softmax of
# a few keys, are each 0.1 to 6 times as far off as PEFT's over other weights, the logits 0.7 to 1.2 times. So these
# cases have some tokens, and PEFT's error counts for no less than the median of it over the call's tensors. Of some
# 5,000 tensors of more than FEW elements ours was at most 1.9 times that. A tensor of few elements is no statistic: a
# router's bias over two experts is one number, and the quotient of two draws exceeds 10 in 6 of 100. Together, each by
# its norm, the tensors of a call were 0.6 to 1.7 times as far off in 98 of 100, and 2.5 at most. Over all calls of a
# run the factors lie evenly about 1, with a deviation of 0.3 in the logarithm: from MANY on, a mean that is off by a
# tenth is no chance. A term that is left out, or of the wrong sign, is 1 where PEFT's errors are 0.01.
ROUNDED_EACH, ROUNDED_FEW, ROUNDED_ALL, ROUNDED_MEAN = 8.0, 20.0, 3.0, 1.1
FEW, MANY = 16, 200
ROUNDED_FLOOR = 2.0  # epsilons of the dtype, of a tensor's norm and of a hundredth of the largest gradient's


class Failed(AssertionError):
    """What the accelerated model does otherwise than PEFT."""


Parts = dict[str, Optional[Tensor]]


def distance(found: Tensor, wanted: Tensor) -> float:
    return (found.double() - wanted.double()).norm().item()


# --- models -----------------------------------------------------------------------------------------------------------


def widened(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on PEFT's own path over the same weights, dequantized, in ``dtype``: the truth for narrower ones."""
    model.zero_grad()
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, base in list(parent.named_children()):
            if isinstance(base, NF4Linear):
                weight = base.dequantize()
            elif isinstance(base, bnb.nn.Linear4bit):
                state = getattr(base.weight, "quant_state", None) or base.quant_state  # a pickle keeps the second
                weight = peft_ext.NF4Weight.from_bitsandbytes(base.weight, state).dequantize(base.compute_dtype)
            else:
                continue
            dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta").train(base.training)
            dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
            dense.bias = base.bias
            dense._forward_hooks, dense._forward_pre_hooks = base._forward_hooks, base._forward_pre_hooks
            setattr(parent, name, dense)
        if isinstance(parent, ia3.Linear4bit):  # which casts to float32
            parent.__class__, parent.fan_in_fan_out = ia3.Linear, False
        if hasattr(getattr(parent, "config", None), "_experts_implementation"):
            parent.config._experts_implementation = "eager"  # the grouped products have no float64
    return model.to(dtype)


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As transformers loads it: what it keeps in float32 stays so, and so do a rotation's frequencies."""
    keep = {*kept_in_float32(model), "inv_freq", "original_inv_freq"}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not keep & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def kept_in_float32(model: nn.Module) -> set[str]:
    return {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}


def apart(model: nn.Module) -> set[str]:
    """Parts of the names of what is not to be quantized; Mamba reads the weight of its dt_proj past the layer."""
    return {*HEADS, "dt_proj", *kept_in_float32(model)}


def linears(model: nn.Module) -> dict[str, list[str]]:
    """The full names of the linear layers by the last part of the name, which is how target_modules has them."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear", "Linear4bit", "NF4Linear"):
            found.setdefault(name.rpartition(".")[2], []).append(name)
    return found


def stir(model: nn.Module, name: str, generator: torch.Generator) -> None:
    """Adapter ``name`` as after some training: PEFT starts from B = 0, or from what is as large as W."""
    spread(model, name)
    for layer in tuners(model).values():
        if name in getattr(layer, "lora_embedding_B", {}):
            weight = layer.lora_embedding_B[name]
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        if name in getattr(layer, "lora_B", {}) and not isinstance(layer, adalora.SVDLinear):
            for parameter in layer.lora_B[name].parameters() if isinstance(layer.lora_B[name], nn.Module) else ():
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


# --- hooks: at module level, for models are pickled with them ---------------------------------------------------------


def _halved(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return output * 0.5


def _plus_input(module: nn.Module, args: tuple) -> tuple:
    return (args[0] * 1.25, *args[1:])


def _seen(module: nn.Module, args: tuple, output: Tensor) -> None:
    assert isinstance(output, Tensor)


def _in_place(module: nn.Module, args: tuple, output: Tensor, how: str) -> None:
    getattr(output, how)(*([0.5] if how in ("add_", "mul_") else []))


def _grad_halved(module: nn.Module, grad_input: tuple, grad_output: tuple) -> tuple:
    return tuple(None if grad is None else 0.5 * grad for grad in grad_input)


HOOKS: dict[str, tuple[str, Callable]] = {
    "halves its output": ("register_forward_hook", _halved),
    "scales its input": ("register_forward_pre_hook", _plus_input),
    "looks at its output": ("register_forward_hook", _seen),
    "halves its input's gradient": ("register_full_backward_hook", _grad_halved),
}
IN_PLACE = ("add_", "mul_", "relu_", "neg_", "tanh_")


# --- a probe: one call of a model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """How a model is called, and what of it is looked at."""

    training: bool = True
    backward: bool = True
    autocast: bool = False
    own_loss: bool = True
    steps: int = 1
    disabled: bool = False
    adapter_names: Optional[tuple[str, ...]] = None
    inference: bool = False
    seed: int = 0

    def __str__(self) -> str:
        kind = "trains" if self.training else "evaluates"
        extra = [
            "" if self.backward else "without gradients", "bfloat16 autocast" if self.autocast else "",
            "" if self.own_loss else "another loss", f"{self.steps} steps" if self.steps > 1 else "",
            "adapters disabled" if self.disabled else "", "inference_mode" if self.inference else "",
            f"adapter_names={self.adapter_names}" if self.adapter_names else "",
        ]  # fmt: skip
        return ", ".join([kind, *filter(None, extra)])


def measure(model: nn.Module, batch: dict[str, Any], probe: Probe, dtype: torch.dtype) -> Parts:
    """Outputs, loss and gradients of one call, floating inputs in ``dtype``."""
    model.train(probe.training)
    model.zero_grad()
    torch.manual_seed(probe.seed)
    given, inputs = dict(batch), {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            given[name] = inputs[name] = value.detach().to(dtype, copy=True).requires_grad_(probe.backward)
    if probe.adapter_names is not None:
        given["adapter_names"] = list(probe.adapter_names)
    parts: Parts = {}
    with contextlib.ExitStack() as stack:
        if probe.autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        if probe.disabled:
            stack.enter_context(model.disable_adapter())
        if not probe.backward:
            stack.enter_context(torch.inference_mode() if probe.inference else torch.no_grad())
        for _ in range(probe.steps):
            output = model(**given)
            floats = {key: value for key, value in output.items()
                      if isinstance(value, Tensor) and value.is_floating_point() and key != "loss"}  # fmt: skip
            loss = getattr(output, "loss", None)
            if loss is None or not probe.own_loss:
                generator = torch.Generator().manual_seed(probe.seed)
                loss = sum((value.float() * torch.randn(value.shape, generator=generator)).sum() / value.numel() ** 0.5
                           for value in floats.values())  # fmt: skip
            if probe.backward:
                loss.backward()
    parts.update({f"output {key}": value.detach() for key, value in floats.items()})
    parts["loss"] = loss.detach()
    if probe.backward:
        parts.update({f"grad of {name}": value.grad for name, value in inputs.items()})
        parts.update({f"grad of {name}": p.grad for name, p in model.named_parameters() if p.requires_grad})
    return parts


# --- a case -----------------------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """Of cases: what they drew, and the logarithms of our error over PEFT's in the calls that round to 16 bits."""

    counts: Counter = field(default_factory=Counter)
    rounded: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """The geometric mean of our error over PEFT's."""
        return math.exp(statistics.fmean(self.rounded)) if self.rounded else 1.0


class Case:
    """Two models and what is done to both; ``live`` draws it all."""

    def __init__(self, seed: int, say: Callable[[str], None] = lambda text: None, family: Optional[str] = None) -> None:
        self.seed, self.say = seed, say
        self.rng = random.Random(seed)
        self.family = family or self.rng.choice(FAMILIES)
        self.seen = Statistics()
        self.told: list[str] = []
        self.names, self.merged, self.hooked = ["default"], False, []
        self.loads, self.base_trains = 0, False
        self.ended = False
        self.theirs_together: list[float] = []  # PEFT's error in 16 bits, of all tensors of each call so far

    # --- draws

    def pick(self, weights: dict[str, int]) -> str:
        return self.rng.choices(list(weights), list(weights.values()))[0]

    def maybe(self, chance: float = 0.5) -> bool:
        return self.rng.random() < chance

    def new_seed(self) -> int:
        return self.rng.randrange(1 << 30)

    def tell(self, text: str) -> None:
        self.told.append(text)
        self.say(text)

    def draw(self) -> None:
        """Architecture, sizes, base, method; and the two models."""
        rng = self.rng
        self.method, self.base = self.pick(METHODS), self.pick(BASES)
        self.dtype = next((dtype for name, dtype in DTYPES.items() if name in self.base), torch.float32)
        # Where something rounds to 16 bits a router's choice may flip, and a ReLU's side: there each token goes to all
        # experts, and activations are smooth.
        self.kbit = self.base == "bnb bfloat16" and self.maybe(0.3)  # float32 but for the 4-bit layers
        self.rounds = self.dtype is not torch.float32 or self.maybe(0.25)
        if self.rounds and self.family == "DistilBERT":  # whose head has a ReLU whatever the configuration says
            self.family = "BERT"
        hidden, heads, kv_heads = rng.choice([(32, 4, 2), (48, 2, 1), (64, 4, 2), (40, 1, 1)])
        if self.base.startswith("bnb"):
            hidden, heads, kv_heads = 64, 4, 2
        self.sizes = Sizes(
            hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=rng.choice((16, 24, 32)),
            inner=rng.choice((64, 128)) if hidden == 64 else rng.choice((48, 72, 100)), layers=rng.choice((1, 2, 2)),
            vocab=rng.choice((61, 128)), experts=2 if self.rounds else 4,
            batch=rng.choice((2, 3, 4) if self.rounds else (1, 2, 3, 4)),
            length=rng.choice((5, 9) if self.rounds else (1, 2, 5, 9)), smooth=self.rounds,
        )  # fmt: skip
        self.architecture = architecture(self.family, self.sizes)
        self.batch = self.architecture.batch()
        self.model_seed = self.new_seed()
        self.outline = self.fresh(dense=True)
        for attempt in range(8):
            self.config = self.draw_config(self.method, plain=attempt > 2)
            self.autocast_adapters = self.maybe(0.8)
            try:
                self.stock, self.fused = self.adapted()
                break
            except Exception as error:  # a configuration that PEFT has not got: nothing is accelerated yet
                if attempt == 7:
                    raise RuntimeError(f"{self.family}: PEFT takes no configuration, the last one: {error}") from error
        prepared = ", prepared for k-bit training" if self.kbit else ""
        self.tell(f"{self.family}, {self.method} over {self.base}{prepared}, {self.sizes}, {changed(self.config)}"
                  + ("" if self.autocast_adapters else ", adapters in the base's dtype"))  # fmt: skip
        self.drops = getattr(self.config, "lora_dropout", 0.0) > 0
        self.seen.counts.update([f"family {self.family}", f"method {self.method}", f"base {self.base}"])

    def fresh(self, dense: bool = False) -> nn.Module:
        """The model without an adapter; over NF4 dense, for PEFT's DoRA can't start from an NF4Linear."""
        model = in_dtype(self.architecture.build(self.model_seed), self.dtype)
        if self.base.startswith("bnb") and not dense:
            # bitsandbytes' own kernels are wrong where a row is no multiple of a block.
            spared = {id(layer) for name, layer in model.named_modules() if set(name.split(".")) & apart(model)}
            model = quantize(
                model, self.base, (), only=lambda linear: linear.in_features % 64 == 0 and id(linear) not in spared
            )
            if self.kbit:
                model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            for module in model.modules():
                if isinstance(module, bnb.nn.Linear4bit):
                    module.support_avx512bf16_for_cpu = False  # it repacks in evaluation, and no longer trains then
                    if module.bias is not None:  # which it casts for good in its first call
                        module.bias.data = module.bias.data.to(module.compute_dtype)
        return model

    def adapted(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(self.model_seed)
        model = get_peft_model(self.fresh(), copy.deepcopy(self.config), autocast_adapter_dtype=self.autocast_adapters)
        stir(model, "default", torch.Generator().manual_seed(self.model_seed))
        fused = copy.deepcopy(model)
        if self.base.startswith("nf4"):
            skip = tuple(apart(model.base_model.model))
            peft_ext.quantize_nf4(
                fused, blocksize=2 ** (5 + self.model_seed % 3), double_quant=self.model_seed % 2 == 0, skip=skip,
                progress=False,
            )  # fmt: skip
            model = peft_ext.dequantize_nf4(copy.deepcopy(fused), progress=False)
        return model, peft_ext.accelerate(fused)

    def draw_config(self, method: str, plain: bool = False) -> PeftConfig:
        """A configuration; a ``plain`` one spares what is in an expert's stack, where PEFT has but LoRA."""
        rng, model = self.rng, self.outline
        known = linears(model)
        heads = [name for name in known if name in (*HEADS, "pre_classifier", "embed_out", "proj_out")]
        body = [name for name in known if name not in heads]
        if plain:
            body = [name for name in body if not name.startswith(("gate", "up", "down"))] or body
        targets: Any = rng.sample(body, rng.randint(1, len(body)))
        if self.maybe(0.1) and self.base == "float32":
            targets += [rng.choice(heads)] if heads else []
        common: dict[str, Any] = {"task_type": self.architecture.task, "target_modules": targets}
        if self.maybe(0.1):
            norms = {
                name.rpartition(".")[2] for name, module in model.named_modules() if "Norm" in type(module).__name__
            }
            common["modules_to_save"] = rng.sample(sorted(norms) or ["classifier"], 1)
        if method == "IA3":
            feedforward = [name for name in targets if self.maybe()]
            return IA3Config(**common, feedforward_modules=feedforward, init_ia3_weights=False)
        ranks = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24)
        r = rng.choice(ranks)
        common |= {
            "r": r, "lora_alpha": rng.choice((1, r, 2 * r, 5)), "use_rslora": self.maybe(0.25),
            "lora_dropout": rng.choice((0.0, 0.0, 0.0, 0.0, 0.1, 0.5)), "init_lora_weights": rng.choice((True, False)),
        }  # fmt: skip
        if self.maybe(0.2):
            common["bias"] = rng.choice(("all", "lora_only"))
        if method == "AdaLoRA":
            common |= {"init_r": r, "target_r": max(1, r // 2), "total_step": 20, "tinit": 1, "tfinal": 2}
            del common["use_rslora"], common["init_lora_weights"]
            return AdaLoraConfig(**common)
        for pattern, values in (("rank_pattern", ranks), ("alpha_pattern", (1, 3, 16))):
            if self.maybe(0.3):
                common[pattern] = {name: rng.choice(values) for name in rng.sample(targets, min(2, len(targets)))}
        if method == "DoRA":
            return LoraConfig(**common, use_dora=True)
        if self.maybe(0.15):
            common["lora_bias"] = True
        elif self.base == "float32" and self.maybe(0.4):
            common["init_lora_weights"] = rng.choice(("gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal"))
            if common["init_lora_weights"] == "orthogonal" and r % 2:
                common["r"] = r + 1
        stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "experts" in name]
        if stacked and common["lora_dropout"] == 0 and "lora_bias" not in common and self.maybe():
            common["target_parameters"] = sorted({".".join(name.split(".")[-3:]) for name in stacked})
        extra = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        if self.maybe(0.1) and extra and common["init_lora_weights"] in (True, False):
            common["target_modules"] = [*targets, rng.choice(extra)]
        if self.maybe(0.1):
            common["layers_to_transform"] = [0]
        if self.maybe(0.1) and len(targets) > 1:
            common["exclude_modules"] = rng.sample(targets, 1)
        return LoraConfig(**common)

    # --- both models

    def both(self, what: str, do: Callable[[nn.Module], Any], compare_state: bool = True) -> bool:
        """Does it to both; False where both refuse, in the same words."""
        seed = self.new_seed()
        results, errors = [], []
        for model in (self.stock, self.fused):
            torch.manual_seed(seed)
            try:
                results.append(do(model))
                errors.append(None)
            except Exception as error:
                results.append(None)
                errors.append(error)
        if not self.allowed(what, errors):
            return False
        if isinstance(results[0], nn.Module):
            self.stock, self.fused = results
        if compare_state:
            self.compare_state(what)
        return True

    def allowed(self, what: str, errors: list[Optional[Exception]]) -> bool:
        """Whether both did it; where both refused alike it is told; the rest raises."""
        theirs, ours = errors
        if theirs is None and ours is None:
            return True
        if theirs is None and "compress_statistics" in str(ours):
            # A pickled and copied Params4bit is a plain parameter, until bitsandbytes' own forward has run over it.
            self.ended = True
            return False
        if theirs is None:
            trace = "".join(traceback.format_exception(ours)[-3:])
            raise Failed(f"{what}: PEFT does it, accelerated {type(ours).__name__}: {ours}\n{trace}")
        self.seen.counts["refused by PEFT"] += 1
        # bitsandbytes forbids to change its 4-bit product in place; here the next thing that is wrong is what is said.
        if ours is None or "MatMul4Bit is a view" in str(theirs):
            self.tell(f"  only PEFT refuses: {type(theirs).__name__}: {first_line(theirs)}")
            self.seen.counts["refused by PEFT alone"] += 1
            self.ended = True
            return False
        if type(theirs) is not type(ours) or plain(theirs) != plain(ours):
            raise Failed(f"{what}: PEFT refuses with {type(theirs).__name__}: {first_line(theirs)}; accelerated with "
                         f"{type(ours).__name__}: {first_line(ours)}")  # fmt: skip
        self.tell(f"  both refuse: {type(theirs).__name__}: {first_line(theirs)}")
        return False

    def compare_state(self, what: str) -> None:
        """Parameters and buffers are the same bits, but for NF4 weights; and what trains is the same."""
        theirs, ours = (
            dict(model.named_parameters()) | dict(model.named_buffers()) for model in (self.stock, self.fused)
        )
        nf4 = self.base.startswith("nf4")
        for name, wanted in theirs.items():
            found = ours.get(name)
            if found is None:
                raise Failed(f"{what}: accelerated has no {name}")
            if nf4 and found.dtype is torch.uint8:
                continue
            if found.requires_grad != wanted.requires_grad:
                raise Failed(f"{what}: {name}.requires_grad is {found.requires_grad}, PEFT's {wanted.requires_grad}")
            if nf4 and self.merged:
                continue
            if nf4 and "lora_" in name and found.shape == wanted.shape:
                # PEFT casts a new adapter to its base's dtype, which it does not see in bytes; and a DoRA's magnitude
                # starts from a norm, whose sum has another order over them.
                if distance(found, wanted) <= 4e-3 * wanted.double().norm().item():
                    found.data = wanted.data.clone()
            if found.dtype is not wanted.dtype or found.shape != wanted.shape:
                raise Failed(f"{what}: {name} is {found.dtype} {tuple(found.shape)}, PEFT's {wanted.dtype} "
                             f"{tuple(wanted.shape)}")  # fmt: skip
            if not torch.equal(found.detach().nan_to_num(), wanted.detach().nan_to_num()):
                raise Failed(f"{what}: {name} is {distance(found, wanted):.1e} off PEFT's")
        if not nf4 and ours.keys() != theirs.keys():
            raise Failed(f"{what}: accelerated has {sorted(ours.keys() - theirs.keys())} too")

    def share_masks(self, probe: Probe) -> None:
        """PEFT's dropout draws as the op does in each layer that is fused, so that both drop the same.

        Of a DoRA in float32 over 4-bit layers that compute in 16 bits the parts are fused, and the dropout is torch's.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=probe.autocast):
            fused = {row.name: row.fused for row in peft_ext.explain(self.fused).rows}
        for name, layer in tuners(self.stock).items():
            parts = self.kbit and not probe.autocast and isinstance(layer.get_base_layer(), bnb.nn.Linear4bit)
            for adapter, dropout in getattr(layer, "lora_dropout", {}).items():
                if not isinstance(dropout, nn.Identity):
                    alike = fused.get(name) and not (parts and adapter in layer.lora_variant)
                    kind = PhiloxDropout if alike else nn.Dropout
                    layer.lora_dropout[adapter] = kind(dropout.p).train(dropout.training)

    def call(self, probe: Probe) -> Optional[list[Parts]]:
        """What PEFT's and the accelerated model give; None where both refuse."""
        self.tell(f"  {probe}")
        found, errors = [], []
        if self.drops:
            for model in (self.stock, self.fused):
                model.train(probe.training)
            self.share_masks(probe)
        for model in (self.stock, self.fused):
            try:
                found.append(measure(model, self.batch, probe, self.dtype))
                errors.append(None)
            except Exception as error:
                errors.append(error)
        return found if self.allowed(str(probe), errors) else None

    def probe(self, probe: Probe) -> bool:
        """Calls both models and compares; False where both refuse."""
        if (found := self.call(probe)) is None:
            return False
        rows = peft_ext.explain(self.fused).rows
        self.seen.counts.update(
            {"layers": len(rows), "fused layers": sum(row.fused for row in rows), "calls compared": 1}
        )
        # Merged into NF4, a weight is rounded to 4 bits again, and PEFT's dense twin's is not.
        if not (self.merged and self.base.startswith("nf4")):
            self.compare(probe, *found)
        return True

    # --- comparison

    def truth(self, probe: Probe, dtype: torch.dtype) -> Parts:
        return measure(widened(self.stock, dtype), self.batch, replace(probe, autocast=False), dtype)

    def compare(self, probe: Probe, theirs: Parts, ours: Parts) -> None:
        if ours.keys() != theirs.keys():
            raise Failed(f"{probe}: {sorted(ours.keys() ^ theirs.keys())} has only one of the two")
        for name, wanted in theirs.items():
            if (wanted is None) != (ours[name] is None):
                raise Failed(f"{probe}: {name} is there in only one of the two: PEFT's is {wanted}")
            if wanted is not None and (wanted.dtype, wanted.shape) != (ours[name].dtype, ours[name].shape):
                raise Failed(f"{probe}: {name} is {ours[name].dtype} {tuple(ours[name].shape)}, PEFT's {wanted.dtype} "
                             f"{tuple(wanted.shape)}")  # fmt: skip
        pairs = {name: (ours[name], wanted) for name, wanted in theirs.items() if wanted is not None and wanted.numel()}
        if not probe.own_loss:
            del pairs["loss"]  # a sum of terms of either sign, each of which is compared
        if not all(wanted.isfinite().all() for _, wanted in pairs.values()):
            self.seen.counts["not finite in PEFT"] += 1
            return
        if self.dtype is torch.float32 and not probe.autocast:
            self.compare_tightly(probe, pairs)
        else:
            self.compare_rounded(probe, pairs)

    def compare_tightly(self, probe: Probe, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        far = [name for name, (ours, theirs) in pairs.items()
               if not distance(ours, theirs) <= TIGHT * theirs.double().norm().item()]  # fmt: skip
        if not far:
            return
        self.seen.counts["judged by float64"] += 1
        exact = {} if self.family in NO_FLOAT64 else self.truth(probe, torch.float64)
        norms = ((exact[name] if exact else theirs).norm().nan_to_num().item() for name, (_, theirs) in pairs.items()
                 if name.startswith("grad"))  # fmt: skip
        largest = max(norms, default=0.0)
        largest = max(largest, 1.0)  # where but a key trains, and there is one key, all gradients are rounding
        for name in far:
            if not exact or not exact[name].isfinite().all():  # a model may have no float64, as masks for it have not
                ours, theirs = pairs[name]
                slack = OF_LARGEST * largest if name.startswith("grad") else 0
                if not distance(ours, theirs) <= 50 * TIGHT * theirs.double().norm().item() + slack:
                    raise Failed(f"{probe}: {name} is {distance(ours, theirs):.1e} off PEFT's")
                continue
            (ours, theirs), wanted = pairs[name], exact[name]
            error, yardstick = distance(ours, wanted), distance(theirs, wanted)
            slack = OF_TENSOR * wanted.norm().item() + OF_LARGEST * (largest if name.startswith("grad") else 0)
            if not error <= AGAINST_FLOAT64 * yardstick + slack:
                raise Failed(f"{probe}: {name} is {error:.1e} off float64 of norm {wanted.norm():.1e}, PEFT's "
                             f"{yardstick:.1e}")  # fmt: skip

    def compare_rounded(self, probe: Probe, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        exact = self.truth(probe, torch.float32)
        eps = torch.finfo(torch.bfloat16 if probe.autocast or self.dtype is torch.float32 else self.dtype).eps
        largest = max((exact[name].norm().item() for name in pairs if name.startswith("grad")), default=0.0)
        errors: dict[str, tuple[float, float, float]] = {}
        for name, (ours, theirs) in pairs.items():
            norm = exact[name].norm().item()
            floor = ROUNDED_FLOOR * eps * (norm + (0.01 * largest if name.startswith("grad") else 0))
            scale = max(norm + floor, 1e-30)
            errors[name] = (distance(ours, exact[name]) / scale, distance(theirs, exact[name]) / scale, floor / scale)
        usual = statistics.median(theirs for _, theirs, _ in errors.values())
        for name, (ours, theirs, floor) in errors.items():
            factor = ROUNDED_EACH if exact[name].numel() > FEW else ROUNDED_FEW
            if not ours <= factor * max(theirs, usual) + floor:
                raise Failed(f"{probe}: {name} is {ours:.1e} of its norm off float32, PEFT's {theirs:.1e}, which is "
                             f"{usual:.1e} in the median")  # fmt: skip
        several = [name for name in errors if exact[name].numel() > FEW]
        if several:
            all_ours, all_theirs = (
                math.sqrt(sum(min(errors[name][side], 1.0) ** 2 for name in several) / len(several)) for side in (0, 1)
            )
            # The tensors of a call follow one loss, and are near float32 or off it together: how far is a matter of the
            # model, which its other calls tell too.
            self.theirs_together.append(all_theirs)
            usual_all = max(all_theirs, statistics.median(self.theirs_together))
            if not all_ours <= ROUNDED_ALL * usual_all + ROUNDED_FLOOR * eps:
                raise Failed(f"{probe}: {len(several)} tensors together are {all_ours:.1e} off float32, PEFT's "
                             f"{all_theirs:.1e}, {usual_all:.1e} over the case")  # fmt: skip
            if all_theirs > 0 and all_ours > 0:
                self.seen.rounded.append(math.log(all_ours / all_theirs))

    # --- a life

    def live(self) -> None:
        self.draw()
        self.compare_state("accelerate")
        self.act_train()
        for _ in range(self.rng.randint(1, 5)):
            if self.ended:
                return
            action = self.pick(ACTIONS)
            self.tell(action)
            self.seen.counts[f"action {action}"] += 1
            getattr(self, f"act_{action}")()
        if not self.ended:
            self.probe(self.drawn_probe())
        if not self.ended and self.maybe(0.15):
            self.tell("leave")
            self.leave()

    def drawn_probe(self, **fixed: Any) -> Probe:
        backward = self.maybe(0.75)
        drawn = {
            "training": self.maybe(0.6), "backward": backward, "autocast": self.rounds and self.maybe(0.4),
            # Of one token there is none to foretell.
            "own_loss": self.maybe(0.7) and self.sizes.length > 1,
            "steps": self.rng.choice((1, 1, 1, 2)) if backward else 1,
            "disabled": self.maybe(0.1), "inference": self.maybe(0.3), "seed": self.new_seed(),
        }  # fmt: skip
        drawn |= fixed
        # Without adapters nothing trains, unless the base does.
        drawn["backward"] &= not drawn["disabled"] or self.base_trains
        return Probe(**drawn)

    def act_train(self) -> None:
        self.probe(self.drawn_probe(training=True, backward=True, disabled=False))
        if self.maybe(0.6):
            seed = self.new_seed()
            self.both("a step of training", lambda model: _step(model, seed))

    def act_evaluate(self) -> None:
        self.probe(self.drawn_probe(training=False))

    def act_disable(self) -> None:
        self.probe(self.drawn_probe(disabled=True))

    def act_switch_off(self) -> None:
        self.both("disable_adapter_layers", lambda model: model.base_model.disable_adapter_layers())
        self.probe(self.drawn_probe(disabled=False, backward=self.base_trains))
        self.both("enable_adapter_layers", lambda model: model.base_model.enable_adapter_layers())

    def act_add(self) -> None:
        name, nf4 = f"other{len(self.names)}", self.base.startswith("nf4")
        if nf4 and self.method in ("AdaLoRA", "IA3"):
            return self.act_train()  # what of a second one trains PEFT settles otherwise over a weight of bytes
        # Over an NF4Linear that has no adapter yet PEFT can't start a DoRA.
        method = self.rng.choice(("LoRA",) if nf4 else ("LoRA", "LoRA", "DoRA"))
        method = self.method if self.method in ("IA3", "AdaLoRA") else method
        config = self.draw_config(method)
        config.bias = "none"
        if hasattr(config, "lora_dropout") and not self.drops:
            config.lora_dropout = 0.0
        config.inference_mode = method == "AdaLoRA"  # only one may train
        self.tell(f"  {method} {changed(config)}")
        seed = self.new_seed()

        def add(model: nn.Module) -> None:
            try:
                model.add_adapter(name, copy.deepcopy(config), autocast_adapter_dtype=self.autocast_adapters)
            finally:
                if model is self.fused:  # layers that are new are stock until then, also where PEFT got no further
                    peft_ext.accelerate(model)
            stir(model, name, torch.Generator().manual_seed(seed))

        if self.both("add_adapter", add):
            self.names.append(name)
            self.act_toggle()

    def act_toggle(self) -> None:
        several = len(self.names) > 1 and not self.drops and self.maybe(0.7)
        chosen = self.rng.sample(self.names, self.rng.randint(2, len(self.names)) if several else 1)
        self.tell(f"  {chosen} active")
        self.both("set_adapter", lambda model: model.base_model.set_adapter(chosen if len(chosen) > 1 else chosen[0]))
        self.probe(self.drawn_probe())

    def act_weigh(self) -> None:
        if self.method not in ("LoRA", "DoRA") or len(self.names) < 2:
            return self.act_add()
        name, chosen = f"mix{len(self.names)}", self.rng.sample(self.names, 2)
        kind = self.rng.choice(("linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"))
        weights = [round(self.rng.uniform(-1, 2), 2) for _ in chosen]
        options = {"density": 0.5} if kind in ("ties", "dare_linear", "magnitude_prune") else {}
        options |= {"svd_rank": 3} if kind == "svd" else {}
        self.tell(f"  {kind} of {chosen}, {weights}")
        done = self.both("add_weighted_adapter", lambda model: model.add_weighted_adapter(
            chosen, weights, name, combination_type=kind, **options))  # fmt: skip
        if done:
            self.names.append(name)
            self.both("set_adapter", lambda model: model.set_adapter(name))
            self.probe(self.drawn_probe())

    def act_delete(self) -> None:
        if len(self.names) < 2:
            return self.act_add()
        name = self.rng.choice(self.names)
        self.tell(f"  {name}")
        if self.both("delete_adapter", lambda model: model.delete_adapter(name)):
            self.names.remove(name)
            self.probe(self.drawn_probe())

    def act_scale(self) -> None:
        scale = self.rng.choice((0.5, 2.0, -1.0, 0.0))

        def rescale(model: nn.Module) -> None:
            for layer in tuners(model).values():
                layer.scale_layer(scale)

        self.tell(f"  by {scale}")
        if self.method in ("LoRA", "DoRA"):
            self.both("scale_layer", rescale)
        self.probe(self.drawn_probe())

    def act_merge(self) -> None:
        if self.base.startswith("nf4") and self.method == "DoRA":
            return
        safe, some = self.maybe(), self.rng.sample(self.names, 1) if self.maybe(0.3) else None
        self.tell(f"  safe_merge={safe}, {some or 'the active ones'}")
        was, self.merged = self.merged, True
        if not self.both("merge_adapter", lambda model: model.merge_adapter(some, safe_merge=safe)):
            if self.base.startswith("nf4"):  # PEFT has changed a weight that it does not count as merged; we have not
                self.ended = True
                return
            self.merged = was or any(layer.merged for layer in tuners(self.stock).values())
        self.probe(self.drawn_probe())
        if self.maybe(0.8):
            self.act_unmerge()

    def act_unmerge(self) -> None:
        merged = self.merged
        self.both("unmerge_adapter", lambda model: model.unmerge_adapter(), compare_state=not merged)
        if merged and self.base.startswith("nf4"):
            # The dense weight is what it was but for rounding, and the NF4 one exactly.
            stock = dict(self.stock.named_parameters())
            for name, module in self.fused.named_modules():
                if isinstance(module, NF4Linear):
                    want = stock[f"{name}.weight"]
                    if not distance(module.dequantize(), want) <= (
                        100 * torch.finfo(self.dtype).eps * want.double().norm().item()
                    ):
                        raise Failed(f"unmerge_adapter: {name} is not the weight from before merging")
                    want.data.copy_(module.dequantize())
                    if module.bias is not None:
                        stock[f"{name}.bias"].data.copy_(module.bias.data)
        self.merged = False
        self.compare_state("unmerge_adapter")
        self.probe(self.drawn_probe())

    def act_mix(self) -> None:
        if self.method in ("IA3", "AdaLoRA") and self.maybe(0.8):  # PEFT has it of LoRA alone
            return self.act_toggle()
        size = next(len(value) for value in self.batch.values() if isinstance(value, Tensor))
        names = tuple(self.rng.choice([*self.names, "__base__"]) for _ in range(size))
        probe = self.drawn_probe(training=self.maybe(0.1), disabled=False, adapter_names=names, own_loss=False)
        if not self.probe(replace(probe, steps=1)):
            self.ended = True  # what raises in a mixed batch leaves PEFT's hooks for it behind

    def act_hook(self) -> None:
        layers = list(tuners(self.stock))
        name = self.rng.choice(layers)
        inner = [f"{name}.{child}" for child, _ in dict(self.stock.named_modules())[name].named_modules()
                 if child and type(self.stock.get_submodule(f"{name}.{child}")) in (nn.Linear, nn.Dropout)]  # fmt: skip
        if inner and self.maybe():
            name = self.rng.choice(inner)
        kind = self.rng.choice(list(HOOKS))
        self.tell(f"  {name} {kind}")
        method, hook = HOOKS[kind]
        self.both("hook", lambda model: bool(getattr(model.get_submodule(name), method)(hook)))
        self.hooked.append(name)
        self.probe(self.drawn_probe())
        if self.maybe(0.7):
            self.act_unhook()

    def act_change_in_place(self) -> None:
        names = self.rng.sample(sorted(tuners(self.stock)), self.rng.randint(1, min(3, len(tuners(self.stock)))))
        how = self.rng.choice([how for how in IN_PLACE if not (self.rounds and how == "relu_")])
        self.tell(f"  {how} on {', '.join(names)}")
        for name in names:
            hook = functools.partial(_in_place, how=how)
            self.both("hook", lambda model, name=name, hook=hook: bool(
                model.get_submodule(name).register_forward_hook(hook)))  # fmt: skip
            self.hooked.append(name)
        self.probe(self.drawn_probe(training=True, backward=True, disabled=False))
        self.probe(self.drawn_probe())
        if self.maybe(0.7):
            self.act_unhook()

    def act_unhook(self) -> None:
        def unhook(model: nn.Module) -> None:
            for name in self.hooked:
                with contextlib.suppress(AttributeError):  # an adapter's, which is deleted
                    module = model.get_submodule(name)
                    for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                        hooks.clear()

        self.both("unhook", unhook)
        self.hooked = []
        self.probe(self.drawn_probe())

    def act_checkpoint(self) -> None:
        reentrant = self.maybe()
        self.tell(f"  use_reentrant={reentrant}")

        def enable(model: nn.Module) -> None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant and self.architecture.task is not None:
                model.enable_input_require_grads()

        if self.both("gradient_checkpointing_enable", enable):
            self.probe(self.drawn_probe(training=True, backward=True))
            if self.maybe(0.7):
                self.both("gradient_checkpointing_disable", lambda model: model.gradient_checkpointing_disable())

    def act_train_base(self) -> None:
        chance, seed = self.rng.choice((0.1, 0.5, 1.0)), self.new_seed()
        wanted = self.maybe(0.8)

        def change(model: nn.Module) -> None:
            rng = random.Random(seed)
            for name, parameter in self.stock.named_parameters():
                mine = model.get_parameter(name)
                if rng.random() < chance and parameter.is_floating_point() and mine.is_floating_point():
                    mine.requires_grad_(wanted)

        self.base_trains = wanted and chance == 1.0
        self.tell(f"  {chance:.0%} of the parameters {'train' if wanted else 'are frozen'}")
        self.both("requires_grad_", change, compare_state=not self.base.startswith("nf4"))
        if self.base.startswith("nf4"):  # a dense weight may train and an NF4 one can't
            for name, parameter in self.fused.named_parameters():
                if parameter.dtype is torch.uint8:
                    self.stock.get_parameter(name).requires_grad_(False)
        self.probe(self.drawn_probe())

    def act_copy(self) -> None:
        self.both("deepcopy", copy.deepcopy)
        self.probe(self.drawn_probe())

    def act_pickle(self) -> None:
        self.both("pickle", lambda model: pickle.loads(pickle.dumps(model)))
        self.probe(self.drawn_probe())

    def act_restore(self) -> None:
        before = {name: type(module) for name, module in self.fused.named_modules()}
        if self.base.startswith("nf4") and self.merged:
            return
        self.fused = peft_ext.restore(self.fused)
        wrong = [name for name, module in self.fused.named_modules() if type(module) in peft_ext_fused()]
        if wrong:
            raise Failed(f"restore: {wrong} are still fused")
        if not (self.base.startswith("nf4") and self.method != "IA3"):  # PEFT's own path over an NF4Linear has no DoRA
            self.probe(self.drawn_probe())
        self.fused = peft_ext.accelerate(self.fused)
        after = {name: type(module) for name, module in self.fused.named_modules()}
        if after != before:
            raise Failed("accelerate after restore: other layers are fused than before")
        self.probe(self.drawn_probe())

    def act_state_dict(self) -> None:
        if self.base.startswith("nf4"):
            return
        states = [model.state_dict() for model in (self.stock, self.fused)]
        if list(states[0]) != list(states[1]):
            raise Failed(f"state_dict: keys differ: {sorted(states[0].keys() ^ states[1].keys())[:5]}")
        self.both("load_state_dict", lambda model: model.load_state_dict(copy.deepcopy(states[0])) and None)
        self.probe(self.drawn_probe())

    def act_save(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            places = iter(("stock", "fused"))
            saved = self.both("save_pretrained", lambda model: model.save_pretrained(
                f"{folder}/{next(places)}", save_embedding_layers=False))  # fmt: skip
            if not saved:
                return
            files = [{str(path.relative_to(f"{folder}/{side}")): path.read_bytes()
                      for path in Path(folder, side).rglob("*.*") if path.name != "README.md"}
                     for side in ("stock", "fused")]  # fmt: skip
            if files[0].keys() != files[1].keys():
                raise Failed(f"save_pretrained: files {sorted(files[1])}, PEFT's {sorted(files[0])}")
            for name, wanted in files[0].items():
                if contents(name, files[1][name]) != contents(name, wanted):
                    raise Failed(f"save_pretrained: {name} is not PEFT's")
            chosen = self.rng.choice(self.names)
            place = f"{folder}/{'stock' if self.maybe() else 'fused'}" + ("" if chosen == "default" else f"/{chosen}")
            if not Path(place).is_dir():
                return
            if self.maybe() and not self.base.startswith("nf4"):
                self.tell(f"  {chosen} over a new base")
                self.load_anew(place)
            else:
                self.loads += 1
                name = f"loaded{self.loads}"
                self.tell(f"  {chosen} again as {name}")

                def load(model: nn.Module) -> None:
                    model.load_adapter(place, name, is_trainable=True)
                    if model is self.fused:
                        peft_ext.accelerate(model)

                if self.both("load_adapter", load):
                    self.names.append(name)
                    self.both("set_adapter", lambda model: model.set_adapter(name))
        self.probe(self.drawn_probe())

    def load_anew(self, place: str) -> None:
        def load(model: nn.Module) -> nn.Module:
            loaded = PeftModel.from_pretrained(
                self.fresh(), place, is_trainable=True, autocast_adapter_dtype=self.autocast_adapters
            )
            return peft_ext.accelerate(loaded) if model is self.fused else loaded

        if self.both("from_pretrained", load):
            self.names, self.merged, self.hooked = ["default"], False, []

    def act_generate(self) -> None:
        if not self.architecture.generates or self.rounds or self.hooked or self.merged:
            return self.act_evaluate()
        tokens = []

        def generate(model: nn.Module) -> None:
            model.eval()
            given = {key: value for key, value in self.architecture.inputs().items()}
            tokens.append(model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False))

        if self.both("generate", generate) and not torch.equal(*tokens):
            raise Failed(f"generate: {tokens[1].tolist()}, PEFT's {tokens[0].tolist()}")

    def act_allocate(self) -> None:
        if self.method != "AdaLoRA" or self.rounds or self.hooked or self.merged:
            return self.act_train()
        steps = [self.rng.randrange(2, 18) for _ in range(2)]
        for step in steps:
            if self.probe(self.drawn_probe(training=True, backward=True, disabled=False)) and not self.ended:
                self.both("update_and_allocate", lambda model, step=step: model.base_model.update_and_allocate(step))

    def act_widen(self) -> None:
        if self.base != "float32" or self.family in NO_FLOAT64:
            return self.act_train()
        self.both("double", lambda model: model.double())
        self.dtype = torch.float64
        probe = self.drawn_probe(autocast=False)
        for name, wanted in (found := self.call(probe) or [{}, {}])[0].items():
            # What a model computes in float32 whatever its dtype, as a rotation is, has that much.
            if wanted is not None and not wanted.isfinite().all():  # a mask that float64 has not
                self.seen.counts["not finite in PEFT"] += 1
            elif wanted is not None and not distance(found[1][name], wanted) <= TIGHT * wanted.norm().item() + 1e-9:
                raise Failed(f"{probe} in float64: {name} is {distance(found[1][name], wanted):.1e} off PEFT's")
        self.both("float", lambda model: model.float())
        self.dtype = torch.float32

    def leave(self) -> None:
        """The model without PEFT's layers, merged or not."""
        if self.base.startswith("nf4") or self.hooked:
            return
        merge = self.maybe(0.7)
        self.tell("  merge_and_unload" if merge else "  unload")
        if self.both("leave", lambda model: model.merge_and_unload() if merge else model.unload()):
            left = [name for name, module in self.fused.named_modules() if type(module) in peft_ext_fused()]
            if left and not self.base.startswith("bnb"):
                raise Failed(f"leave: {left} are still fused")
            self.drops = False
            self.probe(self.drawn_probe(disabled=False, training=False, backward=False))


ACTIONS = {
    "train": 3, "evaluate": 2, "disable": 1, "switch_off": 1, "add": 4, "toggle": 3, "weigh": 3, "delete": 2,
    "scale": 1, "merge": 3, "unmerge": 1, "mix": 2, "hook": 2, "change_in_place": 3, "unhook": 1, "checkpoint": 2,
    "train_base": 2, "copy": 1, "pickle": 1, "restore": 1, "state_dict": 1, "save": 2, "generate": 1, "allocate": 1,
    "widen": 1,
}  # fmt: skip


def peft_ext_fused() -> set[type]:
    from peft_ext.integrations.fused.base import STOCK

    return set(STOCK)


@torch.no_grad()
def _step(model: nn.Module, seed: int) -> None:
    """What an optimizer does: every parameter that trains is changed in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 * noise * parameter.float().abs().mean()).to(parameter.dtype))
    model.zero_grad()


def changed(config: PeftConfig) -> str:
    """What of a configuration is not the default."""
    default = type(config)() if not isinstance(config, AdaLoraConfig) else AdaLoraConfig(total_step=1)
    return ", ".join(f"{name}={value!r}" for name, value in sorted(vars(config).items())
                     if not name.startswith("_") and value != getattr(default, name, None)
                     and name not in ("base_model_name_or_path", "task_type", "peft_version"))  # fmt: skip


def contents(name: str, data: bytes) -> Any:
    """A file's bytes, or of a configuration its values: what was a set has no order."""
    if not name.endswith(".json"):
        return data
    return {key: sorted(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else value
            for key, value in json.loads(data).items()}  # fmt: skip


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def plain(error: Exception) -> str:
    """A message without addresses, a folder's name, a module's innards, and what a class or tensor is called where."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(
        r"0x[0-9a-f]+|/\S*/(stock|fused)\b|\bFused(?=[A-Z])|\bNF4(?=Linear\b)|\[(CPU|torch\.)\w+(?= \[)", "", line
    )


# --- many cases -------------------------------------------------------------------------------------------------------


def reproducer(seed: int) -> str:
    return f"python tests/fuzz/model_fuzz.py --case {seed}"


def run_case(seed: int, say: Callable[[str], None] = lambda text: None, family: Optional[str] = None
             ) -> tuple[Optional[str], Statistics]:  # fmt: skip
    """Why the case fails, or None; and what was seen on the way."""
    case = Case(seed, say, family)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.live()
        return None, case.seen
    except Exception as error:
        what = str(error) if isinstance(error, Failed) else traceback.format_exc(limit=-6)
        return f"{chr(10).join(case.told)}\n  {type(error).__name__}: {what}", case.seen


def serve() -> None:
    """Runs the cases whose seeds come in, and writes one line of JSON for each."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    for line in sys.stdin:
        seed = int(line)
        faulthandler.dump_traceback_later(0.95 * LIMIT, file=sys.stderr)
        started = time.monotonic()
        failure, seen = run_case(seed)
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps({
            "failure": failure, "seconds": time.monotonic() - started, "counts": seen.counts,
            "rounded": seen.rounded,
        }) + "\n")  # fmt: skip


class Worker:
    """A process that runs cases; it is ended, and begun anew, where one does not come back or ends it."""

    COMMAND = (sys.executable, os.fspath(Path(__file__).resolve()), "--serve")

    def __init__(self, command: Sequence[str] = COMMAND, limit: float = LIMIT) -> None:
        self.command, self.limit = command, limit
        self.process: Optional[subprocess.Popen] = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.ask(WARM_UP, 10 * LIMIT)  # imports are no case's time

    def ask(self, seed: int, limit: float) -> Optional[dict[str, Any]]:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seed}\n".encode())
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else b""
        return json.loads(line) if line else None

    def run(self, seed: int) -> dict[str, Any]:
        if self.process is None:
            self.start()
        started = time.monotonic()
        answer = self.ask(seed, self.limit)
        if answer is None:
            taken = time.monotonic() - started
            what = f"it hangs: {self.limit:g} s" if taken >= self.limit else "it ends its process"
            self.stop()
            answer = {"failure": what, "seconds": taken, "counts": {}, "rounded": []}
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process = None


def fuzz(
    seeds: Iterable[int], until: float = math.inf, worker: Optional[Worker] = None
) -> tuple[Statistics, list[str]]:
    """What was drawn and seen, and a report of every failure, which is printed as it comes; stops at ``until``."""
    worker = Worker() if worker is None else worker
    found, failures = Statistics(), []
    try:
        for seed in seeds:
            if time.monotonic() > until:
                break
            answer = worker.run(seed)
            found.counts.update(answer["counts"])
            found.counts.update({"cases": 1, "milliseconds": round(1000 * answer["seconds"])})
            found.rounded.extend(answer["rounded"])
            if answer["failure"]:
                failures.append(f"case {seed}: {answer['failure']}\n  {reproducer(seed)}")
                print(failures[-1], file=sys.stderr, flush=True)
    finally:
        worker.stop()
    if len(found.rounded) >= MANY and found.mean > ROUNDED_MEAN:
        failures.append(f"{len(found.rounded)} calls that round to 16 bits: our error is {found.mean:.2f} times PEFT's "
                        f"in the mean, wanted at most {ROUNDED_MEAN}")  # fmt: skip
    return found, failures


def main(arguments: Optional[list[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", type=int, help="one case, told step by step")
    parser.add_argument("--family", choices=FAMILIES, help="of --case: this architecture whatever was drawn")
    parser.add_argument("--seed", type=int, help="the first of many")
    parser.add_argument("--cases", type=int, help="how many; default 300")
    parser.add_argument("--minutes", type=float, help="for how long, instead")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        serve()
        return 0
    if args.case is not None:
        told: list[str] = []
        failure, _ = run_case(args.case, lambda text: (told.append(text), print(text, flush=True)), args.family)
        print(failure.removeprefix("\n".join(told)) if failure else "passed")
        return 1 if failure else 0
    start = args.seed if args.seed is not None else int(time.time()) * 10_000 if args.minutes else 0
    count = args.cases if args.cases is not None else sys.maxsize - start if args.minutes else 300
    until = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    found, failures = fuzz(range(start, start + count), until)
    counts = found.counts
    print(f"{counts['cases']} cases from seed {start}: {len(failures)} failed; {counts['calls compared']} calls, "
          f"{counts['fused layers']} of {counts['layers']} layers fused, 16 bits {found.mean:.3f} of PEFT's error in "
          f"the mean of {len(found.rounded)}; {counts['milliseconds'] / 1000:.0f} s")  # fmt: skip
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
