"""Tiny models under BitFit, partial fine-tuning and Diff Pruning, and references for their adapters."""

import copy
import functools

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_ext.tuners import BitFitConfig, DiffPruningConfig, PartialConfig

VOCAB, LAYERS, HIDDEN = 29, 2, 16
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
          "vocab_size": VOCAB}  # fmt: skip
_BERT = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_BERT)),
    "bert mlm": lambda: BertForMaskedLM(BertConfig(**_BERT)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=HIDDEN, n_layer=LAYERS, n_head=2, vocab_size=VOCAB, n_positions=16, resid_pdrop=0.0,
                   embd_pdrop=0.0, attn_pdrop=0.0)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=HIDDEN, d_kv=8, d_ff=24, num_layers=LAYERS, num_heads=2, vocab_size=VOCAB, dropout_rate=0.0,
                 decoder_start_token_id=0, pad_token_id=0)
    ),
}  # fmt: skip


def make_base(name):
    torch.manual_seed(1)
    model = _MODELS[name]()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases of 0 and norm weights of 1 would hide a missing bias or a swapped norm
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def batch(model):
    ids = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 1]) if isinstance(model, BertForSequenceClassification) else ids
    return {"input_ids": ids, "labels": labels}


# Arguments of BitFitConfig by architecture.
BITFIT = {"bert": {}, "gpt2": {}, "llama": {"add_bias": "all-linear"}, "t5": {"add_bias": ["q", "wo"]}}
PREFIX = {"BitFit": "bitfit_", "partial": "partial_", "diff": "diff_pruning_"}
CASES = [(method, name) for method in PREFIX for name in BITFIT]
every_case = pytest.mark.parametrize(("method", "name"), CASES)
every_method = pytest.mark.parametrize("method", list(PREFIX))


def config_of(method, name="bert", **config):
    if method == "BitFit":
        return BitFitConfig(**BITFIT[name], **config)
    if method == "partial":
        return PartialConfig(**{"num_last_layers": 1, **config})
    return DiffPruningConfig(**{"sparsity_penalty": 1e-3, **config})


def make(method, name="bert", **config):
    base = make_base(name)
    return peft.get_peft_model(copy.deepcopy(base), config_of(method, name, **config)), base


def adapter_parameters(model, adapter="default"):
    return {n: p for n, p in model.named_parameters() if f"_tensors.{adapter}." in n}


def spread(model, adapter="default", seed=3):
    """Adds random numbers to the adapter's parameters, as after some training, and returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(model, adapter).items():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (noise if name.endswith("alpha") else 0.05 * noise).to(parameter.dtype)
    return model


def make_spread(method, name="bert", **config):
    model, base = make(method, name, **config)
    return spread(model), base


def _batch_of(model):
    return batch(getattr(model, "get_base_model", lambda: model)())


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**_batch_of(model), **kwargs).logits


def gradients(model):
    model.zero_grad()
    model(**_batch_of(model)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reference(model, base, adapter="default"):
    """Returns a copy of the base model with the adapter's tensors written into it. Only these tensors are trainable."""
    plain = copy.deepcopy(base)
    plain.requires_grad_(False)
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for key, value in state.items():
        module, _, name = key.removeprefix("base_model.model.").rpartition("_tensors.")
        module = plain.get_submodule(module.rpartition(".")[0])
        path, _, leaf = name.rpartition(".")
        old = getattr(module.get_submodule(path), leaf)
        if old is None:
            module.get_submodule(path).register_parameter(leaf, nn.Parameter(value.clone()))
        else:
            old.data.copy_(value)
            old.requires_grad_(True)
    return plain


def of_base(name):
    """Returns the name that a tensor of an adapter has in the base model."""
    head, _, tail = name.removeprefix("base_model.model.").rpartition("_tensors.default.")
    return f"{head.rpartition('.')[0]}.{tail}"


def state_bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# Asserts that two dictionaries of tensors have equal names, dtypes and bits.
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def wrapped(model):
    return {name for name, layer in model.base_model.layers() if "default" in layer.adapters}


class Mixer(nn.Module):
    """A module with projections and a parameter of its own, like a state-space layer."""

    def __init__(self):
        super().__init__()
        self.decay = nn.Parameter(torch.randn(8))
        self.register_buffer("seen", torch.zeros(()))
        self.inner, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        self.seen.add_(1)
        return self.norm(self.inner(x)) * self.decay


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Mixer() for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + 0 * layer.inner.bias.sum() + 0 * layer.decay.sum()
        return self.head(x)


def rows_for(base):
    """Returns twelve rows of data for a Trainer."""
    ids = torch.randint(3, VOCAB, (12, 6), generator=torch.Generator().manual_seed(4))
    labels = ids[:, 0] % 2 if isinstance(base, BertForSequenceClassification) else ids
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def train(model, folder, base, resume=None, callbacks=(), **arguments):
    arguments = {"max_steps": 12, "per_device_train_batch_size": 6, "learning_rate": 0.05, "save_strategy": "no",
                 "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 0,
                 "lr_scheduler_type": "constant", **arguments}  # fmt: skip
    trainer = Trainer(model=model, args=TrainingArguments(folder, **arguments), train_dataset=rows_for(base),
                      callbacks=list(callbacks))  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def data_loss(model, base):
    rows = rows_for(base)
    return model.eval()(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss
