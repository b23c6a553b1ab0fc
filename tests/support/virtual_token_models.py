"""Tiny models of several architectures for tests of prefix and prompt tuning, and PEFT's models of both methods."""

import copy
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

VOCAB, BATCH, T, P = 32, 2, 6, 5

SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
DECODER_LAYERS = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 2}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_heads": 4, "decoder_start_token_id": 0}

# For each kind: the class of the configuration, the class of the model, and the arguments of the configuration.
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "num_hidden_layers": 3}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "num_hidden_layers": 2, "head_dim": 12}),
    # The attention window is shorter than the prefix.
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "num_hidden_layers": 2, "head_dim": 12,
                                                     "sliding_window": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4,
                                               "n_positions": 32}),
    "bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2,
                                                              "n_head": 4, "n_positions": 32}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**SMALL, "num_hidden_layers": 2}),
    "falcon-all-heads": ("FalconConfig", "FalconForCausalLM", {**SMALL, "num_hidden_layers": 2, "multi_query": False}),
    "falcon-new": ("FalconConfig", "FalconForCausalLM", {**SMALL, "num_hidden_layers": 2, "num_kv_heads": 2,
                                                         "new_decoder_architecture": True}),
    "bert": ("BertConfig", "BertForSequenceClassification", {**SMALL, "num_hidden_layers": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "num_layers": 3, "num_decoder_layers": 3}),
    "t5-even": ("T5Config", "T5ForConditionalGeneration", {**T5, "num_layers": 2, "num_decoder_layers": 2}),
    # heads * d_kv differs from d_model, and encoder and decoder differ in depth: PEFT can't run these models.
    "t5-odd-sizes": ("T5Config", "T5ForConditionalGeneration", {**T5, "num_heads": 6, "num_layers": 2,
                                                                "num_decoder_layers": 3}),
    "bart": ("BartConfig", "BartForConditionalGeneration", {"vocab_size": VOCAB, "d_model": 32, "encoder_ffn_dim": 40,
                                                            "decoder_ffn_dim": 40, **DECODER_LAYERS}),
}  # fmt: skip
# All other kinds of models have the task CAUSAL_LM.
TASKS = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "t5-even": "SEQ_2_SEQ_LM"}


def make_model(kind: str) -> transformers.PreTrainedModel:
    """Returns a random model with initializer_range 0.3 in place of the usual 0.02, so that its attention is not
    uniform."""
    config_class, model_class, arguments = MODELS[kind]
    own = getattr(transformers, config_class)(**{"initializer_range": 0.3, **arguments})
    return getattr(transformers, model_class)(own).eval().requires_grad_(False)


def make_inputs(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (BATCH, T))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, VOCAB, (BATCH, 4))}
    return {"input_ids": ids, "attention_mask": mask}


def with_peft(kind: str, model: nn.Module, config: type[peft.PromptLearningConfig], **options: Any) -> peft.PeftModel:
    """Returns PEFT's model around a copy of ``model``, with P virtual tokens."""
    config = config(task_type=TASKS.get(kind, "CAUSAL_LM"), num_virtual_tokens=P, **options)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def their_encoder(theirs: peft.PeftModel) -> nn.Module:
    return theirs.prompt_encoder["default"]
