"""Proves that the formula of a row of the table of forms gives the same values and gradients as a class's own code, for
extreme inputs and in each dtype.

The proof makes an instance of the class from the formula alone, with layers and random weights that the proof chooses,
runs the class's forward and the fused forward, and compares the results. The tests repeat the proofs of most rows of
the table, with one or two classes of the installed transformers that have the row's form.
``register_form`` and the command ``python -m peft_ext.verification`` prove a formula for a class without a known form.
This module proves the kinds of forms that ``register_form`` accepts; tests/support/form_proofs.py proves other kinds.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ..integrations.forms import KINDS, REGISTERED, Form, Row, Unknown, form_of, holds_for
from ..integrations.model_blocks.attention import ALL_ATTENTION_FUNCTIONS
from ..integrations.model_blocks.block import class_of
from ..integrations.model_blocks.blocks import MIXINS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAGNITUDES = (1e-4, 1.0, 1e2, 1e4)
_K, _F = 24, 20
# The attributes that the forward of an attention with rotary positions may read, beside its layers and options.
_OF_ATTENTION = ("attention_dropout", "config", "head_dim", "is_causal", "layer_idx", "num_key_value_groups", "scaling",
                 "training")  # fmt: skip
_ARGUMENTS = ("hidden_states", "position_embeddings", "attention_mask", "position_ids", "cache_position")


@dataclass(frozen=True)
class Proof:
    """How the formulas of one kind of form are proved.

    ``fill(module, row, training)`` gives ``module``, an instance of the class whose code is tested, the attributes and
    layers that the formula uses. ``ulps``: the tolerance for the values and for the gradients, in units of the dtype's
    eps times the largest value in the same row of the tensor (for values) or in the whole tensor (for gradients).
    ``inputs(row)`` yields a pair for each input: a description in words, and a function from a dtype to the positional
    and keyword arguments of the forward. ``fused(cls, row, form, module)`` returns the fused forward of ``module``; the
    fused forward replaces the method ``method`` of the class. ``strict``: whether elements that are not finite must be
    equal (NaN, or the same infinity) in both results. ``strides``: whether the two results must have the same strides.
    ``autocast``: whether float32 inputs are also tried under autocast to bfloat16.
    """

    fill: Callable[[Any, Row, bool], None]
    ulps: tuple[int, int]
    inputs: Callable[[Row], Iterator[tuple[str, Callable[[torch.dtype], tuple[tuple, dict]]]]]
    fused: Callable[[type, Row, Form, Any], Callable]
    method: str = "forward"
    strict: bool = True
    strides: bool = True
    autocast: bool = True


def disproof(cls: Any, row: Row, form: Form) -> Optional[str]:
    """Returns why the formula of ``row`` does not stand for the code of ``cls``, such as an input for which formula and
    code give different results; None if formula and code agree for all inputs of the proof."""
    if form.writes:
        return "its forward assigns to attributes of the module"
    others = sorted(set(form.reads) - _reads_of(row))
    # The forward of an attention may pass the module itself on, because attention functions get the module.
    hands_itself_on = form.passes_itself and row.kind != "attention"
    if hands_itself_on or others:
        return f"its forward reads {others[0]}, which is not in the formula" if others else "it hands itself on"
    if row.kind == "attention" and (name := _unknown_argument(cls, row)) is not None:
        return f"its forward takes {name}, which is not in the formula"
    with torch.device("cpu"), torch.random.fork_rng([]), torch.inference_mode(False), torch.enable_grad():
        inputs = PROOFS[row.kind].inputs(row)
        for dtypes, (what, arguments), training in itertools.product(_dtypes(row), inputs, (True, False)):
            if (why := _differs(cls, row, form, *dtypes, arguments, training)) is not None:
                mode, dtype = "training" if training else "evaluation", str(dtypes[0]).removeprefix("torch.")
                return f"{why}, {dtype}{' under autocast' * dtypes[2]}, {what}, in {mode}"
    return None


def _unknown_argument(cls: Any, row: Row) -> Optional[str]:
    """Returns the name of an argument of an attention's forward that the formula of ``row`` does not have; None if
    there is no such argument."""
    known = {"self", *_ARGUMENTS, row.get("cache").partition(":")[0]}
    parameters = inspect.signature(inspect.unwrap(cls.forward)).parameters.values()
    return next((p.name for p in parameters if p.name not in known and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)),
                None)  # fmt: skip


def _dtypes(row: Row) -> list[tuple[torch.dtype, torch.dtype, bool]]:
    """Returns the cases that the proof tries, each as a tuple: the dtype of x, the dtype of the weights, and whether
    bfloat16 autocast is on."""
    mixed = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
    held = [dtype for dtype in DTYPES if holds_for(row, dtype)]
    pairs = [(dtype, dtype) for dtype in held] + (mixed if row.get("mixed") == "yes" else [])
    autocast = [(torch.float32, torch.float32, True)] if PROOFS[row.kind].autocast else []
    return [(*pair, False) for pair in pairs] + autocast


def _reads_of(row: Row) -> set[str]:
    """Returns the names of the module's attributes that the formula of ``row``, a row of the table of known forms,
    uses."""
    names = [
        *row.names("inner"),
        row.get("weight"),
        row.get("eps"),
        row.get("out"),
        row.get("act"),
        row.get("drop").rpartition(":")[2],
        row.get("approximate"),
        row.get("shape"),
        ":p:" in row.get("drop") and "training",
    ]
    names += [need.split(":")[0] for need in row.names("needs")]
    if row.kind == "attention":
        names += [*_OF_ATTENTION, *row.get("inputs").split("+"), row.get("o")]
        names += [option.split(":")[1] for option in row.names("options")]
        names += ["q_norm", "k_norm"] if row.get("norms") else []
    return {name for name in names if name}


# --- instances and inputs ---------------------------------------------------------------------------------------------


def _instance(cls: type, row: Row, dtype: torch.dtype, training: bool) -> Any:
    """Returns an instance of ``cls`` that has only the attributes and layers that the row's formula uses."""
    # torch.manual_seed would seed the generators of the GPUs too.
    torch.default_generator.manual_seed(0)
    # An attention passes itself to other functions, which may read any attribute of the attention. `_attribute` raises
    # an error if code reads an attribute that the formula does not use.
    held = {"__getattr__": _attribute, "__module__": cls.__module__}
    made = object.__new__(type(cls.__name__, (cls,), held) if row.kind == "attention" else cls)
    nn.Module.__init__(made)
    for need in row.names("needs"):
        name, value = need.split(":", 1)
        setattr(made, name, ast.literal_eval(value))
    PROOFS[row.kind].fill(made, row, training)
    return made.to(dtype).train(training)


