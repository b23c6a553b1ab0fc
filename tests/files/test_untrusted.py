"""Bytes from outside: NF4 states, adapters, base models, runs and data that are broken, absurd or meant to do harm.

What comes of them is an error in one line that says what is wrong; never a crash, a traceback of the command line, a
wait without an end, an output half-written, or numbers that are silently wrong. ``tests/fuzz`` looks for more.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch import nn  # noqa: E402

import peft_ext  # noqa: E402
from peft_ext import NestedAbsmax, NF4Weight  # noqa: E402
from peft_ext.cli import chat  # noqa: E402
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.run import RunError, demo_model  # noqa: E402
from peft_ext.run.data import read_corpus  # noqa: E402
from peft_ext.sources import expressions, json_file  # noqa: E402
from peft_ext.sources.adapter import checked_config, read_config, training_options  # noqa: E402
from peft_ext.sources.expressions import check_expressions  # noqa: E402
from peft_ext.weight import QUANT_STATE, read_quant_state  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("files are read on the CPU")]

# Backtracks for longer than the universe is old on the name of a layer.
EVIL = "([a-z_.0-9]+)+!"


# - NF4 states -


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return peft_ext.nn.NF4Linear.from_linear(nn.Linear(64, 32)).state_dict()


def _nf4(state: dict[str, Any]) -> NF4Weight:
    """As NF4Linear reads it."""
    shape, dtype, blocksize, offset = read_quant_state(state)
    nested = None
    if offset is not None:
        nested = NestedAbsmax(state["weight.nested_absmax"], state["weight.nested_quant_map"], torch.tensor(offset))
    nf4 = NF4Weight(state["weight"], state["weight.absmax"], shape, dtype, blocksize, nested)
    nf4.check_scales()
    return nf4


def _bytes(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def _about(state: dict[str, torch.Tensor], **changes: Any) -> dict[str, Any]:
    about = json.loads(bytes(state[QUANT_STATE].tolist()))
    return {**state, QUANT_STATE: _bytes(json.dumps({**about, **changes}).encode())}


def test_a_whole_state_is_read(state: dict[str, torch.Tensor]) -> None:
    layer = peft_ext.nn.NF4Linear(64, 32)
    layer.load_state_dict(state)
    assert torch.equal(_nf4(state).dequantize(), layer.dequantize())


_STATES = (
    (b"", "is not JSON: Expecting value"),
    (b'{"quant_type": "nf4"', "is not JSON: Expecting ',' delimiter"),
    (b"\xff{}", "is not JSON: 'utf-8' codec can't decode byte 0xff in position 0"),
    (b"[" * 100_000, "is not JSON: nested too deep"),
    (b'{"blocksize": ' + b"1" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    (b"[1]", "is a JSON list, wanted an object"),
    (b"null", "is a JSON NoneType, wanted an object"),
    (b" " * (1 << 20) + b"{}", f"is of {(1 << 20) + 2} bytes, wanted at most {1 << 20}"),
)


@pytest.mark.parametrize(("data", "message"), _STATES, ids=range(len(_STATES)))
def test_quant_state_bytes(state: dict[str, torch.Tensor], data: bytes, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        _nf4({**state, QUANT_STATE: _bytes(data)})
    assert str(caught.value).startswith(f"{QUANT_STATE} {message}")


@pytest.mark.parametrize(("held", "came"), [
    (None, "NoneType"), ([1], "list"), (torch.zeros(3), r"torch.float32 \(3,\) on cpu"),
    (torch.zeros(2, 2, dtype=torch.uint8), r"torch.uint8 \(2, 2\) on cpu"),
    (torch.zeros(3, dtype=torch.uint8, device="meta"), r"torch.uint8 \(3,\) on meta"),
])  # fmt: skip
def test_a_quant_state_that_is_no_bytes(state: dict[str, torch.Tensor], held: Any, came: str) -> None:
    with pytest.raises(ValueError, match=f"is {came}, wanted the bytes of JSON"):
        _nf4({**state, QUANT_STATE: held})


_SIZES = re.escape(str(peft_ext.weight.BLOCKSIZES))


@pytest.mark.parametrize(("changes", "message"), [
    *(({"blocksize": size}, f"blocksize is {re.escape(repr(size))}, wanted one of {_SIZES}")
      for size in (0, -64, 65, "64", 64.7, float("inf"), None, True, [64])),
    ({"blocksize": 10**30}, "blocksize is 10+, wanted one of"),
    *(({"shape": shape}, f"shape is {re.escape(repr(shape))}, wanted a list of sizes") for shape in (None, 5, "x", {})),
    ({"shape": [-32, -64]}, r"shape is \(-32, -64\), wanted sizes of 0 or more"),
    ({"shape": [32.0, 64]}, r"shape is \[32.0, 64\], wanted integers"),
    ({"shape": [10**30, 1]}, "wanted sizes of 0 or more"),
    ({"shape": [2**32, 2**32]}, f"packed is torch.uint8 with 1024 elements, wanted torch.uint8 with {2**63}"),
    ({"shape": [32]}, r"packed is torch.uint8 with 1024 elements, wanted torch.uint8 with 16 for shape \(32,\)"),
    *(({"dtype": dtype}, f"dtype is {re.escape(repr(dtype))}, wanted one of float32, bfloat16")
      for dtype in ("int8", "evil", "nn", "load", 5, None, ["float32"])),
    *(({"quant_type": kind}, f"quant_type is {re.escape(repr(kind))}, wanted 'nf4'")
      for kind in ("fp4", None, ["nf4"])),
    *(({"nested_offset": offset}, f"nested_offset is {re.escape(repr(offset))}, wanted a finite number")
      for offset in ("x", None, float("inf"), float("nan"), 1e39, [1])),
    *(({"nested_blocksize": size}, f"nested_blocksize is {re.escape(repr(size))}, wanted 256")
      for size in (128, "256", None)),
])  # fmt: skip
def test_quant_state_fields(state: dict[str, torch.Tensor], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        _nf4(_about(state, **changes))


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "weight.nested_absmax", "weight.nested_quant_map"])
def test_tensors_of_a_state(state: dict[str, torch.Tensor], name: str) -> None:
    tensor = state[name]
    for wrong, message in (
        (None, f"{name} is NoneType, wanted a Tensor"),
        (tensor.numpy(), f"{name} is ndarray, wanted a Tensor"),
        (tensor.to_sparse(), f"{name} has layout torch.sparse_coo, wanted torch.strided"),
        (tensor.flatten()[:-1], "elements, wanted"),
        (tensor.to(torch.complex64), "is torch.complex64 with"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            _nf4({**state, name: wrong})
    if name.startswith("weight.nested"):
        with pytest.raises(ValueError, match=f"there is a nested_offset and no {name}"):
            _nf4({key: value for key, value in state.items() if key != name})


def test_wrong_bits_in_scales_and_tables_are_seen(state: dict[str, torch.Tensor]) -> None:
    for name, place, value, message in (
        ("weight.nested_absmax", 0, float("nan"), "nested_absmax has values that are not finite"),
        ("weight.nested_absmax", 0, -1.0, "nested_absmax has values below 0"),
        ("weight.nested_quant_map", 200, float("inf"), "nested_code has values that are not finite"),
        ("weight.nested_quant_map", 200, -0.9, "nested_code does not ascend"),
        ("weight.quant_map", 3, 0.5, "weight.quant_map is not NF4's table of codes"),
    ):
        held = state[name].clone()
        held[place] = value
        with pytest.raises(ValueError, match=message):
            _nf4({**state, name: held})


def test_a_table_that_was_cast_is_still_nf4s(state: dict[str, torch.Tensor]) -> None:
    _nf4({**state, "weight.quant_map": state["weight.quant_map"].bfloat16()})


@pytest.mark.parametrize(("data", "message"), _STATES, ids=range(len(_STATES)))
def test_the_layer_refuses_the_same(state: dict[str, torch.Tensor], data: bytes, message: str) -> None:
    layer = peft_ext.nn.NF4Linear(64, 32)
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=re.escape(f"NF4Linear '': {QUANT_STATE} {message}")):
        layer.load_state_dict({**state, QUANT_STATE: _bytes(data)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items() if name != "bias")


@pytest.mark.parametrize(("name", "wrong", "message"), [
    ("weight", None, "weight is NoneType, wanted a Tensor"),
    ("weight", torch.zeros(1024, 1, dtype=torch.uint8).to_sparse(), "weight has layout torch.sparse_coo, wanted"),
    ("weight.nested_absmax", torch.full((1,), float("nan")), "nested_absmax has values that are not finite"),
    ("weight.quant_map", torch.zeros(16), "weight.quant_map is not NF4's table of codes"),
    ("bias", torch.zeros(31), r"bias has shape \(31,\), wanted \(32,\)"),
    ("bias", torch.zeros(32, dtype=torch.int64), "bias is torch.int64 with layout torch.strided, wanted floats with"),
    ("bias", torch.zeros(32, device="meta"), "bias is on the meta device, where there is no data"),
])  # fmt: skip
def test_the_layer_refuses_tensors(state: dict[str, torch.Tensor], name: str, wrong: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        peft_ext.nn.NF4Linear(64, 32).load_state_dict({**state, name: wrong})


@pytest.fixture
def params4bit():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    return peft_ext.ops.nf4_quantize(torch.randn(32, 64), double_quant=True).to_bitsandbytes()


@pytest.mark.parametrize(("change", "kind", "message"), [
    (lambda q: setattr(q, "blocksize", 48), ValueError, "NF4Weight: blocksize is 48, wanted one of"),
    (lambda q: setattr(q, "shape", (-32, -64)), ValueError, r"NF4Weight: shape is \(-32, -64\), wanted sizes of"),
    (lambda q: setattr(q, "shape", None), TypeError, "NF4Weight: shape is None, wanted integers"),
    (lambda q: setattr(q, "dtype", torch.int8), TypeError, "NF4Weight: dtype is torch.int8, wanted one of"),
    (lambda q: setattr(q, "absmax", None), TypeError, "NF4Weight: absmax is NoneType, wanted a Tensor"),
    (lambda q: setattr(q, "offset", None), TypeError, "NF4Weight: nested.offset is NoneType, wanted a Tensor"),
    (lambda q: setattr(q, "state2", None), ValueError, "from_bitsandbytes: the nested blocksize is None, wanted 256"),
    (lambda q: setattr(q, "code", torch.zeros(16)), ValueError, "the quant_state's table of codes is not NF4's"),
    (lambda q: q.state2.absmax.fill_(float("nan")), ValueError, "nested_absmax has values that are not finite"),
])  # fmt: skip
def test_from_bitsandbytes(params4bit, change: Callable, kind: type[Exception], message: str) -> None:
    change(params4bit.quant_state)
    with pytest.raises(kind, match=message):
        NF4Weight.from_bitsandbytes(params4bit)


def test_from_bitsandbytes_of_what_is_none(params4bit) -> None:
    with pytest.raises(TypeError, match="from_bitsandbytes: weight is NoneType, wanted a Tensor"):
        NF4Weight.from_bitsandbytes(None, params4bit.quant_state)
    with pytest.raises(ValueError, match="from_bitsandbytes: quant_type is None, wanted 'nf4'"):
        NF4Weight.from_bitsandbytes(params4bit, "nf4")


# - adapters -


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a tiny base model, with a tokenizer, and of an adapter that names it."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(root / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w3", pad_token="w0", eos_token="w2"
    ).save_pretrained(root / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained(root / "adapter")
    file = root / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(root / "base")}))
    return root / "base", root / "adapter"


def edited(folder: Path, out: Path, name: str = "adapter_config.json", **changes: Any) -> Path:
    """A copy of ``folder`` with fields of a JSON file changed."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    (out / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))
    return out


