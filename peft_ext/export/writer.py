"""``write_gguf_adapter``: writes llama.cpp's adapter file from an adapter in PEFT's format."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from safetensors import safe_open
from torch import Tensor

from .._imports import required
from ..files import atomic_file
from ..gguf.header import is_gguf
from ..sources.model import SourceError, find_folder
from .adapter import Pair, read_adapter
from .base import Base, base_of
from .errors import as_export_error, fail

with required("peft", "peft_ext.write_gguf_adapter"):
    from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

DTYPES = {"f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class ExportReport:
    """The result of :func:`write_gguf_adapter`.

    Attributes:
        file: path of the written file.
        nbytes: size of the file in bytes.
        base: the base's file or folder, or the base's name on the hub.
        base_is_gguf: whether the base is a GGUF file, so that the names and sizes were compared with the file.
        architecture: llama.cpp's name of the base's architecture.
        method: PEFT's name of the adapter's method.
        dtype: dtype of the matrices in the file, "f16" or "f32".
        alpha: the file's alpha: llama.cpp multiplies ``B @ A`` of each pair by alpha / rank.
        pairs: number of adapted weights.
        parameters: number of elements of all matrices.
        folded: names of the modules whose lora_B was multiplied with a factor, since the file has one alpha.
        seconds: seconds that the export took.
    """

    file: Path
    nbytes: int
    base: str
    base_is_gguf: bool
    architecture: str
    method: str
    dtype: str
    alpha: float
    pairs: int
    parameters: int
    folded: tuple[str, ...]
    seconds: float


def write_gguf_adapter(
    adapter: Union[str, Path],
    file: Union[str, Path],
    *,
    base: Union[str, Path, None] = None,
    dtype: str = "f16",
    overwrite: bool = False,
) -> ExportReport:
    """Writes llama.cpp's adapter file: ``W + alpha / r · B @ A`` for each adapted weight of the base's GGUF file.

    The function exports LoRA with rsLoRA, rank_pattern and alpha_pattern, and AdaLoRA, over the architectures of
    ``peft_ext.gguf.names.ARCHITECTURES``. llama.cpp's file has one alpha: the most frequent value of scaling · rank
    other than 0, or 1 if all values are 0. If a module's scaling · rank is not the file's alpha, the module's lora_B is
    multiplied with (scaling · rank) / alpha, and rounded once to float32. AdaLoRA's singular values are multiplied into
    lora_A. The rows of lora_B of attn_q and attn_k have the order of the base's GGUF file. At any time, the matrices of
    at most one module are in memory.

    Args:
        adapter: a folder that ``save_pretrained`` wrote, or a hub name. The adapter's tensors must be in safetensors.
        file: path of the new file. The finished file appears in one step, see :func:`peft_ext.files.atomic_file`.
        base: the base as a GGUF file, or as the folder or hub name of a transformers model. The name and size of each
            adapted tensor are compared with the GGUF file, or with the configuration of the transformers model. With
            ``base`` None, the base is the one that the adapter's configuration names.
        dtype: dtype of the matrices in the file: "f16" or "f32".
        overwrite: whether an existing GGUF file may be replaced.

    Returns: a report of the export.

    Raises:
        ExportError: a method other than LoRA and AdaLoRA, or a task other than CAUSAL_LM; DoRA, biases, whole modules
            or trained tokens in the adapter; an initialization that changed the base; a base that is not named, not
            found or of an architecture that is not supported; a module that llama.cpp does not have or can't adapt (a
            tied embedding or head); sizes that do not fit; a value that ``dtype`` does not hold; missing or damaged
            files; a wrong argument.
        OSError: ``file`` exists and overwrite is False, or can't be written.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        fail(f"dtype is {dtype!r}, wanted one of {', '.join(DTYPES)}")
    with as_export_error(SourceError):
        folder = find_folder("adapter", adapter, ["*.json", SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME])
    config, pairs = read_adapter(folder)
    about = base_of(base, config)
    file = Path(file).expanduser()
    _check_file(file, overwrite, about)
    tensors = _places(pairs, about)
    alpha = _alpha(pairs)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file, "wb", overwrite=overwrite) as part:
        _write(Path(part.name), Path(adapter).resolve().name, folder, about, pairs, tensors, alpha, dtype)
    return ExportReport(
        file=file, nbytes=file.stat().st_size, base=about.name, base_is_gguf=about.is_file,
        architecture=about.names.architecture, method=str(config.peft_type.value), dtype=dtype, alpha=alpha,
        pairs=len(pairs), parameters=sum(pair.rank * (pair.inputs + pair.outputs) for pair in pairs),
        folded=tuple(pair.module for pair in pairs if _factor(pair, alpha) != 1),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _check_file(file: Path, overwrite: bool, base: Base) -> None:
    if file.is_dir():
        fail(f"file is {file}, a folder, wanted the path of a file")
    if not file.exists():
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "the file exists", str(file))
    if base.is_file and os.path.samefile(file, base.name):
        fail(f"file is {file}, which is the base")
    if not is_gguf(file):
        fail(f"file is {file}, which exists and is no GGUF file, so it is not replaced")


