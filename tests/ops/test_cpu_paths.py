"""Tests the dtype of computations, and which products run, on CPUs without instructions for 16-bit products."""

import copy
import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from battery import assert_close
from op_db import randn
from tiny_run import finetune, report
from torch import nn

import peft_ext
from peft_ext import _cpu, _native, ops
from peft_ext.cli.main import main
from peft_ext.ops import library

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft_ext.integrations.adapter_layers import reasons  # noqa: E402
from peft_ext.integrations.adapter_layers.linear import FusedLinear  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BF16, FP16 = torch.bfloat16, torch.float16
NOTHING = {name: False for name in ("avx512_bf16", "amx_bf16", "avx512_fp16", "amx_fp16", "bf16", "fp16_arith")}
AVX2 = {"PEFT_EXT_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2"}  # fmt: skip


# --- what the CPU has -------------------------------------------------------------------------------------------------


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """Returns a function that simulates a CPU: features of CPUID and oneDNN, CPU path, oneDNN's limit, architecture."""

    def be(has=(), onednn=(), isa="avx2", limit=None, machine="x86_64"):
        monkeypatch.setattr(_cpu, "capabilities", lambda: NOTHING | dict.fromkeys(has, True))
        monkeypatch.setattr(_cpu, "_onednn_multiplies", lambda check: check.split("_")[3] in onednn)
        monkeypatch.setattr(_native.NativeState, "isa", property(lambda state: isa))
        monkeypatch.setattr(_cpu.platform, "machine", lambda: machine)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if limit is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)

    return be


