"""Tests that a build of torch for other GPUs is named, and that its GPU tensors are said to run the reference."""

from __future__ import annotations

import warnings

import pytest
import torch

from peft_ext import _native, _torch_build
from peft_ext.cli.main import main
from peft_ext.integrations.adapter_layers import reasons

BUILDS = {
    "CUDA 13.0": {"cuda": "13.0"},
    "ROCm 6.4.1": {"hip": "6.4.1"},
    "XPU 20250302": {"xpu": "20250302"},
    "MPS": {},
    "CPU": {},
}
WITHOUT_KERNELS = {"ROCm 6.4.1": "AMD GPUs", "XPU 20250302": "Intel GPUs", "MPS": "Apple GPUs"}


class NoCuda:
    """A native library whose CUDA functions must not be registered."""

    def register_operators(self, *_: object) -> None:
        raise AssertionError("registers the CUDA functions")

    set_image_source = register_operators


def no_image(kernel: str, file: str, capability: int) -> tuple[bytes, bytes]:
    raise AssertionError("asks for a kernel")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> _native.NativeState:
    fresh = _native.NativeState(module=_native.STATE.module, build=_native.STATE.build)
    monkeypatch.setattr(_native, "STATE", fresh)
    return fresh


def simulate(monkeypatch: pytest.MonkeyPatch, build: str, gpus: bool) -> None:
    """Simulates a torch of the build, with one GPU that the build can use, or without a GPU."""
    for name in ("cuda", "hip", "xpu"):
        monkeypatch.setattr(torch.version, name, BUILDS[build].get(name), raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: build == "MPS")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: build == "MPS" and gpus)
    for module, found in ((torch.cuda, "cuda" in BUILDS[build] or "hip" in BUILDS[build]),
                          (torch.xpu, "xpu" in BUILDS[build])):  # fmt: skip
        monkeypatch.setattr(module, "is_available", lambda found=found: found and gpus)
        monkeypatch.setattr(module, "device_count", lambda: 1)
        monkeypatch.setattr(module, "get_device_name", lambda index: "Card 7")


@pytest.mark.parametrize("build", BUILDS)
def test_the_build_is_told(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, build, gpus=True)
    found = _torch_build.torch_build()
    assert str(found) == build
    assert WITHOUT_KERNELS.get(build, "") in found.why_no_kernels
    assert (found.why_no_kernels == "torch is a CPU build") == (build == "CPU")
    assert (found.why_no_kernels == "") == (build == "CUDA 13.0")
    assert len(found.devices()) == (0 if build == "CPU" else 1)


@pytest.mark.parametrize("gpus", [True, False], ids=["a GPU", "no GPU"])
@pytest.mark.parametrize("build", WITHOUT_KERNELS)
def test_the_import_warns_once_of_a_gpu_without_kernels(build: str, gpus: bool, state, monkeypatch) -> None:
    simulate(monkeypatch, build, gpus)
    monkeypatch.setattr(state, "module", NoCuda())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _native._register_cuda(no_image)
    assert not state.cuda_loaded and build in state.cuda_error and WITHOUT_KERNELS[build] in state.cuda_error
    assert len(caught) == gpus
    for warning in caught:
        text = str(warning.message)
        assert state.cuda_error in text and "the slow reference" in text and "No other installation" in text


@pytest.mark.parametrize("build", [*WITHOUT_KERNELS, "CPU"])
def test_doctor_says_what_runs_where(build: str, state, monkeypatch, capsys) -> None:
    simulate(monkeypatch, build, gpus=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _native._register_cuda(no_image)
    main(["doctor"])
    rows = {line[2:28].strip(): line[29:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert rows["torch is built for"] == build
    assert rows["tensors on the CPU run"] == ("the CPU kernels" if state.module else "the slow reference")
    if build == "CPU":
        assert rows["GPUs"] == "none" and "tensors on a GPU run" not in rows
    else:
        assert rows["GPUs"] == ("the GPU of this Mac" if build == "MPS" else "Card 7")
        assert rows["tensors on a GPU run"] == f"the slow reference: {state.cuda_error}"
        assert "CPU build" not in " ".join(rows.values())


def test_explain_does_not_call_a_rocm_build_a_cpu_build(state, monkeypatch) -> None:
    simulate(monkeypatch, "ROCm 6.4.1", gpus=False)
    _native._register_cuda(no_image)
    monkeypatch.setattr(reasons, "STATE", state)
    monkeypatch.setattr(reasons, "KERNELS", {"lora_linear": {"cpu": True, "cuda": False}})
    why = reasons.kernel_reason("lora_linear", "cuda")
    assert "ROCm 6.4.1" in why and "CPU build" not in why
