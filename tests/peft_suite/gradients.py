"""Compares gradients of accelerated and stock layers over PEFT's own test configurations.

    python tests/peft_suite/gradients.py [--count FILE]      in the folder of PEFT's unpacked sdist

The script runs every entry of TEST_CASES and MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES of PEFT's tests, in training and in
eval mode, on the model and inputs of PEFT's tests. Adapters have values as after some training. A comparison is of the
output and of the gradients of trained parameters and of floating-point inputs. Where a layer is fused, the error from
float64 must be as small as PEFT's error, or as the error of float64 over operands that are off by an ulp of float32.
Where no layer is fused, the bits must be equal. The script fails where a comparison fails, and where a configuration
raises an error, except an ImportError for a method that peft_ext does not fuse.
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
from tests import test_custom_models as suite  # noqa: E402  PEFT's package tests

FUSED_METHODS = (LoraConfig, AdaLoraConfig, IA3Config)
ADAPTERS = ("adapter_1", "adapter_2")

Case = tuple[str, type, Callable[[], nn.Module]]
Found = dict[str, Tensor]


# --- the models -------------------------------------------------------------------------------------------------------


def cases() -> Iterator[Case]:
    """Yields, for each case, its name, the class of its configuration, and a function that makes the adapted model."""
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
    """Sets each dropout's probability to 0, because the stock and the fused path would draw different masks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _in_float64(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module.__dict__.get("dtype"), torch.dtype):  # the suite's models cast their input to module.dtype
            module.dtype = torch.float64
    return model


def _an_ulp_off(model: nn.Module, seed: int) -> nn.Module:
    """Returns a copy of a float64 model in which each parameter is larger or smaller by an ulp of float32."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.float64)
            parameter *= 1 + (2 * up - 1) * torch.finfo(torch.float32).eps
    return model


# --- the comparison ---------------------------------------------------------------------------------------------------


def run(model: nn.Module, inputs: Found) -> Found:
    """Returns the output y and the gradients of x and of trained parameters, for a loss with fixed random weights.

    Parameters without gradient are left out. Where x are indices, which have no gradient, "x" is y.
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
    """Returns whether a layer was fused.

    Raises AssertionError where the accelerated model's result is worse than the stock model's.
    """
    torch.manual_seed(0)
    made = _without_dropout(make())
    # Both models are copies, because a copy loses the hooks that a method (OSF) registers on its parameters' gradients.
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
    """Returns, for each tensor, the least exact of four results, and the exact result in float64.

    The four results are PEFT's result and three results with operands that are off by an ulp of float32. PEFT's result
    alone is no good bound: a sum that cancels, such as a magnitude's gradient over tokens, may be nearly exact by luck.
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
        except ImportError as error:  # the method needs a package that is not installed
            if config_cls in FUSED_METHODS:
                wrong.append(f"{name}: {error}")
            outcomes["skipped"] += config_cls not in FUSED_METHODS
        except Exception as error:  # after any error the next configurations are still compared
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
