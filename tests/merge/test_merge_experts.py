"""Tests merge_to_dense for a mixture of experts over NF4, with experts that are quantized as by quantize_nf4."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import mixtures  # noqa: E402
from peft_models import spread  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext.merge import MergeError, merge_to_dense  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns about target_parameters

ADAPTERS = {
    "experts": {},
    "experts, DoRA": {"use_dora": True},
    "one of two parameters": {"target_parameters": ["mlp.experts.down_proj"]},
    "attention": {"target_parameters": None},
}
# gpt-oss and Llama 4 keep their experts transposed.
CASES = [
    *(("Qwen3-MoE", adapter) for adapter in ADAPTERS),
    *((name, adapter) for name in ("gpt-oss", "Llama 4") for adapter in ("experts", "attention")),
]
each_case = pytest.mark.parametrize("name, adapter", CASES)


def saved(tmp_path: Path, name: str, adapter: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Path]:
    """Returns a base, and the folder of an adapter with values as after some training over NF4."""
    base = mixtures.base(name, dtype)
    base.save_pretrained(tmp_path / "base")
    quantized = peft_ext.quantize_nf4(copy.deepcopy(base))
    torch.manual_seed(1)
    given = {"target_parameters": mixtures.targets(base), **ADAPTERS[adapter]}
    adapted = peft_ext.get_peft_model(quantized, mixtures.adapt_config(**given))
    spread(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def in_float32(model: nn.Module, blocksize: int = 64, double_quant: bool = True) -> nn.Module:
    """Returns a float32 copy of ``model`` whose weights have the values of NF4 weights.

    The copy is quantized to NF4 and then dequantized.
    """
    quantized = peft_ext.quantize_nf4(copy.deepcopy(model), blocksize=blocksize, double_quant=double_quant)
    return peft_ext.dequantize_nf4(quantized, dtype=torch.float32).float()


def assert_merged_on(dense: nn.Module, adapter: Path, out: Path, dtype: torch.dtype = torch.float32) -> None:
    """Asserts that the folder has the bits of PEFT's merge of the adapter into ``dense``."""
    wanted = peft_ext.load_adapter(copy.deepcopy(dense), adapter).merge_and_unload().state_dict()
    found = type(dense).from_pretrained(out, dtype="auto").state_dict()
    assert found.keys() == wanted.keys()
    assert not [key for key, tensor in found.items() if not torch.equal(tensor, wanted[key].to(dtype))]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=mixtures.batch()["input_ids"]).logits


@each_case
def test_experts_are_quantized_as_quantize_nf4_does(tmp_path, name, adapter):
    base, folder = saved(tmp_path, name, adapter)
    done = merge_to_dense(tmp_path / "base", folder, tmp_path / "out", base_quant="nf4", dtype="fp32")
    assert done.base_quant == "nf4"
    assert_merged_on(in_float32(base), folder, tmp_path / "out")
    wanted = logits(peft_ext.load_adapter(peft_ext.quantize_nf4(copy.deepcopy(base)), folder))
    found = logits(type(base).from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=float(2e-5 * wanted.abs().max()))


@each_case
def test_experts_held_in_nf4_are_merged_and_left_as_they_are(tmp_path, name, adapter):
    base, folder = saved(tmp_path, name, adapter)
    held = peft_ext.quantize_nf4(copy.deepcopy(base))
    before = {key: tensor.clone() for key, tensor in held.state_dict().items()}
    kinds = [type(module) for module in held.modules()]
    places = sum(type(module) is peft_ext.nn.NF4Linear or hasattr(module, "nf4_shapes") for module in held.modules())
    done = merge_to_dense(held, folder, tmp_path / "out", dtype="fp32")
    assert done.base_quant_text == f"nf4, as the base is held ({places} layers)"
    assert [type(module) for module in held.modules()] == kinds
    after = held.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert_merged_on(in_float32(base), folder, tmp_path / "out")
    with pytest.raises(MergeError, match="base_quant is 'none', but the base itself is held in NF4"):
        merge_to_dense(held, folder, tmp_path / "no", base_quant="none")


def test_block_size_and_dtype_are_those_asked_for(tmp_path):
    base, folder = saved(tmp_path, "Qwen3-MoE", "experts", torch.bfloat16)
    options = {"blocksize": 128, "double_quant": False}
    dense = in_float32(base, **options)
    merge_to_dense(tmp_path / "base", folder, tmp_path / "folder", base_quant="nf4", **options)
    assert_merged_on(dense, folder, tmp_path / "folder", torch.bfloat16)
    held = peft_ext.quantize_nf4(copy.deepcopy(base), **options)
    merge_to_dense(held, folder, tmp_path / "memory")
    assert_merged_on(dense, folder, tmp_path / "memory", torch.bfloat16)


def test_experts_that_can_not_be_quantized_are_named(tmp_path):
    base, folder = saved(tmp_path, "Qwen3-MoE", "attention")
    base.model.layers[1].mlp.experts.forward = lambda *given: given[0]
    with pytest.raises(MergeError, match=r"model\.layers\.1\.mlp\.experts has its forward replaced"):
        merge_to_dense(base, folder, tmp_path / "out", base_quant="nf4")
