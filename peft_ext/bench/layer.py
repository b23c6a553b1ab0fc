"""Verifies one adapted layer's training step against float64 and times the step beside the stock layer's step.

The layer is a linear layer with a weight ``[hidden, hidden]``, in bfloat16 or in NF4 with double quantization, with a
float32 adapter and without dropout. A step is the forward and the backward of ``x [tokens, hidden]``. "Our layer" is
PEFT's layer after :func:`peft_ext.accelerate`; the stock layer is PEFT's layer with the same weights. All steps of a
layer use one weight, so that a cache may hold the weight from one step to the next.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops, reference
from ..nn import NF4Linear
from .timer import Contender, host_clock, interleave, median_ratios, quartile_ratios, verify

METHODS = ("lora", "dora", "ia3")  # methods whose adapted layer this module can measure
BASES = ("bf16", "nf4")
OURS, FROZEN = "ours", "frozen layer"

# largest accepted relative error of our layer (Frobenius norm); bfloat16's rounding alone gives 2e-3 to 4e-3
_TOLERANCE = 1e-2
_SCALING = 2.0
_MIN_ROUNDS, _MAX_ROUNDS = 3, 101


class NotTimed(Exception):
    """Raised, before the layers of a case are timed, if peft_ext's layer would not run fused on this machine, or
    differs too much from the float64 result. The message has the reason, or the relative error."""


@dataclass(frozen=True)
class Result:
    """Times and errors of one layer's step. The keys of the mappings in a Result are the names of the contenders:
    peft_ext and its peers.

    Attributes:
        milliseconds: for each contender, the median time of its step.
        ratio: a contender's time divided by our layer's time, the median over rounds (above 1: our layer is faster).
        quartiles: first and third quartile over rounds of a contender's time divided by our layer's time.
        error: for each contender, the largest relative error to float64 over y and all gradients (Frobenius norm).
        absent: for each contender that could not run, the reason.
    """

    method: str
    base: str
    milliseconds: dict[str, float]
    ratio: dict[str, float]
    quartiles: dict[str, tuple[float, float]]
    error: dict[str, float]
    absent: dict[str, str]
    rounds: int


def measure_layer(method: str, base: str, hidden: int, tokens: int, rank: int, seconds: float) -> Result:
    """Times a layer's step in 3 to 101 rounds, which take about ``seconds`` in all. Raises NotTimed where peft_ext's
    layer would not run fused, and where the error of peft_ext's layer is too large."""
    from ..integrations.peft import explain

    problem = _Problem(method, base, hidden, tokens, rank)
    contenders: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    exact = problem.exact  # contenders with one object as float64 function share the function's result
    for name in (OURS, stock_name(base)):
        try:
            layer = problem.layer(stock=name != OURS)
        except ImportError as error:
            missing[name] = str(error)
            continue
        if name == OURS and (reasons := [row.reason for row in explain(layer).rows if not row.fused]):
            raise NotTimed(f"{method} over {base} would not run fused here: {reasons[0]}")
        trained = {key: p for key, p in layer.named_parameters() if p.requires_grad}
        contenders[name] = Contender(problem.step(layer, trained), problem.outputs(trained), exact)
    errors, absent = verify(f"{method} over {base}", contenders, float("inf"))
    error = {name: max(by_output.values()) for name, by_output in errors.items() if isinstance(by_output, dict)}
    if not error[OURS] <= _TOLERANCE:
        raise NotTimed(f"{method} over {base} is off from float64 by {error[OURS]:.2g}: nothing was timed")
    weight = problem.dense()
    frozen = Contender(problem.step(lambda x: F.linear(x, weight), {}), lambda y: {}, "it has no adapter")
    there = {name: one for name, one in {**contenders, FROZEN: frozen}.items() if name not in absent}
    times = interleave({name: host_clock(one) for name, one in there.items()}, seconds, least=_MIN_ROUNDS,
                       most=_MAX_ROUNDS)  # fmt: skip
    return Result(
        method=method, base=base, milliseconds={name: 1e3 * statistics.median(taken) for name, taken in times.items()},
        ratio=median_ratios(times), quartiles=quartile_ratios(times), error=error, absent={**missing, **absent},
        rounds=len(times[OURS]),
    )  # fmt: skip


def stock_name(base: str) -> str:
    """Returns the name of the stock contender: the names of the libraries that compute the stock layer."""
    return "PEFT" if base == "bf16" else "PEFT + bitsandbytes"


def _config(method: str, rank: int) -> Any:
    from peft import IA3Config, LoraConfig

    if method == "ia3":
        return IA3Config(target_modules=["proj"], feedforward_modules=[])
    return LoraConfig(
        r=rank, lora_alpha=_SCALING * rank, lora_dropout=0.0, target_modules=["proj"], use_dora=method == "dora"
    )


