"""A loop over experts that are modules of their own, in two: what leads to each call of one, and what follows it.

    for e in hit:                                    waiting = []
        at, token = torch.where(mask[e])             for e in hit:
        rows = x[token]                                  at, token = torch.where(mask[e])
        y = self.experts[e](rows) * w[token, at]  →      rows = x[token]
        out.index_add_(0, token, y)                      waiting.append((self.experts[e], rows, (at, token)))
                                                     for result, (at, token) in outputs(waiting):
                                                         y = result * w[token, at]
                                                         out.index_add_(0, token, y)

So all calls are known before the first, and can be one. The loop is split where its source shows that nothing in the
first part depends on what the second part does in an earlier turn: no name that it gives a value (a count of rows alone
goes to the first part), nothing that it changes in place, and nothing that it calls but tensors' methods, torch's
functions and a torch.nn module of its own. At run time the tensors that are changed must share no memory with those
that are read; else the loop runs as it is written. The source is what runs: compiled again, it has to give the
forward's own code.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .names import ModuleNames, only_reads_globals, remade

__all__ = ["split"]

# Names of the new code, which no other code has.
_APART, _OUTPUTS, _WAITING, _RESULT = (f"peft_ext_{name}_" for name in ("apart", "outputs", "waiting", "result"))
_BUILTINS = {"enumerate", "float", "int", "isinstance", "len", "list", "max", "min", "range", "tuple", "zip"}
_TORCH = {"torch": torch, "F": F, "nn": nn}
# Functions of torch's that give a result and do nothing else.
_FUNCTIONS = {
    "all", "any", "arange", "argsort", "bincount", "bmm", "cat", "clamp", "count_nonzero", "cumsum", "einsum", "empty",
    "empty_like", "eq", "flatten", "full", "full_like", "gather", "ge", "greater", "gt", "index_add", "index_select",
    "isin", "le", "logical_and", "logical_not", "logical_or", "lt", "masked_select", "matmul", "max", "mean", "min",
    "mm", "mul", "ne", "nonzero", "numel", "one_hot", "ones", "ones_like", "reshape", "scatter_add", "sigmoid",
    "softmax", "sort", "squeeze", "stack", "sum", "tensor", "topk", "transpose", "unique", "unsqueeze", "where",
    "zeros", "zeros_like",
}  # fmt: skip
# Methods beside those with an underscore behind that change what they are called on, whatever it is.
_CHANGES = {"append", "extend", "insert", "pop", "remove", "clear", "update", "add", "discard", "sort", "reverse",
            "setdefault", "popitem", "backward", "register_hook", "retain_grad"}  # fmt: skip
_REFUSED = (ast.For, ast.While, ast.AsyncFor, ast.With, ast.AsyncWith, ast.Try, ast.Break, ast.Return, ast.Raise,
            ast.Yield, ast.YieldFrom, ast.Await, ast.NamedExpr, ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef,
            ast.ClassDef, ast.Global, ast.Nonlocal, ast.Delete, ast.Import, ast.ImportFrom, ast.ListComp, ast.SetComp,
            ast.DictComp, ast.GeneratorExp, ast.Starred, ast.Match, ast.Assert)  # fmt: skip
_NUMBERS = (int, float)
_SCALARS = (*_NUMBERS, str, torch.dtype, torch.device, range, type(None))
# What a count of rows is made of.
_SUMS = (ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.Add, ast.Sub, ast.Mult)


class _Unsplit(Exception):
    """Why a loop stays as it is."""


@functools.cache
def split(forward: Callable, outputs: Callable[[list], Iterable[tuple[Tensor, tuple]]]) -> Optional[Callable]:
    """Returns a forward that hands its loop's calls to ``outputs``, a list of (expert, rows, names' values), and takes
    pairs of a result and these values from it; None: there is no such loop, or it can't be split."""
    return remade(forward, lambda inner: _split(inner, outputs))


