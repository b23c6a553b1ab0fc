"""Tests how tokenizers in GGUF files split a text into words, against words and tokens of llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from gguf_files import BOOL
from gguf_vocabularies import BYTES, write_byte_level, write_sentencepiece
from test_loaded import smollm2
from tokenizers import Tokenizer, pre_tokenizers

from peft_ext.gguf import GgufError, read_header
from peft_ext.gguf import pre_tokenizers as own
from peft_ext.gguf.metadata import read_tokenizer
from peft_ext.sources.model import load_tokenizer

pytestmark = pytest.mark.cpu_only("files are read on the CPU")

TEXT = "It's 12345  ABcd\n\n 1.x==y(z) $5 中a\t!\n"
# Each name's words of TEXT, with a stroke between two words.
WORDS = (
    ("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais "
    "trillion granite-docling exaone4",
     "It|'s| 12345| | ABcd|\n\n| 1|.|x|==|y|(|z|)| $|5| 中a|\t|!|\n"),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
     "It|'s| |1|2|3|4|5| | ABcd|\n\n |1|.|x|==|y|(|z|)| $|5| 中a|\t|!|\n"),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
     "It|'s| |1|2|3|4|5| | ABcd|\n\n| |1|.x|==|y|(z|)| $|5| 中a|\t|!\n"),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe "
    "chatglm-bpe glm4 glm5",
     "It|'s| |123|45| | ABcd|\n\n| |1|.x|==|y|(z|)| $|5| 中a|\t|!\n"),
    ("qwen35",
     "It|'s| |1|2|3|4|5| | ABcd|\n\n| |1|.x|==|y|(z|)| $|5| 中a|\t|!\n"),
    ("minicpm5",
     "It|'s| |123|45| | ABcd|\n\n| |1|.x|==|y|(z|)| $|5| 中a|\t|!\n"),
    ("seed-coder",
     "It|'s| |1|2|3|4|5| | ABcd|\n\n| |1|.x|==|y|(z|)| $|5| 中a|\t|!|\n"),
    ("tekken",
     "It|'s| |1|2|3|4|5| | ABcd|\n\n| |1|.x|==|y|(z|)| $|5| 中a|\t|!\n"),
    ("gpt-4o llama4 kanana2 talkie minimax-m2",
     "It's| |123|45| | ABcd|\n\n| |1|.x|==|y|(z|)| $|5| 中a|\t|!\n"),
    ("bloom poro-chat gpt3-finnish",
     "It's| 12345| | ABcd|\n\n| 1|.|x==y|(|z|)| $5| 中a|\t!\n"),
    ("viking",
     "It's| |1|2|3|4|5| | ABcd|\n\n| |1|.|x==y|(|z|)| $|5| 中a|\t!\n"),
    ("falcon",
     "It|'|s| |123|45| | ABcd|\n\n| 1|.|x|==|y|(|z|)| |$|5| 中a|\t|!|\n"),
    ("deepseek-llm",
     "It|'|s| |12345| | ABcd|\n|\n| |1|.|x|==|y|(|z|)| $|5| |中|a|\t!|\n"),
    ("deepseek-coder",
     "It|'|s| |1|2|3|4|5| | ABcd|\n|\n| |1|.|x|==|y|(|z|)| $|5| |中|a|\t!|\n"),
    ("default",
     "It|'|s| |123|45| | ABcd|\n\n| |1|.|x|==|y|(|z|)| |$|5| 中a|\t|!|\n"),
)  # fmt: skip


def words(path: Path, text: str = TEXT) -> str:
    backend = read_tokenizer(read_header(path)).backend_tokenizer
    back = {character: byte for byte, character in BYTES.items()}
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return "|".join(bytes(back[one] for one in piece).decode() for piece in pieces)


@pytest.mark.parametrize("name", sorted(own._EXPRESSIONS))
def test_words(name: str, tmp_path: Path) -> None:
    expected = next(text for names, text in WORDS if name in names.split())
    assert words(write_byte_level(tmp_path / "a.gguf", name)) == expected


@pytest.mark.parametrize("name", ["gemma4", "unknown", "kimi-k2"])
def test_an_unknown_name_is_refused(name: str, tmp_path: Path) -> None:
    file = write_byte_level(tmp_path / "a.gguf", name)
    with pytest.raises(GgufError) as caught:
        read_tokenizer(read_header(file))
    text = str(caught.value)
    assert text.startswith(f"{file}: tokenizer.ggml.pre is {name!r}, whose way to split text into words is not known")
    assert "bloom, chatglm-bpe" in text and "smollm" in text and "AutoTokenizer" in text and "\n" not in text
    with pytest.raises(GgufError, match=f"tokenizer.ggml.pre is '{name}'"):
        load_tokenizer(str(tmp_path), gguf_file="a.gguf")


def test_without_a_name_the_words_are_those_of_the_default(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre is missing"):
        found = words(write_byte_level(tmp_path / "a.gguf", None))
    assert found == dict(WORDS)["default"]


@pytest.mark.parametrize(
    ("name", "tokens"), [("llama-bpe", ["abc"]), ("tekken", ["abc"]), ("glm4", ["abc"]), ("qwen2", ["ab", "c"])]
)
def test_a_word_in_the_vocabulary_needs_no_merge(name: str, tokens: list[str], tmp_path: Path) -> None:
    """The vocabulary has "abc", to which no merge leads. llama.cpp calls this ignore_merges."""
    tokenizer = read_tokenizer(read_header(write_byte_level(tmp_path / "a.gguf", name, [("a", "b")], ["abc"])))
    assert tokenizer.tokenize("abc") == tokens
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).tokenize("abc") == tokens


@pytest.mark.parametrize(("name", "says", "adds"), [
    ("llama-bpe", None, True), ("tekken", None, True), ("lfm2", None, True), ("llama-bpe", False, False),
    ("qwen2", None, False), ("smollm", None, False), ("smollm", True, True),
])  # fmt: skip
def test_a_text_begins_with_bos_as_in_llama_cpp(name: str, says: bool | None, adds: bool, tmp_path: Path) -> None:
    more = {} if says is None else {"tokenizer.ggml.add_bos_token": (BOOL, says)}
    tokenizer = read_tokenizer(read_header(write_byte_level(tmp_path / "a.gguf", name, more=more)))
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, load_tokenizer(str(tmp_path / "saved"))):
        ids = one("a")["input_ids"]
        assert (ids[0] == one.bos_token_id == 0) == adds and len(ids) == 1 + adds
    told = read_tokenizer(read_header(tmp_path / "a.gguf"), add_bos_token=not adds)
    assert (told("a")["input_ids"][0] == 0) == (adds if says is not None else not adds)


def test_control_tokens_beyond_the_byte_alphabet(tmp_path: Path) -> None:
    """Names of control tokens such as those of DeepSeek, and user-defined spaces such as those of MPT."""
    header = read_header(
        write_byte_level(
            tmp_path / "a.gguf", "deepseek-r1-qwen", [("a", "b"), (" ", " "), ("  ", "a")], bos="<｜begin｜>",
            raw={"<｜User｜>": 3, "<｜user defined｜>": 4, "  ": 4},
            more={"tokenizer.ggml.add_bos_token": (BOOL, True)},
        )
    )  # fmt: skip
    tokenizer, tokens = read_tokenizer(header), header.get("tokenizer.ggml.tokens")
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, load_tokenizer(str(tmp_path / "saved"))):
        assert one.bos_token_id == 0 and len(one) == len(tokens)
        found = one("<｜User｜>ab<｜user defined｜>a  a<|endoftext|>")["input_ids"]
        assert [tokens[number] for number in found][:7] == [
            "<｜begin｜>", "<｜User｜>", "ab", "<｜user defined｜>", "a", "  ", "a",
        ]  # fmt: skip
        assert one.decode(found, skip_special_tokens=True) == "ab<｜user defined｜>a  a<|endoftext|>"


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize(("prefix", "tokens"), [(None, ["▁ab", "▁a"]), (True, ["▁ab", "▁a"]), (False, ["ab", "▁a"])])
def test_a_space_before_the_text(architecture: str, prefix: bool | None, tokens: list[str], tmp_path: Path) -> None:
    tokenizer = read_tokenizer(read_header(write_sentencepiece(tmp_path / "a.gguf", prefix, architecture)))
    assert tokenizer.tokenize("ab a") == tokens
    assert tokenizer.decode(tokenizer("ab a")["input_ids"]) == "ab a"
    if prefix is False:
        assert tokenizer.tokenize(" ab") == ["▁ab"]
    else:
        assert tokenizer.tokenize(" ab") == ["▁", "▁ab"]
    assert tokenizer.decode(tokenizer(" ab")["input_ids"]) == " ab"


@pytest.mark.parametrize(("prefix", "tokens"), [(None, ["▁ab", "▁a"]), (True, ["▁ab", "▁a"]), (False, ["ab", "▁a"])])
def test_a_space_before_a_text_of_t5(prefix: bool | None, tokens: list[str], tmp_path: Path) -> None:
    file = write_sentencepiece(tmp_path / "a.gguf", prefix, "t5", "t5")
    tokenizer = read_tokenizer(read_header(file))
    for text in ("ab a", " ab  a", "ab\na "):
        assert tokenizer.tokenize(text) == tokens
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == "ab a"


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """The tokenizer of SmolLM2's own tokenizer.json splits by Digits and ByteLevel."""
    file = smollm2()
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.tokenize("\n\n1.  2") == ["ĊĊ", "1", ".", "ĠĠ", "2"]
    assert load_tokenizer(str(file.parent), gguf_file=file.name).tokenize("\n\n1") == ["ĊĊ", "1"]
    expected = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    expected.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for path in (Path(__file__), Path(own.__file__), file.parent / "__init__.py"):
        text = path.read_text()
        assert tokenizer(text)["input_ids"] == expected.encode(text).ids
