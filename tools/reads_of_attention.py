"""Reads, from the source of an attention's forward, which layers receive one input tensor, and how the forward chooses
its attention function.

tools/forms.py uses this module to draw forms.tsv, the table of known forms. A person reviews each new row of forms.tsv
before the row is committed.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

from peft_ext.integrations.forms import Form

# Names of attributes of ``self`` that the forward of an attention with rotary positions may read, in addition to the
# attention's layers and to the attributes in _OPTIONS.
_READS = {"attention_dropout", "config", "head_dim", "layer_idx", "scaling", "training"}
_COMPARED = tuple(f"self.config._attn_implementation {operator} 'eager'" for operator in ("!=", "=="))
_OPTIONS = {
    "sliding_window": "sliding_window:sliding_window",
    "attn_logit_softcapping": "softcap:attn_logit_softcapping",
    "sinks": "s_aux:sinks",
}
_OF_CONFIG = "sliding_window"  # an option that some classes read from their configuration by getattr


def attention_formulas(cls: type, form: Form) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields pairs of the kind and the formula of a row of forms.tsv that may fit an attention class, the most specific
    pair first."""
    groups, asks = groups_in(cls.forward), _asks_by_config(cls)
    inputs = ",".join("+".join(names) for names in groups)
    if asks and groups and len(groups[0]) == 3:
        yield from (
            ("attention", {"inputs": inputs, "interface": "yes", **rest}) for rest in _own_forwards(cls, form, groups)
        )
    if asks:
        yield "attention", {**({"inputs": inputs} if inputs else {}), "interface": "yes"}
    elif groups and not form.writes:
        yield "projections", {"inputs": inputs}


def _own_forwards(cls: type, form: Form, groups: tuple[tuple[str, ...], ...]) -> Iterator[dict[str, str]]:
    """Yields the formulas of peft_ext's forward for rotary positions that may fit the class; the proof finds which
    formula fits."""
    reads = set(form.reads) - set(groups[0]) - _READS
    norms = {"q_norm", "k_norm"} <= reads
    reads -= {"q_norm", "k_norm"}
    options = [option for name, option in _OPTIONS.items() if name in reads]
    if _OF_CONFIG not in reads and _OF_CONFIG in _constants(cls.forward):
        options.append(f"{_OF_CONFIG}:config.{_OF_CONFIG}")
    out = reads - set(_OPTIONS)
    if len(groups) > 1 or len(out) != 1 or "apply_rotary_pos_emb" not in inspect.unwrap(cls.forward).__code__.co_names:
        return
    names = set(inspect.signature(inspect.unwrap(cls.forward)).parameters)
    cache = [name for name in ("cache", "past_key_values", "past_key_value") if name in names]
    caches = [f"{cache[0]}:{style}" for style in ("kwargs", "positions", "plain")] if cache else [""]
    for norm, style in itertools.product(("head", "flat") if norms else ("",), caches):
        formula = {
            "forward": "rotary",
            "norms": norm,
            "o": out.copy().pop(),
            "cache": style,
            "options": ",".join(options),
        }
        yield {name: value for name, value in formula.items() if value}


def _constants(forward: Callable) -> set[Any]:
    """Returns the strings in the code of a forward."""
    return {constant for constant in inspect.unwrap(forward).__code__.co_consts if isinstance(constant, str)}


def _asks_by_config(cls: type) -> bool:
    """Returns whether the functions of :func:`_reached` choose an attention function in transformers' registry once, by
    ``self.config._attn_implementation``, use this attribute otherwise only to compare it with "eager", and pass
    ``self.config`` to no other code.
    """
    if "ALL_ATTENTION_FUNCTIONS" not in inspect.unwrap(cls.forward).__code__.co_names:
        return False
    asked = [_asked(function) for function in _reached(cls)]
    return None not in asked and sum(asked) == 1


def _asked(function: Callable) -> Optional[int]:
    """Returns how often the code of a function chooses an attention function by ``self.config._attn_implementation``.
    Returns None if the code uses this attribute otherwise than in a comparison with "eager", if the code passes
    ``self.config`` on, or if the source cannot be read.
    """
    if (tree := _tree(function)) is None:
        return None
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    asked = 0
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "config" and ast.unparse(node) == "self.config"):
            if isinstance(node, ast.Attribute) and node.attr == "_attn_implementation":
                if ast.unparse(node.value) != "self.config":
                    return None
            continue
        around = parents[node]
        if isinstance(around, ast.Call) and ast.unparse(around.func) == "getattr" and len(around.args) > 1:
            if isinstance(around.args[1], ast.Constant) and around.args[1].value != "_attn_implementation":
                continue
        if not isinstance(around, ast.Attribute):
            return None
        if around.attr != "_attn_implementation":
            continue
        use = parents[around]
        in_call = isinstance(use, ast.Call) and ast.unparse(use.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
        in_index = isinstance(use, ast.Subscript) and ast.unparse(use.value) == "ALL_ATTENTION_FUNCTIONS"
        is_eager = isinstance(use, ast.Compare) and ast.unparse(use) in _COMPARED
        if not (in_call or in_index or is_eager):
            return None
        asked += in_call or in_index
    return asked


def _reached(cls: type) -> list[Callable]:
    """Returns the forward of a class, and the methods of the class and the functions of the class's Python module that
    the forward calls by name, directly or through other functions of the result."""
    found: list[Callable] = [inspect.unwrap(cls.forward)]
    for function in found:  # the list `found` grows in this loop
        codes = [function.__code__]
        for code in codes:
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in {name for code in codes for name in code.co_names}:
            for value in (inspect.getattr_static(cls, name, None), function.__globals__.get(name)):
                value = getattr(value, "fget", None) or getattr(value, "__func__", value)
                value = inspect.unwrap(value) if isinstance(value, types.FunctionType) else None
                if value is not None and value.__module__ == cls.__module__ and value not in found:
                    found.append(value)
    return found


def _tree(forward: Callable) -> Optional[ast.AST]:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return None


def groups_in(forward: Callable) -> tuple[tuple[str, ...], ...]:
    """Returns the groups of child modules that a forward calls with one input, such as ``(("q_proj", "k_proj"),)``.

    A group has at least two names. The result is empty if there is no group, or if the source cannot be read. The calls
    of a group have the form ``self.name(variable)``, with the same variable, in one block of statements. Between the
    calls of a group, no statement assigns the variable, reads an attribute ``data``, or changes a part of ``self`` in
    place.
    """
    if (tree := _tree(forward)) is None:
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
            continue  # the code of a nested function may run later, or again in the backward
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
    """Returns whether a node reads an attribute ``data``, assigns to an attribute or an element of the module, or calls
    an in-place method or function on the module or a part of it.
    """
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
    """Yields the names ``child`` and ``variable`` of each call ``self.child(variable)`` in a statement, in the order of
    execution. Leaves out calls that may not run or may run several times, such as those in a lambda or a comprehension.
    """
    if isinstance(node, (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child)
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        called, value = node.func, node.args[0]
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
            if isinstance(value, ast.Name):
                yield called.attr, value.id