def rewritten(folder: Path, out: Path, name: str, data: bytes) -> Path:
    shutil.copytree(folder, out, dirs_exist_ok=True)
    (out / name).write_bytes(data)
    return out


_CONFIGS: tuple[tuple[dict[str, Any], str], ...] = (
    *(({"peft_type": kind}, f"peft_type is {kind!r}, wanted the name of a method, such as 'LORA'")
      for kind in ("NOPE", None, ["LORA"], 5, "os.system")),
    *(({"task_type": task}, f"task_type is {task!r}, wanted one of SEQ_CLS") for task in ("X", "os")),
    ({"task_type": 5}, "task_type is 5, wanted a name or text"),
    *(({"r": r}, f"r is {r!r}, wanted a number") for r in (True, "8", None, [8], float("nan"))),
    *(({"r": r}, f"r is {r!r}, wanted an integer of at least 1") for r in (0, -1, 2.5)),
    *(({"r": r}, f"r is {r}, wanted at most 64, the longest side of a tensor in adapter_model.safetensors")
      for r in (65, 10**9, 10**30)),
    *(({"lora_alpha": alpha}, f"lora_alpha is {alpha!r}, wanted a number")
      for alpha in ("x", float("inf"), float("nan"), True, 1e308)),
    *(({"lora_dropout": p}, f"lora_dropout is {p!r}, wanted 0 to 1") for p in (-0.1, 1.5, 2)),
    ({"lora_dropout": "0"}, "lora_dropout is '0', wanted a number"),
    *(({"target_modules": names}, f"target_modules is {names!r}, wanted a list of text or text")
      for names in (5, [5], {"a": 1}, [None])),
    *(({"base_model_name_or_path": name}, f"base_model_name_or_path is {name!r}, wanted text") for name in (5, ["a"])),
    ({"auto_mapping": [1]}, "auto_mapping is [1], wanted an object"),
    ({"auto_mapping": {"base_model_class": 5}}, "auto_mapping has 5 for 'base_model_class', wanted text"),
    ({"rank_pattern": [1]}, "rank_pattern is [1], wanted an object"),
    ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern['q_proj'] is 'x', wanted an integer of at least 1"),
    ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern['q_proj'] is 1000000000, wanted at most 64"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', wanted a list of text"),
    ({"layers_to_transform": "a"}, "layers_to_transform is 'a', wanted a list of a number or a number"),
    *(({"use_dora": value}, f"use_dora is {value!r}, wanted true or false") for value in ("yes", 1, None)),
    ({"fan_in_fan_out": []}, "fan_in_fan_out is [], wanted true or false"),
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
    with pytest.raises(ValueError) as caught:
        checked_config(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder / 'adapter_config.json'}: {message}") and "\n" not in text and len(text) < 500


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
    with pytest.raises(ValueError) as caught:
        checked_config(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder / 'adapter_config.json'}{message}") and "\n" not in text


