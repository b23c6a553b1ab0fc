"""``peft-ext finetune --config run.yaml``: one YAML mapping from the names of the options to their values.

::

    # run.yaml
    model: smollm2
    method: dora
    lr: 1e-4
    target-modules: [q_proj, v_proj]

Names are the flags', with dashes or underscores. PyYAML's safe loader takes the text apart; values are converted here,
by the type that their option has, so that ``1e-4`` is the number it looks like and ``no`` is not taken for a text.
Nothing in a file is executed, expanded or included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, Optional, Union

from ..files import atomic_file
from . import CliError

__all__ = ["FILE", "Config", "merged", "read_config", "write_config"]

FILE = "finetune.yaml"  # in the folder of a run: the options that it used

_MOST_BYTES = 1_000_000
_SHOWN = 40  # characters of a value, in a message
_FLAGS = ("resume", "overwrite")  # of one call: in a file they would go on, or replace a run, unasked
_EXCLUSIVE = (("max_steps", "epochs"),)
_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")  # of YAML 1.1, as PyYAML resolves them

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
        """Adds the file and the line to a CliError about an option that it sets, unless a flag ``given`` did."""
        try:
            yield
        except CliError as error:
            option = re.match(r"--([a-z-]+)", str(error))
            name = option[1].replace("-", "_") if option else None
            if name not in self.lines or name in given:
                raise
            raise CliError(f"{error} ({self.path}:{self.lines[name]})") from None


def read_config(path: Union[str, Path], options: type) -> Config:
    """The file's values, each of the type that the field of the dataclass ``options`` has.

    Raises CliError, which names file, line and what was wanted: a file that is not there, is larger than 1 MB, not
    UTF-8 or not YAML; no mapping; an unknown or repeated name; a value of another type; an alias, an anchor or a tag.
    """
    path = Path(os.path.expanduser(path))  # not Path's own, which raises where there is no such user
    if find_spec("yaml") is None:
        raise CliError("--config needs PyYAML: pip install 'peft_ext[hf]'")
    return _Reader(path, options).read()


def merged(options: Any, config: Optional[Config], flags: dict[str, Any]) -> Any:
    """Options of the defaults, ``options``, then of the file, then of the flags that were given."""
    values = {} if config is None else dict(config.values)
    for pair in _EXCLUSIVE:
        if any(name in flags for name in pair):  # one by flag is meant instead of the file's other one
            values = {name: value for name, value in values.items() if name not in pair}
    return dataclasses.replace(options, **{**values, **flags})


def write_config(path: Path, options: Any) -> None:
    """The options as a file that ``--config`` takes, whole or not at all; None and what is of one call are left out."""
    import yaml

    values = {}
    for name, value in dataclasses.asdict(options).items():
        if value is not None and name not in _FLAGS:
            values[name] = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    with atomic_file(path) as file:
        file.write("# peft-ext finetune --config FILE repeats this run: give it another --output, or --overwrite.\n")
        file.write(f"# Relative paths are from the folder it is started in.\n{text}")


# --- reading ----------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise CliError(f"--config {path}: no such file") from None
    except OSError as error:
        raise CliError(f"--config {path}: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise CliError(f"--config {path}: larger than {_MOST_BYTES:,} bytes, wanted a file of options")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CliError(f"--config {path}: not UTF-8 text (byte {error.start})") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Reader:
    """Reads the parser's events, not a tree: what is nested is refused where it begins, at any depth."""

    def __init__(self, path: Path, options: type) -> None:
        import yaml

        self.yaml, self.path = yaml, path
        hints = typing.get_type_hints(options)
        self.wanted = {f.name: hints[f.name] for f in dataclasses.fields(options) if f.name not in _FLAGS}
        try:
            self.loader = yaml.SafeLoader(io.StringIO(_text(path)))
        except yaml.reader.ReaderError as error:
            self._not_text(error)

    def read(self) -> Config:
        try:
            return self._document()
        except self.yaml.reader.ReaderError as error:
            self._not_text(error)
        except self.yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            at = f" (column {mark.column + 1})" if mark else ""
            self._fail((mark.line if mark else 0) + 1, f"not YAML: {error.problem or error.context}{at}")
        except (ValueError, OverflowError) as error:  # an escape of no character: "\UFFFFFFFF"
            self._fail(1, f"not YAML: {error}")

    def _fail(self, line: int, text: str) -> NoReturn:
        raise CliError(f"{self.path}:{line}: {' '.join(text.split())}")

    def _not_text(self, error: Any) -> NoReturn:
        raise CliError(f"--config {self.path}: not YAML: {error.reason} (position {error.position})") from None

    def _next(self) -> Any:
        """The next event. Raises CliError for an alias, an anchor and a tag of the file's own."""
        event = self.loader.get_event()
        line = event.start_mark.line + 1
        if isinstance(event, self.yaml.AliasEvent):
            self._fail(line, f"an alias, *{event.anchor}: write the value out")
        if getattr(event, "anchor", None) is not None:
            self._fail(line, f"an anchor, &{event.anchor}: there are no aliases here, leave it out")
        if (tag := getattr(event, "tag", None)) is not None:
            shown = tag.replace(_TAG, "!!") if tag.startswith(_TAG) else tag
            self._fail(line, f"a tag, {shown[:_SHOWN]!r}: wanted a plain value")
        return event

    def _document(self) -> Config:
        yaml = self.yaml
        config = Config(self.path)
        self._next()  # the stream's start
        if isinstance(self._next(), yaml.StreamEndEvent):
            return config
        event = self._next()
        if isinstance(event, yaml.ScalarEvent) and self._kind(event) == "null":
            self._end()
            return config  # comments alone
        if not isinstance(event, yaml.MappingStartEvent):
            came = "a list" if isinstance(event, yaml.SequenceStartEvent) else f"the value {self._shown(event)}"
            self._fail(event.start_mark.line + 1, f"{came}, wanted lines of name: value")
        while not isinstance(key := self._next(), yaml.MappingEndEvent):
            name, line = self._name(key), key.start_mark.line + 1
            if name in config.lines:
                self._fail(line, f"{name} is there twice, first in line {config.lines[name]}: leave one out")
            config.lines[name] = line
            config.values[name] = self._value(name, self._next())
            if config.values[name] is None:  # the default, as if it were not there
                del config.values[name]
        self._end()
        return config

    def _end(self) -> None:
        self._next()  # the document's end
        if not isinstance(event := self._next(), self.yaml.StreamEndEvent):
            self._fail(event.start_mark.line + 1, "a second document, wanted one")

    def _name(self, key: Any) -> str:
        line = key.start_mark.line + 1
        if not isinstance(key, self.yaml.ScalarEvent):
            self._fail(line, "a list or a mapping for a name, wanted the name of an option")
        name = key.value.replace("-", "_")
        if name in self.wanted:
            return name
        if name in _FLAGS:
            self._fail(line, f"{name} is of one call: give {_flag(name)} on the command line")
        near = _ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, self.wanted, 1)), None)
        mend = f"did you mean {near}?" if near else f"there are: {', '.join(self.wanted)}"
        self._fail(line, f"no option {self._shown(key)}; {mend}")

    def _shown(self, scalar: Any) -> str:
        text = scalar.value if len(scalar.value) <= _SHOWN else scalar.value[: _SHOWN - 3] + "..."
        return repr(text)

    def _kind(self, scalar: Any) -> str:
        """What YAML takes it for: "int", "float", "bool", "null", "str", "timestamp", ..."""
        tag = self.loader.resolve(self.yaml.ScalarNode, scalar.value, scalar.implicit)
        return tag.removeprefix(_TAG)

    # - values -

    def _value(self, name: str, event: Any) -> Any:
        """The option's value; None for its default."""
        kind = self.wanted[name]
        if optional := type(None) in typing.get_args(kind):
            (kind,) = (t for t in typing.get_args(kind) if t is not type(None))
        line = event.start_mark.line + 1
        if isinstance(event, self.yaml.SequenceStartEvent) and name == "target_modules":
            return self._names(name, line)
        if not isinstance(event, self.yaml.ScalarEvent):
            came = "a list" if isinstance(event, self.yaml.SequenceStartEvent) else "a mapping"
            self._fail(line, f"{name} is {came}, wanted {_WANTED[kind]}")
        if self._kind(event) == "null":
            if optional:
                return None
            self._fail(line, f"{name} has no value, wanted {_WANTED[kind]}")
        return self._scalar(name, kind, event)

    def _scalar(self, name: str, kind: type, event: Any) -> Any:
        text, took = event.value, self._kind(event)
        plain = event.style is None
        if kind is bool and took == "bool" and text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        if kind is int and plain and _INTEGER.fullmatch(text) and len(text) <= _SHOWN:
            return int(text)
        if kind is float and plain and _NUMBER.fullmatch(text) and len(text) <= _SHOWN:
            return float(text)
        if kind in (str, Path) and took == "str":
            if "\0" in text:
                self._fail(event.start_mark.line + 1, f"{name} has a NUL character in it")
            return Path(os.path.expanduser(text)) if kind is Path else text
        quotes = ": put it in quotes" if kind in (str, Path) else ""
        if not plain and kind in (int, float) and _NUMBER.fullmatch(text):
            quotes = ": leave the quotes out"
        came = {"int": "the number ", "float": "the number ", "str": "the text "}.get(took, "")
        shown = self._shown(event) if took == "str" else event.value[:_SHOWN]
        if took == "bool":
            shown = f"{'true' if text.lower() in _TRUE else 'false'} ({text})"
        self._fail(event.start_mark.line + 1, f"{name} is {came}{shown}, wanted {_WANTED[kind]}{quotes}")

    def _names(self, name: str, line: int) -> str:
        names = []
        while not isinstance(event := self._next(), self.yaml.SequenceEndEvent):
            if not isinstance(event, self.yaml.ScalarEvent):
                self._fail(event.start_mark.line + 1, f"{name} has a list or a mapping in its list, wanted names")
            names.append(self._scalar(name, str, event))
        if not names:
            self._fail(line, f"{name} is an empty list, wanted names")
        return ",".join(names)


_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
