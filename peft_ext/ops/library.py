"""Declares operators to PyTorch, and keeps the registry of all operators of peft_ext.

:func:`define` declares an operator's schema, reference, fake implementation and family (the operators whose kernels are
proved together). :func:`proof` declares the calls that prove a family's kernels on new hardware,
:func:`register_autograd` declares the backward, and :func:`public` declares the function that users call.

The native code only adds kernels for the CPU and CUDA dispatch keys. The reference is registered for every backend:
without the native code, and on a device without a kernel, the dispatcher calls the reference.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Optional, TypeVar

import torch

from .._ops import NAMESPACE

LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# The part of a schema that declares a frozen weight: dense (the optionals are None, layout 0) or packed (see
# PackedWeight.op_args). The schema declares the tensors of a weight one by one and encodes the format in the integer
# ``layout``, because a list of tensors and a string would take more time in each call.
WEIGHT = "Tensor weight, Tensor? part1, Tensor? part2, Tensor? part3, Tensor? part4, int layout, SymInt[] shape"


def is_dense(weight: Sequence[Any]) -> bool:
    """Returns whether the arguments of ``WEIGHT`` are a dense weight: ``layout`` is 0."""
    return weight[5] == 0


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operator:
    """One operator of the dispatcher, ``peft_ext::<name>``.

    Attributes:
        reference: the function that runs where no kernel is registered.
        family: name of a group of operators whose kernels are proved (compared with the reference) together, and
            replaced by the reference together.
        composed: True: the operator has no kernel of its own, because its reference, which calls other operators, runs
            on every device.
        cuda: whether csrc has a CUDA kernel of the operator. For an operator without a CUDA kernel, PyTorch's function,
            or the reference, runs on a GPU.
        inner: True: no public function calls the operator; other parts of the package call it, without a gradient and
            with arguments that they have checked.
    """

    name: str
    reference: Callable[..., Any]
    family: str
    composed: bool
    cuda: bool
    inner: bool = False


# The registry of peft_ext's operators in the dispatcher, by name. Code that needs a list of operators reads OPERATORS.
OPERATORS: dict[str, Operator] = {}

# Maps the name of a public function of peft_ext.ops to the main operators that the function calls, in its forward and
# backward.
PUBLIC: dict[str, tuple[str, ...]] = {}

# Maps a family to the function that yields the calls which prove the family's kernels on new hardware, see
# :func:`proof`.
PROOFS: dict[str, Callable[[Any], Iterator[tuple[str, tuple]]]] = {}


def define(
    name: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    family: str,
    composed: bool = False,
    cuda: bool = True,
    inner: bool = False,
) -> None:
    """Declares ``peft_ext::<name>`` to PyTorch and to the registry; see :class:`Operator`.

    ``fake`` returns empty results of the right shapes and dtypes, which torch.compile needs.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    reference = _outside_autocast(reference)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _with_finite_numbers(name, schema, fake), lib=LIBRARY)
    OPERATORS[name] = Operator(name, reference, family, composed, cuda and not composed, inner)


def proof(family: str) -> Callable[[_F], _F]:
    """Registers a generator of ``(operator, arguments)``: the calls that prove a family's kernels on new hardware.

    The generator is a function of one argument, a :class:`.proof_inputs.ProofInputs`. On a GPU, the first call that the
    generator yields is also proved with large inputs.
    """

    def register(calls: _F) -> _F:
        PROOFS[family] = calls
        return calls

    return register


def public(*operators: str) -> Callable[[_F], _F]:
    """Registers a public function with the main operators that the function calls, in its forward and backward."""

    def register(function: _F) -> _F:
        PUBLIC[function.__name__] = operators
        return function

    return register


def _with_finite_numbers(name: str, schema: str, fake: Callable) -> Callable[..., Any]:
    """Returns a fake that also checks the operator's float arguments.

    While torch.compile traces, :func:`.checks.check_scale` checks nothing, but the fake sees those numbers that are
    constants.
    """
    parts = [part.split() for part in schema.split(" -> ")[0].strip("()").split(", ")]
    numbers = [(at, part[-1]) for at, part in enumerate(parts) if part[0] in ("float", "float[]")]

    @functools.wraps(fake)
    def run(*args: Any) -> Any:
        for at, argument in numbers:
            for value in args[at] if isinstance(args[at], (list, tuple)) else (args[at],):
                # A symbol of torch.compile is no float, and is not checked.
                known, is_p = isinstance(value, float), argument == "dropout_p"
                if known and not (0 <= value < 1 if is_p else math.isfinite(value)):
                    wanted = "0 <= p < 1" if is_p else "a finite number"
                    raise ValueError(f"{name}: {argument} is {value!r}, wanted {wanted}")
        return fake(*args)

    return run


