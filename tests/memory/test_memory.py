"""Compares estimate_memory with the allocations of real training steps and with exactly known sizes."""

import copy
import math

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from memory_steps import (  # noqa: E402
    BERT,
    BF16,
    GPT2,
    LLAMA,
    MIXTRAL,
    TOKENS,
    adapted,
    assert_near,
    build,
    estimated,
    lora,
    measured,
    one_thread,  # noqa: F401  one_thread is a fixture
)
from packed_formats import FORMATS  # noqa: E402
from peft_models import quantize  # noqa: E402
from tiers import first  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext import memory, methods  # noqa: E402
from peft_ext.memory import KINDS, estimate_memory  # noqa: E402
from peft_ext.ops import cross_entropy  # noqa: E402
from peft_ext.sources.model import AUTO_CLASSES  # noqa: E402
from peft_ext.weights.quantizers import PACKED_FORMATS  # noqa: E402

pytestmark = pytest.mark.cpu_only("the estimated steps run on the CPU or not at all")

# --- a real step ------------------------------------------------------------------------------------------------------


ADALORA = {"init_r": 8, "target_r": 4, "total_step": 100}
STEPS = {
    "LoRA": (LLAMA, lora(), BF16),
    "LoRA, PEFT's own, dropout": (LLAMA, lora(lora_dropout=0.1), {**BF16, "accelerated": False}),
    "LoRA, dropout": (LLAMA, lora(lora_dropout=0.1), BF16),
    "LoRA, checkpointing": (LLAMA, lora(), {**BF16, "checkpointing": True}),
    "LoRA, NF4": (LLAMA, lora(), {**BF16, "nf4": True}),
    "DoRA, NF4": (LLAMA, lora(use_dora=True), {**BF16, "nf4": True}),
    # In float32: the scratch memory of PyTorch's 16-bit products, which the estimate leaves out, is 4 % of this step.
    "prefix": (LLAMA, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10), {}),
    "prompt": (LLAMA, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10), BF16),
    "full": (LLAMA, None, BF16),
    "IA3, checkpointing": (BERT, peft.IA3Config(task_type="SEQ_CLS"), {"checkpointing": True}),
    "IA3, GPT-2": (GPT2, peft.IA3Config(task_type="CAUSAL_LM"), {}),
    "AdaLoRA, checkpointing": (
        BERT,
        peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query", "value", "dense"], **ADALORA),
        {"checkpointing": True},
    ),
}


@pytest.mark.parametrize(
    "name", first(STEPS, ("LoRA", "LoRA, dropout", "LoRA, checkpointing", "DoRA, NF4", "IA3, GPT-2", "prompt"))
)
def test_is_what_a_real_step_allocates(name):
    config, adapter, how = STEPS[name]
    if adapter is None:
        how = {**how, "accelerated": False}
    assert_near(estimated(config, adapter, **{"task_type": "SEQ_CLS"} if config is BERT else {}, **how),
                measured(adapted(config, adapter, **how)))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("format", first(FORMATS, ["mxfp4"]))
def test_packed_formats_too(format: str, dtype: torch.dtype):
    how = {"dtype": dtype, "packed": format}
    estimate, model = estimated(LLAMA, lora(), **how), adapted(LLAMA, lora(), **how)
    assert_near(estimate, measured(model))
    assert estimate == estimate_memory(model, **TOKENS)
    held = [module.packed for module in model.modules() if isinstance(module, peft_ext.nn.PackedLinear)]
    assert estimate.quantization == sum(weight.nbytes - weight.parts[0].nbytes for weight in held)
    assert estimate.parameters == estimated(LLAMA, lora(), dtype=dtype).parameters


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "nf4", "int8", *PACKED_FORMATS])
def test_an_estimate_does_not_depend_on_what_uninitialized_memory_holds(quantization):
    arguments = {**BF16, **TOKENS, "quantization": quantization}
    expected = estimate_memory(LLAMA, lora(), **arguments)
    torch.use_deterministic_algorithms(True)  # PyTorch then fills the result of torch.empty with NaN
    try:
        assert torch.empty(1).isnan()
        assert estimate_memory(LLAMA, lora(), **arguments) == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_packed_layers_on_peft_s_own_layers_too():
    how = {**BF16, "packed": "mxfp4", "accelerated": False}
    assert_near(estimated(LLAMA, lora(use_dora=True), **how), measured(adapted(LLAMA, lora(use_dora=True), **how)))


