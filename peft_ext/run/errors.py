"""Errors that the user of a run can fix, and the signals that end a run."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Optional

from ..sources.json_file import first_line


class RunError(Exception):
    """An error that the user can fix: one line about the options, the data, the model or the machine.

    The line names options as on the command line, for example ``--block-size``. A command prints ``error: ...`` and
    ends with exit code 2.
    """


class Elsewhere(RunError):
    """Raised in a process after another process of the run has failed. The message is the error of the other process,
    which prints it."""


class Interrupted(KeyboardInterrupt):
    """Raised where SIGINT, SIGTERM or SIGHUP ends the run at once: outside of training, or as the second such signal.

    ``signal`` is the signal's number. ``silent`` says that another process of the run reports the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number
        self.silent = False


def need(what: str, *packages: str) -> None:
    """Raises RunError where one of ``packages``, which the command or option ``what`` needs, is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise RunError(f"{what} needs {', '.join(missing)}: pip install 'peft_ext[hf]'")


def read_text(about: str, path: Path, most: Optional[int] = None) -> str:
    """Returns the UTF-8 text of a file, without a byte order mark.

    Raises RunError where the file can't be read, is not UTF-8, or has more than ``most`` characters. The message begins
    with ``about`` and the path.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(-1 if most is None else most + 1)
    except OSError as error:
        raise RunError(f"{about}{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{about}{path}: not UTF-8 text (byte {error.start})") from None
    if most is not None and len(text) > most:
        raise RunError(f"{about}{path}: larger than {most:,} characters")
    return text


# The classes of errors that transformers, tokenizers and PEFT raise for unusable files and configurations.
REFUSALS = (OSError, ValueError, LookupError, TypeError, ImportError, AttributeError, RuntimeError, ArithmeticError)
_NO_MEMORY = ("can't allocate memory", "CUDA out of memory")  # parts of PyTorch's messages about a lack of memory


def out_of_memory(error: BaseException) -> bool:
    """Returns whether ``error``, or an error that caused ``error``, is a failed allocation of Python or PyTorch."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"} or any(text in str(error) for text in _NO_MEMORY):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and out_of_memory(before)


@contextlib.contextmanager
def mendable_errors(output: Any, hint: Any) -> Iterator[None]:
    """Raises RunError where the block raises an OSError, or an error that says that the disk or the memory is full.

    A BrokenPipeError is raised unchanged.

    Args:
        output: the folder that the run writes to.
        hint: a function that returns the end of the message, which says how to continue the run.
    """
    from safetensors import SafetensorError

    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"{error.filename or output}: {error.strerror or first_line(error)}{hint()}") from None
    except SafetensorError as error:
        if "I/O error" not in str(error):
            raise
        raise RunError(f"{output}: {first_line(error)}{hint()}") from None
    except (MemoryError, RuntimeError, ValueError) as error:
        text = str(error)
        if "PytorchStreamWriter" in text or "inline_container" in text:
            raise RunError(f"{output}: a checkpoint could not be written, is the disk full?{hint()}") from None
        if out_of_memory(error):
            mend = "a smaller --batch-size or --block-size, or --gradient-checkpointing, takes less"
            raise RunError(f"out of memory: {mend} ({first_line(error)}){hint()}") from None
        raise


# In a run of several processes, a SIGTERM or SIGHUP within this many seconds after another signal counts as the same
# signal, passed on by a launcher.
_PASSED_ON_SECONDS = 20.0


@dataclass
class Stop:
    """The requests that signals have made to a run.

    Attributes:
        signal: the number of the signal that asked the run to end; 0 where no signal did.
        save: whether a signal asked for a checkpoint after the current step.
        training: whether the Trainer runs, so that a first signal ends the run only after the current step.
        ending: whether a run of several processes is ending with an error; SIGINT, SIGTERM and SIGHUP are then ignored,
            so that no signal interrupts the error message.
        speaks: whether this process prints the message that a signal stops the run; in a run of several processes, only
            rank 0 may.
        processes: number of processes of the run.
        since: value of ``time.monotonic()`` at the last SIGINT, SIGTERM or SIGHUP that was not ignored.
    """

    signal: int = 0
    save: bool = False
    training: bool = False
    ending: bool = False
    speaks: bool = True
    processes: int = 1
    since: float = 0.0


@contextlib.contextmanager
def caught_signals(stop: Stop) -> Iterator[None]:
    """Handles SIGINT, SIGTERM, SIGHUP and SIGUSR1 inside the ``with`` block, as the docstring of
    :func:`peft_ext.run.finetune` describes.

    Restores the former handlers at the end of the block. Outside of the main thread, ``caught_signals`` handles no
    signal. Raises Interrupted where a signal ends the block at once.
    """

    def end(number: int, frame: Any) -> None:
        if stop.ending:
            return
        # A launcher that gets SIGTERM passes the signal on to processes that may have got SIGTERM themselves.
        passed_on = stop.processes > 1 and number != signal.SIGINT
        if passed_on and stop.signal and time.monotonic() < stop.since + _PASSED_ON_SECONDS:
            return
        stop.since = time.monotonic()
        again, stop.signal = stop.signal, number
        if again or not stop.training:
            raise Interrupted(number)
        once_more = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        if not stop.speaks or passed_on:  # no message: the launcher may send the signal because another process ended
            return
        with contextlib.suppress(OSError):  # print raises OSError where the terminal is gone
            print(f"\nstopping after this step, with a checkpoint; {once_more} stops at once", file=sys.stderr,
                  flush=True)  # fmt: skip

    def save(number: int, frame: Any) -> None:
        stop.save = stop.training

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {"SIGINT": end, "SIGTERM": end, "SIGHUP": end, "SIGUSR1": save}
    before: dict[Any, Any] = {}
    try:
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            ignored = name == "SIGHUP" and number is not None and signal.getsignal(number) == signal.SIG_IGN
            # number is None where the system lacks the signal. getsignal gives None for a handler of C code, which
            # Python could not restore.
            if number is not None and signal.getsignal(number) is not None and not ignored:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
