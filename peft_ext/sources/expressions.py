"""Checks that matching the regular expressions of an untrusted configuration with module names takes bounded time.

PEFT matches the expressions with Python's ``re``, which has no time limit. A child process with a time limit therefore
matches each expression before PEFT does. The package ``regex`` has a time limit, but cannot replace the child process:
``regex`` matches some expressions at once on which ``re`` backtracks without end.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Optional

from .json_file import shown

if TYPE_CHECKING:
    from peft import PeftConfig

_SECONDS = 10.0  # time limit, in seconds, of the child process that matches the expressions
_BYTES = 1 << 30  # memory limit, in bytes, of the child process that matches the expressions

# For each field of a PEFT configuration that may have a regular expression: the patterns with which PEFT and
# peft_ext.tuners match module names. "{}" in a pattern stands for the expression.
_WHOLE = "(?:{})\\Z"
_FORMS = {
    "target_modules": (_WHOLE,),
    "exclude_modules": (_WHOLE,),
    "feedforward_modules": (_WHOLE,),
    "add_bias": (_WHOLE,),
    "modules_to_save": (r"(^|.*\.){}($|\..*)",),
    "layers_pattern": (r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r"(?:.*?\.)??(?:{})\.(\d+)(?:\.|$)"),
}
# The patterns with which PEFT and peft_ext.tuners match module names with a key of rank_pattern or alpha_pattern.
_OF_A_KEY = (r"(.*\.)?({})$", r".*\.{}$", r".*?(?:{})")
_PLAIN = re.compile(r"[\w.-]*")

_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)  # also where the parent was killed
except (ImportError, OSError, ValueError):
    pass
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    matches = re.compile(pattern).match
    for name in names:
        matches(name)
"""


def _expressions(config: PeftConfig) -> Iterator[tuple[str, str, str]]:
    """Yields (field, pattern, expression) for each pattern that PEFT or peft_ext.tuners builds around an expression of
    the configuration.

    An expression is a regular expression in a field of the configuration, such as ``target_modules``. The function
    leaves out plain names, which consist of letters, digits, "_", "-" and ".", because their matching is fast.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _FORMS:
            forms = _FORMS[field.name]
            if not isinstance(value, str) and forms == (_WHOLE,):
                continue  # in this field, PEFT compares the names of a list, without regular expressions
            given = [value] if isinstance(value, str) else list(value or ())
        elif field.name.endswith("_pattern") and isinstance(value, dict):
            forms, given = _OF_A_KEY, list(value)
        else:
            continue
        for expression in given:
            if isinstance(expression, str) and not _PLAIN.fullmatch(expression):
                yield from ((field.name, form, expression) for form in forms)


def check_expressions(config: PeftConfig, modules: Iterable[str], seconds: Optional[float] = None) -> None:
    """Raises ValueError, one line, if a regular expression in ``config`` is invalid, or if matching all of them takes
    more than ``seconds`` (default: 10).

    One child process matches all expressions against ``modules``, the names of a model's modules. If Python does not
    know its own interpreter (``sys.executable`` is empty), ``check_expressions`` checks nothing.
    """
    asked = list(_expressions(config))
    if not asked or not sys.executable:
        return
    seconds = _SECONDS if seconds is None else seconds
    patterns = [form.replace("{}", expression) for _, form, expression in asked]
    text = json.dumps([patterns, list(modules)])
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(_BYTES), str(math.ceil(seconds) + 1)]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, timeout=seconds)
        if done.returncode == 0:
            return
        out, said = done.stdout, done.stderr.decode(errors="replace").splitlines() or ["the process ended"]
        why = f"is no regular expression that can be used: {said[-1].partition(': ')[2] or said[-1]}"
    except subprocess.TimeoutExpired as error:
        out, why = error.stdout or b"", f"takes more than {seconds:g} s to match the names of the model's modules"
    field, _, expression = asked[int((out.split() or [0])[-1])]
    raise ValueError(f"{field} has the expression {shown(expression)}, which {why}")
