"""Tests what packed weights and packed layers refuse: parts of a wrong shape, layouts of a checkpoint that are not
supported, and PEFT's code that needs a dense weight."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import packed_checkpoints as pc
import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_ext
from peft_ext.integrations.packed.rules import read_rules
from peft_ext.nn import PackedLinear
from peft_ext.weights.fp8 import fp8
from peft_ext.weights.int_groups import int_rows


def test_transposed_scales_and_zero_points_are_refused() -> None:
    codes = torch.zeros(256, 128).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales of fp8 has shape \(1, 2\), wanted \(2, 1\) for shape \(256, 128\)"):
        fp8(codes, torch.ones(1, 2))
    fp8(codes, torch.ones(2))  # a flat tensor is in the order of the blocks
    words = torch.zeros(8, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"scales of int is \[4, 8\], wanted \[8, 4\]"):
        int_rows(words, torch.ones(4, 8), (8, 128))
    with pytest.raises(ValueError, match=r"zero_points of int is \[4, 1\], wanted \[1, 4\]"):
        int_rows(words, torch.ones(8, 4), (8, 128), zero_points=torch.zeros(4, 1, dtype=torch.int32))


def test_peft_s_own_code_over_packed_experts_says_what_to_do(tmp_path: Path) -> None:
    path = pc.write_mixture(tmp_path, "fp8")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=peft_ext.PackedConfig())
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    tokens = torch.arange(9)[None]
    with pytest.raises(RuntimeError, match=r"Experts: .* gate_up_proj is packed, wanted peft_ext.accelerate\(model\)"):
        model(tokens)
    assert peft_ext.accelerate(model)(tokens).logits.isfinite().all()


def test_a_state_dict_of_wrong_bytes_is_one_error_and_changes_nothing() -> None:
    layer = peft_ext.quantize_packed(nn.Sequential(nn.Linear(64, 32)), "mxfp4", progress=False)[0]
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"weight_packed is torch.float32 \(32, 32\), wanted torch.uint8") as caught:
        layer.load_state_dict({**before, "weight_packed": before["weight_packed"].float()})
    assert "Missing" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_packed_layer_is_not_trained_by_modules_to_save() -> None:
    """PyTorch lets 8-bit float codes require a gradient, which they never get."""
    model = peft_ext.quantize_packed(nn.ModuleDict({"q": nn.Linear(64, 64), "v": nn.Linear(64, 64)}), "fp8")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q"], modules_to_save=["v"]))
    layer = adapted.base_model.model["v"]
    with pytest.raises(RuntimeError, match=r"PackedLinear: the codes of a packed weight \(fp8\) require grad"):
        layer(torch.randn(2, 64))


# --- layouts of a checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({}, "gptq"),
        ({"format": "gptq_v2"}, "gptq_v2"),
        ({"format": "GPTQ_V2", "checkpoint_format": None}, "gptq_v2"),
        ({"checkpoint_format": "GPTQ_v2"}, "gptq_v2"),
        ({"checkpoint_format": "gptq", "format": "GPTQ"}, "gptq"),
    ],
)
def test_the_version_of_gptq_has_two_keys(fields: dict[str, Any], version: str) -> None:
    config = {"quant_method": "gptq", "bits": 4, **fields}
    assert read_rules(config).schemes[""].version == version
    other = read_rules({**config, "dynamic": {"+:.*mlp": {"format": "gptq_v2"}}})
    assert (other.schemes[""].version, other.schemes["+:.*mlp"].version) == (version, "gptq_v2")


def test_versions_of_gptq_that_differ_are_refused() -> None:
    config = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "format": "gptq_v2"}
    with pytest.raises(ValueError, match="checkpoint_format of gptq is 'gptq' and format is 'gptq_v2', wanted equal"):
        read_rules(config)
    with pytest.raises(ValueError, match="format of gptq is 'marlin', wanted 'gptq', 'gptq_v2'"):
        read_rules({"quant_method": "gptq", "bits": 4, "format": "marlin"})


def test_scales_of_an_activation_are_refused(tmp_path: Path) -> None:
    """AutoAWQ writes such scales for StarCoder2, GPT-NeoX, GPT-J, BLOOM, MPT and GPTBigCode."""
    path = pc.write(tmp_path, "awq")
    held, quantization = load_file(path / "model.safetensors"), pc.CASES["awq"][0]
    pc.finish(path, {**held, "model.layers.0.mlp.act.scales": torch.ones(pc.INNER)}, quantization)
    with pytest.raises(ValueError, match=r"PackedConfig: the file has model\.layers\.0\.mlp\.act\.scales without"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=peft_ext.PackedConfig())
    pc.finish(path, held, quantization)
    AutoModelForCausalLM.from_pretrained(path, quantization_config=peft_ext.PackedConfig())


# --- methods of PEFT that compute with the weight of a layer ----------------------------------------------------------

BASES = ("fp8", "int8", "nf4")
TOKENS = torch.arange(12).reshape(2, 6)


def packed_llama(base: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2, tie_word_embeddings=False)).eval()  # fmt: skip
    if base == "fp8":
        return peft_ext.quantize_packed(model, "fp8", progress=False)
    if base == "nf4":
        return peft_ext.quantize_nf4(model, progress=False)
    for module in list(model.model.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is nn.Linear:
                scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
                codes = (linear.weight.detach() / scales).round().to(torch.int8)
                weight = int_rows(codes, scales, tuple(codes.shape), bits=8)
                setattr(module, name, PackedLinear.from_packed(weight, ("weight", "weight_scale")))
    return model


def dense_llama(model: LlamaForCausalLM) -> LlamaForCausalLM:
    model = copy.deepcopy(model)
    return peft_ext.dequantize_packed(peft_ext.dequantize_nf4(model, progress=False), progress=False)


def method(name: str, **fields: Any) -> PeftConfig:
    targets = {} if name in ("AdaptionPrompt", "LNTuning", "TrainableTokens") else {
        "target_modules": ["q_proj", "down_proj"]}  # fmt: skip
    return getattr(peft, f"{name}Config")(**{"task_type": "CAUSAL_LM", **targets, **fields})


def lora(**fields: Any) -> PeftConfig:
    return method("Lora", r=4, **fields)


def prompt(name: str, **fields: Any) -> PeftConfig:
    return getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", **{"num_virtual_tokens": 4, **fields})


BD_LORA = {"nblocks": 2, "target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"]}
METHODS = {
    "LORA": lora,
    "LORA bias": lambda: lora(lora_bias=True),
    "LORA gaussian": lambda: lora(init_lora_weights="gaussian"),
    "LORA tokens": lambda: lora(trainable_token_indices=[1]),
    "LORA DoRA": lambda: lora(use_dora=True),
    "LORA QALoRA": lambda: lora(use_qalora=True, qalora_group_size=16),
    "LORA MonteCLoRA": lambda: lora(monteclora_config=peft.MontecloraConfig()),
    "LORA VeLoRA": lambda: lora(velora_config=peft.VeloraConfig()),
    "LORA PiSSA": lambda: lora(init_lora_weights="pissa"),
    "LORA OLoRA": lambda: lora(init_lora_weights="olora"),
    "LORA orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "LORA MiCA": lambda: lora(init_lora_weights="mica"),
    "LORA KaSA": lambda: lora(kasa_config=peft.KasaConfig()),
    "LORA BD-LoRA": lambda: lora(use_bdlora=peft.BdLoraConfig(**BD_LORA)),
    "ADALORA": lambda: method("AdaLora", init_r=4, target_r=2, total_step=10),
    "ADAMSS": lambda: method("Adamss"),
    "ADAPTION_PROMPT": lambda: method("AdaptionPrompt", adapter_len=4, adapter_layers=1),
    "BEFT": lambda: method("Beft"),
    "BOFT": lambda: method("BOFT", boft_block_size=4),
    "C3A": lambda: method("C3A", block_size=16),
    "CARTRIDGE": lambda: prompt("Cartridge"),
    "CPT": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1],
                                  cpt_tokens_type_mask=[1, 2]),
    "DEFT": lambda: method("Deft", r=4),
    "DELORA": lambda: method("Delora"),
    "FOURIERFT": lambda: method("FourierFT", n_frequency=10),
    "FROD": lambda: method("Frod"),
    "GLORA": lambda: method("Glora"),
    "GRALORA": lambda: method("Gralora", r=4, gralora_k=2),
    "GRALORA hybrid": lambda: method("Gralora", r=4, gralora_k=2, hybrid_r=2),
    "HIRA": lambda: method("Hira", r=4),
    "HRA": lambda: method("HRA", r=4),
    "IA3": lambda: method("IA3", feedforward_modules=["down_proj"]),
    "LILY": lambda: method("Lily", r=4, stride_A=1, num_B=2),
    "LN_TUNING": lambda: method("LNTuning"),
    "LN_TUNING q_proj": lambda: method("LNTuning", target_modules=["q_proj"]),
    "LOHA": lambda: method("LoHa"),
    "LOKR": lambda: method("LoKr"),
    "MISS": lambda: method("Miss", r=4),
    "MISS mini": lambda: method("Miss", r=4, init_weights="mini", mini_r=2),
    "MISS bat": lambda: method("Miss", r=4, init_weights="bat"),
    "MULTITASK_PROMPT_TUNING": lambda: prompt("MultitaskPromptTuning", num_tasks=1),
    "OFT": lambda: method("OFT", oft_block_size=4, r=0),
    "OSF": lambda: method("OSF"),
    "PEANUT": lambda: method("Peanut", r=4),
    "POLY": lambda: method("Poly", r=4, n_tasks=1),
    "PREFIX_TUNING": lambda: prompt("PrefixTuning"),
    "PROMPT_TUNING": lambda: prompt("PromptTuning"),
    "PSOFT": lambda: method("Psoft", r=4),
    "PVERA": lambda: method("Pvera", r=4),
    "P_TUNING": lambda: prompt("PromptEncoder", encoder_hidden_size=16),
    "RANDLORA": lambda: method("RandLora", r=4),
    "ROAD": lambda: method("Road", group_size=16),
    "SHADOW": lambda: peft.ShadowConfig(task_type="CAUSAL_LM"),
    "SHIRA": lambda: method("Shira", r=1),
    "SUPERTUNING": lambda: method("Supertuning"),
    "TINYLORA": lambda: method("TinyLora"),
    "TRAINABLE_TOKENS": lambda: method("TrainableTokens", token_indices=[1, 2]),
    "UNILORA": lambda: method("UniLora", r=4, theta_d_length=64),
    "VBLORA": lambda: method("VBLoRA", vector_length=16, num_vectors=8, topk=2),
    "VERA": lambda: method("Vera", r=4),
    "WAVEFT": lambda: method("WaveFT", n_frequency=10),
}  # fmt: skip
REFUSED = {
    "LORA PiSSA", "LORA OLoRA", "LORA orthogonal", "LORA MiCA", "LORA KaSA", "LORA BD-LoRA", "ADAMSS", "DEFT", "DELORA",
    "FROD", "GLORA", "HIRA", "HRA", "LN_TUNING q_proj", "MISS bat", "OSF", "PEANUT", "PSOFT", "SHADOW", "SHIRA",
    "SUPERTUNING", "TINYLORA", "UNILORA",
}  # fmt: skip
REFUSED_OVER = {"fp8": {"ADAPTION_PROMPT"}, "int8": set(), "nf4": {"LOHA", "LOKR"}}


def spread(model: nn.Module) -> nn.Module:
    """Adds random numbers to the trained parameters, as after some training."""
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def outputs(model: nn.Module, name: str) -> Tensor:
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if name in ("POLY", "MULTITASK_PROMPT_TUNING") else {}
    torch.manual_seed(3)  # MonteCLoRA and PVeRA draw random numbers
    with torch.no_grad():
        return model(input_ids=TOKENS, **tasks).logits


def adapted(model: nn.Module, name: str) -> nn.Module:
    torch.manual_seed(1)
    return spread(peft_ext.get_peft_model(model, METHODS[name](), accelerate=False))


def check_method(name: str, base: str) -> None:
    model = packed_llama(base)
    if name in REFUSED | REFUSED_OVER[base]:
        with pytest.raises(ValueError, match=f"get_peft_model: {name.split()[0]}.* would compute with the codes of "
                                             r"the packed weight of model.*_proj \((Packed|NF4)Linear\)"):  # fmt: skip
            peft_ext.get_peft_model(model, METHODS[name]())
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        return
    wanted = outputs(adapted(dense_llama(model), name), name)
    found = adapted(model, name)
    torch.testing.assert_close(outputs(found, name), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(peft_ext.accelerate(found), name), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ["HRA", "MISS bat", "LOHA", "OFT", "TRAINABLE_TOKENS"])
def test_some_methods_of_peft_over_packed_layers(name: str, base: str) -> None:
    check_method(name, base)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore")
def test_each_method_of_peft_over_packed_layers(base: str) -> None:
    """Each method is refused, or its logits are those of the same adapter over the dequantized layers."""
    known = {
        kind.value for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__module__.startswith("peft.")
    }
    assert {name.split()[0] for name in METHODS} == known - {"XLORA"}  # X-LoRA calls layers of LoRA
    for name in METHODS:
        if name != "ADAMSS" or importlib.util.find_spec("sklearn"):  # AdamssConfig needs scikit-learn
            check_method(name, base)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": "all-linear"}, "model.layers.0.self_attn.q_proj"),
        ({"target_modules": None}, "model.layers.0.self_attn.q_proj"),
        ({"target_modules": r".*\.down_proj"}, "model.layers.0.mlp.down_proj"),
        ({"target_modules": ["v_proj", "o_proj"], "exclude_modules": ["v_proj"]}, "model.layers.0.self_attn.o_proj"),
        ({"target_modules": ["lm_head"]}, None),
        ({"target_modules": ["v_proj", "lm_head"], "exclude_modules": ["v_proj"]}, None),
    ],
)
def test_only_packed_targets_count(fields: dict[str, Any], text: str | None, tmp_path: Path) -> None:
    config = method("HRA", r=4, **fields)
    if text is None:
        adapted = peft_ext.get_peft_model(packed_llama("fp8"), config)
        assert [row.name for row in peft_ext.explain(adapted).rows if row.kind.startswith("HRA")]
        return
    with pytest.raises(ValueError, match=f"get_peft_model: HRA would compute .* weight of {text} "):
        peft_ext.get_peft_model(packed_llama("fp8"), copy.deepcopy(config))
    get_peft_model(dense_llama(packed_llama("fp8")), config).save_pretrained(tmp_path)
    beside = peft_ext.get_peft_model(packed_llama("fp8"), lora())
    for model in (packed_llama("fp8"), beside):
        with pytest.raises(ValueError, match="load_adapter: HRA would compute with the codes of the packed weight of"):
            peft_ext.load_adapter(model, tmp_path, "other")
    assert list(beside.peft_config) == ["default"]


@pytest.mark.parametrize(("name", "text"), [("HRA", "HRA"), ("MISS bat", "MISS with init_weights 'bat'"),
                                            ("LORA KaSA", "LORA with kasa_config")])  # fmt: skip
def test_explain_and_accelerate_tell_of_codes_that_peft_s_code_reads(name: str, text: str) -> None:
    model = get_peft_model(packed_llama("int8"), METHODS[name]())
    with pytest.warns(UserWarning, match=f"accelerate: {text} computes with the codes .* of .*q_proj .2 in all.*wrong"):
        peft_ext.accelerate(model)
    rows = [row for row in peft_ext.explain(model).rows if "over PackedLinear" in row.kind]
    assert len(rows) == 2 and not any(row.fused for row in rows)
    assert all("computes with the codes of the packed weight" in row.reason for row in rows)
    peft_ext.accelerate(get_peft_model(packed_llama("int8"), METHODS["OFT"]()))