NO = "this CPU has no instructions for bfloat16 products"
FORBIDDEN = "the environment forbids the instructions for bfloat16 products"
CPUS = {
    "Zen 2 and 3, laptops": (dict(isa="avx2"), NO, {BF16, FP16}),
    "Skylake-X": (dict(onednn=("bf16", "fp16"), isa="avx512"), NO, {BF16, FP16}),
    "Zen 4": (dict(has=("avx512_bf16",), onednn=("bf16", "fp16"), isa="avx512_bf16"), "", {FP16}),
    "Sapphire Rapids": (dict(has=("avx512_bf16", "amx_bf16", "avx512_fp16"), onednn=("bf16", "fp16"), isa="amx"), "",
                        set()),
    "its oneDNN limited to AVX2": (dict(has=("avx512_bf16", "amx_bf16", "avx512_fp16"), limit="AVX2", isa="amx"),
                                   FORBIDDEN, {BF16, FP16}),
    "to AVX-512": (dict(has=("avx512_bf16", "amx_bf16", "avx512_fp16"), onednn=("bf16", "fp16"), limit="avx512_core",
                        isa="amx"), FORBIDDEN, {BF16, FP16}),
    "to BF16": (dict(has=("avx512_bf16", "avx512_fp16"), onednn=("bf16", "fp16"), limit="AVX512_CORE_BF16",
                     isa="avx512_bf16"), "", {FP16}),
    "a limit that is none": (dict(has=("avx512_bf16", "avx512_fp16"), onednn=("bf16", "fp16"), limit="ALL",
                                  isa="avx512_bf16"), "", set()),
    "PyTorch without oneDNN": (dict(has=("avx512_bf16",), limit="AVX512_CORE_BF16", isa="avx512_bf16"),
                               "this build of PyTorch has no instructions for bfloat16 products", {BF16, FP16}),
    "this package's path forced": (dict(has=("avx512_bf16", "avx512_fp16"), onednn=("bf16", "fp16"), isa="avx2"),
                                   "the CPU path in use, avx2, has no instructions for bfloat16 products", set()),
    "no native library": (dict(has=("avx512_bf16",), onednn=("bf16",), isa="reference"), "", set()),
    "portable": (dict(isa="scalar"), NO, set()),
    "Arm with bfloat16": (dict(has=("bf16", "fp16_arith"), onednn=("bf16", "fp16"), isa="neon_bf16", machine="aarch64"),
                          "", set()),
    "without it forced": (dict(has=("bf16", "fp16_arith"), onednn=("bf16", "fp16"), isa="neon", machine="aarch64"),
                          "the CPU path in use, neon, has no instructions for bfloat16 products", set()),
    "Arm without": (dict(isa="neon", machine="aarch64"), NO, {BF16, FP16}),
    "Arm, portable": (dict(isa="scalar", machine="aarch64"), NO, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", CPUS)
def test_the_dtype_of_a_cpu(cpu, name: str) -> None:
    about, why, widened = CPUS[name]
    cpu(**about)
    assert _cpu.why_float32() == why
    assert _cpu.compute_dtype() is (torch.float32 if why else BF16)
    assert _cpu.widened_dtypes() == widened
    assert _cpu.multiplies(torch.float32) and _cpu.multiplies(torch.float64)


def test_a_torch_without_the_list_of_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("avx2", True), ("avx512", True), ("avx512_bf16", False), ("amx_tile", False)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda value=value: value)
    monkeypatch.delattr(torch.cpu, "_is_amx_fp16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert _cpu.capabilities() == {
        "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False, "amx_fp16": False,
    }  # fmt: skip
    assert not _cpu.multiplies(BF16)


FORCED = """
import json, sys, torch
from peft_ext import _cpu, _native
from peft_ext.integrations.adapter_layers import reasons
from transformers import LlamaConfig, LlamaForCausalLM
import peft, peft_ext
torch.manual_seed(0)
config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
                     tie_word_embeddings=False)
model = peft.get_peft_model(LlamaForCausalLM(config).to(torch.bfloat16), peft.LoraConfig(target_modules=["q_proj"]))
rows = {row.name.rpartition(".")[2]: (row.kind, row.fused) for row in peft_ext.explain(peft_ext.accelerate(model)).rows}
model(input_ids=torch.arange(40)[None], labels=torch.arange(40)[None]).loss.backward()
print(json.dumps([_native.STATE.isa, str(_cpu.compute_dtype()), _cpu.why_float32(),
                  sorted(map(str, reasons.WIDENED)), rows]))
"""


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in _native.STATE.module.isas(), reason="this CPU has no AVX2")
def test_a_process_forced_to_avx2_knows_it_and_accelerate_takes_the_frozen_layers() -> None:
    done = subprocess.run([sys.executable, "-c", FORCED], env=os.environ | AVX2, cwd=ROOT, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    isa, dtype, why, widened, rows = json.loads(done.stdout.splitlines()[-1])
    assert (isa, dtype) == ("avx2", "torch.float32") and why in (NO, FORBIDDEN)
    assert widened == ["torch.bfloat16", "torch.float16"]
    assert rows.pop("q_proj") == ["LoRA over Linear", True]
    assert rows == dict.fromkeys(("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
                                 ["Linear", True])  # fmt: skip


# --- the frozen linear ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["avx2", "avx512"])
def widening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Sets a CPU path that widens 16-bit products to float32, and simulates a PyTorch without 16-bit products."""
    module = _native.STATE.module
    if request.param not in module.isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = module.isa()
    module.set_isa(request.param)
    monkeypatch.setattr(_cpu, "multiplies", lambda dtype: dtype not in (BF16, FP16))
    monkeypatch.setattr(reasons, "WIDENED", _cpu.widened_dtypes())
    assert {BF16, FP16} == reasons.WIDENED
    yield
    module.set_isa(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Returns the list of calls of ``ops.frozen_linear``: the shapes of x and weight, and the dtype of the result."""
    seen: list[tuple] = []
    op = ops.frozen_linear

    def counted(x, weight, bias=None):
        y = op(x, weight, bias)
        seen.append((tuple(x.shape), tuple(weight.shape), y.dtype))
        return y

    monkeypatch.setattr(ops, "frozen_linear", counted)
    return seen


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("tokens", [(1,), (5,), (3, 7), (64,), (300,), (0, 4)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_values_and_gradients(widening, calls, dtype: torch.dtype, tokens: tuple, with_bias: bool) -> None:
    layer = nn.Linear(96, 1100, bias=with_bias).to(dtype)  # more rows than a panel, the part cast to float32 at once
    layer.weight.requires_grad_(False)
    x, grad = randn(*tokens, 96, dtype=dtype).requires_grad_(), randn(*tokens, 1100, dtype=dtype)
    assert type(peft_ext.accelerate(layer)) is FusedLinear

    def run(kind, function):
        weight = layer.weight.detach().to(kind)
        leaves = {"x": x.detach().to(kind).requires_grad_()}
        bias = None
        if with_bias:
            bias = leaves["bias"] = layer.bias.detach().to(kind).requires_grad_()
        y = function(leaves["x"], weight, bias)
        y.backward(grad.to(kind))
        return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}

    y = layer(x)
    y.backward(grad)
    found = {"y": y.detach(), "x": x.grad} | ({"bias": layer.bias.grad} if with_bias else {})
    assert len(calls) == 1 and y.dtype is dtype and layer.weight.grad is None
    assert_close(found, run(dtype, F.linear), run(torch.float64, F.linear), 1100)


def test_one_token_without_a_gradient_is_pytorchs(widening, calls) -> None:
    layer = nn.Linear(64, 96).to(BF16).requires_grad_(False)
    x = randn(1, 1, 64, dtype=BF16)
    stock = layer(x)
    peft_ext.accelerate(layer)
    assert torch.equal(layer(x), stock) and not calls
    with torch.no_grad():
        layer(x.requires_grad_())
        assert not calls
    layer(x)
    assert len(calls) == 1


def llama(tied: bool = True, dtype: torch.dtype = BF16, **lora) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False,
                                                       **lora))  # fmt: skip
    return model.train()


def step(model: nn.Module, **autocast) -> tuple[torch.Tensor, dict]:
    ids = torch.arange(40)[None]
    model.zero_grad()
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_is_as_close_to_float32_as_stock(widening, calls, tied: bool) -> None:
    model = llama(tied)
    want, exact = step(copy.deepcopy(model).float())
    logits, stock = step(model)
    fused, grads = step(peft_ext.accelerate(model, blocks=False))
    head = model.get_base_model().lm_head
    assert type(head) is FusedLinear
    assert (head.weight is model.get_base_model().model.embed_tokens.weight) is tied
    assert sum(weight == (96, 64) for _, weight, _ in calls) == 1 and len(calls) == 1 + 2 * 5
    assert fused.dtype is BF16 and grads.keys() == stock.keys() == exact.keys()
    assert (fused - want).norm() <= 1.5 * (logits - want).norm() + 2**-9 * want.norm()
    for name, value in exact.items():
        error, yardstick = (grads[name] - value).norm(), (stock[name] - value).norm()
        assert error <= 1.5 * yardstick + 2**-9 * value.norm(), name


def test_only_frozen_layers_outside_of_adapters_are_taken(widening) -> None:
    model = llama(modules_to_save=["lm_head"])
    model.add_adapter("idle", peft.LoraConfig(target_modules=["q_proj"]))  # an inactive adapter is frozen
    base = model.get_base_model()
    base.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    before = {name: type(module) for name, module in model.named_modules()}
    peft_ext.accelerate(model, blocks=False)
    for name, module in model.named_modules():
        if before[name] is nn.Linear:
            stays = ".lora_A." in name or ".lora_B." in name or "modules_to_save" in name or "0.mlp.up_proj" in name
            assert type(module) is (nn.Linear if stays else FusedLinear), name
    rows = {row.name.removeprefix("base_model.model."): row for row in peft_ext.explain(model).rows}
    assert "model.layers.0.mlp.up_proj" not in rows and "lm_head.modules_to_save.default" not in rows
    assert rows["model.layers.1.mlp.up_proj"].kind == "Linear" and rows["model.layers.1.mlp.up_proj"].fused
    assert rows["model.layers.0.self_attn.q_proj"].kind == "LoRA over Linear"


def test_a_layer_that_is_trained_after_all_is_pytorchs(widening, calls) -> None:
    layer = peft_ext.accelerate(nn.Linear(64, 96).to(BF16).requires_grad_(False))
    layer.weight.requires_grad_(True)
    y = layer(randn(4, 64, dtype=BF16))
    y.float().sum().backward()
    assert not calls and layer.weight.grad is not None
    row = peft_ext.explain(layer).rows[0]
    assert (row.kind, row.fused, row.reason) == ("Linear", False, "its base weight requires grad")


def test_nothing_is_lost_by_saving_copying_pickling_and_restoring(widening) -> None:
    model = llama(tied=True)
    keys, bits = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    shown = repr(model)
    peft_ext.accelerate(model, blocks=False)
    head = model.get_base_model().lm_head
    assert repr(model) == shown and list(model.state_dict()) == keys
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert type(twin) is FusedLinear and torch.equal(twin.weight, head.weight)
    twin = copy.deepcopy(model)
    assert twin.get_base_model().lm_head.weight is twin.get_base_model().model.embed_tokens.weight
    first = step(model)[0]
    assert torch.equal(step(twin)[0], first)
    assert peft_ext.accelerate(model, blocks=False) is model and torch.equal(step(model)[0], first)
    peft_ext.restore(model)
    assert [type(module) for module in model.modules()] == kinds and list(model.state_dict()) == keys
    assert all(torch.equal(value, bits[key]) for key, value in model.state_dict().items())
    assert type(twin.get_base_model().lm_head) is FusedLinear


def test_a_float32_model_under_autocast(widening, calls) -> None:
    model = llama(dtype=torch.float32)
    logits, stock = step(model, dtype=BF16)
    want, exact = step(model)
    peft_ext.accelerate(model, blocks=False)
    torch.testing.assert_close(step(model)[0], want)
    assert not calls  # outside of autocast PyTorch computes the product
    assert not any(row.kind == "Linear" for row in peft_ext.explain(model).rows)
    fused, grads = step(model, dtype=BF16)
    assert len(calls) == 1 + 2 * 5 and all(dtype is BF16 for _, _, dtype in calls)
    with torch.autocast("cpu", dtype=BF16):
        assert sum(row.kind == "Linear" and row.fused for row in peft_ext.explain(model).rows) == 11
    assert (fused - want).norm() <= 1.5 * (logits - want).norm() + 2**-9 * want.norm()
    for name, value in exact.items():
        assert (grads[name] - value).norm() <= 1.5 * (stock[name] - value).norm() + 2**-9 * value.norm(), name


def test_a_merged_adapter_leaves_its_base_on_the_op(widening, calls) -> None:
    model = llama().eval()
    stock = copy.deepcopy(model)
    peft_ext.accelerate(model, blocks=False)
    ids = torch.arange(40)[None]
    for one in (model, stock):
        one.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=0, atol=0.02)
    assert len(calls) == 1 + 2 * 7


