"""Tests which biases BitFit finds and adds, also over NF4Linear and bitsandbytes' linear layers."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("aenum")
pytest.importorskip("bitsandbytes")

import accelerate
import bitsandbytes as bnb
import peft
from transformers import BertConfig, BertForSequenceClassification
from tuner_models import logits, make, spread, wrapped

import peft_ext
from peft_ext.model import get_peft_model
from peft_ext.nn import NF4Linear
from peft_ext.tuners import BitFitConfig

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_bias_of_every_linear_kind_runs_in_the_base_modules_own_forward():
    """Covers nn.Linear, NF4Linear and bitsandbytes' 4-bit and 8-bit layers, accelerated or not: the base module's own
    forward adds the bias.
    """

    class Net(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.up, self.down = linear(64, 128, bias=False), linear(128, 64, bias=True)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    def linear4bit(*args, bias):
        return bnb.nn.Linear4bit(*args, bias=bias, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")

    def nf4(*args, bias):
        return NF4Linear.from_linear(nn.Linear(*args, bias=bias))

    def linear8bit(*args, bias):
        return bnb.nn.Linear8bitLt(*args, bias=bias, has_fp16_weights=False).to("cpu")

    def fp8(*args, bias):
        return peft_ext.quantize_packed(nn.Sequential(nn.Linear(*args, bias=bias)), "fp8", progress=False)[0]

    def mxfp4(*args, bias):
        return peft_ext.quantize_packed(nn.Sequential(nn.Linear(*args, bias=bias)), "mxfp4", progress=False)[0]

    kinds = [(nn.Linear, torch.float32), (linear8bit, torch.float32)]
    kinds += [(kind, dtype) for kind in (nf4, linear4bit, fp8, mxfp4) for dtype in (torch.float32, torch.bfloat16)]
    for kind, dtype in kinds:
        torch.manual_seed(4)
        base = Net(kind)
        plain = copy.deepcopy(base)
        for fused in (False, True):
            config = BitFitConfig(add_bias=["up"])
            model = get_peft_model(copy.deepcopy(base), config, accelerate=fused).eval()
            twin = copy.deepcopy(plain)
            twin = (peft_ext.accelerate(twin) if fused else twin).eval()
            x = torch.randn(5, 64, dtype=dtype)
            # bitsandbytes repacks a weight for good in eval mode without gradients, so each run makes a new layer.
            y = model(x.requires_grad_())
            assert torch.equal(y, twin(x)), kind
            spread(model)
            twin.up.bias = nn.Parameter(model.base_model.model.up.bitfit_tensors["default"].bias.detach().clone())
            twin.down.bias.data = model.base_model.model.down.bitfit_tensors["default"].bias.detach().clone()
            twin.down.bias.requires_grad_()  # a packed layer's bias is frozen
            assert torch.equal(model(x), twin(x)), kind
            model(x).float().square().sum().backward()
            twin(x).float().square().sum().backward()
            for layer in ("up", "down"):
                mine = getattr(model.base_model.model, layer).bitfit_tensors["default"].bias
                assert mine.dtype is torch.float32 and torch.equal(mine.grad, getattr(twin, layer).bias.grad.float())
            y = model(x)
            model.merge_adapter()
            assert torch.equal(model(x), y), kind
            model.unmerge_adapter()
            assert model.base_model.model.up.base_layer.bias is None
            assert torch.equal(model(x), y), kind
            merged = model.merge_and_unload()
            assert type(merged.up.bias) is nn.Parameter and torch.equal(merged(x), y), kind


def test_counts_of_bert_base():
    def count(**config):
        with torch.device("meta"):
            model = BertForSequenceClassification(BertConfig())
        return peft.get_peft_model(model, BitFitConfig(**config)).get_nb_trainable_parameters()[0]

    assert count() - 2 == 102_912  # if the head is trained whole, its two biases are no targets
    assert count(task_type="SEQ_CLS") == 104_450
    assert count(bias_kinds=["query", "mlp_up"]) == 12 * (768 + 3072)
    kinds = {kind: count(bias_kinds=kind) for kind in ("attention", "mlp", "norm", "other")}
    assert kinds == {"attention": 12 * 4 * 768, "mlp": 12 * (3072 + 768), "norm": 25 * 768, "other": 768 + 2}
    assert count(target_modules=["encoder.layer.11"]) == 8448
    assert count(layers_to_transform=[3, 4], target_modules=["output"]) == 2 * 4 * 768


def test_offloading_is_refused():
    model, _ = make("BitFit", "bert")
    accelerate.cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="BitFitLayer over LayerNorm: accelerate offloads its tensors"):
        logits(model)


def test_a_layer_whose_backward_gives_the_bias_no_gradient_is_refused():
    library = pytest.importorskip("transformers.integrations.finegrained_fp8")
    base = nn.Sequential(nn.Linear(128, 128), library.FP8Linear(128, 128, (128, 128), has_bias=True))
    with pytest.raises(ValueError, match="1 is a FP8Linear, whose backward computes no gradient of the bias"):
        peft.get_peft_model(base, BitFitConfig())
    model = peft.get_peft_model(base, BitFitConfig(exclude_modules=["1"]))
    assert wrapped(model) == {"0"}
