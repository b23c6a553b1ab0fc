"""Tests that adapter layers with one input are computed together where a row of the table of forms names the layers.

A layer must never return a stale result.
"""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tiny_models import OperatorCalls
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

import peft_ext
from peft_ext.integrations.forms import REGISTERED, Row, form_of, row_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from reads_of_attention import attention_formulas, groups_in

NAMES = ("q_proj", "k_proj", "v_proj")
T, K = 40, 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, 96), nn.Linear(K, 32, bias=False), nn.Linear(K, 32)

    def forward(self, x: Tensor, between: Callable[[Any, Tensor], None] = lambda module, x: None) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        between(self, x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q, k, v


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds a row for the attention of these tests to the table of forms."""
    digest = form_of(Attention).digest
    monkeypatch.setitem(REGISTERED, digest, Row(digest, "projections", (("inputs", "+".join(NAMES)),)))


def build(config: Any = None, dtype: torch.dtype = torch.bfloat16, quantize: bool = False) -> Any:
    torch.manual_seed(0)
    config = config or LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False, lora_dropout=0.25)
    model = get_peft_model(nn.Sequential(Attention()).to(dtype), config)
    if isinstance(config, AdaLoraConfig):
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                nn.init.normal_(parameter)
            parameter.requires_grad_("lora_" in name)
    return peft_ext.quantize_nf4(model, blocksize=32, progress=False) if quantize else model


def attention(model: Any) -> Any:
    return model.base_model.model[0]


def draw(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, T, K, generator=torch.Generator().manual_seed(1)).to(dtype)


class Together(TorchDispatchMode):
    """Counts the layers in each call of lora_linears."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is torch.ops.peft_ext.lora_linears.default:
            self.layers.append(len(args[3]) // 2)
        return func(*args, **(kwargs or {}))


def outputs(module: Any, x: Tensor, *args: Any) -> list[Tensor]:
    torch.manual_seed(2)
    return [y.detach().clone() for y in module(x, *args)]


def gradients(model: Any, x: Tensor, forward: Callable[..., tuple[Tensor, ...]]) -> dict[str, Any]:
    model.zero_grad()
    torch.manual_seed(2)
    leaf = x.clone().requires_grad_()
    sum((y.float() * torch.linspace(-1, 1, y.shape[-1])).sum() for y in forward(leaf)).backward()
    return {"x": leaf.grad} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both(**how: Any) -> tuple[Any, Any]:
    """Returns an accelerated model whose layers are computed alone, and a copy whose siblings are computed together."""
    model = build(**how).train()
    return peft_ext.accelerate(copy.deepcopy(model), blocks=False), peft_ext.accelerate(model)


ADALORA = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=list(NAMES), lora_dropout=0.25)
OTHERS = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 7}, init_lora_weights=False)
RSLORA = LoraConfig(r=4, target_modules=list(NAMES), use_rslora=True, init_lora_weights=False)


# --- what is found ----------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def forward(self, x: Tensor, y: Tensor, flag: bool) -> Any:
        a, b = self.a(x), self.b(y)
        if flag:
            c, d = self.c(x).view(-1), self.d(x)
        else:
            c = d = self.e(x)
        y = self.f(y)
        g = self.g(x) if flag else self.h(x)
        for _ in range(2):
            i, j = self.i(y), self.j(y)
            y = i + j
        return a, b, c, d, g, self.k(self.l(x) * self.m(x)), [self.n(x) for _ in range(3)], self.o(x, y)


@pytest.mark.parametrize(
    ("forward", "groups"),
    [
        (Attention.forward, (NAMES,)),
        (Odd.forward, (("a", "l", "m"), ("b", "f"), ("c", "d"), ("i", "j"))),
        (hf.models.llama.modeling_llama.LlamaAttention.forward, (NAMES,)),
        # In T5's cross-attention q gets the decoder's states, k and v the encoder's states.
        (hf.models.t5.modeling_t5.T5Attention.forward, (("k", "v"),)),
        (hf.models.whisper.modeling_whisper.WhisperAttention.forward, (("k_proj", "v_proj"),)),
        # q_proj and k_proj get the hidden states plus positions, v_proj does not.
        (hf.models.detr.modeling_detr.DetrSelfAttention.forward, (("q_proj", "k_proj"),)),
        (nn.Linear.forward, ()),
        (len, ()),
        (eval("lambda self, x: (self.a(x), self.b(x))"), ()),  # the source of this code is unknown
    ],
)
def test_the_groups_are_read_in_the_source(forward: Any, groups: tuple) -> None:
    assert sorted(groups_in(forward)) == sorted(groups)