def _fill_norm(made: Any, row: Row, _: bool) -> None:
    if row.get("weight"):
        setattr(made, row.get("weight"), nn.Parameter(torch.randn(_K) * 0.5 + 1))
        setattr(made, row.get("eps"), 1e-3)
    if row.get("shape"):
        setattr(made, row.get("shape"), (_K,))


def _fill_mlp(made: Any, row: Row, _: bool) -> None:
    packed = row.get("gated") == "yes" and len(row.names("inner")) == 1
    for name in row.names("inner"):
        setattr(made, name, nn.Linear(_K, 2 * _F if packed else _F))
    if row.get("out"):
        setattr(made, row.get("out"), nn.Linear(_F, _K))
    setattr(made, row.get("act"), nn.SiLU())
    if name := row.get("drop").rpartition(":")[2]:
        setattr(made, name, 0.5 if ":p:" in row.get("drop") else nn.Dropout(0.5))


def _attribute(module: nn.Module, name: str) -> Any:
    """Returns a module's parameter, buffer or child of the given name. Raises RuntimeError if the module has no such
    attribute, and not AttributeError, which ``getattr`` with a default would catch."""
    for held in (module._parameters, module._buffers, module._modules):
        if name in held:
            return held[name]
    raise RuntimeError(f"it reads {name}, which is not in the formula")


class _Config:
    """The configuration of an attention of the proof. It lacks the attributes in ``lacks``. Reading another attribute
    that the formula does not use raises RuntimeError, which ``getattr`` with a default does not catch."""

    _attn_implementation = "_noted"
    lacks: frozenset[str] = frozenset()

    def __getattr__(self, name: str) -> Any:
        if name in self.lacks:
            raise AttributeError(f"the configuration has no {name}")
        raise RuntimeError(f"it reads {name} of its configuration, which is not in the formula")


