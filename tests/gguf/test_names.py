"""Tests names of tensors and orders of rows against the package gguf and against transformers, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf_files as gf
import pytest
import torch
from gguf_files import ARRAY, F32, STRING, U32

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from peft_ext.gguf import GgufError, check_model, read_header
from peft_ext.gguf.names import ARCHITECTURES, GgufNames

pytestmark = pytest.mark.cpu_only("models are on the meta device, and files are read on the CPU")

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 6, "pad_token_id": None,
}  # fmt: skip


def config(model_type: str, **options: Any) -> Any:
    import transformers

    more = {"layer_types": ["conv", "full_attention"]} if model_type == "lfm2" else {}
    return transformers.AutoConfig.for_model(model_type, **{**SIZES, **more, **options})


def model(model_type: str, **options: Any) -> Any:
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config(model_type, **options))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_matrix_has_a_name(model_type: str) -> None:
    """Every 2-D weight has a name, no two have one name, and gguf lists the name's tensor for the architecture."""
    import gguf

    found = model(model_type, tie_word_embeddings=model_type == "gemma2")  # gguf has no name for a head of Gemma 2
    names = GgufNames.of_config(found.config)
    assert names.architecture == ARCHITECTURES[model_type][0]
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == names.architecture)
    patterns = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[number]}
    matrices = [name.removesuffix(".weight") for name, weight in found.named_parameters() if weight.dim() == 2]
    tensors = [names.tensor(name) for name in matrices]
    assert len(matrices) >= 10 and len(set(tensors)) == len(matrices)
    for name, tensor in zip(matrices, tensors, strict=True):
        assert tensor is not None, name
        layer = name.removeprefix("model.layers.").partition(".")[0]
        assert (f"blk.{layer}." if layer.isdigit() else "") == tensor[: tensor.rfind(".") + 1].partition("short")[0]
        assert (tensor.replace(f"blk.{layer}.", "blk.{bid}.") if layer.isdigit() else tensor) in patterns, tensor
    assert names.tensor("model.embed_tokens") == "token_embd"
    assert names.tensor("lm_head") == (None if model_type == "gemma2" else "output")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_those_of_transformers(model_type: str) -> None:
    """transformers maps the same names for the architectures whose GGUF files its older reader reads."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    found = model(model_type)
    if model_type == "mistral":
        found.config.model_type = "llama"
    theirs = {key: name for name, key in get_gguf_hf_weights_map(found, TensorProcessor()).items()}
    names = GgufNames.of_config(config(model_type))
    for name, weight in found.named_parameters():
        if weight.dim() == 2:
            assert theirs[name] == f"{names.tensor(name.removesuffix('.weight'))}.weight"


def test_modules_without_a_name() -> None:
    names = GgufNames("llama", 2, 4, 2)
    for module in ("", "model.layers.2.mlp.up_proj", "model.layers.0.self_attn.q_proj.weight", "model.layers.0", "x"):
        assert names.tensor(module) is None


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_orders_of_rows(model_type: str) -> None:
    """The rows of attn_q and attn_k are those of transformers' processor; all other tensors keep their order."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, LlamaTensorProcessor, TensorProcessor

    found = config(model_type)
    names = GgufNames.of_config(found)
    processor = TENSOR_PROCESSORS.get(names.architecture, TensorProcessor)(found.to_dict())
    assert isinstance(processor, LlamaTensorProcessor) == ARCHITECTURES[model_type][1]
    for kind, rows in (("attn_q", 32), ("attn_k", 16), ("attn_v", 16), ("attn_output", 32), ("ffn_down", 32),
                       ("ffn_up", 64)):  # fmt: skip
        weight = torch.arange(rows * 3.0).view(rows, 3)
        wanted = torch.from_numpy(processor.process(weight.numpy(), f"blk.0.{kind}.weight").weights)
        order = names.row_order(f"blk.0.{kind}", rows)
        assert (order is not None) == (ARCHITECTURES[model_type][1] and kind in ("attn_q", "attn_k"))
        assert torch.equal(weight if order is None else weight[order], wanted), kind


def test_rows_that_do_not_fit_the_heads() -> None:
    names = GgufNames("llama", 2, 4, 2)
    for tensor, rows, heads, least in (("blk.0.attn_q", 36, 4, 8), ("blk.1.attn_k", 6, 2, 4), ("attn_q", 7, 4, 8)):
        message = f"llama_row_order: {rows} rows for {heads} heads, wanted a multiple of {least}"
        with pytest.raises(ValueError, match=message):
            names.row_order(tensor, rows)


