"""Fuzzing of code that reads bytes from outside: seeded mutations of valid files, and the allowed results of each.

    python -m tests.fuzz --minutes 60        run from the repository's root; prints and saves its findings

A target takes bytes and either returns or raises one of its refusals, which are errors that say what is wrong.
Everything else is a finding: another exception, more than ``SLOWEST`` seconds, a non-finite output, a file that is left
behind. Mutations know the formats: they flip, cut and splice bytes, the header of safetensors and its length. In JSON,
mutations swap types, use absurd numbers, add, remove and repeat keys, and nest deeply.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import signal
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn

import peft_ext

__all__ = ["SLOWEST", "TARGETS", "Finding", "Target", "mutated", "run"]

SLOWEST = 60.0

# - mutations -

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 63, 64, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "nf4", "LORA", "../../etc/passwd", "a\0b", "(", "(a+)+$", ".*", "\ud800", "é" * 300, [],
    [[]], [None], [0, 0], [-1, -1], [2**40, 2**40], {}, {"": {}}, {"x": [1]},
)  # fmt: skip
_BYTES = (b"", b"\0", b"\xff", b"{", b"}", b"[" * 3000, b'"', b"\\", b"\n", b"\r", b",", b":", b"1" * 5000, b"NaN",
          b"1e999", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"null", b"true")  # fmt: skip


def _mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    held = bytearray(data)
    at, end = sorted(draw.randrange(len(held) + 1) for _ in range(2))
    kind = draw.randrange(7)
    if kind == 0 and held:
        for _ in range(draw.choice((1, 1, 2, 8))):
            held[draw.randrange(len(held))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del held[at:]
    elif kind == 2:
        held[at:at] = draw.choice(_BYTES)
    elif kind == 3:
        held[at:at] = held[at:end]
    elif kind == 4:
        del held[at:end]
    elif kind == 5:
        held[at:end] = draw.choice(_BYTES)
    else:
        other = draw.randrange(len(held) + 1)
        held[at:end] = held[other : other + end - at]
    return bytes(held)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each container and key in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)


def _mutated_json(value: Any, draw: random.Random) -> Any:
    held = {"": copy.deepcopy(value)}
    container, key = draw.choice(list(_places(held)))
    kind = draw.randrange(6)
    old = container[key]
    if kind <= 2:
        container[key] = copy.deepcopy(draw.choice(_VALUES))
    elif kind == 3 and container is not held:
        del container[key]
    elif kind == 4 and isinstance(old, dict):
        old[draw.choice((*list(old), "x", "runtime_config", "auto_map"))] = copy.deepcopy(draw.choice(_VALUES))
    else:
        other, name = draw.choice(list(_places(held)))
        container[key] = copy.deepcopy(other[name])
    return held[""]


def _as_json(data: bytes, draw: random.Random) -> Optional[bytes]:
    try:
        value = json.loads(data)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            value = _mutated_json(value, draw)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return None


def _as_safetensors(data: bytes, draw: random.Random) -> Optional[bytes]:
    if len(data) < 8:
        return None
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = draw.randrange(4)
    if kind == 0:
        header = _as_json(header, draw) or _mutated_bytes(header, draw)
    elif kind == 1:
        header = _mutated_bytes(header, draw)
    elif kind == 2:
        rest = _mutated_bytes(rest, draw)
    told = len(header) if draw.random() < 0.9 else draw.choice((0, 7, len(header) + 1, 2**63, 2**64 - 1, 10**8))
    return struct.pack("<Q", told) + header + rest


def mutated(target: Target, draw: random.Random) -> bytes:
    """Returns one of the target's valid inputs, mutated, or now and then unchanged."""
    data = draw.choice(target.seeds())
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        shaped = None
        if draw.random() < 0.7:
            shaped = {"json": _as_json, "safetensors": _as_safetensors}.get(target.format, lambda *_: None)(data, draw)
            if shaped is None and target.format == "lines":
                shaped = _as_lines(data, draw)
        data = _mutated_bytes(data, draw) if shaped is None else shaped
    return data


