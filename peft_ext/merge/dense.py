"""``merge_to_dense``: checks its arguments, reads the base, plans the output and writes the folder."""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from .. import tuners  # noqa: F401  registers the methods that PEFT lacks
from .._imports import required
from ..files import atomic_folder, check_free
from ..sources.adapter import checked_config
from ..sources.model import TOKENIZER_FILES, SourceError, find_folder, hushed
from ..sources.weight_files import check_finite
from ..text import format_bytes
from ..weights.nf4 import BLOCKSIZES
from ..weights.quantizers import QUANTIZATIONS
from . import writer
from .base import base_of
from .errors import as_merge_error, fail
from .plan import Plan

with required("peft", "peft_ext.merge_to_dense"):
    from peft import PeftConfig
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
with required("transformers", "peft_ext.merge_to_dense"):
    from transformers import PreTrainedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": None}

# Initializations that change the base's weights. An adapter that was initialized in one of these ways fits only the
# changed base, which PEFT does not save.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

# Methods whose layers share one bank of tensors. A merge of one module at a time can't read a shared bank.
_SHARED = ("VBLORA", "UNILORA", "TINYLORA")


@dataclass(frozen=True)
class MergeReport:
    """The result of :func:`merge_to_dense`.

    Attributes:
        output: folder of the merged model.
        files: names of the weight files in the folder.
        nbytes: bytes of the tensors that were written.
        base: the base's folder or name.
        model_class: name of the class of the model that was written.
        base_quant: quantization of the base's weights: one of ``QUANTIZATIONS`` of peft_ext.weights.quantizers.
        base_quant_text: a text that names ``base_quant`` and says why the base has this quantization.
        method: PEFT's name of the adapter's method.
        dtype: dtype that the caller asked for; None if the caller asked for none.
        merged: number of modules that the adapter changed.
        tensors, parameters: numbers of tensors and of elements that were written.
        untied: names of weights that were tied in the base and are separate now, because the adapter changed one.
        largest_change: name of the tensor with the largest ‖W' − W‖ / ‖W‖, and this ratio; (None, 0.0) where no change
            was measured.
        tokenizer: folder or GGUF file whose tokenizer was written, the adapter's or the base's; None: neither has one.
        seconds: seconds that the merge took.
    """

    output: Path
    files: tuple[str, ...]
    nbytes: int
    base: str
    model_class: str
    base_quant: str
    base_quant_text: str
    method: str
    dtype: Optional[torch.dtype]
    merged: int
    tensors: int
    parameters: int
    untied: tuple[str, ...]
    largest_change: tuple[Optional[str], float]
    tokenizer: Optional[Path]
    seconds: float


