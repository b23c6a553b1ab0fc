"""Makes models for the tests of the memory estimate, and measures real training steps."""

import copy

import peft
import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import peft_ext
from peft_ext.memory import estimate_memory

TOKENS = {"batch_size": 2, "sequence_length": 64}
LLAMA = transformers.LlamaConfig(
    hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, tie_word_embeddings=True,
)  # fmt: skip
BERT = transformers.BertConfig(
    hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
)
GPT2 = transformers.GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=512, n_positions=64)
MIXTRAL = transformers.MixtralConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, num_local_experts=4,
)  # fmt: skip
BF16 = {"dtype": torch.bfloat16}


def lora(**changes):
    return peft.LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def held(model, optimizer):
    """Returns the bytes of the tensors of model and optimizer that outlive a step; counts each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is not None:
        tensors += [*allocator.ipt.values(), *allocator.exp_avg_ipt.values(), *allocator.exp_avg_unc.values()]
    for module in model.modules():
        quant_state = getattr(getattr(module, "weight", None), "quant_state", None)
        if quant_state is not None:
            tensors += [quant_state.absmax] + ([quant_state.state2.absmax] if quant_state.nested else [])
        state = getattr(module, "state", None)
        tensors += [t for t in (getattr(state, "CB", None), getattr(state, "SCB", None)) if t is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.fixture(autouse=True)
def one_thread():
    """Runs a test on one thread: PyTorch's 16-bit products allocate much memory per thread for a small model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(model, autocast=None, padding=False):
    """Returns the peak bytes of the second training step, as PyTorch's profiler sees the allocator."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 512, (2, 64))
    classifies = (
        "SequenceClassification" in type(model.get_base_model() if hasattr(model, "peft_config") else model).__name__
    )
    inputs = {"input_ids": ids, "labels": torch.randint(0, 2, (2,)) if classifies else ids}
    if not classifies:
        inputs["use_cache"] = False
    if padding:
        inputs["attention_mask"] = (torch.arange(64) < torch.tensor([[64], [50]])).long()

    def step():
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        if hasattr(getattr(model, "base_model", None), "rankallocator"):
            model.base_model.update_and_allocate(1)
        optimizer.zero_grad()

    step()
    return held(model, optimizer) + ids.nbytes + allocated(step)


def allocated(run):
    """Returns the peak bytes of a call, as PyTorch's profiler sees the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        alive += change.nbytes()
        peak = max(peak, alive)
    assert peak > 0, "the profiler saw no allocation"
    return peak


def build(config, dtype=torch.float32):
    torch.manual_seed(0)
    classifies = isinstance(config, transformers.BertConfig)
    auto = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    return auto.from_config(copy.deepcopy(config), dtype=dtype)


def adapted(config, adapter, dtype=torch.float32, nf4=False, packed=None, accelerated=True, checkpointing=False):
    model = build(config, dtype)
    if adapter is not None:
        model = peft.get_peft_model(model, copy.deepcopy(adapter))
    if nf4:
        peft_ext.quantize_nf4(model, progress=False)
    if packed is not None:
        peft_ext.quantize_packed(model, packed, progress=False)
    if accelerated:
        peft_ext.accelerate(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def estimated(config, adapter, nf4=False, packed=None, checkpointing=False, **changes):
    changes = {"quantization": "nf4" if nf4 else packed, "device": "cpu", **TOKENS, **changes}
    return estimate_memory(config, adapter, gradient_checkpointing=checkpointing, **changes)


def assert_near(estimate, wanted, within=0.02):
    """Asserts that the estimate differs from the measured bytes by less than the fraction ``within``.

    The default is 2 %, because the estimate of scratch memory is an upper bound. For models of real sizes the
    difference is about 0.1 %.
    """
    assert abs(estimate.total / wanted - 1) < within, f"estimated {estimate.total:,}, measured {wanted:,}\n{estimate}"
