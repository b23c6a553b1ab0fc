"""Finds linear layers whose weight another module's code reads directly: quantization must keep these layers dense.

:func:`weights_read_past` searches the source code of the modules' classes for reads such as T5's
``self.wo.weight.dtype``, Mamba's ``self.dt_proj.weight @ dt``, and a concatenation of two weights in a head of
MobileBERT.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import linecache
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Optional

from torch import nn

# Names of methods that initialize weights. Reads of a weight in these methods do not count, because the methods run
# before a model is quantized.
_SET_UP = ("__init__", "_init_weights", "reset_parameters", "init_weights", "tie_weights")
# _NEVER is an option of configurations, for tensor parallelism in pretraining. Reads of a weight in a branch for the
# option _NEVER do not count.
_NEVER = "pretraining_tp"
# Packages whose layers accept 4-bit base weights: reads by the code of these packages do not count.
_OF_ADAPTERS = ("peft", "peft_ext")
# Names that show that a method expects weights of dtype uint8.
_KNOWS_BYTES = ("uint8", "is_floating_point")
_BASE = re.compile(r"(\.base_layer)+$")  # the end of the dotted name of an adapted layer's base layer


def weights_read_past(model: nn.Module) -> set[str]:
    """Returns the dotted names of modules below ``model`` whose weight the code of another module reads.

    The weight of an adapted layer is the weight of its base layer, whose name is returned too.
    """
    found = {
        f"{name}.{path}" if name else path for name, module in model.named_modules() for path in _reads(type(module))
    }
    return found.union(name for name, _ in model.named_modules() if _BASE.search(name) and _BASE.sub("", name) in found)


@functools.cache
def _reads(kind: type) -> frozenset[str]:
    """Returns the dotted paths of submodules whose ``weight`` a method of the class ``kind`` reads.

    These reads do not count: reads of ``weight.device``; reads of ``weight.dtype`` in a method that uses a name of
    ``_KNOWS_BYTES``, because such a method expects weights of dtype uint8; reads in a method of ``_SET_UP``, in a class
    of PEFT or peft_ext, in a call of ``isinstance``, and in a branch for the option ``_NEVER``.
    """
    found: set[str] = set()
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        if owner.__module__.partition(".")[0] in _OF_ADAPTERS:
            continue
        for method in _methods(owner):
            knows = any(isinstance(node, (ast.Attribute, ast.Name)) and _name(node) in _KNOWS_BYTES
                        for node in ast.walk(method))  # fmt: skip
            found.update(path for path, of in _weights(method) if of != "device" and not (of == "dtype" and knows))
    return frozenset(found)


def _methods(owner: type) -> list[ast.AST]:
    try:
        files = {inspect.getsourcefile(owner)}
    except (TypeError, OSError):
        # The class is from a compiled module, has no module, or was typed into a notebook or an interpreter. The module
        # linecache keeps the text of a notebook's cell under the file name in the code objects of the cell's functions.
        files = {getattr(getattr(value, "__code__", None), "co_filename", None) for value in vars(owner).values()}
    # For a class without a source text, no read is found.
    body = [node for file in files if file is not None for node in _classes(file).get(owner.__name__, [])]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in body if isinstance(node, kinds) and node.name not in _SET_UP]


@functools.cache
def _classes(file: str) -> dict[str, list[ast.stmt]]:
    """Returns a dict from the name of each class in a source file to the statements of the class's body. If two classes
    have the same name, their bodies are joined."""
    found: dict[str, list[ast.stmt]] = defaultdict(list)
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse("".join(linecache.getlines(file)))):
            if isinstance(node, ast.ClassDef):
                found[node.name] += node.body
    return found


def _weights(node: ast.AST, of: str = "") -> Iterator[tuple[str, str]]:
    """Yields the path of each expression ``self.path.weight``, and the attribute of the weight that the code reads; ""
    if the code reads the weight itself. Skips calls of ``isinstance`` and branches for the option ``_NEVER``."""
    if isinstance(node, ast.Attribute):
        path = _path(node.value) if node.attr == "weight" else None
        if path:
            yield path, of
            return
        of = node.attr
    else:
        of = ""
    if isinstance(node, ast.Call) and _name(node.func) == "isinstance":
        return
    if isinstance(node, (ast.If, ast.IfExp)) and any(_name(n) == _NEVER for n in ast.walk(node.test)):
        for other in node.orelse if isinstance(node, ast.If) else [node.orelse]:
            yield from _weights(other)
        return
    for child in ast.iter_child_nodes(node):
        yield from _weights(child, of)


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _path(node: ast.AST) -> Optional[str]:
    """Returns "a.b" for the expression ``self.a.b``; None for any other expression."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" and names else None