class _Problem:
    """One measured case: a PEFT method over a base, with the inputs, the frozen weight and the adapter's values.

    The methods build PEFT's layers of the case, and compute the float64 result of the case.
    """

    def __init__(self, method: str, base: str, hidden: int, tokens: int, rank: int) -> None:
        self.method, self.base, self.rank, self.hidden = method, base, rank, hidden
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.draw = torch.Generator().manual_seed(0)
        self.x = self._normal(tokens, hidden).to(torch.bfloat16).requires_grad_()
        self.grad = self._normal(tokens, hidden).to(torch.bfloat16)
        self.weight = (0.02 * self._normal(hidden, hidden)).to(torch.bfloat16)
        self.nf4 = ops.nf4_quantize(self.weight, 64, True) if base == "nf4" else None
        self.values: dict[str, Any] = {}

    def _normal(self, *shape: int) -> Any:
        return torch.randn(*shape, generator=self.draw).to(self.device)

    def layer(self, stock: bool) -> Any:
        """Returns PEFT's layer in training mode, fused unless ``stock``.

        The base layer of an NF4 case is a Linear4bit or, without bitsandbytes, an NF4Linear. Raises ImportError for the
        stock layer of an NF4 case without bitsandbytes.
        """
        from ..integrations.bitsandbytes import to_linear4bit
        from ..model import get_peft_model

        holder = nn.Module()
        if self.nf4 is None:
            holder.proj = nn.Linear(self.hidden, self.hidden, bias=False, device="meta")
            holder.proj.weight = nn.Parameter(self.weight, requires_grad=False)
        else:
            holder.proj = NF4Linear.from_nf4(self.nf4)
            if find_spec("bitsandbytes") is not None:
                to_linear4bit(holder, torch.bfloat16)
            elif stock:
                raise ImportError("bitsandbytes is not installed")
        layer = get_peft_model(holder, _config(self.method, self.rank), accelerate=not stock).base_model.model.proj
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self._value(name, parameter))
        return layer.train()

    def _value(self, name: str, parameter: Any) -> Any:
        """Returns the value of a trainable parameter, which is equal in peft_ext's layer and in the stock layer.

        lora_B is not zero, and DoRA's magnitude and ``ia3_l`` differ from PEFT's initial values, so that no part of the
        computation is trivial.
        """
        if name not in self.values:
            drawn = self._normal(*parameter.shape)
            if "lora_A" in name:
                drawn *= (3 * self.hidden) ** -0.5
            elif "lora_B" in name:
                drawn *= 0.02
            else:  # the magnitude and ia3_l are drawn around PEFT's initial values
                drawn = parameter.float() * (1 + 0.1 * drawn)
            self.values[name] = drawn
        return self.values[name]

    def dense(self) -> Any:
        """Returns the bfloat16 weight that a layer multiplies with, dequantized for an NF4 case."""
        return self.weight if self.nf4 is None else reference.nf4_dequantize(self.nf4, torch.bfloat16)

    def exact(self) -> dict[str, Any]:
        """Returns y and the gradients in float64, from :mod:`peft_ext.reference` and autograd."""
        x, weight = self.x.detach().double().requires_grad_(), self.dense().double()
        held = {name: value.double().requires_grad_() for name, value in self.values.items()}
        if self.method == "ia3":
            y = reference.ia3_linear(x, weight, *held.values())
        else:
            lora = {part: next(value for name, value in held.items() if part in name) for part in ("lora_A", "lora_B")}
            if self.method == "dora":
                magnitude = next(value for name, value in held.items() if "magnitude" in name)
                y = reference.dora_linear(x, weight, *lora.values(), magnitude, scaling=_SCALING)
            else:
                y = reference.lora_linear(x, weight, *lora.values(), scaling=_SCALING)
        y.backward(self.grad.double())
        return {"y": y.detach(), "x": x.grad, **{name: value.grad for name, value in held.items()}}

    def step(self, forward: Callable[[Any], Any], parameters: dict[str, Any]) -> Callable[[], Any]:
        def run() -> Any:
            for leaf in (self.x, *parameters.values()):
                leaf.grad = None
            y = forward(self.x)
            y.backward(self.grad.to(y.dtype))  # PEFT's IA3 layer over bitsandbytes' Linear4bit returns float32
            return y

        return run

    def outputs(self, parameters: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
        """Returns a function that turns the return value of a step into the step's results by name: y, and the
        gradients of x and of the parameters."""
        return lambda y: {"y": y.detach(), "x": self.x.grad, **{name: p.grad for name, p in parameters.items()}}
