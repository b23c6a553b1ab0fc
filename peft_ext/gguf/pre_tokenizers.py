"""How llama.cpp splits a text into words, before the merges of a byte-level BPE tokenizer in a GGUF file.

The value of a file's key ``tokenizer.ggml.pre`` is the name of a pre-tokenizer. For each name of a pre-tokenizer,
llama.cpp has a list of regular expressions, and two flags: whether a word that is in the vocabulary becomes one token
without merges, and whether a text begins with the token BOS if the file has no ``tokenizer.ggml.add_bos_token``.
transformers knows some of the names, and splits by GPT-2's expression for all other names. The function
:func:`fit_tokenizer` gives a tokenizer llama.cpp's expressions and the flag for words in the vocabulary; the function
:func:`adds_bos` returns whether llama.cpp begins a text with BOS although the file has no
``tokenizer.ggml.add_bos_token``.

The expressions of a pre-tokenizer are applied one after the other. Each expression splits each piece of the text that
the expressions before it have made into the matches of the expression and the parts between the matches.

Source: llama.cpp, src/llama-vocab.cpp. For a few names, llama.cpp's expressions are an approximation of those in the
model's tokenizer.json, and this module has the expressions of the tokenizer.json.
"""

from __future__ import annotations

import json
import warnings
from typing import Any, Optional

from .._imports import required
from .header import GgufHeader

with required("tokenizers", "the tokenizer in a GGUF file"):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

