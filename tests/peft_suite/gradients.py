"""Gradients of PEFT's own test configurations, accelerated against stock: PEFT's tests look at none.

    python tests/peft_suite/gradients.py [--count FILE]      in the folder of PEFT's unpacked sdist

For every entry of its TEST_CASES and MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, whatever the method, in training and in eval
mode: the suite's own model and inputs, adapters as after some training, the same output gradient. Where a layer is
fused, output and gradients (of every trained parameter, and of inputs that are floats) must be as good as PEFT's
against float64, or as float64 itself over operands an ulp of float32 off; where none is, they must be the same bits.
Fails where one is not, and where a configuration of a method that is fused could not be run at all.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plugin
import pytest
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path.cwd()), str(Path(__file__).resolve().parents[1] / "support")]

from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model  # noqa: E402
from peft_models import assert_as_good, assert_identical, spread  # noqa: E402
from tests.testing_utils import set_init_weights_false  # noqa: E402

import peft_ext  # noqa: E402
from tests import test_custom_models as suite  # noqa: E402  PEFT's

FUSED_METHODS = (LoraConfig, AdaLoraConfig, IA3Config)
ADAPTERS = ("adapter_1", "adapter_2")

Case = tuple[str, type, Callable[[], nn.Module]]
Found = dict[str, Tensor]


# --- the models -------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """The name, the class of the configuration, and what makes the adapted model."""
    for name, model_id, config_cls, kwargs in suite.TEST_CASES:
        yield name, config_cls, lambda m=model_id, c=config_cls, k=kwargs: _single(m, c, k)
    for name, method, config_cls, *kwargs in suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES:
        yield f"active together: {name}", config_cls, lambda m=method, c=config_cls, k=kwargs: _several(m, c, k)


def _single(model_id: str, config_cls: type, kwargs: dict[str, Any]) -> nn.Module:
    model = suite.MockTransformerWrapper.from_pretrained(model_id)
    kwargs = set_init_weights_false(config_cls, copy.deepcopy(kwargs))
    model = get_peft_model(model, config_cls(base_model_name_or_path=model_id, **kwargs))
    spread(model)
    return model


def _several(method: str, config_cls: type, kwargs: list[dict[str, Any]]) -> nn.Module:
    suite._skip_tests_with_multiple_adapters_with_target_parameters(config_cls, kwargs[1])
    helper = suite.TestMultipleActiveAdapters()
    configs = [config_cls(**copy.deepcopy(each)) for each in kwargs]
    model = get_peft_model(helper.resolve_model_cls(method), configs[0], adapter_name=ADAPTERS[0])
    model.add_adapter(ADAPTERS[1], configs[1])
    helper.set_multiple_active_adapters(model, list(ADAPTERS))
    for name in ADAPTERS:
        spread(model, name)
    return model


def _without_dropout(model: nn.Module) -> nn.Module:
    """Masks would not be the same: each path draws its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _in_float64(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module.__dict__.get("dtype"), torch.dtype):  # to which the suite's models cast their input
            module.dtype = torch.float64
    return model


def _an_ulp_off(model: nn.Module, seed: int) -> nn.Module:
    """A float64 model with each parameter an ulp of float32 larger or smaller."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.float64)
            parameter *= 1 + (2 * up - 1) * torch.finfo(torch.float32).eps
    return model


# --- the comparison ---------------------------------------------------------------------------------------------------


def run(model: nn.Module, inputs: Found) -> Found:
    """Output y, gradient of the input x and of what is trained, for a scalar loss with fixed random weights.

    A parameter that gets no gradient is left out; over indices there is none of x, and y stands there.
    """
    model.zero_grad()
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    embeds = any(isinstance(module, nn.Embedding) for module in model.modules())
    inputs = {name: x if embeds else x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
    torch.manual_seed(3)
    y = model(**inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    (y * weights.to(y.dtype)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    (x,) = inputs.values()
    return {"y": y.detach(), "x": x.grad if x.requires_grad else y.detach(), **found}


def compare(make: Callable[[], nn.Module]) -> bool:
    """Whether a layer was fused. Raises AssertionError where the accelerated model is not as good as the stock one."""
    torch.manual_seed(0)
    made = _without_dropout(make())
    # Both are copies: what a method hooks to its parameters' gradients is lost in one (OSF's).
    stock, fused = copy.deepcopy(made), peft_ext.accelerate(copy.deepcopy(made), blocks=False)
    inputs = suite.TestMultipleActiveAdapters().prepare_inputs_for_testing()
    before = plugin.FUSED.total()
    for training in (True, False):
        stock.train(training), fused.train(training)
        wanted, actual = run(stock, inputs), run(fused, inputs)
        if plugin.FUSED.total() == before:
            assert_identical(actual, wanted)
        else:
            assert_as_good(actual, *_yardstick(stock, wanted, inputs))
    return plugin.FUSED.total() > before


def _yardstick(stock: nn.Module, wanted: Found, inputs: Found) -> tuple[Found, Found]:
    """Of PEFT's result and three with operands an ulp off, the one that is farthest from the exact result; and that.

    A sum that cancels, as a magnitude's gradient does over tokens, may come out near exact by luck in PEFT.
    """
    model = _in_float64(stock)
    exact = run(model, inputs)
    found = [wanted, *(run(_an_ulp_off(model, seed), inputs) for seed in range(3))]
    farthest = {
        name: max((each[name] for each in found), key=lambda t, name=name: (t.double() - exact[name]).norm().item())
        for name in exact
    }
    return {name: tensor.to(wanted[name].dtype) for name, tensor in farthest.items()}, exact


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=Path, help="where to write, as JSON, the fused layers by kind")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    plugin.count_fused()
    outcomes = {"fused": 0, "same bits": 0, "skipped": 0}
    wrong = []
    for name, config_cls, make in cases():
        try:
            outcomes["fused" if compare(make) else "same bits"] += 1
        except pytest.skip.Exception:
            outcomes["skipped"] += 1
        except ImportError as error:  # of a method that wants a package that is not here
            if config_cls in FUSED_METHODS:
                wrong.append(f"{name}: {error}")
            outcomes["skipped"] += config_cls not in FUSED_METHODS
        except Exception as error:  # of any kind: the next configurations are to be compared all the same
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    print(f"gradients of {sum(outcomes.values()) + len(wrong)} configurations: "
          + ", ".join(f"{count} {which}" for which, count in outcomes.items()) + f", {len(wrong)} wrong")  # fmt: skip
    for text in wrong:
        print(f"gradients: {text}")
    if options.count:
        options.count.write_text(json.dumps(plugin.counts()))
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