def test_a_config_as_large_as_no_config_is_not_read(made, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(json_file, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"adapter_config.json: \d+ bytes, wanted at most 100"):
        checked_config(made[1])


def test_every_configuration_of_peft_and_of_this_package_is_read_back(tmp_path) -> None:
    """The types that fields are held to are those that PEFT writes."""
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


# What the configuration's expressions are matched with, in PEFT and in peft_ext.tuners.
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
    # The process of its own has to start in that time, too: some times what it takes now.
    started = time.perf_counter()
    check_expressions(peft.LoraConfig(target_modules="a+"), model)
    seconds = 0.4 + 4 * (time.perf_counter() - started)
    with pytest.raises(
        ValueError, match=f"which takes more than {seconds:g} s to match the names of the model's modules"
    ) as caught:
        check_expressions(config, model, seconds)
    assert repr(EVIL) in str(caught.value)


def test_expressions_that_are_none_and_such_as_end(made, tmp_path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for expression, message in (
        ("(", "which is no regular expression that can be used: missing ), unterminated"),
        (
            "a{99999999999999999999}",
            "that can be used: the repetition number is too large",
        ),
        ("(" * 5000 + ")" * 5000, "that can be used: maximum recursion depth exceeded"),
    ):
        with pytest.raises(ValueError) as caught:
            check_expressions(peft.LoraConfig(target_modules=expression), model)
        text = str(caught.value)
        assert text.startswith("target_modules has the expression ") and message in text and len(text) < 300
    check_expressions(peft.LoraConfig(target_modules=r".*\.(q|v)_proj", rank_pattern={"^x.*": 1}), model)
    # Names are compared, not matched.
    check_expressions(peft.LoraConfig(target_modules=[EVIL, "("]), model)


def test_no_expression_no_process(monkeypatch) -> None:
    monkeypatch.setattr(expressions.subprocess, "run", None)
    config = peft.LoraConfig(target_modules="all-linear", rank_pattern={"model.layers.0.q_proj": 4})
    check_expressions(config, nn.Linear(4, 4))


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
    for about, (data, message) in _lies(*header(made[1])).items():
        folder = rewritten(made[1], tmp_path / "v", "adapter_model.safetensors", data)
        with pytest.raises(ValueError) as caught:
            checked_config(folder)
        text = str(caught.value)
        assert text.startswith(f"{folder / 'adapter_model.safetensors'}: ") and message in text, about
        assert "\n" not in text


def changed_tensors(adapter: Path, out: Path, change: Callable[[dict[str, torch.Tensor], str], Any]) -> Path:
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors, min(tensors))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return out


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
    with pytest.raises(ValueError) as caught:
        peft_ext.load_adapter(model, folder)
    key = min(load_file(made[1] / "adapter_model.safetensors"))
    assert str(caught.value).startswith("load_adapter: ") and message.format(key=key) in str(caught.value)


def test_missing_tensors_are_found_whatever_peft_says_of_them(made, tmp_path, monkeypatch) -> None:
    folder = changed_tensors(made[1], tmp_path / "v", lambda t, key: t.pop(key))
    monkeypatch.setattr("peft.peft_model.warnings.warn", lambda *args, **kwargs: None)
    for name in ("default", "lora"):  # which is a part of each key
        model = transformers.AutoModelForCausalLM.from_pretrained(made[0])
        with pytest.raises(ValueError, match=r"lacks 1 of the adapter's tensors, first base_model\..*q_proj\.lora_A"):
            peft_ext.load_adapter(model, folder, name)
        assert not model._load_state_dict_post_hooks


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_rank_beyond_the_base_that_its_start_cuts(tmp_path, init: str) -> None:
    """PEFT has no more ranks then than the base weight's shorter side; the configuration keeps the r it was given."""

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
    peft_ext.load_adapter(model, made[1], "a")  # a name that is a part of others


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


# - the commands -


def refused(capsys, root: Path, *arguments: object) -> str:
    """The one line that a command ends with; it has written nothing."""
    before = sorted(path.name for path in root.iterdir())
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (arguments, code, out, err)
    assert sorted(path.name for path in root.iterdir()) == before
    return err[len("error: ") : -1]


def commands(adapter: Path, root: Path, model: Path | None = None) -> tuple[tuple[object, ...], ...]:
    base = () if model is None else ("--model", model)
    return (
        ("chat", "--adapter", adapter, "--prompt", "w5 w6", "--max-new-tokens", 2, *base),
        ("merge", "--adapter", adapter, "--output", root / "out", *base),
        ("explain", adapter, *base),
    )


def test_the_commands_refuse_adapters(made, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(expressions, "_SECONDS", 0.4)
    base, adapter = made
    for changes, message in (
        ({"peft_type": "NOPE"}, "peft_type is 'NOPE'"),
        ({"r": 10**9}, "r is 1000000000, wanted at most 64"),
        ({"target_modules": EVIL}, "which takes more than 0.4 s"),
        ({"base_model_name_or_path": "../../no-such"}, "model is ../../no-such, no such folder"),
        ({"base_model_name_or_path": "x" * 5000}, "File name too long"),
        ({"base_model_name_or_path": "~nobody-of-this-name/x"}, "model is ~nobody-of-this-name/x"),
        ({"base_model_name_or_path": "a\0b"}, "no such folder"),
        ({"base_model_name_or_path": ""}, "names no base model"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron"),
    ):
        folder = edited(adapter, tmp_path / "v", **changes)
        for command in commands(folder, tmp_path):
            assert message in refused(capsys, tmp_path, *command), command
    assert "antigravity" not in sys.modules
    shutil.rmtree(tmp_path / "v")
    folder = rewritten(adapter, tmp_path / "v", "adapter_config.json", b"[" * 100_000)
    for command in commands(folder, tmp_path):
        assert "nested too deep" in refused(capsys, tmp_path, *command)


def test_no_command_imports_what_a_config_names(made, tmp_path, capsys) -> None:
    mapping = {"base_model_class": "system", "parent_library": "antigravity"}
    folder = edited(made[1], tmp_path / "v", auto_mapping=mapping, task_type=None)
    for command in commands(folder, tmp_path):
        assert main([str(argument) for argument in command]) == 0
    assert "antigravity" not in sys.modules


def test_no_command_reads_a_pickle(made, tmp_path, capsys) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    base, adapter = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in made)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Evil(), adapter / "adapter_model.bin")
    for command in commands(adapter, tmp_path, base):
        assert "has no adapter_model.safetensors" in refused(capsys, tmp_path, *command).replace(
            "has adapter_model.bin, a pickle, and no", "has no"
        ).replace("has adapter_model.bin, a pickle, which runs code as it is read, and no", "has no")
    with pytest.raises(ValueError, match="a pickle"):
        peft_ext.load_adapter(nn.Linear(4, 4), adapter)
    weights = base / "model.safetensors"
    weights.rename(base / "pytorch_model.bin")
    torch.save(Evil(), base / "pytorch_model.bin")
    for command in commands(made[1], tmp_path, base)[:2]:
        assert "has pytorch_model.bin, a pickle, and no safetensors" in refused(capsys, tmp_path, *command)
    # An index of safetensors that names a pickle: transformers would read that.
    shutil.copy(made[0] / "model.safetensors", base / "model-9.safetensors")
    for name, message in (("pytorch_model.bin", "weight_map has 'pytorch_model.bin', wanted the name of a"),
                          ("../x.safetensors", "weight_map has '../x.safetensors', wanted")):  # fmt: skip
        index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
        for command in commands(made[1], tmp_path, base)[:2]:
            assert message in refused(capsys, tmp_path, *command)
    assert not (tmp_path / "ran").exists()


def test_the_commands_refuse_bases(made, tmp_path, capsys) -> None:
    base, adapter = made
    for changes, message in (
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size' is 0, wanted at least 1"),
        ({"num_attention_heads": 3}, "num_attention_heads|Class validation error"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, wanted at most 10000"),
        ({"text_config": {"num_experts": 10**9}}, "'num_experts' is 1000000000, wanted at most 10000"),
        ({"model_type": "evil"}, "evil"),
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}, "custom code"),
        ({"dtype": "int8"}, "int8"),
        ({"architectures": [5]}, "attribute name must be string"),
    ):
        folder = edited(base, tmp_path / "b", "config.json", **changes)
        for command in commands(adapter, tmp_path, folder):
            assert re.search(message, refused(capsys, tmp_path, *command)), (command, changes)
    for name, data in (("config.json", b"[" * 100_000), ("config.json", b'{"a"'), ("model.safetensors", b"\0" * 99)):
        folder = rewritten(base, tmp_path / "b", name, data)
        for command in commands(adapter, tmp_path, folder)[:2]:
            assert refused(capsys, tmp_path, *command).startswith("model ")
        shutil.rmtree(folder)