class _Index:
    """The ``layer_idx`` of an attention of the proof. A forward may hand the index on to a cache, and may test whether
    the index ``is None``; if the forward computes with the index or compares it by ``==``, the forward raises
    RuntimeError."""

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("it computes with its layer_idx, which is not in the formula")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __floordiv__ = _refuse
    __rfloordiv__ = __truediv__ = __rtruediv__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __divmod__ = __rdivmod__ = __pow__ = __rpow__ = __lshift__ = __rshift__ = __neg__ = __abs__ = __invert__ = _refuse
    __index__ = __int__ = __float__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = _refuse


_INDEX = _Index()


def _fill_attention(made: Any, row: Row, training: bool) -> None:
    """Gives an attention, which the proof has made, its layers and attributes. The attributes of the row's options are
    7 in training and None in evaluation, so that the proof finds a forward that computes something else if an option is
    set. In evaluation, the configuration has no attribute for an option that is read from the configuration."""
    heads, kv_heads, size = 4, 2, 8
    made.config = _Config()
    ALL_ATTENTION_FUNCTIONS.register(_noted.__name__, _noted)
    made.head_dim, made.num_key_value_groups, made.layer_idx = size, heads // kv_heads, _INDEX
    made.scaling, made.attention_dropout, made.is_causal = 0.3, 0.1, True
    for name, count in zip(row.names("inputs")[0].split("+"), (heads, kv_heads, kv_heads), strict=True):
        setattr(made, name, nn.Linear(_K, count * size))
    setattr(made, row.get("o"), nn.Linear(heads * size, _K))
    if row.get("norms"):
        flat = row.get("norms") == "flat"
        made.q_norm, made.k_norm = (nn.LayerNorm(count * size if flat else size) for count in (heads, kv_heads))
    for attribute in (option.split(":")[1] for option in row.names("options")):
        if of_config := attribute.partition("config.")[2]:
            made.config.lacks |= {of_config}
            if training:
                setattr(made.config, of_config, 7)
        else:
            setattr(made, attribute, 7 if training else None)


# A summary of the arguments of each call of :func:`_noted`, in the order of the calls.
CALLS: list[Any] = []


