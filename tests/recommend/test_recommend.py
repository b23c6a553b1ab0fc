"""Tests recommend_peft_method: the order of methods and settings, and the reasons where no method fits."""

import math

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_ext.memory import KINDS, Profile, estimate_memory  # noqa: E402
from peft_ext.memory.stand_ins import build_model  # noqa: E402
from peft_ext.recommend import choice, ranking, recommend_peft_method, subjects  # noqa: E402
from peft_ext.recommend.search import NAMES, Search  # noqa: E402

pytestmark = pytest.mark.cpu_only("nothing runs")

GIB = 2**30
SHORT = {"batch_size": 2, "sequence_length": 128}


class Fixed:
    """A model of 7 billion parameters. The function ``need`` returns the GiB of a training step in a setting."""

    size_b, has_biases, is_encoder, sequence_length, about = 7.0, False, False, 1024, "a model of the test's"

    def __init__(self, need, task="CAUSAL_LM", **changes):
        self.need, self.task, self.asked = need, task, []
        vars(self).update(changes)

    def fields(self, method, excluded):
        return {}

    def profile(self, config=None, method=None, **setting):
        method = method or recommend_name(config)
        self.asked.append((method, setting["quantization"], setting["gradient_checkpointing"], setting["batch_size"]))
        held = dict.fromkeys(KINDS, 0) | {"weights": int(self.need(method, **setting) * GIB)}
        return Profile({"forward": held}, {"forward": held}, 7 * 10**9, 10**6)


def recommend_name(config):
    if config.peft_type == "LORA":
        return "dora" if config.use_dora else "rslora" if config.use_rslora else "lora"
    names = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return names.get(kind, kind.lower())


def search(subject, gpu_memory_gb, num_examples=None, prefer="balanced", batch_size=4):
    found = Search(subject, gpu_memory_gb, 0.1, batch_size, 1024, torch.bfloat16, "adamw", True)
    return found.recommend(ranking.ranked(subject, num_examples, prefer))


def by_setting(dense, checkpointed, nf4, both, one):
    """Returns a function ``need`` with the given GiB in the five settings of the search, equal for all methods."""

    def need(method, quantization, gradient_checkpointing, batch_size, **_):
        if quantization is None:
            return checkpointed if gradient_checkpointing else dense
        return one if batch_size == 1 else both if gradient_checkpointing else nf4

    return need


# --- the method -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, num_examples, prefer, method, rank",
    [
        ({}, None, "balanced", "lora", 16),
        ({}, 50, "balanced", "ia3", None),
        ({}, 99, "quality", "ia3", None),
        ({}, 100, "balanced", "lora", 8),
        ({}, 500, "quality", "dora", 8),
        ({}, 5_000, "balanced", "lora", 16),
        ({}, 5_000, "quality", "dora", 32),
        ({}, 50_000, "balanced", "rslora", 64),
        ({}, 10**6, "quality", "dora", 64),
        ({"size_b": 0.1, "is_encoder": True, "has_biases": True, "task": "SEQ_CLS"}, 5_000, "balanced", "bitfit", None),
        ({"size_b": 0.1, "is_encoder": True, "has_biases": True, "task": "SEQ_CLS"}, 20_000, "balanced", "lora", 16),
    ],
)
def test_the_method_fits_the_data(changes, num_examples, prefer, method, rank):
    changes = {"task": "CAUSAL_LM", **changes}
    found = search(Fixed(lambda *_, **__: 1.0, **changes), 24, num_examples, prefer)
    assert found.method == method and found.fits
    assert found.config_kwargs.get("r") == rank
    config = found.config()
    assert recommend_name(config) == method
    assert str(config.task_type) == changes["task"] or config.task_type == changes["task"]
    amount = "unknown" if num_examples is None else f"{num_examples:,}"
    assert amount in found.reasons[0]


