"""Packed weights for the experts of a mixture-of-experts model, and the routing of tokens to the experts.

In those mixture-of-experts models of transformers that peft_ext supports, all experts of one mixture are one module,
whose weights are two 3-dimensional parameters. :class:`NF4Experts` is a mixin that gives the class of an experts'
module NF4 weights, and :class:`peft_ext.nn.packed_experts.PackedExperts` is a mixin for weights in the layout of a
checkpoint. :func:`nf4_experts` replaces the class of the experts' module and quantizes the parameters;
:func:`dense_experts` restores the class and dequantizes the parameters.
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
from ..weights.nf4 import NestedAbsmax, NF4Weight
from ..weights.packed import PackedWeight
from .nf4 import keeping_bits

# Names of attributes that transformers' class decorator ``use_experts_implementation`` sets on an experts' module.
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")
_SCALES = ("absmax", "nested_absmax", "nested_code", "nested_offset")
_Run = Callable[[Tensor, Tensor], Tensor]


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the two weights of an experts module, or () for any other module."""
    if is_llama4(module) or all(name in module.__dict__ for name in _DECLARED):
        return first_parameter(module), "down_proj"
    return ()


# For some mixtures, PEFT takes a name of _NAMES_OF_EXPERTS in target_modules for a parameter of the experts or of the
# router, although layers outside of the experts may have this name too.
_NAMES_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_ROUTER = "router"  # "router" is a linear layer in Llama 4 and Phi-MoE, and the parent of a linear layer in Granite-MoE


def adapter_fields(model: nn.Module, method: str) -> dict[str, Any]:
    """Returns a dict of the fields that the PEFT configuration of ``method`` needs for a model with experts; {} for a
    model without experts.

    ``method`` is a name of :data:`peft_ext.methods.METHODS`; a method that is not low-rank gives {}. The low-rank
    methods except AdaLoRA adapt the experts' parameters. In a model with experts, each low-rank method adapts the
    linear layers too, except ``lm_head``, a ``router`` with its parts, and the layers whose name is in
    ``_NAMES_OF_EXPERTS``. PEFT's "all-linear" would adapt the router of some models. For the low-rank methods except
    AdaLoRA, the fields set lora_dropout to 0, because PEFT has no dropout for adapted parameters.
    """
    held = [f"{name}.{parameter}" for name, module in model.named_modules() for parameter in expert_parameters(module)]
    if not held or method not in ("lora", "rslora", "qlora", "dora", "adalora"):
        return {}
    paths = [name.split(".") for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = {path[-1] for path in paths if _ROUTER not in path}
    fields: dict[str, Any] = {"target_modules": sorted(linears - _NAMES_OF_EXPERTS - {"lm_head"})}
    if method != "adalora":
        # The part of a parameter's name after the layer's number is the same in all layers.
        fields["target_parameters"] = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in held})
        fields["lora_dropout"] = 0.0
    return fields


def is_llama4(module: nn.Module) -> bool:
    """Returns whether the module is the experts of Llama 4, where every expert gets its own copy of every token."""
    return any(kind.__name__ == "Llama4TextExperts" for kind in type(module).__mro__)


def first_parameter(experts: Any) -> str:
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def is_stored_transposed(experts: Any) -> bool:
    """Returns whether the dense parameters are stored transposed, ``[E, K, N]`` instead of ``[E, N, K]``."""
    return is_llama4(experts) or experts.is_transposed