class Asks(LlamaAttention):
    """Chooses the attention function in the registry, as Llama's attention does, and reads one more thing."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.more)
        return attend(self, q, k, v, self.more(x))

    def more(self, x: Tensor) -> Any:
        return x if self.config.hidden_size else None


class AsksInAMethod(Asks):
    def more(self, x: Tensor) -> Any:
        return x if self.config._attn_implementation == "sdpa" else None


class AsksInAProperty(Asks):
    def more(self, x: Tensor) -> Any:
        return x if self.is_sdpa else None

    @property
    def is_sdpa(self) -> bool:
        return self.config._attn_implementation == "sdpa"


def _is_sdpa(module: nn.Module) -> bool:
    return module.config._attn_implementation == "sdpa"


class AsksInAFunction(Asks):
    def more(self, x: Tensor) -> Any:
        return [x for _ in range(2) if _is_sdpa(self)]


class HandsItsConfigOn(Asks):
    def more(self, x: Tensor) -> Any:
        return repr(self.config)


@pytest.mark.parametrize("kind", [LlamaAttention, Asks, AsksInAMethod, AsksInAProperty, AsksInAFunction,
                                  HandsItsConfigOn])  # fmt: skip
def test_the_attention_implementation_is_read_only_to_choose_the_function(kind: type) -> None:
    """A fused attention's configuration names another implementation, which other code must not see."""
    kinds = {found for found, _ in attention_formulas(kind, form_of(kind))}
    assert kinds == ({"attention"} if kind in (LlamaAttention, Asks) else {"projections"})


def test_the_attention_of_glm5_next_reads_its_implementation_in_a_method() -> None:
    glm = pytest.importorskip("transformers.models.glm5_next.modeling_glm5_next")
    assert row_of(glm.Glm5NextTextAttention)[0].kind == "projections"


@pytest.mark.parametrize("name", ["Llama", "T5", "BERT"])
def test_in_models(name: str) -> None:
    small = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_hidden_layers": 2}  # fmt: skip
    model, targets, groups = {
        "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**small)), "all-linear", [3, 2] * 2),
        "BERT": (lambda: hf.BertModel(hf.BertConfig(**small)), ["query", "key", "value"], [3, 3]),
        "T5": (lambda: hf.T5EncoderModel(hf.T5Config(
            vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        )), ["q", "k", "v", "wi_0", "wi_1"], [2, 2] * 2),
    }[name]  # fmt: skip
    torch.manual_seed(0)
    model = peft_ext.accelerate(get_peft_model(model(), LoraConfig(target_modules=targets, init_lora_weights=False)))
    with Together() as seen:
        model.train()(input_ids=torch.arange(80).view(2, 40))
    assert seen.layers == groups
    rows = [row for row in peft_ext.explain(model).blocks if row.kind == "projections of one input"]
    assert rows and all(row.fused for row in rows)
    assert "projections of one input: fused, " in str(peft_ext.explain(model))


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [
    {}, {"dtype": torch.float32}, {"config": ADALORA}, {"config": OTHERS}, {"config": RSLORA}, {"quantize": True},
], ids=["", "float32", "AdaLoRA", "other ranks, one frozen", "rsLoRA", "NF4"])  # fmt: skip
def test_outputs_have_the_same_bits_and_gradients_agree(how: dict[str, Any]) -> None:
    alone, joint = both(**how)
    x = draw(how.get("dtype", torch.bfloat16))
    with Together() as seen:
        found = outputs(joint, x)
    assert seen.layers == [2 if how.get("config") is OTHERS else 3]
    assert all(map(torch.equal, found, outputs(alone, x)))
    wanted, found = gradients(alone, x, alone), gradients(joint, x, joint)
    assert found.keys() == wanted.keys() and len(found) > 4
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if x.dtype is torch.float32 else {"rtol": 2**-7, "atol": 0.05}
    # lora_linears rounds the gradient of x, a sum over the layers, only once.
    torch.testing.assert_close(found.pop("x"), wanted.pop("x"), **tolerance)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_autocast_and_evaluation_and_no_gradients() -> None:
    for enabled in (False, True):
        alone, joint = both(dtype=torch.float32)
        for model in (alone, joint):
            model.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), Together() as seen, torch.no_grad():
            assert all(map(torch.equal, outputs(joint, draw(torch.float32)), outputs(alone, draw(torch.float32))))
        assert seen.layers == [3]
    with torch.inference_mode(), Together() as seen:
        assert all(map(torch.equal, outputs(joint, draw(torch.float32)), outputs(alone, draw(torch.float32))))
    assert not seen.layers  # an inference tensor has no version, so a change can't be noticed


