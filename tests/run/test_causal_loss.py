"""Tests the check that a causal language model computes the loss of the next token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers as hf
from peft import LoraConfig, PromptTuningConfig
from tiny_run import write_gemma3
from torch import Tensor, nn

import peft_ext
from peft_ext import recipes
from peft_ext.run import Options, RunError, finetune
from peft_ext.run.causal_loss import check_causal_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.cpu_only("a run chooses the device itself"),
    pytest.mark.usefixtures("short_answers"),
]
ROWS = [{"input_ids": [5, 6, 7]}, {"input_ids": list(range(3, 40))}]
SIZES = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0,
         "eos_token_id": 1}  # fmt: skip
DECODER = {"vocab_size": 258, "d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 48, "decoder_attention_heads": 4,
           "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64}  # fmt: skip
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 1.0}

# Models whose loss is the mean cross-entropy of the next tokens, and models whose loss is not.
SHIFTED = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "mixture with a loss for the router": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **ROUTED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=258, n_embd=32, n_layer=1, n_head=4)),
    "bert": lambda: hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True)),
}
UNSHIFTED = {
    "pegasus": lambda: hf.PegasusForCausalLM(hf.PegasusConfig(**DECODER)),
    "whisper": lambda: hf.WhisperForCausalLM(hf.WhisperConfig(**DECODER, max_target_positions=64)),
    "xlnet": lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=258, d_model=32, n_layer=1, n_head=4, d_inner=48,
                                                        pad_token_id=0)),
}  # fmt: skip


class SumForCausalLM(hf.LlamaForCausalLM):
    """A model whose loss is the sum over the labels."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        found = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            found.loss = found.loss * labels[:, 1:].ne(-100).sum()
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHIFTED)
def test_losses_of_the_next_token(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_causal_loss(SHIFTED[name]().to(dtype), ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UNSHIFTED)
def test_losses_without_a_shift(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = UNSHIFTED[name]().to(dtype)
    message = f"^{type(model).__name__}: its loss compares the logits at each token with the token itself, wanted"
    with pytest.raises(RunError, match=message):
        check_causal_loss(model, ROWS)
    with pytest.raises(RunError, match=message):
        check_causal_loss(peft_ext.get_peft_model(model, LoraConfig(target_modules="all-linear")), ROWS)


def test_a_loss_that_is_a_sum_and_a_loss_that_fails() -> None:
    torch.manual_seed(0)
    with pytest.raises(RunError, match="SumForCausalLM: its loss compares .* with something else, wanted"):
        check_causal_loss(SumForCausalLM(hf.LlamaConfig(**SIZES)), ROWS)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = hf.GitConfig(
        vision_config=vision, **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    )
    with pytest.raises(RunError, match=r"GitForCausalLM: its loss fails \(Expected input"):
        check_causal_loss(hf.GitForCausalLM(config), ROWS)


def test_models_that_are_not_checked() -> None:
    """An encoder, an encoder-decoder, a classifier of tokens, a module of another library, and rows of one token."""
    torch.manual_seed(0)
    check_causal_loss(hf.BertForMaskedLM(hf.BertConfig(**SIZES)), ROWS)
    check_causal_loss(hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=258, d_model=32, d_ff=48, num_layers=1,
                                                                num_heads=4, d_kv=8)), ROWS)  # fmt: skip
    check_causal_loss(hf.LlamaForTokenClassification(hf.LlamaConfig(**SIZES)), ROWS)
    check_causal_loss(nn.Linear(2, 2), ROWS)
    check_causal_loss(UNSHIFTED["pegasus"](), [{"input_ids": [3]}])
    check_causal_loss(UNSHIFTED["pegasus"](), [])


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "prompt", "gemma3"])
def test_the_check_changes_nothing(kind: str, tiny: Path, tmp_path: Path) -> None:
    """A prompt method's model is checked without the virtual tokens. One module is in evaluation mode."""
    torch.manual_seed(0)
    folder = write_gemma3(tiny, tmp_path) if kind == "gemma3" else tiny / "model"
    model: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "prompt":
        model = peft_ext.get_peft_model(model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    else:
        model = peft_ext.get_peft_model(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.Linear)).eval()
    drawn: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda *_: drawn.append(torch.rand(1)))
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    check_causal_loss(model, ROWS)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    if kind != "prompt":
        assert len(drawn) == 3 and len(set(map(float, drawn))) == 1
    handle.remove()


def test_a_run_and_a_recipe_refuse_an_unshifted_loss(tiny: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNSHIFTED["pegasus"]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    wanted = "PegasusForCausalLM: its loss compares the logits at each token with the token itself"
    with pytest.raises(RunError, match=f"--model {tmp_path / 'model'}: {wanted}"):
        finetune(Options(model=str(tmp_path / "model"), data=str(tiny / "pairs.jsonl"), output=tmp_path / "run",
                         block_size=32, quant="none", max_steps=1, target_modules="all-linear"))  # fmt: skip
    assert not (tmp_path / "run").exists()
    adapted = recipes.apply_lora_to_model(model)
    with pytest.raises(RunError, match=wanted):
        recipes.train_with_peft(adapted, tokenizer, ROWS, output_dir=tmp_path / "out", use_cpu=True)
