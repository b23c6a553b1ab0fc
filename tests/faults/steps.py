"""The computation of DataLoader workers, in a small module that a spawned process imports quickly."""

import torch

from peft_ext import ops


def step(seed: int = 0, quantized: bool = False) -> torch.Tensor:
    """Returns output and gradients of an adapted layer in one tensor."""
    torch.manual_seed(seed)
    x = torch.randn(48, 128, requires_grad=True)
    weight, a, b = torch.randn(96, 128), torch.randn(4, 128, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    y = ops.lora_linear(x, ops.nf4_quantize(weight) if quantized else weight, a, b, dropout_p=0.1, training=True)
    y.square().sum().backward()
    return torch.cat([t.detach().flatten() for t in (y, x.grad, a.grad, b.grad)])


class Steps(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return step(index, quantized=True)
