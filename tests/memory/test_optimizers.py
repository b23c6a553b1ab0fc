"""Compares what estimate_memory says of an optimizer's states with the states of real optimizers."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from memory_steps import allocated  # noqa: E402

from peft_ext.memory import estimate_memory  # noqa: E402
from peft_ext.memory.optimizers import OPTIMIZERS as KNOWN_OPTIMIZERS  # noqa: E402

pytestmark = pytest.mark.cpu_only("the estimated steps run on the CPU or not at all")

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
    "adafactor": transformers.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states(name):
    model = nn.Linear(64, 96)
    optimizer = OPTIMIZERS[name](model.parameters())
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    wanted = sum(t.nbytes for t in states if t.dim())
    assert estimate_memory(model, optimizer=name, inputs={"input": torch.empty(2, 64)}).optimizer == wanted


def test_eight_bit_states():
    model = nn.Linear(64, 128)  # the bias has fewer than 4096 elements, so that its states are float32
    inputs = {"input": torch.empty(2, 64)}
    weight, bias = 64 * 128 + 4 * 64 * 128 // 256, 4 * 128
    assert estimate_memory(model, optimizer="adamw_8bit", inputs=inputs).optimizer == 2 * (weight + bias)
    assert estimate_memory(model, optimizer="lion_8bit", inputs=inputs).optimizer == weight + bias
    assert estimate_memory(model, optimizer="lion_32bit", inputs=inputs).optimizer == 4 * (64 * 128 + 128)
    assert estimate_memory(model, optimizer=None, inputs=inputs).optimizer == 0


def test_the_states_of_an_embedding_are_float32_under_an_8_bit_optimizer():
    """Trainer tells bitsandbytes to keep 32 bits for each nn.Embedding."""
    model = nn.Sequential(nn.Embedding(512, 64), nn.Linear(64, 128, bias=False))
    inputs = {"input": torch.zeros(2, dtype=torch.int64)}
    embedding, linear = 4 * 512 * 64, 64 * 128 + 4 * 64 * 128 // 256
    assert estimate_memory(model, optimizer="adamw_8bit", inputs=inputs).optimizer == 2 * (embedding + linear)
    assert estimate_memory(model, optimizer="lion_8bit", inputs=inputs).optimizer == embedding + linear


def test_the_optimizers_step_counts_where_it_is_largest():
    model = nn.Linear(512, 512, bias=False)
    inputs, size = {"input": torch.empty(1, 512)}, 4 * 512 * 512
    adamw, fused = (estimate_memory(model, optimizer=name, inputs=inputs, device="cuda") for name in
                    ("adamw", "adamw_torch_fused"))  # fmt: skip
    assert abs(adamw.total - fused.total - size) < 64
    assert 4 * size <= fused.total < 4.1 * size
    # The weight, its gradient and its state, and two temporary copies of the gradient.
    adagrad = estimate_memory(model, optimizer="adagrad", inputs=inputs, device="cuda")
    assert 5 * size <= adagrad.total < 5.1 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "adagrad", "rmsprop", "adafactor"])
def test_the_temporary_tensors_of_a_step_are_those_of_a_real_step(name: str, dtype: torch.dtype):
    """A step updates, on a CPU, one parameter after the other."""
    shapes = ((256, 512), (512,), (640, 512), (384, 512), (64,))
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    for p in parameters:
        p.grad = torch.ones_like(p)
    groups = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]]
    optimizer = OPTIMIZERS[name]([{"params": group} for group in groups])
    optimizer.step()
    wanted = allocated(optimizer.step)
    assert abs(KNOWN_OPTIMIZERS[name].temporary(parameters, "cpu") / wanted - 1) < 0.02
