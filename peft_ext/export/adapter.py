"""Reads the low-rank matrices of a saved adapter, and refuses everything that llama.cpp's adapter files can't hold."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from .._imports import required
from ..sources.adapter import checked_config
from ..sources.expressions import check_expressions
from ..sources.json_file import shown
from ..sources.weight_files import check_finite, weight_shapes
from .errors import as_export_error, fail

with required("peft", "peft_ext.write_gguf_adapter"):
    from peft import PeftConfig
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from peft.utils.other import get_pattern_key

_MERGE = "; `peft-ext merge --gguf` writes the merged model"

# Fields of LoraConfig and AdaLoraConfig that the export reads, or that do not change what a saved adapter computes.
_HARMLESS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step",
})  # fmt: skip

# Fields of LoraConfig that llama.cpp's adapter files can't express, and the reason in the error.
_REFUSED = {
    "use_dora": "DoRA scales the rows of the whole weight, which is no update of low rank" + _MERGE,
    "modules_to_save": "an adapter file of llama.cpp holds no whole modules" + _MERGE,
    "trainable_token_indices": "an adapter file of llama.cpp holds no rows of an embedding" + _MERGE,
    "target_parameters": "LoRA on parameters of experts can't be exported" + _MERGE,
    "lora_bias": "an adapter file of llama.cpp holds no biases" + _MERGE,
    "bias": "an adapter file of llama.cpp holds no biases" + _MERGE,
}

# Values of init_lora_weights with which PEFT does not change the base's weights.
_INITS = (True, False, "gaussian", "eva", "orthogonal")

# Ending of a tensor's name in PEFT's file -> the matrix of the pair: "a", "b", or AdaLoRA's "e".
_LORA = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b"}
_ADALORA = {".lora_A": "a", ".lora_B": "b", ".lora_E": "e"}
_KINDS = {".lora_magnitude_vector": "DoRA", ".lora_B.bias": "lora_bias", ".bias": "a trained bias"}
_PREFIX = "base_model.model."
# Pattern of the names of tensors that are accepted, which are short and fit into an error of one line.
_NAME = re.compile(r"[\w.-]{1,500}")


@dataclass(frozen=True)
class Pair:
    """The low-rank matrices of one module, whose weight becomes ``W + scale · B @ A``.

    A is ``[rank, inputs]``, B is ``[outputs, rank]``.

    Attributes:
        module: name of the module in transformers' model.
        a, b: names of the tensors A and B in PEFT's file of the adapter.
        e: name of the tensor of AdaLoRA's singular values ``[rank, 1]``, which multiply the rows of A; None for LoRA.
        embedding: whether the module is an embedding, whose inputs are the tokens of the vocabulary.
        scale: factor of the product ``B @ A``.
    """

    module: str
    a: str
    b: str
    e: Optional[str]
    embedding: bool
    rank: int
    inputs: int
    outputs: int
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the adapted weight in transformers."""
        return (self.inputs, self.outputs) if self.embedding else (self.outputs, self.inputs)


def read_adapter(folder: Path) -> tuple[PeftConfig, list[Pair]]:
    """Returns the configuration of an adapter and its pairs of matrices, in the order of the layers.

    Leaves out pairs of rank 0, which AdaLoRA makes by pruning all ranks of a module. Raises ExportError for files that
    are missing or damaged, for an adapter without low-rank matrices, for a task other than CAUSAL_LM, and for
    everything that llama.cpp's adapter files can't hold.
    """
    with as_export_error(ValueError, OSError, RecursionError):  # with a few damaged fields, PEFT recurses without end
        config = checked_config(folder)
        check_finite(folder / SAFETENSORS_WEIGHTS_NAME)
    _check_config(config)
    shapes = weight_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
    parts, frozen = _parts(config, shapes)
    with as_export_error(ValueError, about=f"{folder / CONFIG_NAME}: "):
        check_expressions(config, parts)
    pairs = [_pair(config, module, found, shapes) for module, found in parts.items()]
    for name in frozen:
        if name.removeprefix(_PREFIX).partition(".base_layer.")[0] not in parts:
            fail(f"{SAFETENSORS_WEIGHTS_NAME} has {shown(name)}, a weight of a module without lora_A and lora_B")
    pairs = [pair for pair in pairs if pair.rank]
    if not pairs:
        fail(f"{folder / SAFETENSORS_WEIGHTS_NAME} has no low-rank matrices")
    return config, sorted(pairs, key=lambda pair: _natural(pair.module))