def merge_to_dense(
    model: Union[PreTrainedModel, str, Path, None],
    adapter: Union[str, Path],
    output: Union[str, Path],
    *,
    dtype: Union[torch.dtype, str, None] = None,
    max_shard_size: Union[int, str] = "5GB",
    base_quant: Optional[str] = None,
    blocksize: Optional[int] = None,
    double_quant: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merges a saved adapter into its base and writes a dense transformers model: ``W' = merge(W, adapter)``.

    Up to rounding, the written model computes the adapted model's results in evaluation. The folder has safetensors,
    config.json, generation_config.json if the base has this file or generates text, the base's processor files, and
    tokenizer files: the adapter's if its folder has tokenizer_config.json, else the base's. ``from_pretrained`` loads
    the folder without PEFT and peft_ext. The adapter may be of a method whose layers can merge and share no tensors:
    LoRA (with rsLoRA, DoRA, patterns, Conv1D, embeddings, target_parameters, trainable tokens), AdaLoRA, IA3 and others
    of PEFT, BitFit, partial fine-tuning, Diff Pruning; each with ``modules_to_save``. Two tied weights of which the
    adapter changes one are written as two separate weights; the config unties the two weights, except for T5.

    Args:
        model: a folder or hub name of a dense model, of a model that bitsandbytes quantized to NF4, or of a packed
            checkpoint that :class:`peft_ext.PackedConfig` supports; a GGUF file; or a model in memory: dense, or
            quantized by :func:`peft_ext.quantize_nf4`, by :func:`peft_ext.quantize_packed` or by bitsandbytes, or
            loaded packed. A model in memory is not changed. With ``model`` None, the base is the model that the
            adapter's configuration names.
        adapter: a folder that ``save_pretrained`` wrote, or a hub name. The adapter's tensors must be in safetensors.
        output: a folder, new or empty, or with ``overwrite`` an existing folder of a model. The finished folder appears
            in one step, see :func:`peft_ext.files.atomic_folder`. If the merge fails, ``output`` holds no part of the
            merged model.
        dtype: dtype of the output: torch.bfloat16, float16 or float32 ("bf16", "fp16", "fp32"); None ("keep"): the
            base's; for a GGUF file the dtype of most elements of its matrices, of which the quantized ones count as
            bfloat16. For an adapter of ``peft-ext finetune`` over a base in files, None means bfloat16, unless the
            files are in NF4. Tensors that the model's class keeps in float32 if the model has the output's dtype are
            written in float32. Tensors of integers keep their dtypes.
        max_shard_size: largest number of bytes of a weight file, as a number or as "5GB".
        base_quant: "nf4": the weights of a dense ``model`` are quantized as quantize_nf4 does, then dequantized, before
            the adapter is added; "mxfp4", "nvfp4", "fp8", "int4": the weights are quantized as quantize_packed does,
            then dequantized; "none": the weights are taken as they are; "checkpoint": ``model`` has packed weights.
            base_quant None: the quantization of the packed ``model``; for a dense ``model``, the quantization in the
            run.json that ``peft-ext finetune`` wrote beside the adapter, or "none" without a run.json.
        blocksize, double_quant: options of base_quant "nf4"; blocksize None: run.json's, or else 64.
        overwrite: True: the output may be an existing folder of a model, which is replaced.
        progress: whether to show a progress bar, on a terminal only.

    Returns: a report of the merge.

    Raises:
        TypeError: ``model`` is neither a transformers model nor a path, a hub name or None.
        MergeError: a method, an initialization or a quantization that can't be merged; an adapter of another
            architecture, of other shapes, with missing or unknown tensors, with values that are not finite, or in a
            pickle; a merged weight that is too large for the output's dtype; a wrong option.
        OSError: ``output`` is a folder that is not empty and overwrite is False, or can't be written, or the model does
            not fit on the disk. After an error no partial folder is left.
    """
    started = time.perf_counter()
    dtype = _dtype(dtype)
    _check_options(base_quant, blocksize)
    with as_merge_error(SourceError):
        adapter = find_folder("adapter", adapter, [*TOKENIZER_FILES, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME])
    config = adapter_config(adapter)
    output = Path(output).expanduser()
    with hushed():
        with as_merge_error(SafetensorError, about=f"{adapter / SAFETENSORS_WEIGHTS_NAME}: "):
            weights = load_peft_weights(str(adapter), device="cpu")
        with as_merge_error(ValueError):
            check_finite(adapter / SAFETENSORS_WEIGHTS_NAME)
        base = base_of(model, config, adapter, weights, base_quant, blocksize, double_quant)
        _check_output(output, overwrite, [adapter, *([] if base.folder is None else [base.folder])])
    # gguf_tokenizer is called outside of hushed(), because it warns if the file does not say how to split text.
    words = writer.gguf_tokenizer(base, adapter)
    with hushed():
        plan = Plan(base, config, weights, dtype)
        del weights
        disable = None if progress else True  # with None, tqdm draws on a terminal only
        with (
            tqdm(desc="merging", total=plan.nbytes, unit="B", unit_scale=True, leave=False, disable=disable) as bar,
            atomic_folder(output, overwrite=overwrite) as folder,
        ):
            check_room(folder, plan.nbytes)
            files = plan.write(folder, max_shard_size, bar.update)
            tokenizer = writer.write_beside(base, plan.config, adapter, folder, words)
    return MergeReport(
        output=output, files=tuple(files), nbytes=plan.nbytes, base=base.name, model_class=type(base.model).__name__,
        base_quant=base.quant, base_quant_text=base.quant_text, method=str(config.peft_type.value), dtype=dtype,
        merged=len(plan.targets), tensors=len(plan.outputs),
        parameters=sum(t.numel() for t in plan.outputs.values()), untied=tuple(plan.untied),
        largest_change=plan.largest_change, tokenizer=tokenizer, seconds=time.perf_counter() - started,
    )  # fmt: skip


# --- checks before the weights are loaded -----------------------------------------------------------------------------


def _dtype(dtype: Union[torch.dtype, str, None]) -> Optional[torch.dtype]:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        fail(f"dtype is {dtype}, wanted one of {', '.join(DTYPES)}")
    return dtype


def _check_options(base_quant: Optional[str], blocksize: Optional[int]) -> None:
    if base_quant not in (None, *QUANTIZATIONS):
        fail(f"base_quant is {base_quant!r}, wanted one of {', '.join(QUANTIZATIONS)}, or None")
    if blocksize is not None and blocksize not in BLOCKSIZES:
        fail(f"blocksize is {blocksize}, wanted one of {', '.join(map(str, BLOCKSIZES))}")


def init_that_changes_base(config: PeftConfig) -> Optional[str]:
    """Returns the adapter's ``init_lora_weights`` where this initialization changes the base's weights; else None."""
    init = getattr(config, "init_lora_weights", None)
    return init if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE) else None


def adapter_config(folder: Path) -> PeftConfig:
    if not (folder / CONFIG_NAME).is_file():
        fail(f"no {CONFIG_NAME} in {folder}, wanted an adapter in PEFT's format")
    with as_merge_error(ValueError, FileNotFoundError):
        config = checked_config(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind == "ADAPTION_PROMPT":
        fail(f"{kind} adds tokens or keys to the input, which no weight of the base can hold: merging is impossible")
    if kind == "BOTTLENECK":
        fail("BOTTLENECK adds layers with an activation, which no weight of the base can hold: merging is impossible")
    if kind in _SHARED:
        fail(f"{kind} has tensors that its layers share: {kind} can't be merged yet")
    if getattr(config, "layer_replication", None):
        fail("layer_replication has several layers share one weight, each with an adapter of its own. A dense weight "
             "can hold one adapter: merging is impossible")  # fmt: skip
    if (init := init_that_changes_base(config)) is not None:
        fail(
            f"init_lora_weights is {init!r}, which changed the base's own weights before training; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it an adapter to the unchanged base"
        )
    config.inference_mode = True
    return config


def _check_output(output: Path, overwrite: bool, sources: list[Path]) -> None:
    target = Path(os.path.realpath(output))
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(target):
            fail(f"output is {output}, which is or holds {source}, from which the model is made")
    check_free(target, overwrite)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        fail(f"output is {output}, which is not empty and no model's folder, so it is not replaced")


def check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        wanted, there = (format_bytes(size, binary=False) for size in (nbytes, free))
        text = f"{os.strerror(errno.ENOSPC)}: {wanted} to write, {there} free"
        raise OSError(errno.ENOSPC, text, str(folder.parent))
