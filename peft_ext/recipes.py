"""Functions for the usual steps of parameter-efficient fine-tuning. Each function makes a few calls of PEFT and
peft_ext.

::

    model, tokenizer = setup_peft_training("my/model", method="lora")      # or setup_qlora("my/model")
    train_with_peft(model, tokenizer, dataset)                             # writes ./peft-adapter
    merged = load_and_merge_adapter("my/model", "./peft-adapter")

The functions have the names and arguments that a common lesson on PEFT uses; docs/lesson.md shows the lesson's examples
beside these functions. :func:`peft_ext.run.finetune` has more options. Models are read from safetensors only, and code
in a model's folder is never run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

from . import _cpu
from .methods import METHODS, make_config, method_config
from .model import get_peft_model, load_adapter
from .quantize import quantize_nf4
from .recommend import recommend_peft_method
from .run.causal_loss import check_causal_loss
from .run.data import IGNORED, Corpus, read_records, tokenize
from .run.errors import RunError
from .sources.model import base_model, load_tokenizer, most_tokens, text_targets

__all__ = [
    "apply_lora_to_model",
    "load_and_merge_adapter",
    "recommend_peft_method",
    "setup_peft_training",
    "setup_qlora",
    "train_with_peft",
]

# The columns that a row may have if its text is tokenized already.
_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")


def apply_lora_to_model(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, target_modules: Sequence[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """Adds a fused LoRA adapter to the linear layers named in ``target_modules``: ``Y = xWᵀ + (α/r)·(xAᵀ)Bᵀ``.

    Returns a PeftModel around ``model``, whose own weights are frozen.

    Raises: ValueError where no layer has one of the names; PEFT's errors for other arguments that do not fit.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules))
    return get_peft_model(model, config)


def setup_qlora(
    model_name: Union[str, Path], rank: int = 64, *, dropout: float = 0.05, gradient_checkpointing: bool = True
) -> nn.Module:
    """Returns a causal language model in NF4, double-quantized, with a LoRA adapter on all linear layers but the head
    and those of a vision or audio tower.

    LoRA's scaling is 2: alpha is twice the rank. ``setup_qlora`` prints the number of trainable parameters.

    Raises: OSError or ValueError where the model can't be read.
    """
    model = _load(model_name)
    quantize_nf4(model, progress=False)
    model.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM",
        **text_targets(model, "qlora"),
    )  # fmt: skip
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model


def setup_peft_training(
    model_name: Union[str, Path], method: str = "lora", output_dir: Union[str, Path, None] = None, *,
    prompt_text: Optional[str] = None, **fields: Any,
) -> tuple[nn.Module, Any]:  # fmt: skip
    """Returns a causal language model with an adapter of ``method``, accelerated, and the model's tokenizer.

    Args:
        model_name: the model: a folder, or a name on the Hugging Face hub.
        method: one of :data:`peft_ext.methods.METHODS`; "qlora" quantizes the model to NF4.
        output_dir: ignored, as in the lesson; :func:`train_with_peft` has the ``output_dir`` that is used.
        prompt_text: with method "prompt", the text that initializes the virtual tokens, instead of random numbers.
        fields: fields of the method's configuration, which replace the defaults of METHODS, for example ``r=8`` or
            ``target_modules=["q_proj"]``.

    Raises: ValueError where there is no such method, or where prompt_text is given for another method than "prompt";
    OSError or ValueError where the model can't be read; PEFT's errors for a configuration that does not fit.
    """
    if method not in METHODS:
        raise ValueError(f"setup_peft_training: method is {method!r}, wanted one of {tuple(METHODS)}")
    if prompt_text is not None and method != "prompt":
        raise ValueError(f"setup_peft_training: prompt_text is given with method {method!r}, wanted method 'prompt'")
    model, tokenizer = _load(model_name), load_tokenizer(str(model_name))
    if method == "qlora":
        quantize_nf4(model, progress=False)
    config_class, given = method_config(method, "CAUSAL_LM")
    if prompt_text is not None:
        given |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": prompt_text,
                  "tokenizer_name_or_path": str(model_name)}  # fmt: skip
    # If the caller names layers, layers of these names are adapted in every part of the model, not in the text decoder
    # alone.
    if fields.get("target_modules") in (None, "all-linear"):
        given |= text_targets(model, method)
    model = get_peft_model(model, make_config(config_class, {**given, **fields}))
    model.print_trainable_parameters()
    return model, tokenizer


