"""Compares training steps of an accelerated small Llama on a GPU with PEFT's own layers, from equal weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft_ext

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 97}  # fmt: skip
LINEARS = 7 * SIZES["num_hidden_layers"]
STEPS = 5
# The loss is a mean over 256 tokens, begins at about ln 97 = 4.6 and falls by about 0.2. The two runs differ in the
# order of float32 sums, and in bfloat16 in the rounding of a layer's terms: PEFT rounds the adapter's term, the fused
# layer rounds the sum. The rounding is 2^-9 of an output, with a random sign, and AdamW enlarges the rounding of
# gradients near zero. On the CPU the runs differ by 5e-7 (float32) and 4e-4 (bfloat16). A wrong term of a layer changes
# the loss by about 1e-2.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-3}


def llama(base: str, dtype: torch.dtype, use_dora: bool) -> nn.Module:
    """Returns a Llama with LoRA or DoRA over a dense base, or over bitsandbytes' Linear4bit with double
    quantization.
    """
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False)).to(DEVICE, dtype)
    if base == "bitsandbytes":
        _quantize(model, dtype)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", use_dora=use_dora,
                        init_lora_weights=False)  # fmt: skip
    return get_peft_model(model, config).train()


def _quantize(model: nn.Module, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear and name != "lm_head":
                layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype,
                                          compress_statistics=True, quant_type="nf4")  # fmt: skip
                layer.load_state_dict(linear.state_dict())
                setattr(parent, name, layer.to(DEVICE))
    model.is_loaded_in_4bit = True


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, SIZES["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("base", ["dense", "bitsandbytes"])
def test_losses_are_pefts(base: str, use_dora: bool, dtype: torch.dtype) -> None:
    stock = train(llama(base, dtype, use_dora))
    model = peft_ext.accelerate(llama(base, dtype, use_dora))
    explained = peft_ext.explain(model)
    assert [row.fused for row in explained.rows] == [True] * LINEARS, str(explained)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert max(abs(ours - theirs) for ours, theirs in zip(losses, stock, strict=True)) < TOLERANCE[dtype]