def test_bitsandbytes_layers() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(Attention()).to(torch.bfloat16)
    for name in NAMES:
        linear = getattr(base[0], name)
        four = bnb.nn.Linear4bit(K, linear.out_features, bias=linear.bias is not None, compute_dtype=torch.bfloat16,
                                 quant_type="nf4")  # fmt: skip
        four.load_state_dict({key: value for key, value in linear.state_dict().items()})
        setattr(base[0], name, four.to("cpu"))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False)).train()
    alone, joint = peft_ext.accelerate(copy.deepcopy(model), blocks=False), peft_ext.accelerate(model)
    with Together() as seen:
        assert all(map(torch.equal, outputs(joint, draw()), outputs(alone, draw())))
    assert seen.layers == [3]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing(reentrant: bool) -> None:
    _, joint = both()

    def forward(x: Tensor) -> Any:
        return checkpoint(joint, x, use_reentrant=reentrant)

    wanted, found = gradients(joint, draw(), joint), gradients(joint, draw(), forward)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_not_used_has_no_gradient() -> None:
    alone, joint = both()
    for used in ([0], [1], [0, 2]):
        wanted, found = (gradients(m, draw(), lambda x, m=m: [m(x)[i] for i in used]) for m in (alone, joint))  # noqa: B023
        assert found.keys() == wanted.keys() and len(found) == 1 + 2 * len(used)
        torch.testing.assert_close(found["x"], wanted["x"], rtol=2**-7, atol=0.05)


def test_frozen_adapters_and_an_input_without_a_gradient() -> None:
    alone, joint = both()
    for model in (alone, joint):
        for parameter in attention(model).k_proj.parameters():
            parameter.requires_grad_(False)

    def of(model: Any) -> dict[str, Any]:
        return gradients(model, draw(), lambda x: model(x.detach()))

    wanted, found = of(alone), of(joint)
    assert found.keys() == wanted.keys() and found.pop("x") is None and wanted.pop("x") is None and len(found) == 4
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- never a stale result ---------------------------------------------------------------------------------------------


def change_x(module: Any, x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1.0)


def change_weights(module: Any, x: Tensor) -> None:
    with torch.no_grad():
        module.k_proj.lora_B["default"].weight.mul_(2.0)
        module.v_proj.base_layer.weight.mul_(2.0)


def change_scale(module: Any, x: Tensor) -> None:
    for layer in (module.k_proj, module.v_proj):
        layer.scale_layer(3.0)


def replace_weights(module: Any, x: Tensor) -> None:
    for layer in (module.k_proj, module.v_proj):
        layer.lora_A["default"].weight = nn.Parameter(-layer.lora_A["default"].weight.detach())


def disable(module: Any, x: Tensor) -> None:
    module.k_proj.enable_adapters(False)
    module.v_proj.set_adapter([])


def evaluate(module: Any, x: Tensor) -> None:
    module.k_proj.eval()
    module.v_proj.eval()


def change_dropout(module: Any, x: Tensor) -> None:
    for layer in (module.k_proj, module.v_proj):
        layer.lora_dropout["default"].p = 0.0


def merge(module: Any, x: Tensor) -> None:
    for layer in (module.k_proj, module.v_proj):
        layer.merge()


CHANGES = [change_x, change_weights, change_scale, replace_weights, disable, evaluate, change_dropout, merge]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_between_the_calls_counts(change: Callable) -> None:
    model = build(LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False, lora_dropout=0.0)).train()
    if change in (evaluate, change_dropout):  # the dropout drops almost all elements
        for layer in (attention(model).k_proj, attention(model).v_proj):
            layer.lora_dropout["default"] = nn.Dropout(0.99)
    alone, joint = peft_ext.accelerate(copy.deepcopy(model), blocks=False), peft_ext.accelerate(model)
    before = outputs(copy.deepcopy(joint), draw())
    with Together() as seen:
        found = outputs(attention(joint), draw(), change)
    wanted = outputs(attention(alone), draw(), change)
    assert seen.layers == [3]  # one call of lora_linears has computed all three layers
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(found[0], before[0]) and not any(map(torch.equal, found[1:], before[1:]))


