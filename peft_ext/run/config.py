"""``peft-ext finetune --config run.yaml``: one YAML mapping from the names of the options to their values.

::

    # run.yaml
    model: smollm2
    method: dora
    lr: 1e-4
    target-modules: [q_proj, v_proj]

Names are the flags', with dashes or underscores. PyYAML takes the text apart; values are converted here, by the type
that their option has, so that ``1e-4`` is the number it looks like and ``no`` is not taken for a text. Nothing in a
file is executed, expanded or included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

from ..files import atomic_file
from .errors import RunError

FILE = "finetune.yaml"  # in the folder of a run: the options that it used

_MOST_BYTES, _MOST_DEEP = 1_000_000, 3
_SHOWN = 40  # characters of a value, in a message
_FLAGS = ("resume", "overwrite")  # of one call: in a file they would go on, or replace a run, unasked
_EXCLUSIVE = (("max_steps", "epochs"),)
_TRUE = ("true", "yes", "on")  # of YAML 1.1, as PyYAML resolves them
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_NUMBERS = {
    int: re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    float: re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"),
}

# What other trainers call it.
_ELSEWHERE = {
    "dataset": "data", "dataset_name": "data", "gradient_accumulation_steps": "grad_accum", "learning_rate": "lr",
    "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_r": "rank", "lora_rank": "rank",
    "max_length": "block_size", "max_seq_length": "block_size", "model_name_or_path": "model",
    "num_train_epochs": "epochs", "output_dir": "output", "peft_method": "method",
    "per_device_train_batch_size": "batch_size", "r": "rank", "target_module": "target_modules",
    "warmup_ratio": "warmup", "warmup_steps": "warmup",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What a file sets: ``values`` by field of Options, and the line of each."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def named(self, given: Collection[str] = ()) -> Iterator[None]:
        """Adds the file and the line to a RunError about an option that it sets, unless a flag ``given`` did."""
        try:
            yield
        except RunError as error:
            option = re.match(r"--([a-z-]+)", str(error))
            name = option[1].replace("-", "_") if option else None
            if name not in self.lines or name in given:
                raise
            raise RunError(f"{error} ({self.path}:{self.lines[name]})") from None


def read_config(path: Union[str, Path], options: type) -> Config:
    """Returns the file's values, each of the type that the field of the dataclass ``options`` has.

    Raises RunError, which names file, line and what was wanted: a file that is not there, is larger than 1 MB, not
    UTF-8 or not YAML; no mapping; an unknown or repeated name; a value of another type; an alias, an anchor or a tag.
    """
    path = Path(os.path.expanduser(path))  # not Path's own, which raises where there is no such user
    if find_spec("yaml") is None:
        raise RunError("--config needs PyYAML: pip install 'peft_ext[hf]'")
    import yaml

    text = _read(path)
    try:
        _check_tokens(path, text)
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        raise RunError(f"--config {path}: not YAML: {error.reason} (position {error.position})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.problem == "but found another document":
            _fail(path, mark, "a second document, wanted one")
        column = f" (column {mark.column + 1})" if mark else ""
        _fail(path, mark, f"not YAML: {error.problem or error.context}{column}")
    except (ValueError, OverflowError) as error:  # an escape of no character: "\UFFFFFFFF"
        _fail(path, None, f"not YAML: {error}")
    config = Config(path)
    if root is None or _kind(root) == "null":  # comments alone
        return config
    if root.id != "mapping":
        _fail(path, root.start_mark, f"{_came(root)}, wanted lines of name: value")
    hints = typing.get_type_hints(options)
    wanted = {f.name: hints[f.name] for f in dataclasses.fields(options) if f.name not in _FLAGS}
    for key, node in root.value:
        name = _name(path, key, wanted)
        if name in config.lines:
            _fail(path, key.start_mark, f"{name} is there twice, first in line {config.lines[name]}: leave one out")
        config.lines[name] = key.start_mark.line + 1
        if (value := _convert(path, name, wanted[name], node)) is not None:  # None: the default
            config.values[name] = value
    return config


def merged(options: Any, config: Optional[Config], flags: dict[str, Any]) -> Any:
    """Returns options of the defaults, ``options``, then of the file, then of the flags that were given."""
    values = {} if config is None else dict(config.values)
    for pair in _EXCLUSIVE:
        if any(name in flags for name in pair):  # one by flag is meant instead of the file's other one
            values = {name: value for name, value in values.items() if name not in pair}
    return dataclasses.replace(options, **{**values, **flags})


def write_config(path: Path, options: Any) -> None:
    """Writes the options as a file that ``--config`` takes, whole or not at all; None, and flags of one call, are not.

    Raises OSError.
    """
    import yaml

    values = {}
    for name, value in dataclasses.asdict(options).items():
        if value is not None and name not in _FLAGS:
            values[name] = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with atomic_file(path) as file:
        file.write("# peft-ext finetune --config FILE repeats this run: give it another --output, or --overwrite.\n")
        file.write(f"# Relative paths are from the folder it is started in.\n{text}")


# --- the text ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise RunError(f"--config {path}: no such file") from None
    except OSError as error:
        raise RunError(f"--config {path}: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise RunError(f"--config {path}: larger than {_MOST_BYTES:,} bytes, wanted a file of options")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RunError(f"--config {path}: not UTF-8 text (byte {error.start})") from None


def _fail(path: Path, mark: Any, text: str) -> NoReturn:
    raise RunError(f"{path}:{mark.line + 1 if mark else 1}: {' '.join(text.split())}") from None


def _check_tokens(path: Path, text: str) -> None:
    """Raises RunError for an alias, an anchor, a tag, and for nesting that a tree of it would be lost in."""
    import yaml

    depth = 0
    for token in yaml.scan(text, yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            _fail(path, token.start_mark, f"an alias, *{token.value}: write the value out")
        if isinstance(token, yaml.AnchorToken):
            _fail(path, token.start_mark, f"an anchor, &{token.value}: there are no aliases here, leave it out")
        if isinstance(token, yaml.TagToken):
            tag = "".join(filter(None, token.value))
            _fail(path, token.start_mark, f"a tag, {tag[:_SHOWN]!r}: wanted a plain value")
        depth += token.id in ("[", "{", "<block sequence start>", "<block mapping start>")
        depth -= token.id in ("]", "}", "<block end>")
        if depth > _MOST_DEEP:
            _fail(path, token.start_mark, "nested too deep, wanted lines of name: value")


# --- names and values -------------------------------------------------------------------------------------------------


def _kind(node: Any) -> str:
    """Returns what YAML takes a node for: "int", "float", "bool", "null", "str", "timestamp", "map", "seq", ..."""
    return node.tag.rpartition(":")[2]


def _shown(node: Any) -> str:
    return repr(node.value if len(node.value) <= _SHOWN else node.value[: _SHOWN - 3] + "...")


def _came(node: Any) -> str:
    """Returns a node in words."""
    if node.id != "scalar":
        return "a list" if node.id == "sequence" else "a mapping"
    return f"the value {_shown(node)}"


def _name(path: Path, key: Any, wanted: dict[str, Any]) -> str:
    if key.id != "scalar":
        _fail(path, key.start_mark, "a list or a mapping for a name, wanted the name of an option")
    name = key.value.replace("-", "_")
    if name in wanted:
        return name
    if name in _FLAGS:
        _fail(path, key.start_mark, f"{name} is of one call: give --{name} on the command line")
    near = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, wanted, 1)), None)
    mend = f"did you mean {near}?" if near else f"there are: {', '.join(wanted)}"
    _fail(path, key.start_mark, f"no option {_shown(key)}; {mend}")


def _convert(path: Path, name: str, kind: Any, node: Any) -> Any:
    """Returns the option's value, of the type ``kind``; None for its default."""
    if optional := type(None) in typing.get_args(kind):
        (kind,) = (t for t in typing.get_args(kind) if t is not type(None))
    if node.id == "sequence" and name in ("target_modules", "target_parameters"):
        if nested := next((item for item in node.value if item.id != "scalar"), None):
            _fail(path, nested.start_mark, f"{name} has a list or a mapping in its list, wanted names")
        if not node.value:
            _fail(path, node.start_mark, f"{name} is an empty list, wanted names")
        return ",".join(_convert(path, name, str, item) for item in node.value)
    if node.id != "scalar":
        _fail(path, node.start_mark, f"{name} is {_came(node)}, wanted {_WANTED[kind]}")
    text, took, plain = node.value, _kind(node), node.style is None
    if took == "null":
        if optional:
            return None
        _fail(path, node.start_mark, f"{name} has no value, wanted {_WANTED[kind]}")
    if kind is bool and took == "bool":
        return text.lower() in _TRUE
    if kind in _NUMBERS and plain and _NUMBERS[kind].fullmatch(text) and len(text) <= _SHOWN:
        return kind(text)
    if kind in (str, Path) and took == "str":
        if "\0" in text:
            _fail(path, node.start_mark, f"{name} has a NUL character in it")
        return Path(os.path.expanduser(text)) if kind is Path else text
    came = {"int": "the number ", "float": "the number ", "str": "the text "}.get(took, "")
    shown = _shown(node) if took == "str" else text[:_SHOWN]
    if took == "bool":
        shown = f"{'true' if text.lower() in _TRUE else 'false'} ({text})"
    mend = ": put it in quotes" if kind in (str, Path) else ""
    if kind in _NUMBERS and not plain and _NUMBERS[float].fullmatch(text):
        mend = ": leave the quotes out"
    _fail(path, node.start_mark, f"{name} is {came}{shown}, wanted {_WANTED[kind]}{mend}")
