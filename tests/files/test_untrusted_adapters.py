"""Tests untrusted adapters whose configuration, expressions or tensors are broken, absurd or malicious.

peft_ext must refuse a bad adapter with a one-line error that names the fault: no crash, no traceback of the command
line, no endless wait, no partial output and no wrong numbers. ``tests/fuzz`` searches for further bad files.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from untrusted_files import EVIL, changed_tensors, edited, one_line, rewritten  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext.sources import expressions, json_file  # noqa: E402
from peft_ext.sources.adapter import checked_config, read_config  # noqa: E402
from peft_ext.sources.expressions import check_expressions  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("files are read on the CPU")]


_CONFIGS: tuple[tuple[dict[str, Any], str], ...] = (
    *(({"peft_type": kind}, f"peft_type is {kind!r}, wanted the name of a method, such as 'LORA'")
      for kind in ("NOPE", None, ["LORA"], 5, "os.system")),
    *(({"task_type": task}, f"task_type is {task!r}, wanted one of SEQ_CLS") for task in ("X", "os")),
    ({"task_type": 5}, "task_type is 5, wanted "),
    *(({"r": r}, f"r is {r!r}, wanted int") for r in (True, "8", None, [8], float("nan"))),
    *(({"r": r}, f"r is {r!r}, wanted an integer of at least 1") for r in (0, -1, 2.5)),
    *(({"r": r}, f"r is {r}, wanted at most 64, the longest side of a tensor in adapter_model.safetensors")
      for r in (65, 10**9, 10**30)),
    *(({"lora_alpha": alpha}, f"lora_alpha is {alpha!r}, wanted int")
      for alpha in ("x", float("inf"), float("nan"), True, 1e308)),
    *(({"lora_dropout": p}, f"lora_dropout is {p!r}, wanted 0 to 1") for p in (-0.1, 1.5, 2)),
    ({"lora_dropout": "0"}, "lora_dropout is '0', wanted float"),
    *(({"target_modules": names}, f"target_modules is {names!r}, wanted ")
      for names in (5, [5], {"a": 1}, [None])),
    *(({"base_model_name_or_path": name}, f"base_model_name_or_path is {name!r}, wanted ") for name in (5, ["a"])),
    ({"auto_mapping": [1]}, "auto_mapping is [1], wanted "),
    ({"auto_mapping": {"base_model_class": 5}}, "auto_mapping has 5 for 'base_model_class', wanted text"),
    ({"rank_pattern": [1]}, "rank_pattern is [1], wanted "),
    ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern['q_proj'] is 'x', wanted an integer of at least 1"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern['q_proj'] is 1000000000, wanted at most 64"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', wanted "),
    ({"layers_to_transform": "a"}, "layers_to_transform is 'a', wanted "),
    *(({"use_dora": value}, f"use_dora is {value!r}, wanted bool") for value in ("yes", 1, None)),
    ({"fan_in_fan_out": []}, "fan_in_fan_out is [], wanted bool"),
    ({"megatron_config": {"a": 1}}, "megatron_config is given, which needs the package megatron"),
    ({"eva_config": 5}, "`EvaConfig` must be a `EvaConfig`, a dict, or None."),
    ({"trainable_token_indices": {"x": ["a"]}}, "trainable_token_indices is {'x': ['a']}, wanted"),
    *(({"layer_replication": ranges}, f"layer_replication is {ranges!r}, wanted pairs of a first layer and one after")
      for ranges in ([[0]], [[2, 1]], [[-1, 2]], [[0, 10**6]], [[0, True]])),
    ({"layer_replication": [[0, 2]] * 6000}, "layer_replication makes more than 10000 layers"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 10**9}, "num_virtual_tokens is 1000000000, wanted at most"),
    ({"peft_type": "ADALORA", "init_r": 10**9, "target_r": 1, "total_step": 9}, "init_r is 1000000000, wanted at most"),
    ({"peft_type": "BOTTLENECK", "bottleneck_dim": 10**9}, "bottleneck_dim is 1000000000, wanted at most 64"),
    ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4,
      "prompt_tuning_init_state_dict_path": "evil.bin"},
     "prompt_tuning_init_state_dict_path is 'evil.bin', a pickle, which runs code as it is read"),
)  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), _CONFIGS, ids=range(len(_CONFIGS)))
def test_fields_of_an_adapters_config(made, tmp_path, changes: dict[str, Any], message: str) -> None:
    folder = edited(made[1], tmp_path / "v", **changes)
    with one_line(f"{folder / 'adapter_config.json'}: {message}", most=500):
        checked_config(folder)


_BROKEN = (
    (b"", ":1: not JSON: Expecting value (column 1)"),
    (b'{"r": 8', ":1: not JSON: Expecting ',' delimiter (column 8)"),
    (b"\0" * 9, ":1: not JSON: Expecting value (column 1)"),
    (b"{\xff}", ": not UTF-8 text (byte 1)"),
    (b"[1]", ": a JSON list, wanted an object"),
    (b"null", ": a JSON NoneType, wanted an object"),
    (b"[" * 100_000, ": not JSON that can be read: nested too deep"),
    (b'{"x": ' + b"[" * 32 + b"]" * 32 + b"}", ": not JSON that can be read: nested too deep"),
    (b'{"r": ' + b"1" * 5000 + b"}", ": not JSON: Exceeds the limit (4300 digits)"),
)


@pytest.mark.parametrize(("data", "message"), _BROKEN, ids=range(len(_BROKEN)))
def test_bytes_of_an_adapters_config(made, tmp_path, data: bytes, message: str) -> None:
    folder = rewritten(made[1], tmp_path / "v", "adapter_config.json", data)
    with one_line(f"{folder / 'adapter_config.json'}{message}"):
        checked_config(folder)


def test_a_config_as_large_as_no_config_is_not_read(made, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(json_file, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"adapter_config.json: \d+ bytes, wanted at most 100"):
        checked_config(made[1])


def test_every_configuration_of_peft_and_of_this_package_is_read_back(tmp_path) -> None:
    """The checks of types accept the saved configuration of each method that the fields in ``given`` can make."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    read = 0
    for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = config_class.__dataclass_fields__
        given = {"target_modules": ["q"], "num_virtual_tokens": 4, "total_step": 10, "target_r": 2, "init_r": 4}
        given["task_type"] = "CAUSAL_LM"
        if "ADAPTION_PROMPT" in str(kind):
            given["target_modules"] = "self_attn"
        try:
            config = config_class(**{name: value for name, value in given.items() if name in fields})
        except (ValueError, TypeError, ImportError):
            continue
        folder = tmp_path / str(getattr(kind, "value", kind))
        config.save_pretrained(str(folder))
        assert type(read_config(folder / "adapter_config.json")) is config_class, kind
        read += 1
    assert read > 30


