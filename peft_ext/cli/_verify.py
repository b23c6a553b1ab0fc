"""What ``peft-ext explain --verify`` runs: weights, an adapter, a batch of text, and a step that is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch

from ..run.data import IGNORED, read_corpus, tokenize
from ..run.progress import status
from ..sources.json_file import first_line, raised_as
from ..sources.model import hushed, load_model, load_tokenizer
from . import CliError
from ._common import held_model

_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError)


def verified(
    name: str, config: Any, adapter: Optional[Path], dtype: torch.dtype, blocksize: Optional[int], data: str,
    batch_size: int, length: int,
) -> Any:  # fmt: skip
    """Returns the :class:`peft_ext.verification.Verification` of an adapter on a model.

    Args:
        name: of the model: a folder or a hub name. adapter: the folder of a saved one; None: a new one, whose tensors
            that start at zero get small random numbers, since gradients behind a zero are zeros, too.
        blocksize: of NF4, in which the base is held; None: it stays dense.
        data: as for finetune. batch_size, length: how many of its examples make the batch, and of how many tokens.

    Raises: CliError.
    """
    from ..model import get_peft_model, load_adapter
    from ..verification import verify

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with status("loading"), hushed():
        loaded = load_model(name, config, adapter or Path(name), {}, {})
        base = held_model(loaded, config, device, blocksize, dtype)
        with raised_as(CliError, "--verify: the adapter does not fit: ", *_REFUSALS):
            if adapter is not None:
                model = load_adapter(base, adapter, is_trainable=True, accelerate=False)
            else:
                torch.manual_seed(0)
                model = get_peft_model(base, config, accelerate=False)
                for parameter in model.parameters():
                    if parameter.requires_grad and not parameter.any():
                        torch.nn.init.normal_(parameter, std=0.02)
    with status("verifying"):
        batch = _batch(base, loaded.folder, data, batch_size, length)
        try:
            return verify(model.train(), {key: value.to(device) for key, value in batch.items()})
        except _REFUSALS as error:
            raise CliError(f"--verify: {first_line(error).removeprefix('verify: ')}") from error


def _batch(base: Any, folder: Path, data: str, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Returns the first examples of the data; labels are of a model that generates text."""
    from transformers import DataCollatorForSeq2Seq

    with raised_as(CliError, f"--verify: {folder} has no tokenizer (", Exception, after=")"):
        tokenizer = load_tokenizer(str(folder))
    examples = tokenize(read_corpus(data), tokenizer, length).train[:batch_size]
    batch = dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)([dict(one) for one in examples]))
    if not base.can_generate():
        del batch["labels"]
    return batch
