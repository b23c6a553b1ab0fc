"""Training data: functions that read, check, split and tokenize records.

The columns of a record tell its kind:

* A column ``text`` holds documents. Documents are joined, with an end token after each document, and cut into blocks.
  All tokens of a block except the first have a loss.
* The columns ``prompt`` and ``completion`` (or ``instruction``, ``input`` and ``output``; or ``question`` and
  ``answer``) hold prompts and completions. Only the tokens of the completion, with its end token, have a loss.
* A column ``messages`` holds conversations. Only the tokens of the assistant's turns have a loss.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import random
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from ..sources.json_file import parse, raised_as
from .errors import RunError, read_text

PYTHON_DOCS = "python-docs"
NEW_TOKENS = 48  # most tokens of an answer to a sample prompt
IGNORED = -100  # label of a token without a loss, as in PyTorch and transformers

_SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
_PAIRS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
_PASSAGE = 4000  # about the most characters of a record that is joined from several paragraphs of a .txt file

Row = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True)
class Corpus:
    """Records of one kind, split into ``train`` and ``held_out``.

    Attributes:
        kind: "text", where records are strings, or "chat", where records are lists of messages.
        where: the name of the data that the user gave, such as a path.
        empty: number of records that were left out, because their text or completion is empty or white space.
    """

    kind: str
    train: list[Any]
    held_out: list[Any]
    where: str
    empty: int = 0

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the training records and the held-out records."""
        return hashlib.sha256(json.dumps([self.train, self.held_out]).encode()).hexdigest()

    def sample_prompt(self) -> str:
        """Returns a prompt from the first held-out record: the beginning of a text, or the last message of the user
        before the first answer of a conversation (the first message, if the user has none before the answer)."""
        record = self.held_out[0]
        if self.kind == "text":
            return record[:200].rstrip()
        turn = next(i for i, message in enumerate(record) if message["role"] == "assistant")
        asked = [message for message in record[:turn] if message["role"] == "user"] or record[:1]
        return asked[-1]["content"]


@dataclass(frozen=True)
class Examples:
    """Tokenized records: ``train`` and ``held_out`` are lists of ``{"input_ids", "labels"}``.

    Attributes:
        truncated: number of conversations that were cut at the block size.
        left_out: number of conversations that were left out, because no token within the
            block size has a loss.
        rest: number of tokens of texts that were left out, because they do not fill a block.
    """

    train: list[Row]
    held_out: list[Row]
    truncated: int = 0
    left_out: int = 0
    rest: int = 0

    @functools.cached_property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all tokens and labels."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            for values in (example["input_ids"], example["labels"]):
                digest.update(array("q", [len(values), *values]).tobytes())
        return digest.hexdigest()[:16]


def read_corpus(
    spec: str,
    *,
    text_column: Optional[str] = None,
    prompt_column: Optional[str] = None,
    completion_column: Optional[str] = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
) -> Corpus:
    """Reads the records of ``spec`` and splits the records at random into training data and held-out data.

    Args:
        spec: "python-docs", a .jsonl, .json, .csv or .txt file, a folder of such files, or the name of a hub dataset.
        text_column, prompt_column, completion_column: names of the columns of texts, prompts and completions. Where all
            three are None, the columns are detected.
        eval_fraction: share to hold out, of the characters of all texts or of the number of conversations. At least one
            record is held out.
        seed: seed of the random split.

    Raises:
        RunError: the path does not exist, a file or a hub dataset can't be read or parsed, a column is missing (the
            message names the columns of the data), a value has a wrong type, or there are fewer than two records.
    """
    if spec == PYTHON_DOCS:
        return _python_docs(eval_fraction, seed)
    rows = list(_read(spec))
    if not rows:
        raise RunError(f"--data {spec}: no records in it")
    kind, records = read_records(spec, rows, text_column, prompt_column, completion_column)
    if len(records) < 2:
        raise RunError(f"--data {spec}: {len(records)} usable record(s), wanted at least 2 (one is held out)")
    train, held_out = _split(records, eval_fraction, seed, by_length=kind == "text")
    return Corpus(kind, train, held_out, spec, len(rows) - len(records))


# --- reading ----------------------------------------------------------------------------------------------------------


