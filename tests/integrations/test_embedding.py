"""Tests LoRA over an nn.Embedding: fused results agree with PEFT's, and other calls have PEFT's own bits."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from peft.tuners import lora

import peft_ext

pytestmark = pytest.mark.filterwarnings("ignore")

V, K = 37, 24


class Scaled(nn.Embedding):
    """Multiplies the embeddings by a buffer, like Gemma's embedding."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Model(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.table = kind(V, K, **options)

    def forward(self, ids):
        return self.table(ids)


def model_of(kind=nn.Embedding, dtype=torch.float32, adapters=torch.float32, config=None, **options):
    torch.manual_seed(0)
    settings = {"target_modules": ["table"], "r": 4, "lora_alpha": 6, "init_lora_weights": False} | (config or {})
    model = get_peft_model(Model(kind, **options).to(dtype), LoraConfig(**settings), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:
            parameter.data = parameter.data.to(adapters)
    return model, peft_ext.accelerate(copy.deepcopy(model))


def step(model, ids):
    """Returns the output, and the gradients of all trainable parameters."""
    model.zero_grad()
    y = model(ids)
    torch.manual_seed(1)
    y.backward(torch.randn_like(y))
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters() if p.requires_grad}}


def row_of(model):
    (row,) = peft_ext.explain(model).rows
    return row


IDS = torch.tensor([[3, 0, 36, 3, 5], [5, 5, 1, 36, 2]])


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_the_op_computes_what_peft_does(dtype, adapters, padding_idx):
    stock, fused = model_of(dtype=dtype, adapters=adapters, padding_idx=padding_idx)
    assert row_of(fused).fused and row_of(fused).kind == "LoRA over Embedding"
    for ids in (IDS, IDS.int(), IDS[0, 0], IDS[:, :0]):
        found, wanted = step(fused, ids), step(stock, ids)
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype
            torch.testing.assert_close(found[name], wanted[name], **({} if adapters == dtype == torch.float32
                                       else {"rtol": 2e-2, "atol": 2e-2}))  # fmt: skip
    padded = [grad for name, grad in step(fused, IDS).items() if "embedding_A" in name]
    assert padding_idx is None or not padded[0][:, padding_idx].any()


def test_a_bfloat16_table_with_float32_adapters_is_rounded_once_as_in_peft():
    stock, fused = model_of(dtype=torch.bfloat16)
    exact = copy.deepcopy(stock).double()(IDS)
    rounding = (exact.to(torch.bfloat16) - exact).norm()
    for model in (stock, fused):
        assert (model(IDS) - exact).norm() <= 1.001 * rounding


@pytest.mark.parametrize(
    ("kind", "options", "config", "reason"),
    [
        (Scaled, {}, {}, "its base layer is a Scaled, wanted nn.Embedding"),
        (nn.Embedding, {"max_norm": 0.5}, {}, "max_norm changes the weights in the forward"),
        (nn.Embedding, {"scale_grad_by_freq": True}, {}, "makes the gradient of lora_A another"),
        (nn.Embedding, {}, {"use_dora": True}, "a DoraEmbeddingVariant over an embedding is not fused"),
    ],
)
def test_other_forms_are_peft_s_to_the_bit(kind, options, config, reason):
    stock, fused = model_of(kind, config=config, **options)
    assert reason in row_of(fused).reason
    found, wanted = step(fused, IDS), step(stock, IDS)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_happens_to_a_layer_is_seen():
    stock, fused = model_of()
    layer = fused.base_model.model.table
    with fused.disable_adapter():
        assert row_of(fused).reason == "adapters are disabled"
        assert torch.equal(fused(IDS), layer.base_layer(IDS))
    handle = layer.base_layer.register_forward_hook(lambda *args: 2 * args[-1])
    assert row_of(fused).reason == "hooks on base_layer, or its replaced forward, would not run"
    handle.remove()
    layer.base_layer.weight.requires_grad_(True)
    assert row_of(fused).reason == "its base weight requires grad"
    layer.base_layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(IDS), stock(IDS))
    for model in (stock, fused):
        model.add_adapter("other", LoraConfig(target_modules=["table"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    assert row_of(fused).reason == "several active adapters over an embedding"
    fused.base_model.set_adapter("default")
    stock.base_model.set_adapter("default")
    assert row_of(fused).fused
    torch.testing.assert_close(fused(IDS), stock(IDS))
    fused.merge_adapter()
    assert row_of(fused).reason.startswith("merged")
    fused.unmerge_adapter()
    torch.testing.assert_close(fused(IDS), stock(IDS))
    peft_ext.restore(fused)
    assert torch.equal(fused(IDS), fused.base_model.model.table(IDS)) and not row_of(fused).fused


@pytest.mark.parametrize("index", [V, -1])
def test_an_index_out_of_range_is_an_index_error_as_in_peft(index):
    for model in model_of():
        with pytest.raises(IndexError):
            model(torch.tensor([0, index]))


def test_it_compiles_in_one_graph():
    stock, fused = model_of()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, IDS)["y"], step(stock, IDS)["y"])


def tripled(function):
    return lambda *args, **kwargs: 3 * function(*args, **kwargs)


@pytest.mark.parametrize("is_first", [True, False], ids=["before accelerate", "after accelerate"])
@pytest.mark.parametrize("owner, name", [(nn.Embedding, "forward"), (lora.Embedding, "_embed"), (None, "_embed")])
def test_a_replaced_part_of_the_forward_runs(owner, name, is_first, monkeypatch):
    stock, fused = model_of()
    if is_first:
        peft_ext.restore(fused)
    for target in (owner,) if owner else (model.base_model.model.table for model in (stock, fused)):
        monkeypatch.setattr(target, name, tripled(getattr(target, name)))
    if is_first:
        peft_ext.accelerate(fused)
    assert torch.equal(fused(IDS), stock(IDS))
    assert "replaced" in row_of(fused).reason