def _as_lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = draw.randrange(len(lines))
    lines[at] = _as_json(lines[at], draw) or _mutated_bytes(lines[at], draw)
    return b"\n".join(lines)


# - targets -


@dataclass(frozen=True)
class Target:
    """A target: ``run(data, folder)`` takes the bytes; ``refusals`` are the errors that ``run`` may raise, each with a
    message.
    """

    name: str
    format: str  # "json", "safetensors", "lines" or "bytes"
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], None]
    refusals: tuple[type[BaseException], ...]


class Finding(AssertionError):
    """The error for a result that no input of a target may have."""


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Finding(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(target: Target, data: bytes, folder: Path) -> str:
    """Returns the result in a word or two. Raises Finding."""
    started = time.perf_counter()
    try:
        with _limit(SLOWEST), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(data, folder)
    except Finding:
        raise
    except target.refusals as error:
        lines = str(error).strip().splitlines()
        if not lines:
            raise Finding(f"{type(error).__name__} without a message") from error
        found = type(error).__name__
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:200]}") from error
    else:
        found = "taken"
    if (seconds := time.perf_counter() - started) > SLOWEST:
        raise Finding(f"{seconds:.1f} s")
    return found


def _finite(y: torch.Tensor) -> None:
    if not y.isfinite().all():
        raise Finding("the output is not finite")


# Target: an NF4 layer's state dict in a safetensors file.


def _nf4_seeds() -> list[bytes]:
    from safetensors.torch import save

    found = []
    for double_quant in (False, True):
        torch.manual_seed(0)
        layer = peft_ext.nn.NF4Linear.from_linear(nn.Linear(64, 32), 32, double_quant)
        found.append(save({name: tensor.contiguous() for name, tensor in layer.state_dict().items()}))
    return found


def _nf4(data: bytes, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    from peft_ext.weights.nf4 import QUANT_STATE, read_nf4, read_quant_state

    try:
        found = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not {"weight", "weight.absmax", QUANT_STATE} <= found.keys():
        raise ValueError("a key is missing")
    nf4 = read_nf4(found)
    shape = read_quant_state(found)[0]
    y = nf4.dequantize(torch.float64)
    _finite(y)
    if y.shape != torch.Size(shape):
        raise Finding(f"the weight has shape {tuple(y.shape)}, told was {shape}")


# Targets: the two files of an adapter, for several methods.


def _base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


_FILES: dict[str, dict[str, bytes]] = {}


def _adapter_files() -> dict[str, dict[str, bytes]]:
    """Returns the files of one small adapter of each method."""
    import tempfile

    import peft

    if not _FILES:
        made = {
            "lora": peft.LoraConfig(r=2, target_modules=["0", "2"], rank_pattern={"2": 1}),
            "dora": peft.LoraConfig(r=2, target_modules=r".*[02]", use_dora=True),
            "ia3": peft.IA3Config(target_modules=["0"], feedforward_modules=["0"]),
            "adalora": peft.AdaLoraConfig(init_r=2, target_r=1, target_modules=["0"], total_step=10),
            "bitfit": peft_ext.BitFitConfig(),
        }
        for name, config in made.items():
            with tempfile.TemporaryDirectory() as folder:
                peft.get_peft_model(_base(), config).save_pretrained(folder)
                _FILES[name] = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix != ".md"}
    return _FILES


def _load(files: dict[str, bytes], folder: Path) -> None:
    from peft_ext.sources import expressions

    for name, data in files.items():
        (folder / name).write_bytes(data)
    before, expressions._SECONDS = expressions._SECONDS, 10.0
    try:
        model = peft_ext.load_adapter(_base(), folder, torch_device="cpu")
    finally:
        expressions._SECONDS = before
    with torch.no_grad():
        y = model(torch.ones(2, 16))
        if all(parameter.abs().max() < 1e6 for parameter in model.parameters() if parameter.numel()):
            _finite(y)  # larger parameters may overflow the output


