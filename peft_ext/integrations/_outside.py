"""Folders that strangers wrote: what PEFT and transformers are about to be given is checked; an error is one line.

    adapter_config.json:        a JSON object, a method that is known, each field of its type, no size beyond the file's
    adapter_model.safetensors:  a header that the safetensors library takes, numbers that are finite
    config.json, of a base:     a JSON object, no more layers than a model can have; an index names safetensors alone
    expressions:                every regular expression of the configuration against every module's name, in a process
                                of its own that is given so much time: where one does not end, neither would PEFT's

Nothing in a folder is imported or unpickled.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional, Union

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from .. import tuners  # noqa: F401  registers the methods that PEFT lacks
from .._imports import required

with required("peft", "a saved adapter's configuration"):
    from peft import PeftConfig, TaskType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

__all__ = [
    "check_expressions",
    "check_finite",
    "check_index",
    "check_model_config",
    "checked_config",
    "read_config",
    "read_object",
    "weight_shapes",
]

_MOST_BYTES = 16 << 20
_DEEPEST = 32
_MOST_LAYERS = 10_000
_MOST_RANK = 1024
_LARGEST = torch.finfo(torch.float32).max
_POSITIVE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_SHOWN = 60  # characters of a value, in a message

# Starts from factors of the base weight, which has no more of them than its shorter side: r may be beyond that, and
# PEFT makes tensors of r before it cuts them.
_TRUNCATING = ("pissa", "olora")

# Files that PEFT would unpickle to start from; the saved adapter has all that they gave.
_PICKLES = ("prompt_tuning_init_state_dict_path",)

_SECONDS = 10.0
_BYTES = 1 << 30


# --- adapter_config.json ----------------------------------------------------------------------------------------------


def read_config(file: Path) -> PeftConfig:
    """The configuration in ``file``, its fields checked.

    Raises: OSError as ``open`` does; ValueError, one line, for what is no configuration of a method that is known.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    values = read_object(file)
    kind = values.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{file}: peft_type is {_shown(kind)}, wanted the name of a method, such as 'LORA'")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, hint in _hints(config_class).items():
        if name not in values or (values[name] is None and defaults[name] is None):
            continue
        if not _fits(values[name], hint):
            raise ValueError(f"{file}: {name} is {_shown(values[name])}, wanted {_described(hint)}")
    task = values.get("task_type")
    if task is not None and task not in [known.value for known in TaskType]:
        raise ValueError(f"{file}: task_type is {_shown(task)}, wanted one of {', '.join(t.value for t in TaskType)}")
    _check_values(file, values)
    for name in _PICKLES:
        path = values.get(name)
        if isinstance(path, str) and not path.endswith(".safetensors"):
            raise ValueError(f"{file}: {name} is {_shown(path)}, a pickle, which runs code as it is read")
    try:
        return PeftConfig.from_pretrained(str(file.parent))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OverflowError) as error:
        raise ValueError(f"{file}: {_first_line(error)}") from error


def _check_values(file: Path, values: dict[str, Any]) -> None:
    """What PEFT takes without a word, or takes apart as it builds the model."""
    for name, value in values.items():
        if name.endswith("dropout") and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ValueError(f"{file}: {name} is {_shown(value)}, wanted 0 to 1")
    if values.get("megatron_config") and find_spec("megatron") is None:
        raise ValueError(f"{file}: megatron_config is given, which needs the package megatron")
    mapping = values.get("auto_mapping") or {}
    if wrong := [name for name, value in mapping.items() if not isinstance(value, (str, type(None)))]:
        raise ValueError(f"{file}: auto_mapping has {_shown(mapping[wrong[0]])} for {_shown(wrong[0])}, wanted text")
    ranges = values.get("layer_replication") or []
    if not all(len(r) == 2 and all(type(i) is int for i in r) and 0 <= r[0] < r[1] <= _MOST_LAYERS for r in ranges):
        raise ValueError(f"{file}: layer_replication is {_shown(ranges)}, wanted pairs of a first layer and one after "
                         "the last")  # fmt: skip
    if sum(end - start for start, end in ranges) > _MOST_LAYERS:
        raise ValueError(f"{file}: layer_replication makes more than {_MOST_LAYERS} layers")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``. Raises: OSError as ``open`` does; ValueError, one line, for anything else."""
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{file}: {size} bytes, wanted at most {_MOST_BYTES}")
    try:
        values = json.loads(file.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{file}: not JSON: {_first_line(error).partition(';')[0]}") from None
    except RecursionError:
        raise ValueError(f"{file}: not JSON that can be read: nested too deep") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a JSON {type(values).__name__}, wanted an object")
    level: list[Any] = [values]
    for _ in range(_DEEPEST):  # PEFT and transformers walk it by calls within calls
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"{file}: not JSON that can be read: nested too deep")
    return values


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    except RecursionError:
        text = f"a {type(value).__name__}, nested too deep"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _hints(config_class: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config_class) if field.init}
    try:
        hints = typing.get_type_hints(config_class)
    except (NameError, TypeError):  # an annotation for type checkers alone: PEFT's own checks remain
        hints = {}
    return {name: hint for name, hint in hints.items() if name in names}


def _fits(value: Any, hint: Any) -> bool:
    """Whether JSON's ``value`` may stand for a field of this annotation; what is not told from it fits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if hint is type(None):
        return value is None
    if origin is typing.Literal:
        return isinstance(value, tuple({type(argument) for argument in arguments}))
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return isinstance(value, list) and (len(inner) != 1 or all(_fits(item, inner[0]) for item in value))
    if origin is dict or hint is dict:
        keeps = len(arguments) != 2 or (isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values()))
        return isinstance(value, dict) and keeps
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):  # PEFT takes a lora_alpha of 0.5 for its int
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and -_LARGEST <= value <= _LARGEST
    if hint is str:
        return isinstance(value, str)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return isinstance(value, str)
    return True


