"""The digest of the code of a forward: the key of the table of known forms.

    digest = SHA-256 of  the syntax tree of the forward, without docstrings, comments, annotations and decorators,
                         and of each value that the code finds by name: among others the repr of a plain value, the
                         name of a builtin, of a function or class of PyTorch, or of a class of transformers, and
                         for another Python function its syntax tree and the values that it finds itself

The digest is computed from the function and class objects of the running process. The source of a function is used only
if compiling the source gives the code object of the function. Code that this module cannot read completely (for example
an instance of an unknown class, an import in a function's body of a module that ``_IMPORTED`` does not name, a tensor
among the defaults) raises :class:`Unknown`: the forward then has no form.
"""

from __future__ import annotations

import ast
import builtins
import dis
import enum
import functools
import hashlib
import inspect
import linecache
import logging
import os
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

__all__ = ["Form", "Unknown", "digest_of", "form_of"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device)
_TORCH = str(Path(torch.__file__).parent) + "/"
# Modules of transformers whose decorators call the decorated function, with arguments renamed or after a warning.
_TRANSPARENT = ("transformers.utils.deprecation", "transformers.utils.generic", "transformers.utils.output_capturing")
# The module of transformers that wraps the forward of a decoder layer for gradient checkpointing.
_CHECKPOINTS = ("transformers.modeling_layers",)
# Methods by which a class can change what its attributes or its calls do, while the code of its forward stays the same.
# A module class that overrides one of the methods in _OWN_WAYS has no form.
_OWN_WAYS = ("__call__", "__getattr__", "__getattribute__", "_call_impl", "_wrapped_call_impl")
# Standard modules whose classes enter the digest by name.
_STANDARD = ("builtins", "collections", "collections.abc", "contextlib", "functools", "typing")
# Modules that a function may import in its body without losing its form.
_IMPORTED = ("math", "os", "torch", "warnings")
_SKIPPED = ("annotation", "returns", "decorator_list", "type_comment", "type_params", "ctx", "kind")


class Unknown(Exception):
    """Raised if code uses a value that this module cannot read completely."""


@dataclass(frozen=True)
class Form:
    """The form of a forward or of a function: a digest of its code, the attributes of ``self`` that the code reads, and
    whether the code writes to ``self``.

    Attributes:
        digest: the digest of the code, 20 hexadecimal digits.
        reads: sorted names of the attributes that the code reads from the instance and that the class does not define.
        of_class: sorted names of the attributes that the code finds on the class. No instance may override an attribute
            in ``of_class``.
        passes_itself: whether the code uses the instance itself, for example as an argument of a call.
        writes: whether the code assigns to attributes or items of the instance.
    """

    digest: str
    reads: tuple[str, ...]
    of_class: tuple[str, ...]
    passes_itself: bool
    writes: bool


def form_of(subject: Any, method: str = "forward") -> Form:
    """Returns the form of a class's method (by default the forward) or of a Python function.

    Raises: Unknown if the code has no form; the text of the error is the reason.
    """
    walk = _Walk(subject if isinstance(subject, type) else None)
    if isinstance(subject, type):
        for name in _OWN_WAYS:
            if getattr(subject, name, None) is not getattr(nn.Module, name, None) and issubclass(subject, nn.Module):
                raise Unknown(f"its class has a {name} of its own")
        kind = next((kind for kind in subject.__mro__ if method in vars(kind)), object)
        value = walk.function(vars(kind).get(method), kind)
    else:
        value = walk.function(subject)
    digest = hashlib.sha256(repr(value).encode()).hexdigest()[:20]
    return Form(digest, tuple(sorted(walk.reads)), tuple(sorted(walk.found)), walk.passes_itself, walk.writes)


def digest_of(functions: Iterable[types.FunctionType]) -> str:
    """Returns the digest of the syntax trees of functions alone, without the values that the functions find by name.

    Raises: Unknown if a function has no source, or if its source is not the code that runs.
    """
    trees = [_canonical(_tree(function)) for function in functions]
    return hashlib.sha256(repr(trees).encode()).hexdigest()[:20]


