"""Tests of accelerate on transformers' architectures: results must equal those of PEFT's own layers with equal weights,
batch and seed.

The models' own dropouts act in training, with PyTorch's masks. An adapter layer that does not draw from the generator
at the points where PEFT's layer draws would therefore change the loss.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import transformers as hf
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import both, dense_twin, tuners
from tiny_models import ARCHITECTURES, OperatorCalls, Step, assert_close, error_of, logits, step

import peft_ext

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = ("LoRA", "DoRA", "IA3")


@pytest.fixture(autouse=True, scope="module")
def masks_of_pytorch():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peft_ext.ops, "dropout", nn.functional.dropout)
        yield


# By architecture, for each method: (number of adapted layers, number of adapted layers that run fused).
LAYERS = {
    #           LoRA      DoRA      IA3
    "Llama":   ((14, 14), (14, 14), (6, 6)),
    "Qwen2":   ((14, 14), (14, 14), (6, 6)),
    "Qwen3":   ((14, 14), (14, 14), (6, 6)),
    "Mistral": ((14, 14), (14, 14), (6, 6)),
    "Gemma2":  ((14, 14), (14, 14), (6, 6)),
    "Gemma3":  ((14, 14), (14, 14), (6, 6)),
    "Phi":     ((12, 12), (12, 12), (6, 6)),
    "Phi3":    ((8, 8),   (8, 8),   (4, 4)),
    "GPT-2":   ((8, 8),   (8, 8),   (4, 4)),
    "Falcon":  ((8, 8),   (8, 8),   (4, 4)),
    "Falcon-7B":  ((8, 8), (8, 8), (4, 4)),
    "Falcon-40B": ((8, 8), (8, 8), (4, 4)),
    "OPT":     ((14, 14), (14, 14), (6, 6)),
    "GPT-NeoX": ((8, 8), (8, 8), (4, 4)),
    "Cohere":  ((14, 14), (14, 14), (6, 6)),
    "Cohere2": ((14, 14), (14, 14), (6, 6)),
    "Llama4":  ((14, 14), (14, 14), (6, 6)),
    "BERT":    ((13, 13), (13, 13), (8, 8)),
    "RoBERTa": ((12, 12), (12, 12), (8, 8)),
    "T5":      ((32, 32), (32, 32), (16, 16)),
    "ViT":     ((12, 12), (12, 12), (6, 6)),
    "Whisper": ((32, 32), (32, 32), (16, 16)),
    "Mixtral": ((12, 12), (8, 8),   (4, 4)),
}  # fmt: skip

# By architecture and method, for layers that are not fused: the reason and the number of layers.
REASONS: dict[tuple[str, str], dict[str, int]] = {}

GENERATING = [name for name, architecture in ARCHITECTURES.items() if architecture.generates]


def assert_as_good(actual: Step, stock: Step, exact: Step) -> None:
    """Asserts that dtypes are PEFT's, and that the error of all gradients together is at most twice PEFT's error.

    In the error of all gradients, each gradient has equal weight. Most of the error is the model's own rounding, which
    is another random draw if a layer rounds once less. With other batches, the error of the fused model is 0.6 to 1.7
    times PEFT's.
    """
    assert {key: value.dtype for key, value in actual.items()} == {key: value.dtype for key, value in stock.items()}
    ours, theirs = (
        torch.tensor([error_of(found[key], value) for key, value in exact.items() if key not in ("loss", "logits")])
        for found in (actual, stock)
    )
    assert ours.norm() <= 2 * theirs.norm(), f"{ours.norm():.1e}, PEFT's {theirs.norm():.1e}"


class Case:
    """An architecture with a method: PEFT's model, an accelerated copy, and a training step of both models."""

    def __init__(self, name: str, method: str) -> None:
        self.name, self.method, self.architecture = name, method, ARCHITECTURES[name]
        self.operator = {"LoRA": "lora_linear", "DoRA": "dora_linear", "IA3": "ia3_linear"}[method]
        self.layers, self.fused_layers = LAYERS[name][METHODS.index(method)]
        self.batch = self.architecture.batch()
        self.stock, self.fused = both(self.architecture.adapt(method))

    @cached_property
    def stock_step(self) -> Step:
        return step(self.stock, self.batch)

    @cached_property
    def fused_step(self) -> Step:
        return step(self.fused, self.batch)

    def assert_fused(self, model: nn.Module) -> None:
        rows = [row for row in peft_ext.explain(model).rows if row.kind.startswith(f"{self.method} over ")]
        assert (len(rows), sum(row.fused for row in rows)) == (self.layers, self.fused_layers), peft_ext.explain(model)


