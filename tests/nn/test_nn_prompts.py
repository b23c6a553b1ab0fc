"""Prefix and prompt tuning: plain Transformers models with the modules compute what PEFT's models compute."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from peft_ext.nn.prefix import PrefixEncoder
from peft_ext.nn.prompt import PromptEmbedding

# Transformers 5.24 calls the argument cache, and warns of the name that its releases since 5.0 take.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

VOCAB, BATCH, T, P = 32, 2, 6, 5
PROJECTION = pytest.mark.parametrize("projection", [False, True], ids=["embedding", "mlp"])

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
DECODER_LAYERS = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_heads": 4, "decoder_start_token_id": 0}

# Each kind of configuration: its class, the model's, its arguments; dropout is off in eval.
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 3}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "num_hidden_layers": 2, "head_dim": 12}),
    # The window is shorter than the prefix.
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "num_hidden_layers": 2, "head_dim": 12,
                                                     "sliding_window": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                               "n_positions": 32}),
    "bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2,
                                                              "n_head": 4, "n_positions": 32}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**SMALL, "num_hidden_layers": 2}),
    "falcon-all-heads": ("FalconConfig", "FalconForCausalLM", {**SMALL, "num_hidden_layers": 2, "multi_query": False}),
    "falcon-new": ("FalconConfig", "FalconForCausalLM", {**SMALL, "num_hidden_layers": 2, "num_kv_heads": 2,
                                                         "new_decoder_architecture": True}),
    "bert": ("BertConfig", "BertForSequenceClassification", {**SMALL, "num_hidden_layers": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "num_layers": 3, "num_decoder_layers": 3}),
    "t5-even": ("T5Config", "T5ForConditionalGeneration", {**T5, "num_layers": 2, "num_decoder_layers": 2}),
    # Heads that do not share d_model out, and a decoder of its own depth: PEFT can't run these.
    "t5-odd-sizes": ("T5Config", "T5ForConditionalGeneration", {**T5, "num_heads": 6, "num_layers": 2,
                                                                "num_decoder_layers": 3}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {"vocab_size": VOCAB, "d_model": 32, "encoder_ffn_dim": 40,
                                                            "decoder_ffn_dim": 40, **DECODER_LAYERS}),
}  # fmt: skip
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "t5-even": "SEQ_2_SEQ_LM"}  # of the others: CAUSAL_LM
MATCHED = ("llama", "gpt2", "gemma2", "qwen3", "bert", "t5", "t5-even")


def make_model(kind: str) -> transformers.PreTrainedModel:
    """A random model whose attention has something to choose from: weights well above the usual 0.02."""
    config_class, model_class, arguments = MODELS[kind]
    own = getattr(transformers, config_class)(**{"initializer_range": 0.3, **arguments})
    return getattr(transformers, model_class)(own).eval().requires_grad_(False)


def make_inputs(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (BATCH, T))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, VOCAB, (BATCH, 4))}
    return {"input_ids": ids, "attention_mask": mask}


def run_prefix(model: nn.Module, prefix: PrefixEncoder, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """The logits of a plain model behind the prefix."""
    cache = prefix.past_key_values(len(inputs["input_ids"]), model.config, **kwargs)
    if not model.config.is_encoder_decoder:  # the encoder sees no prefix, and the decoder is given no mask
        inputs = {**inputs, "attention_mask": prefix.extend_mask(inputs["attention_mask"])}
    return model(**inputs, past_key_values=cache).logits


def peft_prefix(kind: str, model: nn.Module, **config: Any) -> peft.PeftModel:
    config = peft.PrefixTuningConfig(task_type=TASKS.get(kind, "CAUSAL_LM"), num_virtual_tokens=P, **config)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def run_peft_prefix(theirs: peft.PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of PEFT's model. Its forward for classification looks for an argument that Transformers 5.24 has
    renamed, and raises: there, its cache before its base model."""
    if theirs.active_peft_config.task_type != "SEQ_CLS":
        return theirs(**inputs).logits
    mask = torch.cat((torch.ones(BATCH, P), inputs["attention_mask"]), dim=1)
    inputs = {**inputs, "attention_mask": mask}
    return theirs.base_model(**inputs, past_key_values=theirs.get_prompt(BATCH)).logits


def their_encoder(theirs: peft.PeftModel) -> nn.Module:
    return theirs.prompt_encoder["default"]


