"""Tests gated MLPs whose activation and last layer are computed by one operator, ``ops.gated_lora_linear``.

The results must have the bits that the operators of the activation and of the layer give, and the last layer must be
called as a module where hooks or other conditions need its input.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from tiny_models import step
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import peft_ext
from peft_ext import ops
from peft_ext.integrations.adapter_layers.lora import LowRank
from peft_ext.integrations.model_blocks import mlp as mlp_module

pytestmark = pytest.mark.cpu_only("the choice of the operator is the same on every device")

SMALL = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "gate and up": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL)),
    "GELU by tanh": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**SMALL, head_dim=8)),
    "gate and up in one": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL)),
}
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
ONE: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(**LORA),
    "dropout": lambda: LoraConfig(**LORA, lora_dropout=0.2, use_rslora=True),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=4, target_modules="all-linear", total_step=100, init_lora_weights=False),
}
TWO: dict[str, Callable[[], Any]] = {
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "biases of lora_B": lambda: LoraConfig(**LORA, lora_bias=True),
    "IA3": lambda: IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "no adapter on the last layer": lambda: LoraConfig(**{**LORA, "target_modules": ["gate_proj", "up_proj"]}),
}
IDS = {"input_ids": torch.arange(60).view(2, 30), "labels": torch.arange(60).view(2, 30)}


def adapted(name: str = "gate and up", config: Any = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(MODELS[name]().to(dtype), config or ONE["LoRA"]())
    return peft_ext.accelerate(model.train())


def last_layers(model: nn.Module) -> list[Any]:
    return [layer.mlp.down_proj for layer in model.get_base_model().model.layers]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yields a list to which each call of an operator of gated activations appends the operator's name."""
    called: list[str] = []
    for name in ("gated_lora_linear", "gated_activation"):
        real = getattr(ops, name)

        def note(*args: Any, real: Any = real, name: str = name, **more: Any) -> Tensor:
            called.append(name)
            return real(*args, **more)

        monkeypatch.setattr(ops, name, note)
    yield called


def one_step(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in step(model, IDS).items() if value is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_a_step(name: str, dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for method, config in ONE.items():
        model = adapted(name, config(), dtype)
        other = copy.deepcopy(model)
        found = one_step(model)
        assert calls == ["gated_lora_linear"] * 2, method
        with monkeypatch.context() as patch:
            patch.setattr(LowRank, "output_of_gated", lambda *_: None)
            wanted = one_step(other)
        # The backward computes the activation again.
        assert calls[2:] == ["gated_activation"] * 4, method
        calls.clear()
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(found[key], value), f"{method}: {key}"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, calls: list[str]) -> None:
    wanted, model = one_step(adapted(config=ONE["dropout"]())), adapted(config=ONE["dropout"]())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls.clear()
    found = one_step(model)
    assert calls == ["gated_lora_linear"] * 4
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


def test_over_nf4_and_under_autocast(calls: list[str]) -> None:
    torch.manual_seed(0)
    base = MODELS["gate and up"]()
    peft_ext.quantize_nf4(base, progress=False)
    model = peft_ext.accelerate(get_peft_model(base, ONE["LoRA"]()).train())
    plain = one_step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = one_step(model)
    assert calls == ["gated_lora_linear"] * 4
    for key, value in plain.items():
        torch.testing.assert_close(low[key].float(), value, rtol=0.1, atol=0.1 * value.abs().max().item())


@pytest.mark.parametrize("config", TWO.values(), ids=TWO)
def test_other_last_layers_are_called(config: Callable[[], Any], calls: list[str]) -> None:
    one_step(adapted(config=config()))
    assert "gated_lora_linear" not in calls and calls.count("gated_activation") >= 2


def test_two_adapters_are_called(calls: list[str]) -> None:
    model = adapted()
    model.add_adapter("other", ONE["LoRA"]())
    model.base_model.set_adapter(["default", "other"])
    peft_ext.accelerate(model)
    one_step(model)
    assert set(calls) == {"gated_activation"}


def _on(part: Callable[[Any], nn.Module]) -> Callable[[Any, Any], Any]:
    return lambda layer, hook: part(layer).register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    "hooked",
    [
        _on(lambda layer: layer), _on(lambda layer: layer.base_layer), _on(lambda layer: layer.lora_A["default"]),
        _on(lambda layer: layer.lora_dropout["default"]),
        lambda layer, hook: torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args: hook(module, args) if module is layer else None
        ),
    ],
    ids=["the layer", "the base layer", "lora_A", "the dropout", "all modules"],
)  # fmt: skip
def test_hooks_get_the_input(hooked: Callable[[Any, Any], Any], calls: list[str]) -> None:
    model, seen = adapted(config=ONE["dropout"]()), []
    handle = hooked(last_layers(model)[0], lambda _module, args: seen.append(tuple(args[0].shape)))
    try:
        one_step(model)
    finally:
        handle.remove()
    assert seen == [(2, 30, 48)]
    assert calls.count("gated_lora_linear") < 2
    calls.clear()
    one_step(model)
    assert calls == ["gated_lora_linear"] * 2


def test_a_forward_on_the_instance_runs(calls: list[str]) -> None:
    model = adapted()
    layer = last_layers(model)[0]
    real, seen = layer.forward, []
    layer.forward = lambda x: (seen.append(x.shape), real(x))[1]
    one_step(model)
    assert len(seen) == 1 and calls.count("gated_lora_linear") == 1


def _wrapped(mlp: Any, seen: list[str]) -> None:
    wrapper = checkpoint_wrapper(mlp.down_proj)
    wrapper.register_forward_hook(lambda *_: seen.append("wrapper"))
    mlp.down_proj = wrapper