# The cases in the first tier of tests: models of several families, and each method.
FIRST_TIER = {"Llama-LoRA", "Llama-DoRA", "Llama-IA3", "Gemma3-LoRA", "GPT-2-DoRA", "Mixtral-LoRA", "BERT-LoRA",
              "T5-IA3", "ViT-DoRA"}  # fmt: skip


def cases(names: Iterable[str]) -> list[Any]:
    ids = [(name, method, f"{name}-{method}") for name in names for method in METHODS]
    return [pytest.param((name, method), id=id, marks=() if id in FIRST_TIER else pytest.mark.slow)
            for name, method, id in ids]  # fmt: skip


@pytest.fixture(scope="module", params=cases(ARCHITECTURES))
def case(request: pytest.FixtureRequest) -> Case:
    """Returns the case that all tests of one architecture and method share. Tests change only copies of the models."""
    return Case(*request.param)


# --- what is fused ----------------------------------------------------------------------------------------------------


def test_the_table_is_complete() -> None:
    assert list(LAYERS) == list(ARCHITECTURES)


def test_the_layers_that_should_be_are_fused(case: Case) -> None:
    explanation = peft_ext.explain(case.fused)
    case.assert_fused(case.fused)
    assert {row.name for row in explanation.rows} == set(tuners(case.fused))
    reasons = Counter(row.reason for row in explanation.rows if not row.fused)
    assert reasons == REASONS.get((case.name, case.method), {}), explanation
    # explain only reports what the checks of the layers find, so this test also counts the operators that a call runs.
    for training in (False, True):
        with OperatorCalls() as seen:
            case.fused.train(training)(**case.batch)
        assert seen.calls[case.operator] == case.fused_layers, f"training is {training}: {seen.calls}"


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_logits_loss_and_gradients_are_pefts(case: Case) -> None:
    assert_close(case.fused_step, case.stock_step)
    adapted = logits(case.stock, case.batch)
    assert_close(logits(case.fused, case.batch), adapted)
    with case.stock.disable_adapter(), case.fused.disable_adapter():
        plain = logits(case.stock, case.batch)
        assert_close(logits(case.fused, case.batch), plain)
    layers = peft_ext.accelerate(copy.deepcopy(case.fused), blocks=False)
    with layers.disable_adapter():
        assert torch.equal(logits(layers, case.batch), plain)
    assert error_of(plain, adapted) > 0.1  # the adapter must matter, so that a layer that ignores it fails


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_gives_the_same_gradients(case: Case, reentrant: bool) -> None:
    model = copy.deepcopy(case.fused)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    batch = {key: value.clone() for key, value in case.batch.items()}
    if reentrant:  # reentrant checkpointing needs an input that requires a gradient
        model.enable_input_require_grads()
        batch = {key: value.requires_grad_(value.is_floating_point()) for key, value in batch.items()}
    with OperatorCalls() as seen:
        found = step(model, batch)
    assert_close(found, case.fused_step)
    # Checkpointing saves no activation inside of a block. Fused layers inside of a block run again in the block's
    # backward; fused layers outside of blocks, as in a pooler, run once.
    rows = [row for row in peft_ext.explain(model).rows if row.fused]
    again = sum(any(part.isdigit() for part in row.name.split(".")) for row in rows)
    assert seen.calls[case.operator] == case.fused_layers + again
    assert seen.calls[f"{case.operator}_backward"] == case.fused_layers


def test_bfloat16_models_are_as_good_as_pefts(case: Case) -> None:
    """The adapters are float32, as PEFT makes adapters, and the modules that transformers keeps in float32 are
    float32."""
    stock = copy.deepcopy(case.stock)
    keep = set(stock.base_model.model._keep_in_fp32_modules or ())
    for name, parameter in stock.named_parameters():
        if not (stock.base_model.prefix in name or keep & set(name.split("."))):
            parameter.data = parameter.data.bfloat16()
    stock, fused = both(stock)
    case.assert_fused(fused)
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in case.batch.items()}
    rounded = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    exact = step(copy.deepcopy(stock).float(), rounded)
    assert_as_good(step(fused, batch), step(stock, batch), exact)


