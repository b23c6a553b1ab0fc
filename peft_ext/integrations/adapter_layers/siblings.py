"""Adapter layers of one module that get the same tensor, computed together on :func:`peft_ext.ops.lora_linears`.

Which of a module's children are called with one variable, as in ``self.q_proj(x)``, ``self.k_proj(x)``, is read in the
source of its forward. While that runs, the first of them to be called computes all of them, and the others' outputs
wait: each layer takes its own where it is called with the very same tensor, unchanged, and in the state in which it was
computed. In every other case it computes alone. Nothing outlives the module's forward, or leaves its thread.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ... import ops
from ...ops.checks import autocast_dtype
from .reasons import accepts_input, hooked, kernel_reason

__all__ = ["groups_in", "output_of", "together"]

# Below it layers have other ways, which share nothing (small layers up to 16 tokens alone); on AMX they share x.
_FEWEST_TOKENS = 24


# --- which layers get the same ----------------------------------------------------------------------------------------


_KNOWN: weakref.WeakKeyDictionary[Callable, tuple[tuple[str, ...], ...]] = weakref.WeakKeyDictionary()


def groups_in(forward: Callable) -> tuple[tuple[str, ...], ...]:
    """Returns the names of a forward's children that are called with one variable, by group; none where it can't tell.

    Of one group are calls ``self.name(variable)`` in one run of statements, all of which run or none, where nothing
    between them gives the variable another value, or writes into it or a child past what autograd sees.
    """
    if not isinstance(forward, types.FunctionType):
        return ()
    if forward not in _KNOWN:
        _KNOWN[forward] = _groups_in(forward)
    return _KNOWN[forward]


def _groups_in(forward: Callable) -> tuple[tuple[str, ...], ...]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):  # no source, or none that stands alone
        return ()
    found: list[list[str]] = []
    for function in tree.body[:1]:
        if isinstance(function, ast.FunctionDef):
            _scan(function.body, found)
    return tuple(tuple(names) for names in found if len(names) > 1)


def _scan(statements: Sequence[ast.stmt], found: list[list[str]]) -> None:
    current: dict[str, list[str]] = {}
    for statement in statements:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue  # which runs when it is called, maybe again in the backward
        inner = [value for _, value in ast.iter_fields(statement) if _is_block(value)]
        for block in inner:
            _scan(block, found)
        if not inner:
            for name, variable in _calls(statement):
                if variable not in current:
                    current[variable] = []
                    found.append(current[variable])
                if name not in current[variable]:
                    current[variable].append(name)
        if any(map(_writes, ast.walk(statement))):
            current.clear()
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                current.pop(node.id, None)


def _writes(node: ast.AST) -> bool:
    """Returns whether a node asks for some ``data``, or writes into what is the module's."""
    if isinstance(node, ast.Attribute):
        return node.attr == "data" or not isinstance(node.ctx, ast.Load) and _root(node) == "self"
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and _root(node) == "self"
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place and "self" in map(_root, (node.func, *node.args))


def _root(node: ast.AST) -> Optional[str]:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_block(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, (ast.stmt, ast.excepthandler)) for item in value)


def _calls(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yields child and variable of each ``self.child(variable)`` in a statement that runs for sure, as they run."""
    if isinstance(node, (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        called, value = node.func, node.args[0]
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
            if isinstance(value, ast.Name):
                yield called.attr, value.id


# --- while a module's forward runs ------------------------------------------------------------------------------------


class _Now(threading.local):
    groups: Optional[dict[int, _Group]] = None
    hooks: Any = None  # on what is saved, as the forward began


NOW = _Now()


@contextmanager
def together(module: nn.Module, groups: Iterable[tuple[str, ...]]) -> Iterator[None]:
    """Within, the children of each group that have an output to give join; see the module."""
    before, hooks, held = NOW.groups, NOW.hooks, {}
    for names in groups:
        layers = [module._modules.get(name) for name in names]
        layers = [layer for layer in layers if hasattr(layer, "joint_state")]
        if len(layers) > 1:
            held.update(dict.fromkeys(map(id, layers), _Group(layers)))
    NOW.groups, NOW.hooks = held, _saving_hooks()
    try:
        yield
    finally:
        NOW.groups, NOW.hooks = before, hooks


def output_of(layer: Any, x: Any) -> Optional[Tensor]:
    """Returns the layer's output of x, computed together with others'; None: it computes alone."""
    if not (groups := NOW.groups) or torch.compiler.is_compiling() or (group := groups.get(id(layer))) is None:
        return None
    if _saving_hooks() is not NOW.hooks:
        return None  # within a checkpoint of the forward's own, whose recomputation is alone as well
    return group.output(layer, x)


def _saving_hooks() -> Any:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks and hooks[0]


class _Group:
    """Layers, in the order of their calls, and what was computed of them and not taken yet."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._x: Optional[Tensor] = None
        self._version = 0
        self._held: dict[int, tuple[Tensor, tuple]] = {}

    def output(self, layer: Any, x: Any) -> Optional[Tensor]:
        if not accepts_input(x) or x.is_inference() or x.numel() < _FEWEST_TOKENS * x.shape[-1]:
            return None
        if (held := self._held.pop(id(layer), None)) is not None:
            y, state = held
            return y if x is self._x and x._version == self._version and state == _state(layer, x) else None
        return self._compute(layer, x)

    def _compute(self, leader: Any, x: Tensor) -> Optional[Tensor]:
        """Returns the leader's output, and holds the others'; None: it is not the first that can join, or is alone."""
        if kernel_reason("lora_linears", x.device.type) is not None:
            return None
        if any(map(hooked, self._layers)):
            return None  # who sees one's call may write into x, past its version
        found = []
        for layer in self._layers:
            if (state := _state(layer, x)) is None or (call := layer.joint_call(x)) is None:
                continue
            if not found and layer is not leader:
                return None
            found.append((layer, state, call))
        if len(found) < 2:
            return None
        weights, biases, lora_As, lora_Bs, rank_scales, scalings, ps, dtypes = zip(
            *(call for *_, call in found), strict=True
        )
        ys = ops.lora_linears(x, weights, lora_As, lora_Bs, biases, rank_scales=rank_scales, scalings=scalings,
                              dropout_ps=ps, training=True)  # fmt: skip
        ys = [y if y.dtype is dtype else y.to(dtype) for y, dtype in zip(ys, dtypes, strict=True)]
        self._x, self._version = x, x._version
        self._held = {id(layer): (y, state) for (layer, state, _), y in zip(found[1:], ys[1:], strict=True)}
        return ys[0]


def _state(layer: Any, x: Tensor) -> Optional[tuple]:
    state = layer.joint_state()
    return None if state is None else (*state, torch.is_grad_enabled(), autocast_dtype(x))
