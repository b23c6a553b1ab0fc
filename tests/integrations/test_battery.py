"""A battery of changes to each class with a known form: the accelerated model computes what the changed stock model
computes, and explain reports the changed block as not fused.

The classes are those of the architectures FAMILIES. Each change is made before the call of accelerate, to one
block of a class or to the class itself. The results are the loss and all gradients of a training step, and the logits
of a prompt and of a second call of one token, which may run a block's or a decoder layer's plan for few tokens.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, Union
from unittest import mock

import pytest
import torch
from tiers import first
from torch import Tensor, nn

import peft_ext

tiny_models = pytest.importorskip("tiny_models")

from block_changes import Change, changes  # noqa: E402

from peft_ext.integrations import forms  # noqa: E402
from peft_ext.integrations.model_blocks.block import Block  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = tiny_models.Sizes(layers=1, batch=2, length=20)
# Most architectures have these classes of PyTorch. The battery changes each class in one architecture only.
OF_PYTORCH = {"LayerNorm": "GPT-2", "Dropout": "ViT"}
# The largest relative difference that float32 rounding makes between the results of two models of one layer, and the
# least relative difference that counts as an effect of a change.
ROUNDING, EFFECT = 1e-4, 1e-3
Found = Union[dict[str, Tensor], type]


class Spot(NamedTuple):
    """The first block of a class in a model, and the names of all blocks of the class."""

    cls: type
    name: str
    names: set[str]
    parts: set[str]


@pytest.fixture(autouse=True, scope="module")
def masks_of_pytorch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peft_ext.ops, "dropout", nn.functional.dropout)
        yield


@pytest.fixture(scope="module")
def counts() -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    yield found
    print(f"\nbattery: {dict(found)}")


def built(name: str) -> nn.Module:
    """Returns the model ``name`` with LoRA, without dropout in attention: the attention operator draws other masks than
    PyTorch."""
    architecture = tiny_models.architecture(name, SIZES)
    try:
        model = architecture.adapt("LoRA")
    except (TypeError, ValueError):  # PEFT can't adapt all linear layers of the model
        model = tiny_models.get_peft_model(
            architecture.build(),
            tiny_models.LoraConfig(
                r=4, init_lora_weights=False, target_modules=["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
            ),
        )
    for module in model.modules():
        if "attention" in type(module).__name__.lower():
            for inner in module.modules():
                for attribute, value in vars(inner).items():
                    if isinstance(value, float) and (attribute == "p" or "drop" in attribute):
                        setattr(inner, attribute, 0.0)
    return model


def results(model: nn.Module, batch: dict[str, Any], generates: bool) -> Found:
    """Returns the loss and the gradients of a training step, and outputs without a gradient; the class of the error if
    the model raises one."""
    model.train().zero_grad()
    torch.manual_seed(4)
    try:
        loss = model(**batch).loss
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found["loss"] = loss.detach()
        model.eval()
        with torch.no_grad():
            if not generates:
                out = model(**batch)
                found["few"] = next(value for name, value in out.items() if "logits" in name)
                return found
            ids = batch["input_ids"]
            start = model(input_ids=ids[:, :5], use_cache=True)
            more = model(input_ids=ids[:, 5:6], past_key_values=start.past_key_values, use_cache=True)
            return {**found, "prompt": start.logits, "few": more.logits}
    except Exception as error:
        return type(error)


def difference(found: Found, wanted: Found) -> tuple[float, str]:
    """Returns the largest relative error and its place; infinity for other keys or another error."""
    if isinstance(found, type) or isinstance(wanted, type):
        return torch.inf, f"an error of one of the two models: {found}"[:200]
    if found.keys() != wanted.keys():
        return torch.inf, f"other gradients: {found.keys() ^ wanted.keys()}"
    errors = []
    for name, value in wanted.items():
        other, value = found[name].double(), value.double()
        if not torch.equal(other.isfinite(), value.isfinite()):
            return torch.inf, name
        off = (other - value).nan_to_num(0, 0, 0).norm() / value.nan_to_num(0, 0, 0).norm().clamp(min=1e-6)
        errors.append((off.item(), name))
    return max(errors)


def fused(model: nn.Module, names: set[str]) -> set[tuple[str, str]]:
    return {(row.name, row.kind) for row in peft_ext.explain(model).blocks if row.fused and row.name in names}


def spots(stock: nn.Module, name: str) -> tuple[nn.Module, list[Spot]]:
    """Returns an accelerated copy of the model ``name``, and its classes of blocks of which some part is fused."""
    ours = peft_ext.accelerate(copy.deepcopy(stock))
    names: dict[type, list[str]] = {}
    for place, module in ours.named_modules():
        if isinstance(module, Block) and OF_PYTORCH.get(module.stock_class.__name__, name) == name:
            names.setdefault(module.stock_class, []).append(place)
    found = []
    for cls, places in names.items():
        if held := fused(ours, set(places)):
            start = min(held)[0]
            found.append(Spot(cls, start, set(places), {kind for place, kind in held if place == start}))
    return ours, found


# Names of architectures in tiny_models. The battery of one architecture takes up to 20 seconds. Mamba is left out: it
# has no attention, no MLP and no key-value cache.
FAMILIES = tuple(name for name in tiny_models.FAMILIES if name != "Mamba")


@pytest.mark.slow
@pytest.mark.parametrize("name", first(FAMILIES, ["BERT"]))
def test_whatever_is_changed_has_the_results_of_stock(name: str, counts: Counter[str]) -> None:
    architecture = tiny_models.architecture(name, SIZES)
    stock, batch = built(name), architecture.batch()
    generates = architecture.generates and architecture.task == tiny_models.TaskType.CAUSAL_LM
    plain = results(stock, batch, generates)
    assert isinstance(plain, dict), plain
    ours, found = spots(stock, name)
    # No class is changed yet, so all blocks in `found` run fused.
    assert difference(results(ours, batch, generates), plain)[0] < ROUNDING
    assert found or name not in tiny_models.ARCHITECTURES
    faults: list[str] = []
    for spot in found:
        counts["classes"] += 1
        row, form = forms.row_of(spot.cls)
        for change in changes(spot.cls, row, form, stock.get_submodule(spot.name)):
            fault = tried(change, spot, name, stock, batch, generates, plain, counts)
            if fault:
                faults.append(f"{spot.cls.__name__}: {change.name}: {fault}")
    assert not faults, "\n".join(faults)


form_of_unchanged = functools.cache(forms.form_of)


def tried(
    change: Change, spot: Spot, name: str, stock: nn.Module, batch: dict[str, Any], generates: bool, plain: Found,
    counts: Counter[str],
) -> str:  # fmt: skip
    """Returns what is wrong with the accelerated model after a change, or ""."""
    # If the change is made to one model and not to code, the digest of each class is computed only once.
    reader = nullcontext() if change.around else mock.patch.object(forms, "form_of", form_of_unchanged)
    with change.around() if change.around else nullcontext(), reader:
        stock = built(name) if change.rebuilt else stock if change.on is None else copy.deepcopy(stock)
        ours = copy.deepcopy(stock)
        if change.on is not None:
            for model in (stock, ours):
                change.on(model.get_submodule(spot.name))
        batch = {**batch, **change.given}
        wanted = results(stock, batch, generates)
        peft_ext.accelerate(ours)
        actual = results(ours, batch, generates)
        is_fused = fused(ours, spot.names if change.of_class else {spot.name})
    counts["changes"] += 1
    counts["without effect"] += difference(wanted, plain)[0] < EFFECT
    if isinstance(wanted, type):  # stock code raised an error, so there is no result to compare with
        counts["errors of stock"] += 1
    else:
        off, where = difference(actual, wanted)
        if not off < ROUNDING:
            return f"off by {off:.1e} at {where}"
    wrong = {row for row in is_fused if change.stock == "all" or row[1] == change.stock}
    return f"explain says that it is fused: {sorted(wrong)}" if wrong else ""