def test_autocast_is_as_good_as_pefts(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        if (case.name, case.method) == ("Falcon", "DoRA"):  # FalconLinear adds its bias separately, in float32
            reasons = {row.reason for row in peft_ext.explain(case.fused).rows}
            assert reasons == {"autocast multiplies in bfloat16, and the bias is added apart, in float32"}
        else:
            case.assert_fused(case.fused)
        theirs, ours = step(case.stock, case.batch), step(case.fused, case.batch)
    assert_as_good(ours, theirs, case.stock_step)


def test_over_nf4_it_is_pefts_over_the_dequantized_weights(case: Case) -> None:
    model = copy.deepcopy(case.stock)
    keep = set(model.base_model.model._keep_in_fp32_modules or ())
    linears = [name for name, layer in tuners(model).items() if type(layer.get_base_layer()) is nn.Linear]
    peft_ext.quantize_nf4(model, skip=("lm_head", *keep), progress=False)
    stock, fused = dense_twin(model), peft_ext.accelerate(model)
    case.assert_fused(fused)
    found = {row.name for row in peft_ext.explain(fused).rows if row.kind == f"{case.method} over NF4Linear"}
    assert found == {name for name in linears if keep.isdisjoint(name.split("."))}
    assert_close(step(fused, case.batch), step(stock, case.batch))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(["Llama"])[:1], indirect=True)  # one case alone, because compiling takes seconds
def test_a_model_compiles_into_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(case.fused).base_model.model  # the forward of PEFT's PeftModel would break the graph
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = {key.removeprefix("_orig_mod."): value for key, value in step(compiled, case.batch).items()}
    assert_close(found, step(model, case.batch))


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_pefts_both_ways(case: Case, tmp_path: Path) -> None:
    for model, folder in ((case.stock, "stock"), (case.fused, "fused")):
        model.save_pretrained(tmp_path / folder)

    def fields(folder: str) -> dict[str, Any]:
        # PEFT keeps some lists of names as sets, and a set is saved in any order.
        config = PeftConfig.from_pretrained(tmp_path / folder).to_dict()
        return {name: sorted(value) if isinstance(value, (list, set)) else value for name, value in config.items()}

    assert fields("fused") == fields("stock")
    theirs, ours = ((tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("stock", "fused"))
    assert ours == theirs
    loaded = PeftModel.from_pretrained(case.architecture.build(), tmp_path / "fused")
    assert torch.equal(logits(loaded, case.batch), logits(case.stock, case.batch))
    loaded = peft_ext.accelerate(PeftModel.from_pretrained(case.architecture.build(), tmp_path / "stock"))
    case.assert_fused(loaded)
    assert torch.equal(logits(loaded, case.batch), logits(case.fused, case.batch))


def test_merging_gives_the_adapted_model(case: Case) -> None:
    model = copy.deepcopy(case.fused)
    adapted = logits(model, case.batch)
    model.merge_adapter()
    assert not any(row.fused for row in peft_ext.explain(model).rows)
    assert_close(logits(model, case.batch), adapted)
    model.unmerge_adapter()
    case.assert_fused(model)
    assert_close(logits(model, case.batch), adapted)
    if (case.name, case.method) == ("RoBERTa", "IA3"):
        return  # PEFT's own IA3 can't unload a trained head of several layers
    merged = model.merge_and_unload()
    assert type(peft_ext.restore(merged)) is case.architecture.model
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
    assert_close(logits(merged, case.batch), adapted)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(GENERATING), indirect=True)