def _noted(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, Optional[Tensor]]:
    """The attention function that instances of the proof use: a weighted sum of q, k and v, which does not enlarge
    rounding differences in q, k and v. ``_noted`` records a summary of its arguments in ``CALLS``."""
    CALLS.append((told(mask), told(given), q.dtype, k.dtype, v.dtype, q.shape, k.shape, v.shape))
    k, v = (value.repeat_interleave(q.shape[1] // value.shape[1], 1) for value in (k, v))
    out = (q * 0.5 + k * 0.25 - v * 0.125).transpose(1, 2).contiguous()
    return out, out.sum(-1)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _batches(width: int) -> dict[str, Tensor]:
    """Returns a dict from the description of an input in words to the input, a tensor [batch, tokens, width]."""
    spikes = drawn(3, 5, width)
    spikes[..., 2] = 3e4
    special = {"zeros": torch.zeros(2, 3, width), "one huge column": spikes}
    for value in (torch.inf, -torch.inf, torch.nan):
        x = drawn(3, 5, width)
        x[0, 1, 3] = value
        special[f"one {value}"] = x
    for magnitude in MAGNITUDES:
        special[f"magnitude {magnitude:g}"] = drawn(3, 5, width) * magnitude
    return special | {"transposed": drawn(5, 3, width).transpose(0, 1), "every second": drawn(3, 10, width)[:, ::2],
                      "a part": drawn(3, 5, width + 6)[..., 2 : width + 2],
                      "expanded": drawn(3, 1, width).expand(3, 5, width)}  # fmt: skip


def tensors(_: Row, width: int = _K) -> Iterator[tuple[str, Callable[[torch.dtype], tuple[tuple, dict]]]]:
    """Yields the inputs of a forward that gets one tensor, whose last dimension is ``width``, in the form that
    ``inputs`` of :class:`Proof` describes."""
    special = {"two dimensions": drawn(7, width), "four dimensions": drawn(2, 1, 3, width), "no row": drawn(0, width),
               "permuted": drawn(4, 2, 3, width).permute(1, 2, 0, 3)}  # fmt: skip
    for what, x in (_batches(width) | special).items():
        yield what, lambda dtype, x=x: ((x.to(dtype),), {})


def _attention_inputs(row: Row) -> Iterator[tuple[str, Callable[[torch.dtype], tuple[tuple, dict]]]]:
    special = _batches(_K) | {"one token": drawn(2, 1, _K), "twenty tokens": drawn(2, 20, _K)}
    for (what, x), caching in itertools.product(special.items(), (False, True)):
        yield (
            f"{what}, cache {caching}",
            lambda dtype, x=x, caching=caching: ((), _attention_arguments(row, x.to(dtype), caching)),
        )


def _attention_arguments(row: Row, x: Tensor, caching: bool) -> dict[str, Any]:
    batch, tokens = x.shape[:2]
    # cos and sin are independent numbers up to 1, so that a rotation can overflow only where x is near the largest
    # number of its dtype.
    cos, sin = (drawn(1, tokens, 8 + i)[..., :8].sin().contiguous().to(x.dtype) for i in range(2))
    mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool).tril()
    given = {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": mask,
             "position_ids": torch.arange(tokens), "one_more": 5}  # fmt: skip
    if caching and row.get("cache"):
        name, _, style = row.get("cache").partition(":")
        given[name] = _Cache()
        if style == "positions":
            given["cache_position"] = torch.arange(tokens)
    return given


class _Cache:
    """A key and value cache that records its calls, and returns keys and values that differ from the given ones."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls.append((told(args), told(kwargs)))
        return key * 1.5, value + 0.25

    def get_seq_length(self, *_: Any) -> int:
        return 0


def told(value: Any) -> Any:
    if value is _INDEX:
        return "layer_idx"
    if isinstance(value, Tensor):
        return tuple(value.shape), value.double().sum().item()
    if isinstance(value, dict):
        return {name: told(of) for name, of in value.items()}
    return tuple(map(told, value)) if isinstance(value, (tuple, list)) else value


# --- comparison -------------------------------------------------------------------------------------------------------


def unlike(found: Tensor, wanted: Tensor, tolerance: float, strict: bool, whole: bool = False) -> Optional[str]:
    """Returns in words how two tensors differ beyond rounding; None if they do not.

    Elements that are not finite must be at the same places in both tensors and, if ``strict``, be equal (NaN, or the
    same infinity). Finite elements may differ by a little more than ``tolerance`` times the largest finite value of
    their row, or of the whole tensor if ``whole``, because terms of sums may cancel. Unless ``strict``, NaN and both
    infinities count as equal: for an infinite input, PyTorch's activations give NaN or infinity, depending on the
    instruction set.
    """
    if found.shape != wanted.shape or found.dtype is not wanted.dtype:
        return f"{found.dtype} {tuple(found.shape)}, wanted {wanted.dtype} {tuple(wanted.shape)}"
    if not found.numel():
        return None
    a, b = found.double(), wanted.double()
    for what in (torch.isnan, torch.isposinf, torch.isneginf) if strict else (torch.isfinite,):
        if not torch.equal(what(a), what(b)):
            return f"{int((what(a) != what(b)).sum())} elements {what.__name__.removeprefix('is')} in one alone"
    a, b = (value.nan_to_num(0.0, 0.0, 0.0) for value in (a, b))
    scale = b.abs().max() if whole or not b.dim() else b.abs().amax(-1, keepdim=True)
    least = torch.finfo(wanted.dtype).tiny * 4 + tolerance * torch.finfo(wanted.dtype).eps * b.abs().max()
    excess = ((a - b).abs() / (tolerance * scale + least)).max().item()
    return None if excess <= 1 else f"by {excess:.3g} times the tolerance of {tolerance:.2g}"


def _differs(
    cls: type, row: Row, form: Form, dtype: torch.dtype, of_weights: torch.dtype, autocast: bool, arguments: Callable,
    training: bool,
) -> Optional[str]:  # fmt: skip
    proof, found = PROOFS[row.kind], []
    for ours in (False, True):
        try:
            module = _instance(cls, row, of_weights, training)
            args, kwargs = arguments(dtype)
            own = functools.partial(getattr(cls, proof.method), module)
            called = proof.fused(cls, row, form, module) if ours else own
            found.append(_run(called, module, autocast, args, kwargs))
        except Exception as error:  # the class's code is foreign and may raise any exception
            return f"{'the formula' if ours else 'the class'} raises {type(error).__name__}: {error}"
    stock, fused = found
    x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    if stock[2] != fused[2]:
        return f"the cache and attention are called with {fused[2]}, wanted {stock[2]}"
    if row.kind == "rms_norm" and dtype is of_weights and dtype is not torch.float32:
        # In bfloat16 and float16, the place of the rounding is part of an RMSNorm's formula. If both forwards round at
        # the same place, at least 97% of the elements of their outputs are equal.
        a, b = fused[0][0], stock[0][0]
        if a.numel() and a.shape == b.shape and (a.nan_to_num() == b.nan_to_num()).double().mean() < 0.97:
            return "the values are rounded at another place"
    for index, what in enumerate(("the values", "the gradients")):
        if len(stock[index]) != len(fused[index]):
            return f"{what} are {len(fused[index])} tensors, wanted {len(stock[index])}"
        for a, b in zip(fused[index], stock[index], strict=True):
            # Unless the proof is strict, the gradients of x are not compared where x is not finite: PyTorch's ReLU, for
            # example, passes gradients on where x is NaN.
            if not proof.strict and index == 1 and a.shape == x.shape:
                a, b = (value.masked_fill(~x.isfinite(), 0.0) for value in (a, b))
            eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
            if (why := unlike(a, b, proof.ulps[index] * eps, proof.strict, whole=index == 1)) is not None:
                return f"{what} differ: {why}"
            if index == 0 and a.stride() != b.stride() and a.numel() and proof.strides:
                return f"the strides are {a.stride()}, wanted {b.stride()}"
    return None


def fused_forward(cls: type, row: Row, form: Form, module: Any) -> Callable:
    """Returns the forward with which ``peft_ext.accelerate`` replaces the forward of ``module``, an instance of
    ``cls``. Raises RuntimeError if ``module`` can't be fused."""
    fused = object.__new__(class_of(MIXINS[row.kind], cls, row, form))
    fused.__dict__ = module.__dict__
    if row.kind == "attention":
        return fused._rotary_forward
    if (why := fused.block_reason()) is not None:
        raise RuntimeError(why)
    return fused._fused


def _run(
    called: Callable, module: nn.Module, autocast: bool, args: tuple, kwargs: dict
) -> tuple[list[Tensor], list[Tensor], Any]:
    given = [value.requires_grad_() for value in (*args, *kwargs.values())
             if isinstance(value, Tensor) and value.is_floating_point()]  # fmt: skip
    torch.default_generator.manual_seed(3)
    CALLS.clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = called(*args, **kwargs)
    values = [value for value in (y if isinstance(y, tuple) else (y,)) if isinstance(value, Tensor)]
    ramp = torch.linspace(-1, 1, values[0].numel()).view(values[0].shape).to(values[0].dtype)
    wanted = [*given, *module.parameters()]
    grads = torch.autograd.grad(values[0], wanted, ramp, allow_unused=True)
    cache = next((value.calls for value in kwargs.values() if isinstance(value, _Cache)), None)
    return [value.detach() for value in values], [grad for grad in grads if grad is not None], (cache, list(CALLS))


# Maps the kinds of forms that register_form accepts to their proofs.
PROOFS = {
    "rms_norm": Proof(_fill_norm, (4, 24), tensors, fused_forward),
    # If one column of x is huge, PyTorch's own gradients are off by up to 31 of the units that `ulps` counts.
    "float_layer_norm": Proof(_fill_norm, (4, 48), tensors, fused_forward),
    "mlp": Proof(_fill_mlp, (32, 64), tensors, fused_forward, strict=False),
    "attention": Proof(_fill_attention, (24, 48), _attention_inputs, fused_forward),
}


# --- proposals --------------------------------------------------------------------------------------------------------


def proposals(form: Form) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields pairs (kind, formula) for the formulas of norms and MLPs that fit the attributes that a class's forward
    reads. The proof then decides which of the proposed formulas is right."""
    reads = set(form.reads)
    for eps, weight in itertools.product(("variance_epsilon", "eps", "epsilon"), ("weight", "scale")):
        if {eps, weight} <= reads <= {eps, weight, "with_scale", "normalized_shape", "hidden_size", "dim"}:
            needs = {"needs": "with_scale:True"} if "with_scale" in reads else {}
            for offset, rounds, mixed in itertools.product("01", ("yes", "no"), ("yes", "no")):
                yield (
                    "rms_norm",
                    {"weight": weight, "eps": eps, "offset": offset, "rounds": rounds, "mixed": mixed, **needs},
                )
            if not needs:
                yield "float_layer_norm", {"weight": weight, "eps": eps, "mixed": "yes"}
    if reads == {"normalized_shape"}:
        yield "float_layer_norm", {"eps": "1e-05", "shape": "normalized_shape"}
    yield from _mlps(reads)


# The attributes by which transformers' apply_chunking_to_forward divides the tokens, and the values with which the
# tokens are not divided.
_CHUNKS = {"chunk_size_feed_forward": "0", "seq_len_dim": "1"}


def _mlps(reads: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields a pair ("mlp", formula) for each possible formula of an MLP whose forward reads an activation, one to
    three layers and at most one dropout."""
    needs = {}
    if reads >= _CHUNKS.keys():
        reads, needs = reads - _CHUNKS.keys(), {"needs": ",".join(f"{name}:{value}" for name, value in _CHUNKS.items())}
    acts = sorted(
        name for name in reads if name.startswith("act") and not name.endswith("dropout") or name.endswith("_act_fn")
    )
    drops = sorted(name for name in reads if "drop" in name)
    layers = sorted(reads - set(acts) - set(drops) - {"training"})
    are_linear = not any(part in name.lower() for name in layers for part in ("conv", "norm", "sample"))
    if len(acts) == 1 and len(drops) <= 1 and 2 <= len(layers) <= 3 and are_linear:
        by_number = "p:" if "training" in reads else ""
        where = [f"{place}:{by_number}{drops[0]}" for place in ("out", "act")] if drops else [""]
        for order, drop in itertools.product(itertools.permutations(layers), where):
            *inner, out = order
            for gated in ("yes", "no") if len(inner) == 1 else ("yes",):
                formula = {"inner": ",".join(inner), "out": out, "act": acts[0], "gated": gated}
                yield "mlp", {**formula, **({"drop": drop} if drop else {}), **needs}
    if len(acts) == len(layers) == 1 and not drops and are_linear:
        yield "mlp", {"inner": layers[0], "act": acts[0], "gated": "no", **needs}


def proposed(cls: type) -> tuple[Optional[Row], str]:
    """Returns the row of the first proposed formula that passes the proof for ``cls``, and "".

    If no formula passes, returns None, and the reason why the last formula failed or why no formula was proposed.
    Raises Unknown if no form can be made of the code of ``cls`` (see ``form_of``).
    """
    form, why = form_of(cls), "no kind's formula fits what its forward reads"
    for kind, formula in proposals(form):
        row = Row(form.digest, kind, tuple(formula.items()), f"{cls.__module__}.{cls.__qualname__}", 1, "proposed")
        if (why := disproof(cls, row, form)) is None:
            return row, ""
    return None, why


# The kinds that register_form accepts, with the values that every formula of the kind has.
_REGISTRABLE: dict[str, dict[str, Any]] = {
    "rms_norm": {},
    "float_layer_norm": {"mixed": True},
    "mlp": {},
    "attention": {"interface": True, "forward": "rotary"},
}


def register_form(cls: type[nn.Module], kind: str, **formula: Any) -> Row:
    """Makes the form of ``cls`` a known form in this process, if the formula passes the proof for ``cls``.

    Args:
        cls: the class whose form becomes known. :func:`peft_ext.accelerate` fuses all classes that have this form.
        kind: the kind of the form: "rms_norm", "float_layer_norm", "mlp" or "attention".
        formula: the values that describe the forward, by name; the names depend on ``kind``. For rms_norm: ``weight``
            and ``eps``, the names of the attributes; ``offset``, 0 or 1, which is added to the weight; ``rounds``,
            whether x / rms(x) is rounded to x's dtype before the multiplication by the weight; ``mixed``, whether the
            formula also holds if x and the weight have different dtypes. For float_layer_norm: ``weight`` and ``eps``,
            the names of the attributes; or, without a weight, ``eps``, a number, and ``shape``, the name of the
            attribute that holds the normalized shape. For mlp: ``inner``, the name of the first layer, or the names of
            gate and up; ``out``, the name of the last layer; ``act``, the name of the activation; ``gated``, whether
            the MLP is gated; ``drop``, "out:name" or "act:name" for a dropout behind the last layer or behind the
            activation, "out:p:name" or "act:p:name" if the attribute is a probability. For attention, with rotary
            positions and an attention function of transformers' registry: ``inputs``, the names of the layers for q, k
            and v; ``o``, the name of the last layer; ``norms``, "head" or "flat" for layers q_norm and k_norm, which
            are applied after ("head") or before ("flat") the heads are split; ``cache``, the name of the cache's
            argument and how its ``update`` is called, "cache:kwargs", "cache:plain" or "cache:positions"; ``options``,
            keyword arguments of the attention function with the names of their attributes, as "sliding_window:window",
            or as "sliding_window:config.window" for ``getattr(self.config, "window", None)``.
            For rms_norm and mlp: ``needs``, attributes of the module that must have the given value, as
            "with_scale:True".

    Returns: the new row of the table of known forms, which the next call of :func:`peft_ext.accelerate` uses.

    Raises: ValueError if the kind or the name of a value is unknown, if the formula of an attention lacks ``inputs`` or
    ``o``, or has a ``forward`` other than "rotary" or an ``interface`` other than True, if the formula of a
    float_layer_norm has a ``mixed`` other than True, if no form can be made of the class's code, or if the proof fails.
    The proof fails, for example, if the forward reads an attribute that the formula does not have, or if the formula
    and the class give different values or gradients. If values or gradients differ, the error's message says for which
    input.
    """
    if kind not in _REGISTRABLE:
        # register_form refuses all other kinds, because this module has no proof that tests a caller's formula of
        # another kind.
        raise ValueError(f"register_form: kind is {kind!r}, wanted one of {', '.join(_REGISTRABLE)}")
    formula = {**_REGISTRABLE[kind], **formula}
    if kind == "attention":
        if missing := [name for name in ("inputs", "o") if name not in formula]:
            raise ValueError(f"register_form: the formula of attention has to have {missing[0]}")
        if formula["forward"] != "rotary" or formula["interface"] not in (True, "yes"):
            raise ValueError("register_form: an attention without a forward of peft_ext cannot be proved: leave out "
                             "forward and interface")  # fmt: skip
        formula["inputs"] = "+".join(formula["inputs"]) if not isinstance(formula["inputs"], str) else formula["inputs"]
    if kind == "float_layer_norm" and formula["mixed"] not in (True, "yes"):
        raise ValueError(
            f"register_form: mixed is {formula['mixed']!r}, wanted True: a float_layer_norm returns x's dtype"
        )
    if unknown := sorted(set(formula) - set(KINDS[kind])):
        raise ValueError(f"register_form: the formula of {kind} has no {unknown[0]}, wanted {', '.join(KINDS[kind])}")
    try:
        form = form_of(cls)
    except Unknown as why:
        raise ValueError(f"register_form: {cls.__qualname__} has no form: {why}") from None
    pairs = tuple((name, _text(formula[name])) for name in KINDS[kind] if name in formula)
    row = Row(form.digest, kind, pairs, f"{cls.__module__}.{cls.__qualname__}", 1, "registered")
    if why := disproof(cls, row, form):
        raise ValueError(f"register_form: {cls.__qualname__} is not {kind} with this formula: {why}")
    REGISTERED[form.digest] = row
    return row


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(_text, value))
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
