"""Draws the fuzzer's two models from a seed, one under PEFT alone and one accelerated, and bounds their differences."""

from __future__ import annotations

import copy
import math
import random
import re
import statistics
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Optional

import bitsandbytes as bnb
import peft
import torch
import torch.nn.functional as F
from model_probe import Parts, Probe, apart, in_dtype, linears, measure, stir, widened
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, get_peft_model
from peft_models import PhiloxDropout, quantize, tuners
from tiny_models import FAMILIES, Sizes, architecture
from torch import Tensor, nn

import peft_ext
from peft_ext.model import register_layers
from peft_ext.quantize import HEADS

METHODS = {"LoRA": 5, "DoRA": 3, "AdaLoRA": 1, "IA3": 2}
BASES = {
    "float32": 8, "bfloat16": 3, "float16": 1, "nf4": 3, "nf4 bfloat16": 1, "bnb": 2, "bnb nested": 1,
    "bnb bfloat16": 1,
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

# --- how far apart ----------------------------------------------------------------------------------------------------

# Bound in float32, for sums of at most about 200 terms in another order, through two layers and back. Most differences
# are 1e-7 to 1e-6 of a tensor's norm.
TIGHT = 2e-5
NO_FLOAT64 = ("XGLM",)  # Architectures whose mask raises an error in float64.
# Where float32 results differ by more than TIGHT, both models are compared with float64: a gradient that is zero except
# for rounding (a key's bias has no effect on the softmax) has no correct digits in either model. Our error may be
# AGAINST_FLOAT64 times PEFT's error, plus OF_TENSOR of the tensor's norm and OF_LARGEST of the largest gradient.
AGAINST_FLOAT64, OF_TENSOR, OF_LARGEST = 4.0, 2e-5, 1e-6

# Bounds in 16 bits: the errors of both models are measured against an equal model in float32, and our errors are
# compared with PEFT's. The rounding errors of the two models are two random draws. The quotient of the errors varies
# more where values go through few numbers. Gradients of a query and a key, which go through the softmax of a few keys,
# have 0.1 to 6 times PEFT's error, depending on the weights; logits have 0.7 to 1.2 times PEFT's error. Cases in 16
# bits therefore have several tokens, and PEFT's error counts at least as the median over the call's tensors. Among
# about 5,000 tensors of more than FEW elements, our error was at most 1.9 times the larger of PEFT's error and the
# median. The error of a tensor of few elements depends much on chance: a router's bias over two experts is one number,
# and the quotient of two draws exceeds 10 in 6 of 100 cases. For all tensors of a call together, each divided by its
# norm, our error was 0.6 to 1.7 times PEFT's in 98 of 100 calls, and 2.5 times at most. Over all calls of a run, the
# logarithms of the factors are symmetric about 0 with a deviation of 0.3, so from MANY calls on a mean that differs by
# a tenth is significant. A missing term, or a term with the wrong sign, gives a relative error near 1, where PEFT's
# relative errors are near 0.01.
ROUNDED_EACH, ROUNDED_FEW, ROUNDED_ALL, ROUNDED_MEAN = 8.0, 20.0, 3.0, 1.1
FEW, MANY = 16, 200
ROUNDED_FLOOR = 2.0  # error in eps of the dtype, times a tensor's norm or a hundredth of the largest gradient's norm


class Failed(AssertionError):
    """The error for a difference between the accelerated model and PEFT's model."""


def distance(found: Tensor, wanted: Tensor) -> float:
    return (found.double() - wanted.double()).norm().item()


def require_alike(what: str, name: str, found: Tensor, wanted: Tensor) -> None:
    """Raises if the two tensors have different dtypes or shapes."""
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        raise Failed(f"{what}: {name} is {found.dtype} {tuple(found.shape)}, PEFT's {wanted.dtype} "
                     f"{tuple(wanted.shape)}")  # fmt: skip


# --- a pair -----------------------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """Counts of draws and calls, and the logarithms of our error over PEFT's in calls that round to 16 bits."""

    counts: Counter = field(default_factory=Counter)
    rounded: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Returns the geometric mean of our error over PEFT's."""
        return math.exp(statistics.fmean(self.rounded)) if self.rounded else 1.0


class OwnDropout(PhiloxDropout):
    """Replaces a dropout of the stock model: draws the mask of the fused dropout, so that both models drop alike.

    For a non-contiguous or float64 x it draws PyTorch's mask.
    """

    def forward(self, x: Tensor) -> Tensor:
        fused = x.is_contiguous() and x.dtype is not torch.float64
        return super().forward(x) if fused else F.dropout(x, self.p, self.training)


class Pair:
    """PEFT's model and the accelerated model of one draw.

    Every action is applied to both models, and the results are compared.
    """

    def __init__(self, seed: int, say: Callable[[str], None] = lambda text: None, family: Optional[str] = None) -> None:
        self.seed, self.say = seed, say
        self.rng = random.Random(seed)
        self.family = family or self.rng.choice(FAMILIES)
        self.seen = Statistics()
        self.told: list[str] = []
        self.names, self.merged, self.hooked = ["default"], False, []
        self.loads, self.base_trains = 0, False
        self.ended = False
        self.theirs_together: list[float] = []  # PEFT's error in 16 bits over all tensors of each call so far

    # --- draws

    @property
    def nf4(self) -> bool:
        return self.base.startswith("nf4")

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
        """Draws architecture, sizes, base and method, and makes the two models."""
        rng = self.rng
        self.method, self.base = self.pick(METHODS), self.pick(BASES)
        self.dtype = next((dtype for name, dtype in DTYPES.items() if name in self.base), torch.float32)
        # Where values are rounded to 16 bits, a router may choose another expert, and a ReLU may take the other side.
        # Cases with this rounding send each token to all experts, and have smooth activations.
        self.kbit = self.base == "bnb bfloat16" and self.maybe(0.3)  # The model is float32 except for the 4-bit layers.
        self.rounds = self.dtype is not torch.float32 or self.maybe(0.25)
        if self.rounds and self.family == "DistilBERT":  # the head of DistilBERT has a ReLU for every configuration
            self.family = "BERT"
        if self.rounds and self.family == "NLLB-MoE":  # NLLB-MoE cannot send each token to all experts
            self.family = "BART"
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
            except Exception as error:  # PEFT does not support the configuration; nothing is accelerated yet
                if attempt == 7:
                    raise RuntimeError(f"{self.family}: PEFT takes no configuration, the last one: {error}") from error
        prepared = ", prepared for k-bit training" if self.kbit else ""
        self.tell(f"{self.family}, {self.method} over {self.base}{prepared}, {self.sizes}, {changed(self.config)}"
                  + ("" if self.autocast_adapters else ", adapters in the base's dtype"))  # fmt: skip
        self.drops = getattr(self.config, "lora_dropout", 0.0) > 0
        self.seen.counts.update([f"family {self.family}", f"method {self.method}", f"base {self.base}"])

    def fresh(self, dense: bool = False) -> nn.Module:
        """Returns the model without an adapter. Bases for peft_ext's NF4 are still dense, because PEFT's DoRA cannot
        start from an NF4Linear.
        """
        model = in_dtype(self.architecture.build(self.model_seed), self.dtype)
        if self.base.startswith("bnb") and not dense:
            # bitsandbytes' own kernels are wrong if a row is not a multiple of a block.
            spared = {id(layer) for name, layer in model.named_modules() if set(name.split(".")) & apart(model)}
            model = quantize(
                model, self.base, (), only=lambda linear: linear.in_features % 64 == 0 and id(linear) not in spared
            )
            if self.kbit:
                model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            for module in model.modules():
                if isinstance(module, bnb.nn.Linear4bit):
                    # bitsandbytes repacks weights in evaluation, and a layer with repacked weights does not train.
                    module.support_avx512bf16_for_cpu = False
                    if module.bias is not None:  # bitsandbytes casts the bias permanently in the first call
                        module.bias.data = module.bias.data.to(module.compute_dtype)
        return model

    def adapted(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(self.model_seed)
        model, config = self.fresh(), copy.deepcopy(self.config)
        # Stock PEFT has no DoRA on experts: the stock model uses our wrapper's unfused code.
        register_layers(config, model)
        model = get_peft_model(model, config, autocast_adapter_dtype=self.autocast_adapters)
        stir(model, "default", torch.Generator().manual_seed(self.model_seed))
        fused = copy.deepcopy(model)
        if self.nf4:
            skip = tuple(apart(model.base_model.model))
            peft_ext.quantize_nf4(
                fused, blocksize=2 ** (5 + self.model_seed % 3), double_quant=self.model_seed % 2 == 0, skip=skip,
                progress=False,
            )  # fmt: skip
            model = peft_ext.dequantize_nf4(copy.deepcopy(fused), progress=False)
        return model, peft_ext.accelerate(fused)

    def draw_config(self, method: str, plain: bool = False) -> PeftConfig:
        """Draws a configuration. With ``plain``, linear layers whose names start with gate, up or down are targets only
        if there is no other linear layer. ``plain`` is for a model for which PEFT has refused three configurations.
        """
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
        stacked = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "experts" in name]
        if stacked and common["lora_dropout"] == 0 and self.maybe():
            common["target_parameters"] = sorted({".".join(name.split(".")[-3:]) for name in stacked})
        if method == "DoRA":
            return LoraConfig(**common, use_dora=True)
        if self.maybe(0.15) and "target_parameters" not in common:
            common["lora_bias"] = True
        elif self.base == "float32" and self.maybe(0.4):
            common["init_lora_weights"] = rng.choice(("gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal"))
            if common["init_lora_weights"] == "orthogonal" and r % 2:
                common["r"] = r + 1
        extra = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        if self.maybe(0.1) and extra and common["init_lora_weights"] in (True, False):
            common["target_modules"] = [*targets, rng.choice(extra)]
        if self.maybe(0.1):
            common["layers_to_transform"] = [0]
        if self.maybe(0.1) and len(targets) > 1:
            common["exclude_modules"] = rng.sample(targets, 1)
        return LoraConfig(**common)

    # --- both models

    def attempt(self, what: str, do: Callable[[nn.Module], Any]) -> Optional[list[Any]]:
        """Returns the results of PEFT's model and of the accelerated model; None if both raise the same error."""
        results, errors = [], []
        for model in (self.stock, self.fused):
            try:
                results.append(do(model))
                errors.append(None)
            except Exception as error:
                errors.append(error)
        return results if self.allowed(what, errors) else None

    def both(self, what: str, do: Callable[[nn.Module], Any], compare_state: bool = True) -> bool:
        """Applies an action to both models, which may return another model. Returns False if both models raise."""
        seed = self.new_seed()

        def seeded(model: nn.Module) -> Any:
            torch.manual_seed(seed)
            return do(model)

        if (results := self.attempt(what, seeded)) is None:
            return False
        if isinstance(results[0], nn.Module):
            self.stock, self.fused = results
        if compare_state:
            self.compare_state(what)
        return True

    def allowed(self, what: str, errors: list[Optional[Exception]]) -> bool:
        """Returns whether both models did the action; raises Failed where the errors of the models differ.

        Returns False where both models raise alike, and for a few known errors of one model, after which the case ends.
        """
        theirs, ours = errors
        if theirs is None and ours is None:
            return True
        # PEFT has no code for an adapter on NF4 experts, so peft_ext raises if hooks keep the experts from being fused.
        if "NF4 experts, and this one is not fused: hooks on" in str(ours):
            self.seen.counts["hooks on NF4 experts"] += 1
            self.ended = True
            return False
        if theirs is None and "compress_statistics" in str(ours):
            # A pickled and copied Params4bit is a plain parameter until bitsandbytes' own forward has run over it.
            self.ended = True
            return False
        if theirs is None:
            trace = "".join(traceback.format_exception(ours)[-3:])
            raise Failed(f"{what}: PEFT does it, accelerated {type(ours).__name__}: {ours}\n{trace}")
        self.seen.counts["refused by PEFT"] += 1
        # bitsandbytes forbids an in-place change of its 4-bit product. The accelerated model allows the change, and may
        # raise a later error.
        if ours is None or "MatMul4Bit is a view" in str(theirs):
            self.tell(f"  only PEFT refuses: {type(theirs).__name__}: {first_line(theirs)}")
            self.seen.counts["refused by PEFT alone"] += 1
            self.ended = True
            return False
        # peft_ext's error has another text, which names the argument.
        if "shapes cannot be multiplied" in str(theirs) and isinstance(ours, ValueError):
            return False
        if type(theirs) is not type(ours) or plain(theirs) != plain(ours):
            raise Failed(f"{what}: PEFT refuses with {type(theirs).__name__}: {first_line(theirs)}; accelerated with "
                         f"{type(ours).__name__}: {first_line(ours)}")  # fmt: skip
        self.tell(f"  both refuse: {type(theirs).__name__}: {first_line(theirs)}")
        return False

    def compare_state(self, what: str) -> None:
        """Tests that parameters and buffers are bitwise equal, and that the same parameters train.

        NF4 weights are left out. A few known roundings of PEFT and bitsandbytes are allowed and then removed.
        """
        theirs, ours = (
            dict(model.named_parameters()) | dict(model.named_buffers()) for model in (self.stock, self.fused)
        )
        for name, wanted in theirs.items():
            found = ours.get(name)
            if found is None:
                raise Failed(f"{what}: accelerated has no {name}")
            if self.nf4 and found.dtype is torch.uint8:
                continue
            if found.requires_grad != wanted.requires_grad:
                raise Failed(f"{what}: {name}.requires_grad is {found.requires_grad}, PEFT's {wanted.requires_grad}")
            if self.nf4 and self.merged:
                continue
            if self.nf4 and "lora_" in name and found.shape == wanted.shape:
                # PEFT casts a new adapter to the base's dtype, but NF4 bytes do not show the dtype of the base. DoRA's
                # magnitude starts from a norm, which is summed in another order over NF4.
                if distance(found, wanted) <= 4e-3 * wanted.double().norm().item():
                    found.data = wanted.data.clone()
            if self.base.startswith("bnb") and name.endswith("base_layer.bias") and found.dtype != wanted.dtype:
                # bitsandbytes' own forward casts the bias permanently, before the unmerge subtracts from it.
                if distance(found, wanted) <= torch.finfo(torch.bfloat16).eps * wanted.double().norm().item():
                    found.data = wanted.data.clone()
            require_alike(what, name, found, wanted)
            if not torch.equal(found.detach().nan_to_num(), wanted.detach().nan_to_num()):
                raise Failed(f"{what}: {name} is {distance(found, wanted):.1e} off PEFT's")
        if not self.nf4 and ours.keys() != theirs.keys():
            raise Failed(f"{what}: accelerated has {sorted(ours.keys() - theirs.keys())} too")

    def share_masks(self, probe: Probe) -> None:
        """Makes PEFT's dropout draw as the operator does in each fused layer, so that both drop the same elements.

        For a DoRA in float32 over 4-bit layers that compute in 16 bits, only parts of the layer are fused and the
        dropout is PyTorch's.
        """
        with torch.autocast("cpu", torch.bfloat16, enabled=probe.autocast):
            explained = peft_ext.explain(self.fused)
        fused = {row.name: row.fused for row in explained.rows}
        heads = {row.name for row in explained.blocks if row.fused}  # heads with an adapter keep PEFT's dropout
        for name, layer in tuners(self.stock).items():
            parts = self.kbit and not probe.autocast and isinstance(layer.get_base_layer(), bnb.nn.Linear4bit)
            for adapter, dropout in getattr(layer, "lora_dropout", {}).items():
                if not isinstance(dropout, nn.Identity):
                    alike = fused.get(name) and not (parts and adapter in layer.lora_variant)
                    kind = PhiloxDropout if alike and name not in heads else nn.Dropout
                    layer.lora_dropout[adapter] = other = kind(dropout.p).train(dropout.training)
                    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                        setattr(other, hooks, getattr(dropout, hooks))

    def share_own_masks(self) -> None:
        """Makes dropouts of the stock model draw as the operator does where the accelerated model's are fused."""
        fused = {row.name for row in peft_ext.explain(self.fused).blocks if row.kind == "dropout" and row.fused}
        for name, module in list(self.stock.named_modules()):
            if type(module) in (nn.Dropout, OwnDropout) and "lora_dropout" not in name:
                kind = OwnDropout if name in fused else nn.Dropout
                parent, _, child = name.rpartition(".")
                setattr(self.stock.get_submodule(parent), child, kind(module.p).train(module.training))

    def call(self, probe: Probe) -> Optional[list[Parts]]:
        """Returns the values of PEFT's model and of the accelerated model; None if both models raise."""
        self.tell(f"  {probe}")
        for model in (self.stock, self.fused):
            model.train(probe.training)
        self.share_own_masks()
        if self.drops:
            self.share_masks(probe)
        return self.attempt(str(probe), lambda model: measure(model, self.batch, probe, self.dtype))

    def probe(self, probe: Probe) -> bool:
        """Calls both models and compares the values; returns False if both models raise."""
        if (found := self.call(probe)) is None:
            return False
        rows = peft_ext.explain(self.fused).rows
        self.seen.counts.update(
            {"layers": len(rows), "fused layers": sum(row.fused for row in rows), "calls compared": 1}
        )
        # A merge into NF4 rounds the weight to 4 bits again; a merge into PEFT's dense twin does not.
        if not (self.merged and self.nf4):
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
            if wanted is not None:
                require_alike(str(probe), name, ours[name], wanted)
        pairs = {name: (ours[name], wanted) for name, wanted in theirs.items() if wanted is not None and wanted.numel()}
        if not probe.own_loss:
            del pairs["loss"]  # the loss is a sum of terms of either sign, and each term is compared
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
        largest = max(largest, 1.0)  # if only a key trains and there is one key, all gradients are only rounding
        for name in far:
            if not exact or not exact[name].isfinite().all():  # some models can't run in float64 because of their masks
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
            # All tensors of a call depend on one loss, so that the errors of a call are small or large together. PEFT's
            # errors in other calls of the model show the usual size of errors.
            self.theirs_together.append(all_theirs)
            usual_all = max(all_theirs, statistics.median(self.theirs_together))
            if not all_ours <= ROUNDED_ALL * usual_all + ROUNDED_FLOOR * eps:
                raise Failed(f"{probe}: {len(several)} tensors together are {all_ours:.1e} off float32, PEFT's "
                             f"{all_theirs:.1e}, {usual_all:.1e} over the case")  # fmt: skip
            if all_theirs > 0 and all_ours > 0:
                self.seen.rounded.append(math.log(all_ours / all_theirs))


# --- what is said -----------------------------------------------------------------------------------------------------


def changed(config: PeftConfig) -> str:
    """Returns the parts of a configuration that differ from the defaults."""
    default = type(config)() if not isinstance(config, AdaLoraConfig) else AdaLoraConfig(total_step=1)
    return ", ".join(f"{name}={value!r}" for name, value in sorted(vars(config).items())
                     if not name.startswith("_") and value != getattr(default, name, None)
                     and name not in ("base_model_name_or_path", "task_type", "peft_version"))  # fmt: skip


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def plain(error: Exception) -> str:
    """Returns a message without addresses, folder names, the text of a module, and class or tensor names."""
    line = (str(error).strip().splitlines() or [""])[0]
    return re.sub(
        r"0x[0-9a-f]+|/\S*/(stock|fused)\b|\bFused(?=[A-Z])|\bNF4(?=Linear\b)|\[(CPU|torch\.)\w+(?= \[)", "", line
    )