def train_with_peft(
    model: nn.Module, tokenizer: Any, train_dataset: Iterable[Any], *, output_dir: Union[str, Path] = "./peft-output",
    adapter_dir: Union[str, Path] = "./peft-adapter", block_size: int = 512, **arguments: Any,
) -> Any:  # fmt: skip
    """Trains the adapter of ``model`` with transformers' Trainer and saves the adapter; returns the result of
    ``Trainer.train``.

    Args:
        train_dataset: rows with ``input_ids``, or with text, prompt and completion, or messages, which
            ``peft_ext.run.data`` tokenizes. Rows with ``input_ids`` may also have ``labels``, ``attention_mask``,
            ``position_ids`` and ``token_type_ids``; columns of texts, single numbers and messages are ignored. Without
            ``labels``, the labels are the ``input_ids``, and -100, which the loss ignores, where the
            ``attention_mask`` is 0. A batch is padded on the right: padding on the left would lie between the virtual
            tokens of a prompt and the text.
        output_dir: folder of the Trainer's checkpoints.
        adapter_dir: the folder into which the trained adapter is saved.
        block_size: most tokens of a training example, at least 2. Texts are joined and divided into blocks of
            ``block_size`` tokens. A conversation, or a prompt with its completion, that has more tokens is cut, and is
            left out if its completion begins after the cut; a warning says how many were cut or left out. The tokens
            after the last whole block of texts are left out, with a warning where they are many. Rows with
            ``input_ids`` are not cut.
        arguments: further TrainingArguments. The defaults are 3 epochs, batches of 4 examples, 4 batches for each
            optimizer step, a learning rate of 2e-4 after 100 steps of warm-up, a log line every 10 steps, a checkpoint
            after each epoch, and ``report_to="none"``.

    The loss of an optimizer step is the mean over the labels of all batches of the step, so that half of the batch size
    with twice the number of batches makes the same step up to rounding.

    For AdaLoRA, a callback updates the ranks; for Diff Pruning, a callback prunes the adapter after half of the steps.
    In several processes, the first process saves the adapter, which is gathered under FSDP2, and the others wait.

    Raises: TypeError if ``model`` has no adapter; ValueError if ``block_size`` is less than 2; peft_ext.run.RunError if
    the rows of ``train_dataset`` have neither ``input_ids`` nor columns for text, for prompt and completion, or for
    messages, if a row lacks a column that other rows have, if a row with ``input_ids`` has a list of numbers in a
    column of another name, if the columns of a row differ in length, if no completion begins within ``block_size``
    tokens, if an example has more tokens than the model takes, virtual tokens counted, if all labels are -100, or if
    the loss of a causal language model is not the mean cross-entropy of the next tokens.
    """
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    from .files import save_adapter
    from .integrations.trainer import AdaLoraCallback, DiffPruningCallback, PeftExtCallback
    from .run.token_mean import TokenMeanTrainer

    if not hasattr(model, "peft_config"):
        raise TypeError(f"train_with_peft: model is {type(model).__name__}, wanted a PeftModel")
    if block_size < 2:
        raise ValueError(f"train_with_peft: block_size is {block_size}, wanted at least 2")
    usual = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "learning_rate": 2e-4, "warmup_steps": 100, "logging_steps": 10, "save_strategy": "epoch",
        "report_to": "none", "remove_unused_columns": False,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(output_dir), **{**usual, **arguments})
    if args.n_gpu > 1:
        warnings.warn(f"train_with_peft: trains on one of {args.n_gpu} GPUs; torchrun starts a process for each GPU",
                      stacklevel=2)  # fmt: skip
        args._n_gpu = 1  # with more GPUs, Trainer would use nn.DataParallel and another loss
    padding = copy.copy(tokenizer)
    padding.padding_side = "right"
    collator = partial(_collate, DataCollatorForSeq2Seq(padding, label_pad_token_id=IGNORED))
    kind = str(getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type))
    further = {"ADALORA": AdaLoraCallback, "DIFF_PRUNING": DiffPruningCallback}
    callbacks = [further[kind]()] if kind in further else []
    examples = _tokenized(train_dataset, tokenizer, block_size)
    _check_room(model, examples)
    check_causal_loss(model, examples)
    trainer = TokenMeanTrainer(model, args, collator, examples, callbacks=callbacks)
    PeftExtCallback().attach(trainer)
    done = trainer.train()
    state = {}
    if trainer.is_fsdp_enabled:
        from .integrations.fsdp2 import adapter_state

        state = {"state_dict": adapter_state(model)}
    if trainer.is_world_process_zero():
        save_adapter(model, adapter_dir, overwrite=True, **state)
    trainer.accelerator.wait_for_everyone()
    return done