def _of_a_subclass(mlp: Any, seen: list[str]) -> None:
    kind = type(mlp.down_proj)
    forward = lambda self, x: (seen.append("subclass"), kind.forward(self, x))[1]  # noqa: E731
    mlp.down_proj.__class__ = type("Other", (kind,), {"forward": forward})


def _compiled(mlp: Any, seen: list[str]) -> None:
    mlp.down_proj.compile(backend=lambda module, _: (seen.append("compiled"), module)[1])


@pytest.mark.parametrize("change", [_wrapped, _of_a_subclass, _compiled])
@pytest.mark.parametrize("few", [False, True])
def test_another_call_of_the_layer_runs(few: bool, change: Callable[[Any, list], None], calls: list[str]) -> None:
    model, seen = adapted(), []
    change(model.get_base_model().model.layers[0].mlp, seen)
    if few:  # the first calls of few tokens make the plan of the layer
        with torch.no_grad():
            for _ in range(4):
                seen.clear()
                model.eval()(input_ids=torch.arange(3).view(1, 3))
            if change is _compiled:
                assert model.get_base_model().model.layers[0].mlp.down_proj._compiled_call_impl is not None
                return
    else:
        one_step(model)
        assert calls.count("gated_lora_linear") == 1
    assert seen


def test_a_replaced_forward_of_the_class_runs(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(), []
    kind = type(last_layers(model)[0])
    real = kind.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(self)
        return real(self, x)

    monkeypatch.setattr(kind, "forward", forward)
    one_step(model)
    assert all(any(layer is one for one in seen) for layer in last_layers(model))
    assert "gated_lora_linear" not in calls


def test_an_activation_that_autocast_would_cast(calls: list[str]) -> None:
    model = adapted()
    for layer in model.get_base_model().model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.register_forward_hook(lambda _layer, _args, out: out.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one_step(model)
    assert set(calls) == {"gated_activation"}


def test_a_dropout_behind_the_last_layer(calls: list[str]) -> None:
    config = hf.SeedOssConfig(**SMALL, head_dim=8, residual_dropout=0.5, attention_dropout=0.0)
    torch.manual_seed(0)
    stock = get_peft_model(hf.SeedOssForCausalLM(config), ONE["LoRA"]()).train()
    model = peft_ext.accelerate(copy.deepcopy(stock))
    with_dropout = one_step(model)
    assert calls == ["gated_lora_linear"] * 2
    for part in (*stock.modules(), *model.modules()):
        if hasattr(part, "residual_dropout"):
            part.residual_dropout = 0.0
    wanted, found = one_step(stock), one_step(model)
    assert not torch.allclose(found["logits"], with_dropout["logits"], rtol=1e-2)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item())


def test_gate_and_up_without_a_gradient_are_not_kept(calls: list[str]) -> None:
    one_step(adapted(config=LoraConfig(**{**LORA, "target_modules": ["down_proj"]})))
    assert calls[0] == "gated_activation"  # of the first layer, whose gate and up need no gradient
    assert calls[1] == "gated_lora_linear"


def test_the_kernels_are_proved_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = mlp_module.kernel_reason
    monkeypatch.setattr(mlp_module, "kernel_reason", lambda name, device: (asked.append(name), real(name, device))[1])
    peft_ext.explain(adapted())  # accelerate calls explain to prove the kernels that are not proved yet
    assert "gated_lora_linear" in asked
    asked.clear()
    peft_ext.explain(adapted(config=TWO["DoRA"]()))
    assert "gated_lora_linear" not in asked and "gated_activation" in asked


def test_disabled_and_merged_adapters(calls: list[str]) -> None:
    model = adapted().eval()
    with model.disable_adapter(), torch.no_grad():
        model(**IDS)
    model.merge_adapter()
    with torch.no_grad():
        model(**IDS)
    assert "gated_lora_linear" not in calls
    model.unmerge_adapter()
    with torch.no_grad():
        model(**IDS)
    assert calls.count("gated_lora_linear") == 2


@pytest.mark.parametrize("config", [ONE["LoRA"], TWO["DoRA"]], ids=["one operator", "two operators"])
@pytest.mark.parametrize("name", MODELS)
def test_the_result_of_the_activation_is_not_kept(
    name: str, config: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither operator keeps the result of the activation until the backward."""
    model, made = adapted(name, config(), torch.bfloat16), []
    real = ops.gated_activation

    def note(*args: Any) -> Tensor:
        made.append(weakref.ref(result := real(*args)))
        return result

    monkeypatch.setattr(ops, "gated_activation", note)
    loss = model(**IDS).loss
    one = config is ONE["LoRA"]
    assert len(made) == (0 if one else 2) and all(held() is None for held in made)
    loss.backward()
    assert len(made) == (0 if one else 4)


def test_what_the_operator_keeps() -> None:
    """gate and up are the only tensors with as many columns as h that the operator keeps for its backward, besides the
    weight and the adapter."""
    gate, up = (torch.randn(40, 48, requires_grad=True) for _ in range(2))
    weight, a, b = torch.randn(32, 48), torch.randn(4, 48, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ops.gated_lora_linear(gate, up, "silu", weight, a, b, dropout_p=0.5, training=True)
    assert [tuple(tensor.shape) for tensor in kept] == [(40, 48), (40, 48), (32, 48), (4, 48), (32, 4), (40, 4), (2,)]
    assert kept[0].data_ptr() == gate.data_ptr() and kept[1].data_ptr() == up.data_ptr()