def _python_docs(eval_fraction: float, seed: int) -> Corpus:
    """Returns the language reference that comes with Python, with a record for each topic.

    A paragraph that a held-out topic contains is removed from the training topics, and a training topic without other
    paragraphs is left out.
    """
    from pydoc_data.topics import topics

    train, held_out = _split([topics[name] for name in sorted(topics)], eval_fraction, seed, by_length=True)
    # Some topics contain the text of other topics: "compound" contains "if", "for" and "with".
    kept_out = {paragraph.strip() for text in held_out for paragraph in text.split("\n\n")}
    train = ["\n\n".join(p for p in text.split("\n\n") if p.strip() not in kept_out) for text in train]
    return Corpus("text", [text for text in train if text.strip()], held_out, PYTHON_DOCS)


def _read(spec: str) -> Iterator[Row]:
    try:
        path = Path(spec).expanduser()
        path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # the name is too long, or begins with "~" and the name of an unknown user
        raise RunError(f"--data {spec[:60]}: {getattr(error, 'strerror', None) or error}") from None
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.is_file())
        if not files:
            raise RunError(f"--data {spec}: no {', '.join(_SUFFIXES)} file in this folder")
        for file in files:
            yield from _read_file(file)
    elif path.exists():
        yield from _read_file(path)
    elif path.suffix in _SUFFIXES or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise RunError(f"--data {spec}: no such file or folder")
    else:
        yield from _read_hub(spec)


def _read_hub(spec: str) -> Iterable[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise RunError(f"--data {spec}: no such file or folder; a hub dataset needs: pip install datasets") from None
    # The hub and the code that reads a dataset may raise any exception.
    about = f"--data {spec}: no such file or folder, and not a dataset the hub gives ("
    with raised_as(RunError, about, Exception, after=")"):
        return load_dataset(spec, split="train")


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in _SUFFIXES:
        raise RunError(f"--data {path}: a {path.suffix or 'nameless'} file, wanted {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise RunError(f"--data {path}: a pipe or a device, wanted a file")
    text = read_text("--data ", path)
    if not text.strip():
        raise RunError(f"--data {path}: the file is empty")
    with raised_as(RunError, "", ValueError):
        yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt}[path.suffix](path, text)


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    # Splits only at "\n": str.splitlines() also splits at characters such as U+2028, which a JSON string may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield _row(where, parse(where, line, has_lines=False))


def _json(path: Path, text: str) -> Iterator[Row]:
    values = parse(str(path), text)
    if not isinstance(values, list):
        raise RunError(f"--data {path}: a JSON {type(values).__name__}, wanted a list of objects (or a .jsonl file)")
    return (_row(f"{path}, item {number}", value) for number, value in enumerate(values, 1))


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise RunError(f"{where}: a JSON {type(value).__name__}, wanted an object with named columns")
    return value


def _csv(path: Path, text: str) -> Iterator[Row]:
    # StringIO splits the text only at line ends; str.splitlines() would also split at characters such as U+2028.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    longest = csv.field_size_limit(len(text) + 1)
    try:
        names = reader.fieldnames or ()
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RunError(f"{path}:{reader.line_num}: the header has the column {twice!r} twice")
        for row in reader:
            if None in row or None in row.values():
                raise RunError(f"{path}:{reader.line_num}: a row that has not {len(names)} columns as the header")
            yield row
    except csv.Error as error:
        raise RunError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(longest)


def _txt(path: Path, text: str) -> Iterator[Row]:
    passage = ""
    for paragraph in text.split("\n\n"):
        if passage and len(passage) + len(paragraph) > _PASSAGE:
            yield {"text": passage}
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    if passage.strip():
        yield {"text": passage}


# --- columns ----------------------------------------------------------------------------------------------------------


def read_records(
    spec: str, rows: list[Row], text: Optional[str] = None, prompt: Optional[str] = None,
    completion: Optional[str] = None,
) -> tuple[str, list[Any]]:  # fmt: skip
    """Returns the kind ("text" or "chat") and the records of the rows, as :class:`Corpus` has them.

    Detects the columns of the data if neither ``text`` nor ``prompt`` names a column. Leaves out records whose text or
    completion is empty or white space. Raises RunError for a missing column, for names of columns that exclude each
    other, and for a value of a wrong type.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    there = ", ".join(columns)
    for option, name in (("--text-column", text), ("--prompt-column", prompt), ("--completion-column", completion)):
        if name is not None and name not in columns:
            raise RunError(f"--data {spec}: no column {name!r} ({option}); there are: {there}")
    if (prompt is None) != (completion is None):
        raise RunError("--prompt-column and --completion-column go together")
    if text is not None and prompt is not None:
        raise RunError("--text-column excludes --prompt-column and --completion-column")
    if text is None and prompt is None:
        pair = next((names for names in _PAIRS if set(names) <= set(columns)), None)
        if pair is not None:
            prompt, completion = pair
        elif "messages" in columns:
            return "chat", [_messages(spec, number, row) for number, row in enumerate(rows, 1)]
        elif "text" in columns:
            text = "text"
        else:
            pairs = " or ".join("+".join(names) for names in _PAIRS)
            raise RunError(f"--data {spec}: no column text, {pairs} or messages; there are: {there} "
                           "(name yours: --text-column, or --prompt-column and --completion-column)")  # fmt: skip
    if text is not None:
        texts = [_string(spec, number, row, text) for number, row in enumerate(rows, 1)]
        return "text", [t for t in texts if t.strip()]
    records = []
    for number, row in enumerate(rows, 1):
        question = _string(spec, number, row, prompt)
        if prompt == "instruction" and row.get("input"):
            question = f"{question}\n\n{_string(spec, number, row, 'input')}"
        answer = _string(spec, number, row, completion)
        records.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return "chat", [r for r in records if r[1]["content"].strip()]


def _string(spec: str, number: int, row: Row, column: Optional[str]) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        came = "nothing" if value is None else type(value).__name__
        raise RunError(f"--data {spec}: record {number} has {came} in column {column!r}, wanted text")
    return _text(spec, number, value)


def _text(spec: str, number: int, value: str) -> str:
    """Returns ``value``. Raises RunError where ``value`` has a lone surrogate, which JSON allows and UTF-8 forbids."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RunError(
            f"--data {spec}: record {number} has a lone surrogate, {value[error.start]!a}, wanted Unicode text"
        ) from None
    return value