def test_an_adapter_over_an_accelerated_layer_is_fused(widening) -> None:
    model = llama()
    peft_ext.accelerate(model)
    model.add_adapter("other", peft.LoraConfig(target_modules=["up_proj"]))
    model.set_adapter("other")
    row = next(r for r in peft_ext.explain(peft_ext.accelerate(model)).rows if r.name.endswith("0.mlp.up_proj"))
    assert (row.kind, row.fused, row.reason) == ("LoRA over Linear", True, "")


def test_quantizing_takes_accelerated_layers(widening) -> None:
    model = peft_ext.accelerate(llama())
    peft_ext.quantize_nf4(model, blocksize=32)
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj, peft_ext.nn.NF4Linear)
    assert isinstance(model.get_base_model().lm_head, FusedLinear)


def test_compiled(widening, calls) -> None:
    layer = nn.Linear(64, 96).to(BF16).requires_grad_(False)
    x = randn(9, 64, dtype=BF16)
    peft_ext.accelerate(layer)
    want = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), want)


def test_where_pytorch_multiplies_itself_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "WIDENED", frozenset())
    model = llama()
    peft_ext.accelerate(model)
    assert not any(type(module) is FusedLinear for module in model.modules())
    assert len(peft_ext.explain(model).rows) == 4


def test_the_reference_takes_a_dense_weight() -> None:
    x, weight, bias = randn(5, 64, dtype=BF16), randn(96, 64, dtype=BF16), randn(96, dtype=BF16)
    assert torch.equal(peft_ext.reference.frozen_linear(x, weight, bias), F.linear(x, weight, bias))
    args = ops.checks.weight_args(weight)
    from peft_ext.ops import nf4

    assert torch.equal(nf4._linear_reference(x, *args, bias), F.linear(x, weight, bias))
    assert torch.equal(nf4._linear_backward_reference(x @ weight.t(), *args), (x @ weight.t()) @ weight)
    assert "nf4_linear" in library.OPERATORS


