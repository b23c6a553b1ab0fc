"""``merge_to_gguf``: merges an adapter into the tensors of a GGUF file and writes a GGUF file.

    W' = merge(W, adapter)          W: a tensor of the base's file, decoded to float32; merge: the method's own
    Q  = quantize(W')               in the base tensor's own type, or in another type

One tensor at a time is decoded, merged, quantized and written. A tensor that the adapter does not change is copied byte
for byte, and so are the tokenizer and the metadata, except ``general.file_type`` if most elements of the matrices get
another type.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Optional, Union

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from .. import tuners  # noqa: F401  registers the methods that PEFT lacks
from .._imports import required
from ..files import atomic_file
from ..gguf import GgufHeader, TensorInfo, is_gguf
from ..sources.model import SourceError, find_folder, hushed
from ..sources.weight_files import check_finite
from ..weights.gguf import TYPES, dense_dtype, type_name, type_number
from ..weights.gguf_quantize import can_quantize, is_finite, quantize_gguf
from .dense import adapter_config, check_room
from .errors import MergeError, as_merge_error, fail
from .gguf_base import GgufBase, decoded
from .gguf_writer import PlannedTensor, file_size, file_type_offset, write_gguf
from .plan import Plan

with required("peft", "peft_ext.merge_to_gguf"):
    from peft import PeftConfig
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights

# Maps the type of most elements of a GGUF file's matrices to the value of the file's general.file_type (enum
# llama_ftype in llama.h).
_FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip


_SUMMED = 1 << 16  # number of elements that are summed in float32; these sums are added in float64
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
# Architectures whose files have no head of their own: llama.cpp uses the embedding as the head, and refuses a file with
# a head.
_ALWAYS_TIED = ("gemma2",)


@dataclass(frozen=True)
class _Norms:
    """Sums over the elements of merged tensors, from which the relative errors are computed.

    W is the base's weight, W' the exact merged weight, D = W' − W, and Q the written weight.
    """

    merged: float = 0.0  # Σ W'²
    wrong: float = 0.0  # Σ (Q − W')²
    delta: float = 0.0  # Σ D²
    moved: float = 0.0  # Σ (Q − W)²
    along: float = 0.0  # Σ (Q − W) D

    def __add__(self, other: _Norms) -> _Norms:
        return _Norms(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class MergedTensor:
    """Errors of one tensor, or of all tensors that the adapter changed.

    W is the base's weight, W' the exact merged weight in float32, D = W' − W, and Q the written weight.

    Attributes:
        name: name in the file; "" for all tensors.
        type: ggml's type of the written tensor, by name; "" for all tensors.
        error: ‖Q − W'‖ / ‖W'‖, the relative error of the written weight Q.
        type_error: ‖N' − N‖ / ‖N‖ for normally distributed values N and the values N' that N has after quantization to
            the base tensor's own type. type_error is NaN if the type has no quantizer.
        moved: ‖Q − W‖ / ‖D‖, which is 1 where Q is exact. ``moved`` is below 1 if the rounding has undone changes of
            many elements, and above 1 if the rounding has changed elements by more than the adapter.
        kept: ⟨Q − W, D⟩ / ‖D‖², the part of the adapter's change that is in the file. ``kept`` is 1 where Q is exact,
            and near 0 where the rounding has undone the change.
    """

    name: str
    type: str
    error: float
    type_error: float
    moved: float
    kept: float


@dataclass(frozen=True)
class GgufMergeReport:
    """The result of :func:`merge_to_gguf`.

    Attributes:
        output: path of the merged file.
        nbytes: size of the merged file in bytes.
        base: path of the base's GGUF file.
        architecture: GGUF's name of the model's architecture.
        method: PEFT's name of the adapter's method.
        type: the argument ``type`` of :func:`merge_to_gguf`.
        merged: number of modules that the adapter changed.
        tensors: errors of each tensor that the adapter changed, in the file's order.
        whole: errors over all elements of all tensors that the adapter changed.
        copied: number of tensors that were copied byte for byte.
        added: names of tensors that the base's file does not have: ``output.weight``, where the adapter changed one of
            the tied embedding and head.
        file_type: the new value of ``general.file_type``; None: the metadata is the base's, byte for byte.
        seconds: seconds that the merge took.
    """

    output: Path
    nbytes: int
    base: Path
    architecture: str
    method: str
    type: str
    merged: int
    tensors: tuple[MergedTensor, ...]
    whole: MergedTensor
    copied: int
    added: tuple[str, ...]
    file_type: Optional[int]
    seconds: float

    @property
    def largest(self) -> MergedTensor:
        """The tensor with the largest ``error``."""
        return max(self.tensors, key=lambda one: one.error)


def merge_to_gguf(
    base: Union[str, Path],
    adapter: Union[str, Path],
    output: Union[str, Path],
    *,
    type: str = "same",
    overwrite: bool = False,
    progress: bool = True,
) -> GgufMergeReport:
    """Merges a saved adapter into a GGUF file and writes a GGUF file: ``Q = quantize(merge(W, adapter))``.

    The written file has the base's metadata (of which ``type`` may change one value) and tokenizer, and the base's
    bytes of each tensor that the adapter does not change. A merged tensor is computed in float32 by the method's own
    merge, as in :func:`peft_ext.merge_to_dense`, and rounded once. The report says how large the rounding error is, and
    which part of the adapter's change is left after rounding. Adapters of the methods that
    :func:`peft_ext.merge_to_dense` merges can be merged, except changes of norms that the file stores with 1 added
    (Gemma 2, Gemma 3, Nemotron), and changes that make the embedding and the head of Gemma 2 differ: a file of Gemma 2
    has one tensor for the two.

    Args:
        base: a GGUF file in one part, of an architecture in ``peft_ext.gguf.names.ARCHITECTURES``.
        adapter: a folder that ``save_pretrained`` wrote, or a hub name. The adapter's tensors must be in safetensors.
        output: path of the new file. The finished file appears in one step. If the merge fails, no part of the file is
            left.
        type: type of the merged matrices: "same", the type that each matrix has in the base's file; or the name of a
            type that :func:`peft_ext.weights.gguf_quantize.can_quantize` accepts, for example "q8_0" or "f16". Merged
            tensors of one dimension keep their types. Where most elements of the new file's matrices have another type
            than in the base's file, ``general.file_type`` is changed to name the new type.
        overwrite: True: the output may be an existing GGUF file, which is replaced.
        progress: whether to show a progress bar, on a terminal only.

    Returns: a report of the merge, with the errors of each merged tensor.

    Raises:
        MergeError: a damaged or unknown file; a method, a tensor or a type that can't be merged; an adapter of another
            architecture, of other shapes, with missing or unknown tensors, with values that are not finite, or in a
            pickle; a merged weight that is too large for its type; a wrong option.
        OSError: ``output`` exists and overwrite is False, or can't be written, or the file does not fit on the disk.
    """
    try:
        return _merge(Path(base), adapter, Path(output).expanduser(), type, overwrite, progress)
    except MergeError as error:
        raise MergeError(str(error).replace("merge_to_dense: ", "merge_to_gguf: ", 1)) from error


def _merge(
    base: Path, adapter: Union[str, Path], output: Path, type: str, overwrite: bool, progress: bool
) -> GgufMergeReport:
    started = time.perf_counter()
    wanted = _wanted_type(type)
    with as_merge_error(SourceError):
        adapter = find_folder("adapter", adapter, ["*.json", SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME])
    config = adapter_config(adapter)
    _check_output(output, overwrite, base)
    with hushed(), torch.no_grad():
        with as_merge_error(SafetensorError, about=f"{adapter / SAFETENSORS_WEIGHTS_NAME}: "):
            weights = load_peft_weights(str(adapter), device="cpu")
        with as_merge_error(ValueError):
            check_finite(adapter / SAFETENSORS_WEIGHTS_NAME)
        merge = _Merge(GgufBase(base), config, weights, wanted)
        del weights
        size = file_size(merge.header, merge.planned)
        check_room(output.parent, size)
        disable = None if progress else True  # with None, tqdm draws on a terminal only
        with (
            tqdm(desc="merging", total=len(merge.planned), unit="tensor", leave=False, disable=disable) as bar,
            atomic_file(output, "wb", overwrite=overwrite) as file,
        ):

            def take(name: str) -> Tensor:
                bar.update()
                return merge.data(name)

            write_gguf(file, merge.header, merge.planned, take, merge.file_type)
    return GgufMergeReport(
        output=output, nbytes=size, base=merge.header.path, architecture=merge.header.architecture,
        method=str(config.peft_type.value), type=type, merged=merge.modules, tensors=tuple(merge.errors),
        whole=_errors("", "", merge.type_error, merge.norms), copied=len(merge.planned) - len(merge.errors),
        added=tuple(name for name in merge.planned if name not in merge.header.tensors), file_type=merge.file_type,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


# --- checks -----------------------------------------------------------------------------------------------------------


def _wanted_type(type: str) -> Optional[int]:
    """Returns the number that ggml gives the type with the name ``type``; None for "same", which keeps each tensor's
    type."""
    if type == "same":
        return None
    with as_merge_error(ValueError, AttributeError, TypeError):
        number = type_number(type)
    if not can_quantize(number):
        fail(f"type is {type!r}, for which there is no quantizer; wanted same, or for example q8_0")
    return number


def _check_output(output: Path, overwrite: bool, base: Path) -> None:
    target = Path(os.path.realpath(output))
    if target == Path(os.path.realpath(base.expanduser())) or (target.exists() and base.exists()
                                                               and os.path.samefile(target, base)):  # fmt: skip
        fail(f"output is {output}, which is the base itself; wanted another file")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(output))
    if target.exists():
        if not overwrite:
            raise FileExistsError(errno.EEXIST, "the file exists", str(output))
        if not is_gguf(target):
            fail(f"output is {output}, which is no GGUF file, so it is not replaced")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(target.parent))


# --- the merge --------------------------------------------------------------------------------------------------------


class _Merge:
    """The tensors of the merged GGUF file, and a method that computes each tensor's data.

    Attributes:
        header: header of the base's file.
        planned: a dict that maps the name of each tensor of the new file to its PlannedTensor, in the file's order.
        file_type: the new value of ``general.file_type``; None: unchanged.
        modules: number of modules that the adapter changes.
        errors: a list with a :class:`MergedTensor` for each tensor that was merged so far.
        norms: the :class:`_Norms` over the elements of all tensors that were merged so far.
    """

    def __init__(self, base: GgufBase, config: PeftConfig, weights: dict[str, Tensor], wanted: Optional[int]) -> None:
        self._base, self.header = base, base.header
        self._plan = plan = Plan(base.base, config, weights, None)
        self.modules = len(plan.targets)
        self.errors: list[MergedTensor] = []
        self.norms, self._expected = _Norms(), 0.0
        # A head that is tied to the embedding in the base and not in the merged model becomes a tensor of its own in
        # the merged file.
        self._places = {**base.tensors, **{name: _HEAD for name in plan.untied}}
        if plan.untied and self.header.architecture in _ALWAYS_TIED:
            fail(f"the adapter changes the head or the embedding, which are tied in {self.header.path}, and llama.cpp "
                 f"reads no head of its own from files of {self.header.architecture}: wanted an adapter that changes "
                 "neither; merge_to_dense writes a folder with a head of its own")  # fmt: skip
        for name in plan.origin:
            if name not in self._places and not any(plan.origin[name] == plan.origin[one] for one in self._places):
                fail(f"the adapter adds {name}, for which {self.header.path} has no tensor")
        self._changed = {tensor: name for name, tensor in self._places.items() if plan.is_changed(name)}
        plan.will_take(self._changed.values())
        self.planned: dict[str, PlannedTensor] = {}
        for name in [*self.header.tensors, *(_HEAD for _ in plan.untied)]:
            info = self._source(name)
            if name in self._changed:
                self.planned[name] = _planned(self.header, name, info, wanted)
            else:
                self.planned[name] = PlannedTensor(info.shape, info.type, info.nbytes)
        self.file_type = self._new_file_type(wanted)

    def _source(self, tensor: str) -> TensorInfo:
        """Returns the base's tensor that a tensor of the new file replaces; for a head that the base's file lacks, the
        embedding."""
        return self.header.tensors[tensor if tensor in self.header.tensors else _EMBEDDING]

    def _new_file_type(self, wanted: Optional[int]) -> Optional[int]:
        if wanted is None or file_type_offset(self.header) is None:
            return None
        most = []
        for tensors in (self.header.tensors, self.planned):
            elements: Counter[int] = Counter()
            for one in tensors.values():
                elements[one.type] += torch.Size(one.shape).numel() if len(one.shape) > 1 else 0
            most.append(elements.most_common(1)[0][0])
        number = _FILE_TYPES[type_name(most[1])] if most[0] != most[1] else None
        return None if number == self.header.get("general.file_type") else number

    @property
    def type_error(self) -> float:
        """The relative error with which the base's types represent normally distributed weights, weighted by the merged
        tensors' norms."""
        return (self._expected / self.norms.merged) ** 0.5 if self.norms.merged else 0.0

    def data(self, tensor: str) -> Tensor:
        """Returns the data of a tensor of the new file, and adds the errors of a tensor whose values or type the merge
        changed to ``errors``.

        ``data`` can be called once for each merged tensor, because the plan frees the memory of a merged module.
        """
        source = self._source(tensor)
        raw = self.header.data(source.name)
        if tensor not in self._changed:
            return raw
        name, to = self._changed[tensor], self.planned[tensor]
        merged = self._plan.take(name).float()
        if tensor in self.header.tensors:
            merged = self._base.in_file_order(name, merged)
        before = decoded(raw, source.type)
        if to.type == source.type and torch.equal(merged, before):
            return raw
        with as_merge_error(ValueError, about=f"{tensor}: "):
            data = quantize_gguf(merged, to.type)
        if to.type not in TYPES:
            data = data.view(-1).view(dense_dtype(to.type)).view(merged.shape)
        after = decoded(data, to.type)
        if not is_finite(after):
            fail(f"{tensor}: the merged weight is too large for {type_name(to.type)}")
        norms = _norms(before, merged, after)
        usual = _normal_error(source.type)
        self.norms += norms
        self._expected += usual**2 * norms.merged
        self.errors.append(_errors(tensor, type_name(to.type), usual, norms))
        return data


