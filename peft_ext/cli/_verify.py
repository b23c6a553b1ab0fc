"""``peft-ext explain --verify``: loads a model with an adapter, and compares a fused training step with a stock one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch

from ..run.data import IGNORED, read_corpus, tokenize
from ..run.errors import REFUSALS, RunError
from ..run.progress import status
from ..sources.json_file import first_line, raised_as
from ..sources.model import hushed, load_model, load_tokenizer, tokenizer_folder
from ._common import held_model


def verified(
    name: Optional[str], config: Any, adapter: Optional[Path], dtype: torch.dtype, quant: str, blocksize: int,
    data: str, batch_size: int, length: int,
) -> Any:  # fmt: skip
    """Returns the :class:`peft_ext.verification.Verification` of a training step of an adapter on a model.

    Args:
        name: folder or hub name of the model; None: the base that the adapter's configuration names.
        config: PEFT configuration of the adapter.
        adapter: folder of a saved adapter; None: a new adapter. Tensors of a new adapter that are zero get small random
            numbers, because a gradient through a zero tensor is zero.
        dtype: dtype to which the base is cast; a base in bitsandbytes' 4 bits is not cast.
        quant, blocksize: quantization of the base, and the block size of NF4.
        data: name of the training data, as the option ``--data`` of ``peft-ext finetune`` takes it.
        batch_size, length: number of examples of the batch, and most tokens of an example.

    Raises RunError where a weight of the base is missing, where the packed format ``quant`` does not fit the model,
    where the adapter does not fit the model, where the model has no tokenizer, or where
    :func:`peft_ext.verification.verify` refuses the model. Errors of reading the model (SourceError) and the data
    (RunError) are raised unchanged.
    """
    from ..model import get_peft_model, load_adapter
    from ..verification import verify

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with status("loading"), hushed():
        loaded = load_model(name, config, adapter or Path(name or ""), {}, {})
        base = held_model(loaded, config, device, quant, blocksize, dtype)
        with raised_as(RunError, "--verify: the adapter does not fit: ", *REFUSALS):
            if adapter is not None:
                model = load_adapter(base, adapter, is_trainable=True, accelerate=False)
            else:
                torch.manual_seed(0)
                model = get_peft_model(base, config, accelerate=False)
                for parameter in model.parameters():
                    if parameter.requires_grad and not parameter.any():
                        torch.nn.init.normal_(parameter, std=0.02)
    with status("verifying"):
        batch = _batch(base, tokenizer_folder(adapter, loaded.folder), data, batch_size, length)
        try:
            return verify(model.train(), {key: value.to(device) for key, value in batch.items()})
        except REFUSALS as error:
            raise RunError(f"--verify: {first_line(error).removeprefix('verify: ')}") from error


def _batch(base: Any, folder: Path, data: str, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Returns a batch of the first training examples. The labels are removed for a model that can't generate text."""
    from transformers import DataCollatorForSeq2Seq

    with raised_as(RunError, f"--verify: {folder} has no tokenizer (", Exception, after=")"):
        tokenizer = load_tokenizer(str(folder))
    examples = tokenize(read_corpus(data), tokenizer, length).train[:batch_size]
    batch = dict(DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)([dict(one) for one in examples]))
    if not base.can_generate():
        del batch["labels"]
    return batch
