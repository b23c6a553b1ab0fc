"""What ends a run: errors that its user can mend, and signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..sources.json_file import first_line


class RunError(Exception):
    """Says, on one line, what is to be mended in the options, the data, the model or the machine.

    Options are named as the command line has them: ``--block-size``.
    """


class Interrupted(KeyboardInterrupt):
    """A signal ended the run at once: the second one, or one outside of training. ``signal`` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def read_text(about: str, path: Path, most: Optional[int] = None) -> str:
    """Returns the UTF-8 text of a file, without a byte order mark.

    Raises RunError, which begins with ``about`` and the path, also where the text has more than ``most`` characters.
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


_NO_MEMORY = ("can't allocate memory", "CUDA out of memory")  # as PyTorch says it, and the operators here


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed, of Python's or of PyTorch's, or is behind another error, a tokenizer's."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"} or any(text in str(error) for text in _NO_MEMORY):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and out_of_memory(before)


@contextlib.contextmanager
def mendable_errors(output: Any, hint: Any) -> Iterator[None]:
    """Raises a full disk or memory, and what else the system refuses, as a RunError.

    ``output`` is the folder that is written to; ``hint()`` says how the run can go on.
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


@dataclass
class Stop:
    """What signals ask for: ``signal`` is the one that is to end the run, ``save`` a checkpoint after this step."""

    signal: int = 0
    save: bool = False
    training: bool = False

    @property
    def asked(self) -> bool:
        return bool(self.signal)

    @contextlib.contextmanager
    def in_training(self) -> Iterator[None]:
        self.training = True
        try:
            yield
        finally:
            self.training = False


@contextlib.contextmanager
def caught_signals(stop: Stop) -> Iterator[None]:
    """Hears the signals of :func:`peft_ext.run.finetune`. Where this is not the main thread, they are the caller's.

    Raises Interrupted where one ends the block at once.
    """

    def end(number: int, frame: Any) -> None:
        again, stop.signal = stop.asked, number
        if again or not stop.training:
            raise Interrupted(number)
        once_more = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        with contextlib.suppress(OSError):  # a terminal that hung up
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
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            if signal.getsignal(number) is None:  # not installed from Python, which could not put it back
                continue
            before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