def _check_config(config: PeftConfig) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ("LORA", "ADALORA"):
        fail(f"the adapter's method is {kind}, wanted LORA or ADALORA: an adapter file of llama.cpp holds low-rank "
             "matrices alone")  # fmt: skip
    task = getattr(config.task_type, "value", config.task_type)
    if task not in (None, "CAUSAL_LM"):
        fail(f"the adapter's task_type is {task}, wanted CAUSAL_LM")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _HARMLESS or not value or value == field.default:
            continue
        reason = _REFUSED.get(field.name, "an adapter file of llama.cpp has no such setting" + _MERGE)
        fail(f"the adapter has {field.name} {shown(value)}: {reason}")
    init = config.init_lora_weights
    if init not in _INITS:
        fail(
            f"init_lora_weights is {init!r}, which changed the base's own weights before training; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes it an adapter to the unchanged base"
        )


def _parts(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Returns a dict that maps each adapted module to the names of the tensors of its low-rank pair, and a list with
    the names of the base's frozen tensors in the adapter's file.

    PEFT also saves the frozen weight of an embedding or head that the adapter changes. The export leaves such a frozen
    weight out, because llama.cpp has the base's weights in the base's own file.
    """
    endings = _LORA if config.peft_type == "LORA" else _ADALORA
    found: dict[str, dict[str, str]] = {}
    frozen: list[str] = []
    for name in sorted(shapes):
        if not _NAME.fullmatch(name):
            fail(f"{SAFETENSORS_WEIGHTS_NAME} has {shown(name)}, which is no name of a module's tensor")
        ending = next((end for end in endings if name.endswith(end)), None)
        if not name.startswith(_PREFIX) or ending is None:
            if name.startswith(_PREFIX) and ".base_layer." in name:
                frozen.append(name)
                continue
            what = next((kind for end, kind in _KINDS.items() if name.endswith(end)), "a tensor")
            fail(f"{SAFETENSORS_WEIGHTS_NAME} has {shown(name)}, {what} that llama.cpp's adapters can't hold{_MERGE}")
        parts = found.setdefault(name[len(_PREFIX) : -len(ending)], {})
        part = endings[ending]
        if part in parts:
            fail(f"{SAFETENSORS_WEIGHTS_NAME} has {shown(parts[part])} and {shown(name)}, wanted one of them")
        parts[part] = name
    return found, frozen


def _pair(config: PeftConfig, module: str, names: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> Pair:
    wanted = "abe" if config.peft_type == "ADALORA" else "ab"
    if missing := [part for part in wanted if part not in names]:
        there = next(iter(names.values()))
        fail(f"{SAFETENSORS_WEIGHTS_NAME} has {shown(there)}, but no lora_{missing[0].upper()} of {shown(module)}")
    a, b = shapes[names["a"]], shapes[names["b"]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or ("e" in names and shapes[names["e"]] != (a[0], 1)):
        fail(f"{module}: lora_A is {a} and lora_B is {b}, wanted (rank, inputs) and (outputs, rank)")
    embedding = names["a"].endswith(".lora_embedding_A")
    if embedding != names["b"].endswith(".lora_embedding_B"):
        fail(f"{module}: {names['a']} and {names['b']} are no pair")
    scale = _scale(config, module, a[0])
    return Pair(module, names["a"], names["b"], names.get("e"), embedding, a[0], a[1], b[0], scale)


def _scale(config: PeftConfig, module: str, rank: int) -> float:
    """Returns the factor by which PEFT multiplies ``B @ A`` of ``module``."""
    if config.peft_type == "ADALORA":
        alpha = config.lora_alpha if config.lora_alpha > 0 else rank
        return alpha / (config.init_r + 1e-5)
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(ranks.keys(), module), config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.lora_alpha)
    if r != rank:
        fail(f"{module}: the configuration has the rank {r}, lora_A has the rank {rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        fail(f"{module}: the alpha is {shown(alpha)}, wanted a number")
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def _natural(name: str) -> list[tuple[int, str]]:
    """Returns a key that sorts dotted names by the numbers in them, so that layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
