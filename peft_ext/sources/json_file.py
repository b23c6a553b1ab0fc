"""Reads untrusted JSON files, and formats values and errors as one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_BYTES = 16 << 20
_DEEPEST = 32
_SHOWN = 60  # largest number of characters of a value in a message


def read_object(file: Path) -> dict[str, Any]:
    """Returns the JSON object in ``file``.

    Raises: OSError as ``open`` does; ValueError, one line, for a file that is no JSON object, is larger than
    ``_MOST_BYTES`` or is nested too deep.
    """
    if (size := file.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"{file}: {size} bytes, wanted at most {_MOST_BYTES}")
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
    values = parse(str(file), text)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a JSON {type(values).__name__}, wanted an object")
    level: list[Any] = [values]
    # The depth of nested values is limited, because PEFT and transformers read nested values by recursion.
    for _ in range(_DEEPEST):
        level = [
            child
            for value in level
            if isinstance(value, (dict, list))
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError(f"{file}: not JSON that can be read: nested too deep")
    return values


def parse(where: str, text: str, *, has_lines: bool = True) -> Any:
    """Returns the value of the JSON ``text``.

    Raises ValueError with a message of one line: ``where``, the line number of a syntax error if ``has_lines``, and the
    reason.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if has_lines else ""
        raise ValueError(f"{where}{line}: not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # Python refuses an integer with thousands of digits
        raise ValueError(f"{where}: not JSON: {first_line(error).partition(';')[0]}") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: nested too deep") from None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of the error's class where the message is empty.

    For PyTorch's error about a state dict with wrong shapes, returns the line of the first wrong shape instead: the
    first line of this error names only a class.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("size mismatch")] or lines
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def raised_as(kind: type[Exception], about: str, *kinds: type[BaseException], after: str = "") -> Iterator[None]:
    """Within the context, errors of the classes ``kinds`` are raised as errors of the class ``kind``, whose message is
    ``about``, the first line of the original error, and ``after``."""
    try:
        yield
    except kinds as error:
        raise kind(f"{about}{first_line(error)}{after}") from error


def shown(value: object) -> str:
    """Returns ``repr(value)``, or words where ``repr`` fails, shortened to at most ``_SHOWN`` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python's repr refuses an integer with thousands of digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    except RecursionError:
        text = f"a {type(value).__name__}, nested too deep"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