def test_greedy_tokens_are_pefts(case: Case) -> None:
    def generate(model: PeftModel) -> Any:
        return model.eval().generate(
            **case.architecture.inputs(), max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip

    with OperatorCalls() as seen:
        found = generate(case.fused)
    wanted = generate(case.stock)
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(wanted.logits) == 5 and found.past_key_values is not None
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        assert_close(ours, theirs)
    # The encoder's layers, and the projections of the encoder's states to keys and values, run once. Of T5's 16 IA3
    # layers, 6 run for every token.
    assert seen.calls[case.operator] >= (1 + 4 * 6 / 16) * case.fused_layers


# --- NF4 first, as for QLoRA ------------------------------------------------------------------------------------------


def test_a_quantized_t5_runs() -> None:
    architecture = ARCHITECTURES["T5"]
    batch, wanted = architecture.batch(), architecture.build()
    model = peft_ext.quantize_nf4(architecture.build(), progress=False)
    # NF4's rounding error is about 10% of a weight's norm.
    assert error_of(logits(model, batch), logits(wanted, batch)) < 0.5


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "ViT"])
def test_the_head_of_a_quantized_classifier_trains(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = peft_ext.quantize_nf4(architecture.build(), progress=False)
    model = peft_ext.accelerate(architecture.adapt("LoRA", model))
    assert peft_ext.explain(model).fused_share == 1.0
    found = step(model, architecture.batch())
    assert any("classifier" in key and value.norm() > 0 for key, value in found.items())


# --- how many parameters train ----------------------------------------------------------------------------------------


# For each published model: its class, a function that makes its configuration, and the task. The defaults of
# transformers' configurations are the sizes of Llama-7B, GPT-2 and BERT-base.
SIZES: dict[str, tuple[type[hf.PreTrainedModel], Callable[[], hf.PretrainedConfig], str]] = {
    "Llama-7B": (hf.LlamaForCausalLM, hf.LlamaConfig, "CAUSAL_LM"),
    "Llama-3-8B": (
        hf.LlamaForCausalLM,
        lambda: hf.LlamaConfig(num_key_value_heads=8, intermediate_size=14336, vocab_size=128256),
        "CAUSAL_LM",
    ),
    "Qwen2.5-0.5B": (
        hf.Qwen2ForCausalLM,
        lambda: hf.Qwen2Config(
            hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True,
        ),
        "CAUSAL_LM",
    ),
    "GPT-2": (hf.GPT2LMHeadModel, hf.GPT2Config, "CAUSAL_LM"),
    "T5-base": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12),
        "SEQ_2_SEQ_LM",
    ),
    "BERT-base": (hf.BertForSequenceClassification, hf.BertConfig, "SEQ_CLS"),
}  # fmt: skip

PEFT_CONFIGS: dict[str, Callable[[str], PeftConfig]] = {
    "LoRA r8": lambda task: LoraConfig(task_type=task),
    "LoRA r16 all-linear": lambda task: LoraConfig(task_type=task, r=16, target_modules="all-linear"),
    "LoRA r64 all-linear": lambda task: LoraConfig(task_type=task, r=64, target_modules="all-linear"),
    "DoRA r8": lambda task: LoraConfig(task_type=task, use_dora=True),
    "AdaLoRA init_r 12": lambda task: AdaLoraConfig(task_type=task, total_step=100),
    "IA3": lambda task: IA3Config(task_type=task),
    "prefix-20": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=20),
    "prompt-20": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=20),
}

TRAINABLE = {
    "Llama-7B": {
        "LoRA r8": 4_194_304, "LoRA r16 all-linear": 39_976_960, "LoRA r64 all-linear": 159_907_840,
        "DoRA r8": 4_456_448, "AdaLoRA init_r 12": 6_292_224, "IA3": 614_400, "prefix-20": 5_242_880,
        "prompt-20": 81_920,
    },
    "Llama-3-8B": {"LoRA r8": 3_407_872, "LoRA r16 all-linear": 41_943_040, "IA3": 524_288},
    "Qwen2.5-0.5B": {"LoRA r8": 540_672, "LoRA r16 all-linear": 8_798_208, "IA3": 141_312},
    "GPT-2": {"LoRA r8": 294_912, "LoRA r16 all-linear": 2_359_296, "IA3": 64_512},
    "T5-base": {"LoRA r8": 884_736, "LoRA r16 all-linear": 6_488_064, "IA3": 129_024},
    "BERT-base": {"LoRA r8": 296_450, "LoRA r16 all-linear": 2_680_322, "IA3": 66_050},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name, methods in TRAINABLE.items() for method in methods]
)
def test_the_published_models_train_as_many_parameters(name: str, method: str) -> None:
    """The model is on the meta device. accelerate changes no parameter there, and explain reports every layer as "on
    meta".
    """
    model_class, config, task = SIZES[name]
    with torch.device("meta"):
        model = get_peft_model(model_class(config()), PEFT_CONFIGS[method](task), low_cpu_mem_usage=True)
    before = {key: (tuple(p.shape), p.dtype, p.requires_grad) for key, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TRAINABLE[name][method]
    peft_ext.accelerate(model)
    assert {key: (tuple(p.shape), p.dtype, p.requires_grad) for key, p in model.named_parameters()} == before
    rows = peft_ext.explain(model).rows
    assert bool(rows) == (method not in ("prefix-20", "prompt-20"))
    assert all("is on meta" in row.reason for row in rows)