def test_another_tensor_of_the_same_shape_is_another_input() -> None:
    model = build(LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False, lora_dropout=0.0)).train()
    alone, joint = peft_ext.accelerate(copy.deepcopy(model), blocks=False), peft_ext.accelerate(model)
    found = []
    for model in (alone, joint):
        outputs(attention(model), draw(), lambda module, x: found.append(module.k_proj(x + 1.0).detach()))
    assert torch.equal(*found)


def test_an_exception_between_the_calls_leaves_nothing() -> None:
    alone, joint = both()
    module, x = attention(joint), draw()

    def fail(module: Any, x: Tensor) -> None:
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        module(x, fail)
    change_weights(module, x)
    change_weights(attention(alone), x)
    with Together() as seen:
        torch.manual_seed(5)
        found = module.k_proj(x)
    torch.manual_seed(5)
    assert torch.equal(found, attention(alone).k_proj(x)) and not seen.layers


def test_threads_do_not_take_from_one_another() -> None:
    model = build(LoraConfig(r=4, target_modules=list(NAMES), init_lora_weights=False)).train()
    module = attention(peft_ext.accelerate(model))
    inputs = [torch.randn(1, T, K).to(torch.bfloat16) for _ in range(4)]
    wanted, found = [outputs(module, x) for x in inputs], [None] * 4
    meet = threading.Barrier(4)

    def run(i: int) -> None:
        found[i] = [outputs(module, inputs[i], lambda *_: meet.wait(60)) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(map(torch.equal, once, wanted[i])) for i in range(4) for once in found[i])


def test_a_layer_that_is_called_from_another_thread_computes_alone() -> None:
    alone, joint = both(config=RSLORA)
    found: list[Tensor] = []

    def other(module: Any, x: Tensor) -> None:
        thread = threading.Thread(target=lambda: found.append(module.k_proj(x)))
        thread.start()
        thread.join()

    with Together() as seen:
        outputs(attention(joint), draw(), other)
    assert seen.layers == [3] and torch.equal(found[0], attention(alone).k_proj(draw()))


def test_a_gradient_that_is_wanted_or_not_between_the_calls() -> None:
    _, joint = both()
    kept = []

    def between(module: Any, x: Tensor) -> None:
        with torch.no_grad():
            kept.append(module.k_proj(x))

    q, k, _ = attention(joint)(draw(), between)
    assert q.requires_grad and k.requires_grad and not kept[0].requires_grad


def test_hooks_run_and_what_they_change_counts() -> None:
    alone, joint = both(config=RSLORA)
    for model in (alone, joint):
        attention(model).k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        attention(model).v_proj.register_forward_hook(lambda module, args, y: y + 1)
    assert all(map(torch.equal, outputs(joint, draw()), outputs(alone, draw())))


def test_the_first_layer_that_can_join_computes_the_others() -> None:
    alone, joint = both(config=RSLORA)
    for model in (alone, joint):
        attention(model).q_proj.enable_adapters(False)
    with Together() as seen:
        assert all(map(torch.equal, outputs(joint, draw()), outputs(alone, draw())))
    assert seen.layers == [2]


def test_few_tokens_and_one_layer_are_computed_alone() -> None:
    alone, joint = both()
    joint.eval(), alone.eval()
    with Together() as seen:
        assert all(map(torch.equal, outputs(joint, draw()[:1, :8]), outputs(alone, draw()[:1, :8])))
        attention(joint).k_proj.enable_adapters(False)
        attention(joint).v_proj.enable_adapters(False)
        outputs(joint, draw())
    assert not seen.layers
    (row,) = [row for row in peft_ext.explain(joint).blocks if row.kind == "projections of one input"]
    assert not row.fused and row.reason.startswith("q_proj, k_proj, v_proj: no two have adapters")


def test_copies_pickles_restore_and_layers_alone() -> None:
    _, joint = both(config=RSLORA)
    wanted = outputs(joint, draw())
    for twin in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        with Together() as seen:
            assert all(map(torch.equal, outputs(twin, draw()), wanted))
        assert seen.layers == [3]
    for undo in (peft_ext.restore, lambda model: peft_ext.accelerate(model, blocks=False)):
        twin = undo(copy.deepcopy(joint))
        assert type(attention(twin)) is Attention
        with Together() as seen:
            outputs(twin, draw())
        assert not seen.layers


def test_each_layer_counts_as_one() -> None:
    _, joint = both()
    with OperatorCalls() as seen:
        gradients(joint, draw(), joint)
    assert seen.calls["lora_linear"] == seen.calls["lora_linear_backward"] == 3
