"""Makes bases and adapters for tests of merging; the adapters have values as after some training."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import spread
from tiny_models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from peft_ext import MergeError, quantize_nf4

CAUSAL = {"task_type": "CAUSAL_LM"}

_tied = copy.deepcopy(ARCHITECTURES["Llama"].config)
_tied.tie_word_embeddings = True
MODELS = {**ARCHITECTURES, "Llama, tied": replace(ARCHITECTURES["Llama"], config=_tied)}


def lora(*targets: str, **options):
    task = options.pop("task_type", "CAUSAL_LM")
    return LoraConfig(task_type=task, r=4, init_lora_weights=False, target_modules=list(targets), **options)


def trained(model, config):
    """Returns the adapted model. The adapter has random values, as after some training."""
    torch.manual_seed(3)
    adapted = get_peft_model(model, config).eval()
    spread(adapted)
    torch.manual_seed(4)
    for name, parameter in adapted.named_parameters():
        drawn = "lora_E" in name or not ("lora_" in name or "ia3_" in name or "oft_" in name)
        if parameter.requires_grad and drawn:
            parameter.data += (300 if "lora_E" in name else 0.1) * torch.randn_like(parameter)
    return adapted


def dequantized(model, blocksize=64, double_quant=True):
    """Returns a float32 copy, with each weight that quantize_nf4 quantizes replaced by its dequantized values."""
    dense = copy.deepcopy(model).float()
    for name, module in quantize_nf4(
        copy.deepcopy(model), blocksize=blocksize, double_quant=double_quant
    ).named_modules():
        if hasattr(module, "nf4"):
            dense.get_submodule(name).weight.data = module.dequantize(torch.float32)
    return dense


def refusal(merge, *arguments, **options):
    """Returns the text of the MergeError that ``merge`` raises, one line, without the function's name."""
    with pytest.raises(MergeError) as caught:
        merge(*arguments, **options)
    text, name = str(caught.value), f"{merge.__name__}: "
    assert text.startswith(name) and "\n" not in text
    return text.removeprefix(name)


def same_as_on(base, adapter, out, dtype=torch.float32):
    exact = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert found.keys() == exact.keys()
    return [key for key, tensor in found.items() if not torch.equal(tensor, exact[key].to(dtype))]
