"""Tests prefix tuning: plain transformers models with a PrefixEncoder give the results of PEFT's models."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from virtual_token_models import BATCH, GROUPED, MODELS, VOCAB, P, T, make_inputs, make_model, their_encoder, with_peft

from peft_ext.nn.prefix import PrefixEncoder

# Transformers 5.24 renamed the argument for the cache and warns about the name that releases since 5.0 use.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PROJECTION = pytest.mark.parametrize("projection", [False, True], ids=["embedding", "mlp"])
MATCHED = ("llama", "gpt2", "gemma2", "qwen3", "bert", "t5", "t5-even")


def run_prefix(model: nn.Module, prefix: PrefixEncoder, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Returns the logits of a plain model with the prefix."""
    cache = prefix.past_key_values(len(inputs["input_ids"]), model.config, **kwargs)
    if not model.config.is_encoder_decoder:  # an encoder sees no prefix, and a decoder behind an encoder gets no mask
        inputs = {**inputs, "attention_mask": prefix.extend_mask(inputs["attention_mask"])}
    return model(**inputs, past_key_values=cache).logits


def peft_prefix(kind: str, model: nn.Module, **config: Any) -> peft.PeftModel:
    return with_peft(kind, model, peft.PrefixTuningConfig, **config)


def run_peft_prefix(theirs: peft.PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Returns the logits of PEFT's model.

    PEFT's forward for classification uses an argument that transformers 5.24 renamed, and raises an error. For a
    classification model this function passes the cache to the base model instead.
    """
    if theirs.active_peft_config.task_type != "SEQ_CLS":
        return theirs(**inputs).logits
    mask = torch.cat((torch.ones(BATCH, P), inputs["attention_mask"]), dim=1)
    inputs = {**inputs, "attention_mask": mask}
    return theirs.base_model(**inputs, past_key_values=theirs.get_prompt(BATCH)).logits


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
    """A row of the prefix holds, for each layer in turn, the keys of all heads and then the values of all heads."""
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
        assert plain(8, torch.bfloat16).stride(2) == 0  # the prefix is cast once and expanded over the batch


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
    """In Gemma 4, a layer gets the part of the prefix that fits its head_dim, and a layer that reuses another layer's
    keys gets no prefix.
    """
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
    """In Qwen3-Next, linear attention keeps a state instead of keys, and gets no prefix."""
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
    """PEFT's order leaves out every second prefix if the number of layers is even."""
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
    assert prefix.past_key_values(BATCH).get_seq_length() == P  # each call makes a new cache


def test_generation_with_a_prefix() -> None:
    """Greedy generation, with a growing cache, gives the argmax of the forward's logits in each step."""
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
    """Float32 parameters over a bfloat16 model are cast as in PEFT, and the gradient is summed over the batch in
    float32.
    """
    model = make_model("llama").to(torch.bfloat16)
    theirs = peft_prefix("llama", model, prefix_projection=projection)
    prefix = PrefixEncoder.from_config(model.config, P, projection=projection)
    prefix.load_state_dict(their_encoder(theirs).state_dict())
    inputs = make_inputs(model)
    # The configuration still has the dtype before the cast, so the dtype has to be given.
    assert model.config.dtype is not torch.bfloat16
    wanted, got = theirs(**inputs).logits, run_prefix(model, prefix, inputs, dtype=model.dtype)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2)
    if not projection:  # equal inputs give bitwise equal outputs; a sum in bfloat16 differs by 1e-3
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


def encoder(**options: Any) -> PrefixEncoder:
    return PrefixEncoder(2, 2, 4, P, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PrefixEncoder(0, 2, 4, 5), ValueError,
         "PrefixEncoder: num_layers is 0, wanted an integer of at least 1"),
        (lambda: PrefixEncoder(2, 2.0, 4, 5), ValueError, "PrefixEncoder: num_kv_heads is 2.0, wanted an integer"),
        (lambda: PrefixEncoder(2, 2, -4, 5), ValueError, "PrefixEncoder: head_dim is -4"),
        (lambda: PrefixEncoder(2, 2, 4, 0), ValueError, "PrefixEncoder: num_virtual_tokens is 0"),
        (lambda: encoder(hidden_size=8), ValueError, "hidden_size is 8, wanted None without projection"),
        (lambda: encoder(token_dim=8), ValueError, "token_dim is 8, wanted None without projection"),
        (lambda: encoder(projection=True, hidden_size=0), ValueError,
         "hidden_size is 0, wanted an integer of at least 1"),
        (lambda: encoder(projection=True, token_dim=0), ValueError, "token_dim is 0, wanted an integer of at least 1"),
        (lambda: encoder(init_weights="ones"), ValueError, "init_weights is 'ones', wanted None or 'zero'"),
        (lambda: encoder(dtype=torch.int8), TypeError,
         "PrefixEncoder: dtype is torch.int8, wanted one of torch.float32"),
        (lambda: encoder()(0), ValueError, "batch_size is 0, wanted an integer of at least 1"),
        (lambda: encoder()(1, torch.int64), TypeError, "dtype is torch.int64, wanted one of"),
        (lambda: encoder().past_key_values(1, make_model("llama").config), ValueError,
         r"num_layers, num_kv_heads, head_dim are \(2, 2, 4\), wanted \(3, 2, 8\)"),
        (lambda: encoder().load_prompt_embeddings(torch.zeros(5, 31)), ValueError,
         r"prompt_embeddings has shape \(5, 31\), wanted \(5, 32\)"),
        (lambda: encoder().load_prompt_embeddings([0.0]), TypeError, "prompt_embeddings is list, wanted a Tensor"),
        (lambda: encoder(projection=True).load_prompt_embeddings(torch.zeros(5, 32)), ValueError,
         "projection is True, wanted False to load prompt_embeddings"),
        (lambda: PrefixEncoder.from_config(transformers.DeepseekV3Config(), P), ValueError,
         "model_config is DeepseekV3Config with latent attention"),
        (lambda: PrefixEncoder.from_config(transformers.MambaConfig(num_hidden_layers=2), P), ValueError,
         "model_config is MambaConfig, which has no num_attention_heads"),
        (lambda: PrefixEncoder.from_config(transformers.GPT2Config(n_embd=30, n_head=4), P), ValueError,
         "model_config has hidden_size 30, wanted a multiple of its 4 heads"),
    ],
)  # fmt: skip
def test_prefix_errors_name_what_came(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
