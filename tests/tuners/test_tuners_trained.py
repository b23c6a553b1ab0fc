"""Tests of tuners in a training: PyTorch's CheckpointWrapper, and the weight decay of transformers' Trainer."""

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("aenum")
pytest.importorskip("bitsandbytes")

import peft
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import Trainer
from tuner_models import assert_same, config_of, make_base, spread


class Scaled(nn.Module):
    """A module with a parameter of its own, so that the adapter wraps the module and not the layers in it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x):
        return self.scale * self.body(x)


@pytest.mark.parametrize("method", ["partial", "diff"])
@pytest.mark.parametrize("where", ["before", "after", "around"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_pytorch_s_checkpoint_wrapper_in_and_around_a_layer(method, where, reentrant):
    """Without the adapter's tensors in the recomputation, the gradient of the earlier layer would be another."""

    fields = {"num_last_layers": None} if method == "partial" else {}

    def checkpointed(module):
        kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        return checkpoint_wrapper(module, checkpoint_impl=kind)

    def step(where):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 8), Scaled(), nn.Linear(8, 2))
        if where == "before":
            base[1].body = checkpointed(base[1].body)
        model = spread(peft.get_peft_model(base, config_of(method, target_modules=["0", "1"], **fields))).train()
        if where == "after":
            base[1].base_layer.body = checkpointed(base[1].base_layer.body)
        if where == "around":
            base[1] = checkpointed(base[1])
        torch.manual_seed(5)
        model(torch.randn(4, 8)).square().sum().backward()
        return {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()
                if p.grad is not None}  # fmt: skip

    assert_same(step(where), step(None))


@pytest.mark.parametrize("method", ["partial", "diff"])
def test_an_adapter_whose_name_ends_weight_decay(method):
    """transformers' Trainer leaves out parameters by names, in which the adapter's name is a part."""
    for name, kept in (("bias_of_x", False), ("my_norm", False), ("LayerNorm", False), ("normal", True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = peft.get_peft_model(make_base("llama"), config_of(method), name)
        told = [str(one.message) for one in caught if "weight decay" in str(one.message)]
        trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        decayed = Trainer.get_decay_parameter_names(None, model)
        assert bool(told) is not kept and (kept or not set(trained) & set(decayed))