# --- prefix tuning ----------------------------------------------------------------------------------------------------


@PROJECTION
@pytest.mark.parametrize("kind", MATCHED)
def test_prefix_logits_and_gradients_are_pefts(kind: str, projection: bool) -> None:
    model = make_model(kind)
    theirs = peft_prefix(kind, model, prefix_projection=projection, encoder_hidden_size=24 if projection else None)
    prefix = PrefixEncoder.from_config(model.config, P, projection=projection, hidden_size=24 if projection else None)
    prefix.load_state_dict(their_encoder(theirs).state_dict())
    inputs = make_inputs(model)
    wanted, got = run_peft_prefix(theirs, inputs), run_prefix(model, prefix, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(**inputs).logits, wanted, rtol=1e-2, atol=1e-2)
    direction = torch.randn_like(wanted)
    (wanted * direction).sum().backward()
    (got * direction).sum().backward()
    for (name, mine), other in zip(prefix.named_parameters(), their_encoder(theirs).parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5 * other.grad.abs().max(), msg=name)


@PROJECTION
def test_prefix_state_dict_goes_to_peft(projection: bool) -> None:
    model = make_model("llama")
    theirs = peft_prefix("llama", model, prefix_projection=projection)
    prefix = PrefixEncoder.from_config(model.config, P, projection=projection)
    their_encoder(theirs).load_state_dict(prefix.state_dict())
    inputs = make_inputs(model)
    torch.testing.assert_close(run_prefix(model, prefix, inputs), theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init_weights", [None, "zero"])
@PROJECTION
def test_prefix_starts_as_pefts_from_the_same_seed(projection: bool, init_weights: Any) -> None:
    model = make_model("llama")
    torch.manual_seed(3)
    theirs = peft_prefix("llama", model, prefix_projection=projection, init_weights=init_weights)
    torch.manual_seed(3)
    prefix = PrefixEncoder.from_config(model.config, P, projection=projection, init_weights=init_weights)
    state = their_encoder(theirs).state_dict()
    assert prefix.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in prefix.state_dict().items())
    assert bool(prefix.flattened().any()) is (init_weights is None)
    torch.manual_seed(3)
    again = copy.deepcopy(prefix)
    again.reset_parameters()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


