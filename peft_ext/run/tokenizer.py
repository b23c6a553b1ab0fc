"""The tokenizer of a run: the model's own, or the tokenizer in the folder that ``--tokenizer`` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..sources.gguf_file import gguf_path, read_gguf
from ..sources.json_file import raised_as
from ..sources.model import load_tokenizer
from .data import Examples
from .errors import REFUSALS, RunError
from .options import Options

# Largest share of the tokens that may differ between the model's GGUF file and the tokenizer of --tokenizer. The
# converter to GGUF renames some tokens, such as tokens that are not used.
_FEW = 0.05


def read_tokenizer(o: Options, folder: str, **packed: Any) -> Any:
    """Returns the tokenizer of ``--tokenizer``, or of the model in ``folder``.

    ``packed`` are arguments of :func:`peft_ext.sources.model.load_tokenizer`, used without ``--tokenizer``. Raises
    RunError where the tokenizer can't be read, and where more than 5% of the tokens differ between the model's GGUF
    file and the tokenizer of ``--tokenizer``.
    """
    if o.tokenizer is None:
        with raised_as(RunError, f"--model {o.model}: no tokenizer (", *REFUSALS, after=")"):
            return load_tokenizer(folder, **packed)
    about = f"--tokenizer {o.tokenizer}: "
    with raised_as(RunError, f"{about}no tokenizer (", *REFUSALS, after=")"):
        tokenizer = load_tokenizer(str(Path(o.tokenizer).expanduser()))
    file = gguf_path(folder)
    tokens = [] if file is None else read_gguf(file, RunError).get("tokenizer.ggml.tokens", [])
    here = tokenizer.convert_ids_to_tokens(range(min(len(tokens), len(tokenizer))))
    others = [number for number, pair in enumerate(zip(here, tokens, strict=False)) if pair[0] != pair[1]]
    if len(others) > _FEW * len(here):
        raise RunError(f"{about}its token {others[0]} is {here[others[0]]!r}, in the vocabulary of --model {o.model} "
                       f"the token is {tokens[others[0]]!r}; wanted the tokenizer of the model")  # fmt: skip
    return tokenizer


def check_vocabulary(o: Options, config: Any, tokenizer: Any, examples: Examples) -> None:
    """Raises RunError where a token number in ``examples`` is not less than the size of the model's vocabulary."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    largest = max(max(row["input_ids"]) for row in (*examples.train, *examples.held_out))
    if isinstance(size, int) and largest >= size:
        about = f"--model {o.model}" if o.tokenizer is None else f"--tokenizer {o.tokenizer}"
        raise RunError(f"{about}: the tokenizer gives {tokenizer.convert_ids_to_tokens(largest)!r} the number "
                       f"{largest}, wanted less than {size}, the size of the model's vocabulary")  # fmt: skip
