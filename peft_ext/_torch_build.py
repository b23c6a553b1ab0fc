"""Finds for which GPUs this torch was built, and whether peft_ext has kernels for these GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The name of a GPU build of torch -> the GPUs that the build computes on.
_GPUS = {"CUDA": "NVIDIA GPUs", "ROCm": "AMD GPUs", "XPU": "Intel GPUs", "MPS": "Apple GPUs"}


@dataclass(frozen=True)
class TorchBuild:
    """The kind of GPU that torch was built for.

    Attributes:
        name: name of the platform: "CUDA", "ROCm", "XPU" or "MPS", or "CPU" if torch was built for no GPU.
        version: the release of CUDA, ROCm or XPU that torch was built with; "" for MPS and CPU.
    """

    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()

    @property
    def why_no_kernels(self) -> str:
        """Why peft_ext has no kernels for GPU tensors of this build, as a text; "" for a CUDA build."""
        if self.name == "CUDA":
            return ""
        if self.name == "CPU":
            return "torch is a CPU build"
        return f"torch is built for {self}, and peft_ext has no kernels for {_GPUS[self.name]}"

    def has_gpu(self) -> bool:
        """Returns whether torch can use a GPU on this machine."""
        if self.name == "XPU":
            return torch.xpu.is_available()
        if self.name == "MPS":
            return torch.backends.mps.is_available()
        return torch.cuda.is_available()  # a ROCm build also calls its GPUs "cuda"

    def devices(self) -> list[str]:
        """Returns the names of the GPUs that torch can use on this machine."""
        if not self.has_gpu():
            return []
        if self.name == "MPS":
            return ["the GPU of this Mac"]
        module = torch.xpu if self.name == "XPU" else torch.cuda
        return [module.get_device_name(i) for i in range(module.device_count())]


def torch_build() -> TorchBuild:
    """Returns the build of the imported torch."""
    # On a ROCm build, torch.cuda works too, and tensors on the GPU have the dispatch key CUDA.
    if torch.version.hip is not None:
        return TorchBuild("ROCm", torch.version.hip)
    if torch.version.cuda is not None:
        return TorchBuild("CUDA", torch.version.cuda)
    if xpu := getattr(torch.version, "xpu", None):
        return TorchBuild("XPU", xpu)
    if torch.backends.mps.is_built():
        return TorchBuild("MPS")
    return TorchBuild("CPU")