@pytest.mark.parametrize("how", ["autocast", "padding"])
def test_autocast_and_padding_too(how):
    value = torch.bfloat16 if how == "autocast" else True
    config = LLAMA if how == "padding" else GPT2
    estimate = estimated(config, peft.IA3Config(task_type="CAUSAL_LM"), **{how: value})
    assert_near(estimate, measured(adapted(config, peft.IA3Config(task_type="CAUSAL_LM")), **{how: value}))
    assert estimate.total != estimated(config, peft.IA3Config(task_type="CAUSAL_LM")).total


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bitsandbytes_layers_too(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = build(LLAMA, torch.bfloat16)
    if kind == "nf4":
        model = quantize(model, "bnb nested bfloat16")
    else:
        for parent in list(model.model.layers.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is nn.Linear:
                    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False,
                                                has_fp16_weights=False)  # fmt: skip
                    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
                    setattr(parent, name, layer.to("cpu"))
        model.is_loaded_in_8bit = True
    model = peft.get_peft_model(model, lora())
    wanted = measured(model)
    assert_near(estimate_memory(model, accelerated=False, **TOKENS), wanted)
    assert_near(estimated(LLAMA, lora(), accelerated=False, quantization=kind, dtype=torch.bfloat16), wanted)
    if kind == "nf4":
        assert_near(estimate_memory(model, **TOKENS), measured(peft_ext.accelerate(model)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_of_pytorch_s_product_in_any_dtype(dtype: torch.dtype):
    """Tests experts in float32 and float16: PyTorch's fake kernel of the grouped product accepts only bfloat16."""
    config = lora(target_modules=["q_proj"])
    how = {"dtype": dtype, "accelerated": False}
    assert_near(estimated(MIXTRAL, config, **how), measured(adapted(MIXTRAL, config, **how)))
    full = estimated(MIXTRAL, "full", **how)
    assert full.gradients == full.parameters * dtype.itemsize


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [True, False])
def test_trained_tokens_beside_lora(accelerated: bool):
    """PEFT's wrapper of trained tokens has a tensor with a dot in its name: "token_adapter.trainable_tokens_delta"."""
    config, how = lora(trainable_token_indices=[1, 2, 3]), {**BF16, "accelerated": accelerated}
    estimate = estimated(LLAMA, config, **how)
    model = adapted(LLAMA, config, **how)
    assert estimate.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.adapters == 4 * estimate.trainable == estimate.gradients
    assert_near(estimate, measured(model))
    model.add_adapter("other", lora(trainable_token_indices=[4, 5]))
    more = sum(p.nbytes for name, p in model.named_parameters() if ".other" in name)
    assert estimate_memory(model, accelerated=accelerated, **TOKENS).adapters == estimate.adapters + more


# --- what is known exactly --------------------------------------------------------------------------------------------


def count(config, adapter, task_type=None):
    return estimate_memory(config, adapter, task_type=task_type, batch_size=1, sequence_length=8).trainable


@pytest.mark.slow
def test_counts_parameters():
    bert = transformers.BertConfig()
    assert count(transformers.GPT2Config(), peft.LoraConfig(task_type="CAUSAL_LM")) == 294_912
    assert count(bert, "lora", "SEQ_CLS") == 2_680_322
    assert count(bert, "bitfit", "SEQ_CLS") == 104_450


def test_the_parameters_are_the_models():
    for quantization in (None, "nf4", "int8"):
        estimate = estimate_memory(LLAMA, lora(), quantization=quantization, **TOKENS)
        assert estimate.parameters - estimate.trainable == sum(p.numel() for p in build(LLAMA).parameters())
    assert estimate.trainable == sum(p.numel() for p in adapted(LLAMA, lora()).parameters() if p.requires_grad)


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_weights_to_the_byte(double_quant):
    model = peft_ext.quantize_nf4(build(LLAMA, torch.bfloat16), double_quant=double_quant, progress=False)
    layers = [m.nf4 for m in model.modules() if isinstance(m, peft_ext.nn.NF4Linear)]
    estimate = estimate_memory(LLAMA, lora(), quantization="nf4", double_quant=double_quant, **BF16, **TOKENS)
    assert estimate.quantization == sum(nf4.nbytes - nf4.packed.nbytes for nf4 in layers)
    others = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - sum(nf4.nbytes for nf4 in layers)
    assert estimate.weights == others + sum(nf4.packed.nbytes for nf4 in layers)


def test_a_fused_layer_saves_x_and_s():
    tokens, features, rank = 24, 64, 8
    layer = nn.Sequential(nn.Linear(features, 96, bias=False, dtype=torch.bfloat16))
    model = peft.get_peft_model(layer, peft.LoraConfig(r=rank, target_modules=["0"], lora_dropout=0.5))
    inputs = {"input": torch.empty(tokens, features, dtype=torch.bfloat16)}
    seed = 2 * 8
    assert estimate_memory(model, inputs=inputs).activations == 2 * tokens * features + 4 * tokens * rank + seed
    # PEFT's own layer also saves the dropped x in the adapter's dtype, and the mask where x needs a gradient.
    stock = estimate_memory(model, inputs=inputs, accelerated=False).activations
    assert stock == (2 + 4) * tokens * features + 4 * tokens * rank


def test_a_frozen_layer_saves_nothing():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False).requires_grad_(False))
    tokens = 8
    estimate = estimate_memory(model, inputs={"input": torch.empty(tokens, 64)})
    assert estimate.activations == 4 * tokens * 64  # the input, which the gradient of the first layer's weight needs
    assert estimate.adapters == estimate.gradients == 4 * 64 * 64


