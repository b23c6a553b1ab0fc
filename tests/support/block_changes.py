"""Changes to one block of a model, or to code that the block's forward runs, for tests that an accelerated model
computes what the changed stock model computes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Optional
from unittest.mock import patch

import torch
from reached import another, reached
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_ext.integrations.forms import Form, Row, digest

__all__ = ["Change", "changes", "rolled"]


class Change(NamedTuple):
    """A change of a block.

    ``on`` changes the block, for each model anew. ``around`` is a context manager around the calls of both models, such
    as a replaced function. ``stock`` tells what :func:`peft_ext.explain` has to report as not fused: "all" for each
    part of the block, "attention" for the call of the attention function alone, and "" for nothing: the fused code has
    to compute the change. ``of_class``: whether the change is of all blocks of the class. ``rebuilt``: whether the
    models have to be built inside of ``around``. ``given``: further arguments of the model's call.
    """

    name: str
    on: Optional[Callable[[nn.Module], Any]] = None
    around: Optional[Callable[[], Any]] = None
    stock: str = ""
    of_class: bool = False
    rebuilt: bool = False
    given: dict[str, Any] = {}


def rolled(value: Any) -> Any:
    """Returns the first tensor of numbers in ``value``, which may be a tuple or a dict, with its last dimension rolled.
    The rolled tensor has other values, but no other norm, so that a later norm does not hide the change."""
    if isinstance(value, Tensor):
        return value.roll(1, -1) if value.is_floating_point() else value
    if isinstance(value, tuple) and value:
        return rolled(value[0]), *value[1:]
    if isinstance(value, dict) and value:
        name = next((name for name, one in value.items() if isinstance(one, Tensor)), None)
        return value if name is None else {**value, name: rolled(value[name])}
    return value


class Rolls(nn.Module):
    """Calls another module, and rolls the result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return rolled(self.inner(*args, **kwargs))


