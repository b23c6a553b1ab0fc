"""``peft-ext chat``: prints the answers of a base model and of the adapted model to one prompt, side by side.

One model is in memory, by default in the quantization that the adapter was trained on. The base's answer comes from the
model with its adapter disabled. Some adapters, such as PiSSA's, change the base's weights; ``chat`` then shows a reason
in place of the base's answer. ``chat`` answers each prompt without history, because the answers of two models would
make two conversations.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer

from ..run.data import prompt_ids
from ..run.errors import REFUSALS, RunError, need
from ..run.evaluate import continued
from ..run.progress import quiet, status
from ..sources.json_file import first_line, raised_as
from ..sources.model import hushed, load_model, load_tokenizer, most_tokens, tokenizer_folder
from ._common import (
    QUANT_HELP,
    AdapterFolder,
    BaseBlocksize,
    BaseModel,
    Threads,
    base_of,
    check_base,
    check_range,
    chosen_quant,
    console,
    held_model,
    new_table,
    quant_text,
)

_SECONDS = 10.0  # time limit of a chat template in seconds: a template is a program, and may be made never to end


def chat(
    adapter: AdapterFolder,
    model: BaseModel = None,
    prompt: Annotated[Optional[str], typer.Option(help="Prompt to answer. Default: ask, or read lines.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    base_quant: Annotated[Optional[str], typer.Option(help=QUANT_HELP)] = None,
    blocksize: BaseBlocksize = None,
    temperature: Annotated[float, typer.Option(help="0: likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling, for each answer.")] = 0,
    threads: Threads = None,
) -> None:
    """Show the answers of a base model and of the adapted model side by side."""
    if prompt is not None and not prompt.strip():
        raise RunError("--prompt: the prompt is empty")
    if not 0 <= temperature < math.inf:
        raise RunError(f"--temperature {temperature}: wanted 0 (the likeliest token) or more")
    check_range(1, max_new_tokens=max_new_tokens, threads=threads)
    check_range(0, 2**63 - 1, seed=seed)
    check_base("--base-quant", base_quant, blocksize)
    need("chat", "transformers", "peft", "safetensors")
    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    with status("loading"):
        pair = _Pair(adapter, model, base_quant, blocksize, max_new_tokens, temperature, seed)
    if prompt is not None:
        _show(prompt, *pair.answers(prompt))
        return
    if sys.stdin.isatty():
        print(f"{pair.about}\neach prompt is answered on its own; Ctrl-D ends", file=sys.stderr)
    for line in _prompts():
        try:
            answers = pair.answers(line)
        except RunError as error:  # ``chat`` goes on after an error, because the next prompt may get an answer
            print(f"error: {error}", file=sys.stderr)
            continue
        _show(line, *answers)


def _prompts() -> Iterator[str]:
    """Yields the lines of standard input that are not empty. On a terminal, the user types each line after ">"."""
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  the import gives input() line editing
    while True:
        try:
            line = input("> " if asks else "")
            line.encode()
        except UnicodeError:
            raise RunError("standard input: not UTF-8 text") from None
        except EOFError:
            if asks:
                print()
            return
        if line.strip():
            yield line


class _Pair:
    """A base model with an adapter, which answers prompts with and without the adapter.

    Attributes:
        about: the base, the quantization and the adapter in words.
        no_base: the reason why the answers of the base can't be shown; None where they can be shown.
        room: most tokens that a prompt and its answer may have together; infinity for an encoder-decoder, and where
            the model has no limit.
    """

    def __init__(
        self, adapter: Path, model: Optional[str], base_quant: Optional[str], blocksize: Optional[int],
        max_new_tokens: int, temperature: float, seed: int,
    ) -> None:  # fmt: skip
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = _adapter_config(adapter)
        base, folder, quant, self.kind = _base(adapter, config, model, base_quant, blocksize, self.device)
        words = tokenizer_folder(adapter, folder)
        with raised_as(RunError, f"{words}: no tokenizer (", Exception, after=")"):
            self.tokenizer = load_tokenizer(str(words))
        self.no_base = _why_no_base(config, base)
        self.model = _adapted(base, adapter).eval()
        self.is_prompt = bool(config.is_prompt_learning)
        method = str(getattr(config.peft_type, "value", config.peft_type))
        self.about = f"base: {folder}, {type(base).__name__}; quantization {quant}\nadapter: {adapter}, {method}"
        encodes_decodes = bool(getattr(base.config, "is_encoder_decoder", False))
        if encodes_decodes and self.is_prompt:
            raise RunError(f"{adapter} is a {method} adapter of an encoder-decoder, whose answers are not supported")
        virtual = config.num_virtual_tokens if self.is_prompt else 0
        self.room = math.inf if encodes_decodes else most_tokens(base.config) - virtual

    def answers(self, prompt: str) -> tuple[str, str]:
        """Returns two texts: the base's answer, or the reason why there is none; and the adapted model's answer.

        Raises RunError where the prompt is too long for the model, where the chat template fails or takes too long, or
        where the model can't generate an answer, for example because of the base's generation_config.
        """
        inputs = self._tokens(prompt)
        if self.no_base is not None:
            return self.no_base, self._answer(inputs)
        with self.model.disable_adapter():
            base = self._answer(inputs)
        return base, self._answer(inputs)

    def _tokens(self, prompt: str) -> dict[str, Any]:
        tokenizer, kind = self.tokenizer, self.kind
        if kind in ("chat", "text") or getattr(tokenizer, "chat_template", None):
            # A chat template is a program and may raise any exception.
            with raised_as(RunError, "the tokenizer's chat template: ", Exception), _at_most(_SECONDS):
                ids = torch.tensor([prompt_ids(tokenizer, [{"role": "user", "content": prompt}], str(kind))])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        count = inputs["input_ids"].shape[1]
        if count + self.max_new_tokens > self.room:
            raise RunError(
                f"the prompt is {count} tokens, which with {self.max_new_tokens} more (--max-new-tokens) is over the "
                f"model's {self.room}"
            )
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _answer(self, inputs: dict[str, Any]) -> str:
        torch.manual_seed(self.seed)  # the seed is set before each answer, so that equal models give equal answers
        with raised_as(RunError, "generate, with the base's generation_config: ", *REFUSALS):
            return continued(self.model, self.tokenizer, inputs, self.max_new_tokens, has_prompt=self.is_prompt,
                             temperature=self.temperature)  # fmt: skip


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within the block after ``seconds``, by the signal SIGALRM.

    The block has no time limit outside of the main thread, on a system without interval timers, and where C code has
    installed a handler of SIGALRM, which Python could not restore.
    """
    ours = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGALRM) is None:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- loading ----------------------------------------------------------------------------------------------------------