def test_prompt_tuning_comes_second_only_for_large_models():
    orders = {}
    for size in (1.0, 11.0):
        found = search(Fixed(lambda *_, **__: 1.0, size_b=size), 24, 20)
        orders[size] = [other.method for other in found.alternatives]
    assert orders[11.0][0] == "prompt" and orders[1.0][0] == "lora"
    assert orders[1.0][-1] == orders[11.0][-1] == "full"


@pytest.mark.parametrize(
    "task, left_out",
    [
        ("CAUSAL_LM", {"bitfit"}),
        ("SEQ_CLS", {"bitfit", "prefix"}),
        ("TOKEN_CLS", {"bitfit", "prefix", "prompt"}),
    ],
)
def test_methods_that_a_task_has_no_use_for_are_left_out(task, left_out):
    found = search(Fixed(lambda *_, **__: 1.0, task=task), 24)
    methods = {found.method, *(other.method for other in found.alternatives)}
    # QLoRA is LoRA in an NF4 setting. Diff Pruning and partial fine-tuning are not in the ranking.
    assert methods == set(NAMES) - left_out - {"qlora", "diff-pruning", "partial"}


# --- the setting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "need, name, quantization, checkpointing, batch_size",
    [
        ((20, 15, 12, 8, 6), "LoRA", None, False, 4),
        ((30, 20, 12, 8, 6), "LoRA", None, True, 4),
        ((40, 30, 20, 8, 6), "QLoRA", "nf4", False, 4),
        ((60, 50, 40, 20, 6), "QLoRA", "nf4", True, 4),
        ((70, 60, 50, 40, 20), "QLoRA", "nf4", True, 1),
    ],
)
def test_the_first_setting_that_fits(need, name, quantization, checkpointing, batch_size):
    found = search(Fixed(by_setting(*need)), 24)
    assert (found.name, found.quantization) == (name, quantization)
    assert (found.gradient_checkpointing, found.batch_size) == (checkpointing, batch_size)
    assert found.memory.fits(24) and found.memory.total == 20 * GIB
    text = " ".join(found.reasons)
    assert ("quantized to NF4" in text) == (quantization is not None)
    assert ("Gradient checkpointing" in text) == checkpointing
    assert ("One sequence at a time" in text) == (batch_size == 1)
    assert "20.0 of 24 GB" in text


def test_never_what_does_not_fit():
    """The first method of the ranking that fits is chosen; the reasons call the methods ranked before it too large."""
    needs = {"lora": 30, "dora": 31, "rslora": 30, "adalora": 30, "bottleneck": 30, "ia3": 20}
    found = search(Fixed(lambda method, **_: needs.get(method, 40)), 24)
    assert found.method == "ia3" and found.memory.fits(24)
    assert "IA3 is the first that fits" in found.reasons[0]
    assert any("LoRA would come before it, but does not fit" in reason for reason in found.reasons)
    others = {other.method: other for other in found.alternatives}
    assert not others["lora"].fits and others["lora"].memory.total == 30 * GIB
    assert "LoRA (30.0 GB, does not fit)" in str(found)


def test_prefix_tuning_is_not_checkpointed():
    found = search(Fixed(by_setting(30, 20, 12, 8, 6)), 24)
    assert found.gradient_checkpointing
    (prefix,) = (other for other in found.alternatives if other.method == "prefix")
    assert prefix.memory is None and not prefix.fits


class Refusing(Fixed, subjects.Given):
    """A user's model whose step can't be traced in some pairs of quantization and checkpointing."""

    def __init__(self, refused, need):
        super().__init__(need)
        self.refused = refused

    def profile(self, config=None, method=None, **setting):
        if (setting["quantization"], setting["gradient_checkpointing"]) in self.refused:
            raise RuntimeError("no kernel of float16\nmore of it")
        return super().profile(config, method, **setting)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ([], "do not fit"),
        ([(None, False), (None, True)], "could not be estimated (no kernel of float16)"),
        ([(None, True)], "do not fit, or could not be estimated (no kernel of float16)"),
    ],
)
def test_what_was_refused_is_not_called_too_large(refused, said):
    found = search(Refusing(refused, by_setting(40, 30, 20, 8, 6)), 24)
    assert found.name == "QLoRA"
    assert found.reasons[1].startswith(f"bfloat16 weights {said}: they are quantized to NF4, 20.0 GB")