# --- the routing of tokens --------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Gathers the rows of x [T, K] in the order of the experts, one row for each pair of a token and a chosen expert.

    The backward sums the gradients of all rows of a token.
    """

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
    """Permutes the rows of y [S, N] by ``order``. ``inverse`` is the inverse permutation of ``order``; the backward
    needs ``inverse``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return y.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def routes(experts: nn.Module, x: Tensor, given: tuple) -> bool:
    """Returns whether ``x`` and ``given``, the tuple of the arguments after x, are valid arguments of the forward of
    ``experts``.

    The arguments of the forward are x ``[T, H]``, the experts ``[T, k]`` of each token and the routing weights
    ``[T, k]``. Llama 4's experts have x as the only argument, so that ``given`` must be empty.
    """
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
    """Returns the output ``[T, H]`` of the experts for tokens x ``[T, H]``.

    The function ``route`` sorts the tokens by expert. For Llama 4, whose tokens are sorted and scaled already,
    ``route`` only calls ``run``. ``run(rows, offsets)`` computes the experts' outputs, which go through the module's
    ``post_expert_norm`` if it has one, are multiplied by the routing weights, put back in the order of the tokens, and
    summed over the experts of each token. The expert index ``num_experts``, which expert parallelism uses, stands for
    no expert.
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
    """Returns the input of the experts' second linear layer, computed from the first layer's output ``rows``: the
    activation of rows, or, if the experts have a gate, the activation of the gate half times the up half."""
    if not getattr(experts, "has_gate", True):
        return experts.act_fn(rows)
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(rows)
    half, up = rows.chunk(2, dim=-1)
    return experts.act_fn(half) * up


_COMPUTING: ContextVar[tuple[Any, Optional[_Run]]] = ContextVar("_COMPUTING", default=(None, None))


@contextmanager
def computing(experts: FrozenExperts, run: _Run) -> Iterator[None]:
    """Within the context, ``experts.forward`` computes the experts' outputs by ``run(rows, offsets)``, see
    :func:`route`, except under torch.compile.

    The forwards of PEFT's wrappers around ``experts`` still run, so that hooks of the wrappers and of the experts are
    called.
    """
    token = _COMPUTING.set((experts, run))
    try:
        yield
    finally:
        _COMPUTING.reset(token)


def _computation(experts: Any) -> Optional[_Run]:
    of, run = (None, None) if torch.compiler.is_compiling() else _COMPUTING.get()
    return run if of is experts else None


def is_computing(experts: nn.Module) -> bool:
    """Returns whether the code runs within :func:`computing` of ``experts``; under torch.compile, always False."""
    return _computation(experts) is not None


# --- packed weights ---------------------------------------------------------------------------------------------------


class FrozenExperts:
    """A mixture's experts with packed weights: a mixin that is added at run time to the experts' class of transformers.

    A subclass defines :meth:`frozen` and :meth:`frozen_shapes`, and stores a parameter's codes under the name of the
    dense parameter.
    """

    stock_class: type

    def frozen(self, name: str) -> PackedWeight:
        """Returns the parameter ``name`` as a packed weight ``(E, N, K)`` that shares the parameter's memory."""
        raise NotImplementedError

    def frozen_shapes(self) -> dict[str, torch.Size]:
        """Returns a dict that maps the name of each packed parameter to its dense shape ``(E, N, K)``."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name in ("gate_up_proj", "up_proj", "down_proj") and name in (shapes := self.frozen_shapes()):
            # PEFT reads a parameter's shape from the attribute ds_shape, if there is one. PEFT must read the dense
            # shape of packed experts, so the attribute holds the dense shape.
            experts, n, k = shapes[name]
            value.ds_shape = torch.Size((experts, k, n) if is_stored_transposed(self) else (experts, n, k))
        return value

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        if not routes(self, x, given):
            raise ValueError(
                f"{self.stock_class.__name__}: x has shape {tuple(x.shape)} and {len(given)} other arguments came, "
                "wanted tokens [T, H], their experts [T, k] and weights [T, k]"
            )
        first, second = expert_parameters(self)

        def run(rows: Tensor, offsets: Tensor) -> Tensor:
            for name in (first, second):
                # `_parameters` lacks the name of a weight that PEFT's forward has replaced by a parametrization.
                if name not in self._parameters:
                    raise RuntimeError(f"{self.stock_class.__name__}: PEFT adds its adapter to the dense weight, and "
                                       f"{name} is packed, wanted peft_ext.accelerate(model)")  # fmt: skip
            h = gate(self, ops.experts_linear(rows, self.frozen(first), offsets, self.bias_of(first, rows)))
            return ops.experts_linear(h, self.frozen(second), offsets, self.bias_of(second, h))

        return route(self, x, given, _computation(self) or run)

    def bias_of(self, name: str, rows: Tensor) -> Optional[Tensor]:
        bias = self._parameters[f"{name}_bias"] if getattr(self, "has_bias", False) else None
        return None if bias is None else bias.to(rows.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # Pickle can't find a class that was made at run time, so unpickling makes the class again from the stock class.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (type(self).mixin, self.stock_class), *state


class NF4Experts(FrozenExperts):
    """A mixture's experts with frozen NF4 weights: a mixin that is added at run time to the experts' class of
    transformers.

    Each of the two dense weights, for E experts ``[E, N, K]``, becomes a uint8 parameter ``[E, bytes]`` of NF4 codes,
    with the buffer ``<name>_absmax``; biases stay dense. Double quantization adds the buffers ``<name>_nested_absmax``,
    ``<name>_nested_code`` and ``<name>_nested_offset``. Each expert has the layout that bitsandbytes uses for one
    weight, see :meth:`peft_ext.NF4Weight.stack`. A cast of the module to another float dtype does not change codes and
    scales.
    PEFT's ``target_parameters`` adds adapters to the experts' parameters, and :func:`peft_ext.accelerate` fuses these
    adapters.
    """

    blocksize: int
    quant_dtype: torch.dtype
    nf4_shapes: dict[str, torch.Size]  # maps a parameter's name to its dense shape (E, N, K)

    def nf4(self, name: str) -> NF4Weight:
        """Returns the parameter ``name`` as an NF4 weight ``(E, N, K)`` that shares the parameter's memory."""
        held = {scale: self._buffers[f"{name}_{scale}"] for scale in _SCALES}
        nested = None
        if held["nested_absmax"] is not None:
            nested = NestedAbsmax(held["nested_absmax"], held["nested_code"], held["nested_offset"])
        return NF4Weight(self._parameters[name].data, held["absmax"], self.nf4_shapes[name], self.quant_dtype,
                         self.blocksize, nested, stacked=True)  # fmt: skip

    def set_nf4(self, name: str, weight: NF4Weight) -> None:
        """Sets the parameter ``name`` and its buffers to a stacked NF4 weight, without a copy."""
        self.__dict__.setdefault("nf4_shapes", {})[name] = weight.shape
        self._parameters[name] = nn.Parameter(weight.packed.view(weight.shape[0], -1), requires_grad=False)
        held = weight.tensors()
        for scale in _SCALES:
            self.register_buffer(f"{name}_{scale}", held.get(scale))

    def frozen(self, name: str) -> NF4Weight:
        return self.nf4(name)

    def frozen_shapes(self) -> dict[str, torch.Size]:
        return self.__dict__.get("nf4_shapes", {})

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocksize={self.blocksize}".removeprefix(", ")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        held = (*self._buffers.values(), *(self._parameters[name] for name in self.nf4_shapes))
        return super()._apply(keeping_bits(fn, held), recurse)

    def get_extra_state(self) -> Tensor:
        """Returns the format of the codes (type, blocksize, dtype and shapes) as JSON in a uint8 tensor."""
        shapes = {name: list(shape) for name, shape in self.nf4_shapes.items()}
        dtype = str(self.quant_dtype).removeprefix("torch.")
        about = {"quant_type": "nf4", "blocksize": self.blocksize, "dtype": dtype, "shapes": shapes}
        return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        came, own = (json.loads(bytes(value.tolist())) for value in (state, self.get_extra_state()))
        # Dtype from which the weights of the loaded state were quantized.
        dtype = getattr(torch, str(came.get("dtype")), None)
        if {**came, "dtype": ""} != {**own, "dtype": ""} or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.stock_class.__name__}: the state has the format {came}, wanted {own}")
        self.quant_dtype = dtype


