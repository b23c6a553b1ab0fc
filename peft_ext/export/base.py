"""Names and sizes of the weights of the exported adapter's base, from a GGUF file or transformers' configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch

from .._imports import required
from ..gguf import GgufError, check_model, is_gguf, read_header
from ..gguf.names import GgufNames
from ..sources.model import SourceError, hushed, model_class, model_folder, named_base, read_model_config
from .errors import as_export_error, fail

with required("peft", "peft_ext.write_gguf_adapter"):
    from peft import PeftConfig


@dataclass(frozen=True)
class Base:
    """Names and sizes of the base's weights.

    Attributes:
        name: the file, folder or hub name of the base.
        title: the model's name for people, which is written into the adapter file.
        names: a GgufNames, which gives the name of a module's weight in llama.cpp's files.
        shapes: a dict that maps the key of each weight to the weight's shape. The keys are the weights' names in the
            file if the base is a GGUF file, else the names of the modules that have the weights.
        is_file: whether the base is a GGUF file.
        tied: whether the head and the embedding share one weight.
    """

    name: str
    title: str
    names: GgufNames
    shapes: dict[str, tuple[int, ...]]
    is_file: bool
    tied: bool

    def tensor_of(self, module: str) -> str:
        """Returns the name of a module's weight in llama.cpp's file. Raises ExportError where the base has no such
        weight, or where the weight is shared by the embedding and the head."""
        tensor = self.names.tensor(module)
        if tensor is None:
            fail(f"the adapter changes {module}, for which llama.cpp's {self.names.architecture} has no tensor")
        name = f"{tensor}.weight"
        if tensor in ("output", "token_embd") and self.tied:
            # llama.cpp finds the matrices by the weight's name, and would use the embedding's matrices for a tied head
            # too.
            fail(
                f"the adapter changes {module}, but the embedding and the head of {self.name} are one weight, which "
                f"llama.cpp can't adapt; wanted an adapter without {module}, or a merge of the adapter"
            )
        if (name if self.is_file else module) not in self.shapes:
            missing = f"{name} ({module})" if self.is_file else module
            fail(f"the adapter changes {missing}, which {self.name} does not have")
        return name


def base_of(given: Union[str, Path, None], config: PeftConfig) -> Base:
    """Returns names and sizes of the base ``given``: a GGUF file, a folder or a hub name. Reads no weight.

    ``given`` None means the base that ``config`` names. Raises ExportError where the base is not named, can't be found,
    is damaged or has an architecture that is not supported.
    """
    name, revision = (given, None) if given is not None else named_base(config)
    if not name:
        fail("the adapter's adapter_config.json names no base model, give base")
    if is_gguf(name):
        return _of_gguf(Path(name).expanduser())
    if str(name).endswith(".gguf"):
        fail(f"base is {name}, no such file")
    return _of_transformers(name, revision, config)


def _of_gguf(path: Path) -> Base:
    with as_export_error(GgufError, OSError):
        header = read_header(path)
        check_model(header)
        names = GgufNames.of_file(header)
    title = header.get("general.name") or path.stem
    shapes = {name: info.shape for name, info in header.tensors.items()}
    return Base(str(path), title, names, shapes, True, "output.weight" not in shapes)


def _of_transformers(name: Union[str, Path], revision: Optional[str], config: PeftConfig) -> Base:
    with as_export_error(SourceError):
        about = read_model_config(model_folder(name, ["*.json"], revision))
    with as_export_error(ValueError, about=f"{name}: "):
        names = GgufNames.of_config(about)
    shapes = _shapes(str(name), about, config)
    return Base(str(name), Path(name).name, names, shapes, False, bool(getattr(about, "tie_word_embeddings", False)))


def _shapes(name: str, about: Any, config: PeftConfig) -> dict[str, tuple[int, ...]]:
    """Returns a dict that maps the name of each module with a weight to the weight's shape, in a model of the
    configuration ``about``."""
    kind = model_class(about, config)
    build = getattr(kind, "_from_config", None) or kind.from_config
    # An untrusted configuration can make transformers raise any error.
    with as_export_error(Exception, about=f"{name}: "), hushed(), torch.device("meta"):
        model = build(about)
    found: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        weight: Optional[Any] = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor):
            found[path] = tuple(weight.shape)
    return found
