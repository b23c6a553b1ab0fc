"""Tests of attention in a model's own forward: the operator runs for calls that it accepts, and the model's function
runs for other calls.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
import transformers as hf
from fused_parts import assert_alike, assert_taken_back
from peft import LoraConfig, get_peft_model
from tiers import first
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peft_ext
from peft_ext import _native
from peft_ext.integrations.model_blocks import attention

pytestmark = pytest.mark.skipif(_native.STATE.isa not in attention._PATHS, reason="PyTorch's own is used on this path")

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPS = {**SMALL, "num_key_value_heads": 2}
# Architectures that cover grouped heads, several head sizes, norms of q and k, windows, experts, and values of another
# size than keys.
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPS)),
    "Qwen 2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPS)),
    "Qwen 3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPS, head_dim=24)),
    "Mistral, window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPS, sliding_window=5)),
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPS, num_local_experts=4)),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, attn_pdrop=0.0,
                                                      resid_pdrop=0.0, embd_pdrop=0.0)),  # fmt: skip
    "OPT": lambda: hf.OPTForCausalLM(hf.OPTConfig(**{**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32})),
    "DeepSeek-V3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(
        **SMALL, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1,
        first_k_dense_replace=1)),
}  # fmt: skip
IDS = torch.arange(3, 83).view(2, 40)


def build(
    make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0, dropout: float = 0.0
) -> nn.Module:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(make().to(dtype), config).train()


class Calls(TorchDispatchMode):
    """Counts the calls of the operators that compute attention, and of PyTorch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = self.plain = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ours += func is torch.ops.peft_ext.scaled_dot_product_attention.default
        self.ours += func is torch.ops.peft_ext.decoder_layer.default
        self.plain += "flash_attention" in str(func) or "_softmax" in str(func)
        return func(*args, **(kwargs or {}))


def step(model: nn.Module, **more: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**{"input_ids": IDS, "labels": IDS} | more).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def calls(model: nn.Module, **more: Any) -> int:
    with Calls() as counted, torch.no_grad():
        model(**{"input_ids": IDS} | more)
    return counted.ours


def rows(model: nn.Module) -> list[tuple[bool, str]]:
    return [(row.fused, row.reason) for row in peft_ext.explain(model).blocks if row.kind == "attention"]


def left_padding() -> Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :13] = 0
    return mask


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_step_is_the_stock_one(name: str, masked: bool) -> None:
    stock, model = build(DECODERS[name]), peft_ext.accelerate(build(DECODERS[name]))
    more = {"attention_mask": left_padding()} if masked else {}
    assert rows(model) == [(True, "")] * 2 and calls(model, **more) == 2 and calls(stock, **more) == 0
    assert_alike(step(model, **more), step(stock, **more))


@pytest.mark.parametrize("name", first(["Llama", "GPT-2", "DeepSeek-V3"], ["Llama"]))
def test_bfloat16_is_as_good_as_stock(name: str) -> None:
    errors = [0.0, 0.0]
    for seed in range(6):  # several seeds, because one model alone may agree by chance
        exact = step(build(DECODERS[name], seed=seed))
        narrow = [build(DECODERS[name], torch.bfloat16, seed) for _ in errors]
        for i, model in enumerate((narrow[0], peft_ext.accelerate(narrow[1]))):
            found = step(model)
            errors[i] += sum((found[key].double() - value).norm() ** 2 for key, value in exact.items()).item()
    assert errors[1] <= 1.3**2 * errors[0]


def test_encoders_see_all_but_the_padding() -> None:
    def make() -> nn.Module:
        config = hf.BertConfig(**SMALL, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
        return hf.BertForMaskedLM(config)

    stock, model = build(make), peft_ext.accelerate(build(make))
    padding = left_padding().flip(1)
    for more in ({}, {"attention_mask": padding}):
        assert calls(model, **more) == 2
        assert_alike(step(model, **more), step(stock, **more))


RELATIVE: dict[str, Callable[..., nn.Module]] = {
    "T5": lambda **how: hf.T5ForConditionalGeneration(hf.T5Config(**T5 | how)),
    "UMT5": lambda **how: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5 | how)),
}
# Sizes of T5, with more keys than buckets of relative positions. T5's attention has no scale.
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
      "decoder_start_token_id": 0, "pad_token_id": 0, "relative_attention_num_buckets": 8,
      "relative_attention_max_distance": 16}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", RELATIVE)