# The fields of configurations that PEFT or peft_ext.tuners matches as regular expressions.
_EXPRESSIONS = (
    {"target_modules": EVIL}, {"exclude_modules": EVIL}, {"rank_pattern": {EVIL: 4}}, {"alpha_pattern": {EVIL: 4}},
    {"modules_to_save": ["norm", EVIL]}, {"layers_pattern": EVIL, "layers_to_transform": [0]},
    {"layers_pattern": ["layers", EVIL], "layers_to_transform": [0]},
    {"peft_type": "IA3", "feedforward_modules": EVIL, "target_modules": ".*proj"},
    {"peft_type": "BITFIT", "target_modules": EVIL}, {"peft_type": "BITFIT", "add_bias": EVIL},
)  # fmt: skip


@pytest.mark.parametrize("changes", _EXPRESSIONS, ids=lambda changes: list(changes)[-1])
def test_an_expression_that_does_not_end(made, tmp_path, changes: dict[str, Any]) -> None:
    config = read_config(edited(made[1], tmp_path / "v", **changes) / "adapter_config.json")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(made[0]))
    # The time limit includes the start of the child process, and is about four times the usual duration.
    started = time.perf_counter()
    check_expressions(peft.LoraConfig(target_modules="a+"), dict(model.named_modules()))
    seconds = 0.4 + 4 * (time.perf_counter() - started)
    with pytest.raises(
        ValueError, match=f"which takes more than {seconds:g} s to match the names of the model's modules"
    ) as caught:
        check_expressions(config, dict(model.named_modules()), seconds)
    assert repr(EVIL) in str(caught.value)