def test_checkpointing_saves_the_layers_inputs():
    plain, checkpointing = (
        estimate_memory(LLAMA, lora(), gradient_checkpointing=on, **BF16, **TOKENS) for on in (False, True)
    )
    assert checkpointing.logits == plain.logits
    assert checkpointing.temporary > plain.temporary
    inputs = LLAMA.num_hidden_layers * 2 * 64 * LLAMA.hidden_size * 2
    assert inputs < checkpointing.activations < 4 * inputs < plain.activations


def test_logits_in_float32_and_their_gradient():
    estimate = estimate_memory(LLAMA, lora(), accelerated=False, **BF16, **TOKENS)
    logits = 2 * 64 * 512 * 4
    assert 2 * logits <= estimate.logits <= 3.5 * logits
    # Of a classifier, only the loss counts as logits: one float32 number.
    assert estimate_memory(BERT, "lora", task_type="SEQ_CLS", **TOKENS).logits == 4


def test_a_real_step_has_a_chunk_of_logits(monkeypatch):
    """A stock step holds logits, log probabilities and gradient of 5 MB each; a chunk of peft_ext's loss has 0.5 MB."""
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 2**19)
    large = copy.deepcopy(LLAMA)
    large.vocab_size, logits = 9999, 2 * 64 * 9999 * 4
    stock, ours = (measured(adapted(large, lora(), accelerated=accelerated)) for accelerated in (False, True))
    assert stock - ours > 2 * logits


def test_of_a_model_with_blocks_a_chunk_of_logits():
    config = copy.deepcopy(LLAMA)
    config.vocab_size = 32768
    tokens = {"batch_size": 4, "sequence_length": 1024, "device": "cpu"}
    model = adapted(config, lora(), dtype=torch.bfloat16, accelerated=False)
    stock = estimate_memory(peft_ext.accelerate(model, blocks=False), **tokens).logits
    fused = estimate_memory(peft_ext.accelerate(model), **tokens).logits
    whole, chunk = 4 * 1024 * config.vocab_size * 2, 64 * 2**20
    assert stock > 4 * whole >= 16 * chunk
    assert chunk < fused < 1.3 * chunk


def test_adalora_keeps_importance_scores():
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **ADALORA)
    estimate = estimate_memory(LLAMA, config, **TOKENS)
    assert estimate.optimizer == (2 + 3) * 4 * estimate.trainable