def _places(pairs: list[Pair], base: Base) -> list[str]:
    """Returns a list with llama.cpp's name of the weight that each pair of ``pairs`` adapts. Raises ExportError where
    the base has no such weight, where sizes do not fit, where the pair is of an embedding and the weight is not, or the
    reverse, and where two pairs are for one weight."""
    names: dict[str, str] = {}
    for pair in pairs:
        name = base.tensor_of(pair.module)
        if pair.embedding != (name == "token_embd.weight"):
            kind = "an embedding" if pair.embedding else "a linear layer"
            fail(f"the adapter changes {pair.module} as {kind}, but {name} in llama.cpp is the other kind")
        if (shape := base.shapes[name if base.is_file else pair.module]) != pair.shape:
            fail(f"the matrices of {pair.module} fit a weight of {pair.shape}, but {name} of {base.name} is {shape}")
        if name in names:
            fail(f"{names[name]} and {pair.module} are both {name} in llama.cpp")
        names[name] = pair.module
    return list(names)


def _alpha(pairs: list[Pair]) -> float:
    """Returns the file's alpha: a float32 that is not 0, because llama.cpp reads an alpha of 0 as "no scaling"."""
    wanted = Counter(_float32(pair.scale * pair.rank) for pair in pairs)
    del wanted[0.0]
    alpha = wanted.most_common(1)[0][0] if wanted else 1.0
    if not torch.tensor(alpha).isfinite():
        fail(f"the scaling of the adapter is {alpha}, which float32 does not hold")
    return alpha


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _factor(pair: Pair, alpha: float) -> float:
    """Returns the factor by which the pair's lora_B is multiplied, so that alpha / rank gives the pair's scale."""
    wanted = pair.scale * pair.rank
    return 1.0 if _float32(wanted) == alpha else wanted / alpha


def _write(
    path: Path, name: str, folder: Path, base: Base, pairs: list[Pair], tensors: list[str], alpha: float, dtype: str
) -> None:
    with required("gguf", "peft_ext.write_gguf_adapter"):
        import gguf

    writer = gguf.GGUFWriter(None, base.names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(_text(name))
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, _text(base.title))
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    to = DTYPES[dtype]
    for pair, tensor in zip(pairs, tensors, strict=True):
        first = (pair.inputs, pair.rank) if pair.embedding else (pair.rank, pair.inputs)
        for ending, shape in ((".lora_a", first), (".lora_b", (pair.outputs, pair.rank))):
            nbytes = shape[0] * shape[1] * to.itemsize
            writer.add_tensor_info(tensor + ending, shape, torch.empty(0, dtype=to).numpy().dtype, nbytes)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as opened:
            for pair, tensor in zip(pairs, tensors, strict=True):
                for part, matrix in zip((pair.a, pair.b), _matrices(opened, pair, tensor, base, alpha), strict=True):
                    narrow = matrix.to(to)
                    if not narrow.isfinite().all():
                        largest = matrix.abs().max().item()
                        fail(f"{part} has the magnitude {largest:.4g}, which {dtype} does not hold, wanted dtype 'f32'")
                    writer.write_tensor_data(narrow.contiguous().numpy())
    finally:
        writer.close()


def _text(name: str) -> str:
    """Returns the name with "?" in place of what UTF-8 can't encode, because a folder's name can have any bytes."""
    return name.encode(errors="replace").decode()


def _matrices(opened: Any, pair: Pair, name: str, base: Base, alpha: float) -> tuple[Tensor, Tensor]:
    """Returns lora_a and lora_b of a pair, in float32, with the values and the layout that llama.cpp's adapter file
    has."""
    first, second = opened.get_tensor(pair.a).float(), opened.get_tensor(pair.b).float()
    if pair.e is not None:
        first = first * opened.get_tensor(pair.e).float()
    if pair.embedding:
        first = first.T  # llama.cpp looks up the tokens in the rows of lora_a
    factor = _factor(pair, alpha)
    if factor != 1:
        second = (second.double() * factor).float()
    order: Optional[Tensor] = None
    with as_export_error(ValueError, about=f"{pair.module}: "):
        order = base.names.row_order(name.removesuffix(".weight"), pair.outputs)
    if order is not None:
        second = torch.empty_like(second).index_copy_(0, order, second)
    return first, second