def _adapter_target(method: str, part: str, format: str, file: str) -> Target:
    """Returns a target that loads an adapter: the bytes are the file ``file``, and the other file is unchanged."""
    # The classes of errors that PEFT raises, such as RuntimeError for a wrong size and KeyError for an unknown layer.
    refusals = (ValueError, TypeError, OSError, RuntimeError, LookupError, AttributeError)
    return Target(f"{method}-{part}", format, lambda: [_adapter_files()[method][file]],
                  lambda data, folder: _load({**_adapter_files()[method], file: data}, folder), refusals)  # fmt: skip


# Targets: other files, such as a model's config.json and index, run.json, data, and the options of a run.


def _model_seeds() -> list[bytes]:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    made = (transformers.LlamaConfig(**sizes, intermediate_size=16), transformers.BertConfig(**sizes),
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))  # fmt: skip
    return [config.to_json_string(use_diff=False).encode() for config in made]


def _model_config(data: bytes, folder: Path) -> None:
    from peft_ext.cli._common import model_config

    (folder / "config.json").write_bytes(data)
    model_config(str(folder))


def _index(data: bytes, folder: Path) -> None:
    from peft_ext.sources.model import check_index

    (folder / "index.json").write_bytes(data)
    check_index(folder / "index.json")


def _run_json(data: bytes, folder: Path) -> None:
    from peft_ext.sources.adapter import training_options

    (folder / "run.json").write_bytes(data)
    options = training_options(folder)
    if options and (options["quant"] not in ("nf4", "none") or options.get("blocksize", 64) % 32):
        raise Finding(f"options {options}")


def _data(suffix: str) -> Callable[[bytes, Path], None]:
    def take(data: bytes, folder: Path) -> None:
        from peft_ext.run.data import read_corpus

        (folder / f"a{suffix}").write_bytes(data)
        corpus = read_corpus(str(folder / f"a{suffix}"))
        for record in corpus.train + corpus.held_out:
            json.dumps(record, ensure_ascii=False).encode()

    return take


def _options(data: bytes, folder: Path) -> None:
    from peft_ext.run import Options
    from peft_ext.run.config import merged, read_config

    (folder / "run.yaml").write_bytes(data)
    merged(Options(), read_config(folder / "run.yaml", Options), {})


_LINES = [b'{"text": "one two"}\n{"text": "three"}\n{"text": "four"}\n', b'{"prompt": "a", "completion": "b"}\n' * 3,
          b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 3]  # fmt: skip
_ROWS = b"text,prompt,completion\none,a,b\ntwo,c,d\n" + b'"three, ""3""",e,f\n'


def _targets() -> Iterator[Target]:
    from peft_ext.run import RunError

    yield Target("nf4-state", "safetensors", _nf4_seeds, _nf4, (ValueError, TypeError))
    for method in ("lora", "dora", "ia3", "adalora", "bitfit"):
        yield _adapter_target(method, "config", "json", "adapter_config.json")
        yield _adapter_target(method, "weights", "safetensors", "adapter_model.safetensors")
    yield Target("model-config", "json", _model_seeds, _model_config, (ValueError,))
    names = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    yield Target("index", "json", lambda: [json.dumps(names).encode()], _index, (ValueError,))
    options = {"options": {"quant": "nf4", "blocksize": 64, "model": "smollm2"}, "seconds": {"train": 1.0}}
    yield Target("run-json", "json", lambda: [json.dumps(options).encode()], _run_json, (ValueError,))
    yield Target("data-jsonl", "lines", lambda: _LINES, _data(".jsonl"), (RunError,))
    yield Target("data-json", "json", lambda: [b"[" + line.strip().replace(b"\n", b",") + b"]" for line in _LINES],
                 _data(".json"), (RunError,))  # fmt: skip
    yield Target("data-csv", "bytes", lambda: [_ROWS], _data(".csv"), (RunError,))
    yield Target("data-txt", "bytes", lambda: [b"one\n\ntwo\n\n" * 900], _data(".txt"), (RunError,))
    yaml = b"model: smollm2\nmethod: dora\nlr: 1e-4\nrank: 8\ntarget-modules: [q_proj, v_proj]\nstock: false\n"
    yield Target("options", "bytes", lambda: [yaml], _options, (RunError,))


TARGETS = {target.name: target for target in _targets()}
