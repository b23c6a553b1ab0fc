"""Tests prompt tuning: plain transformers models with a prompt module give the results of PEFT's models.

The last tests of this file test PromptEmbedding and PrefixEncoder as modules, without a model.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from virtual_token_models import GROUPED, VOCAB, P, T, make_inputs, make_model, their_encoder, with_peft

from peft_ext.nn.prefix import PrefixEncoder
from peft_ext.nn.prompt import PromptEmbedding

# Transformers 5.24 renamed the argument for the cache and warns about the name that releases since 5.0 use.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def peft_prompt(model: nn.Module) -> peft.PeftModel:
    return with_peft("llama", model, peft.PromptTuningConfig)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompt_logits_loss_and_gradients_are_pefts(kind: str, dtype: torch.dtype) -> None:
    model = make_model(kind).to(dtype)
    theirs = peft_prompt(model)
    prompt = PromptEmbedding(P, 32)
    prompt.load_state_dict(their_encoder(theirs).state_dict())
    inputs = make_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    wanted = theirs(**inputs, labels=labels)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got = model(**prompt.prepend(embeds, inputs["attention_mask"], labels))
    assert torch.equal(got.logits, wanted.logits) and torch.equal(got.loss, wanted.loss)
    wanted.loss.backward()
    got.loss.backward()
    # The gradient is summed over the batch in float32 for bfloat16 too; a sum in bfloat16 would differ by 1e-3.
    torch.testing.assert_close(
        prompt.embedding.weight.grad, their_encoder(theirs).embedding.weight.grad, rtol=1e-6, atol=0
    )
    assert not torch.allclose(got.logits[:, P:], model(**inputs).logits, rtol=1e-2, atol=1e-2)


def test_prompt_files_are_pefts_both_ways(tmp_path) -> None:
    model = make_model("llama")
    theirs = peft_prompt(model)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    prompt = PromptEmbedding(P, 32)
    prompt.load_prompt_embeddings(load_file(file)["prompt_embeddings"])
    assert torch.equal(prompt.embedding.weight, their_encoder(theirs).embedding.weight)
    save_file({"prompt_embeddings": 2 * prompt.embedding.weight.detach()}, file, metadata={"format": "pt"})
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert torch.equal(their_encoder(theirs).embedding.weight, 2 * prompt.embedding.weight)


def test_prompt_forward_and_its_gradients() -> None:
    prompt = PromptEmbedding(P, 4)
    x = torch.randn(3, T, 4, requires_grad=True)
    y = prompt(x)
    assert y.shape == (3, P + T, 4)
    assert torch.equal(y[:, P:], x) and all(torch.equal(row, prompt.embedding.weight) for row in y[:, :P])
    assert prompt(x.bfloat16()).dtype is torch.bfloat16
    direction = torch.randn_like(y)
    y.backward(direction)
    assert torch.equal(x.grad, direction[:, P:])
    torch.testing.assert_close(prompt.embedding.weight.grad, direction[:, :P].sum(0))
    assert prompt.prompt(7).shape == (7, P, 4)
    # A prompt for a batch is a view of the embedding's weight.
    assert prompt.prompt(7).data_ptr() == prompt.embedding.weight.data_ptr()


def test_prepend_extends_what_it_is_given() -> None:
    prompt = PromptEmbedding(2, 4)
    x = torch.randn(2, 3, 4)
    assert prompt.prepend(x).keys() == {"inputs_embeds"}
    mask, labels = torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.arange(6).view(2, 3)
    out = prompt.prepend(x, mask, labels, token_type_ids=torch.ones(2, 3, dtype=torch.int64))
    assert torch.equal(out["inputs_embeds"], prompt(x))
    assert out["attention_mask"].tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert out["labels"].tolist() == [[-100, -100, 0, 1, 2], [-100, -100, 3, 4, 5]]
    assert out["token_type_ids"].tolist() == [[0, 0, 1, 1, 1]] * 2
    for dtype in (torch.bool, torch.int64, torch.float32):
        extended = prompt.extend_mask(mask.to(dtype))
        assert extended.dtype is dtype and torch.equal(extended.long(), out["attention_mask"])
    assert torch.equal(prompt.extend_labels(labels), out["labels"])


def word_level() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "is", "this", "review", "good", "or", "bad"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("length", [3, 6, 17], ids=["cut", "exact", "repeated"])
def test_from_text_is_pefts(length: int, tmp_path) -> None:
    tokenizer, embedding, text = (
        word_level(),
        nn.Embedding(VOCAB, 8, dtype=torch.bfloat16),
        "is this review good or bad",
    )
    tokenizer.save_pretrained(tmp_path)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=length, token_dim=8, num_transformer_submodules=1,
        prompt_tuning_init="TEXT", prompt_tuning_init_text=text, tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    theirs = peft.PromptEmbedding(config, embedding)
    prompt = PromptEmbedding.from_text(text, tokenizer, embedding, length)
    assert prompt.embedding.weight.dtype is torch.float32
    assert torch.equal(prompt.embedding.weight, theirs.embedding.weight)
    assert prompt.embedding.weight.requires_grad and prompt.num_virtual_tokens == length and prompt.token_dim == 8


def test_from_vocab_is_pefts_from_the_same_seed() -> None:
    embedding = nn.Embedding(VOCAB, 8)
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, token_dim=8, num_transformer_submodules=1,
        prompt_tuning_init="SAMPLE_VOCAB",
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = peft.PromptEmbedding(config, embedding)
    torch.manual_seed(3)
    nn.Embedding(P, 8)  # PEFT draws the random start of an embedding before it draws the tokens
    prompt = PromptEmbedding.from_vocab(embedding, P)
    assert torch.equal(prompt.embedding.weight, theirs.embedding.weight)


def test_from_vocab_draws_rows_and_keeps_a_copy() -> None:
    embedding = nn.Embedding(3, 8)
    draws = [PromptEmbedding.from_vocab(embedding, 40, torch.Generator().manual_seed(s)).embedding for s in (1, 1, 2)]
    rows = {tuple(row) for row in embedding.weight.tolist()}
    assert {tuple(row) for row in draws[0].weight.tolist()} == rows  # in 40 draws each of the three rows occurs
    assert torch.equal(draws[0].weight, draws[1].weight) and not torch.equal(draws[0].weight, draws[2].weight)
    before = embedding.weight.clone()
    with torch.no_grad():
        draws[0].weight.zero_()
    assert torch.equal(embedding.weight, before)


def test_prompt_starts_as_what_the_model_reads() -> None:
    """Gemma's embedding module scales its output, so a prompt must start from the scaled embeddings."""
    config = transformers.Gemma2Config(**{**GROUPED, "num_hidden_layers": 1, "head_dim": 8})
    embedding = transformers.Gemma2ForCausalLM(config).get_input_embeddings()
    prompt = PromptEmbedding.from_text("is bad", word_level(), embedding, 2)
    assert torch.equal(prompt.embedding.weight, embedding(torch.tensor([1, 6])))
    assert not torch.equal(prompt.embedding.weight, embedding.weight[[1, 6]])


