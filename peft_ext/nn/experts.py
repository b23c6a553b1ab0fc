"""The experts of a mixture over NF4 weights, and the way of tokens through experts.

A mixture's experts are one module of transformers with two parameters of three dimensions. :class:`NF4Experts` is a
mixin over that module's class: :func:`nf4_experts` swaps the class and the parameters, and :func:`dense_experts` is the
way back.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..weight import NestedAbsmax, NF4Weight
from .nf4 import keeping_bits

__all__ = [
    "NF4Experts",
    "adapter_fields",
    "computing",
    "dense_experts",
    "expert_parameters",
    "first_parameter",
    "gate",
    "hold_nf4",
    "is_computing",
    "is_stored_transposed",
    "nf4_experts",
    "route",
    "routes",
]

# What transformers' decorator for experts leaves on their module.
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
_SCALES = ("absmax", "nested_absmax", "nested_code", "nested_offset")
_Run = Callable[[Tensor, Tensor], Tensor]


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the first and the second parameter of a mixture's experts; () of any other module."""
    if is_llama4(module) or all(name in module.__dict__ for name in _DECLARED):
        return first_parameter(module), "down_proj"
    return ()


# What PEFT takes in a model with experts for the experts' own names, or the router's, wherever else they stand.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def adapter_fields(model: nn.Module, method: str) -> dict[str, Any]:
    """Returns what a low-rank method's configuration says for a model with experts, by a name of
    :data:`peft_ext.methods.METHODS`; {} for any other model or method.

    LoRA and DoRA adapt the experts, and each method the linear layers that have no name of theirs; the router, which
    PEFT would adapt by "all-linear" in some models, stays as it is. Beside parameters PEFT has no dropout.
    """
    held = [f"{name}.{parameter}" for name, module in model.named_modules() for parameter in expert_parameters(module)]
    if not held or method not in ("lora", "rslora", "qlora", "dora", "adalora"):
        return {}
    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fields: dict[str, Any] = {"target_modules": sorted(linears - _NAMES_OF_EXPERTS - {"lm_head"})}
    if method != "adalora":
        # What follows the number of the layer is the same in all.
        fields["target_parameters"] = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in held})
        fields["lora_dropout"] = 0.0
    return fields


def is_llama4(module: nn.Module) -> bool:
    """Returns whether the module is Llama 4's experts, which get every token each."""
    return any(kind.__name__ == "Llama4TextExperts" for kind in type(module).__mro__)


def first_parameter(experts: Any) -> str:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def is_stored_transposed(experts: Any) -> bool:
    """Returns whether the dense parameters are stored ``[E, K, N]``."""
    return is_llama4(experts) or experts.is_transposed


