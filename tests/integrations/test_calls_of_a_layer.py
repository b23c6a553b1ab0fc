"""Tests how many Python functions a call of a fused layer runs, and that a change of the layer or of the mode takes
effect although an equal call before was on the fast path."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

import peft_ext
from peft_ext.integrations.adapter_layers import known
from peft_ext.nn import NF4Linear

SIZE = 64
MOST_CALLS = 40

TARGET: dict[str, Any] = {"target_modules": ["layer"]}
LORA = {"r": 8, "init_lora_weights": False, **TARGET}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lambda: LoraConfig(**LORA),
    "LoRA, dropout": lambda: LoraConfig(**LORA, lora_dropout=0.25),
    "DoRA": lambda: LoraConfig(**LORA, use_dora=True),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=8, target_r=4, total_step=100, **TARGET),
    "IA3": lambda: IA3Config(feedforward_modules=[], **TARGET),
    "IA3, feedforward": lambda: IA3Config(feedforward_modules=["layer"], **TARGET),
}


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def fused_layer(method: str, base: str = "dense") -> Any:
    """Returns a fused layer in training mode."""
    layer: nn.Module = nn.Linear(SIZE, SIZE)
    model = get_peft_model(Model(layer if base == "dense" else NF4Linear.from_linear(layer)), CONFIGS[method]())
    return peft_ext.accelerate(model).train().base_model.model.layer


def python_calls(call: Callable[[], Any]) -> list[str]:
    """Returns the names of the Python functions that ``call`` runs, without the name of ``call`` itself."""
    names: list[str] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event == "call":
            names.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names[1:]


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_call_takes_few_calls_of_python(method: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (method, base) == ("DoRA", "nf4"):
        pytest.skip("the weight is decoded for its norm, in calls of its own")
    layer, x = fused_layer(method, base), torch.randn(16, SIZE, requires_grad=True)
    monkeypatch.undo()  # undoes the fixture that runs the checks also for calls on the fast path
    layer(x)
    calls = python_calls(lambda: layer(x))
    assert len(calls) <= MOST_CALLS, calls
    assert not [name for name in calls if "check_" in name]  # the operator does not repeat the layer's checks


# --- a call that is known, and then is another ------------------------------------------------------------------------


def replace_weight(layer: Any) -> None:
    lora_A = layer.lora_A["default"]
    lora_A.weight = nn.Parameter(2 * lora_A.weight.detach())


def write_data(layer: Any) -> None:
    layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data.flip(0)


def replace_module(layer: Any) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer.lora_A["default"].__class__ = Doubled


def replace_base(layer: Any) -> None:
    layer.base_layer = nn.Sequential(layer.base_layer, nn.ReLU())


def hook(of: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda layer: of(layer).register_forward_hook(lambda module, args, output: 2 * output) and None


def replace_forward(of: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        module = of(layer)
        stock = module.forward
        module.forward = lambda x: 3 * stock(x)  # type: ignore[method-assign]

    return change


def second_adapter(layer: Any) -> None:
    torch.manual_seed(1)
    layer.update_layer("second", 4, lora_alpha=2, config=LoraConfig(**LORA | {"r": 4}))
    layer.set_adapter(["default", "second"])


def with_bias(layer: Any) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.ones(SIZE))


def scale(value: Any) -> Callable[[Any], None]:
    return lambda layer: layer.scaling.update(default=value)


def whole_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(1.0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a parameter replaced": replace_weight,
    "data of a parameter replaced": write_data,
    "a subclass of Linear": replace_module,
    "another base layer": replace_base,
    "a hook on the base layer": hook(lambda layer: layer.base_layer),
    "a hook on lora_A": hook(lambda layer: layer.lora_A["default"]),
    "a hook on the dropout": hook(lambda layer: layer.lora_dropout["default"]),
    "a forward on the layer": replace_forward(lambda layer: layer),
    "a forward on lora_B": replace_forward(lambda layer: layer.lora_B["default"]),
    "a second adapter": second_adapter,
    "no adapter": lambda layer: layer.set_adapter([]),
    "a bias of lora_B": with_bias,
    "another scaling": scale(0.25),
    "scaling not finite": scale(float("inf")),
    "scaling a tensor": scale(torch.tensor(3.0)),
    "all dropped": whole_dropout,
    "the base trains": lambda layer: layer.base_layer.weight.requires_grad_(),
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "bfloat16": lambda layer: layer.to(torch.bfloat16),
    "no cast of the input": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
}


def both_layers() -> tuple[Any, Any]:
    """Returns a stock layer and its fused copy. A call of the copy with 5 rows is on the fast path."""
    torch.manual_seed(0)
    stock = get_peft_model(Model(nn.Linear(SIZE, SIZE)), CONFIGS["LoRA"]()).train()
    fused = peft_ext.accelerate(copy.deepcopy(stock))
    stock, fused = stock.base_model.model.layer, fused.base_model.model.layer
    fused(torch.randn(5, SIZE))
    assert fused._common(torch.randn(5, SIZE))[0] in known.KNOWN
    return stock, fused


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_known_call_is_seen(change: str) -> None:
    stock, fused = both_layers()
    x = torch.randn(5, SIZE).to(torch.bfloat16 if change == "bfloat16" else torch.float32)
    results = []
    for layer in (stock, fused):
        CHANGES[change](layer)
        y = layer(leaf := x.clone().requires_grad_())
        if y.requires_grad:
            y.sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"y": y.detach(), "x": leaf.grad, **gradients})
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if change == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[0].items():
        found = results[1][name]
        assert (found is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(found, wanted, equal_nan=True, **tolerance, msg=name)


def test_a_known_call_under_another_mode() -> None:
    stock, fused = both_layers()
    x = torch.randn(5, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused._common(x) is None
        assert fused(x).dtype is stock(x).dtype is torch.bfloat16
    assert torch.func.vmap(lambda row: fused(row))(x).shape == (5, SIZE)
    torch.testing.assert_close(torch.compile(fused, backend="eager", fullgraph=True)(x), fused(x))
    with pytest.raises((RuntimeError, ValueError)):
        fused(torch.randn(5, SIZE - 1))


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_of_a_known_layer_computes_with_its_own_parameters(again: Callable[[Any], Any]) -> None:
    _, fused = both_layers()
    x = torch.randn(5, SIZE)
    before, other = fused(x), again(fused)
    other._modules = dict(other._modules)
    other._modules["base_layer"] = nn.Linear(SIZE, SIZE).requires_grad_(False)
    assert not torch.allclose(other(x), before)
    assert torch.equal(fused(x), before)