# --- live models ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_live_model_is_estimated_as_its_configuration_and_left_alone():
    model = adapted(LLAMA, lora(lora_dropout=0.1), nf4=True).eval()

    def state():
        tensors = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
        return tensors, [(type(m), m.training, set(m.__dict__), len(m._forward_pre_hooks)) for m in model.modules()]

    before = state()
    live = estimate_memory(model, **TOKENS)
    assert state() == before
    assert live == estimated(LLAMA, lora(lora_dropout=0.1), nf4=True)
    config = lora(lora_dropout=0.1)
    dense = adapted(LLAMA, config, torch.bfloat16, accelerated=False)
    fused, stock = (estimated(LLAMA, config, accelerated=accelerated, **BF16).total for accelerated in (True, False))
    assert estimate_memory(dense, **TOKENS).total == fused
    assert estimate_memory(peft_ext.accelerate(dense), accelerated=False, **TOKENS).total == stock > fused


@pytest.mark.slow
def test_the_meta_device_and_a_real_one():
    with torch.device("meta"):
        meta = build(LLAMA)
    real = estimate_memory(build(LLAMA), lora(), device="cuda", **TOKENS)
    assert estimate_memory(meta, lora(), **TOKENS) == real
    assert estimate_memory(meta, lora(), **BF16, **TOKENS).weights < 0.51 * real.weights


def test_dtype_is_of_the_frozen_weights():
    model = adapted(LLAMA, lora())
    wide, narrow = estimate_memory(model, **TOKENS), estimate_memory(model, **BF16, **TOKENS)
    assert narrow.adapters == wide.adapters and narrow.weights < 0.51 * wide.weights


def test_a_layer_that_is_not_fused_is_estimated_as_peft_runs_it():
    model = peft_ext.accelerate(adapted(LLAMA, lora(lora_bias=True), accelerated=False), blocks=False)
    assert estimate_memory(model, **TOKENS).total == estimate_memory(model, accelerated=False, **TOKENS).total


@pytest.mark.slow
def test_several_adapters():
    model = adapted(LLAMA, lora(), accelerated=False)
    model.add_adapter("other", lora(r=16))
    one = estimate_memory(model, **TOKENS)
    assert one.adapters == 3 * one.gradients  # the inactive adapter is in memory too
    model.base_model.set_adapter(["default", "other"])
    two = estimate_memory(model, **TOKENS)
    assert two.adapters == two.gradients == one.adapters
    assert_near(estimate_memory(peft_ext.accelerate(model), **TOKENS), measured(model))


@pytest.mark.slow
def test_checkpointing_that_is_on_stays_on():
    model = adapted(LLAMA, lora(), checkpointing=True)
    wanted = estimate_memory(adapted(LLAMA, lora()), gradient_checkpointing=True, **TOKENS).total
    assert estimate_memory(model, **TOKENS).total == wanted


@pytest.mark.slow
def test_gpu_sized_models_take_no_memory():
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=2, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    estimate = estimate_memory(config, "lora", quantization="nf4", dtype=torch.bfloat16, **TOKENS)
    assert estimate.parameters > 3.8e9
    # NF4 has half a byte for each element, and the scales.
    assert 0.5 < (estimate.weights - 2 * 2 * 128256 * 8192) / (2 * 855_638_016) < 0.51


def test_transformers_mask_detection_is_put_back():
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    estimate_memory(LLAMA, lora(), **TOKENS)
    with pytest.raises(ValueError, match="depends on the values"):
        estimate_memory(Branches(), inputs={"x": torch.empty(3)})
    assert masking_utils.find_packed_sequence_indices is find