# --- the way of tokens ------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Rows of x [T, K] in the order of experts, each as often as it has experts; dX sums them in the tokens' order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = x.shape[0]
        return x.index_select(0, order // (order.shape[0] // x.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(ctx.tokens, -1, grad.shape[1]).sum(1), None, None


class _Order(torch.autograd.Function):
    """Rows [S, N] in another order: ``order`` and ``inverse`` undo one another."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return y.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def routes(experts: nn.Module, x: Tensor, given: tuple) -> bool:
    """Returns whether the forward of ``experts`` was called as it should be: with x and, but for Llama 4's, each
    token's experts ``[T, k]`` and their weights."""
    if x.dim() != 2:
        return False
    if is_llama4(experts):
        return not given
    if len(given) != 2 or not all(isinstance(value, Tensor) for value in given):
        return False
    index, weights = given
    fits = index.dim() == 2 and index.shape == weights.shape and index.shape[0] == x.shape[0] and index.shape[1] > 0
    return fits and not index.is_floating_point() and weights.is_floating_point()


def route(experts: Any, x: Tensor, given: tuple, run: _Run) -> Tensor:
    """Returns what experts make of tokens ``[T, H]``: sorted by expert they go through ``run(rows, offsets)``, times
    the routing weights, and come back in order, summed over a token's experts.

    A number behind the last expert's, as expert parallelism has it, is no expert's.
    """
    count = experts.num_experts
    if is_llama4(experts):
        return run(x, torch.arange(1, count + 1, device=x.device) * (x.shape[0] // count))
    index, weights = given
    if x.shape[0] == 0:
        return run(x, torch.zeros(count, dtype=torch.int64, device=x.device))
    chosen = index.reshape(-1)
    order = chosen.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    counts = chosen.new_zeros(count + 1, dtype=torch.int64).scatter_add_(0, chosen.long(), torch.ones_like(order))
    offsets = counts[:count].cumsum(0)
    rows = run(_Gather.apply(x, order, inverse), offsets)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    rows = _Order.apply(rows * _Order.apply(weights.reshape(-1, 1), order, inverse), inverse, order)
    return rows.view(x.shape[0], -1, rows.shape[1]).sum(1).to(x.dtype)


def gate(experts: Any, rows: Tensor) -> Tensor:
    """Returns what the experts compute between their two layers, by their own functions."""
    if not getattr(experts, "has_gate", True):
        return experts.act_fn(rows)
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(rows)
    half, up = rows.chunk(2, dim=-1)
    return experts.act_fn(half) * up


_COMPUTING: ContextVar[tuple[Any, Optional[_Run]]] = ContextVar("_COMPUTING", default=(None, None))


@contextmanager
def computing(experts: NF4Experts, run: _Run) -> Iterator[None]:
    """Within, the forward of ``experts`` is ``run(rows, offsets)``, with the adapters of wrappers around them: what
    hooks, of the wrappers or of the experts, are called around."""
    token = _COMPUTING.set((experts, run))
    try:
        yield
    finally:
        _COMPUTING.reset(token)


def _computation(experts: Any) -> Optional[_Run]:
    of, run = (None, None) if torch.compiler.is_compiling() else _COMPUTING.get()
    return run if of is experts else None


def is_computing(experts: nn.Module) -> bool:
    """Returns whether :func:`computing` is under way for these experts."""
    return _computation(experts) is not None


# --- NF4 --------------------------------------------------------------------------------------------------------------


class NF4Experts:
    """A mixture's experts with frozen NF4 weights: a mixin over their class in transformers, made at run time.

    Each parameter is a uint8 parameter ``[E, bytes]`` of the codes of every expert's ``[N, K]``, with buffers
    ``<name>_absmax`` and, with double quantization, ``<name>_nested_absmax``, ``<name>_nested_code`` and
    ``<name>_nested_offset``: for each expert bitsandbytes' layout of a weight of its own, see
    :meth:`peft_ext.NF4Weight.stack`. Casting to another float dtype leaves codes and scales as they are. PEFT's
    ``target_parameters`` adapts them; :func:`peft_ext.accelerate` runs the adapters.
    """

    stock_class: type
    blocksize: int
    quant_dtype: torch.dtype
    nf4_shapes: dict[str, torch.Size]  # (E, N, K), by parameter

    def nf4(self, name: str) -> NF4Weight:
        """Returns a parameter as the weight ``(E, N, K)``, of the same memory."""
        held = {scale: self._buffers[f"{name}_{scale}"] for scale in _SCALES}
        nested = None
        if held["nested_absmax"] is not None:
            nested = NestedAbsmax(held["nested_absmax"], held["nested_code"], held["nested_offset"])
        return NF4Weight(self._parameters[name].data, held["absmax"], self.nf4_shapes[name], self.quant_dtype,
                         self.blocksize, nested, stacked=True)  # fmt: skip

    def set_nf4(self, name: str, weight: NF4Weight) -> None:
        """Holds a stacked weight as the parameter ``name``, without a copy."""
        self.__dict__.setdefault("nf4_shapes", {})[name] = weight.shape
        self._parameters[name] = nn.Parameter(weight.packed.view(weight.shape[0], -1), requires_grad=False)
        held = weight.tensors()
        for scale in _SCALES:
            self.register_buffer(f"{name}_{scale}", held.get(scale))

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in self.__dict__.get("nf4_shapes", ()):
            # What PEFT reads the sizes of a parameter from where it does not lie as it is: that of the dense one.
            experts, n, k = self.nf4_shapes[name]
            value.ds_shape = torch.Size((experts, k, n) if is_stored_transposed(self) else (experts, n, k))
        return value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        if not routes(self, x, given):
            raise ValueError(
                f"{self.stock_class.__name__}: x has shape {tuple(x.shape)} and came with {len(given)} arguments more, "
                "wanted tokens [T, H], their experts [T, k] and weights [T, k]"
            )
        first, second = expert_parameters(self)

        def run(rows: Tensor, offsets: Tensor) -> Tensor:
            h = gate(self, ops.experts_linear(rows, self.nf4(first), offsets, self.bias_of(first, rows)))
            return ops.experts_linear(h, self.nf4(second), offsets, self.bias_of(second, h))

        return route(self, x, given, _computation(self) or run)

    def bias_of(self, name: str, rows: Tensor) -> Optional[Tensor]:
        bias = self._parameters[f"{name}_bias"] if getattr(self, "has_bias", False) else None
        return None if bias is None else bias.to(rows.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocksize={self.blocksize}".removeprefix(", ")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = (*self._buffers.values(), *(self._parameters[name] for name in self.nf4_shapes))
        return super()._apply(keeping_bits(fn, held), recurse)

    def get_extra_state(self) -> Tensor:
        """The bytes of JSON that say what the codes are."""
        shapes = {name: list(shape) for name, shape in self.nf4_shapes.items()}
        dtype = str(self.quant_dtype).removeprefix("torch.")
        about = {"quant_type": "nf4", "blocksize": self.blocksize, "dtype": dtype, "shapes": shapes}
        return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        came, own = (json.loads(bytes(value.tolist())) for value in (state, self.get_extra_state()))
        dtype = getattr(torch, str(came.get("dtype")), None)  # of the weights that were quantized: the state's, too
        if {**came, "dtype": ""} != {**own, "dtype": ""} or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.stock_class.__name__}: the state is of {came}, wanted {own}")
        self.quant_dtype = dtype

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class was made at run time: it is made again from the model's.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.stock_class,), *state


def _new(stock: type) -> Any:
    kind = _class(stock)
    return kind.__new__(kind)


@functools.cache
def _class(stock: type) -> type:
    held = {"stock_class": stock, "__doc__": stock.__doc__, "__module__": stock.__module__}
    return type(stock.__name__, (NF4Experts, stock), held)


def nf4_experts(experts: Any, blocksize: int = 64, double_quant: bool = True) -> None:
    """Quantizes a mixture's experts in place, expert by expert; the peak is the module and its NF4 weights."""
    checks.check_blocksize("quantize_nf4", blocksize)
    found = {}
    for name in expert_parameters(experts):
        dense = experts._parameters[name].detach()
        dense = dense.transpose(1, 2) if is_stored_transposed(experts) else dense
        found[name] = NF4Weight.stack([ops.nf4_quantize(one.contiguous(), blocksize, double_quant) for one in dense])
    hold_nf4(experts, found)


def hold_nf4(experts: Any, weights: dict[str, NF4Weight]) -> None:
    """Makes dense experts :class:`NF4Experts` of these weights ``(E, N, K)``, by the parameters' names."""
    first = next(iter(weights.values()))
    experts.__class__ = _class(type(experts))
    experts.blocksize, experts.quant_dtype = first.blocksize, first.dtype
    for name, weight in weights.items():
        experts.set_nf4(name, weight)


def dense_experts(experts: Any, dtype: Optional[torch.dtype] = None) -> None:
    """Undoes :func:`nf4_experts`, but for what quantizing moved."""
    for name in list(experts.nf4_shapes):
        dense = experts.nf4(name).dequantize(dtype)
        dense = dense.transpose(1, 2).contiguous() if is_stored_transposed(experts) else dense
        experts._parameters[name] = nn.Parameter(dense, requires_grad=False)
        for scale in _SCALES:
            del experts._buffers[f"{name}_{scale}"]
    for name in ("nf4_shapes", "blocksize", "quant_dtype"):
        del experts.__dict__[name]
    experts.__class__ = experts.stock_class