def _described(hint: Any) -> str:
    """An annotation in JSON's words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        # Sorted: typing may give back a union of the same types in the order of another one.
        return " or ".join(sorted({_described(argument) for argument in arguments if argument is not type(None)}))
    if origin in (list, tuple, set) or hint in (list, tuple, set):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return f"a list of {_described(inner[0])}" if len(inner) == 1 else "a list"
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is dict or hint is dict:
        return "an object" if len(arguments) != 2 else f"an object of {_described(arguments[1])}"
    return {bool: "true or false", int: "a number", float: "a number", str: "text"}.get(hint, "a name")


# --- config.json ------------------------------------------------------------------------------------------------------


def check_model_config(file: Path) -> None:
    """Raises ValueError, one line, where a model's ``file`` is no JSON object, or asks for what no model has.

    transformers makes an object for each layer and expert, before it has looked for weights.
    """

    def check(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                check(value)
            elif type(value) is int and value > _MOST_LAYERS and re.search("layer|expert", name):
                raise ValueError(f"{file}: {_shown(name)} is {_shown(value)}, wanted at most {_MOST_LAYERS}")
            elif type(value) is int and value < 1 and name in _POSITIVE:
                raise ValueError(f"{file}: {_shown(name)} is {_shown(value)}, wanted at least 1")

    check(read_object(file))


def check_index(file: Path) -> None:
    """Raises ValueError, one line, where an index of safetensors names another kind of file, or one elsewhere.

    transformers unpickles what an index names and does not end in .safetensors.
    """
    names = read_object(file).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{file}: weight_map is {_shown(names)}, wanted an object of file names")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{file}: weight_map has {_shown(name)}, wanted the name of a .safetensors file beside it")


# --- adapter_model.safetensors ----------------------------------------------------------------------------------------


def weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in ``file``, from its header. Raises: ValueError, one line, OSError."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {_first_line(error)}") from None


def _check_dtypes(file: Path, prefix: str) -> None:
    """Raises ValueError where a tensor of the adapter's is of no float dtype: PEFT would cast it."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            dtype = opened.get_slice(name).get_dtype()
            if prefix in name and not dtype.startswith(("F", "BF")):
                raise ValueError(f"{file}: {_shown(name)} is {dtype}, wanted floats")


def check_finite(file: Path) -> None:
    """Raises ValueError where a number in the safetensors ``file`` is not finite, as a wrong bit can make it."""
    with safe_open(file, "pt") as opened:
        for name in opened.keys():
            tensor = opened.get_tensor(name)
            if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
                raise ValueError(f"{file}: {name} has values that are not finite")


def checked_config(folder: Path) -> PeftConfig:
    """The configuration of the adapter in ``folder``, held against the header of its weights.

    Raises: OSError where one of the files is not there or can't be read; ValueError, one line, see :func:`read_config`,
    for weights that are no safetensors, and for a configuration that asks for larger tensors than there are.
    """
    config, weights = read_config(folder / CONFIG_NAME), weight_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
    largest = max((size for shape in weights.values() for size in shape), default=0)
    for name, size, most in _sizes(config, largest):
        if type(size) is not int or size < 1:
            raise ValueError(f"{folder / CONFIG_NAME}: {name} is {_shown(size)}, wanted an integer of at least 1")
        if size > most:
            raise ValueError(f"{folder / CONFIG_NAME}: {name} is {_shown(size)}, wanted at most {most}, the longest "
                             f"side of a tensor in {SAFETENSORS_WEIGHTS_NAME}")  # fmt: skip
    if config.is_prompt_learning or config.peft_type in ("LORA", "ADALORA", "IA3", "BOTTLENECK"):
        _check_dtypes(folder / SAFETENSORS_WEIGHTS_NAME, PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, ""))
    return config