_KEY = "tokenizer.ggml.pre"
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(digits: str, letters: str = r"\p{L}", signs: str = r"[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    return rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}| ?{signs}|{_SPACES}"


def _cased(suffix: str, digits: str) -> str:
    """Returns an expression for words in which a capital letter after a small letter begins a new word."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{upper}*{lower}+{suffix}|{before}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_DIGIT, _THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
# The letters that the tokenizer of DeepSeek LLM knows as letters with a case. Letters that an editor could replace by
# equivalent letters are written as numbers.
_DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ"
    "-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-"
    "ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CHINESE = "[一-龥ࠀ-一가-퟿]+"

# Names that llama.cpp gives to pre-tokenizers, and the expressions by which these pre-tokenizers split a text, in the
# order in which the expressions are applied.
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion "
        "granite-docling exaone4",
        (_GPT2,),
    ),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (_DIGIT, _GPT2)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", (_words(_DIGIT),)),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe chatglm-bpe "
        "glm4 glm5",
        (_words(_THREE_DIGITS),),
    ),
    ("qwen35", (_words(_DIGIT, r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),)),
    ("minicpm5", (_THREE_DIGITS, _words(r"\p{N}+"))),
    ("seed-coder", (_words(_DIGIT, signs=r"[^\s\p{L}\p{N}\r\n]+"),)),
    ("tekken", (_cased("", _DIGIT),)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", (_cased(f"{_SUFFIX}?", _THREE_DIGITS),)),
    ("bloom poro-chat gpt3-finnish", (_BLOOM,)),
    ("viking", (_BLOOM, _DIGIT)),
    ("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    (
        "deepseek-llm",
        ("[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CHINESE, r"\p{N}+"),
    ),
    ("deepseek-coder", ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, _DIGIT)),
    ("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
_EXPRESSIONS = {name: expressions for names, expressions in _NAMES for name in names.split()}
# Names of pre-tokenizers with which a text begins with BOS if the file has no tokenizer.ggml.add_bos_token.
_ADD_BOS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
}  # fmt: skip
# Names of pre-tokenizers with which a word that is in the vocabulary becomes one token without merges.
_IGNORE_MERGES = {*_ADD_BOS, "minicpm5", "glm4", "glm5"}


def check_pre_tokenizer(header: GgufHeader) -> None:
    """Checks ``tokenizer.ggml.pre`` of a file with a byte-level BPE tokenizer.

    Raises GgufError for a name that this module has no expressions for. If the key is missing, warns that llama.cpp's
    default expressions are used, which may differ from those of the model's training.
    """
    if (name := _name(header)) is None:
        return
    if _KEY not in header:
        warnings.warn(
            f"{header.path}: {_KEY} is missing, so that the tokenizer splits text by llama.cpp's default expressions, "
            "which may differ from those of the model's training",
            stacklevel=2,
        )
    if name not in _EXPRESSIONS:
        raise header.error(
            f"{_KEY} is {name!r:.60}, whose way to split text into words is not known, wanted one of "
            f"{', '.join(sorted(_EXPRESSIONS))}; peft_ext.load_gguf loads the model without the tokenizer, and "
            "transformers' AutoTokenizer, or peft-ext finetune --tokenizer, loads the tokenizer from the folder of the "
            "model that was converted to GGUF"
        )


def adds_bos(header: GgufHeader) -> bool:
    """Returns whether llama.cpp begins a text with the token BOS although the file has no
    ``tokenizer.ggml.add_bos_token``."""
    says = "tokenizer.ggml.add_bos_token" in header or "tokenizer.ggml.bos_token_id" not in header
    return not says and _name(header) in _ADD_BOS


def fit_tokenizer(header: GgufHeader, tokenizer: Any) -> None:
    """Changes a tokenizer that transformers has made from a GGUF file so that it splits text as llama.cpp does, or, for
    a few values of ``tokenizer.ggml.pre``, as the model's tokenizer.json does.

    A byte-level BPE tokenizer gets the expressions of the file's ``tokenizer.ggml.pre``, and the file's control tokens
    that transformers has left out (see :func:`_add_tokens`). A tokenizer of SentencePiece (except Gemma's) puts a space
    before each text between control tokens, also before a text that begins with a space. SentencePiece's and T5's
    tokenizers put no space if the file's ``tokenizer.ggml.add_space_prefix`` is false. The header must have passed
    :func:`check_pre_tokenizer`.
    """
    if (name := _name(header)) is not None:
        _add_tokens(header, tokenizer)
    backend = tokenizer.backend_tokenizer
    if name is not None:
        words = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _EXPRESSIONS[name]]
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*words, in_bytes])
        backend.model.ignore_merges = name in _IGNORE_MERGES
    elif header.get("tokenizer.ggml.model") == "llama":
        # Gemma's tokenizer is not changed: it never puts a space before a text, and splits text in another way.
        if header.architecture == "phi3" or isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
            spaces = normalizers.Replace(" ", "▁")
            backend.normalizer, backend.pre_tokenizer = spaces, None
            if header.get("tokenizer.ggml.add_space_prefix", True):
                backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
            else:  # unlike transformers' decoder, this decoder keeps a space at the start of a text
                decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
                backend.decoder = decoders.Sequence(decoder)
    elif header.get("tokenizer.ggml.model") == "t5" and not header.get("tokenizer.ggml.add_space_prefix", True):
        # Spaces between words are merged, as in transformers' tokenizer of T5, which puts a space before each word.
        backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never")
        backend.decoder = decoders.Metaspace("▁", prepend_scheme="never")


def _add_tokens(header: GgufHeader, tokenizer: Any) -> None:
    """Adds the control tokens and the user-defined tokens that are no text in the byte alphabet, such as
    "<｜begin▁of▁sentence｜>" of DeepSeek, and removes the tokens whose number is beyond the file's vocabulary, except
    special tokens that the file lacks.

    transformers spells such a control token in the byte alphabet, so that the token's own text is not found in the
    vocabulary. A special token that is not found gets a new number beyond the vocabulary, for which the model's
    embedding has no row. GPT-2's "<|endoftext|>" gets a number beyond the vocabulary if the file lacks this token.
    """
    tokens, kinds = header.get("tokenizer.ggml.tokens"), header.get("tokenizer.ggml.token_type", ())
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    other = {
        number: (token, kind == _CONTROL) for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED) and not alphabet.issuperset(token)
    }  # fmt: skip
    added = {token for token, _ in other.values()}
    kept = set(tokenizer.all_special_tokens) - added
    beyond = {
        number for number, token in tokenizer.backend_tokenizer.get_added_tokens_decoder().items()
        if number >= len(tokens) and token.content not in kept
    }  # fmt: skip
    if not other and not beyond:
        return
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, in_bytes = about["model"]["vocab"], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for number, (token, _) in other.items():
        spelled = "".join(piece for piece, _ in in_bytes.pre_tokenize_str(token))
        if vocabulary.get(spelled) == number:
            del vocabulary[spelled]
            vocabulary[token] = number
    # A merge into an added token is never used, because the token is found in the text before the text is split.
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in about["model"]["merges"]]
    about["model"]["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()]
    about["added_tokens"] = [one for one in about["added_tokens"] if one["id"] not in beyond]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(about))
    for token, special in other.values():
        one = [AddedToken(token, normalized=False, special=special)]
        tokenizer._tokenizer.add_special_tokens(one) if special else tokenizer._tokenizer.add_tokens(one)
    tokenizer.update_post_processor()  # the post-processor adds BOS, by its number


def _name(header: GgufHeader) -> Optional[str]:
    """Returns the name of the expressions of a file with a byte-level BPE tokenizer; None for other tokenizers."""
    if header.get("tokenizer.ggml.model") != "gpt2":
        return None
    return header.text(_KEY) if _KEY in header else "default"
