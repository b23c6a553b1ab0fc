"""Tests LoRA over a packed embedding, and the refusal of PEFT configurations that would train or read packed codes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packed_weights import KINDS, fitting, packed_weight
from peft import IA3Config, LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from tiers import first
from torch import Tensor, nn

import peft_ext
from peft_ext.nn import PackedEmbedding, PackedLinear
from peft_ext.reference.formats import decoded
from peft_ext.weights.packed import PackedWeight

pytestmark = pytest.mark.cpu_only("the operator has no kernel on CUDA")

V, K = 40, 64
IDS = torch.tensor([[3, 0, 36, 3, 5], [5, 5, 1, 36, 2]])


def names_of(weight: PackedWeight) -> tuple[str | None, ...]:
    return tuple(None if part is None else f"part_{i}" for i, part in enumerate(weight.parts))


def table_of(kind: str, dtype: torch.dtype, scale: float = 1.0) -> PackedEmbedding:
    weight = packed_weight(kind, *fitting(kind, V, K), torch.Generator().manual_seed(0))
    return PackedEmbedding.from_packed(weight, names_of(weight), padding_idx=3, dtype=dtype, scale=scale)


def dense_of(table: PackedEmbedding) -> nn.Embedding:
    return nn.Embedding.from_pretrained(decoded(table.packed, table.compute_dtype), padding_idx=3)


def adapted(table: nn.Module) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["table"], r=4, lora_alpha=6, init_lora_weights=False)
    model = get_peft_model(nn.ModuleDict({"table": table}), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return model


def step(model: Any) -> tuple[Tensor, ...]:
    y = model.base_model.model["table"](IDS)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return y.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", first(KINDS, ["int4", "gptq", "awq", "fp8", "hqq", "Q4_K", "nvfp4"]))
def test_lora_over_a_packed_table_is_fused(kind: str, dtype: torch.dtype) -> None:
    """The numbers are those of PEFT over the packed table, and of PEFT over the decoded table."""
    table = table_of(kind, dtype)
    stock, fused, dense = (adapted(one) for one in (table, copy.deepcopy(table), dense_of(table)))
    peft_ext.accelerate(fused)
    (row,) = peft_ext.explain(fused).rows
    assert row.fused and row.kind == "LoRA over PackedEmbedding"
    came, packed, wanted = (step(model) for model in (fused, stock, dense))
    assert len(wanted) == 3 and came[0].dtype is dtype
    bound = 1e-6 if dtype is torch.float32 else 2**-7
    for one, other in ((came, wanted), (packed, wanted)):
        assert all((a - b).abs().max() <= bound * b.abs().max() for a, b in zip(one, other, strict=True))


def test_a_scaled_table_scales_the_adapter() -> None:
    table = table_of("int4", torch.float32, scale=3.0)
    stock, fused = adapted(table), peft_ext.accelerate(adapted(copy.deepcopy(table)))
    assert peft_ext.explain(fused).fused_share == 1
    for one, other in zip(step(fused), step(stock), strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()


def test_rows_are_rounded_once_to_the_model_s_dtype() -> None:
    table = table_of("gptq", torch.float32)  # the weight's own dtype is float16
    assert torch.equal(table(IDS), decoded(table.packed, torch.float32)[IDS])
    again = copy.deepcopy(table)
    assert again.table.parts[0].data_ptr() == again.packed.parts[0].data_ptr() != table.packed.parts[0].data_ptr()


def test_a_merge_into_a_packed_table_is_an_error() -> None:
    fused = peft_ext.accelerate(adapted(table_of("int8-rows", torch.float32)))
    before = step(fused)[0]
    with pytest.raises(RuntimeError, match=r"merge: the table of a PackedEmbedding is packed \(int\), wanted a dense"):
        fused.merge_adapter()
    assert torch.equal(step(fused)[0], before)


# --- configurations that need a dense weight --------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table, weight = table_of(kind, torch.float32), table_of(kind, torch.float32).packed
        self.body = nn.Sequential(PackedLinear.from_packed(weight, names_of(weight), dtype=torch.float32))
        self.out = nn.Linear(weight.out_features, 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.body(self.table(ids)))


@pytest.mark.parametrize("kind", ["int4", "int8-rows", "fp8"])
@pytest.mark.parametrize(
    ("config", "text"),
    [
        (LoraConfig(target_modules=["out"], modules_to_save=["table"]), "train a copy of the packed weight of table"),
        (LoraConfig(target_modules=["out"], modules_to_save=["body"]), r"weight of body \(PackedLinear\)"),
        (IA3Config(target_modules=["out"], feedforward_modules=[], modules_to_save=["0"]), "modules_to_save would"),
        (LoraConfig(target_modules=["out"], trainable_token_indices={"table": [1]}), "trainable_token_indices would"),
        (LoraConfig(target_modules=["out"], trainable_token_indices=[1]), "trainable_token_indices would"),
        (TrainableTokensConfig(token_indices=[1], target_modules=["table"]), "TRAINABLE_TOKENS would compute with the"),
        (LoraConfig(target_modules=["table"], use_dora=True), "DoRA's norm needs the packed weight of table"),
        (LoraConfig(target_modules="ta.*|out", use_dora=True), "DoRA's norm needs the packed weight of table"),
    ],
)
def test_configurations_that_need_a_dense_weight_are_refused(config: PeftConfig, text: str, kind: str) -> None:
    model = Model(kind)
    with pytest.raises(ValueError, match=f"get_peft_model: .*{text}.*") as caught:
        peft_ext.get_peft_model(model, copy.deepcopy(config))
    assert "peft_ext.dequantize_packed(model)" in str(caught.value)
    if getattr(config, "modules_to_save", None) != ["body"]:
        dense = peft_ext.get_peft_model(peft_ext.dequantize_packed(model), copy.deepcopy(config))
        dense(IDS).sum().backward()