def test_expressions_that_are_none_and_such_as_end(made, tmp_path) -> None:
    names = ["", "0"]
    for expression, message in (
        ("(", "which is no regular expression that can be used: missing ), unterminated"),
        ("a{99999999999999999999}", "that can be used: the repetition number is too large"),
        ("(" * 5000 + ")" * 5000, "that can be used: maximum recursion depth exceeded"),
    ):
        with one_line("target_modules has the expression ", message, most=300):
            check_expressions(peft.LoraConfig(target_modules=expression), names)
    check_expressions(peft.LoraConfig(target_modules=r".*\.(q|v)_proj", rank_pattern={"^x.*": 1}), names)
    # PEFT compares the names of a list and does not match them as expressions.
    check_expressions(peft.LoraConfig(target_modules=[EVIL, "("]), names)


def test_no_expression_no_process(monkeypatch) -> None:
    monkeypatch.setattr(expressions.subprocess, "run", None)
    config = peft.LoraConfig(target_modules="all-linear", rank_pattern={"model.layers.0.q_proj": 4})
    check_expressions(config, [""])


def header(adapter: Path) -> tuple[dict[str, Any], bytes]:
    data = (adapter / "adapter_model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(head: Any, data: bytes, length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _lies(head: dict[str, Any], data: bytes) -> dict[str, tuple[bytes, str]]:
    first, second = sorted(name for name in head if name != "__metadata__")[:2]

    def changed(name: str, **fields: Any) -> bytes:
        return packed({**head, name: {**head[name], **fields}}, data)

    twice = f'{json.dumps(head)[:-1]}, "{first}": {json.dumps(head[second])}}}'
    return {
        "empty": (b"", "header too small"),
        "cut": (packed(head, data[:-1]), "incomplete metadata, file not fully covered"),
        "more": (packed(head, data + b"x"), "incomplete metadata, file not fully covered"),
        "huge header": (packed(head, data, 2**63), "header too large"),
        "header beyond the file": (packed(head, data, 10**7), "invalid header length"),
        "no JSON": (packed(b"\xff" * 40, data), "invalid UTF-8 in header"),
        "deep": (packed(b"[" * 100_000, data), "invalid JSON in header"),
        "negative offset": (changed(first, data_offsets=[-8, 8]), "invalid value: integer `-8`"),
        "overlap": (changed(second, data_offsets=head[first]["data_offsets"]), "invalid"),
        "overflow": (changed(first, shape=[2**40, 2**40]), "overflow computing buffer size"),
        "negative shape": (changed(first, shape=[-4, -64]), "invalid JSON in header: invalid value: integer `-4`"),
        "other size": (changed(first, dtype="F64"), "invalid shape, data type, or offset"),
        "no such dtype": (changed(first, dtype="EVIL"), "invalid JSON in header: unknown variant `EVIL`"),
        "integers": (changed(first, dtype="I32"), "is I32, wanted floats"),
        "a name twice": (packed(twice.encode(), data), "invalid"),
    }  # fmt: skip


def test_headers_that_lie(made, tmp_path) -> None:
    for data, message in _lies(*header(made[1])).values():
        folder = rewritten(made[1], tmp_path / "v", "adapter_model.safetensors", data)
        with one_line(f"{folder / 'adapter_model.safetensors'}: ", message):
            checked_config(folder)


_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "nan": (lambda t, key: t[key].view(-1)[3:4].fill_(float("nan")), "{key} has values that are not finite"),
    "inf": (lambda t, key: t[key].view(-1)[3:4].fill_(float("inf")), "{key} has values that are not finite"),
    "missing": (lambda t, key: t.pop(key), "adapter_model.safetensors lacks 1 of the adapter's tensors, first "),
    "bools": (lambda t, key: t.update({key: t[key] > 0}), "'base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
    "complex": (lambda t, key: t.update({key: t[key] + 0j}), "is C64, wanted floats"),
    "none": (lambda t, key: t.clear(), "r is 4, wanted at most 0"),
}


@pytest.mark.parametrize("about", _TENSORS)
def test_tensors_of_an_adapter(made, tmp_path, about: str) -> None:
    change, message = _TENSORS[about]
    folder = changed_tensors(made[1], tmp_path / "v", change)
    model = transformers.AutoModelForCausalLM.from_pretrained(made[0])
    key = min(load_file(made[1] / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match="^load_adapter: .*" + re.escape(message.format(key=key))):
        peft_ext.load_adapter(model, folder)


def test_missing_tensors_are_found_whatever_peft_says_of_them(made, tmp_path, monkeypatch) -> None:
    folder = changed_tensors(made[1], tmp_path / "v", lambda t, key: t.pop(key))
    monkeypatch.setattr("peft.peft_model.warnings.warn", lambda *args, **kwargs: None)
    for name in ("default", "lora"):  # "lora" is a part of each key in the file
        model = transformers.AutoModelForCausalLM.from_pretrained(made[0])
        with pytest.raises(ValueError, match=r"lacks 1 of the adapter's tensors, first base_model\..*q_proj\.lora_A"):
            peft_ext.load_adapter(model, folder, name)
        assert not model._load_state_dict_post_hooks


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_rank_beyond_the_base_that_its_start_cuts(tmp_path, init: str) -> None:
    """For some init_lora_weights PEFT truncates r to the base weight's shorter side; the configuration keeps r."""

    def base() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=29, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
        ))  # fmt: skip

    config = peft.LoraConfig(r=64, init_lora_weights=init, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").popitem()[1].shape == (32, 32)
    x = torch.arange(5)[None]
    stock, ours = peft.PeftModel.from_pretrained(base(), tmp_path), peft_ext.load_adapter(base(), tmp_path)
    torch.testing.assert_close(ours.eval()(x).logits, stock.eval()(x).logits, rtol=1e-5, atol=1e-6)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "r": 10**9}))
    with pytest.raises(ValueError, match="r is 1000000000, wanted at most 1024"):
        peft_ext.load_adapter(base(), tmp_path)