class _Walk:
    """One walk through the code of a forward and of the functions that the forward uses.

    In the digest, a nested structure of tuples, lists, strings and integers stands for each value that the code finds.
    The digest is computed from the structure that stands for the forward.
    """

    def __init__(self, owner: Optional[type]) -> None:
        self._owner = owner
        self._seen: dict[types.CodeType, int] = {}
        self.reads: set[str] = set()
        self.found: set[str] = set()
        self.passes_itself = self.writes = False

    def of_class(self, owner: type, name: str, after: Optional[type] = None) -> Any:
        """Returns the structure that stands for the attribute ``name`` of the class ``owner`` in the digest. With
        ``after``, the search begins behind the class ``after`` in the MRO of ``owner``."""
        classes = owner.__mro__
        for kind in classes[0 if after is None else classes.index(after) + 1 :]:
            if name in vars(kind):
                return self._attribute(kind, name, vars(kind)[name])
        raise KeyError(name)

    def _attribute(self, kind: type, name: str, value: Any) -> Any:
        if kind in (nn.Module, object):
            return "Module", name
        if isinstance(value, classmethod):
            raise Unknown(f"{name} is a class method")
        if isinstance(value, staticmethod):
            return self._value(value.__func__, name, None)
        if isinstance(value, property):
            value = value.fget
        return self._value(value, name, kind)

    def function(self, function: Any, kind: Optional[type] = None) -> Any:
        """Returns the structure that stands for a Python function in the digest. ``kind``: the class that defines the
        function, if it is a method."""
        if not isinstance(function, types.FunctionType):
            raise Unknown(f"{_name(function)} is no Python function")
        # transformers wraps the forward of a decoder layer for gradient checkpointing. Of the wrapper, only its own
        # syntax tree enters the digest, and no value that its code finds by name, because in a call without a gradient
        # the wrapper only calls the wrapped function.
        if _is_wrapper_of(function, _CHECKPOINTS):
            return "checkpointed", _canonical(_tree(function)), self.function(function.__wrapped__, kind)
        if _is_wrapper_of(function, _TRANSPARENT):
            return "wrapped", _qualname(function.__code__), self.function(function.__wrapped__, kind)
        code = function.__code__
        if code in self._seen:
            return "again", self._seen[code]
        self._seen[code] = len(self._seen)
        node, defaults = _tree(function), (function.__defaults__, function.__kwdefaults__)
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        this = code.co_varnames[0] if kind is not None and code.co_argcount else None
        reached = {}
        for path in sorted(_paths(node, code, this)):
            reached[".".join(path)] = self._path(path, function, cells, kind, this)
        return "function", _canonical(node), self._value(defaults, "a default", None), sorted(reached.items())

    def _path(
        self, path: tuple[str, ...], function: types.FunctionType, cells: dict[str, Any], kind: Any, this: Any
    ) -> Any:
        root, *names = path
        if root == this:
            return self._of_instance(names)
        if root == "super()":
            if not names:
                raise Unknown("it hands super() on")
            return self.of_class(self._owner, names[0], after=kind)
        if root in cells:
            try:
                value = cells[root].cell_contents
            except ValueError:
                raise Unknown(f"{root} is not set yet") from None
            if root == "__class__":
                return "__class__"
        elif root in function.__globals__:
            value = function.__globals__[root]
        elif hasattr(builtins, root):
            value = getattr(builtins, root)
        else:
            raise Unknown(f"{root} stands for nothing")
        while isinstance(value, types.ModuleType) and names:
            name = names.pop(0)
            if not hasattr(value, name):
                raise Unknown(f"{value.__name__} has no {name}")
            value = getattr(value, name)
        if isinstance(value, type) and names and not _is_torchs_class(value):
            raise Unknown(f"it reads {names[0]} of the class {_name(value)}")
        if value is os.environ or _asks_for_the_environment(value, root, function):
            return "environment", root
        return self._value(value, root, None)

    def _of_instance(self, names: list[str]) -> Any:
        if not names:
            self.passes_itself = True
            return "itself"
        if names[0] == "=":
            self.writes = True
            return "assigned"
        if names[0].startswith("__"):
            raise Unknown(f"it reads {names[0]} of itself")
        try:
            value = self.of_class(self._owner, names[0])
        except KeyError:
            self.reads.add(names[0])
            return "read"
        self.found.add(names[0])
        return value

    def _value(self, value: Any, name: str, kind: Optional[type]) -> Any:
        """Returns the structure that stands in the digest for ``value``, which code finds by the name ``name``."""
        if isinstance(value, enum.Enum):
            return "enum", _name(type(value)), value.name
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, (tuple, list)):
            return type(value).__name__, [self._value(one, name, None) for one in value]
        if isinstance(value, (set, frozenset)):
            return "set", sorted(repr(self._value(one, name, None)) for one in value)
        if isinstance(value, dict):
            return "dict", [(self._value(key, name, None), self._value(of, name, None)) for key, of in value.items()]
        if isinstance(value, types.BuiltinFunctionType) or isinstance(value, types.MethodDescriptorType):
            owner = getattr(value, "__self__", None)
            return "builtin", getattr(owner, "__name__", type(owner).__name__), value.__name__
        if isinstance(value, types.FunctionType):
            if _is_torchs(value):
                return "torch", value.__module__, value.__qualname__
            if value is vars(inspect).get(value.__name__) and value.__code__.co_filename == inspect.__file__:
                return "inspect", value.__name__
            return self.function(value, kind)
        if isinstance(value, type):
            if value.__module__ in _STANDARD or _is_torchs_class(value):
                return "class", _name(value)
            if _is_transformers_class(value):
                return "class", value.__qualname__
            raise Unknown(f"it asks for {name}, a class")
        if isinstance(value, logging.Logger):
            return "logger"
        if (registry := _registry(value)) is not None:
            return registry
        raise Unknown(f"it reads {name}, a {_name(type(value))}")


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _is_torchs(function: types.FunctionType) -> bool:
    """Returns whether a function is PyTorch's own code and not a wrapper around another function."""
    return function.__code__.co_filename.startswith(_TORCH) and not hasattr(function, "__wrapped__")