def _split(function: types.FunctionType, outputs: Callable) -> Optional[types.FunctionType]:
    # Who asks for all names would see the new ones; a function within sees those of a turn.
    if not only_reads_globals(function) or function.__code__.co_cellvars:
        return None
    if {"locals", "vars", "dir"} & set(function.__code__.co_names):
        return None
    try:
        tree = _tree(function)
        found = [loop for loop in ast.walk(tree.body[0]) if isinstance(loop, ast.For) and any(_candidates(loop))]
        if len(found) != 1:
            return None
        halves = _Halves(tree.body[0], found[0], function)
    except _Unsplit:
        return None
    _replace(tree.body[0], found[0], halves.statement())
    code = _compiled(tree, function)
    apart = functools.partial(_apart, halves)
    names = ModuleNames(function.__globals__, ((_APART, apart), (_OUTPUTS, outputs)))
    made = types.FunctionType(code, names, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


# --- source and code --------------------------------------------------------------------------------------------------


def _tree(function: types.FunctionType) -> ast.Module:
    """Returns the tree of a function's source, whose code is the function's."""
    try:
        lines, first = inspect.getsourcelines(function)
        # As it stands, under something that takes its indentation: that is part of what is in quotes.
        tree = ast.parse("if True:\n" + "".join(lines) if lines[0][:1].isspace() else "\n" + "".join(lines))
    except (OSError, TypeError, SyntaxError) as error:
        raise _Unsplit from error
    body = tree.body[0].body if isinstance(tree.body[0], ast.If) else tree.body
    if function.__code__.co_freevars or function.__code__.co_varnames[:1] != ("self",):
        raise _Unsplit
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
        raise _Unsplit
    tree = ast.increment_lineno(ast.Module(body, []), first - 2)
    definition, arguments = tree.body[0], tree.body[0].args
    definition.decorator_list, definition.returns = [], None
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    if not _is_same(_compiled(tree, function), function.__code__):
        raise _Unsplit
    return tree


def _compiled(tree: ast.Module, function: types.FunctionType) -> types.CodeType:
    flags = function.__code__.co_flags & sum({getattr(__future__, name).compiler_flag
                                              for name in __future__.all_feature_names})  # fmt: skip
    # Of an imported module's functions Python has other instructions than of a value's methods.
    modules = [name for name in function.__code__.co_names
               if isinstance(function.__globals__.get(name), types.ModuleType)]  # fmt: skip
    imports = [ast.Import([ast.alias(name)]) for name in modules]
    tree = ast.fix_missing_locations(ast.Module([*imports, *tree.body], []))
    module = compile(tree, function.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    return next(value for value in module.co_consts if isinstance(value, types.CodeType))


def _is_same(found: types.CodeType, wanted: types.CodeType) -> bool:
    def about(code: types.CodeType) -> tuple:
        constants = [about(one) if isinstance(one, types.CodeType) else (type(one), one) for one in code.co_consts]
        return code.co_code, code.co_names, code.co_varnames, code.co_flags & ~inspect.CO_NESTED, constants

    return about(found) == about(wanted)


def _replace(tree: ast.AST, old: ast.stmt, new: ast.stmt) -> None:
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and old in value:
                value[value.index(old)] = new
                return


# --- the two halves ---------------------------------------------------------------------------------------------------


class _Halves:
    """A loop of a function's, taken apart. Names that were there before the loop: ``changed`` in place by the second
    half, ``read`` by the first, ``used`` by any, and ``counts`` that the first adds numbers to; ``paths`` to attributes
    of ``self`` that the first half reads, and ``children`` of it that the second calls."""

    def __init__(self, tree: ast.FunctionDef, loop: ast.For, function: types.FunctionType) -> None:
        self.loop, self.function, body = loop, function, loop.body
        calls = [(i, call) for i, statement in enumerate(body) for call in _candidates_in(statement, loop)]
        if len(calls) != 1 or loop.orelse or not _is_once(tree, loop):
            raise _Unsplit
        at, self.call = calls[0]
        if not isinstance(body[at], (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr)):
            raise _Unsplit
        if any(isinstance(node, _REFUSED) for statement in body for node in ast.walk(statement)):
            raise _Unsplit
        if not _is_unconditional(body[at], self.call):
            raise _Unsplit
        self.before = body[:at]
        self.second = [_with_result(body[at], self.call), *body[at + 1 :]]
        if any(isinstance(node, ast.Continue) for one in self.second for node in ast.walk(one)):
            raise _Unsplit  # a result that is not used
        self.behind = [one for one in self.second[1:] if self._is_count(one)]  # the call, in the first half
        self.second = [one for one in self.second if one not in self.behind]
        self._check(tree)

    def _is_count(self, statement: ast.stmt) -> bool:
        """Returns whether a statement gives a name that the second half does not read numbers that it does not give."""
        if not isinstance(statement, ast.Assign) or not all(isinstance(one, ast.Name) for one in statement.targets):
            return False
        if not all(isinstance(one, _SUMS) for one in ast.walk(statement.value)):
            return False
        others = [one for one in self.second if one is not statement]
        changed = {name for name, _ in _changed(others)}
        given = _names(others, ast.Store) | changed | {_RESULT}
        return not (_names([statement.value], ast.Load) & given or
                    _names([statement], ast.Store) & (_names(others, ast.Load) | given))  # fmt: skip

    def _check(self, tree: ast.FunctionDef) -> None:
        loop, code = self.loop, self.function.__code__
        first = [loop.target, loop.iter, *self.before, self.call.func, *self.call.args, *self.behind]
        loaded, stored = _names(first, ast.Load), _names(first, ast.Store)
        later_loaded, later_stored = _names(self.second, ast.Load), _names(self.second, ast.Store)
        if (loaded | stored) & later_stored or "self" in stored | later_stored:
            raise _Unsplit  # a turn's first half may need what the turn before left
        items = [self.call.func, *(one.value for one in self.before if any(_taken(one)))]
        taken = {name for one in (loop, *loop.body) for name in _taken(one)}
        roots = {*code.co_varnames} - taken - {"self"}
        roots |= {name for name, module in _TORCH.items() if self.function.__globals__.get(name) is module}
        if self.function.__globals__.keys() & (_BUILTINS | {"getattr", "locals"}):
            raise _Unsplit
        _check_calls(first, roots, items, calls_children=False)
        self.children = _check_calls(self.second, roots, [], calls_children=True)
        # What counts turns may be changed in place: a number, see _apart.
        self.counts = set()
        for name, value in _changed(first):
            if not isinstance(value, ast.Constant) or name in later_loaded:
                raise _Unsplit
            self.counts.add(name)
        changed = {name for name, _ in _changed(self.second)}
        if changed & (loaded | stored | {"self"}):
            raise _Unsplit
        for name in changed & later_stored:
            if not all(_is_fresh(value, name) for value in _assigned(self.second, name)):
                raise _Unsplit  # it may be a view of what the first half reads
        after = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)
                 and isinstance(node.ctx, ast.Load) and node.lineno > (loop.end_lineno or loop.lineno)}  # fmt: skip
        self.saved = sorted(stored & later_loaded)
        always = _names([loop.target, *(one for one in self.before if isinstance(one, ast.Assign))], ast.Store)
        if after & stored or not set(self.saved) <= always:
            raise _Unsplit
        self.changed = changed
        self.read = loaded - (stored - self.counts) - {"self"}
        self.used = self.read | (later_loaded - stored - {"self", _RESULT})
        self.paths = {path for one in first for path in _paths_of_self(one)}

    def statement(self) -> ast.stmt:
        """Returns what stands in the loop's place."""
        loop = self.loop
        saved = ast.Tuple([ast.Name(name, ast.Load()) for name in self.saved], ast.Load())
        entry = ast.Tuple([self.call.func, *self.call.args, saved], ast.Load())
        append = ast.Attribute(ast.Name(_WAITING, ast.Load()), "append", ast.Load())
        begin = ast.Assign([ast.Name(_WAITING, ast.Store())], ast.List([], ast.Load()))
        first = ast.For(loop.target, loop.iter, [*self.before, ast.Expr(ast.Call(append, [entry], [])),
                                                  *self.behind], [])  # fmt: skip
        held = ast.Tuple([ast.Name(name, ast.Store()) for name in self.saved], ast.Store())
        target = ast.Tuple([ast.Name(_RESULT, ast.Store()), held], ast.Store())
        waiting = ast.Call(ast.Name(_OUTPUTS, ast.Load()), [ast.Name(_WAITING, ast.Load())], [])
        second = ast.For(target, waiting, self.second, [])
        here = [ast.Name("self", ast.Load()), ast.Call(ast.Name("locals", ast.Load()), [], [])]
        test = ast.Call(ast.Name(_APART, ast.Load()), here, [])
        return ast.copy_location(ast.If(test, [begin, first, second], [copy.deepcopy(loop)]), loop)