def _sizes(config: PeftConfig, largest: int) -> Iterator[tuple[str, Any, int]]:
    """The sizes of tensors that PEFT makes before it reads the file, and the most that each may be."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method == "LORA":
        if str(config.init_lora_weights).startswith(_TRUNCATING):
            largest = max(largest, _MOST_RANK)
        yield "r", config.r, largest
        for name, value in (config.rank_pattern or {}).items():
            yield f"rank_pattern[{_shown(name)}]", value, largest
    elif method == "ADALORA":  # its file has the ranks that are left, of those that rank_pattern lists
        listed = (len(value) for value in (config.rank_pattern or {}).values() if isinstance(value, list))
        yield "init_r", config.init_r, max(largest, *listed, 0)
    elif method == "BOTTLENECK" and config.bottleneck_dim is not None:
        yield "bottleneck_dim", config.bottleneck_dim, largest
    elif config.is_prompt_learning:
        yield "num_virtual_tokens", config.num_virtual_tokens, largest


# --- expressions ------------------------------------------------------------------------------------------------------

# As PEFT and peft_ext.tuners put each together. What is searched for is the name of a module.
_WHOLE = "(?:{})\\Z"
_FORMS = {
    "target_modules": (_WHOLE,),
    "exclude_modules": (_WHOLE,),
    "feedforward_modules": (_WHOLE,),
    "add_bias": (_WHOLE,),
    "modules_to_save": (r"(^|.*\.){}($|\..*)",),
    "layers_pattern": (r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", r"(?:.*?\.)??(?:{})\.(\d+)(?:\.|$)"),
}
_OF_A_KEY = (r"(.*\.)?({})$", r".*\.{}$", r".*?(?:{})")  # rank_pattern, alpha_pattern and the like
_PLAIN = re.compile(r"[\w.-]*")

_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]),) * 2)  # where nobody is left to end it
except (ImportError, OSError, ValueError):
    pass
asked = json.load(sys.stdin)
for number, (form, expression) in enumerate(asked["expressions"]):
    print(number, flush=True)
    try:
        matches = re.compile(form.replace("{}", expression)).match
        for name in asked["names"]:
            matches(name)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        print("error", getattr(error, "msg", str(error)).replace("\\n", " ") or type(error).__name__, flush=True)
        break
else:
    print("done", flush=True)
"""


def _expressions(config: PeftConfig) -> Iterator[tuple[str, str, str]]:
    """Field, form and expression of all that the configuration has, but for plain names."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _FORMS:
            forms = _FORMS[field.name]
            if not isinstance(value, str) and forms == (_WHOLE,):
                continue  # names, which are compared as they are
            given = [value] if isinstance(value, str) else list(value or ())
        elif field.name.endswith("_pattern") and isinstance(value, dict):
            forms, given = _OF_A_KEY, list(value)
        else:
            continue
        for expression in given:
            if isinstance(expression, str) and not _PLAIN.fullmatch(expression):
                yield from ((field.name, form, expression) for form in forms)


def check_expressions(config: PeftConfig, model: nn.Module, seconds: Optional[float] = None) -> None:
    """Raises ValueError, one line, where an expression of ``config`` is none, or does not end in ``seconds``.

    A backtracking expression can take longer than anybody waits, and nothing in this process could stop it: Python's
    ``re`` has no limit. So they run in a child first, each against the name of each module of ``model``.
    """
    asked = list(_expressions(config))
    if not asked or not sys.executable:
        return
    seconds = _SECONDS if seconds is None else seconds
    names = [name for name, _ in model.named_modules()]
    text = json.dumps({"expressions": [entry[1:] for entry in asked], "names": names})
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(_BYTES), str(math.ceil(seconds) + 1)]
    try:
        out = subprocess.run(command, input=text.encode(), capture_output=True, timeout=seconds).stdout
        why = None
    except subprocess.TimeoutExpired as error:
        out, why = error.stdout or b"", f"takes more than {seconds:g} s to match the names of the model's modules"
    lines = out.decode(errors="replace").split("\n")[:-1]
    if why is None and lines[-1:] == ["done"]:
        return
    if lines[-1:] and lines[-1].startswith("error "):
        why = f"is no regular expression that can be used: {lines.pop().removeprefix('error ')}"
    number = int(lines[-1]) if lines else 0
    field, _, expression = asked[number]
    raise ValueError(f"{field} has the expression {_shown(expression)}, which {why or 'ended the process'}")