def load_and_merge_adapter(base_model_name: Union[str, Path], adapter_path: Union[str, Path]) -> nn.Module:
    """Merges a saved adapter into its base and returns the base, a plain transformers model.

    :func:`peft_ext.merge_to_dense` merges from folder to folder, usually with one layer in memory at a time.

    Raises: ValueError where the method can't be merged; the errors of :func:`peft_ext.load_adapter`.
    """
    model = load_adapter(_load(base_model_name), adapter_path)
    if not hasattr(model, "merge_and_unload"):
        kind = getattr(model.active_peft_config.peft_type, "value", model.active_peft_config.peft_type)
        raise ValueError(f"load_and_merge_adapter: an adapter of {kind} has no layers to merge into")
    return model.merge_and_unload()


def _load(name: Union[str, Path]) -> nn.Module:
    """Returns a causal language model from safetensors, on a GPU if there is one, in bfloat16, or in float32 on a CPU
    that has no bfloat16 instructions in use."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if not torch.cuda.is_available() and _cpu.why_float32() else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _tokenized(rows: Iterable[Any], tokenizer: Any, block_size: int = 512) -> list[dict[str, Any]]:
    """Returns rows as examples with ``input_ids`` and labels.

    Warns if a record has more than ``block_size`` tokens, and if the tokens at the end of the texts that fill no block
    are more than a tenth of the other tokens.
    """
    rows = [dict(row) for row in rows]
    if not rows or any("input_ids" in row for row in rows):
        # A dataset that was tokenized by `map` still has its texts. The texts are removed, as Trainer removes them.
        rows = [{name: value for name, value in row.items() if name in _COLUMNS or _as_numbers(value).dim()}
                for row in rows]  # fmt: skip
        columns = {name for row in rows for name in row}
        return [_token_row(f"--data train_dataset: record {i}", row, columns) for i, row in enumerate(rows, 1)]
    kind, records = read_records("train_dataset", rows)
    examples = tokenize(Corpus(kind, records, [], "train_dataset"), tokenizer, block_size)
    if len(records) < len(rows):
        column = "text" if kind == "text" else "completion"
        warnings.warn(
            f"train_with_peft: {len(rows) - len(records)} of {len(rows)} records have an empty {column} and were left "
            "out", stacklevel=3,
        )  # fmt: skip
    if examples.rest > sum(len(row["input_ids"]) for row in examples.train) / 10:
        warnings.warn(
            f"train_with_peft: {examples.rest} tokens at the end of the texts, which do not fill a block of "
            f"{block_size} tokens, were left out", stacklevel=3,
        )  # fmt: skip
    if examples.truncated or examples.left_out:
        warnings.warn(
            f"train_with_peft: of {len(records)} records, {examples.truncated} were cut at block_size={block_size} "
            f"tokens, and {examples.left_out} were left out, because no completion begins within these tokens",
            stacklevel=3,
        )
    return examples.train


def _check_room(model: nn.Module, examples: list[dict[str, Any]]) -> None:
    """Raises RunError where an example has more tokens than the model takes, or where no example has a label."""
    config = model.active_peft_config
    virtual = config.num_virtual_tokens if config.is_prompt_learning else 0
    room = most_tokens(getattr(base_model(model), "config", None))
    longest = max((len(row["input_ids"]) for row in examples), default=0)
    if longest + virtual > room:
        more = f", and the adapter adds {virtual} virtual tokens" if virtual else ""
        raise RunError(f"--data train_dataset: an example has {longest} tokens{more}, the model takes at most {room}; "
                       "wanted shorter rows, or a smaller block_size")  # fmt: skip
    if examples and all(label == IGNORED for row in examples for label in row["labels"]):
        raise RunError("--data train_dataset: all labels are -100, which the loss ignores, wanted a label to train on")


def _token_row(where: str, row: dict[str, Any], columns: set[str]) -> dict[str, list[int]]:
    """Returns a row that is tokenized already as lists of integers, with labels.

    ``columns``: the names of the columns of numbers that any row has. ``where`` begins the text of an error.
    """
    if unknown := columns.difference(_COLUMNS):
        raise RunError(f"--data train_dataset: rows of input_ids have numbers in the column {min(unknown)!r}, wanted "
                       f"numbers in {', '.join(_COLUMNS)} only")  # fmt: skip
    found = {name: _integers(where, name, value) for name, value in row.items() if value is not None}
    length = len(found.get("input_ids", ()))
    if "attention_mask" in columns:
        found.setdefault("attention_mask", [1] * length)
    mask = found.get("attention_mask", [1] * length)
    if "labels" not in found:
        pairs = zip(found.get("input_ids", ()), mask, strict=False)  # different lengths raise an error later
        found["labels"] = [token if kept else IGNORED for token, kept in pairs]
    for name in sorted(columns | {"labels"}):
        if name not in found:
            raise RunError(f"{where} has nothing in column {name!r}, which other records have")
        if len(found[name]) != length:
            raise RunError(
                f"{where} has {len(found[name])} numbers in column {name!r}, wanted {length} as in input_ids"
            )
    return found


def _as_numbers(value: Any) -> torch.Tensor:
    """Returns a list, array or tensor of numbers as a tensor, and any other value as a tensor without dimensions."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return torch.zeros(())


def _integers(where: str, column: str, value: Any) -> list[int]:
    """Returns a list, array or tensor of integers as a list. Raises RunError for any other value."""
    numbers = _as_numbers(value)
    if numbers.dim() != 1 or numbers.numel() and (numbers.is_floating_point() or numbers.is_complex()):
        raise RunError(f"{where} has {type(value).__name__} in column {column!r}, wanted a list of integers")
    return [int(number) for number in numbers.tolist()]


def _collate(pad: Callable[[list[dict[str, Any]]], Any], rows: list[dict[str, Any]]) -> Any:
    """Returns rows as one batch, padded by the data collator ``pad``, which does not pad ``position_ids``."""
    rows = [dict(row) for row in rows]
    positions = [row.pop("position_ids", None) for row in rows]
    batch = pad(rows)
    if positions[0] is not None:
        width, is_left = batch["input_ids"].shape[1], pad.tokenizer.padding_side == "left"
        gaps = [[0] * (width - len(row)) for row in positions]
        padded = [gap + row if is_left else row + gap for gap, row in zip(gaps, positions, strict=True)]
        batch["position_ids"] = torch.tensor(padded)
    return batch