def _candidates(loop: ast.For) -> Iterator[ast.Call]:
    for statement in loop.body:
        yield from _candidates_in(statement, loop)


def _candidates_in(statement: ast.stmt, loop: ast.For) -> Iterator[ast.Call]:
    """Yields the calls of what was taken out of ``self``, or of one of its children, by a number or a name."""
    taken = {name for node in (loop, *loop.body) for name in _taken(node)}
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            if _is_item_of_self(node.func) or (isinstance(node.func, ast.Name) and node.func.id in taken):
                yield node


def _taken(node: ast.AST) -> Iterator[str]:
    """Yields the names that a statement gives items of ``self``: by a loop over them, or taken out."""
    if isinstance(node, ast.For) and _mentions_self(node.iter):
        yield from _names([node.target], ast.Store)
    elif isinstance(node, ast.Assign) and _is_item_of_self(node.value):
        yield from _names(node.targets, ast.Store)


def _is_item_of_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        return len(node.args) == 2 and _mentions_self(node.args[0])
    return isinstance(node, ast.Subscript) and _mentions_self(node.value)


def _mentions_self(node: ast.expr) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "self" for one in ast.walk(node))


def _is_once(function: ast.FunctionDef, loop: ast.For) -> bool:
    """Returns whether a loop stands in no other loop and in no function within."""

    def within(node: ast.AST) -> bool:
        if node is loop:
            return True
        if node is not function and isinstance(node, (ast.For, ast.While, ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            return False
        return any(map(within, ast.iter_child_nodes(node)))

    return within(function)


def _is_unconditional(statement: ast.stmt, call: ast.Call) -> bool:
    def reaches(node: ast.AST) -> bool:
        if node is call:
            return True
        if isinstance(node, (ast.IfExp, ast.BoolOp, ast.Compare)):
            return False
        return any(map(reaches, ast.iter_child_nodes(node)))

    return reaches(statement)


def _with_result(statement: ast.stmt, call: ast.Call) -> ast.stmt:
    class Replace(ast.NodeTransformer):
        def visit_Call(self, node: ast.Call) -> ast.AST:
            if ast.dump(node) == ast.dump(call) and node.col_offset == call.col_offset and node.lineno == call.lineno:
                return ast.copy_location(ast.Name(_RESULT, ast.Load()), node)
            return self.generic_visit(node)

    return Replace().visit(copy.deepcopy(statement))


def _names(nodes: Iterable[ast.AST], context: type) -> set[str]:
    """Returns the names that are read, or given a value; ``x += y`` does both."""
    found = set()
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.Name) and isinstance(node.ctx, context):
                found.add(node.id)
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


def _root(node: ast.expr) -> str:
    """Returns the name that an expression is a part, or a method's result, of."""
    while not isinstance(node, ast.Name):
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        else:
            raise _Unsplit
    return node.id


def _changed(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, Optional[ast.expr]]]:
    """Yields the names of what is changed in place, and, of ``name += value`` alone, the value."""
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, (ast.Subscript, ast.Attribute)) and not isinstance(node.ctx, ast.Load):
                yield _root(node), None
            elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                yield node.target.id, node.value
            elif isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if name in _CHANGES or (name.endswith("_") and not name.endswith("__")):
                    if _root(node.func) in _TORCH and name not in _FUNCTIONS:
                        raise _Unsplit
                    if _root(node.func) not in _TORCH:
                        yield _root(node.func), None
                if any(keyword.arg in (None, "out", "inplace") for keyword in node.keywords):
                    raise _Unsplit