@PROJECTION
def test_prefix_files_are_pefts_both_ways(projection: bool, tmp_path) -> None:
    model = make_model("llama")
    inputs = make_inputs(model)
    theirs = peft_prefix("llama", model, prefix_projection=projection)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    prefix = PrefixEncoder.from_config(model.config, P)
    prefix.load_prompt_embeddings(load_file(file)["prompt_embeddings"])
    torch.testing.assert_close(run_prefix(model, prefix, inputs), theirs(**inputs).logits, rtol=1e-5, atol=1e-5)

    trained = PrefixEncoder.from_config(model.config, P, projection=projection)
    save_file({"prompt_embeddings": trained.flattened().detach()}, file, metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(run_prefix(model, trained, inputs), theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_prefix_layout() -> None:
    """A row is layer by layer the keys, then the values, head by head."""
    prefix = PrefixEncoder(3, 2, 4, P)
    out = prefix(BATCH)
    assert out.shape == (3, 2, BATCH, 2, P, 4)
    rows = prefix.flattened()
    for layer, kind, head in ((0, 0, 0), (1, 0, 1), (2, 1, 1)):
        start = ((layer * 2 + kind) * 2 + head) * 4
        for b in range(BATCH):
            assert torch.equal(out[layer, kind, b, head], rows[:, start : start + 4])


def test_prefix_runs_the_mlp_once_and_copies_nothing() -> None:
    prefix = PrefixEncoder(2, 2, 4, P, projection=True)
    seen = []
    prefix.transform.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    out = prefix(8)
    assert seen == [(P, 8)] and out.stride(2) == 0
    plain = prefix.bake()
    assert plain(8).untyped_storage().data_ptr() == plain.embedding.weight.untyped_storage().data_ptr()
    with torch.no_grad():
        assert plain(8, torch.bfloat16).stride(2) == 0  # cast once, whatever the batch


@pytest.mark.parametrize("kind", MODELS)
def test_prefix_has_the_shapes_that_the_model_caches(kind: str) -> None:
    model = make_model(kind)
    config, inputs = model.config, make_inputs(model)
    prefix = PrefixEncoder.from_config(config, P)
    own = EncoderDecoderCache(DynamicCache(), DynamicCache()) if config.is_encoder_decoder else DynamicCache()
    model(**inputs, past_key_values=own, use_cache=True)
    ours = prefix.past_key_values(BATCH, config)
    if config.is_encoder_decoder:
        assert ours.cross_attention_cache.get_seq_length() == 0
        own, ours = own.self_attention_cache, ours.self_attention_cache
    assert prefix.num_layers == len(ours.layers)
    for layer, filled in zip(ours.layers, own.layers, strict=True):
        assert layer.keys.shape[:2] == layer.values.shape[:2] == filled.keys.shape[:2]
        assert layer.keys.shape[-1] == layer.values.shape[-1] == filled.keys.shape[-1]
    assert ours.get_seq_length() == P
    logits = run_prefix(model, prefix, inputs)
    assert not torch.allclose(logits, model(**inputs).logits, rtol=1e-3, atol=1e-3)


def test_prefix_of_layers_that_differ() -> None:
    """Gemma 4: a layer takes the part that it has room for, one that reuses another's keys takes nothing."""
    layers = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = transformers.Gemma4TextConfig(
        **{**GROUPED, **layers}, head_dim=8, global_head_dim=16, vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8, initializer_range=0.3,
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(config).eval().requires_grad_(False)
    prefix = PrefixEncoder.from_config(config, P)
    assert (prefix.num_layers, prefix.num_kv_heads, prefix.head_dim) == (4, 2, 16)
    with pytest.warns(UserWarning, match="skipped"):
        theirs = peft_prefix("gemma4", model)
        their_encoder(theirs).load_state_dict(prefix.state_dict())
        inputs = make_inputs(model)
        wanted = theirs(**inputs).logits
    got = run_prefix(model, prefix, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    used = prefix.embedding.weight.grad.view(P, 4, 2, 2, 16).abs().sum((0, 2, 3)) > 0
    assert used.sum(1).tolist() == [8, 16, 0, 0]

    with pytest.warns(UserWarning, match=r"layers \[0\] have more than 1 key heads and get no prefix"):
        PrefixEncoder.from_config(
            transformers.Gemma4TextConfig(**{**GROUPED, "num_hidden_layers": 2, "attention_k_eq_v": True},
                                          layer_types=["sliding_attention", "full_attention"], head_dim=8,
                                          global_head_dim=16, num_global_key_value_heads=1), P,
        )  # fmt: skip


def test_prefix_of_some_layers_without_keys() -> None:
    """Qwen3-Next: linear attention keeps a state, not keys; it gets no prefix."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
              "linear_value_head_dim": 8}  # fmt: skip
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
               "shared_expert_intermediate_size": 8}  # fmt: skip
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = transformers.Qwen3NextConfig(**GROUPED, **layers, **linear, **experts, head_dim=8)
    model = transformers.Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    prefix = PrefixEncoder.from_config(config, P)
    run_prefix(model, prefix, make_inputs(model)).square().sum().backward()
    used = prefix.embedding.weight.grad.view(P, 2, -1).abs().sum((0, 2)) > 0
    assert used.tolist() == [False, True]


def test_prefix_order_of_an_encoder_decoder_model() -> None:
    """PEFT's order leaves every second prefix out where the layers are even in number."""
    model = make_model("t5-even")
    prefix, inputs = PrefixEncoder.from_config(model.config, P), make_inputs(model)
    for peft_order, wanted in ((True, [True, False]), (False, [True, True])):
        prefix.zero_grad()
        run_prefix(model, prefix, inputs, peft_order=peft_order).square().sum().backward()
        used = prefix.embedding.weight.grad.view(P, 2, -1).abs().sum((0, 2)) > 0
        assert used.tolist() == wanted


def test_prefix_without_a_config_is_a_plain_cache() -> None:
    model = make_model("llama")
    prefix, inputs = PrefixEncoder.from_config(model.config, P), make_inputs(model)
    cache = prefix.past_key_values(BATCH)
    assert type(cache) is DynamicCache and cache.get_seq_length() == P
    mask = prefix.extend_mask(inputs["attention_mask"])
    logits = model(inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(logits, run_prefix(model, prefix, inputs))
    assert cache.get_seq_length() == P + T
    assert prefix.past_key_values(BATCH).get_seq_length() == P  # a new one each time


def test_generation_with_a_prefix() -> None:
    """Greedy generation, with the cache that grows, is the forward's argmax, step by step."""
    model = make_model("llama")
    prefix, ids = PrefixEncoder.from_config(model.config, P), torch.randint(3, VOCAB, (BATCH, T))
    mask = prefix.extend_mask(torch.ones_like(ids))
    with torch.no_grad():
        cache = prefix.past_key_values(BATCH, model.config)
        got = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False,
                             pad_token_id=0, eos_token_id=None)  # fmt: skip
        for _ in range(4):
            logits = run_prefix(model, prefix, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, ids)


@PROJECTION
def test_prefix_in_the_models_dtype(projection: bool) -> None:
    """Float32 parameters over a bfloat16 model: cast as PEFT casts, the gradient summed over the batch in float32."""
    model = make_model("llama").to(torch.bfloat16)
    theirs = peft_prefix("llama", model, prefix_projection=projection)
    prefix = PrefixEncoder.from_config(model.config, P, projection=projection)
    prefix.load_state_dict(their_encoder(theirs).state_dict())
    inputs = make_inputs(model)
    assert model.config.dtype is not torch.bfloat16  # as of the model before its cast, so it has to be said
    wanted, got = theirs(**inputs).logits, run_prefix(model, prefix, inputs, dtype=model.dtype)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    if not projection:  # the same bits in: the same bits out; a sum in bfloat16 is off by 1e-3
        wanted.sum().backward()
        got.sum().backward()
        torch.testing.assert_close(
            prefix.embedding.weight.grad, their_encoder(theirs).embedding.weight.grad, rtol=1e-6, atol=0
        )
    model.config.dtype = torch.bfloat16
    assert prefix.past_key_values(BATCH, model.config).layers[0].keys.dtype is torch.bfloat16
    assert prefix.past_key_values(BATCH).layers[0].keys.dtype is torch.float32


def test_bake() -> None:
    prefix = PrefixEncoder(2, 2, 4, P, projection=True, hidden_size=3, token_dim=6).eval()
    baked = prefix.bake()
    assert torch.equal(baked(3), prefix(3))
    assert baked.state_dict().keys() == {"embedding.weight"} and not baked.training
    assert baked.embedding.weight.requires_grad and baked.embedding.weight.grad_fn is None
    twin = baked.requires_grad_(False).bake()
    assert not twin.embedding.weight.requires_grad
    assert twin.embedding.weight.data_ptr() != baked.embedding.weight.data_ptr()


@pytest.mark.parametrize(
    ("kind", "count"), [("LlamaConfig", 5_242_880), ("Gemma2Config", 20 * 26 * 2 * 4 * 256)], ids=["llama-7b", "gemma2"]
)
def test_prefix_parameter_count(kind: str, count: int) -> None:
    prefix = PrefixEncoder.from_config(getattr(transformers, kind)(), 20, device="meta")
    assert sum(p.numel() for p in prefix.parameters()) == count
    assert all(p.is_meta and p.requires_grad for p in prefix.parameters())


def test_prefix_errors_name_what_came() -> None:
    for sizes, message in (
        ((0, 2, 4, 5), "num_layers is 0, wanted an integer of at least 1"),
        ((2, 2.0, 4, 5), "num_kv_heads is 2.0, wanted an integer"),
        ((2, 2, -4, 5), "head_dim is -4"),
        ((2, 2, 4, 0), "num_virtual_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=f"PrefixEncoder: {message}"):
            PrefixEncoder(*sizes)
    for argument in ("hidden_size", "token_dim"):
        with pytest.raises(ValueError, match=f"{argument} is 8, wanted None without projection"):
            PrefixEncoder(2, 2, 4, P, **{argument: 8})
        with pytest.raises(ValueError, match=f"{argument} is 0, wanted an integer of at least 1"):
            PrefixEncoder(2, 2, 4, P, projection=True, **{argument: 0})
    with pytest.raises(ValueError, match="init_weights is 'ones', wanted None or 'zero'"):
        PrefixEncoder(2, 2, 4, P, init_weights="ones")
    with pytest.raises(TypeError, match="PrefixEncoder: dtype is torch.int8, wanted one of torch.float32"):
        PrefixEncoder(2, 2, 4, P, dtype=torch.int8)
    prefix = PrefixEncoder(2, 2, 4, P)
    with pytest.raises(ValueError, match="batch_size is 0, wanted an integer of at least 1"):
        prefix(0)
    with pytest.raises(TypeError, match="dtype is torch.int64, wanted one of"):
        prefix(1, torch.int64)
    with pytest.raises(ValueError, match=r"num_layers, num_kv_heads, head_dim are \(2, 2, 4\), wanted \(3, 2, 8\)"):
        prefix.past_key_values(1, make_model("llama").config)
    with pytest.raises(ValueError, match=r"prompt_embeddings has shape \(5, 31\), wanted \(5, 32\)"):
        prefix.load_prompt_embeddings(torch.zeros(5, 31))
    with pytest.raises(TypeError, match="prompt_embeddings is list, wanted a Tensor"):
        prefix.load_prompt_embeddings([0.0])
    with pytest.raises(ValueError, match="projection is True, wanted False to load prompt_embeddings"):
        PrefixEncoder(2, 2, 4, P, projection=True).load_prompt_embeddings(torch.zeros(5, 32))
    with pytest.raises(ValueError, match="model_config is DeepseekV3Config with latent attention"):
        PrefixEncoder.from_config(transformers.DeepseekV3Config(), P)
    with pytest.raises(ValueError, match="model_config is MambaConfig, which has no num_attention_heads"):
        PrefixEncoder.from_config(transformers.MambaConfig(num_hidden_layers=2), P)
    with pytest.raises(ValueError, match="model_config has hidden_size 30, wanted a multiple of its 4 heads"):
        PrefixEncoder.from_config(transformers.GPT2Config(n_embd=30, n_head=4), P)


# --- prompt tuning ----------------------------------------------------------------------------------------------------


def peft_prompt(model: nn.Module) -> peft.PeftModel:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompt_logits_loss_and_gradients_are_pefts(kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind).to(dtype)
    theirs = peft_prompt(model)
    prompt = PromptEmbedding(P, 32)
    prompt.load_state_dict(their_encoder(theirs).state_dict())
    inputs = make_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    wanted = theirs(**inputs, labels=labels)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got = model(**prompt.prepend(embeds, inputs["attention_mask"], labels))
    assert torch.equal(got.logits, wanted.logits) and torch.equal(got.loss, wanted.loss)
    wanted.loss.backward()
    got.loss.backward()
    # In bfloat16 too: the gradient is summed over the batch in float32, where a sum in bfloat16 is off by 1e-3.
    torch.testing.assert_close(
        prompt.embedding.weight.grad, their_encoder(theirs).embedding.weight.grad, rtol=1e-6, atol=0
    )
    assert not torch.allclose(got.logits[:, P:], model(**inputs).logits, rtol=1e-2, atol=1e-2)


def test_prompt_files_are_pefts_both_ways(tmp_path) -> None:
    model = make_model("llama")
    theirs = peft_prompt(model)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    prompt = PromptEmbedding(P, 32)
    prompt.load_prompt_embeddings(load_file(file)["prompt_embeddings"])
    assert torch.equal(prompt.embedding.weight, their_encoder(theirs).embedding.weight)
    save_file({"prompt_embeddings": 2 * prompt.embedding.weight.detach()}, file, metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(their_encoder(theirs).embedding.weight, 2 * prompt.embedding.weight)


def test_prompt_forward_and_its_gradients() -> None:
    prompt = PromptEmbedding(P, 4)
    x = torch.randn(3, T, 4, requires_grad=True)
    y = prompt(x)
    assert y.shape == (3, P + T, 4)
    assert torch.equal(y[:, P:], x) and all(torch.equal(row, prompt.embedding.weight) for row in y[:, :P])
    assert prompt(x.bfloat16()).dtype is torch.bfloat16
    direction = torch.randn_like(y)
    y.backward(direction)
    assert torch.equal(x.grad, direction[:, P:])
    torch.testing.assert_close(prompt.embedding.weight.grad, direction[:, :P].sum(0))
    assert prompt.prompt(7).shape == (7, P, 4)
    assert prompt.prompt(7).data_ptr() == prompt.embedding.weight.data_ptr()  # no copy for the batch


def test_prepend_extends_what_it_is_given() -> None:
    prompt = PromptEmbedding(2, 4)
    x = torch.randn(2, 3, 4)
    assert prompt.prepend(x).keys() == {"inputs_embeds"}
    mask, labels = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.arange(6).view(2, 3)
    out = prompt.prepend(x, mask, labels, token_type_ids=torch.ones(2, 3, dtype=torch.int64))
    assert torch.equal(out["inputs_embeds"], prompt(x))
    assert out["attention_mask"].tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert out["labels"].tolist() == [[-100, -100, 0, 1, 2], [-100, -100, 3, 4, 5]]
    assert out["token_type_ids"].tolist() == [[0, 0, 1, 1, 1]] * 2
    for dtype in (torch.bool, torch.int64, torch.float32):
        extended = prompt.extend_mask(mask.to(dtype))
        assert extended.dtype is dtype and torch.equal(extended.long(), out["attention_mask"])
    assert torch.equal(prompt.extend_labels(labels), out["labels"])


def word_level() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "is", "this", "review", "good", "or", "bad"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("length", [3, 6, 17], ids=["cut", "exact", "repeated"])
def test_from_text_is_pefts(length: int, tmp_path) -> None:
    tokenizer, embedding, text = (
        word_level(),
        nn.Embedding(VOCAB, 8, dtype=torch.bfloat16),
        "is this review good or bad",
    )
    tokenizer.save_pretrained(tmp_path)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=length, token_dim=8, num_transformer_submodules=1,
        prompt_tuning_init="TEXT", prompt_tuning_init_text=text, tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    theirs = peft.PromptEmbedding(config, embedding)
    prompt = PromptEmbedding.from_text(text, tokenizer, embedding, length)
    assert prompt.embedding.weight.dtype is torch.float32
    assert torch.equal(prompt.embedding.weight, theirs.embedding.weight)
    assert prompt.embedding.weight.requires_grad and prompt.num_virtual_tokens == length and prompt.token_dim == 8


def test_from_vocab_is_pefts_from_the_same_seed() -> None:
    embedding = nn.Embedding(VOCAB, 8)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=8, num_transformer_submodules=1,
        prompt_tuning_init="SAMPLE_VOCAB",
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = peft.PromptEmbedding(config, embedding)
    torch.manual_seed(3)
    nn.Embedding(P, 8)  # whose random start theirs has drawn before the tokens
    prompt = PromptEmbedding.from_vocab(embedding, P)
    assert torch.equal(prompt.embedding.weight, theirs.embedding.weight)


def test_from_vocab_draws_rows_and_keeps_a_copy() -> None:
    embedding = nn.Embedding(3, 8)
    draws = [PromptEmbedding.from_vocab(embedding, 40, torch.Generator().manual_seed(s)).embedding for s in (1, 1, 2)]
    rows = {tuple(row) for row in embedding.weight.tolist()}
    assert {tuple(row) for row in draws[0].weight.tolist()} == rows  # of 40 draws, each of 3 comes up
    assert torch.equal(draws[0].weight, draws[1].weight) and not torch.equal(draws[0].weight, draws[2].weight)
    before = embedding.weight.clone()
    with torch.no_grad():
        draws[0].weight.zero_()
    assert torch.equal(embedding.weight, before)


def test_prompt_starts_as_what_the_model_reads() -> None:
    """Gemma scales its embeddings in their module: the prompt starts as scaled ones."""
    config = transformers.Gemma2Config(**{**GROUPED, "num_hidden_layers": 1, "head_dim": 8})
    embedding = transformers.Gemma2ForCausalLM(config).get_input_embeddings()
    prompt = PromptEmbedding.from_text("is bad", word_level(), embedding, 2)
    assert torch.equal(prompt.embedding.weight, embedding(torch.tensor([1, 6])))
    assert not torch.equal(prompt.embedding.weight, embedding.weight[[1, 6]])


def test_prompt_parameter_count() -> None:
    prompt = PromptEmbedding(20, 4096, device="meta")
    assert sum(p.numel() for p in prompt.parameters()) == 81_920 and prompt.embedding.weight.is_meta


def test_prompt_errors_name_what_came() -> None:
    for sizes, message in (((0, 4), "num_virtual_tokens is 0"), ((2, "4"), "token_dim is '4'")):
        with pytest.raises(ValueError, match=f"PromptEmbedding: {message}, wanted an integer of at least 1"):
            PromptEmbedding(*sizes)
    with pytest.raises(TypeError, match="PromptEmbedding: dtype is torch.int8"):
        PromptEmbedding(2, 4, dtype=torch.int8)
    prompt, x = PromptEmbedding(2, 4), torch.randn(2, 3, 4)
    with pytest.raises(TypeError, match="inputs_embeds is int64, wanted one of float32"):
        prompt(torch.zeros(2, 3, dtype=torch.int64))
    for shape in ((3, 4), (2, 3, 5)):
        with pytest.raises(ValueError, match=r"inputs_embeds has shape \(.*\), wanted \[B, T, 4\]"):
            prompt(torch.zeros(shape))
    with pytest.raises(ValueError, match="inputs_embeds is on meta, embedding is on cpu"):
        prompt(x.to("meta"))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 3, 3\), wanted \[B, T\]"):
        prompt.extend_mask(torch.ones(2, 1, 3, 3))
    with pytest.raises(TypeError, match="attention_mask is list, wanted a Tensor"):
        prompt.extend_mask([1])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\), wanted \(2, 3\)"):
        prompt.prepend(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"labels has shape \(2,\), wanted \(2, 3\)"):
        prompt.prepend(x, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"labels is torch.float32, wanted torch.int64 or torch.int32"):
        prompt.extend_labels(torch.zeros(2, 3))
    embedding, tokenizer = nn.Embedding(3, 4), word_level()
    for make in (PromptEmbedding.from_vocab, lambda *a: PromptEmbedding.from_text("is", tokenizer, *a)):
        with pytest.raises(ValueError, match="num_virtual_tokens is 0, wanted an integer of at least 1"):
            make(embedding, 0)
        with pytest.raises(TypeError, match="embedding is Tensor, wanted a module of token embeddings"):
            make(embedding.weight.data, 2)
    with pytest.raises(TypeError, match="PromptEmbedding: dtype is torch.int64"):
        PromptEmbedding.from_vocab(embedding, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="text is list, wanted str"):
        PromptEmbedding.from_text(["is"], tokenizer, embedding, 2)
    with pytest.raises(ValueError, match="text is '', which has no tokens; wanted at least one"):
        PromptEmbedding.from_text("", tokenizer, embedding, 2)
    with pytest.raises(ValueError, match="text has token 6, embedding has 3 rows"):
        PromptEmbedding.from_text("is bad", tokenizer, embedding, 2)


# --- both as modules --------------------------------------------------------------------------------------------------

MODULES: dict[str, Callable[..., nn.Module]] = {
    "prefix": lambda **kwargs: PrefixEncoder(2, 2, 4, P, **kwargs),
    "prefix-mlp": lambda **kwargs: PrefixEncoder(2, 2, 4, P, projection=True, **kwargs),
    "prompt": lambda **kwargs: PromptEmbedding(P, 4, **kwargs),
}
MODULE = pytest.mark.parametrize("kind", MODULES)


def evaluate(module: nn.Module) -> Tensor:
    if isinstance(module, PrefixEncoder):
        return module(2)
    return module(torch.ones(2, 3, 4, dtype=module.embedding.weight.dtype))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@MODULE
def test_copies_are_independent(kind: str, clone: Callable) -> None:
    module = MODULES[kind]()
    evaluate(module).sum().backward()
    twin = clone(module)
    assert torch.equal(evaluate(twin), evaluate(module))
    with torch.no_grad():
        twin.embedding.weight.add_(1.0)
    assert not torch.equal(evaluate(twin), evaluate(module))


@MODULE
def test_dtype_and_meta(kind: str) -> None:
    module = MODULES[kind](dtype=torch.float64)
    assert evaluate(module).dtype is torch.float64
    assert evaluate(module.to(torch.bfloat16)).dtype is torch.bfloat16
    meta = MODULES[kind](device="meta")
    assert evaluate(MODULES[kind]()).dtype is torch.float32
    assert all(p.is_meta and p.dtype is torch.float32 for p in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(MODULES[kind]().state_dict())
    with torch.no_grad():
        for parameter in meta.parameters():
            parameter.fill_(7.0)
    meta.reset_parameters()
    assert not any((p == 7.0).any() for p in meta.parameters())


@MODULE
def test_says_what_it_is(kind: str) -> None:
    text = MODULES[kind]().extra_repr()
    for part in ("num_virtual_tokens=5", "token_dim=4" if kind == "prompt" else "num_kv_heads=2, head_dim=4"):
        assert part in text


@MODULE
def test_traces_without_a_break(kind: str) -> None:
    module = MODULES[kind]()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = batch if kind != "prompt" else torch.randn(batch, 3, 4)
        assert torch.equal(compiled(x), module(x))