def test_relative_positions_are_added_to_the_scores(name: str, masked: bool) -> None:
    stock, model = build(RELATIVE[name]), peft_ext.accelerate(build(RELATIVE[name]))
    more = {"labels": IDS[:, :21].contiguous()} | ({"attention_mask": left_padding().flip(1)} if masked else {})
    assert rows(model) == [(True, "")] * 6 and calls(model, **more) == 6 and calls(stock, **more) == 0
    assert_alike(step(model, **more), step(stock, **more))
    # Under autocast PyTorch's attention function rounds the position bias, and so does peft_ext.
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(model, **more) == 6


def test_dropout_with_relative_positions_is_of_the_operator() -> None:
    model = peft_ext.accelerate(build(functools.partial(RELATIVE["T5"], dropout_rate=0.3)))
    more = {"labels": IDS[:, :21].contiguous()}
    assert calls(model, **more) == 6
    first = step(model, **more)
    assert all(torch.equal(value, first[name]) for name, value in step(model, **more).items())


def test_relative_positions_that_train_are_the_models_own() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False,
                            modules_to_save=["relative_attention_bias"])  # fmt: skip
        return get_peft_model(RELATIVE["T5"](), config).train()

    stock, model = make(), peft_ext.accelerate(make())
    more = {"labels": IDS[:, :21].contiguous()}
    with Calls() as counted:
        found = step(model, **more)
    assert counted.ours == 2  # only the decoder's attention to the encoder has no position bias
    assert any("relative_attention_bias" in name for name in found)
    assert_alike(found, step(stock, **more))


def test_who_sees_nothing_beside_relative_positions() -> None:
    """The mask adds a finite number to the scores of hidden keys; a query all of whose keys are hidden therefore sees
    all keys."""
    stock, model = build(RELATIVE["T5"]), peft_ext.accelerate(build(RELATIVE["T5"]))
    mask = torch.ones_like(IDS)
    mask[1] = 0
    more = {"labels": IDS[:, :21].contiguous(), "attention_mask": mask}
    assert calls(model, **more) < 6
    assert_alike(step(model, **more), step(stock, **more))


def test_a_decoder_that_looks_at_an_encoder() -> None:
    def make() -> nn.Module:
        config = hf.BartConfig(vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                               decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
                               pad_token_id=0)  # fmt: skip
        return hf.BartForConditionalGeneration(config)

    stock, model = build(make), peft_ext.accelerate(build(make))
    more = {"attention_mask": left_padding().flip(1), "labels": IDS[:, :21].contiguous()}
    assert calls(model, **more) == 3  # two self-attentions and one attention to the other sequence
    assert_alike(step(model, **more), step(stock, **more))


def test_packed_texts_see_their_own() -> None:
    stock, model = build(DECODERS["Llama"]), peft_ext.accelerate(build(DECODERS["Llama"]))
    positions = {"position_ids": torch.arange(40).remainder(17).expand(2, 40), "use_cache": False}
    assert calls(model, **positions) == 2
    assert_alike(step(model, **positions), step(stock, **positions))
    with torch.no_grad():
        packed = model(IDS, **positions).logits
        alone = model(IDS[:, 17:34], use_cache=False).logits
    torch.testing.assert_close(packed[:, 17:34], alone, rtol=1e-4, atol=1e-4)


