"""Makes the inputs, weights and contenders that the comparisons of layers share.

A layer has ``x [T, K]`` and ``grad [T, N]`` in bfloat16, a frozen ``W [N, K]`` that is dense or packed (NF4, or a
format of :mod:`.packed_bases`), and float32 adapters, on the CPU or on a GPU. With "hot" weights each call of a layer
uses the same weight. With "rotating" weights the calls use copies of one weight in turn, which together fill
:data:`ROTATING_BYTES` bytes; the copies have equal values, so that one float64 result verifies every call. With
"rotating" weights, most comparisons also use copies of the adapters in turn.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, Generic, Optional, TypeVar, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_ext import NF4Weight, ops, reference
from peft_ext.bench.layer import stock_name
from peft_ext.weights import PackedWeight

from .harness import Comparison, Contender
from .packed_bases import PACKED

RANK, SCALING = 16, 2.0
COMPILE_RANDOM = "its dropout mask is torch.compile's own and can't be drawn again"
ROTATING_BYTES = 10**9

_Item = TypeVar("_Item")
Weight = Union[Tensor, PackedWeight]
Exact = Callable[[], dict[str, Tensor]]


class Turns(Generic[_Item]):
    """Gives a list's items in turn, and begins again after the last item."""

    def __init__(self, items: Iterable[_Item]) -> None:
        self.items = list(items)
        self._turn = -1

    def next(self) -> _Item:
        self._turn = (self._turn + 1) % len(self.items)
        return self.items[self._turn]


# --- inputs -----------------------------------------------------------------------------------------------------------


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _repeated(tensor: Tensor, count: int) -> list[Tensor]:
    """Returns ``count`` copies of ``tensor``, one after the other in one allocation; [``tensor``] if ``count`` is 1."""
    return list(tensor.expand(count, *tensor.shape).contiguous().unbind()) if count > 1 else [tensor]


@lru_cache(maxsize=1)
def _first(k: int, n: int, device: str) -> Tensor:
    return torch.randn(n, k, dtype=torch.bfloat16, generator=_generator(device), device=device) * 0.02


@lru_cache(maxsize=2)
def _first_nf4(k: int, n: int, double_quant: bool, device: str) -> NF4Weight:
    """Returns an NF4 weight that was quantized on the CPU, so that an error of the GPU's quantize kernel does not
    change the weights of other comparisons."""
    return ops.nf4_quantize(_first(k, n, device).cpu(), 64, double_quant).to(device)


