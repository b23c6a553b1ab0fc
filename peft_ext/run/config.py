"""``peft-ext finetune --config run.yaml``: one YAML mapping from the names of the options to their values.

::

    # run.yaml
    model: smollm2
    method: dora
    lr: 1e-4
    target-modules: [q_proj, v_proj]

The names in the file are the names of the flags, with dashes or underscores. PyYAML parses the file, but not the
values: the option's type decides how the text of a value is read. ``1e-4`` is a number for ``lr``, and ``no`` is a text
for ``text_column``. A file can't execute code, include another file or use an environment variable; only a leading
``~`` of a path is expanded.
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
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

from ..files import atomic_file
from .errors import RunError, need, read_text
from .options import LISTS

FILE = "finetune.yaml"  # name of the file in a run's output folder that has the options of the run

_MOST_BYTES, _DEEPEST = 1_000_000, 3
_SHOWN = 40  # most characters of a value that an error message shows
_FLAGS = ("resume", "overwrite")  # options that a file may not set, because a run would be resumed or replaced unasked
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
# Regular expressions of numbers as people usually write them. YAML 1.1 reads 010 as octal and 1:30 as a time, and
# Python's int and float accept 1_000 and nan.
_NUMBERS = {int: r"[-+]?(0|[1-9][0-9]*)", float: r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"}
_READ = {int: int, float: float, str: str, Path: lambda text: Path(os.path.expanduser(text))}
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}

# Options by the names that other trainers give to them; an error message for such a name suggests the option.
_ELSEWHERE = {
    "dataset": "data", "dataset_name": "data", "gradient_accumulation_steps": "grad_accum", "learning_rate": "lr",
    "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_r": "rank", "lora_rank": "rank",
    "max_length": "block_size", "max_seq_length": "block_size", "model_name_or_path": "model",
    "num_train_epochs": "epochs", "output_dir": "output", "peft_method": "method",
    "per_device_train_batch_size": "batch_size", "r": "rank", "target_module": "target_modules",
    "tokenizer_name_or_path": "tokenizer",
    "warmup_ratio": "warmup", "warmup_steps": "warmup",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The options that a YAML file of ``--config`` sets. ``values`` maps the options' names to their values. ``lines``
    maps the options' names to the numbers of the file's lines that set the options."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def named(self, given: Collection[str] = ()) -> Iterator[None]:
        """Adds the file's path and line to the message of a RunError that the block raises about an option, if the file
        sets the option and ``given``, the names of the options given as flags, does not have it."""
        try:
            yield
        except RunError as error:
            option = re.match(r"--([a-z-]+)", str(error))
            name = option[1].replace("-", "_") if option else None
            if name not in self.lines or name in given:
                raise
            raise RunError(f"{error} ({self.path}:{self.lines[name]})") from None


def read_config(path: Union[str, Path], options: type) -> Config:
    """Returns a Config object with the file's values. Each value has the type of the field of the dataclass
    ``options``.

    An empty file sets no option. Raises RunError, which names the file, for: a file that does not exist, has more than
    1,000,000 characters, or is not UTF-8 or not YAML; another content than a mapping; a name that is unknown, repeated,
    ``resume`` or ``overwrite``; a value of another type; an alias, an anchor or a tag; deep nesting. In most cases, the
    message has the number of the line with the error.
    """
    path = Path(os.path.expanduser(path))  # Path.expanduser would raise for an unknown user
    need("--config", "yaml")
    root = _parsed(path)
    config = Config(path)
    if root is None or (root.id == "scalar" and not root.value):  # the file is empty, or has only comments
        return config
    if root.id != "mapping":
        _fail(path, root, f"{_came(root)}, wanted lines of name: value")
    hints = typing.get_type_hints(options)
    wanted = {f.name: hints[f.name] for f in dataclasses.fields(options) if f.name not in _FLAGS}
    for key, node in root.value:
        name = _name(path, key, wanted)
        if name in config.lines:
            _fail(path, key, f"{name} is there twice, first in line {config.lines[name]}: leave one out")
        config.lines[name] = key.start_mark.line + 1
        if (value := _convert(path, name, wanted[name], node)) is not None:  # None stands for the option's default
            config.values[name] = value
    return config


def merged(options: Any, config: Optional[Config], flags: dict[str, Any]) -> Any:
    """Returns ``options`` with the values of ``config`` and of ``flags``; a flag overrules the value in the file. A
    flag for ``max_steps`` or ``epochs`` overrules the file's values of both options."""
    values = {} if config is None else dict(config.values)
    if flags.keys() & {"max_steps", "epochs"}:  # --max-steps or --epochs drops the file's values of both options
        values = {name: value for name, value in values.items() if name not in ("max_steps", "epochs")}
    return dataclasses.replace(options, **{**values, **flags})