class Scales(nn.Module):
    """A parametrization that makes a tensor a quarter larger."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.25


class RolledTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).roll(1, -1)


def changes(cls: type, row: Row, form: Form, module: nn.Module) -> Iterator[Change]:
    """Yields the changes of a block of the class ``cls``, whose form has the row ``row``. ``module``: one block of the
    class, whose attributes tell which changes there are."""
    yield from _hooks(cls)
    yield from _forwards(cls)
    yield from _attributes(form, module)
    yield from _parameters(row, module)
    yield from _children(row, module)
    if row.get("act"):
        yield from _activations(row)
    if row.get("interface") == "yes":
        yield from _registry()
    yield from _reached(cls)


# --- hooks and forwards -----------------------------------------------------------------------------------------------

_ON_CALL = {
    "forward pre-hook": lambda m: m.register_forward_pre_hook(_before, with_kwargs=True),
    "forward hook": lambda m: m.register_forward_hook(lambda module, args, result: rolled(result)),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda module, grads: _rolled_first(grads)),
    "backward hook": lambda m: m.register_full_backward_hook(lambda module, grads, given: _rolled_first(grads)),
}


def _before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return (rolled(args), kwargs) if args else (args, rolled(kwargs))


def _rolled_first(grads: Any) -> tuple:
    """Returns ``grads`` with the first gradient rolled that is not None."""
    found = list(grads)
    place = next((place for place, grad in enumerate(found) if grad is not None), None)
    if place is not None:
        found[place] = found[place].roll(1, -1)
    return tuple(found)


def _hooks(cls: type) -> Iterator[Change]:
    for name, hook in _ON_CALL.items():
        yield Change(name, hook)

    def of_class(function: Callable) -> Callable:
        """Returns a global hook that acts on the blocks of the class alone, fused or not."""
        return lambda module, *args: function(*args) if isinstance(module, cls) else None

    for name, function in {
        "forward_pre_hook": lambda args: rolled(args) if args else None,
        "forward_hook": lambda args, result: rolled(result),
        "full_backward_pre_hook": _rolled_first,
        "full_backward_hook": lambda grads, given: _rolled_first(grads),
    }.items():
        register = getattr(nn.modules.module, f"register_module_{name}")
        yield Change(f"global {name}", around=functools.partial(_registered, register, of_class(function)))


@contextmanager
def _registered(register: Callable, hook: Callable) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def _rolling(function: Callable) -> Callable:
    """Returns a function that rolls the result of ``function``, and that takes one more argument."""
    return functools.wraps(function)(
        lambda *args, one_more=1.0, **kwargs: rolled(function(*args, **kwargs)) if one_more else None
    )


def _forwards(cls: type) -> Iterator[Change]:
    def on_instance(module: nn.Module) -> None:
        module.forward = _rolling(module.forward)

    def subclass(module: nn.Module) -> None:
        module.__class__ = type(cls.__name__, (cls,), {"forward": _rolling(cls.forward)})

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return rolled(nn.Module.__call__(self, *args, **kwargs))

    def parameter_of(self: Any, name: str) -> Any:
        value = nn.Module.__getattr__(self, name)
        return value * 1.25 if isinstance(value, Tensor) else value

    yield Change("forward on the instance", on_instance, stock="all")
    yield Change("forward of a subclass", subclass, stock="all")
    yield _replaced(cls, "forward", _rolling(cls.forward), "forward on the class")
    yield _replaced(cls, "__call__", called, "__call__ on the class")
    yield _replaced(cls, "__getattr__", parameter_of, "__getattr__ on the class")


def _replaced(owner: Any, name: str, value: Any, said: str, stock: str = "all", **options: Any) -> Change:
    # `create` lets the patch set an attribute that the owner only inherits, and delete it afterwards.
    by_item = isinstance(owner, dict)
    change = (lambda: patch.dict(owner, {name: value})) if by_item else _set_on(owner, name, value)
    return Change(said, around=change, stock=stock, of_class=True, **options)


def _set_on(owner: Any, name: str, value: Any) -> Callable[[], Any]:
    return lambda: patch.object(owner, name, value, create=name not in vars(owner))


# --- attributes -------------------------------------------------------------------------------------------------------


def _attributes(form: Form, module: nn.Module) -> Iterator[Change]:
    """Yields other values for the attributes that the forward reads from the instance or finds on the class."""
    cls = type(module)
    for name in form.of_class:
        if (other := another(getattr(module, name, None))) is not None:
            yield Change(f"own {name}", functools.partial(_set, name=name, value=other), stock="all")
    for name in form.reads:
        value = getattr(module, name, None)
        if "drop" in name and not isinstance(value, nn.Module):
            continue  # with another probability, the attention operator draws other masks than PyTorch
        if isinstance(value, (int, float)):
            yield Change(f"other {name}", functools.partial(_set, name=name, value=_number(value)))
        if type(value) is float:
            yield Change(f"{name} a tensor", functools.partial(_set, name=name, value=torch.tensor(value * 1.5 + 0.1)))
        if isinstance(value, (int, float, Tensor, nn.Module)):
            found = functools.partial(_found_on_class, name)
            yield _replaced(cls, name, property(found, lambda self, value: None), f"property {name}")


def _number(value: Any) -> Any:
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 1.5 + 0.1


def _found_on_class(name: str, module: nn.Module) -> Any:
    """Returns what a property of the class gives in place of the attribute ``name`` of an instance."""
    value = module.__dict__.get(name)
    if isinstance(value, (int, float)):
        return _number(value)
    value = nn.Module.__getattr__(module, name)
    return value * 1.25 if isinstance(value, Tensor) else Rolls(value) if isinstance(value, nn.Module) else value


def _set(module: nn.Module, name: str, value: Any) -> None:
    module.__dict__[name] = value


def _parameters(row: Row, module: nn.Module) -> Iterator[Change]:
    stock = "all" if row.kind in ("rms_norm", "layer_norm", "float_layer_norm") else ""
    for name, value in module._parameters.items():
        if value is None:
            continue

        def to_tensor(module: nn.Module, name: str = name) -> None:
            module.__dict__[name] = module._parameters.pop(name).detach() * 1.25

        def to_buffer(module: nn.Module, name: str = name) -> None:
            module.register_buffer(name, module._parameters.pop(name).detach() * 1.25)

        def to_dtype(module: nn.Module, name: str = name) -> None:
            module._parameters[name] = nn.Parameter((module._parameters[name] * 1.25).bfloat16(), requires_grad=False)

        def trains(module: nn.Module, name: str = name) -> None:
            module._parameters[name].requires_grad_()

        def parametrized(module: nn.Module, name: str = name) -> None:
            parametrize.register_parametrization(module, name, Scales())

        def pruned(module: nn.Module, name: str = name) -> None:
            prune.l1_unstructured(module, name, amount=0.5)

        yield Change(f"{name} a tensor", to_tensor, stock=stock)
        yield Change(f"{name} a buffer", to_buffer, stock=stock)
        yield Change(f"{name} in bfloat16", to_dtype)
        yield Change(f"{name} that trains", trains)
        yield Change(f"{name} parametrized", parametrized, stock=stock)
        yield Change(f"{name} pruned", pruned, stock=stock)
    for name, value in module._buffers.items():
        if value is not None and value.is_floating_point():
            yield Change(f"other {name}", lambda module, name=name: module._buffers[name].mul_(1.25))


# --- children, activations --------------------------------------------------------------------------------------------


def _children(row: Row, module: nn.Module) -> Iterator[Change]:
    for name, child in module._modules.items():
        if child is None:
            continue
        is_act = name == row.get("act")

        def inside(module: nn.Module, name: str = name) -> None:
            module._modules[name] = Rolls(module._modules[name])

        def forward(module: nn.Module, name: str = name) -> None:
            module._modules[name].forward = _rolling(module._modules[name].forward)

        yield Change(f"{name} inside of another module", inside, stock="all" if is_act else "")
        yield Change(f"forward on the instance of {name}", forward, stock="all" if is_act else "")
        for said, hook in _ON_CALL.items():
            change = functools.partial(_on_child, name=name, hook=hook)
            yield Change(f"{said} of {name}", change, stock="all" if is_act else "")


def _on_child(module: nn.Module, name: str, hook: Callable) -> None:
    hook(module._modules[name])


def _activations(row: Row) -> Iterator[Change]:
    name = row.get("act")

    def replace(module: nn.Module, value: Any) -> None:
        module._modules.pop(name, None)
        module.__dict__.pop(name, None)
        setattr(module, name, value)

    def subclass(module: nn.Module) -> None:
        act = getattr(module, name)
        if isinstance(act, nn.Module):
            act.__class__ = type(type(act).__name__, (type(act),), {"forward": _rolling(type(act).forward)})
        else:
            replace(module, functools.partial(_rolling(act)))

    yield Change("another activation module", functools.partial(replace, value=nn.Tanh()), stock="all")
    yield Change("another activation function", functools.partial(replace, value=torch.sin), stock="all")
    yield Change("an activation of a subclass", subclass, stock="all")
    yield Change("other entries of ACT2FN", around=_other_entries, stock="all", of_class=True, rebuilt=True)


@contextmanager
def _other_entries() -> Iterator[None]:
    """Replaces all entries of ACT2FN, whose ``__getitem__`` gives no entry, but an activation of the entry's class."""
    before = {name: dict.__getitem__(ACT2FN, name) for name in ACT2FN}
    ACT2FN.update(dict.fromkeys(before, RolledTanh))
    try:
        yield
    finally:
        ACT2FN.update(before)


