"""Reads the configuration, class, quantization and weights of an untrusted model from a folder or a GGUF file.

The message of each error is one line. config.json must be a JSON object in which no number of layers or experts is
above MOST_LAYERS. The index of the weights (model.safetensors.index.json) may name only safetensors files in its own
folder. The weights may be dense, or quantized in a way that :class:`peft_ext.PackedConfig` supports. Code in the
model's folder is never run.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import nn

from ..gguf import read_header
from ..methods import METHODS
from ..nn import PackedExperts
from ..nn.packed import HoldsPacked
from .gguf_file import gguf_config, gguf_path, gguf_quantization, read_gguf
from .json_file import first_line, raised_as, read_object, shown

# PEFT's name of a task -> the transformers class of the model. :func:`model_class` uses this class where the base's own
# class does not fit the task.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Name patterns of the files of a hub repository to download, for a tokenizer and for a model with its tokenizer.
TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.spm", "*.codes", "*.tokenizer"]
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors"]
MOST_LAYERS = 10_000

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_POSITIVE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
_HEAD_KEY = re.compile(r"\.(?:score|classifier|qa_outputs)(?:\.out_proj)?\.weight")


class SourceError(ValueError):
    """Raised where a model or an adapter can't be used. The message is one line, which usually names the given value
    and the wanted value."""


# --- folders ----------------------------------------------------------------------------------------------------------


def find_folder(what: str, name: Union[str, Path], patterns: list[str], revision: Optional[str] = None) -> Path:
    """Returns the path of the folder or GGUF file ``name``; for a repository on the hub, the repository's folder in the
    hub's cache, after a download.

    Args:
        what: the argument's name in an error's message.
        patterns: name patterns of the files of a repository that are downloaded.
        revision: branch, tag or commit of a repository; None: the default branch. The function ignores ``revision`` if
            ``name`` is a folder or a GGUF file.

    Raises: SourceError where ``name`` is neither a folder, nor a GGUF file, nor a repository that can be downloaded.
    """
    text = str(name)
    if (file := gguf_path(name)) is not None:
        return file
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # The path is too long, is a loop of links, or begins with ~ and the name of an unknown user.
        why = getattr(error, "strerror", None) or first_line(error)
        raise SourceError(f"{what} is {text[:60]}: {why}") from error
    if there or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise SourceError(f"{what} is {text}, no such folder")
    from huggingface_hub import snapshot_download

    # Every error of the download is raised as a SourceError about the argument ``what``.
    about = f"{what} is {text}: there is no such folder, and the hub gives none ("
    with raised_as(SourceError, about, Exception, after=")"):
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))


def model_folder(name: Union[str, Path], patterns: list[str], revision: Optional[str] = None) -> Path:
    """Returns the folder or GGUF file of a model, see :func:`find_folder`. Raises SourceError also if the folder has no
    config.json."""
    folder = find_folder("model", name, patterns, revision)
    if folder.is_file():
        return folder
    if not (folder / "config.json").is_file():
        raise SourceError(f"no config.json in {folder}, wanted a model in transformers' format")
    return folder


def named_base(config: Any) -> tuple[Optional[str], Optional[str]]:
    """Returns the name of the base in an adapter's configuration, and the base's revision on the hub.

    The name is None if the configuration has no name, and the revision is None for the default branch.
    """
    return config.base_model_name_or_path or None, config.revision or None


def read_model_config(folder: Path) -> Any:
    """Returns the transformers configuration in ``folder``, which may also be a GGUF file.

    Raises SourceError where the configuration is missing, damaged, out of range or not known to transformers.
    """
    from transformers import AutoConfig

    if folder.is_file():
        return gguf_config(folder, SourceError)

    with raised_as(SourceError, "model ", OSError, ValueError):
        check_model_config(folder / "config.json")
    # An untrusted file can make transformers raise any error.
    with raised_as(SourceError, f"model {folder}: ", Exception):
        # With trust_remote_code=None, transformers would ask the user whether to run the model's code.
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def check_model_config(file: Path) -> None:
    """Raises ValueError, one line, if ``file`` is no JSON object, or has a size of the model that is out of range.

    A number of layers or experts may be at most ``MOST_LAYERS``. The sizes in ``_POSITIVE``, such as ``hidden_size``,
    must be at least 1.

    The limits are needed because transformers makes an object for each layer and each expert before it reads the
    weights.
    """

    def check_sizes(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                check_sizes(value)
            elif type(value) is int and value > MOST_LAYERS and re.search("layer|expert", name):
                raise ValueError(f"{file}: {shown(name)} is {shown(value)}, wanted at most {MOST_LAYERS}")
            elif type(value) is int and value < 1 and name in _POSITIVE:
                raise ValueError(f"{file}: {shown(name)} is {shown(value)}, wanted at least 1")

    check_sizes(read_object(file))


def check_index(file: Path) -> None:
    """Raises ValueError, one line, if an index of safetensors names a file that is not in the index's folder or whose
    name does not end in .safetensors.

    If the name of the first file (in sorted order) in the index does not end in .safetensors, transformers reads this
    file with ``torch.load``, which unpickles the file.
    """
    names = read_object(file).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{file}: weight_map is {shown(names)}, wanted an object of file names")
    for name in names.values():
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(f"{file}: weight_map has {shown(name)}, wanted the name of a .safetensors file beside it")


# --- fields of a configuration ----------------------------------------------------------------------------------------


def stored_quant(folder: Union[str, Path], about: Any) -> str:
    """Returns how the weights in ``folder`` are stored.

    The returned text is "none" for dense weights, "nf4" for bitsandbytes' NF4, and "checkpoint" for other packed
    weights that :class:`peft_ext.PackedConfig` loads. ``about`` is the model's configuration. Raises SourceError where
    the weights are quantized in a way that is not supported. For a GGUF file, the result is "checkpoint" if the file
    has quantized weights, else "none".
    """
    if (file := gguf_path(folder)) is not None:
        tensors = read_gguf(file, SourceError).tensors.values()
        return "checkpoint" if any(info.dtype is None for info in tensors) else "none"
    if (found := _quantization_config(about)) is None:
        return "none"
    if found.get("quant_method") == "bitsandbytes" and found.get("load_in_4bit"):
        if (kind := found.get("bnb_4bit_quant_type")) == "nf4":
            return "nf4"
        raise SourceError(f"{folder} is quantized by bitsandbytes, {kind}; wanted bitsandbytes' nf4")
    from ..integrations.packed.layouts import LAYOUTS
    from ..integrations.packed.rules import read_rules

    try:
        rules = read_rules(found)
        if missing := sorted(rules.layouts - LAYOUTS.keys()):
            raise ValueError(f"the layout {', '.join(missing)} is not supported")
    except ValueError as error:
        method = getattr(found.get("quant_method"), "value", found.get("quant_method"))
        raise SourceError(f"{folder} is quantized by {method}: {first_line(error).removeprefix('PackedConfig: ')}"
                          ) from error  # fmt: skip
    return "checkpoint"


def _quantization_config(about: Any) -> Optional[dict[str, Any]]:
    found = getattr(about, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def quant_method(about: Any) -> str:
    """Returns the name of the quantization of a checkpoint with the configuration ``about``: the name of a library or
    method, or for a GGUF file the types of its quantized weights."""
    if (file := gguf_path(getattr(about, "_name_or_path", None))) is not None:
        return gguf_quantization(read_gguf(file, SourceError))
    method = (_quantization_config(about) or {}).get("quant_method")
    return str(getattr(method, "value", method))


def most_tokens(about: Any) -> float:
    """Returns the number of tokens that the text decoder of a model with the configuration ``about`` takes at most;
    infinity where the configuration has no limit."""
    text = about.get_text_config(decoder=True) if hasattr(about, "get_text_config") else about
    found = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # max_seq_len: MPT
    # XLNet's max_position_embeddings is -1.
    return next((count for count in found if isinstance(count, int) and count > 0), math.inf)


def loading_arguments(quant: str) -> dict[str, Any]:
    """Returns a dict of the arguments with which ``from_pretrained`` keeps a packed checkpoint packed, if ``quant`` is
    "checkpoint"; {} for any other ``quant``."""
    if quant != "checkpoint":
        return {}
    from ..integrations.packed import PackedConfig

    return {"quantization_config": PackedConfig()}


def pack_as_stored(model: Any, folder: Path, about: Any, dtype: torch.dtype) -> Any:
    """Replaces layers of a model on the meta device by packed layers, in the formats of the files in ``folder``.

    ``folder`` may also be a GGUF file. The function reads the headers of the files and no weight. ``about``: the
    configuration with the checkpoint's quantization. Returns the quantizer of :class:`peft_ext.PackedConfig`; None for
    a GGUF file. Raises SourceError where the folder has no safetensors or the files are not supported.
    """
    if folder.is_file():
        with raised_as(SourceError, "", OSError, ValueError):
            from ..gguf.pack import pack

            pack(model, read_header(folder), dtype)
        return None
    from ..integrations.packed import PackedConfig, PackedQuantizer

    files = sorted(map(str, folder.glob("*.safetensors")))
    if not files:
        raise SourceError(f"{folder} has no .safetensors file, whose header says how the packed weights are stored")
    with raised_as(SourceError, f"{folder}: ", ValueError):
        quantizer = PackedQuantizer(PackedConfig(_quantization_config(about)), pre_quantized=True)
        quantizer._process_model_before_weight_loading(model, dtype=dtype, checkpoint_files=files)
    return quantizer


def model_class(about: Any, config: Any) -> Any:
    """Returns the class of the model that an adapter was trained on.

    For an adapter without a task, returns the class that the adapter's auto_mapping names, if this class is made for
    the base's class of configurations, else the base's own class. For the tasks CAUSAL_LM and SEQ_2_SEQ_LM, returns the
    base's own class if the class can generate. Otherwise, a task in AUTO_CLASSES gives the class of the task, and
    another task gives the base's own class. The base's own class is the first class that the base's configuration lists
    in ``architectures``; if transformers does not have this class, ``AutoModel`` takes its place.

    Args: about: the base's configuration. config: the adapter's configuration.
    """
    import transformers

    name = next(iter(about.architectures or ()), None)
    own = getattr(transformers, name, None) if name else None
    task = str(getattr(config.task_type, "value", config.task_type)) if config.task_type else None
    if task is None:
        trained_on = (config.auto_mapping or {}).get("base_model_class")
        found = getattr(transformers, trained_on, None) if trained_on else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            if found.config_class is type(about):
                return found
        return own or transformers.AutoModel
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and own is not None and own.can_generate():
        return own
    return getattr(transformers, AUTO_CLASSES[task]) if task in AUTO_CLASSES else own or transformers.AutoModel


def head_labels(about: Any, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Optional[int]:
    """Returns the number of labels of an adapter's head if the task is SEQ_CLS or TOKEN_CLS and the base's
    configuration has another number of labels; else None.

    Args: about: the base's configuration. config: the adapter's configuration. shapes: a dict that maps the
    names of the adapter's tensors to their shapes.
    """
    heads = [shape for key, shape in shapes.items() if _HEAD_KEY.search(key) and len(shape) == 2]
    if config.task_type not in ("SEQ_CLS", "TOKEN_CLS") or not heads or heads[-1][0] == about.num_labels:
        return None
    return heads[-1][0]


# --- a model ----------------------------------------------------------------------------------------------------------


@dataclass
class LoadedModel:
    """A model loaded from a folder or a GGUF file.

    Attributes:
        folder: the folder or the GGUF file from which the model was loaded.
        absent: names of the model's parameters that the files lack.
        quant: how the files store the weights, see :func:`stored_quant`.
    """

    model: Any
    name: str
    folder: Path
    absent: tuple[str, ...]
    quant: str = "none"


def load_model(
    name: Union[str, Path, None],
    config: Any,
    adapter: Path,
    shapes: Mapping[str, tuple[int, ...]],
    trained: Mapping[str, Any],
    exact: bool = False,
) -> LoadedModel:
    """Loads the base of an adapter, with the model class and the number of labels that the adapter was trained with.

    The base of an adapter of ``peft-ext finetune`` is loaded in bfloat16 (except bitsandbytes' NF4), and so are the
    dense weights of a GGUF file without ``exact``. Raises SourceError where the base is not named, is not found or
    can't be loaded.

    Args:
        name: a folder, a GGUF file or a hub name; None: the base that the adapter's configuration names.
        config: the adapter's configuration.
        adapter: the adapter's folder.
        shapes: a dict that maps the names of the adapter's tensors to their shapes.
        trained: options of the adapter's training, as :func:`peft_ext.sources.adapter.training_options` returns them.
        exact: whether the dense weights of a GGUF file are loaded in float32 if ``trained`` is empty.
    """
    name, revision = (name, None) if name is not None else named_base(config)
    if not name:
        raise SourceError(f"{adapter / 'adapter_config.json'} names no base model, give one")
    folder = model_folder(name, MODEL_FILES, revision)
    if folder.is_file():
        dtype = torch.float32 if exact and not trained else torch.bfloat16
        return _load_gguf(str(name), folder, config, shapes, dtype)
    if not any(folder.glob("*.safetensors")):
        pickle = next((file for file in _PICKLES if (folder / file).is_file()), None)
        raise SourceError(f"{folder} has {'no' if pickle is None else f'{pickle}, a pickle, and no'} safetensors")
    about = read_model_config(folder)
    with raised_as(SourceError, "model ", OSError, ValueError):
        if (folder / INDEX).is_file():
            check_index(folder / INDEX)
    try:
        quant, labels = stored_quant(folder, about), head_labels(about, config, shapes)
        loaded, info = model_class(about, config).from_pretrained(
            str(folder), dtype=torch.bfloat16 if trained and quant != "nf4" else "auto", use_safetensors=True,
            output_loading_info=True, trust_remote_code=False, device_map="cpu" if quant == "nf4" else None,
            **({} if labels is None else {"num_labels": labels}), **loading_arguments(quant),
        )  # fmt: skip
    except SourceError:
        raise
    except Exception as error:  # an untrusted file can make transformers raise any error
        raise SourceError(f"model {folder}: {first_line(error)}") from error
    if wrong := sorted(map(str, info["mismatched_keys"])):
        raise SourceError(f"model {folder}: {wrong[0]} has another shape in the files than in the config")
    return LoadedModel(loaded, str(name), folder, tuple(sorted(info["missing_keys"])), quant)


def _load_gguf(
    name: str, file: Path, config: Any, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> LoadedModel:
    """Loads the base of an adapter from a GGUF file. Quantized weights stay packed; dense weights are loaded in
    ``dtype``."""
    about = gguf_config(file, SourceError)
    quant, labels = stored_quant(file, about), head_labels(about, config, shapes)
    if labels is not None:
        raise SourceError(f"{file}: a GGUF file has no head with {labels} labels, wanted the model in safetensors")
    with raised_as(SourceError, "", OSError, ValueError, RuntimeError):
        from ..gguf.load import load_gguf

        return LoadedModel(load_gguf(file, dtype=dtype, model_class=model_class(about, config)), name, file, (), quant)


def load_tokenizer(folder: str, **kwargs: Any) -> Any:
    """Returns the tokenizer in a folder or a GGUF file, and sets a padding token if the tokenizer has none.

    With ``gguf_file``, the name of a GGUF file in ``folder``, transformers itself reads the tokenizer, whose way to
    split texts is then changed: mostly to llama.cpp's. Raises the errors of transformers; for a GGUF file OSError where
    the file can't be read, and ValueError, one line, where the file has no tokenizer that transformers can read, or has
    an unknown ``tokenizer.ggml.pre``.
    """
    from transformers import AutoTokenizer

    if (file := gguf_path(folder)) is not None:
        from ..gguf.metadata import read_tokenizer

        tokenizer = read_tokenizer(read_header(file), **kwargs)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **kwargs)
        if "gguf_file" in kwargs:
            from ..gguf.pre_tokenizers import check_pre_tokenizer, fit_tokenizer

            check_pre_tokenizer(header := read_header(Path(folder, kwargs["gguf_file"])))
            fit_tokenizer(header, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def tokenizer_folder(adapter: Optional[Path], base: Path) -> Path:
    """Returns the folder or GGUF file from which the tokenizer of an adapted model is read: the adapter's folder if the
    folder has tokenizer_config.json, else ``base``."""
    return adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else base


def widen(model: Any) -> None:
    """Casts a transformers model, loaded in bfloat16, to float32 in place, one parameter at a time.

    Packed codes and their scales keep their dtypes. Buffers that are in no file, such as the scale of the embeddings in
    Gemma 3, are computed again in float32, because the model loaded in bfloat16 has rounded values.
    """
    from accelerate import init_empty_weights

    exact = {name for name, buffer in model.named_buffers() if buffer.dtype is torch.float32}
    model.to(torch.float32).config.dtype = torch.float32
    for module in model.modules():
        if isinstance(module, (HoldsPacked, PackedExperts)):
            module.compute_dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        made = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    in_files = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name in in_files or name not in made or not buffer.is_floating_point() or name in exact:
            continue
        owner, _, local = name.rpartition(".")
        if made[name].shape == buffer.shape:
            model.get_submodule(owner)._buffers[local] = made[name].to(buffer.device, torch.float32)


def base_model(model: nn.Module) -> nn.Module:
    """Returns the base model of a PeftModel; returns a model that is no PeftModel unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def output_head(model: nn.Module) -> Optional[nn.Module]:
    """Returns the layer that computes the logits of a transformers model or of a PeftModel; None if there is no such
    layer."""
    get = getattr(base_model(model), "get_output_embeddings", None)
    return get() if callable(get) else None


def beside_text(model: nn.Module) -> list[str]:
    """Returns the names of the modules that a forward of text alone does not use, in a model for text and for images or
    sounds: for example, a vision tower and the projection of its outputs. Returns [] for a model of text alone."""
    if getattr(getattr(model, "config", None), "text_config", None) is None or not hasattr(model, "get_decoder"):
        return []
    inner, decoder, head = getattr(model, "base_model", model), model.get_decoder(), output_head(model)
    path = next((name for name, module in inner.named_modules() if module is decoder), "")
    prefix = next((f"{name}." for name, module in model.named_modules() if module is inner and name), "")
    steps = path.split(".") if path else []
    on_path = [".".join(steps[: i + 1]) for i in range(len(steps))]
    found = []
    for parent in ["", *on_path[:-1]] if path else []:
        for name, child in inner.get_submodule(parent).named_children():
            full = f"{parent}.{name}" if parent else name
            if full not in on_path and child is not head and next(child.parameters(), None) is not None:
                found.append(prefix + full)
    return found


def text_targets(model: nn.Module, method: str, excluded: Optional[str] = None) -> dict[str, Any]:
    """Returns a dict of the fields of a PEFT configuration of ``method`` that exclude the modules of
    :func:`beside_text`, and the modules whose names the regular expression ``excluded`` matches, from the adapted
    modules.

    Returns {} where :func:`beside_text` finds no module, and for a prompt method, which adapts no module.
    """
    names = beside_text(model)
    if not names or METHODS[method].kind == "prompt":
        return {}
    beside = rf"(?:{'|'.join(map(re.escape, names))})(?:\..*)?"
    return {"exclude_modules": f"(?:{excluded})|(?:{beside})" if excluded else beside}


def task_of(model: nn.Module) -> Optional[str]:
    """Returns the task of a transformers model, found in the name of the model's class; None if the task is unknown. If
    the name has no task, an encoder-decoder model that computes logits has the task SEQ_2_SEQ_LM."""
    name = type(model).__name__
    heads = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "CausalLM": "CAUSAL_LM",
             "QuestionAnswering": "QUESTION_ANS", "LMHead": "CAUSAL_LM"}  # fmt: skip
    found = next((task for head, task in heads.items() if head in name), None)
    if found is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if output_head(model) is not None else None
    return found


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Within the context, hides transformers' progress bars and its log messages below level ERROR, and all of Python's
    warnings, such as PEFT's warnings about tied weights or about a new head."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity(logging.ERROR)
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