def test_chat_refuses_tokenizers_templates_and_generation(made, tmp_path, capsys, monkeypatch) -> None:
    base, adapter = made
    loop = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for name, data, message in (
        ("tokenizer.json", b"[1]", "no tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "no tokenizer"),
        ("tokenizer_config.json", b"[]", "no tokenizer"),
        ("chat_template.jinja", b"{{ 1/0 }}", "the tokenizer's chat template: division by zero"),
        ("chat_template.jinja", b"{{ ''.__class__.__mro__ }}", "the tokenizer's chat template: access to attribute"),
        ("chat_template.jinja", loop, "the tokenizer's chat template: it takes more than 0.3 s"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "generate, with the base's generation_config: "),
    ):
        folder = rewritten(base, tmp_path / "b", name, data)
        with monkeypatch.context() as patch:
            if data is loop:  # the others end by themselves, whenever this process gets to run
                patch.setattr(chat, "_SECONDS", 0.3)
            assert message in refused(capsys, tmp_path, *commands(adapter, tmp_path, folder)[0]), name
        shutil.rmtree(folder)
    folder = rewritten(base, tmp_path / "b", "generation_config.json", b'{"num_beams": 1000000, "max_length": 9}')
    assert main([str(argument) for argument in commands(adapter, tmp_path, folder)[0]]) == 0


def test_chat_refuses_what_is_no_text(made, tmp_path, capsys, monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w5 \xff\n"), encoding="utf-8"))
    command = ("chat", "--adapter", made[1], "--max-new-tokens", 2)
    assert refused(capsys, tmp_path, *command) == "standard input: not UTF-8 text"


_RUNS = (
    (b"[", "run.json:1: not JSON"),
    (b"[" * 100_000, "run.json: not JSON that can be read: nested too deep"),
    (b"\xff", "run.json: not UTF-8 text"),
    (b'{"options": {"quant": "int3"}}', "run.json: options have the quant 'int3', wanted 'nf4' or 'none'"),
    (b'{"options": {"quant": "nf4", "blocksize": "64"}}', "run.json: options have the blocksize '64', wanted one of"),
    (b'{"options": {"quant": "nf4", "blocksize": true}}', "run.json: options have the blocksize True, wanted one of"),
)


@pytest.mark.parametrize(("text", "message"), _RUNS, ids=range(len(_RUNS)))
def test_a_run_that_does_not_say_which_base(made, tmp_path, capsys, text: bytes, message: str) -> None:
    """It would be merged into another base than it was trained on, silently."""
    folder = rewritten(made[1], tmp_path / "v", "run.json", text)
    for command in commands(folder, tmp_path):
        assert message in refused(capsys, tmp_path, *command)


def test_a_run_json_of_something_else_says_nothing(made, tmp_path) -> None:
    for text in (b"{}", b'{"options": 5}', b'{"options": {"model": "x"}}'):
        assert training_options(rewritten(made[1], tmp_path / "v", "run.json", text)) == {}


# - data -

_ROW = b'{"text": "one"}\n'
_DATA: tuple[tuple[str, bytes, str], ...] = (
    (".jsonl", b"\0\n" + _ROW, ":1: not JSON: Expecting value (column 1)"),
    (".jsonl", _ROW + b'{"text": "a\0b"}', ":2: not JSON: Invalid control character at (column 12)"),
    (".jsonl", _ROW + b'{"text":', ":2: not JSON: Expecting value (column 9)"),
    (".jsonl", _ROW + b'{"a": ' + b"[" * 100_000, ":2: not JSON that can be read: nested too deep"),
    (".jsonl", _ROW + b'{"a": ' + b"1" * 5000 + b"}", ":2: not JSON: Exceeds the limit (4300 digits)"),
    (".jsonl", _ROW + b'{"text": "\\ud800"}', ": record 2 has half a character, '\\ud800', wanted Unicode text"),
    (".jsonl", b'{"prompt": "\\udfff", "completion": "a"}\n' * 2, ": record 1 has half a character, '\\udfff'"),
    (".jsonl", b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}\n' * 2, ": record 1 has half a character"),
    (".jsonl", _ROW + b"\xff", ": not UTF-8 text (byte 16)"),
    (".jsonl", _ROW + b"NaN", ":2: a JSON float, wanted an object with named columns"),
    (".jsonl", _ROW + b'{"text": 1e999}', ": record 2 has float in column 'text', wanted text"),
    (".json", b"[" * 100_000, ": not JSON that can be read: nested too deep"),
    (".json", b"[" + b"1" * 5000 + b"]", ": not JSON: Exceeds the limit (4300 digits)"),
    (".json", b'[\n{"text"]', ":2: not JSON: Expecting ':' delimiter (column 8)"),
    (".csv", b"text,text\na,b\nc,d\n", ":1: the header has the column 'text' twice"),
    (".csv", b'text\n"a\nb\n', ":1: not CSV: unexpected end of data"),
    (".csv", b"text\n" + b"x" * 200_000 + b"\ny\n", ":1: not CSV: field larger than field limit (131072)"),
    (".csv", b"text\na\nb,c\n", ":3: a row that has not 1 columns as the header"),
    (".csv", b"\xff\xfet\0e\0", ": not UTF-8 text (byte 0)"),
    (".txt", b"\xff", ": not UTF-8 text (byte 0)"),
)


@pytest.mark.parametrize(("suffix", "data", "message"), _DATA, ids=range(len(_DATA)))
def test_data(tmp_path, suffix: str, data: bytes, message: str) -> None:
    file = tmp_path / f"data{suffix}"
    file.write_bytes(data)
    with pytest.raises(RunError) as caught:
        read_corpus(str(file))
    text = str(caught.value)
    assert f"{file}{message}" in text and "\n" not in text and "\0" not in text


def test_data_that_is_no_file(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for spec, message in (
        (str(tmp_path / "pipe.jsonl"), "a pipe or a device, wanted a file"),
        ("x" * 5000 + ".jsonl", "File name too long"),
        ("~nobody-of-this-name/a.jsonl", "Could not determine home directory"),
        ("/dev/zero", "a nameless file, wanted .jsonl"),
    ):
        with pytest.raises(RunError, match=message):
            read_corpus(spec)


# - the model that comes as a GGUF -


def test_a_gguf_of_values_that_are_not_finite(made, tmp_path, monkeypatch) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(made[0])
    broken = copy.deepcopy(model)
    broken.model.norm.weight.data[3] = float("nan")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    for found in (broken, model):
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, found=found, **k: found)
        if found is broken:
            with pytest.raises(ValueError, match="x.gguf: model.norm.weight has values that are not finite"):
                demo_model.convert(tmp_path / "x.gguf", tmp_path / "out")
            assert not (tmp_path / "out").exists()
        else:
            demo_model.convert(tmp_path / "x.gguf", tmp_path / "out")


def test_a_gguf_that_is_none(tmp_path, monkeypatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    monkeypatch.setattr(demo_model, "packed_model", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(demo_model, "_target", lambda: tmp_path / "cache/model")

    def run(command: list[str], **kwargs: Any) -> Any:
        """In this process: another would take seconds to import what it needs."""
        with pytest.raises(Exception) as caught:
            demo_model.convert(Path(command[-2]), Path(command[-1]))
        return subprocess.CompletedProcess(command, 1, "", f"Traceback\n{caught.value!r}\n")

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    with pytest.raises(RunError, match="unpacking .*x.gguf failed: ") as caught:
        demo_model.demo_model()
    assert "\n" not in str(caught.value) and list((tmp_path / "cache").iterdir()) == []