def test_prompt_parameter_count() -> None:
    prompt = PromptEmbedding(20, 4096, device="meta")
    assert sum(p.numel() for p in prompt.parameters()) == 81_920 and prompt.embedding.weight.is_meta


X, EMBEDDING = torch.ones(2, 3, 4), nn.Embedding(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PromptEmbedding(0, 4), ValueError,
         "PromptEmbedding: num_virtual_tokens is 0, wanted an integer of at least 1"),
        (lambda: PromptEmbedding(2, "4"), ValueError,
         "PromptEmbedding: token_dim is '4', wanted an integer of at least 1"),
        (lambda: PromptEmbedding(2, 4, dtype=torch.int8), TypeError, "PromptEmbedding: dtype is torch.int8"),
        (lambda: PromptEmbedding(2, 4)(X.long()), TypeError, "inputs_embeds is int64, wanted one of float32"),
        (lambda: PromptEmbedding(2, 4)(torch.zeros(3, 4)), ValueError,
         r"inputs_embeds has shape \(3, 4\), wanted \[B, T, 4\]"),
        (lambda: PromptEmbedding(2, 4)(torch.zeros(2, 3, 5)), ValueError,
         r"inputs_embeds has shape \(2, 3, 5\), wanted \[B, T, 4\]"),
        (lambda: PromptEmbedding(2, 4)(X.to("meta")), ValueError, "inputs_embeds is on meta, embedding is on cpu"),
        (lambda: PromptEmbedding(2, 4).extend_mask(torch.ones(2, 1, 3, 3)), ValueError,
         r"attention_mask has shape \(2, 1, 3, 3\), wanted \[B, T\]"),
        (lambda: PromptEmbedding(2, 4).extend_mask([1]), TypeError, "attention_mask is list, wanted a Tensor"),
        (lambda: PromptEmbedding(2, 4).prepend(X, torch.ones(2, 5)), ValueError,
         r"attention_mask has shape \(2, 5\), wanted \(2, 3\)"),
        (lambda: PromptEmbedding(2, 4).prepend(X, labels=torch.zeros(2, dtype=torch.int64)), ValueError,
         r"labels has shape \(2,\), wanted \(2, 3\)"),
        (lambda: PromptEmbedding(2, 4).extend_labels(torch.zeros(2, 3)), TypeError,
         "labels is torch.float32, wanted torch.int64 or torch.int32"),
        (lambda: PromptEmbedding.from_vocab(EMBEDDING, 2, dtype=torch.int64), TypeError,
         "PromptEmbedding: dtype is torch.int64"),
        (lambda: from_text(["is"]), TypeError, "text is list, wanted str"),
        (lambda: from_text(""), ValueError, "text is '', which has no tokens; wanted at least one"),
        (lambda: from_text("is bad"), ValueError, "text has token 6, embedding has 3 rows"),
    ],
)  # fmt: skip
def test_prompt_errors_name_what_came(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def from_text(text: Any, embedding: Any = EMBEDDING, tokens: int = 2) -> PromptEmbedding:
    return PromptEmbedding.from_text(text, word_level(), embedding, tokens)


@pytest.mark.parametrize("make", [PromptEmbedding.from_vocab, lambda *arguments: from_text("is", *arguments)])
def test_a_prompt_of_no_tokens_or_of_no_embedding_is_refused(make: Callable[..., PromptEmbedding]) -> None:
    with pytest.raises(ValueError, match="num_virtual_tokens is 0, wanted an integer of at least 1"):
        make(EMBEDDING, 0)
    with pytest.raises(TypeError, match="embedding is Tensor, wanted a module of token embeddings"):
        make(EMBEDDING.weight.data, 2)


# --- prefix and prompt as modules -------------------------------------------------------------------------------------

MODULES: dict[str, Callable[..., nn.Module]] = {
    "prefix": lambda **kwargs: PrefixEncoder(2, 2, 4, P, **kwargs),
    "prefix-mlp": lambda **kwargs: PrefixEncoder(2, 2, 4, P, projection=True, **kwargs),
    "prompt": lambda **kwargs: PromptEmbedding(P, 4, **kwargs),
}
MODULE = pytest.mark.parametrize("kind", MODULES)


def evaluate(module: nn.Module) -> Tensor:
    if isinstance(module, PrefixEncoder):
        return module(2)
    return module(torch.ones(2, 3, 4, dtype=module.embedding.weight.dtype))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@MODULE
def test_copies_are_independent(kind: str, clone: Callable) -> None:
    module = MODULES[kind]()
    evaluate(module).sum().backward()
    twin = clone(module)
    assert torch.equal(evaluate(twin), evaluate(module))
    with torch.no_grad():
        twin.embedding.weight.add_(1.0)
    assert not torch.equal(evaluate(twin), evaluate(module))


@MODULE
def test_dtype_and_meta(kind: str) -> None:
    module = MODULES[kind](dtype=torch.float64)
    assert evaluate(module).dtype is torch.float64
    assert evaluate(module.to(torch.bfloat16)).dtype is torch.bfloat16
    meta = MODULES[kind](device="meta")
    assert evaluate(MODULES[kind]()).dtype is torch.float32
    assert all(p.is_meta and p.dtype is torch.float32 for p in meta.parameters())
    meta.to_empty(device="cpu").load_state_dict(MODULES[kind]().state_dict())
    with torch.no_grad():
        for parameter in meta.parameters():
            parameter.fill_(7.0)
    meta.reset_parameters()
    assert not any((p == 7.0).any() for p in meta.parameters())


@MODULE
def test_says_what_it_is(kind: str) -> None:
    text = MODULES[kind]().extra_repr()
    for part in ("num_virtual_tokens=5", "token_dim=4" if kind == "prompt" else "num_kv_heads=2, head_dim=4"):
        assert part in text


@MODULE
def test_traces_without_a_break(kind: str) -> None:
    module = MODULES[kind]()
    compiled = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = batch if kind != "prompt" else torch.randn(batch, 3, 4)
        assert torch.equal(compiled(x), module(x))