def test_what_is_too_large_is_not_called_refused():
    """Here the model can't be traced with checkpointing, and LoRA without checkpointing is too large for the card."""
    refused = [("nf4", True), (None, True)]
    found = search(Refusing(refused, lambda method, **_: 20 if method == "ia3" else 40), 24)
    assert found.method == "ia3" and found.quantization is None
    assert "LoRA would come before it, but does not fit." in found.reasons
    (lora,) = (other for other in found.alternatives if other.method == "lora")
    assert lora.memory.total == 40 * GIB and "can't adapt" not in lora.why_not


def test_full_fine_tuning_is_shown_but_neither_taken_nor_quantized():
    subject = Fixed(lambda method, quantization, **_: 5 if method == "full" else 50 if quantization is None else 20)
    found = search(subject, 24)
    assert found.method == "lora" and found.quantization == "nf4"
    assert {quantization for method, quantization, *_ in subject.asked if method == "full"} == {None}
    assert search(Fixed(lambda method, **_: 5 if method == "full" else 50), 24).method is None


def test_each_setting_is_estimated_once():
    subject = Fixed(by_setting(70, 60, 50, 40, 20))
    search(subject, 24)
    assert len(subject.asked) == len(set(subject.asked))


def test_nothing_fits():
    def need(method, quantization, sequence_length, **_):
        return (41 if method == "ia3" else 42) + (0 if quantization else 100) + sequence_length / 1024

    found = search(Fixed(need), 16)
    assert not found.fits and found.method is None and found.name == "nothing fits"
    assert found.memory.total == 42 * GIB
    text = " ".join(found.reasons)
    assert "the least is IA3 over NF4" in text and "42.0 GB" in text and "14.4 GB" in text
    assert "A card of 48 GB would do." in text
    assert "Sequences of" not in text
    assert "A model of about 2.4 billion parameters would fit." in text
    assert all(not other.fits for other in found.alternatives) and str(found).startswith("nothing fits")
    with pytest.raises(RuntimeError, match="nothing fits"):
        found.config()
    assert "Sequences of 512 tokens would fit" in " ".join(search(Fixed(need), 41.6 / 0.9).reasons)
    assert "more than one card" in " ".join(search(Fixed(lambda *_, **__: 500.0), 80).reasons)


# --- with real estimates ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_call_of_the_lesson_that_users_come_from():
    lesson = recommend_peft_method(7, 24, "classification", 500)
    assert lesson.name == "LoRA" and lesson.fits and lesson.memory.fits(24)
    assert isinstance(lesson.config(), peft.LoraConfig) and lesson.config().task_type == "SEQ_CLS"
    assert 0.95 < lesson.memory.parameters / 7e9 < 1.05
    assert lesson.config_class == "peft.LoraConfig" and lesson.config_kwargs["target_modules"] == "all-linear"
    assert {"DoRA", "IA3", "full fine-tuning"} <= {other.name for other in lesson.alternatives}
    assert all(other.why_not for other in lesson.alternatives)
    text = str(lesson)
    assert text.startswith("LoRA: 4 x 1024 tokens") and "LoraConfig(task_type='SEQ_CLS'" in text
    assert all(reason in text for reason in lesson.reasons)


def test_a_smaller_card_gets_nf4():
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8, vocab_size=500
    )
    setting = {"batch_size": 1, "sequence_length": 8}
    dense = estimate_memory(config, "ia3", dtype=torch.bfloat16, gradient_checkpointing=True, **setting)
    found = recommend_peft_method(config, 0.8 * dense.total / GIB, "generation", 20, headroom=0, **setting)
    assert found.name == "IA3 over NF4" and found.memory.fits(found.gpu_memory_gb, headroom=0)
    assert found.memory.weights < 0.4 * dense.weights
    full = found.alternatives[-1]
    assert full.method == "full" and full.memory.quantization == 0 and not full.fits
    assert full.memory.total > full.memory.parameters * (2 + 2 + 4)