@pytest.mark.parametrize(
    "method", first((method for method in memory.METHODS if method != "full"), ("lora", "qlora", "prompt"))
)
def test_every_method_by_name(method):
    config = BERT if method == "bitfit" else LLAMA
    estimate = estimate_memory(config, method, **TOKENS)
    assert 0 < estimate.trainable < estimate.parameters
    assert estimate == estimate_memory(config, method=method, **TOKENS)
    if method == "rslora":
        assert estimate.total == estimate_memory(config, "lora", **TOKENS).total
    if method == "qlora":
        assert estimate == estimate_memory(config, "lora", quantization="nf4", **TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ada_lora_s_divisor_does_not_train(dtype):
    model = transformers.AutoModelForCausalLM.from_config(LLAMA).to(dtype)
    adapted = peft_ext.get_peft_model(copy.deepcopy(model), methods.make_config(*methods.method_config("adalora")))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert estimate_memory(model, "adalora", **TOKENS).trainable == trainable


@pytest.mark.parametrize(
    "task_type",
    first(["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "CAUSAL_LM"], ["SEQ_CLS", "CAUSAL_LM"]),
)
def test_every_task(task_type):
    for config in (LLAMA, BERT):
        estimate = estimate_memory(config, "ia3", task_type=task_type, **TOKENS)
        with torch.device("meta"):
            auto = getattr(transformers, AUTO_CLASSES[task_type]).from_config(config)
        assert estimate.about.startswith(type(auto).__name__)
        assert estimate.weights <= sum(t.nbytes for t in (*auto.parameters(), *auto.buffers()))
        # The biases of the head may be trainable.
        assert estimate.parameters > sum(p.numel() for p in auto.parameters()) - 4


@pytest.mark.slow
def test_an_encoder_and_decoder():
    config = transformers.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=97)
    estimate = estimate_memory(config, "lora", quantization="nf4", **TOKENS)
    assert estimate.about.startswith("T5ForConditionalGeneration, LORA r=16, nf4")
    assert estimate.logits > 2 * 64 * 97 * 4
    dense = estimate_memory(config, "lora", **TOKENS)
    wo = 2 * 2 * 64 * 128  # T5's wo stays dense, because transformers reads the dtype of its weight
    layers = dense.parameters - dense.trainable - 97 * 64 - wo
    assert 0.85 * 4 * layers < dense.weights - estimate.weights < 4 * layers


# --- what is returned -------------------------------------------------------------------------------------------------


def test_the_peak_adds_up():
    estimate = estimate_memory(LLAMA, lora(), **TOKENS)
    assert estimate.total == sum(estimate.peak.values())
    assert list(estimate.peak) == list(KINDS)
    assert all(getattr(estimate, kind) >= estimate.peak[kind] for kind in KINDS)
    with pytest.raises(TypeError):
        estimate.peak["weights"] = 0


def test_prints_as_a_table():
    estimate = estimate_memory(LLAMA, lora(), quantization="nf4", gradient_checkpointing=True, **TOKENS)
    about, trained, head, *rows, total = str(estimate).split("\n")
    assert about == "LlamaForCausalLM, LORA r=8, nf4, 2 x 64 tokens, adamw, checkpointing"
    assert trained == f"{estimate.trainable:,} of {estimate.parameters:,} parameters train"
    assert [row.split()[0] for row in rows] == list(KINDS)
    assert head.split()[0] == "KiB" and total.split() == ["total", f"{estimate.total / 1024:,.1f}"]


def test_fits():
    estimate = estimate_memory(LLAMA, lora(), **TOKENS)
    gib = estimate.total / 2**30
    assert estimate.fits(gib / 0.9 * 1.001) and not estimate.fits(gib / 0.9 * 0.999)
    assert estimate.fits(gib * 1.001, headroom=0) and not estimate.fits(gib * 0.999, headroom=0)
    for gpu_memory_gb in (0, -1, math.nan):
        with pytest.raises(ValueError, match="gpu_memory_gb is"):
            estimate.fits(gpu_memory_gb)
    with pytest.raises(ValueError, match="headroom is 1"):
        estimate.fits(8, headroom=1)


@pytest.mark.slow
@pytest.mark.parametrize("method, checkpointing", [("lora", True), ("dora", False), ("full", False)])
def test_extrapolates_to_more_layers(method, checkpointing):
    def of(layers):
        config = copy.deepcopy(LLAMA)
        config.num_hidden_layers = layers
        return memory.profile_step(config, method=method, gradient_checkpointing=checkpointing, **TOKENS)[0]

    assert of(2).extrapolate(of(3), 5).estimate("") == of(7).estimate("")


@pytest.mark.slow
def test_extrapolates_to_another_moment():
    """Tests the extrapolation to more layers, where the peak moves from the backward's end to its begin.

    With few layers the peak is at the gradient of the embedding, with many layers at the logits.
    """
    config = copy.deepcopy(LLAMA)
    config.vocab_size = 4096

    def of(layers):
        config.num_hidden_layers = layers
        return memory.profile_step(
            config, method="full", optimizer=None, batch_size=1, sequence_length=96, accelerated=False
        )[0]

    few, many = of(2), of(12)
    assert few.estimate("").peak["gradients"] > 0 == many.estimate("").peak["gradients"]
    assert few.extrapolate(of(3), 10).estimate("") == many.estimate("")


# --- errors -----------------------------------------------------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, input):
        return 2 * input


def merged():
    model = adapted(LLAMA, lora())
    model.merge_adapter()
    return model


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.weight * x if x.sum() > 0 else self.weight


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size is 0, wanted a positive integer"),
        ({"sequence_length": 1.5}, "sequence_length is 1.5, wanted a positive integer"),
        ({"batch_size": None}, "batch_size is None"),
        ({"method": "lorra"}, "method is 'lorra', wanted one of"),
        ({"config": "lorra"}, "method is 'lorra', wanted one of"),
        ({"config": "lora", "method": "dora"}, "config is 'lora' and method 'dora'"),
        ({"config": lora(), "method": "dora"}, "config is a LoraConfig and method 'dora'"),
        ({"optimizer": "adamv"}, "optimizer is 'adamv', wanted one of"),
        ({"quantization": "nf8"}, "quantization is 'nf8', wanted one of"),
        ({"quantization": "nf4", "method": "full"}, "quantized weights don't train"),
        ({"blocksize": 65}, "blocksize is 65"),
        ({"autocast": torch.float32}, "autocast is torch.float32"),
        ({"device": "xla"}, "device is 'xla', wanted 'cpu' or 'cuda'"),
        ({"task_type": "CHAT"}, "task_type is 'CHAT', wanted one of"),
        ({"inputs": {}}, "inputs are given, wanted no batch_size"),
        ({"method": "prefix", "gradient_checkpointing": True}, "prefix tuning does not work with it"),
    ],
)
def test_refuses_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=f"estimate_memory: .*{message}"):
        estimate_memory(LLAMA, **{**TOKENS, **arguments})


