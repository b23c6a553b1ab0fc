"""Tests that training over packed checkpoints gives the numbers of PEFT's training over the dequantized checkpoints."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import packed_checkpoints as pc
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiers import first
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, FineGrainedFP8Config, Mxfp4Config

import peft_ext
from peft_ext.nn import PackedExperts, PackedLinear
from peft_ext.quantize import PACKED_FORMATS
from peft_ext.run import RunError
from peft_ext.run.demo_model import check_demo_model, demo_model

pytestmark = pytest.mark.cpu_only("the models are loaded on the CPU")

TOKENS = torch.arange(36).reshape(4, 9) * 5 % pc.VOCAB
STEPS = 5
ROOT = Path(__file__).parents[2]


# --- checkpoints ------------------------------------------------------------------------------------------------------


# Each token goes to every expert, because rounding may change which experts are chosen.


def write_gpt_oss(path: Path) -> Path:
    pc.write_gpt_oss(path)
    about = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**about, "num_experts_per_tok": about["num_local_experts"]}))
    return path


def write_deepseek(path: Path, rope: int = 32) -> Path:
    """Writes a tiny DeepSeek-V3 with FP8 blocks: a dense layer and a layer of experts, as in the released files.

    kv_a_proj_with_mqa has 32 + rope rows. transformers' conversion derives the rows of a block from the number of
    blocks, which is right only if the blocks of 32 rows are complete.
    """
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=pc.VOCAB, hidden_size=pc.HIDDEN, intermediate_size=pc.INNER, moe_intermediate_size=pc.HIDDEN,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4,
        num_experts_per_tok=4, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=32,
        qk_rope_head_dim=rope, v_head_dim=16, qk_nope_head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    held = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        if name.endswith(("_proj.weight", "_mqa.weight")):
            held |= {name.removesuffix("weight") + part: one for part, one in pc.fp8(tensor).items()}
        else:
            held[name] = tensor
    pc.finish(path, held, pc.CASES["fp8"][0])
    return path


class Kind(NamedTuple):
    """A model: the function that writes its checkpoint, transformers' dequantizing config, and what LoRA adapts."""

    write: Callable[[Path], Path]
    dequantized: Callable[[], Any]
    modules: list[str]
    parameters: list[str] | None


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "gpt-oss": Kind(write_gpt_oss, lambda: Mxfp4Config(dequantize=True), ["q_proj", "o_proj"], EXPERTS),
    "qwen3": Kind(
        lambda path: pc.write(path, "fp8", "qwen3"), lambda: FineGrainedFP8Config(dequantize=True),
        ["q_proj", "v_proj", "down_proj"], None,
    ),
    "deepseek": Kind(
        write_deepseek, lambda: FineGrainedFP8Config(dequantize=True), ["q_b_proj", "kv_b_proj", "o_proj"], EXPERTS
    ),
}  # fmt: skip


def load(path: Path, dtype: torch.dtype, config: Any = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=config or peft_ext.PackedConfig(), attn_implementation="eager"
    )
    model.config.use_cache = False
    return model


def adapted(model: Any, kind: Kind) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=kind.modules, target_parameters=kind.parameters)
    return get_peft_model(model, config)


def spread(model: nn.Module) -> None:
    """Makes the adapters' B nonzero, as after some training."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


Run = tuple[list[float], dict[str, Tensor], dict[str, Tensor]]


def run(model: nn.Module) -> Run:
    """Takes some steps, and returns the losses, the gradients of the first step, and the sums of all steps' gradients.

    The sums stand for the adapters' changes: an adapter itself rounds each change to the adapter's own last bit.
    """
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    losses, gradients = [], {}
    sums = {name: torch.zeros_like(parameter) for name, parameter in trained(model).items()}
    for _ in range(STEPS):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        found = {name: parameter.grad.clone() for name, parameter in trained(model).items()}
        gradients = gradients or found
        for name, gradient in found.items():
            sums[name] += gradient
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients, sums


def apart(came: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Returns the largest distance of two sets of tensors, each relative to the largest entry of the wanted tensor."""
    assert came.keys() == wanted.keys() and came
    return max(((came[name] - one).abs().max() / one.abs().max()).item() for name, one in wanted.items())


def distances(one: Run, wanted: Run) -> tuple[float, float, float]:
    """Returns the largest distances of losses (relative), of gradients and of the sums of gradients."""
    losses = max(abs(a - b) / b for a, b in zip(one[0], wanted[0], strict=True))
    return losses, apart(one[1], wanted[1]), apart(one[2], wanted[2])