@pytest.mark.slow
def test_another_format_is_recommended_if_asked_for():
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8, vocab_size=500
    )
    setting = {"batch_size": 1, "sequence_length": 8, "headroom": 0}
    dense = estimate_memory(
        config, "ia3", dtype=torch.bfloat16, gradient_checkpointing=True, batch_size=1, sequence_length=8
    )
    found = recommend_peft_method(config, 0.9 * dense.total / GIB, "generation", 20, quantization="fp8", **setting)
    assert (found.name, found.quantization) == ("IA3 over FP8", "fp8")
    assert "they are quantized to FP8, " in " ".join(found.reasons)
    with pytest.raises(ValueError, match="quantization is 'int3', wanted one of .*'mxfp4'"):
        recommend_peft_method(config, 1, quantization="int3")


@pytest.mark.slow
def test_a_given_configuration_is_traced_itself():
    config = transformers.BertConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    found = recommend_peft_method(config, 1, "classification", 2_000, **SHORT)
    assert found.method == "bitfit" and "BertForSequenceClassification" in found.reasons[-1]
    estimate = estimate_memory(config, found.config(), dtype=torch.bfloat16, task_type="SEQ_CLS", **SHORT)
    assert found.memory.total == estimate.total and found.memory.trainable == estimate.trainable


@pytest.mark.slow
def test_a_given_model():
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=97
    )
    model = transformers.LlamaForCausalLM(config)
    found = recommend_peft_method(model, 1, "chat", 20, **SHORT)
    assert found.method == "ia3" and "95 thousand" in found.reasons[-1]
    t5 = transformers.T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=97)
    assert recommend_peft_method(t5, 1, "summarization", 20, **SHORT).config().task_type == "SEQ_2_SEQ_LM"


@pytest.mark.slow
def test_a_method_that_peft_refuses_is_passed_over():
    """For few examples IA3 would be first, but PEFT knows no layers of this model type for IA3."""
    config = transformers.Phi3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=97,
        pad_token_id=0,
    )  # fmt: skip
    found = recommend_peft_method(config, 1, "chat", 20, **SHORT)
    assert found.method == "lora"
    assert any("IA3 would come before it, but it can't adapt this model" in reason for reason in found.reasons)
    (ia3,) = (other for other in found.alternatives if other.method == "ia3")
    assert ia3.memory is None and "can't adapt" in ia3.why_not


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("size_b", [0.01, 0.11, 0.5, 1, 3, 8, 70, 405])
def test_a_synthetic_model_has_the_size(size_b, task):
    subject = subjects.Synthetic(size_b, task, None)
    model, _ = build_model(subject.make(subject.layers), task)
    found = sum(p.numel() for p in model.parameters()) / 1e9
    assert abs(found / size_b - 1) < (0.02 if size_b >= 0.1 else 0.1)


@pytest.mark.parametrize("size_b, layers, width", [(8, 32, 4096), (0.11, 12, 768)])
def test_a_synthetic_model_has_known_proportions(size_b, layers, width):
    """The expected layers and widths are those of Llama 3 8B and of BERT-base."""
    subject = subjects.Synthetic(size_b, "CAUSAL_LM" if size_b > 1 else "SEQ_CLS", None)
    assert (subject.layers, subject.make(2).hidden_size) == (layers, width)


def test_a_synthetic_model_is_extrapolated_exactly():
    subject = subjects.Synthetic(0.135, "CAUSAL_LM", None)
    setting = {"dtype": torch.bfloat16, "batch_size": 1, "sequence_length": 64}
    whole = estimate_memory(subject.make(subject.layers), "lora", device="cuda", **setting)
    assert subject.profile(method="lora", **setting).estimate(whole.about) == whole