def test_architectures_that_are_not_known(tmp_path: Path) -> None:
    known = ", ".join(sorted({name for name, _ in ARCHITECTURES.values()}))
    for name in ("", "mistral", "gpt2", "qwen2moe", "LLAMA", "x" * 200):
        with pytest.raises(ValueError) as caught:
            GgufNames(name, 2, 4, 2)
        assert str(caught.value) == f"gguf: the architecture is {repr(name)[:60]}, wanted one of {known}"
        file = tmp_path / "a.gguf"
        file.write_bytes(gf.model_file(name).out)
        with pytest.raises(GgufError) as caught:
            GgufNames.of_file(read_header(file))
        assert str(caught.value) == f"{file}: the architecture is {repr(name)[:60]}, wanted one of {known}"
    for model_type in ("gpt2", "qwen2_moe", "gemma3"):
        import transformers

        with pytest.raises(ValueError) as caught:
            GgufNames.of_config(transformers.AutoConfig.for_model(model_type))
        wanted = f"gguf: the model type is {model_type!r}, wanted one of {', '.join(ARCHITECTURES)}"
        assert str(caught.value) == wanted


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_of_file_is_of_config(model_type: str, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "a.gguf").write_bytes(gf.model_file(architecture := ARCHITECTURES[model_type][0]).out)
    check_model(header := read_header(tmp_path / "a.gguf"))
    read = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="a.gguf")
    of_file = GgufNames.of_file(header)
    for other in (GgufNames.of_config(read), GgufNames.of_config(config(model_type))):
        for field in ("architecture", "layers", "heads", "kv_heads"):
            assert getattr(of_file, field) == getattr(other, field)
        for name in ("model.embed_tokens", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj", "x"):
            assert of_file.tensor(name) == other.tensor(name)
        for tensor, rows in (("blk.0.attn_q", 32), ("blk.0.attn_k", 16)):
            orders = of_file.row_order(tensor, rows), other.row_order(tensor, rows)
            assert orders == (None, None) or torch.equal(*orders)
    assert (of_file.architecture, of_file.layers, of_file.heads, of_file.kv_heads) == (architecture, 2, 4, 2)


@pytest.mark.parametrize(("key", "value", "message"), [
    ("block_count", None, "is None, wanted a positive integer"),
    ("block_count", (U32, 0), "is 0, wanted a positive integer"),
    ("block_count", (F32, 2.0), "is 2.0, wanted a positive integer"),
    ("block_count", (U32, 10_001), "is 10001, wanted at most 10000"),
    ("block_count", (U32, 2**32 - 1), "is 4294967295, wanted at most 10000"),
    ("attention.head_count", None, "is None, wanted a positive integer"),
    ("attention.head_count", (ARRAY, (U32, [])), "is 0, wanted a positive integer"),
    ("attention.head_count", (STRING, "4"), "is '4', wanted a positive integer"),
    ("attention.head_count_kv", (ARRAY, (STRING, ["2"])), "is '2', wanted a positive integer"),
])  # fmt: skip
def test_sizes_of_a_file_that_are_wrong(key: str, value: Any, message: str, tmp_path: Path) -> None:
    def edit(keys: dict[str, Any]) -> None:
        keys.pop(f"llama.{key}")
        keys.update({} if value is None else {f"llama.{key}": value})

    (file := tmp_path / "a.gguf").write_bytes(gf.model_file("llama", edit).out)
    with pytest.raises(GgufError) as caught:
        GgufNames.of_file(read_header(file))
    assert str(caught.value) == f"{file}: llama.{key} {message}"


def test_heads_of_each_layer(tmp_path: Path) -> None:
    for value, wanted in (((ARRAY, (U32, [0, 2])), 2), (None, 4)):

        def edit(keys: dict[str, Any], value: Any = value) -> None:
            keys.pop("llama.attention.head_count_kv")
            keys.update({} if value is None else {"llama.attention.head_count_kv": value})

        (tmp_path / "a.gguf").write_bytes(gf.model_file("llama", edit).out)
        assert GgufNames.of_file(read_header(tmp_path / "a.gguf")).kv_heads == wanted