def _new(mixin: type, stock: type) -> Any:
    kind = experts_class(mixin, stock)
    return kind.__new__(kind)


@functools.cache
def experts_class(mixin: type, stock: type) -> type:
    """Returns a subclass of ``mixin`` and of the experts' class ``stock``, with the name of ``stock``."""
    held = {"mixin": mixin, "stock_class": stock, "__doc__": stock.__doc__, "__module__": stock.__module__}
    return type(stock.__name__, (mixin, stock), held)


def nf4_experts(experts: Any, blocksize: int = 64, double_quant: bool = True) -> None:
    """Quantizes the experts of a mixture to NF4 in place, one expert at a time.

    The peak memory is about the memory of the dense module and of the NF4 weights together.
    """
    checks.check_blocksize("quantize_nf4", blocksize)
    found = {}
    for name in expert_parameters(experts):
        dense = experts._parameters[name].detach()
        dense = dense.transpose(1, 2) if is_stored_transposed(experts) else dense
        chosen, times = (dense[:1], len(dense)) if dense.is_meta else (dense, 1)  # without values, all are alike
        weights = [ops.nf4_quantize(one.contiguous(), blocksize, double_quant) for one in chosen]
        found[name] = NF4Weight.stack(weights * times)
    experts.__class__ = experts_class(NF4Experts, type(experts))
    experts.blocksize, experts.quant_dtype = blocksize, dense.dtype
    for name, weight in found.items():
        experts.set_nf4(name, weight)


# Attributes of NF4Experts and of PackedExperts that dense experts do not have.
_FROZEN_ATTRIBUTES = ("nf4_shapes", "blocksize", "quant_dtype", "packed_names", "extra", "compute_dtype", "note",
                      "_templates")  # fmt: skip


def dense_experts(experts: Any, dtype: Optional[torch.dtype] = None) -> None:
    """Turns :class:`FrozenExperts` back into dense experts. The dense weights are the dequantized weights, with the
    error of quantizing.

    Args: dtype: dtype of the dense weights; default: ``compute_dtype`` of packed experts, or the dtype from which the
    NF4 weights were quantized.
    """
    shapes, packed = list(experts.frozen_shapes()), experts.__dict__.get("packed_names", {})
    scales = [f"{name}_{scale}" for name in shapes for scale in _SCALES]
    scales += [name for names in packed.values() for name in names[1:] if name is not None]
    scales += experts.__dict__.get("extra", ())
    for name in shapes:
        weight = experts.frozen(name)
        dense = weight.dequantize(dtype or experts.__dict__.get("compute_dtype", weight.dtype))
        dense = dense.transpose(1, 2).contiguous() if is_stored_transposed(experts) else dense
        experts._parameters[name] = nn.Parameter(dense, requires_grad=False)
    for name in scales:
        experts._buffers.pop(name, None)
    for name in _FROZEN_ATTRIBUTES:
        experts.__dict__.pop(name, None)
    experts.__class__ = experts.stock_class