def _is_torchs_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return str(getattr(module, "__file__", "")).startswith(_TORCH) or kind.__module__ == "torch._C"


def _is_transformers_class(kind: type) -> bool:
    """Returns whether ``kind`` is the very class that its module of transformers holds under the class's name."""
    module = sys.modules.get(kind.__module__)
    return kind.__module__.startswith("transformers.") and getattr(module, kind.__qualname__, None) is kind


def _is_wrapper_of(function: types.FunctionType, modules: tuple[str, ...]) -> bool:
    """Returns whether ``function`` wraps a function that is in its closure, and is defined in the file of one of
    ``modules``."""
    inner = getattr(function, "__wrapped__", None)
    if not isinstance(inner, types.FunctionType) or not any(
        cell.cell_contents is inner for cell in _set_cells(function)
    ):
        return False
    file = function.__code__.co_filename
    return any(file == getattr(sys.modules.get(name), "__file__", None) for name in modules)


def _asks_for_the_environment(value: Any, name: str, function: types.FunctionType) -> bool:
    """Returns whether a value is transformers' flag or function that tells which backend or version is installed.

    The value may differ between machines, so the digest has only the value's name.
    """
    if isinstance(value, bool):
        return name.lstrip("_").startswith("is_torch_") and function.__module__.startswith("transformers.")
    value = getattr(value, "__wrapped__", value)
    utils = sys.modules.get("transformers.utils.import_utils")
    return isinstance(value, types.FunctionType) and value.__code__.co_filename == getattr(utils, "__file__", None)


def _set_cells(function: types.FunctionType) -> Iterator[Any]:
    """Yields those cells of a function's closure that have a value."""
    for cell in function.__closure__ or ():
        try:
            cell.cell_contents  # noqa: B018  raises ValueError if the cell is empty
        except ValueError:
            continue
        yield cell


def _registry(value: Any) -> Optional[tuple[str, str]]:
    """Returns the structure that stands for ``value`` in the digest if ``value`` is transformers' own registry of
    attention functions and has no local entries; else None."""
    utils = sys.modules.get("transformers.modeling_utils")
    known = getattr(utils, "ALL_ATTENTION_FUNCTIONS", None)
    return ("registry", "attention") if known is not None and value is known and not value._local_mapping else None


# --- source -----------------------------------------------------------------------------------------------------------


# Maps a file name to the file's text, and to the code objects and syntax trees of the file's functions by name and
# first line.
_FILES: dict[str, tuple[str, dict[tuple[str, int], list[tuple[types.CodeType, ast.AST]]]]] = {}