# --- registries and helpers -------------------------------------------------------------------------------------------


def _hotter(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, temperature: float = 1.0, **rest: Any) -> Any:
    return sdpa_attention_forward(module, q / (1.0 + temperature), k, v, mask, **rest)


def _registry() -> Iterator[Change]:
    attentions, masks = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    of_all, of_one = attentions._global_mapping, attentions._local_mapping
    yield _replaced(of_all, "sdpa", _hotter, "another sdpa", "attention")
    yield _replaced(of_one, "sdpa", _hotter, "another sdpa of the instance of the registry", "attention")
    yield _replaced(of_all, "sdpa", _hotter, "an argument of sdpa", "attention", given={"temperature": 3.0})
    yield _replaced(of_all, "sdpa", _rolling(sdpa_attention_forward), "a wrapped sdpa", "attention")
    all_seen = functools.wraps(masks["sdpa"])(lambda *args, **kwargs: None)
    yield _replaced(masks._global_mapping, "sdpa", all_seen, "another mask of sdpa", "")

    def asks(module: nn.Module, name: str) -> None:
        module.config._attn_implementation = name

    yield Change("the eager function", functools.partial(asks, name="eager"), stock="attention")

    @contextmanager
    def registered() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(patch.dict(of_all, {"hotter": _hotter}))
            stack.enter_context(patch.dict(masks._global_mapping, {"hotter": masks["sdpa"]}))
            yield

    yield Change("a function of another name", functools.partial(asks, name="hotter"), registered, "attention")


def _reached(cls: type) -> Iterator[Change]:
    """Yields a replacement of each value that the forward of the class finds by name."""
    for place in reached(cls):
        if (other := another(place.value)) is None or isinstance(place.value, types.ModuleType):
            continue
        if place.owner is torch and isinstance(place.value, torch.dtype):
            continue  # peft_ext itself reads torch.float32, and fails if it is another dtype
        if digest._asks_for_the_environment(place.value, place.name, cls.forward):
            continue
        yield _replaced(place.owner, place.name, other, f"reached {place}")
