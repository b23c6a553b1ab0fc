"""An adapter and its base made one: a dense transformers model on disk, which needs neither PEFT nor this package.

    W' = merge(W, adapter)          W, W' [N, K]; W dequantized where it is NF4; merge: the method's own, in float32

The base's files are mapped, not read. One module at a time is widened to float32, merged by its layer's own ``merge``
(PEFT's, or that of :mod:`peft_ext.tuners`), rounded once to the dtype asked for, and written out; nothing else of the
model is held. The exceptions: a base whose files have another dtype than the one it is used in is held in that, and an
embedding tied to a head of which one is adapted is held until both are written.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Optional, Union

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from torch import Tensor, nn

from . import ops
from . import tuners as _tuners  # noqa: F401  registers the methods that PEFT lacks
from ._imports import required
from .files import atomic_file, atomic_folder, check_free
from .nn import NF4Linear
from .quantize import HEADS, linear_groups
from .sources.adapter import checked_config, training_options
from .sources.expressions import check_expressions
from .sources.json_file import first_line
from .sources.model import INDEX, SourceError, find_folder, hushed, load_model
from .sources.weight_files import safetensors_header
from .tuners.layer import ReplacingLayer
from .weight import BLOCKSIZES, NF4Weight

with required("peft", "peft_ext.merge_to_dense"):
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import (
        CONFIG_NAME,
        SAFETENSORS_WEIGHTS_NAME,
        WEIGHTS_NAME,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
with required("transformers", "peft_ext.merge_to_dense"):
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

__all__ = ["DTYPES", "MergeError", "MergeReport", "merge_to_dense"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "keep": None}

_ADAPTER = "default"

# Files beside the weights that a model is used with: tokenizer, chat template, processor.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip

# Initializations that change the base's weights: the adapter is one to a base that is on no disk.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")

# Methods whose layers refer to one bank of tensors, where each module is merged on its own.
_SHARED = ("VBLORA", "UNILORA", "TINYLORA")

_Read = Callable[[], Tensor]


class MergeError(ValueError):
    """What can't be merged, and why: one line that names what came and what was wanted."""


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_to_dense` did.

    Attributes:
        output: the folder. files: names of the weight files in it. nbytes: bytes of its tensors.
        base, model_class: the base's folder or name, and the class of the model that was written.
        base_quant: how the base's weights were taken: "nf4" or "none". base_quant_text: the same, with what decided.
        method: PEFT's name of the adapter's method.
        dtype: of the output, or None where each tensor kept its own.
        merged: modules that the adapter changed. tensors, parameters: of the output.
        untied: names of tied weights that are weights of their own now, since the adapter changed one of them.
        largest_change: ‖W' − W‖ / ‖W‖ of the tensor in which it is largest, and its name; (None, 0.0): none measured.
        seconds: of the whole.
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
    """Merge a saved adapter into its base and write the dense model that results, in transformers' format.

    The result is the adapted model's function in evaluation: weights in safetensors, config.json,
    generation_config.json and the base's tokenizer files; ``from_pretrained`` alone loads it. Every method whose layers
    can merge is taken: LoRA and its kind (rsLoRA, DoRA, patterns, Conv1D, embeddings, target_parameters, trainable
    tokens), AdaLoRA, IA3 and PEFT's others, BitFit, partial fine-tuning, Diff Pruning; ``modules_to_save`` with each. A
    weight that is tied to an adapted one becomes one of its own, where the adapted model treats them as two; the config
    says so.

    Args:
        model: a folder or hub name of a dense model, or of one that bitsandbytes quantized to NF4; or a model in
            memory, dense, quantized by :func:`peft_ext.quantize_nf4` or by bitsandbytes, which is left as it is. None:
            the one that the adapter names.
        adapter: a folder that ``save_pretrained`` wrote, or a hub name; safetensors.
        output: a folder, new or empty; it appears whole as the work is done, see :func:`peft_ext.files.atomic_folder`.
        dtype: of the output: torch.bfloat16, float16 or float32 ("bf16", "fp16", "fp32"); None ("keep"): the base's.
            What a model keeps in float32 stays so, and what is no float.
        max_shard_size: bytes of a weight file, as a number or as "5GB".
        base_quant: the base that the adapter is added to: "nf4": as quantize_nf4 makes it from a dense ``model``, then
            dequantized; "none": as it is. None: what ``peft-ext finetune`` says in the run.json beside the adapter that
            it was trained on, or else as it is.
        blocksize, double_quant: of base_quant "nf4"; None: run.json's, or else 64.
        overwrite: replace a model's folder that is there, whole.
        progress: show a progress bar, on a terminal only.

    Returns: what was done.

    Raises:
        TypeError: ``model`` is no transformers model.
        MergeError: a method, an initialization or a quantization that can't be merged; an adapter of
            another architecture, of other shapes, with keys too few or too many, or in a pickle; a wrong option.
        OSError: ``output`` is there, can't be written, or does not fit on the disk; nothing is left half-written.
    """
    started = time.perf_counter()
    dtype = _dtype(dtype)
    _check_options(base_quant, blocksize)
    with _as_merge_error():
        adapter = find_folder("adapter", adapter, ["*.json", SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME])
    config = _adapter_config(adapter)
    output = Path(output).expanduser()
    with hushed():
        try:
            weights = load_peft_weights(str(adapter), device="cpu")
        except SafetensorError as error:
            _fail(f"{adapter / SAFETENSORS_WEIGHTS_NAME}: {first_line(error)}", error)
        base = _base(model, config, adapter, weights, base_quant, blocksize, double_quant)
        _check_output(output, overwrite, [adapter, *([] if base.folder is None else [base.folder])])
        merge = _Merge(base, config, weights, dtype)
        del weights
        with _bar(progress, merge.nbytes) as advance, atomic_folder(output, overwrite=overwrite) as folder:
            _check_room(folder, merge.nbytes)
            files = merge.write(folder, max_shard_size, advance)
            _write_beside(base, merge.config, folder)
    return MergeReport(
        output=output, files=tuple(files), nbytes=merge.nbytes, base=base.name, model_class=type(base.model).__name__,
        base_quant=base.quant, base_quant_text=base.quant_text, method=str(config.peft_type.value), dtype=dtype,
        merged=len(merge.targets), tensors=len(merge.outputs),
        parameters=sum(t.numel() for t in merge.outputs.values()), untied=tuple(merge.untied),
        largest_change=merge.largest_change, seconds=time.perf_counter() - started,
    )  # fmt: skip


# --- checks before anything is loaded ---------------------------------------------------------------------------------


def _fail(text: str, cause: Optional[BaseException] = None) -> NoReturn:
    raise MergeError(f"merge_to_dense: {text}") from cause


@contextlib.contextmanager
def _as_merge_error() -> Iterator[None]:
    """Raises MergeError for a SourceError."""
    try:
        yield
    except SourceError as error:
        _fail(str(error), error)


def _dtype(dtype: Union[torch.dtype, str, None]) -> Optional[torch.dtype]:
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        _fail(f"dtype is {dtype}, wanted one of {', '.join(DTYPES)}")
    return dtype


def _check_options(base_quant: Optional[str], blocksize: Optional[int]) -> None:
    if base_quant not in (None, "nf4", "none"):
        _fail(f"base_quant is {base_quant!r}, wanted 'nf4', 'none' or None")
    if blocksize is not None and blocksize not in BLOCKSIZES:
        _fail(f"blocksize is {blocksize}, wanted one of {', '.join(map(str, BLOCKSIZES))}")


def _adapter_config(folder: Path) -> PeftConfig:
    if not (folder / CONFIG_NAME).is_file():
        _fail(f"no {CONFIG_NAME} in {folder}, wanted an adapter in PEFT's format")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        pickle = (folder / WEIGHTS_NAME).is_file()
        came = f"{WEIGHTS_NAME}, a pickle, which runs code as it is read, and no " if pickle else "no "
        _fail(f"{folder} has {came}{SAFETENSORS_WEIGHTS_NAME}")
    try:
        config = checked_config(folder)
    except ValueError as error:
        _fail(str(error), error)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind == "ADAPTION_PROMPT":
        _fail(f"{kind} adds tokens or keys to the input, which no weight of the base can hold: it can't be merged")
    if kind == "BOTTLENECK":
        _fail("BOTTLENECK adds layers with an activation, which no weight of the base can hold: it can't be merged")
    if kind in _SHARED:
        _fail(f"{kind} has tensors that its layers share: merging it is not supported yet")
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        _fail(
            f"init_lora_weights is {init!r}, which changed the base's own weights before training; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it one to the base as it is"
        )
    config.inference_mode = True
    return config


def _check_output(output: Path, overwrite: bool, sources: list[Path]) -> None:
    target = Path(os.path.realpath(output))
    for source in sources:
        if Path(os.path.realpath(source)).is_relative_to(target):
            _fail(f"output is {output}, which is or holds {source}, from which the model is made")
    check_free(target, overwrite)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        _fail(f"output is {output}, which is not empty and no model's folder, so it is not replaced")


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        text = f"{os.strerror(errno.ENOSPC)}: {nbytes / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, text, str(folder.parent))


# --- the base ---------------------------------------------------------------------------------------------------------


@dataclass
class _Base:
    """A model of dense modules. ``dense``: by id, how to read the parameters that only stand for a weight."""

    model: PreTrainedModel
    dense: dict[int, _Read]
    name: str
    folder: Optional[Path]
    quant: str = "none"
    quant_text: str = "none"
    absent: tuple[str, ...] = ()  # parameters that the base's files have not

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor, on the CPU; an NF4 weight as float32."""
        made = self.dense.get(id(tensor))
        if made is not None:
            return made()
        return tensor.detach().cpu()


def _base(
    model: Union[PreTrainedModel, str, Path, None],
    config: PeftConfig,
    adapter: Path,
    weights: dict[str, Tensor],
    base_quant: Optional[str],
    blocksize: Optional[int],
    double_quant: bool,
) -> _Base:
    with _as_merge_error():
        trained = training_options(adapter)
    if isinstance(model, (str, Path)) or model is None:
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        with _as_merge_error():
            loaded = load_model(model, config, adapter, shapes, trained)
        base = _Base(loaded.model, {}, loaded.name, loaded.folder, absent=loaded.absent)
    elif isinstance(model, PeftModel):
        _fail("model is a PeftModel, wanted its base: save the adapter, and give the base's folder or model.unload()")
    elif isinstance(model, PreTrainedModel):
        base = _from_memory(model)
    else:
        raise TypeError(f"merge_to_dense: model is {type(model).__name__}, wanted a transformers model or its folder")
    held = _stand_in(base)
    if held:
        if base_quant == "none":
            _fail("base_quant is 'none', but the base itself is held in NF4")
        base.quant, base.quant_text = "nf4", f"nf4, as the base is held ({held} layers)"
        return base
    by = "as asked for"
    if base_quant is None:
        by = "as its run.json has it" if trained else "the adapter's folder tells of none"
        base_quant = trained.get("quant", "none")
    base.quant, base.quant_text = base_quant, f"{base_quant}, {by}"
    if base_quant == "nf4":
        blocksize = blocksize or int(trained.get("blocksize", 64))
        _quantize(base, blocksize, double_quant)
        double = "double quantization, " if double_quant else ""
        base.quant_text = f"nf4, {double}blocks of {blocksize}, {by}"
    return base


def _from_memory(model: PreTrainedModel) -> _Base:
    if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules()):
        _fail(f"the {type(model).__name__} has adapter layers already, wanted it without: model.unload()")
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        _fail(f"the {type(model).__name__} has weights on the meta device, wanted them loaded and not offloaded")
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # modules of our own, tensors of theirs
    where = Path(model.name_or_path) if model.name_or_path else None
    folder = where if where is not None and where.is_dir() else None
    return _Base(shared, {}, model.name_or_path or type(model).__name__, folder)


def _nf4_of(module: nn.Module, name: str) -> Optional[NF4Weight]:
    """The weight of a layer that holds it in NF4; MergeError for what other quantizers made."""
    if isinstance(module, NF4Linear):
        return module.nf4
    kind = type(module).__name__
    if kind == "Linear4bit":
        try:
            return NF4Weight.from_bitsandbytes(module.weight)
        except ValueError as error:
            _fail(f"{name}: {first_line(error)}", error)
    if kind == "Linear8bitLt" or (isinstance(module, nn.Linear) and not module.weight.is_floating_point()):
        _fail(f"{name} is a {kind} with {module.weight.dtype} weights; wanted dense weights or NF4")
    return None


def _stand_in(base: _Base) -> int:
    """Put a dense layer without memory of its own in place of each NF4 one; the number of them."""
    count = 0
    for parent_name, parent in list(base.model.named_modules()):
        for attribute, child in list(parent.named_children()):
            nf4 = _nf4_of(child, f"{parent_name}.{attribute}".lstrip("."))
            if nf4 is None:
                continue
            dense = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            # All of its elements are one: PEFT finds a dense weight of this dtype and shape on the CPU.
            dense.weight = nn.Parameter(torch.zeros((), dtype=nf4.dtype).expand(nf4.shape), requires_grad=False)
            dense.bias = child.bias
            base.dense[id(dense.weight)] = lambda nf4=nf4: nf4.to("cpu").dequantize(torch.float32)
            setattr(parent, attribute, dense)
            count += 1
    if count:
        model = base.model
        for mark in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "hf_device_map"):
            if mark in model.__dict__:
                delattr(model, mark)
        if getattr(model.config, "quantization_config", None) is not None:
            del model.config.quantization_config
        kept = getattr(model, "_weight_conversions", None)
        if kept is not None:
            model._weight_conversions = [conversion for conversion in kept if _reverses(conversion)]
    return count


def _reverses(conversion: Any) -> bool:
    """Whether transformers can undo a conversion: not those that put a quantizer's tensors together."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


def _quantize(base: _Base, blocksize: int, double_quant: bool) -> None:
    """Read each weight that quantize_nf4 would quantize through NF4."""
    for same in linear_groups(base.model, set(HEADS)):
        weight = same[0].linear.weight

        def read(weight: Tensor = weight) -> Tensor:
            return ops.nf4_quantize(weight.detach().cpu(), blocksize, double_quant).dequantize(torch.float32)

        base.dense[id(weight)] = read


# --- the merge --------------------------------------------------------------------------------------------------------


class _Merge:
    """The plan, complete before anything is written: names, shapes and dtypes of the output, and where each is from.

    ``origin`` of a name: (path of the adapted module, name in it), or ("", name): the base's own tensor.
    """

    def __init__(
        self, base: _Base, config: PeftConfig, weights: dict[str, Tensor], dtype: Optional[torch.dtype]
    ) -> None:
        self.base, self.dtype = base, dtype
        self.largest_change: tuple[Optional[str], float] = (None, 0.0)
        self.untied: list[str] = []
        ignored = set(base.model._keys_to_ignore_on_save or ())
        state = base.model.state_dict(keep_vars=True)
        self.before = {name: tensor for name, tensor in state.items() if name not in ignored}
        self.adapted = _adapt(base, config, weights)
        self.targets = dict(_find_targets(base.model, ""))
        if not self.targets:
            _fail(f"the adapter changes no module of {type(base.model).__name__}")
        self._check_absent()
        self.after = base.model.state_dict(keep_vars=True)
        self._made: dict[str, dict[str, Tensor]] = {}
        self.origin = self._origins()
        self.config = copy.deepcopy(base.model.config)
        self.config.dtype = base.model.dtype if dtype is None else dtype
        self._untie()
        self.meta = {name: self._planned(name) for name in self.origin}
        self._fit()
        self._uses = Counter(origin[0] for origin in self.origin.values())
        self.groups = self._grouped()
        self.outputs = {name: tensor for _, outputs in self.groups for name, tensor in outputs.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self.outputs.values())

    # - the plan -

    def _check_absent(self) -> None:
        for name in self.base.absent:
            path = self._target_of(name)
            given = isinstance(self.targets.get(path), (ModulesToSaveWrapper, ReplacingLayer))
            if name in self.before and not given:
                _fail(f"{name} is in neither the base's files nor the adapter, so it would be random")

    def _target_of(self, name: str) -> str:
        parts = name.split(".")
        return next((p for p in (".".join(parts[:n]) for n in range(1, len(parts))) if p in self.targets), "")

    def _origins(self) -> dict[str, tuple[str, str]]:
        paths = {id(module): path for path, module in self.targets.items()}
        origins: dict[str, tuple[str, str]] = {}
        for name in self.before:
            path = self._target_of(name)
            local = name.removeprefix(f"{path}.") if path else name
            layer = self.targets.get(path)
            if isinstance(layer, ReplacingLayer):
                owner, owned = layer.tied.get(_ADAPTER, {}).get(local, (layer, local))
                held = owned in owner.names.get(_ADAPTER, ())
                origins[name] = (paths[id(owner)], owned) if held else (path, local)
            else:
                origins[name] = (path, local)
        for path, layer in self.targets.items():
            if isinstance(layer, ReplacingLayer):  # a bias that the module had not
                for local in layer.names.get(_ADAPTER, ()):
                    origins.setdefault(f"{path}.{local}", (path, local))
        return origins

    def _untie(self) -> None:
        """See which tied weights the adapter tore apart: then the config must not tie them on loading."""
        groups: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.before.items():
            groups[id(tensor)].append(name)
        for names in groups.values():
            if len(names) < 2:
                continue
            first = next((n for n in names if self.origin[n][0] == "" and self.after[n] is not self.before[n]), None)
            for name in names:  # loaded in place of one of them: PEFT writes it into all
                if self.origin[name][0] == "" and self.after[name] is self.before[name] and first is not None:
                    self.after[name] = self.after[first]
            kept = names[0]
            torn = [n for n in names[1:] if not self._same(kept, n)]
            for name in names[1:]:
                if name not in torn:
                    self.origin[name] = self.origin[kept]
            self.untied += torn
        if self.untied and getattr(self.config, "tie_word_embeddings", False):
            apart = type(self.config).from_dict({**self.config.to_dict(), "tie_word_embeddings": False})
            about, wanted = apart.to_dict(), self.config.to_dict()
            wanted["tie_word_embeddings"] = False
            # T5 takes the flag for another thing; transformers ties no weights that differ in the files, flag or not.
            if about == wanted:
                self.config.tie_word_embeddings = False

    def _same(self, one: str, other: str) -> bool:
        a, b = self.origin[one], self.origin[other]
        if a == b or (a[0] == b[0] == "" and self.after[one] is self.after[other]):
            return True
        return torch.equal(self._value(one).float(), self._value(other).float())

    def _planned(self, name: str) -> Tensor:
        """A tensor without memory, of the shape and dtype that is written."""
        path, local = self.origin[name]
        if name in self.before:
            shape, dtype = self.before[name].shape, self.before[name].dtype
        else:
            layer = self.targets[path]
            shape = layer.own(_ADAPTER, training=False)[local].shape
            dtype = layer.base_layer.weight.dtype
        return torch.empty(shape, dtype=self._dtype_of(name, dtype), device="meta")

    def _dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        if self.dtype is None or not dtype.is_floating_point:
            return dtype
        model = self.base.model
        wide = set(model._keep_in_fp32_modules or ()) if self.dtype is torch.float16 else set()
        if self.dtype is not torch.float32:
            wide |= set(model._keep_in_fp32_modules_strict or ())
        return torch.float32 if wide.intersection(name.split(".")) else self.dtype

    def _fit(self) -> None:
        """See that a model made from the config alone has just these tensors; let the config ask for added biases."""
        fresh = _fresh(type(self.base.model), self.config)
        if added := sorted(self.meta.keys() - fresh.state_dict().keys()):
            for flag in ("attention_bias", "mlp_bias", "qkv_bias", "use_bias"):
                if getattr(self.config, flag, None) is False:
                    setattr(self.config, flag, True)
            fresh = _fresh(type(self.base.model), self.config)
        wanted = {n: t for n, t in fresh.state_dict().items() if n not in (fresh._keys_to_ignore_on_save or ())}
        if extra := sorted(self.meta.keys() - wanted.keys()):
            _fail(f"a plain {type(fresh).__name__} has no {extra[0]}, which the adapter adds")
        for name in wanted.keys() - self.meta.keys():
            if not added or not name.endswith(".bias"):
                _fail(f"a plain {type(fresh).__name__} has {name}, which the base has not")
            self.origin[name] = ("", "")  # zeros
            self.meta[name] = torch.empty_like(wanted[name], dtype=self.meta[added[0]].dtype)
        for name, tensor in wanted.items():
            if tensor.shape != self.meta[name].shape:
                _fail(f"{name} is {tuple(self.meta[name].shape)}, the config asks for {tuple(tensor.shape)}")
        tied = set(fresh.all_tied_weights_keys or ())
        whole = {origin: sum(o == origin for o in self.origin.values()) for origin in set(self.origin.values())}
        for name in tied & self.meta.keys():
            if self.origin[name] != ("", "") and whole[self.origin[name]] > 1 and name not in self.untied:
                source = fresh.all_tied_weights_keys[name]
                if source in self.meta and self.origin[source] == self.origin[name]:
                    del self.meta[name], self.origin[name]

    def _grouped(self) -> list[tuple[list[str], dict[str, Tensor]]]:
        """What is read together, and what becomes of it in the files, where names and shapes are those of the hub.

        As little as possible together: a tensor, or a layer where transformers' conversion makes one of several.
        """
        model, meta = self.base.model, self.meta
        whole = revert_weight_conversion(model, dict(meta))
        by_layer: dict[str, list[str]] = defaultdict(list)
        for name in meta:
            found = re.match(r".*?\.\d+(?=\.)", name)
            by_layer[found[0] if found else name].append(name)
        wanted = {name: (tensor.shape, tensor.dtype) for name, tensor in whole.items()}
        for parts in ([[name] for name in meta], list(by_layer.values())):
            try:
                groups = [(names, revert_weight_conversion(model, {n: meta[n] for n in names})) for names in parts]
            except Exception:  # a conversion that wants more than there is in a group
                continue
            found = [(n, (t.shape, t.dtype)) for _, outputs in groups for n, t in outputs.items()]
            if len(found) == len(wanted) and dict(found) == wanted:
                return groups
        return [(list(meta), whole)]

    # - the tensors -

    def _value(self, name: str) -> Tensor:
        """The tensor, in float32 where it was merged."""
        path, local = self.origin[name]
        if path == "":
            return self.base.read(self.after[local]) if local else torch.zeros(self.meta[name].shape)
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path][local]

    def _make(self, path: str) -> dict[str, Tensor]:
        """The tensors of an adapted module after merging, by its layer's own merge, in float32."""
        target = self.targets[path]
        inner = target.original_module if isinstance(target, AuxiliaryTrainingWrapper) else target.get_base_layer()
        before = {} if isinstance(target, ModulesToSaveWrapper) else self._widen(inner)
        for module in target.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16):
                        held[name] = _like(tensor, tensor.detach().float())
        try:
            if hasattr(target, "unload_and_optionally_merge_module"):
                merged = target.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            else:
                target.merge(safe_merge=True)
                merged = target.get_base_layer()
        except (NotImplementedError, ValueError, RuntimeError) as error:
            reason = first_line(error) if str(error).strip() else f"{type(target).__name__} has no merge"
            _fail(f"{path}: {reason}", error)
        found = dict(merged.state_dict())
        locals_ = {origin[1] for origin in self.origin.values() if origin[0] == path}
        if missing := sorted(locals_ - found.keys()):
            _fail(f"{path}: merged, it has no {missing[0]}")
        for name, tensor in before.items():
            norm = torch.linalg.vector_norm(tensor).item()
            if name in found and norm and tensor.shape == found[name].shape:
                change = torch.dist(tensor, found[name].float()).item() / norm
                if change > self.largest_change[1]:
                    self.largest_change = (f"{path}.{name}", change)
        return {name: found[name] for name in locals_}

    def _widen(self, module: nn.Module) -> dict[str, Tensor]:
        """Put float32 copies in place of the module's parameters, which other modules may share; returns them."""
        wide = {}
        for prefix, below in list(module.named_modules()):
            for name, parameter in below._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    tensor = self.base.read(parameter)
                    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                    below._parameters[name] = _like(parameter, tensor)
                    wide[f"{prefix}.{name}".lstrip(".")] = tensor
        return wide

    def _group(self, names: list[str]) -> dict[str, Tensor]:
        """A group's tensors as they are written."""
        found = {}
        for name in names:
            found[name] = self._value(name).to(self.meta[name].dtype)
            path = self.origin[name][0]
            self._uses[path] -= 1
            if path and not self._uses[path]:  # nothing else is made of this module: give it up
                del self._made[path]
                self.targets[path] = nn.Identity()
                parent, _, leaf = path.rpartition(".")
                self.base.model.get_submodule(parent)._modules[leaf] = self.targets[path]
        return revert_weight_conversion(self.base.model, found)

    # - the files -

    def write(self, folder: Path, max_shard_size: Union[int, str], advance: Callable[[int], None]) -> list[str]:
        """Write the tensors, one group at a time, and the index where there are several files; their names."""
        try:
            split = split_torch_state_dict_into_shards(
                self.outputs, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
            )
        except ValueError as error:
            _fail(f"max_shard_size is {max_shard_size!r}: {first_line(error)}", error)
        group_of = {name: index for index, (_, outputs) in enumerate(self.groups) for name in outputs}
        ready: dict[str, Tensor] = {}

        def take(name: str) -> Tensor:
            if name not in ready:
                ready.update(self._group(self.groups[group_of[name]][0]))
            return ready.pop(name)

        for file, names in split.filename_to_tensors.items():
            with open(folder / file, "wb") as stream:
                _write_safetensors(stream, {name: self.outputs[name] for name in names}, take, advance)
        if split.is_sharded:
            total = sum(tensor.numel() for tensor in self.outputs.values())
            about = {"total_parameters": total, "total_size": self.nbytes}
            index = {"metadata": about, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
            with atomic_file(folder / INDEX) as file:
                file.write(json.dumps(index, indent=2) + "\n")
        return list(split.filename_to_tensors)


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _adapt(base: _Base, config: PeftConfig, weights: dict[str, Tensor]) -> PeftModel:
    """PEFT's layers on the base, with the adapter's tensors as they lie in its file; MergeError if they don't fit."""
    kind = str(config.peft_type.value)
    try:
        check_expressions(config, base.model)
    except ValueError as error:
        _fail(f"the adapter's {CONFIG_NAME}: {error}", error)
    try:
        # AdaLoRA has a parameter that is in no file, which must not be left on the meta device.
        model = get_peft_model(base.model, config, _ADAPTER, low_cpu_mem_usage=kind != "ADALORA").eval()
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        _fail(f"the adapter does not fit {type(base.model).__name__}: {first_line(error)}", error)

    def assign(state: dict[str, Tensor], strict: bool = False, **kwargs: Any) -> Any:
        # Not copied: that would round to the base's dtype, and write into weights that the caller's model shares.
        return type(model).load_state_dict(model, state, strict=strict, assign=True)

    model.__dict__["load_state_dict"] = assign
    try:
        result = set_peft_model_state_dict(model, weights, _ADAPTER)
    except RuntimeError as error:
        _fail(f"the adapter does not fit {type(base.model).__name__}: {first_line(error)}", error)
    except KeyError as error:
        _fail(f"the adapter's file has no {error.args[0]}", error)
    finally:
        del model.__dict__["load_state_dict"]
    # With bias="all" PEFT saves the biases of modules_to_save once more, under their own place in the tree.
    twice = (".modules_to_save.", ".original_module.")
    if extra := sorted(key for key in result.unexpected_keys if not any(part in key for part in twice)):
        _fail(f"the adapter's file has {extra[0]}, which is no part of {type(base.model).__name__} with {kind}")
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "")
    missing = [key for key in result.missing_keys if prefix and prefix in key and _ADAPTER in key]
    held = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing := sorted({*missing, *held}):
        _fail(f"the adapter's file has no {missing[0].replace(f'.{_ADAPTER}', '')}")
    return model


def _find_targets(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of what PEFT wrapped, the outermost ones."""
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield below, child
        else:
            yield from _find_targets(child, below)


def _fresh(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


# --- files ------------------------------------------------------------------------------------------------------------


def _write_safetensors(
    stream: BinaryIO, planned: dict[str, Tensor], take: Callable[[str], Tensor], advance: Callable[[int], None]
) -> None:
    """Writes the safetensors format, tensor by tensor: the library's own writer wants them all in memory.

    Wide dtypes come first, so that each tensor is aligned.
    """
    names = sorted(planned, key=lambda name: -planned[name].element_size())
    try:
        header = safetensors_header({name: planned[name] for name in names})
    except ValueError as error:
        _fail(str(error), error)
    stream.write(header)
    for name in names:
        tensor = take(name)
        if tensor.shape != planned[name].shape or tensor.dtype != planned[name].dtype:
            came, wanted = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, planned[name]))
            _fail(f"{name} is {came} after merging, wanted {wanted}")
        if tensor.numel():
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        advance(tensor.nbytes)


def _write_beside(base: _Base, config: PretrainedConfig, folder: Path) -> None:
    """Tokenizer files, generation_config.json and, last, config.json, without which nothing is loaded."""
    model = base.model
    for name in _BESIDE if base.folder is not None else ():
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, folder / name)
    if base.folder is not None and (base.folder / "additional_chat_templates").is_dir():
        shutil.copytree(base.folder / "additional_chat_templates", folder / "additional_chat_templates")
    about = None if base.folder is None else base.folder / "generation_config.json"
    if about is not None and about.is_file():
        shutil.copyfile(about, folder / about.name)
    elif model.can_generate() and model.generation_config is not None:
        try:
            model.generation_config.save_pretrained(folder)
        except ValueError as error:
            _fail(f"the model's generation_config: {first_line(error)}", error)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


# --- the screen -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(progress: bool, nbytes: int) -> Iterator[Callable[[int], None]]:
    if not progress or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns: Iterable[Any] = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=nbytes)
        yield lambda done: bar.advance(task, done)