def _tree(function: types.FunctionType) -> Any:
    """Returns the syntax tree of a function. Raises Unknown if the function has no source, or if the source does not
    compile to the function's code."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not text:
        raise Unknown(f"{_name(function)} has no source")
    known = _FILES.get(code.co_filename)
    if known is None or known[0] != text:
        known = _FILES[code.co_filename] = text, _functions_in(text, code.co_filename)
    for compiled, node in known[1].get((code.co_name, code.co_firstlineno), ()):
        if compiled == code:
            return node
    raise Unknown(f"the source of {_name(function)} is not the code that runs")


def _functions_in(text: str, file: str) -> dict[tuple[str, int], list[tuple[types.CodeType, ast.AST]]]:
    try:
        tree = ast.parse(text, file)
        compiled = compile(text, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        raise Unknown(f"{file} cannot be parsed") from None
    nodes: dict[tuple[str, int], list[ast.AST]] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            line = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            nodes.setdefault((node.name, line), []).append(node)
        elif isinstance(node, ast.Lambda):
            nodes.setdefault(("<lambda>", node.lineno), []).append(node)
    found: dict[tuple[str, int], list[tuple[types.CodeType, ast.AST]]] = {}
    for code in _codes(compiled):
        key = code.co_name, code.co_firstlineno
        if len(nodes.get(key, ())) == 1:  # two functions of one name in one line can't be told apart
            found.setdefault(key, []).append((code, nodes[key][0]))
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _codes(value)


@functools.cache
def _qualname(code: types.CodeType) -> str:
    """Returns the qualified name under which the source defines a function's code; functools.wraps does not change this
    name."""
    return code.co_qualname if sys.version_info >= (3, 11) else _qualname_of_source(code)


def _qualname_of_source(code: types.CodeType) -> str:
    """Returns the qualified name of a function's code for Python 3.10, whose code objects have no ``co_qualname``."""
    try:
        module = compile("".join(linecache.getlines(code.co_filename)), code.co_filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        raise Unknown(f"{code.co_filename} cannot be parsed") from None
    names = {module: ""}
    for outer in _codes(module):
        is_function = outer.co_flags & inspect.CO_OPTIMIZED
        for inner in filter(lambda value: isinstance(value, types.CodeType), outer.co_consts):
            names[inner] = f"{names[outer]}{'.<locals>' * bool(is_function)}.{inner.co_name}".removeprefix(".")
    if code not in names:
        raise Unknown(f"the source of {code.co_name} is not the code that runs")
    return names[code]


def _canonical(node: Any) -> Any:
    """Returns a syntax tree as nested lists and tuples without the fields in ``_SKIPPED``, without empty fields and
    without docstrings, so that the digest does not depend on the version of Python."""
    if isinstance(node, list):
        return [_canonical(one) for one in node]
    if isinstance(node, ast.Constant):
        return "Constant", repr(node.value)
    if isinstance(node, ast.AnnAssign):
        return None if node.value is None else ("Assign", [_canonical(node.target)], _canonical(node.value))
    if isinstance(node, ast.Assign):
        return "Assign", _canonical(node.targets), _canonical(node.value)
    if not isinstance(node, ast.AST):
        return node
    fields = []
    for name, value in ast.iter_fields(node):
        if name in _SKIPPED or value is None or value == []:
            continue
        if name == "name" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not fields:
            continue
        if name == "body" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            value = value[1:]
        fields.append((name, _canonical(value)))
    return type(node).__name__, fields


def _paths(node: ast.AST, code: types.CodeType, this: Optional[str]) -> set[tuple[str, ...]]:
    """Returns paths: tuples of a name that a function's code finds outside of the function, and of the attributes that
    the code reads from the named value.

    A path that begins with the instance ``this`` has one attribute, as ("self", "weight"). The path is ("self",) where
    the code uses the instance itself, and ("self", "=") where the code assigns to an attribute or item of the instance.
    """
    outside: set[str] = set()
    for inner in _codes(code):
        outside |= set(inner.co_freevars)
        for step in dis.get_instructions(inner):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                outside.add(step.argval)
            elif step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                raise Unknown(f"it sets {step.argval}")
            elif step.opname == "IMPORT_NAME" and step.argval not in _IMPORTED:
                raise Unknown(f"it imports {step.argval}")
    outside -= set(code.co_cellvars) | set(code.co_varnames)
    if this is not None:
        outside.add(this)
    found: set[tuple[str, ...]] = set()
    for statement in node.body if isinstance(node.body, list) else [node.body]:
        _visit(statement, outside, this, found)
    return found


def _visit(node: ast.AST, outside: set[str], this: Optional[str], found: set[tuple[str, ...]]) -> None:
    names: list[str] = []
    value = node
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    if names and _is_super(value):
        found.add(("super()", names[-1]))
        return
    if isinstance(value, ast.Name) and value.id in outside:
        if value.id != this:
            found.add((value.id, *reversed(names)))
        elif not names:
            if not isinstance(value.ctx, ast.Load):
                raise Unknown(f"it gives {this} another value")
            found.add((this,))
        else:
            found.add((this, names[-1]))
            if not isinstance(node.ctx, ast.Load):
                found.add((this, "="))
        return
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        root = node.value
        while isinstance(root, (ast.Attribute, ast.Subscript)):
            root = root.value
        if isinstance(root, ast.Name) and root.id == this:
            found.add((this, "="))
    if isinstance(node, ast.Attribute) and (static := inspect.getattr_static(Tensor, node.attr, None)) is not None:
        if isinstance(static, types.FunctionType):  # PyTorch's Python methods and their wrappers are in PyTorch's files
            is_own = static.__code__.co_filename.startswith(_TORCH)
        else:  # a method that is written in C has its own name in `__name__`
            is_own = getattr(static, "__name__", node.attr) == node.attr
        if not is_own:
            raise Unknown(f"torch.Tensor.{node.attr} was replaced")
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        for default in (*node.args.defaults, *(one for one in node.args.kw_defaults if one is not None)):
            _visit(default, outside, this, found)
        for statement in node.body if isinstance(node.body, list) else [node.body]:
            _visit(statement, outside, this, found)
        return
    for field, child in ast.iter_fields(node):
        if field in _SKIPPED:
            continue
        for one in child if isinstance(child, list) else [child]:
            if isinstance(one, ast.AST):
                _visit(one, outside, this, found)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args