# --- the commands -----------------------------------------------------------------------------------------------------

needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs peft_ext[hf]")


@pytest.mark.slow
@needs_accelerate
def test_a_run_computes_in_what_the_cpu_has(tiny, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_cpu, "why_float32", lambda: NO)
    assert finetune(tiny, tmp_path / "auto") == 0
    assert f"computes in float32: {NO}\n" in capsys.readouterr().out
    found = report(tmp_path / "auto")
    assert found["machine"]["dtype"] == f"float32: {NO}" and found["options"]["dtype"] == "auto"
    assert found["check"]["ok"] and found["check"]["max_difference"] == 0
    assert found["check"]["bound"] < 1e-4 and found["check"]["accelerated_difference"] < 1e-3
    assert NO in (tmp_path / "auto/report.html").read_text()
    assert "no bound: float32 rounds in both" in (tmp_path / "auto/report.html").read_text()
    assert finetune(tiny, tmp_path / "bf16", "--dtype", "bf16") == 0
    asked = report(tmp_path / "bf16")
    assert asked["machine"]["dtype"] == "bfloat16: as asked for"
    # Both runs quantize equal bfloat16 weights to equal NF4 codes, so the losses differ by rounding alone.
    assert asked["losses"] == pytest.approx(found["losses"], rel=5e-3)
    for when in ("before", "after"):
        assert asked["perplexity"][when] == pytest.approx(found["perplexity"][when], rel=1e-2)
    # In the float32 run only the embedding and the norms take more memory; the NF4 codes do not.
    grown = found["memory"]["frozen"] - asked["memory"]["frozen"]
    dense = 2 * (258 * 64 + 5 * 64)
    assert dense <= grown <= 1.1 * dense


