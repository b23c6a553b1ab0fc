"""The progress of a run: lines of :mod:`logging`, and bars and status lines on a terminal.

The logger ``peft_ext.run`` gets lines about the run, and a warning where the user should act. A program that
wants to print the lines configures logging, for example::

    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_ext.run").setLevel("INFO")
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

_Item = TypeVar("_Item")

log = logging.getLogger("peft_ext.run")


def quiet() -> None:
    """Turns off transformers' progress bars, and the warnings and the log messages below level ERROR of transformers,
    PEFT, accelerate and bitsandbytes."""
    warnings.filterwarnings("ignore", module=r"(peft|transformers|bitsandbytes|accelerate|torch\.utils\.checkpoint)\b")
    # PEFT itself passes the deprecated argument past_key_values, with the prefixes of prefix tuning.
    warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
    for name in ("bitsandbytes", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def shows_bars() -> bool:
    """Returns whether standard error is a terminal and this process is the process of the run that logs."""
    return sys.stderr.isatty() and not log.disabled


def status(text: str) -> AbstractContextManager[Any]:
    """Returns a context manager that shows ``text`` with a spinner; it shows nothing without a terminal, and nothing in
    a process of the run that does not log."""
    if not shows_bars():
        return contextlib.nullcontext()
    from rich.console import Console

    return Console(stderr=True, markup=False).status(text)


def bar(
    items: Sequence[_Item], text: str, unit: str, each: Callable[[_Item], str] = lambda item: ""
) -> Iterator[_Item]:
    """Yields ``items``, and shows a progress bar where :func:`shows_bars` returns True.

    The bar shows ``text`` and the name that ``each`` returns for the current item. tqdm draws the bar between two
    items, in the thread that iterates over the items. The bar starts no thread except tqdm's monitor thread, which
    wakes every ten seconds.
    """
    from tqdm import tqdm

    # The context manager clears the bar also where the loop over the items ends early.
    with tqdm(
        total=len(items), desc=text, unit=unit, leave=False, dynamic_ncols=True, disable=not shows_bars()
    ) as shown:
        for item in items:
            if name := each(item):
                shown.set_description(f"{text} {name}")
            yield item
            shown.update()


def progress_callback(steps: int) -> Any:
    """Returns a Trainer callback that shows a progress bar where :func:`shows_bars` returns True.

    Where :func:`shows_bars` returns False, the callback writes at most 39 log lines, and about 20 in a long run.
    """
    from transformers import ProgressCallback, TrainerCallback

    every = max(1, steps // 20)

    class Bar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix_str(_numbers(logs))

    class Lines(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            step = state.global_step
            if "loss" in (logs or {}) and (step == 1 or step % every == 0 or step == steps):
                log.info(f"step {step:>{len(str(steps))}}/{steps}  {_numbers(logs)}")

    return Bar() if shows_bars() else Lines()


def _numbers(logs: dict[str, Any]) -> str:
    speed = f"  {logs['tokens_per_s']:.0f} tokens/s" if "tokens_per_s" in logs else ""
    return f"loss {logs['loss']:.4f}  lr {logs.get('learning_rate', 0):.1e}{speed}"