# --- names and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, task",
    [
        ("CAUSAL_LM", "CAUSAL_LM"), ("causal_lm", "CAUSAL_LM"), ("Chat", "CAUSAL_LM"), ("generation", "CAUSAL_LM"),
        ("qa", "CAUSAL_LM"), ("Summarization", "CAUSAL_LM"), ("classification", "SEQ_CLS"), ("NER", "TOKEN_CLS"),
        ("text classification", "SEQ_CLS"), ("extractive-qa", "QUESTION_ANS"), ("seq2seq", "SEQ_2_SEQ_LM"),
        (peft.TaskType.SEQ_2_SEQ_LM, "SEQ_2_SEQ_LM"), ("embeddings", "FEATURE_EXTRACTION"),
    ],
)  # fmt: skip
def test_task_names(name, task):
    assert choice.task_named(name) == task


def test_every_task_of_peft_is_known():
    assert {choice.task_named(task) for task in peft.TaskType} == {task.value for task in peft.TaskType}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model_size_b": 0}, "model_size_b is 0, wanted a number above 0"),
        ({"model_size_b": -7}, "model_size_b is -7"),
        ({"model_size_b": math.inf}, "model_size_b is inf"),
        ({"gpu_memory_gb": 0}, "gpu_memory_gb is 0, wanted a number above 0"),
        ({"gpu_memory_gb": "24"}, "gpu_memory_gb is '24'"),
        ({"gpu_memory_gb": math.nan}, "gpu_memory_gb is nan"),
        ({"num_examples": 0}, "num_examples is 0, wanted a positive integer"),
        ({"num_examples": 1e3}, "num_examples is 1000.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sequence_length": True}, "sequence_length is True"),
        ({"task_type": "vision"}, "task_type is 'vision', wanted one of CAUSAL_LM"),
        ({"prefer": "speed"}, "prefer is 'speed', wanted one of"),
        ({"headroom": 1}, "headroom is 1"),
    ],
)
def test_refuses_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=f"recommend_peft_method: {message}"):
        recommend_peft_method(**{"model_size_b": 7, "gpu_memory_gb": 24, **arguments})


@pytest.mark.parametrize("model", ["7B", None, True])
def test_refuses_what_is_no_model(model):
    with pytest.raises(TypeError, match="model_size_b is .*, wanted billions of parameters"):
        recommend_peft_method(model, 24)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "foo"}, "optimizer is 'foo', wanted one of"),
        ({"batch_size": 0}, "batch_size is 0, wanted a positive integer"),
    ],
)
def test_what_the_estimate_takes_is_checked_first(wrong, message):
    with pytest.raises(ValueError, match=f"recommend_peft_method: {message}"):
        recommend_peft_method(1.0, 24, **wrong)
    with pytest.raises(TypeError, match="recommend_peft_method: dtype is bf16"):
        recommend_peft_method(1.0, 24, dtype="bf16")


def test_a_given_model_has_a_configuration_and_positions_enough():
    with pytest.raises(TypeError, match="is a Linear that has no transformers configuration"):
        recommend_peft_method(torch.nn.Linear(4, 4), 24)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(ValueError, match="sequence_length is 4096, .* has 512 positions"):
        recommend_peft_method(config, 24, "classification", sequence_length=4096)


@pytest.mark.slow
def test_bitfit_is_for_what_has_a_head():
    assert recommend_peft_method(0.1, 24, "classification", 5_000).method == "bitfit"
    assert recommend_peft_method(0.1, 24, "FEATURE_EXTRACTION", 5_000).method != "bitfit"


@pytest.mark.slow
def test_a_model_with_experts_gets_lora_on_them_and_no_router():
    hf = pytest.importorskip("transformers")
    config = hf.Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=32, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        max_position_embeddings=64,
    )  # fmt: skip
    found = recommend_peft_method(config, 1.0)
    assert found.method == "lora"
    assert found.config_kwargs["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    assert found.config_kwargs["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert found.config_kwargs["lora_dropout"] == 0.0
    small = recommend_peft_method(config, 0.0012)
    assert small.quantization == "nf4" and small.memory.total < found.memory.total