def _adapter_config(adapter: Path) -> Any:
    from ..sources.adapter import read_config

    with raised_as(RunError, "", OSError, ValueError):
        if not adapter.is_dir():
            raise RunError(f"--adapter {adapter}: no such folder")
        if not (adapter / "adapter_config.json").is_file():
            raise RunError(f"no adapter_config.json in {adapter}, wanted an adapter in PEFT's format")
        return read_config(adapter / "adapter_config.json")


def _base(
    adapter: Path, config: Any, model: Optional[str], quant: Optional[str], blocksize: Optional[int], device: Any
) -> tuple[Any, Path, str, Optional[str]]:
    """Returns the base, the base's folder, its quantization in words, and the kind of the adapter's training data.

    The kind of the training data is "text" or "chat"; None without the run.json of the training. If ``quant`` or
    ``blocksize`` is None, the value of the adapter's training is used; if this value is not known, "none" or 64. A base
    whose files store quantized weights keeps the files' quantization.
    """
    from ..sources.adapter import training_options

    trained = training_options(adapter)
    with hushed():
        base = load_model(base_of(adapter, model), config, adapter, {}, trained)
    made = base.model
    if not made.can_generate():
        raise RunError(f"{type(made).__name__} generates no text, wanted a language model")
    quant = chosen_quant("--base-quant", base.folder, base.quant, quant, trained)
    blocksize = blocksize or int(trained.get("blocksize", 64))
    made = held_model(base, config, device, quant, blocksize).eval()
    about = "nf4" if base.quant == "nf4" else quant_text(quant, blocksize)
    return made, base.folder, about, trained.get("kind")


def _why_no_base(config: Any, base: Any) -> Optional[str]:
    """Returns why ``base`` with the adapter of ``config``, added and then disabled, will differ from ``base`` alone;
    None where the two give equal answers."""
    from ..merge.dense import init_that_changes_base

    init, bias = init_that_changes_base(config), getattr(config, "bias", "none")
    if init is not None:
        reason = f"init_lora_weights is {init!r}, which changes the base's weights when the adapter is loaded"
    elif getattr(config, "layer_replication", None):
        reason = "layer_replication gives the adapted model other layers than the base has"
    elif bias != "none" and any(name.endswith("bias") for name, _ in base.named_parameters()):
        reason = f"bias is {bias!r}, so the adapter's biases replace those of the base"
    else:
        return None
    return f"not shown, since {reason}"


def _adapted(base: Any, adapter: Path) -> Any:
    from ..model import load_adapter

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*: it was left out$", category=UserWarning)
            return load_adapter(base, adapter)
    except (UserWarning, *REFUSALS) as error:
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        reason = lines[0] if lines else first_line(error).removeprefix("load_adapter: ")
        raise RunError(f"the adapter does not fit {type(base).__name__}: {reason}") from None


# --- the screen -------------------------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """Returns ``text`` with U+FFFD in place of each unprintable character except newline and tab, because a model's
    answer could otherwise send escape codes to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _show(prompt: str, base: str, adapted: str) -> None:
    base, adapted = _printable(base), _printable(adapted)
    if not sys.stdout.isatty():
        print(f"prompt: {prompt}\nbase: {base}\nadapted: {adapted}", flush=True)
        return
    table = new_table("base", "adapted", expand=True)
    table.add_row(base, adapted)
    console().print(table)