@pytest.mark.slow
@needs_accelerate
@pytest.mark.parametrize("method", ["dora", "adalora", "ia3", "prefix"])
def test_methods_in_float32(tiny, tmp_path, capsys, method) -> None:
    if method == "dora":
        pytest.importorskip("bitsandbytes")
    code = finetune(tiny, tmp_path / "out", "--method", method, "--dtype", "fp32", steps=6)
    assert code == 0, capsys.readouterr().err
    assert report(tmp_path / "out")["check"]["ok"]


@pytest.mark.slow
@needs_accelerate
def test_a_stock_run_in_float32_is_the_same_run(tiny, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    for name, options in (("ours", ()), ("stock", ("--stock",))):
        assert finetune(tiny, tmp_path / name, "--dropout", "0", "--dtype", "fp32", *options) == 0
    ours, stock = report(tmp_path / "ours"), report(tmp_path / "stock")
    assert stock["fused"]["fused"] == 0 and ours["fused"]["fused"] == 14
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5)
    assert ours["perplexity"]["after"] == pytest.approx(stock["perplexity"]["after"], rel=1e-5)


@pytest.mark.slow
@needs_accelerate
def test_the_plan_says_what_a_dense_base_takes(tiny, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_cpu, "why_float32", lambda: NO)
    sizes = {}
    for dtype in ("auto", "bf16"):
        assert finetune(tiny, tmp_path / "out", "--dry-run", "--quant", "none", "--dtype", dtype) == 0
        out = " ".join(capsys.readouterr().out.split())
        sizes[dtype] = float(out.partition("frozen weights")[2].split()[0])
        twice = f"float32: {NO}; the dense weights take twice the bytes of bfloat16"
        assert (twice in out) is (dtype == "auto")
    assert sizes["auto"] == pytest.approx(2 * sizes["bf16"], rel=0.5)  # sizes of about 0.2 MiB, read with one decimal