def _check_calls(
    nodes: Iterable[ast.AST], roots: set[str], items: Sequence[ast.AST], *, calls_children: bool
) -> set[str]:
    """Returns the children of ``self`` that are called; refuses what else is no method of a local value, of those in
    ``roots``, and none of torch's functions. ``items``: getattr calls that take an expert out of ``self``."""
    children = set()
    for top in nodes:
        for node in ast.walk(top):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Name):
                if called.id not in _BUILTINS and not (called.id == "getattr" and any(node is one for one in items)):
                    raise _Unsplit
            elif not isinstance(called, ast.Attribute):
                raise _Unsplit
            elif isinstance(called.value, ast.Name) and called.value.id == "self":
                if not calls_children or len(node.args) != 1 or node.keywords:
                    raise _Unsplit
                children.add(called.attr)
            elif (root := _root(called)) not in roots:
                raise _Unsplit
            elif root in _TORCH and not _is_function(called):
                raise _Unsplit
    return children


def _is_function(called: ast.Attribute) -> bool:
    """Returns whether one of torch's own functions, or of torch.nn.functional's, is called that does nothing else."""
    at, within = called.value, set()
    while isinstance(at, ast.Attribute):
        within.add(at.attr)
        at = at.value
    return isinstance(at, ast.Name) and called.attr in _FUNCTIONS and within <= {"nn", "functional"}


