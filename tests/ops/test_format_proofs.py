"""Tests that the kernels of each format of packed weights are proved before their first use, and that all operators
compute the weights of a format that fails by the reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import packed_weights
import pytest
import torch
from cuda_kernels import emulated_ops
from torch import Tensor

from peft_ext import _native, ops
from peft_ext.integrations.adapter_layers import reasons
from peft_ext.nn import PackedLinear
from peft_ext.ops import format_proofs, prove
from peft_ext.ops.format_proofs import FAMILIES, family_of
from peft_ext.ops.library import OPERATORS
from peft_ext.reference.formats import DECODERS, decoded
from peft_ext.weights import packed
from peft_ext.weights.packed import PackedWeight

if _native.STATE.module is None:
    pytest.skip("the native library is not built", allow_module_level=True)

pytestmark = pytest.mark.cpu_only("the kernels are the CPU's")

CPU = torch.device("cpu")
ISAS = _native.STATE.module.isas()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Simulates a process that has proved all operators and no format, and restores what the formats dropped. Returns
    the file of the saved results."""
    prove.settle("CPU", prove.families("CPU"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("PEFT_EXT_PROVE", "PEFT_EXT_REQUIRE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(prove, "_found", {key: {} for key in prove.KEYS})
    monkeypatch.setattr(prove, "_gates", {"CPU": dict.fromkeys(FAMILIES), "CUDA": {}})
    monkeypatch.setattr(prove, "_overriding", [])
    monkeypatch.setattr(prove, "DROPPED", {})
    yield tmp_path / "peft_ext/proved.json"
    for library in prove._overriding:
        library._destroy()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the list of the families that were proved. Each passes, and no kernel runs."""
    found: list[str] = []
    monkeypatch.setattr(prove, "prove", lambda _, wanted, **__: found.extend(wanted) or dict.fromkeys(wanted, ""))
    return found


def fails(monkeypatch: pytest.MonkeyPatch, *formats: str) -> None:
    """Makes the proofs of formats fail, and those of other families pass, without running a kernel."""
    wrong = set(map(family_of, formats))
    monkeypatch.setattr(
        prove, "prove", lambda _, wanted, **__: {name: "it is off" if name in wrong else "" for name in wanted}
    )


def drawn(kind: str, n: int = 24, k: int = 256) -> PackedWeight:
    return packed_weights.packed_weight(kind, n, k, torch.Generator().manual_seed(1))


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the list of the formats whose weights the reference decoded."""
    called: list[str] = []
    for name, decode in DECODERS.items():
        monkeypatch.setitem(
            DECODERS, name, lambda *args, name=name, decode=decode: called.append(name) or decode(*args)
        )
    return called


# --- the proof --------------------------------------------------------------------------------------------------------


def test_every_format_that_kernels_decode_has_a_proof() -> None:
    wanted = {name for name, format in packed.FORMATS.items() if format.decode is None and name != "nf4"}
    assert set(map(family_of, wanted)) == FAMILIES.keys() and len(wanted) > 20


@pytest.mark.parametrize("isa", ISAS)
def test_each_format_agrees_on_each_path(isa: str) -> None:
    before = _native.STATE.isa
    try:
        _native.STATE.module.set_isa(isa)
        assert prove.prove(CPU, FAMILIES) == dict.fromkeys(FAMILIES, "")
    finally:
        _native.STATE.module.set_isa(before)


@pytest.mark.slow  # the emulated library has to be built
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cuda_kernels_of_each_format_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = emulated_ops()
    monkeypatch.setattr(prove, "native_op", lambda _, name: getattr(kernels, name))
    assert prove.prove(CPU, [family], key="CUDA", large=False) == {family: ""}


def one_wrong(found: Tensor) -> Tensor:
    """Changes one element of a result."""
    found[-1, -1] += found.abs().max()
    return found


FAULTS = {
    "nf4_dequantize": lambda args: True,
    "nf4_linear of one token": lambda args: len(args[0]) == 1,
    "nf4_linear of many tokens": lambda args: len(args[0]) > 8,
    "nf4_linear_backward": lambda args: True,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_kernel_is_found_in_its_format_alone(family: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native, wrong = prove.native_op, fault.split()[0]

    def kernel(key: str, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = native(key, name)(*args)
            is_wrong = name == wrong and format_proofs.families_in(args) == {family} and FAULTS[fault](args)
            return one_wrong(found) if is_wrong else found

        return call

    monkeypatch.setattr(prove, "native_op", kernel)
    other = next(name for name in FAMILIES if name != family)
    found = prove.prove(CPU, [family, other])
    assert found[other] == "" and found[family].startswith(f"{wrong} in float32 is off by")


def test_a_small_wrong_element_of_a_decoded_weight_is_found() -> None:
    want = torch.randn(64, 64, dtype=torch.float64)
    got = want.float()
    got[3, 5] *= 1.01
    assert prove._differs([got], [want], torch.float32) == ""
    assert "is off" in prove._differs([got], [want], torch.float32, True)


def test_the_proof_s_weights_are_not_proved_themselves(fresh: Path) -> None:
    prove.settle("CPU", ["format mxfp4"])
    assert "format mxfp4" not in prove._gates["CPU"] and "format int" in prove._gates["CPU"]
    assert prove._proving.depth == 0


# --- when -------------------------------------------------------------------------------------------------------------


def test_a_first_weight_proves_its_format_alone_and_once_a_machine(
    fresh: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn("mxfp4"), drawn("mxfp4")
    assert asked == ["format mxfp4"]
    drawn("Q4_K")
    assert asked == ["format mxfp4", "format gguf_q4_k"]
    (saved,) = json.loads(fresh.read_text()).values()
    assert saved == ["format gguf_q4_k", "format mxfp4"]
    monkeypatch.setattr(prove, "_gates", {"CPU": dict.fromkeys(FAMILIES), "CUDA": {}})  # as in the next process
    drawn("mxfp4"), drawn("awq")
    assert asked[2:] == ["format awq"]


def test_doctor_s_proof_has_all_formats_on_the_cpu(fresh: Path, asked: list) -> None:
    prove.settle("CPU")
    assert set(asked) == FAMILIES.keys() and not prove._gates["CPU"]
    (found,) = prove.report("CPU").values()
    assert found == dict.fromkeys(FAMILIES, "")


def test_a_gpu_s_formats_are_proved_when_a_model_has_them(
    fresh: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prove, "_places", lambda key: [prove.Place(key, "a card", CPU)])
    monkeypatch.setattr(prove, "_of_place", lambda place, wanted, _: prove.prove(place.device, wanted))
    prove._gates["CUDA"].update(dict.fromkeys([*prove.families("CUDA"), *FAMILIES]))
    prove.settle("CUDA")
    assert asked == list(prove.families("CUDA")) and prove._gates["CUDA"].keys() == FAMILIES.keys()
    assert reasons.proved("cuda", "format awq") is None and asked[-1] == "format awq"


def test_a_weight_on_the_meta_device_or_of_fake_tensors_proves_nothing(fresh: Path, asked: list) -> None:
    prove._gates["CPU"].clear()
    weight = drawn("mxfp4")
    prove._gates["CPU"].update(dict.fromkeys(FAMILIES))
    weight.to("meta")
    with torch._subclasses.FakeTensorMode() as mode:
        weight.map(mode.from_tensor)
    assert not asked
    weight.map(torch.clone)
    assert asked == ["format mxfp4"]


def test_without_a_proof_nothing_is_asked(fresh: Path, asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_EXT_PROVE", "0")
    drawn("mxfp4")
    assert not asked and "format mxfp4" not in prove._gates["CPU"] and not prove.DROPPED


# --- a format that fails ----------------------------------------------------------------------------------------------


def test_all_operators_compute_a_format_that_fails_by_the_reference(
    fresh: Path, by_reference: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, "mxfp4", "awq")
    with pytest.warns(RuntimeWarning, match="format mxfp4: its CPU kernels were dropped on .*: it is off. The refer"):
        weight = drawn("mxfp4")
    good = drawn("nvfp4")
    exact, x, grads = decoded(weight, torch.float32), torch.randn(3, 256), {}
    a, b = torch.randn(4, 256), torch.randn(24, 4)
    by_reference.clear()
    wanted = x @ exact.T
    torch.testing.assert_close(ops.frozen_linear(x, weight), wanted)
    torch.testing.assert_close(weight.dequantize(torch.float32), exact)
    for name, held in {"mxfp4": weight, "nvfp4": good}.items():
        leaf = x.clone().requires_grad_()
        y = ops.lora_linear(leaf, held, a, b)
        y.sum().backward()
        grads[name] = leaf.grad
        ops.dora_weight_norm(held, a, b)
        ops.lora_linears(x, [held, held], [a, a], [b, b])
    assert set(by_reference) == {"mxfp4"} and len(by_reference) >= 6
    torch.testing.assert_close(grads["mxfp4"], (exact + b @ a).sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    with pytest.warns(RuntimeWarning, match="format awq"):
        later = drawn("awq")
    ops.frozen_linear(x, later)
    assert by_reference[-1] == "awq" and set(prove.DROPPED) == {("CPU", "format mxfp4"), ("CPU", "format awq")}


def test_an_operator_that_was_unproved_when_a_format_failed_is_proved_and_dropped_if_it_fails(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails(monkeypatch, "mxfp4")
    with pytest.warns(RuntimeWarning, match="format mxfp4"):
        drawn("mxfp4")
    proved = []
    monkeypatch.setattr(prove, "prove", lambda _, wanted, **__: proved.extend(wanted) or dict.fromkeys(wanted, "off"))
    prove._gates["CPU"]["ia3"] = torch.library.Library("peft_ext", "IMPL")
    called, reference = [], OPERATORS["ia3_linear"].reference
    counted = prove.OPERATORS["ia3_linear"].__class__(**{
        **vars(OPERATORS["ia3_linear"]), "reference": lambda *args: called.append(1) or reference(*args)
    })  # fmt: skip
    monkeypatch.setitem(OPERATORS, "ia3_linear", counted)
    with pytest.warns(RuntimeWarning, match="ia3: its CPU kernels were dropped"):
        ops.ia3_linear(torch.randn(3, 8), torch.randn(4, 8), torch.randn(4))
    assert proved == ["ia3"] and called == [1]


def test_a_layer_says_why_its_weight_is_computed_by_the_reference(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedLinear.from_packed(drawn("awq"), ("qweight", "scales", "qzeros"))
    assert reasons.weight_reason(layer) is None
    fails(monkeypatch, "mxfp4")
    with pytest.warns(RuntimeWarning, match="format mxfp4"):
        layer = PackedLinear.from_packed(drawn("mxfp4"), ("blocks", "scales"))
    assert reasons.weight_reason(layer).endswith("it is off")


def test_a_failure_is_an_error_where_the_kernels_are_required(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, "mxfp4")
    monkeypatch.setenv("PEFT_EXT_REQUIRE", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="format mxfp4: its CPU kernels failed: it is off"):
            drawn("mxfp4")


def test_a_rank_drops_the_format_that_failed_on_another_rank(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict] = []
    theirs = {"CPU": {"format mxfp4": "it is off there"}, "CUDA": {}}
    monkeypatch.setattr(prove, "_world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(prove, "_exchange", lambda own: told.append(own) or [own, theirs])
    fails(monkeypatch, "awq")
    with pytest.warns(RuntimeWarning, match="format awq"):
        drawn("awq")
    with pytest.warns(RuntimeWarning, match="format mxfp4: dropped on rank 1, and so on all ranks: it is off there"):
        prove.agree(lambda: None)
    assert told[0]["CPU"].keys() == {"format awq"} and ("CPU", "format mxfp4") in prove.DROPPED
    assert "format mxfp4" not in prove._gates["CPU"]


def test_many_formats_are_one_word_of_a_warning() -> None:
    assert format_proofs.listed(["lora", "format mxfp4"]) == "lora, format mxfp4"
    assert format_proofs.listed(["lora", *FAMILIES]) == f"lora, {len(FAMILIES)} formats of packed weights"