LINEAR = {"input": torch.empty(4)}


@pytest.mark.parametrize(
    "kind, message, make, arguments",
    [
        (TypeError, "model is str, wanted an nn.Module or a transformers configuration", lambda: "gpt2", TOKENS),
        (TypeError, "config is dict, wanted a PEFT configuration", lambda: LLAMA, {"config": {"r": 8}, **TOKENS}),
        (TypeError, "dtype is torch.int8", lambda: LLAMA, {"config": lora(), "dtype": torch.int8, **TOKENS}),
        (TypeError, "inputs is list, wanted a mapping", lambda: nn.Linear(4, 4), {"inputs": [torch.empty(4)]}),
        (ValueError, "Linear takes no input_ids, wanted inputs", lambda: nn.Linear(4, 4), TOKENS),
        (ValueError, "no parameter of Linear requires a gradient", lambda: nn.Linear(4, 4).requires_grad_(False),
         {"inputs": LINEAR}),
        (ValueError, "Linear has no gradient_checkpointing_enable", lambda: nn.Linear(4, 4),
         {"inputs": LINEAR, "gradient_checkpointing": True}),
        (ValueError, "model is a PeftModel already", lambda: adapted(LLAMA, lora()), {"config": "dora", **TOKENS}),
        (ValueError, "no gradient reaches a parameter of PeftModelForCausalLM: its adapter is merged, unmerge it first",
         merged, TOKENS),
        (ValueError, "no gradient reaches a parameter of Unused: its loss depends on none", Unused, {"inputs": LINEAR}),
        (ValueError, "the forward of Branches depends on the values of its tensors", Branches,
         {"inputs": {"x": torch.empty(3)}}),
    ],
)  # fmt: skip
def test_refuses_what_it_can_not_trace(kind, message, make, arguments):
    with pytest.raises(kind, match=message):
        estimate_memory(make(), **arguments)