def write_config(path: Path, options: Any) -> None:
    """Writes the options atomically as a file for ``--config``, without ``resume``, ``overwrite`` and values of None.

    Raises OSError where the file can't be written.
    """
    with atomic_file(path) as file:
        file.write(config_text(dataclasses.asdict(options)))


def config_text(options: dict[str, Any]) -> str:
    """Returns the text that :func:`write_config` writes for the options, given by name."""
    import yaml

    values = {}
    for name, value in options.items():
        if value is not None and name not in _FLAGS:
            values[name] = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return (
        "# peft-ext finetune --config FILE repeats this run: give it another --output, or --overwrite.\n"
        f"# Relative paths are from the folder it is started in.\n{text}"
    )


def _fail(path: Path, at: Any, text: str) -> NoReturn:
    """Raises RunError with ``text``, the file's path and the line of ``at``, which is a node or an event of YAML."""
    raise RunError(f"{path}:{at.start_mark.line + 1}: {' '.join(text.split())}") from None


def _parsed(path: Path) -> Any:
    """Returns the root node of the file's YAML; None for an empty file.

    Raises RunError for a file that can't be read, for wrong YAML, and for aliases, anchors, tags and deep nesting.
    """
    import yaml

    text, depth = read_text("--config ", path, _MOST_BYTES), 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                _fail(path, event, "an anchor, an alias or a tag, wanted a plain value")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                _fail(path, event, "nested too deep, wanted lines of name: value")
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(filter(None, (error.context, error.problem)))
        raise RunError(f"{path}:{mark.line + 1}: not YAML: {reason} (column {mark.column + 1})") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the escape "\UFFFFFFFF" raises ValueError
        raise RunError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None


def _shown(node: Any) -> str:
    return repr(node.value if len(node.value) <= _SHOWN else node.value[: _SHOWN - 3] + "...")


def _came(node: Any) -> str:
    return {"sequence": "a list", "mapping": "a mapping"}.get(node.id) or f"the text {_shown(node)}"


def _name(path: Path, key: Any, wanted: dict[str, Any]) -> str:
    if key.id != "scalar":
        _fail(path, key, f"{_came(key)} for a name, wanted the name of an option")
    name = key.value.replace("-", "_")
    if name in wanted:
        return name
    if name in _FLAGS:
        _fail(path, key, f"{name} belongs to one call: give --{name} on the command line")
    near = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, wanted, 1)), None)
    mend = f"did you mean {near}?" if near else f"there are: {', '.join(wanted)}"
    _fail(path, key, f"no option {_shown(key)}; {mend}")


def _convert(path: Path, name: str, kind: Any, node: Any) -> Any:
    """Returns the value of the option ``name`` as the type ``kind``; None where an Optional option has no value."""
    kinds = typing.get_args(kind) or (kind,)
    if node.id == "sequence" and name in LISTS and node.value:
        return ",".join(_convert(path, f"an item of {name}", str, item) for item in node.value)
    if node.id == "scalar":
        text = node.value
        if node.style is None and text.lower() in ("", "~", "null"):
            if type(None) in kinds:
                return None
            _fail(path, node, f"{name} has no value, wanted {_WANTED[kinds[0]]}")
        if "\0" in text:
            _fail(path, node, f"{name} has a NUL character in it")
        if not re.fullmatch(_NUMBERS.get(kinds[0], "(?s:.*)"), text):
            _fail(path, node, f"{name} is {_came(node)}, wanted {_WANTED[kinds[0]]}")
        with contextlib.suppress(ValueError, KeyError):
            return _BOOLS[text.lower()] if kinds[0] is bool else _READ[kinds[0]](text)
    _fail(path, node, f"{name} is {_came(node)}, wanted {_WANTED[kinds[0]]}")