# The cache keeps only the rotating copies of one weight, because the cases of one shape follow each other.
@lru_cache(maxsize=1)
def _dense_pool(k: int, n: int, least_bytes: int, device: str, base: str) -> list[Tensor]:
    first = _first(k, n, device).to(DTYPES[base])
    return _repeated(first, -(-max(1, least_bytes) // (first.numel() * first.element_size())))


@lru_cache(maxsize=1)
def _nf4_pool(k: int, n: int, least_bytes: int, double_quant: bool, device: str) -> list[NF4Weight]:
    first = _first_nf4(k, n, double_quant, device)
    count = -(-max(1, least_bytes) // first.nbytes)
    copies = {id(tensor): _repeated(tensor, count) for tensor in first.tensors().values()}
    return [first.map(lambda tensor, i=i: copies[id(tensor)][i]) for i in range(count)]


@lru_cache(maxsize=2)
def _first_packed(k: int, n: int, base: str, device: str) -> PackedWeight:
    return PACKED[base](_first(k, n, device).cpu()).to(device)


@lru_cache(maxsize=1)
def _packed_pool(k: int, n: int, least_bytes: int, base: str, device: str) -> list[PackedWeight]:
    first = _first_packed(k, n, base, device)
    count = -(-max(1, least_bytes) // first.nbytes)
    return [first, *(first.map(Tensor.clone) for _ in range(count - 1))]


@lru_cache(maxsize=1)
def _adapter_pool(k: int, n: int, rank: int, count: int, device: str) -> list[dict[str, Tensor]]:
    draw = _generator(device)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> list[Tensor]:
        return _repeated(torch.randn(*shape, generator=draw, device=device) * std + mean, count)

    # A has the variance of PEFT's initialization. B is not zero, so that an error in B's term shows.
    pools = {
        "lora_A": normal(rank, k, std=(3 * k) ** -0.5),
        "lora_B": normal(n, rank, std=0.02),
        "lora_E": normal(rank, std=1.0),
        "magnitude": normal(n, mean=0.02 * k**0.5, std=0.002 * k**0.5),
        "ia3_out": normal(n, mean=1.0, std=0.1),
        "ia3_in": normal(k, mean=1.0, std=0.1),
    }
    return [{name: pool[i].requires_grad_() for name, pool in pools.items()} for i in range(count)]


@lru_cache(maxsize=16)
def _exact_products(problem_key: tuple, base: str) -> tuple[Tensor, Tensor]:
    """Returns the products ``x Wᵀ`` and ``dY W`` in float64, where dY is the problem's ``grad``. Most float64 results
    of one shape need these two products, which are therefore cached."""
    problem = Problem(*problem_key)
    weight = problem.wide_weight(base)
    return problem.x.detach().double() @ weight.t(), problem.grad.double() @ weight


class _ExactBase(torch.autograd.Function):
    """Computes ``x Wᵀ`` and the gradient ``dY W`` in float64. If x (or dY) equals the problem's own x (or grad), takes
    the product that :func:`_exact_products` caches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, problem: Problem, base: str) -> Tensor:
        ctx.problem, ctx.base = problem, base
        if torch.equal(x, problem.x.double()):
            return _exact_products(problem.key, base)[0].clone()
        return x @ problem.wide_weight(base).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        problem, base = ctx.problem, ctx.base
        if torch.equal(grad, problem.grad.double()):
            return _exact_products(problem.key, base)[1].clone(), None, None
        return grad @ problem.wide_weight(base), None, None


class Problem:
    """Inputs and weights of one layer at one number of tokens.

    :meth:`weights` returns Turns that give one frozen weight at a time. ``adapters`` are Turns that give one dictionary
    of the adapters' leaf tensors at a time. ``captured``: whether the calls are captured in a CUDA graph, which cannot
    contain a copy from the host.
    """

    def __init__(
        self, tokens: int, k: int, n: int, rotating: bool = False, rank: int = RANK, device: str = "cpu",
        captured: bool = False,
    ) -> None:  # fmt: skip
        self.tokens, self.k, self.n, self.rank, self.device, self.captured = tokens, k, n, rank, device, captured
        self.key = (tokens, k, n, False, rank, device)
        self.least_bytes = ROTATING_BYTES if rotating else 0
        draw = _generator(device)
        self.x = torch.randn(tokens, k, dtype=torch.bfloat16, generator=draw, device=device).requires_grad_()
        self.grad = torch.randn(tokens, n, dtype=torch.bfloat16, generator=draw, device=device)
        self._turns: dict[str, Turns[Any]] = {}

    def weights(self, base: str) -> Turns[Any]:
        """Returns Turns of the weights in the format ``base``: a key of :data:`DTYPES` or :data:`.packed_bases.PACKED`,
        "nf4" (double-quantized) or "nf4-plain".

        Contenders over one base share the Turns, so that no contender gets a weight that another contender has just
        read into a cache.
        """
        if base not in self._turns:
            if base in DTYPES:
                pool: list[Any] = _dense_pool(self.k, self.n, self.least_bytes, self.device, base)
            elif base in PACKED:
                pool = _packed_pool(self.k, self.n, self.least_bytes, base, self.device)
            else:
                pool = _nf4_pool(self.k, self.n, self.least_bytes, base == "nf4", self.device)
            self._turns[base] = Turns(pool)
        return self._turns[base]

    @property
    def adapters(self) -> Turns[dict[str, Tensor]]:
        if "adapters" not in self._turns:
            count = len(self.weights("bf16").items)
            self._turns["adapters"] = Turns(_adapter_pool(self.k, self.n, self.rank, count, self.device))
        return self._turns["adapters"]

    def weight_bytes(self, base: str) -> int:
        first = self.weights(base).items[0]
        return first.nbytes

    def wide_weight(self, base: str) -> Tensor:
        """Returns, in float64, the bf16 weight that the formula of a layer over ``base`` has."""
        if base == "bf16":
            return _first(self.k, self.n, self.device).double()
        if base in PACKED:
            return dense(_first_packed(self.k, self.n, base, self.device)).double()
        return dense(_first_nf4(self.k, self.n, base == "nf4", self.device)).double()

    def exact(
        self, base: str, formula: Callable[..., Tensor], names: Iterable[str] = (), mask: Optional[Callable] = None
    ) -> Exact:
        """Returns a function that computes a float64 result: the value of ``formula``, and the gradients of x and of
        the adapters ``names``.

        ``formula`` is called as ``formula(linear, x, mask, **adapters)``. ``linear`` is the function ``x -> x Wᵀ``, and
        ``mask`` is the dropout mask ``keep / (1 - p)``, or 1.0 if the argument ``mask`` is None.
        """

        def compute() -> dict[str, Tensor]:
            drawn = 1.0 if mask is None else mask()
            x = self.x.detach().double().requires_grad_()
            held = {name: self.adapters.items[0][name].detach().double().requires_grad_() for name in names}
            y = formula(lambda x: _ExactBase.apply(x, self, base), x, drawn, **held)
            y.backward(self.grad.double())
            grads = {f"grad_{name}": leaf.grad for name, leaf in held.items()}
            return {"y": y.detach(), "grad_x": x.grad, **grads}

        return compute


def dense(weight: Weight) -> Tensor:
    """Returns a bf16 weight itself, and a packed weight decoded to bf16 in plain PyTorch."""
    return reference.nf4_dequantize(weight, torch.bfloat16) if isinstance(weight, PackedWeight) else weight


# --- dropout ----------------------------------------------------------------------------------------------------------


def draw_seed(problem: Problem) -> Tensor:
    """Returns a seed from PyTorch's generator, drawn as an operator of peft_ext draws its seed if its caller gives
    none."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=problem.device)


def philox_mask(problem: Problem, p: float) -> Callable[[], Tensor]:
    """Returns a function that draws the dropout mask of a call of peft_ext's operators with the seed of
    :func:`draw_seed`, divided by ``1 - p``."""
    return lambda: reference.dropout_keep_mask(draw_seed(problem), p, problem.x.shape).double() / (1 - p)


def torch_mask(problem: Problem, p: float, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Returns a function that draws the mask of ``F.dropout`` on x in ``dtype``, divided by ``1 - p``."""
    ones = partial(torch.ones, problem.x.shape, dtype=dtype, device=problem.device)
    return lambda: (F.dropout(ones(), p) != 0).double() / (1 - p)


# --- contenders -------------------------------------------------------------------------------------------------------


def _trained(
    problem: Problem, take: Callable[[], Any], forward: Callable[[Tensor], Tensor],
    parameters: Callable[[], dict[str, Tensor]], exact: Union[Exact, str],
) -> Contender:  # fmt: skip
    """Returns a contender whose call first sets the gradients of x and of the parameters to None, and then runs forward
    and backward."""
    x, grad = problem.x, problem.grad

    def run() -> Tensor:
        x.grad = None
        for parameter in parameters().values():
            parameter.grad = None
        y = forward(x)
        y.backward(grad)
        return y

    def outputs(y: Tensor) -> dict[str, Tensor]:
        return {"y": y, "grad_x": x.grad, **{f"grad_{name}": p.grad for name, p in parameters().items()}}

    return Contender(run, outputs, exact, take)


def functional(
    problem: Problem, weights: Union[str, Turns[Any]], forward: Callable[..., Tensor], names: tuple[str, ...],
    exact: Union[Exact, str], *, training: bool = True, enter: Callable[[Any], Any] = lambda weight: weight,
    adapters: Optional[Turns[dict[str, Tensor]]] = None,
) -> Contender:  # fmt: skip
    """Returns a contender whose call is ``forward(x, enter(weight), *adapters)`` and, with ``training``, the backward.

    Args:
        weights: a base of the problem, such as "bf16", or Turns of the contender's own weights.
        names: names of the adapters that are passed to ``forward``.
        exact: function that returns the float64 result, or the reason why there is no float64 result.
        training: whether a call also runs the backward; a call without backward runs without autograd.
        enter: function that converts a weight; the call of ``enter`` for each weight is not timed.
        adapters: Turns of adapters; None: the problem's adapters.
    """
    turns = problem.weights(weights) if isinstance(weights, str) else weights
    entered = entered_once(turns, enter)
    held: dict[str, Tensor] = {}
    args: list[Any] = []

    def take() -> None:
        found = (adapters or problem.adapters).next() if names else {}
        held.update({name: found[name] for name in names})
        args[:] = (entered(turns.next()), *held.values())

    if training:
        return _trained(problem, take, lambda x: forward(x, *args), lambda: held, exact)
    x = problem.x.detach()

    @torch.no_grad()
    def run() -> Tensor:
        return forward(x, *args)

    return Contender(run, lambda y: {"y": y}, exact, take)


def entered_once(turns: Turns[Any], enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Calls ``enter`` for each item of ``turns``, and returns a function that looks up the result for an item. No call
    of ``enter`` is timed; on a GPU, ``enter`` may wait for the device."""
    entered = {id(item): enter(item) for item in turns.items}
    return lambda item: entered[id(item)]


def value_of(exact: Exact) -> Exact:
    """Returns a function that returns only the value "y" of the float64 result ``exact``, for contenders without
    backward."""
    return lambda: {"y": exact()["y"]}


def comparison_of(
    makers: dict[str, Callable[[], Contender]], bytes_moved: int, flops: int = 0, **options: Any
) -> Comparison:
    """Returns the comparison of the contenders that ``makers`` make, with the reason for each peer that cannot be made.
    If the first of ``makers``, which makes the contender "ours" (peft_ext), raises an error, comparison_of raises this
    error."""
    contenders: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contenders[name] = make()
        except Exception as error:
            if not contenders:
                raise
            absent[name] = f"{type(error).__name__}: {error}"
    return Comparison(contenders, bytes_moved, flops, absent=absent, **options)


def frozen(problem: Problem, *, training: bool = True) -> Contender:
    """Returns the contender "frozen": PyTorch's bf16 ``F.linear``, and with ``training`` also the backward, which
    computes the gradient of x."""
    exact = problem.exact("bf16", lambda linear, x, mask: linear(x))
    return functional(problem, "bf16", F.linear, (), exact if training else value_of(exact), training=training)


def compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns ``forward`` under ``torch.compile`` for one shape. The first call of the returned function compiles
    ``forward``; no benchmark times this call."""
    torch._dynamo.reset()
    return torch.compile(forward, fullgraph=True, dynamic=False)


def bitsandbytes_linear(nf4: NF4Weight, bias: Optional[Tensor] = None) -> nn.Module:
    """Returns bitsandbytes' ``Linear4bit`` over the storage of ``nf4``."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(nf4.in_features, nf4.out_features, bias=bias is not None, compute_dtype=torch.bfloat16,
                       quant_type="nf4", device="meta")  # fmt: skip
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    _set_weight(layer, nf4.to_bitsandbytes())
    return layer


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Sets a layer's weight to a dense tensor or to bitsandbytes' Params4bit."""
    if hasattr(weight, "quant_state"):
        layer.weight = weight
        layer.quant_state = weight.quant_state
    else:
        layer.weight.data = weight


def stock_linear(problem: Problem, base: str) -> tuple[nn.ModuleDict, Callable[[nn.Module], None]]:
    """Returns a model with one linear layer "proj" over ``base`` ("bf16", or bitsandbytes' NF4), and a function that
    sets the next weight in such a layer."""
    weights = problem.weights(base)
    first = weights.items[0]
    if base == "bf16":
        linear: nn.Module = nn.Linear(problem.k, problem.n, bias=False, device="meta", dtype=torch.bfloat16)
        linear.weight = nn.Parameter(first, requires_grad=False)
    else:
        linear = bitsandbytes_linear(first)
    entered = entered_once(weights, lambda weight: weight if base == "bf16" else weight.to_bitsandbytes())
    return nn.ModuleDict({"proj": linear}), lambda layer: _set_weight(layer, entered(weights.next()))


def peft_config(name: str, **fields: Any) -> Any:
    """Returns a configuration of PEFT's class ``name`` for the layer of :func:`stock_linear`."""
    import peft

    return getattr(peft, name)(target_modules=["proj"], **fields)


def peft_layer(problem: Problem, base: str, config: Any, parameters: dict[str, str], exact: Exact) -> Contender:
    """Returns a contender that runs PEFT's own layer in training.

    ``config``: the result of :func:`peft_config`. ``parameters``: a dict from the name of an adapter tensor of the
    problem to the name of the parameter in PEFT's layer.
    """
    from peft import get_peft_model

    model, set_next_weight = stock_linear(problem, base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = get_peft_model(model, config).base_model.model.proj.train()
    found = {name: layer.get_parameter(where) for name, where in parameters.items()}

    def take() -> None:
        set_next_weight(layer.base_layer)
        adapters = problem.adapters.next()
        for name, parameter in found.items():
            parameter.data = adapters[name].data.view(parameter.shape)

    return _trained(problem, take, layer, lambda: found, exact)


def layer_comparison(
    problem: Problem,
    base: str,
    compile: bool,
    *,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    config: Callable[[], Any],
    where: dict[str, str],
    bytes_moved: int,
    flops: int,
    dropout: float = 0.0,
    peft_formula: Optional[Callable[..., Tensor]] = None,
    more: Optional[dict[str, Callable[[Exact], Contender]]] = None,
) -> Comparison:
    """Returns the comparison of an adapted layer's training step: ours, PEFT, PyTorch eager and compiled, and frozen.

    Args:
        ours, eager: functions of ``(x, weight, *adapters)``; the contender torch.compile is ``eager`` compiled.
        formula: formula of the float64 result of ``ours``, see :meth:`Problem.exact`.
        peft_formula: formula of the float64 results of PEFT and ``eager``; None: ``formula``.
        config: a function that makes PEFT's configuration.
        where: a dict from the name of an adapter tensor of the problem to the name of the parameter in PEFT's layer.
        more: for each further peer, a function that makes the peer from the float64 result of ``ours``.
    """
    theirs, names = peft_formula or formula, tuple(where)

    def mask(draw: Callable[..., Any], *args: Any) -> Any:
        return draw(problem, dropout, *args) if dropout else None

    exact = problem.exact(base, formula, names, mask(philox_mask))
    # PEFT draws the dropout mask in the adapters' dtype, float32, and the contender "torch eager" draws the mask in x's
    # dtype, so that their float64 results differ. Without dropout the two have the same float64 result.
    shared = theirs is formula and not dropout
    exact_peft = exact if shared else problem.exact(base, theirs, names, mask(torch_mask, torch.float32))
    exact_eager = exact if shared else problem.exact(base, theirs, names, mask(torch_mask, torch.bfloat16))
    makers: dict[str, Callable[[], Contender]] = {
        "ours": lambda: functional(problem, base, ours, names, exact),
        stock_name(base): lambda: peft_layer(problem, base, config(), where, exact_peft),
        "torch eager": lambda: functional(problem, base, eager, names, exact_eager),
    }
    if compile:
        random = COMPILE_RANDOM if dropout else exact_eager
        makers["torch.compile"] = lambda: functional(problem, base, compiled(eager), names, random)
    for name, make in (more or {}).items():
        makers[name] = partial(make, exact)
    makers["frozen"] = lambda: frozen(problem)
    return comparison_of(makers, bytes_moved, flops)


def weightless_comparison(
    problem: Problem,
    compile: bool,
    *,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    names: tuple[str, ...] = (),
    bytes_moved: int,
    flops: int = 0,
    base: str = "bf16",
    mask: Optional[Callable[[], Any]] = None,
) -> Comparison:
    """Returns the comparison of an operator that is not a frozen linear layer with an adapter: a training step of
    peft_ext and of PyTorch, eager and, with ``compile``, compiled.

    ``mask`` draws the dropout mask of ``ours``, see :meth:`Problem.exact`; the masks of PyTorch cannot be drawn again.
    """
    exact = problem.exact(base, formula, names, mask)
    theirs = exact if mask is None else COMPILE_RANDOM.replace("torch.compile", "PyTorch")
    makers = {
        "ours": lambda: functional(problem, base, ours, names, exact),
        "torch eager": lambda: functional(problem, base, eager, names, theirs),
    }
    if compile:
        makers["torch.compile"] = lambda: functional(problem, base, compiled(eager), names, theirs)
    return comparison_of(makers, bytes_moved, flops)


def layer_bytes(problem: Problem, base: str) -> int:
    """Returns the least bytes that a frozen layer's training step moves: the step reads W twice, x and dY, and writes Y
    and dX."""
    return 2 * problem.weight_bytes(base) + 2 * 2 * problem.tokens * (problem.k + problem.n)


def low_rank_bytes(problem: Problem) -> int:
    """Returns the least bytes that a low-rank adapter adds to a training step: one more read of x, one write and one
    read of S, two reads of A and B, and one write of dA and dB."""
    tokens, k, n, r = problem.tokens, problem.k, problem.n, problem.rank
    return 2 * tokens * k + 2 * 4 * tokens * r + 3 * 4 * r * (k + n)


def low_rank_flops(problem: Problem) -> int:
    """Returns the operations of a low-rank adapter's six products: S, S Bᵀ, P = dY B, dB, dA and P A."""
    return 6 * problem.tokens * problem.rank * (problem.k + problem.n)