@needs_accelerate
def test_a_dtype_that_is_none_is_refused(tiny, tmp_path, capsys) -> None:
    assert finetune(tiny, tmp_path / "out", "--dtype", "int8") == 2
    assert "--dtype int8: wanted one of auto, bf16, fp32" in capsys.readouterr().err


def test_doctor_and_explain_say_it(tiny, capsys, monkeypatch) -> None:
    monkeypatch.setattr(_cpu, "multiplies", lambda dtype: dtype not in (BF16, FP16))
    monkeypatch.setattr(_cpu, "widened_dtypes", lambda: frozenset({BF16, FP16}))
    monkeypatch.setattr(_cpu, "instruction_sets", lambda: ["avx2", "fma3"])
    assert main(["doctor"]) == 0
    rows = {line[2:28].strip(): line[28:].strip() for line in capsys.readouterr().out.splitlines()}
    assert rows["instruction sets"] == "avx2, fma3"
    assert rows["bfloat16 products"].startswith("torch has no instructions; frozen layers")
    assert rows["finetune computes in"].startswith("float32: ")
    assert main(["explain", str(tiny / "model")]) == 0
    assert "finetune computes in float32 on this machine: " in capsys.readouterr().out
    assert main(["explain", str(tiny / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finetune"]["dtype"] == "float32"


# --- tools/paths.py ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths():
    spec = importlib.util.spec_from_file_location("paths", ROOT / "tools/paths.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["paths"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["paths"]


def test_paths_find_what_is_wrong(paths) -> None:
    fast = paths.Result("avx512_bf16", "bfloat16", 300.0, 3.0, 2000.0, 3.1, 3.0)
    slow = paths.Result("avx2", "float32", 80.0, 12.0, 2500.0, 3.1005, 3.0005)
    assert paths.faults([fast, slow]) == []
    assert "| avx2 | float32 | 80 | 3.75 | 2500 | 3.1005 | 3.0005 |" in paths.table([fast, slow])
    replaced = dataclasses.replace
    assert paths.faults([fast, replaced(slow, tokens_per_s=74.0)]) == [
        "avx2 takes 4.05 times the time of avx512_bf16, wanted at most 4"
    ]
    assert paths.faults([fast, replaced(slow, held_out_after=3.2)])[0].startswith("held_out_after differs: ")
    assert paths.faults([fast, replaced(slow, held_out_after=float("nan"))])
    assert paths.faults([paths.Result("amx", failed="took more than 600 s")]) == ["amx: took more than 600 s"]


def test_paths_without_a_library_are_an_error(paths, monkeypatch, capsys) -> None:
    monkeypatch.setattr(_native, "STATE", _native.NativeState(cpu_error="it was not built"))
    with pytest.raises(SystemExit) as ended:
        paths.main([])
    assert ended.value.code != 0 and "the native library is not loaded: it was not built" in capsys.readouterr().err


def test_paths_end_a_run_that_takes_too_long(paths, tmp_path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 600 & sleep 600\n")
    slow.chmod(0o755)
    assert paths.run("avx2", 1, 0.5, "auto", str(slow)).failed == "took more than 0.5 s"
    slow.write_text("#!/bin/sh\necho no memory\nexit 3\n")
    assert paths.run("avx2", 1, 60, "auto", str(slow)).failed == "exit status 3: no memory"


def test_paths_force_everything_that_multiplies(paths, monkeypatch) -> None:
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = paths.environment("amx")
    assert found["PEFT_EXT_CPU_ISA"] == "amx" and not {"DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA"} & set(found)
    assert AVX2.items() <= paths.environment("avx2").items()
    # LIMITS has every CPU path of the build, except the path that emulates AMX.
    assert set(_native.STATE.build["isas"]) - {"amx_emulated"} <= set(paths.LIMITS)