def register_autograd(
    name: str, backward: Callable, *, setup_context: Callable, trained: Optional[Sequence[int]] = None
) -> Callable[..., Any]:
    """Registers an operator's backward, and returns a function that calls the operator with all its arguments.

    torch.compile and tensor subclasses use the backward that torch.library registers. Eager calls on plain tensors
    bypass torch.library's autograd, which takes as long as the rest of the Python code before a kernel: an eager call
    that may need gradients goes through an autograd Function that ``register_autograd`` makes, and any other eager call
    goes to the kernel directly. ``register_autograd`` does not support operators that take lists of tensors.

    ``trained``: the positions of the arguments that can have a gradient, for an operator of which only the first output
    is differentiable. In an eager call autograd then sees only the arguments at ``trained``, because each argument
    costs about a microsecond. With ``trained``, the returned function returns only the operator's first output, and
    ``setup_context`` and ``backward`` read ``ctx.needs``, which has an entry for each argument, instead of
    ``ctx.needs_input_grad``.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    kernel = below_autograd(op)
    if trained is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=_noting_needs(setup_context))
        return _first_output(op, kernel, backward, setup_context, trained)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context)

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    apply = _function(name, forward, backward)

    def call(*args: Any) -> Any:
        if not is_eager(args[0]):
            return op(*args)
        if not torch.is_grad_enabled():
            return kernel(*args)
        return apply(*args)

    return call


def _function(name: str, forward: Callable, backward: Callable) -> Callable[..., Any]:
    """Returns the ``apply`` of a new autograd Function.

    The returned ``apply`` is the C++ method of the base class. PyTorch's Python ``apply``, which is not used, supports
    torch.func's transforms and would take a tenth of the time of an operator's eager call.
    """
    made = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return super(torch.autograd.Function, type(name, (torch.autograd.Function,), made)).apply


def _noting_needs(setup_context: Callable) -> Callable[..., None]:
    """Returns a ``setup_context`` for torch.library. The returned function marks all outputs but the first as not
    differentiable, sets ``ctx.needs`` (which inputs need a gradient) and calls the operator's setup_context."""

    def run(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.needs = ctx.needs_input_grad[: len(inputs)]  # torch.library appends an argument of its own to the inputs
        setup_context(ctx, inputs, output)

    return run


def _first_output(
    op: Any, kernel: Callable, backward: Callable, setup_context: Callable, trained: Sequence[int]
) -> Callable[..., Any]:
    """Returns a function that calls the operator and returns its first output; see :func:`register_autograd`."""
    guard, taken = _guard(), operator.itemgetter(*trained)

    # The autograd Function takes all arguments as one tuple and, for autograd, the trainable arguments a second time.
    def forward(ctx: Any, args: tuple, *_tensors: Any) -> Any:
        with guard():
            output = op(*args)
        ctx.needs = needs = [False] * len(args)
        for position, need in zip(trained, ctx.needs_input_grad[1:], strict=True):
            needs[position] = need
        setup_context(ctx, args, output)
        return output[0]

    apply = _function(op.name(), forward, lambda ctx, grad: (None, *taken(backward(ctx, grad))))

    def call(*args: Any) -> Any:
        if type(args[0]) not in _PLAIN or torch.compiler.is_compiling():
            return op(*args)[0]
        if torch.is_grad_enabled():
            tensors = taken(args)
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return apply(args, *tensors)
        return kernel(*args)[0]

    return call


def _guard() -> Callable[[], Any]:
    """Returns the context manager within which calls bypass autograd.

    If torch lacks the private class ``torch._C._AutoDispatchBelowAutograd``, the context manager does nothing, and
    calls are slower and still right.
    """
    return getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def below_autograd(op: Callable) -> Callable[..., Any]:
    """Returns a function that calls the operator below autograd, so that autograd records nothing."""
    guard = _guard()

    def kernel(*args: Any) -> Any:
        with guard():
            return op(*args)

    return kernel


def is_eager(x: torch.Tensor) -> bool:
    """Returns whether a call with the argument x is an eager call on a plain tensor."""
    return type(x) in _PLAIN and not torch.compiler.is_compiling()


def records_graph(x: torch.Tensor) -> bool:
    """Returns whether a call on x is an eager call that autograd may record."""
    return is_eager(x) and torch.is_grad_enabled()


def _outside_autocast(reference: Callable) -> Callable:
    """Returns a function that runs the reference without autocast, because autocast would compute the reference's
    float32 products in 16 bits."""

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return reference(*args)

    return run


def by_reference(reference: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Calls a function of ``peft_ext.reference`` without autocast, for operands that no kernel takes, such as float64.

    PyTorch's autograd differentiates the result.
    """
    device = args[0].device.type
    # torch.autocast raises an error for the meta device, on which no product is computed.
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        return reference(*args, **kwargs)


def tokens(x: torch.Tensor) -> int | torch.SymInt:
    """Returns T, the number of tokens of x: the product of all sizes of x but the last one."""
    count = 1
    for size in x.shape[:-1]:
        count = count * size
    return count


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Returns whether a kernel of ``peft_ext::<name>`` is registered for a dispatch key such as "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key)