def test_missing_tensors_of_a_second_adapter(made, tmp_path) -> None:
    folder = changed_tensors(made[1], tmp_path / "v", lambda t, key: t.pop(key))
    model = peft_ext.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(made[0]), made[1])
    with pytest.raises(ValueError, match="lacks 1 of the adapter's tensors, first .*q_proj.lora_A"):
        peft_ext.load_adapter(model, folder, "a")
    assert list(model.peft_config) == ["default"]
    peft_ext.load_adapter(model, made[1], "a")  # "a" is a part of other modules' names


@pytest.mark.parametrize("place", ["layers.7.self_attn.q_proj", "layers.0.self_attn.x_proj"])
def test_tensors_that_no_layer_takes(made, tmp_path, place: str) -> None:
    def change(tensors: dict[str, torch.Tensor], key: str) -> None:
        tensors[key.replace("layers.0.self_attn.q_proj", place)] = tensors[key].clone()

    folder = changed_tensors(made[1], tmp_path / "v", change)
    model = transformers.AutoModelForCausalLM.from_pretrained(made[0])
    with pytest.warns(UserWarning, match=rf"{re.escape(place)}.lora_A.weight, which is no part of LlamaForCausalLM"):
        peft_ext.load_adapter(model, folder)


def test_an_adapter_of_another_architecture(made) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
        peft_ext.load_adapter(transformers.GPT2LMHeadModel(config), made[1])


def test_the_own_adapters_raise_no_warning(made, recwarn) -> None:
    peft_ext.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(made[0]), made[1], "model")
    assert not [warning for warning in recwarn if "load_adapter" in str(warning.message)]