def test_generation_is_the_stock_one() -> None:
    """In generation operators compute the attention of the prompt and that of new tokens."""
    stock, model = (m.eval() for m in (build(DECODERS["Llama"]), peft_ext.accelerate(build(DECODERS["Llama"]))))
    more = {"max_new_tokens": 9, "do_sample": False, "attention_mask": left_padding()}
    with Calls() as counted:
        found = model.generate(IDS, **more)
    assert torch.equal(found, stock.generate(IDS, **more))
    assert counted.ours == 2 * 9 and counted.plain == 0


def dropping() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPS, attention_dropout=0.2))


def test_dropout_of_probabilities_is_the_operators() -> None:
    """The operator draws another dropout mask than PyTorch, so only means and deviations over many calls agree with
    stock attention.
    """
    model = peft_ext.accelerate(build(dropping))
    assert calls(model) == 2
    wanted = step(model)
    assert_alike(step(model), wanted)
    model.eval()
    assert calls(model) == 2 and (step(model)["loss"] - wanted["loss"]).abs() > 1e-4
    q, k, v = (torch.randn(2, heads, 20, 8) for heads in (4, 2, 2))
    module, found = nn.Module(), []
    module.num_key_value_groups = 2
    for function in (sdpa_attention_forward, attention.sdpa_attention_forward):
        drawn = torch.stack([function(module, q, k, v, None, dropout=0.3)[0] for _ in range(400)])
        found.append((drawn.mean(0), drawn.std(0)))
    exact, _ = sdpa_attention_forward(module, q, k, v, None)
    (stock_mean, stock_std), (mean, std) = found
    assert (mean - exact).norm() < 1.2 * (stock_mean - exact).norm()
    torch.testing.assert_close(std.norm(), stock_std.norm(), rtol=0.05, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = peft_ext.accelerate(build(dropping, dropout=0.2))
    wanted = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_alike(step(model, use_cache=False), wanted)


def test_what_takes_it_back() -> None:
    assert_taken_back(build(DECODERS["GPT-2"]), step, calls, rows)


# --- what is PyTorch's or the model's own -----------------------------------------------------------------------------


def test_another_implementation_is_the_models() -> None:
    model = peft_ext.accelerate(build(DECODERS["Llama"]))
    model.get_base_model().config._attn_implementation = "eager"
    assert calls(model) == 0
    assert rows(model) == [(False, "its attention implementation is eager")] * 2


def test_a_function_of_others_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that replaces transformers' sdpa function, before or after ``accelerate``, is called. When
    transformers' function is back, the attention is fused again.
    """
    model, seen = peft_ext.accelerate(build(DECODERS["Llama"])), []

    def other(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append(q.shape)
        return q.transpose(1, 2).contiguous(), None

    with monkeypatch.context() as patched:
        patched.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)
        assert calls(model) == 0 and len(seen) == 2
        assert (
            rows(model)
            == [(False, "its attention implementation is sdpa, and the function there is none of the known forms")] * 2
        )
        again = peft_ext.accelerate(build(DECODERS["Llama"]))
        assert calls(again) == 0 and rows(again) == rows(model)
    assert rows(model) == [(True, "")] * 2 and calls(model) == 2


def test_a_wrapper_of_transformers_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper around transformers' function must run, since it may do more than the function."""
    seen = []

    @functools.wraps(sdpa_attention_forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", watched)
    model = peft_ext.accelerate(build(DECODERS["Llama"]))
    assert calls(model) == 0 and len(seen) == 2 and not any(fused for fused, _ in rows(model))


ELSEWHERE = """
import sys, torch
sys.path[:0] = sys.argv[2:]
import test_attention_of_models as tests

model = torch.load(sys.argv[1], weights_only=False)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
tests.step(model, use_cache=False)
assert tests.calls(model, use_cache=False) == 2
assert tests.rows(model) == [(True, "")] * 2
"""


@pytest.mark.slow
def test_a_model_that_was_pickled_trains_in_another_process(tmp_path: Path) -> None:
    """The process that unpickles the model has called no accelerate, and its first step runs under checkpointing."""
    torch.save(peft_ext.accelerate(build(DECODERS["Llama"])), tmp_path / "model.pt")
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "model.pt"), str(here), str(here.parent / "support")],
        check=True,
    )


