"""Tests merge_to_dense over GGUF files: the dtype of the base, and packed copies of the base in the adapter's file."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from merged_models import CAUSAL, lora, trained  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft_models import spread  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny_gguf import tiny_model, write_tiny_gguf  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from peft_ext import load_gguf, merge_to_dense, merge_to_gguf, quantize_nf4  # noqa: E402
from peft_ext.merge import writer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about tied weights


def made(folder: Path, types: Any, config: Any = None) -> tuple[Any, Path, Path]:
    """Returns a float32 model with the file's weights, the file, and the adapter's folder."""
    model = tiny_model("llama")
    model.load_state_dict(write_tiny_gguf(folder / "base.gguf", model, types))
    config = config or lora("q_proj", "down_proj")
    trained(copy.deepcopy(model), config).save_pretrained(folder / "adapter")
    return model, folder / "base.gguf", folder / "adapter"


def merged_by_peft(model: Any, adapter: Path) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).double()
    adapted = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).double()
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("types", ["F16", "F32", "Q8_0"])
def test_a_base_in_a_gguf_file_is_not_rounded(types: str, tmp_path: Path) -> None:
    model, base, adapter = made(tmp_path, types)
    merge_to_dense(base, adapter, tmp_path / "out", dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, wanted in merged_by_peft(model, adapter).items():
        assert found[name].dtype is torch.float32
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(("types", "dtype"), [
    ("F16", torch.float16), ("F32", torch.float32), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16),
    ({"*": "Q8_0", "token_embd": "F32"}, torch.bfloat16),
])  # fmt: skip
def test_the_base_s_dtype_is_kept(types: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, base, adapter = made(tmp_path, types)
    merge_to_dense(base, adapter, tmp_path / "out", dtype=None)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name, wanted in merged_by_peft(model, adapter).items():
        assert found[name].dtype is dtype
        torch.testing.assert_close(
            found[name], wanted.float().to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7, msg=name
        )


def test_a_base_that_finetune_trained_over_is_rounded_as_in_the_training(tmp_path: Path) -> None:
    model, base, adapter = made(tmp_path, "F16")
    (adapter / "run.json").write_text(json.dumps({"options": {"quant": "none"}}))
    merge_to_dense(base, adapter, tmp_path / "out", dtype=torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    name = "model.layers.0.mlp.up_proj.weight"  # a weight that the adapter does not change
    assert torch.equal(found[name], model.state_dict()[name].bfloat16().float())


def test_an_adapted_packed_embedding(tmp_path: Path) -> None:
    """PEFT saves a copy of the packed embedding with the adapter, which no dense model can read."""
    _, base, adapter = made(tmp_path, "Q8_0")
    torch.manual_seed(3)
    config = peft.LoraConfig(**CAUSAL, r=4, init_lora_weights=False, target_modules=["q_proj", "embed_tokens"])
    adapted = peft.get_peft_model(load_gguf(base, dtype=torch.float32), config).eval()
    spread(adapted)
    adapted.save_pretrained(adapter)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        saved = [key for key in file.keys() if ".base_layer." in key]
    assert saved, "PEFT has saved no copy of the embedding"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = adapted(ids).logits
    merge_to_dense(base, adapter, tmp_path / "out", dtype=torch.float32)
    merge_to_gguf(base, adapter, tmp_path / "out.gguf", type="f32")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        in_file = load_gguf(tmp_path / "out.gguf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(in_file, wanted, rtol=1e-4, atol=1e-4)


def test_an_adapted_nf4_head(tmp_path: Path) -> None:
    model = quantize_nf4(tiny_model("llama"), skip=())
    config = lora("q_proj", "lm_head")
    adapted = trained(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = adapted(ids).logits
    merge_to_dense(adapted.unload(), tmp_path / "adapter", tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_warning_about_the_file_s_tokenizer_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(*args: Any) -> None:
        warnings.warn("tokenizer.ggml.pre is missing", stacklevel=2)

    _, base, adapter = made(tmp_path, "Q8_0")
    monkeypatch.setattr(writer, "gguf_tokenizer", warned)
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre is missing"):
        merge_to_dense(base, adapter, tmp_path / "out")