def _messages(spec: str, number: int, row: Row) -> list[Message]:
    value = row.get("messages")
    good = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not good or not any(m["role"] == "assistant" for m in value):
        raise RunError(
            f"--data {spec}: record {number}: wanted messages of {{role, content}}, one of them the assistant's"
        )
    if row.get("tools"):
        raise RunError(f"--data {spec}: record {number} has tools, which are not rendered; wanted no column tools, and "
                       "the definitions of tools in the first message")  # fmt: skip
    for message in value:
        _text(spec, number, message["role"] + message["content"])
    return value


# --- order, split and tokens ------------------------------------------------------------------------------------------


class Order:
    """The order in which a run takes its examples: all examples shuffled, then all shuffled again, and so on.

    Args:
        examples: number of examples.
        count: number of examples that the run takes.
        seed: seed of the shuffles.
    """

    def __init__(self, examples: int, count: int, seed: int) -> None:
        self.examples, self.count, self.seed = examples, count, seed

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator, order = random.Random(self.seed), list(range(self.examples))
        for start in range(0, self.count, self.examples):
            generator.shuffle(order)
            yield from order[: self.count - start]


def _split(records: list[Any], fraction: float, seed: int, *, by_length: bool) -> tuple[list[Any], list[Any]]:
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    size = [len(r) if by_length else 1 for r in records]
    wanted, held, total = fraction * sum(size), set(), 0
    for index in order[:-1]:  # at least one record, the last in the shuffled order, stays for training
        if held and total + size[index] / 2 > wanted:
            continue
        held.add(index)
        total += size[index]
    return [r for i, r in enumerate(records) if i not in held], [r for i, r in enumerate(records) if i in held]


def tokenize(corpus: Corpus, tokenizer: Any, block_size: int) -> Examples:
    """Returns token ids and labels of the records, at most ``block_size`` tokens an example.

    Raises RunError where no example is left of the records to train on, or of a list of held-out records that is not
    empty; where the training texts together, or the held-out texts together, have fewer than two tokens; where the
    tokenizer has no chat template and a conversation is not one message and the assistant's answer; where the chat
    template can't render a conversation or rewrites earlier turns; or for the reasons of :func:`_labelled`.
    """
    if corpus.kind == "text":
        (train, rest), (held_out, more) = (_blocks(corpus.where, texts, tokenizer, block_size) if texts else ([], 0)
                                           for texts in (corpus.train, corpus.held_out))  # fmt: skip
        return Examples(train, held_out, rest=rest + more)
    render = _renderer(corpus, tokenizer, block_size)
    cut = left_out = 0
    sides = []
    for records in (corpus.train, corpus.held_out):
        examples = []
        for record in records:
            ids, labels = render(record)
            long = len(ids) > block_size
            ids, labels = ids[:block_size], labels[:block_size]
            if any(label != IGNORED for label in labels[1:]):
                examples.append({"input_ids": ids, "labels": labels})
                cut += long
            else:
                left_out += 1
        if records and not examples:
            raise RunError(
                f"--data {corpus.where}: no completion begins within {block_size} tokens; take a larger --block-size"
            )
        sides.append(examples)
    return Examples(sides[0], sides[1], cut, left_out)