def _paths_of_self(top: ast.AST) -> Iterator[tuple[str, ...]]:
    """Yields the attributes of ``self`` that are read, with those of theirs, as far as no call is one of them."""
    held = {id(node.value) for node in ast.walk(top) if isinstance(node, ast.Attribute)}
    methods = {id(node.func) for node in ast.walk(top) if isinstance(node, ast.Call)}
    for node in ast.walk(top):
        if isinstance(node, ast.Attribute) and id(node) not in held:
            path, at = [], node.value if id(node) in methods else node
            while isinstance(at, ast.Attribute):
                path.append(at.attr)
                at = at.value
            if isinstance(at, ast.Name) and at.id == "self" and path:
                yield tuple(reversed(path))


def _assigned(nodes: Iterable[ast.AST], name: str) -> Iterator[ast.expr]:
    """Yields what a name is given; refuses what it is given together with others."""
    for top in nodes:
        for node in ast.walk(top):
            if isinstance(node, ast.Assign) and name in _names(node.targets, ast.Store):
                if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
                    raise _Unsplit
                yield node.value
            elif isinstance(node, ast.AnnAssign) and name in _names([node.target], ast.Store):
                raise _Unsplit


def _is_fresh(value: ast.expr, name: str) -> bool:
    """Returns whether a value is memory of its own: a product, a sum, or made of ``name``, which is, alone."""
    if isinstance(value, ast.BinOp):
        return True
    return isinstance(value, ast.Call) and _names([value], ast.Load) - {"self", *_TORCH} == {name}


# --- at run time ------------------------------------------------------------------------------------------------------


def _apart(halves: _Halves, module: nn.Module, here: dict[str, Any]) -> bool:
    """Returns whether the halves of a loop may run one after the other: not under a compiler or a transform, and where
    what the second changes shares no memory with what the first reads."""
    held = dict(here)
    here.clear()  # else the frame's copy would keep what the forward lets go
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not isinstance(module, nn.Module):
        return False
    for name in halves.children:
        child = module._modules.get(name)
        if child is None or not type(child).__module__.startswith("torch.nn."):
            return False
    if not all(type(held.get(name)) in _NUMBERS for name in halves.counts):
        return False
    memory: list[tuple[int, int]] = []
    changed = [held[name] for name in halves.changed if name in held]
    for value in changed:
        if not _is_value(value) or isinstance(value, tuple):
            return False
        memory += map(_range, _tensors_in(value))
    used = {name: held.get(name, halves.function.__globals__.get(name)) for name in halves.used - halves.changed}
    used = {name: value for name, value in used.items() if value is None or value is not _TORCH.get(name)}
    if not all(_is_value(value) for value in used.values()):
        return False
    read = [used.get(name) for name in halves.read if name in used]
    for path in halves.paths:
        value: Any = module
        for name in path:
            value = getattr(value, name, None)
        if isinstance(value, nn.Module):
            continue  # of its parameters the experts have, which nobody changes in a forward
        read.append(value)
    if not all(_is_value(value) for value in read):
        return False
    if any(value is one for value in changed if type(value) is list for one in read):
        return False
    return not any(_overlap(tensor, memory) for value in read for tensor in _tensors_in(value))


def _is_in_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested
    return plain and tensor.device.type in ("cpu", "cuda")


def _is_value(value: Any) -> bool:
    """Returns whether a value is a tensor in memory, a number or the like, or a list or tuple of such."""
    if isinstance(value, Tensor):
        return _is_in_memory(value)
    if isinstance(value, (list, tuple)):
        return all(isinstance(one, _SCALARS) or (isinstance(one, Tensor) and _is_in_memory(one)) for one in value)
    return isinstance(value, _SCALARS)


def _tensors_in(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [one for one in values if isinstance(one, Tensor)]


def _range(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _overlap(tensor: Tensor, memory: list[tuple[int, int]]) -> bool:
    begin, end = _range(tensor)
    return any(begin < stop and start < end for start, stop in memory)