def test_whoever_chooses_pytorchs_formula_gets_it() -> None:
    model = peft_ext.accelerate(build(DECODERS["Llama"]))
    with sdpa_kernel(SDPBackend.MATH):
        assert calls(model) == 0
    assert calls(model) == 2


@pytest.mark.slow
def test_a_compiled_model_has_the_operator_in_one_graph() -> None:
    model = peft_ext.accelerate(build(DECODERS["Llama"]))
    torch._dynamo.reset()
    called, graphs = [], 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        nonlocal graphs
        graphs += 1
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    assert_alike(step(compiled), {f"_orig_mod.{k}" if k != "loss" else k: v for k, v in step(model).items()})
    names = ("scaled_dot_product_attention", "rms_norm", "rotary_embedding", "lora_linear")
    counts = {name: sum(f"peft_ext.{name}." in target for target in called) for name in names}
    assert graphs == 1 and counts == {"scaled_dot_product_attention": 2, "rms_norm": 5, "rotary_embedding": 2,
                                      "lora_linear": 14}  # fmt: skip


def test_autocast_computes_it_in_bfloat16() -> None:
    stock, model = build(DECODERS["Llama"]), peft_ext.accelerate(build(DECODERS["Llama"]))
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(model) == 2
        torch.testing.assert_close(model(IDS, labels=IDS).loss, stock(IDS, labels=IDS).loss, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("keys, of_ours", [({True: 40, False: 39}, 2), ({True: 39, False: 39}, 0)], ids=["few", "many"])
def test_more_keys_on_amx_are_pytorchs_own(
    keys: dict[bool, int], of_ours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AMX, in bfloat16 without dropout, PyTorch's scaled_dot_product_attention runs for many keys.

    The test counts the calls of peft_ext's attention operator.
    """
    model = peft_ext.accelerate(build(DECODERS["Llama"], torch.bfloat16))
    wide = peft_ext.accelerate(build(DECODERS["Llama"]))
    monkeypatch.setattr(type(_native.STATE), "isa", property(lambda _: "amx"))
    monkeypatch.setattr(attention, "_MOST_KEYS_ON_AMX", keys)
    assert calls(model) == of_ours and calls(wide) == 2
    assert calls(model, attention_mask=left_padding()) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(wide) == of_ours
    dropped = peft_ext.accelerate(build(dropping))
    with torch.autocast("cpu", torch.bfloat16):
        assert calls(dropped) == calls(dropped, attention_mask=left_padding()) == 2


KINDS = ("added mask", "few queries", "scale", "position bias", "position bias of more keys", "position bias of others",
         "position bias and a mask", "position bias and a float", "k's dtype", "heads", "another mask's size",
         "more keys", "not causal", "scores to return", "NumPy's scale", "infinite scale")  # fmt: skip


@pytest.mark.parametrize("what", KINDS)
def test_calls_of_any_kind_give_what_the_function_gives(what: str) -> None:
    """peft_ext's function and transformers' function give equal values, gradients and errors for a call of this
    kind."""
    q, k, v = (torch.randn(2, heads, 20, 8, requires_grad=True) for heads in (4, 2, 2))
    module, mask, more = nn.Module(), None, {"scaling": 0.3}
    module.num_key_value_groups, module.is_causal = 2, what != "not causal"
    if what == "added mask":
        mask = torch.randn(2, 1, 20, 20)
    elif what == "few queries":
        q, k, v = q[:, :, :3], k[:, :, :3], v[:, :, :3]
    elif what == "scale":
        more["scaling"] = -0.3
    elif what.startswith("position bias"):
        more["position_bias"] = torch.randn(1, 4, 20, 20)
        if what.endswith("more keys"):  # with causal attention, no query sees the second half of the keys
            k, v = (torch.cat((x, x), 2) for x in (k, v))
            more["position_bias"] = torch.randn(1, 4, 20, 40)
        elif what.endswith("of others"):
            more["position_bias"] = torch.randn(1, 3, 20, 20)
        elif what.endswith("a mask"):  # with this mask, one query sees no key
            mask = torch.rand(2, 1, 20, 20) > 0.5
            mask[1, :, 3] = False
        elif what.endswith("a float"):
            mask = torch.randn(2, 1, 20, 20)
    elif what == "k's dtype":
        k = k.double()
    elif what == "heads":
        module.num_key_value_groups = 1
    elif what == "another mask's size":
        mask = torch.ones(2, 1, 20, 19, dtype=torch.bool)
    elif what == "more keys":
        k, v = (torch.cat((x, x), 2) for x in (k, v))
    elif what in ("NumPy's scale", "infinite scale"):
        more["scaling"] = np.float32(0.3) if what == "NumPy's scale" else float("inf")
    elif what == "scores to return":
        more["output_attentions"] = True
    found = []
    for function in (sdpa_attention_forward, attention.sdpa_attention_forward):
        try:
            y, none = function(module, q, k, v, mask, **more)
            assert none is None
            found.append([y, *torch.autograd.grad(y.sum(), (q, k, v))])
        except RuntimeError as error:
            found.append(str(error))
    if isinstance(found[0], str):
        assert found[0] == found[1]
        return
    for value, wanted in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_memory_of_a_step_is_estimated_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask, stock attention repeats and saves the keys and values for each query head; the operator does not."""
    model = peft_ext.accelerate(build(DECODERS["Llama"]))
    found = peft_ext.estimate_memory(model, batch_size=4, sequence_length=300, padding=True)
    monkeypatch.setattr(attention, "_PATHS", ())
    plain = peft_ext.estimate_memory(model, batch_size=4, sequence_length=300, padding=True)
    assert plain.total - found.total >= 2 * 2 * 4 * 300 * (32 - 16) * 4, (plain, found)


@pytest.mark.parametrize("more", [{}, {"position_ids": torch.arange(20)}, {"encoder_hidden_states": None}, {"heat": 2}],
                         ids=str)  # fmt: skip
def test_a_call_with_an_argument_that_is_not_known_is_transformers(more: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, real = [], attention.by_operator
    monkeypatch.setattr(attention, "by_operator", lambda *args: taken.append(1) or real(*args))
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    found = attention.sdpa_attention_forward(nn.Module(), q, k, v, None, **more)[0]
    torch.testing.assert_close(found, sdpa_attention_forward(nn.Module(), q, k, v, None)[0])
    assert bool(taken) is ("heat" not in more)


@pytest.mark.parametrize("window", [5, None])
def test_an_attention_function_gets_the_window_of_the_configuration(window: Optional[int], monkeypatch: Any) -> None:
    """Mistral's attention reads the window from its configuration in each call."""
    given = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["sliding_window"])
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "noted", noted)
    model = peft_ext.accelerate(build(DECODERS["Mistral, window"])).eval()
    parts = [part.kind for part in peft_ext.explain(model).blocks if part.fused]
    assert parts.count("rotary positions") == 2
    model.set_attn_implementation("noted")
    model.config.sliding_window = window
    with torch.no_grad():
        model(IDS)
    model(IDS)
    assert given == [window] * 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(hf, "FlintConfig"), reason="this transformers has no Flint")
def test_layers_of_flint_without_rotary_positions() -> None:
    """Only the layers with a sliding window rotate q and k. A fused forward would rotate in every layer."""
    torch.manual_seed(0)
    config = hf.FlintConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=["full_attention", "sliding_attention"], sliding_window=8,
        num_experts=0,
    )  # fmt: skip
    model, ids = hf.FlintForCausalLM(config).eval(), torch.arange(12)[None]
    wanted = model(ids).logits
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    torch.testing.assert_close(peft_ext.accelerate(model)(ids).logits, wanted)