# --- training ---------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_steps_are_those_of_peft_over_the_dequantized_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In float32 the losses, gradients and sums of gradients agree up to the order of sums. In bfloat16 their distance
    from a float32 run is that of stock PEFT."""
    kind = KINDS[name]
    path = kind.write(tmp_path / "model")
    ours = adapted(load(path, dtype), kind)
    packed = [module for module in ours.modules() if isinstance(module, (PackedLinear, PackedExperts))]
    assert packed and not any(parameter.requires_grad for module in packed for parameter in module.parameters())
    spread(ours)
    start = copy.deepcopy(get_peft_model_state_dict(ours))

    def stock(dtype: torch.dtype) -> PeftModel:
        model = adapted(load(path, dtype, kind.dequantized()), kind)
        set_peft_model_state_dict(model, start)
        assert not any(isinstance(module, (PackedLinear, PackedExperts)) for module in model.modules())
        return model

    peft_ext.accelerate(ours)
    adapters = [row for row in peft_ext.explain(ours).rows if " over " in row.kind]
    assert adapters and all(row.fused for row in adapters)
    came, theirs = run(ours), run(stock(dtype))
    exact = theirs if dtype is torch.float32 else run(stock(torch.float32))
    assert abs(exact[0][-1] - exact[0][0]) > 1e-3 * exact[0][0]  # the steps change the loss
    found = [distances(one, exact) for one in (came, theirs)]
    bounds = (1e-5, 1e-5, 1e-5) if dtype is torch.float32 else [2 * one for one in found[1]]
    assert all(one <= bound for one, bound in zip(found[0], bounds, strict=True)), found

    # The adapter that was saved over packed weights, in stock PEFT over the dequantized checkpoint.
    ours.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(path, dtype, kind.dequantized()), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits, wanted = ours.eval()(TOKENS).logits.float(), again(TOKENS).logits.float()
    distance = ((logits - wanted).abs().max() / wanted.abs().max()).item()
    assert distance <= (1e-5 if dtype is torch.float32 else 2**-5)


def test_incomplete_blocks_are_decoded_by_the_size_in_the_config(tmp_path: Path) -> None:
    """kv_a_proj_with_mqa has 48 rows in blocks of 32. The authority is the code by which transformers decodes the
    weight in a backward. transformers' conversion of a checkpoint takes two blocks of 24 rows instead."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    model = load(write_deepseek(tmp_path, rope=16), torch.float32)
    layer = model.model.layers[0].self_attn.kv_a_proj_with_mqa
    assert tuple(layer.weight.shape) == (48, 64)
    wanted = _dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, [32, 32], torch.float32)
    assert torch.equal(layer.dequantize(torch.float32), wanted)


def linear(format: str = "mxfp4", dtype: torch.dtype = torch.float32) -> PackedLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96)).to(dtype)
    layer = peft_ext.quantize_packed(model, format, progress=False)[0]
    assert isinstance(layer, PackedLinear)
    return layer


def lora_over(layer: PackedLinear) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["layer"], init_lora_weights=False)
    return peft_ext.accelerate(get_peft_model(nn.ModuleDict({"layer": layer}), config))


def adapter_of(model: PeftModel) -> Any:
    return model.base_model.model["layer"]


@pytest.mark.parametrize("dtype", first(DTYPES, [torch.float32]), ids=str)
@pytest.mark.parametrize("format", first(PACKED_FORMATS, ["fp8"]))
def test_compiled_layers_give_the_numbers_of_eager_layers(format: str, dtype: torch.dtype) -> None:
    layer = linear(format, dtype)
    adapter = adapter_of(lora_over(copy.deepcopy(layer)))
    torch.compiler.reset()
    for module in (layer, adapter):
        results = []
        for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            x = torch.linspace(-1, 1, 5 * 64).reshape(5, 64).to(dtype).requires_grad_()
            y = call(x)
            y.float().square().sum().backward()
            found = {name: parameter.grad.clone() for name, parameter in trained(module).items()}
            module.zero_grad()
            results.append((y.detach(), x.grad, *found.values()))
        assert len(results[0]) == (2 if module is layer else 4)
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_errors_of_merges_name_a_packed_weight() -> None:
    model = lora_over(linear())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="restore: base_model.model.layer is merged into a packed weight"):
        peft_ext.restore(model)
    config = LoraConfig(r=4, target_modules=["layer"], alora_invocation_tokens=[1])
    model = peft_ext.accelerate(get_peft_model(nn.ModuleDict({"layer": linear()}), config))
    with pytest.raises(NotImplementedError, match="aLoRA over a packed weight can't be merged"):
        model.merge_adapter()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_number(reentrant: bool, tmp_path: Path) -> None:
    kind = KINDS["qwen3"]
    path, results = kind.write(tmp_path), []
    for checkpointing in (False, True):
        model = peft_ext.accelerate(adapted(load(path, torch.bfloat16), kind))
        spread(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        results.append(run(model.train()))
    assert results[0][0] == results[1][0]
    assert distances(*results) == (0, 0, 0)


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_copies_and_pickles_of_an_adapted_layer(format: str) -> None:
    model = lora_over(linear(format))
    x = torch.randn(3, 64)
    wanted = adapter_of(model)(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(adapter_of(other)(x), wanted)
        layer, own = adapter_of(other).base_layer, adapter_of(model).base_layer
        assert layer.weight.data_ptr() != own.weight.data_ptr()
        assert torch.equal(layer.dequantize(), own.dequantize())


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_model_learns_over_packed_weights_as_over_decoded_weights(tmp_path: Path) -> None:
    """Runs benchmarks/packed_training.py for a few steps on SmolLM2-135M: over MXFP4, and over a GGUF file's bytes."""
    try:
        check_demo_model()
    except RunError as error:
        pytest.skip(str(error))
    demo_model()  # unpacks the demo's model if no other run has unpacked it
    out = tmp_path / "result.json"
    options = ["--formats", "mxfp4", "gguf", "--steps", "6", "--length", "64", "--held-out", "4", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.packed_training", *options], cwd=ROOT, check=True)
    for row in json.loads(out.read_text())["rows"]:
        packed, decoded = row["packed"], row["decoded"]
        assert packed["fused"] == packed["layers"] == decoded["fused"] == 210
        for when in ("before", "after"):
            assert packed["perplexity"][when] == pytest.approx(decoded["perplexity"][when], rel=0.01)
        assert packed["perplexity"]["after"] < 0.98 * packed["perplexity"]["before"]
        assert row["max_loss_difference"] < 0.02
        assert packed["peak_mib"] < decoded["peak_mib"]