def _planned(header: GgufHeader, name: str, info: TensorInfo, wanted: Optional[int]) -> PlannedTensor:
    """Returns the shape, the type and the number of bytes of a merged tensor in the new file. Raises MergeError for a
    type that can't be written."""
    number = info.type if wanted is None or len(info.shape) < 2 else wanted
    about = f"{header.path}: {name}"
    if info.dtype is not None and not info.dtype.is_floating_point:
        fail(f"{about} is {info.type_name}, wanted a type of floats: the adapter can't be merged into integers")
    if not can_quantize(number):
        fail(f"{about} is {info.type_name}, for which there is no quantizer; wanted another type of the merged "
             "tensors: type q8_0 (--type q8_0)")  # fmt: skip
    if number not in TYPES:
        return PlannedTensor(info.shape, number, torch.Size(info.shape).numel() * dense_dtype(number).itemsize)
    _, columns, size, _ = TYPES[number]
    if info.shape[-1] % columns:
        fail(f"{about} has {info.shape[-1]} columns, wanted a multiple of {columns} for {TYPES[number].name}; "
             "type q8_0 needs a multiple of 32")  # fmt: skip
    return PlannedTensor(info.shape, number, torch.Size(info.shape).numel() // columns * size)


# --- errors -----------------------------------------------------------------------------------------------------------


def _norms(before: Tensor, merged: Tensor, after: Tensor) -> _Norms:
    total = _Norms()
    chunks = zip(*(t.reshape(-1).split(_SUMMED) for t in (before, merged, after)), strict=True)
    for w, exact, q in chunks:
        delta, moved, wrong = exact - w, q - w, q - exact
        sums = (exact @ exact, wrong @ wrong, delta @ delta, moved @ moved, moved @ delta)
        total += _Norms(*(float(one) for one in sums))
    return total


def _errors(name: str, type: str, type_error: float, norms: _Norms) -> MergedTensor:
    def ratio(one: float, other: float) -> float:
        return one / other if other else 0.0

    return MergedTensor(
        name, type, error=ratio(norms.wrong, norms.merged) ** 0.5, type_error=type_error,
        moved=ratio(norms.moved, norms.delta) ** 0.5, kept=ratio(norms.along, norms.delta),
    )  # fmt: skip


@cache
def _normal_error(number: int) -> float:
    """Returns the relative error of a type for normally distributed values; NaN for a type without a quantizer."""
    if not can_quantize(number):
        return float("nan")
    values = torch.randn(32, 4096, generator=torch.Generator().manual_seed(0))
    data = quantize_gguf(values, number)
    data = data if number in TYPES else data.view(dense_dtype(number)).view(values.shape)
    return (torch.dist(decoded(data, number), values) / torch.linalg.vector_norm(values)).item()