def prompt_ids(tokenizer: Any, messages: list[Message], kind: str) -> list[int]:
    """Returns the tokens of a prompt, rendered by the chat template if the tokenizer has one.

    For ``kind`` "chat", the tokens equal those that :func:`tokenize` puts before the answer.
    """
    if getattr(tokenizer, "chat_template", None):
        return _ids(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return _bos(tokenizer) + _ids(tokenizer, messages[-1]["content"] + ("\n" if kind == "chat" else ""))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _bos(tokenizer: Any) -> list[int]:
    """Returns a list with the BOS token where the tokenizer puts BOS before a text by itself; else an empty list.

    ``_bos`` is not used for rendered chat templates, because a template itself writes the BOS that its model needs.
    """
    first = list(tokenizer("", verbose=False)["input_ids"][:1])
    return first if first == [tokenizer.bos_token_id] else []


def _blocks(where: str, texts: list[str], tokenizer: Any, block_size: int) -> tuple[list[Row], int]:
    """Returns the blocks of the joined texts, and the number of tokens at the end that were left out."""
    stream: list[int] = []
    bos = _bos(tokenizer)
    for text in texts:
        stream += bos + _ids(tokenizer, text)
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    if len(stream) < 2:
        raise RunError(f"--data {where}: the texts to train on, or those to hold out, have {len(stream)} token(s), "
                       "wanted at least 2")  # fmt: skip
    # A last block shorter than block_size is left out, unless it is the only block, so that blocks are equally long.
    last = len(stream) - len(stream) % block_size
    starts = range(0, last, block_size) if last else range(1)
    blocks = [stream[start : start + block_size] for start in starts]
    return [{"input_ids": block, "labels": list(block)} for block in blocks], len(stream) - sum(map(len, blocks))


def _renderer(
    corpus: Corpus, tokenizer: Any, block_size: int
) -> Callable[[list[Message]], tuple[list[int], list[int]]]:
    bos = _bos(tokenizer)

    def plain(messages: list[Message]) -> tuple[list[int], list[int]]:
        prompt = messages[0]["content"] + "\n"
        text = prompt + messages[1]["content"]
        ids, labels = _labelled(corpus.where, tokenizer, text, [(len(prompt), len(text))], block_size)
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        return bos + ids, [IGNORED] * len(bos) + labels

    def chat(messages: list[Message]) -> tuple[list[int], list[int]]:
        # For each turn of the assistant, the chat template renders the messages before the turn, and these messages
        # together with the turn. The characters that the assistant's turn adds to the text are an answer.
        answers: list[tuple[int, int]] = []
        done = ""
        for count, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if count == 0:
                raise RunError(f"--data {corpus.where}: a conversation begins with the assistant's turn, "
                               f"{message['content'][:40]!r}, wanted another's before it")  # fmt: skip
            # A chat template is a program and may raise any exception.
            roles = ", ".join(turn["role"] for turn in messages)
            about = f"--data {corpus.where}: the tokenizer's chat template does not take a conversation of {roles} ("
            with raised_as(RunError, about, Exception, after=")"):
                before = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=True)
                after = tokenizer.apply_chat_template(messages[: count + 1], tokenize=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise RunError(f"--data {corpus.where}: the tokenizer's chat template rewrites earlier turns; "
                               "give prompt and completion columns instead of messages")  # fmt: skip
            answers.append((len(before), len(after)))
            done = after
        return _labelled(corpus.where, tokenizer, done, answers, block_size)

    if getattr(tokenizer, "chat_template", None):
        return chat
    if any(len(record) != 2 for record in corpus.train + corpus.held_out):
        raise RunError(f"--data {corpus.where}: conversations need a chat template, which the tokenizer lacks")
    for record in corpus.train + corpus.held_out:
        if record[0]["role"] == "assistant" or record[1]["role"] != "assistant":
            roles = f"{record[0]['role']}, {record[1]['role']}"
            raise RunError(f"--data {corpus.where}: a conversation of {roles}, wanted a turn of the assistant's after "
                           "another's, as the tokenizer has no chat template")  # fmt: skip
    return plain


# --- tokens and labels of a rendered conversation ---------------------------------------------------------------------


def _labelled(
    where: str, tokenizer: Any, text: str, answers: list[tuple[int, int]], block_size: int
) -> tuple[list[int], list[int]]:
    """Returns the tokens of ``text`` and their labels: a token is its own label where the token's first character is in
    an answer; other tokens have the label IGNORED.

    Turns are not tokenized one by one, because a tokenizer such as Llama 2's puts a space before each text, and would
    put a space before each turn. For each answer, the text is tokenized from the text's beginning up to the next
    answer.

    The input of a model that generates an answer is the tokens of the text before the answer. Where the tokens of the
    text with the answer do not begin with these tokens (one token may hold the last characters of the prompt and the
    first of the answer), the text is cut at the beginning of the answer, and both parts are tokenized separately.

    Args:
        where: name of the data, for error messages.
        answers: for each answer, a pair of positions in ``text``: where the answer begins and where it ends.
        block_size: once there are more tokens than ``block_size``, no further answer is added.

    Raises RunError where the tokenizer gives no positions of its tokens and the positions are needed, and where the
    tokenizer joins the answer to each of the texts that :func:`_continuation` puts before the answer.
    """
    before = _ids(tokenizer, text[: answers[0][0]])
    ids, labels = list(before), [IGNORED] * len(before)
    for (begin, end), stop in zip(answers, [*(begin for begin, _ in answers[1:]), len(text)], strict=True):
        if tokenizer.is_fast:
            whole, starts = _encoded(tokenizer, text[:stop])
        else:
            whole, starts = _encoded_slowly(where, tokenizer, text, before, end, stop)
        added, starts = whole[len(before) :], starts[len(before) :]
        if whole[: len(before)] != before:
            added, starts = _continuation(where, tokenizer, text[begin:stop])
            starts = [begin + start for start in starts]
        ids += added
        labels += [token if start < end else IGNORED for token, start in zip(added, starts, strict=True)]
        before = whole
        if len(ids) > block_size:
            break
    return ids, labels


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of ``text``, and the position of the first character of each token."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return found["input_ids"], [start for start, _ in found["offset_mapping"]]


def _encoded_slowly(
    where: str, tokenizer: Any, text: str, before: list[int], end: int, stop: int
) -> tuple[list[int], list[int]]:
    """Returns the tokens of ``text[:stop]``, and for each token 0 if the token is before ``end``, else ``end``.

    ``before`` are the tokens of the text before the answer that ends at ``end``. Raises RunError where one token may
    hold characters before and after the beginning, or the end, of the answer.
    """
    said, whole = _ids(tokenizer, text[:end]), _ids(tokenizer, text[:stop])
    if said[: len(before)] != before or whole[: len(said)] != said:
        raise RunError(f"--data {where}: the tokenizer, a {type(tokenizer).__name__}, does not tell the positions of "
                       "its tokens, and a conversation has other tokens than its turns; wanted a fast tokenizer, with "
                       "a tokenizer.json")  # fmt: skip
    return whole, [0] * len(said) + [end] * (len(whole) - len(said))


def _continuation(where: str, tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of a text that continues another text, and the position of the first character of each token.

    If the tokenizer puts a space before each text, the function tokenizes ``text`` after a character whose tokens stay
    separate from those of ``text``, and leaves out the character's tokens.
    """
    has_no_prefix = _ids(tokenizer, "\n") + _ids(tokenizer, "a") == _ids(tokenizer, "\na")
    for first in ("", "\n", "a", "1", ".") if has_no_prefix else ("\n", "a", "1", "."):
        known = _ids(tokenizer, first)
        ids, starts = _encoded(tokenizer, first + text)
        if ids[: len(known)] == known:
            return ids[len(known) :], [start - len(first) for start in starts[len(known) :]]
    raise RunError(f"--data {where}: the tokenizer joins the answer {text[:40]!r} to any text before it")
