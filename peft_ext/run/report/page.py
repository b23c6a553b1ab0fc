"""Draws report.html from the content of a run.json. The template page.html reads most entries of run.json directly."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

from ...files import atomic_file
from ...text import format_bytes
from ..errors import RunError
from .curves import HEIGHT, WIDTH, Series, draw_chart, smoothed
from .figures import clip, count, duration, number, percent, short

_FOLDER = Path(__file__).parent
_ROWS = 21  # most rows of the table of figures, without the rows added for held-out losses
_KINDS = {"frozen": "frozen weights and their scales", "adapter": "adapter", "gradients": "gradients",
          "optimizer": "optimizer's states"}  # fmt: skip
# Entries that the run.json of a stopped run may lack. An absent entry is drawn as an empty mapping or list.
_MAPPINGS = ("perplexity", "examples", "held_out", "history", "seconds", "memory", "check", "fused", "machine",
             "versions", "runner")  # fmt: skip
_LISTS = ("losses", "resumed", "samples")

Document = Mapping[str, Any]


def redraw(folder: Union[str, Path]) -> Path:
    """Draws ``report.html`` in ``folder`` from the folder's run.json, and returns the path of the report.

    Raises RunError where the folder has no run.json, where the content of run.json is not as a run writes it, or where
    the report can't be written.
    """
    from jinja2 import TemplateError

    path = Path(folder).expanduser() / "run.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}, wanted the run.json of a run") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("options"), dict):
        raise RunError(f"{path}: no options in it, wanted the run.json of a run")
    try:
        return write_report(path.parent, document)
    except OSError as error:
        raise RunError(f"{path.parent / 'report.html'}: {error.strerror}") from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, TemplateError) as error:
        raise RunError(f"{path}: not as a run writes it ({error})") from None


def write_report(folder: Path, document: Document) -> Path:
    """Writes ``report.html`` into ``folder`` atomically and returns the path of the report."""
    path, page = folder / "report.html", render(document)
    with atomic_file(path) as file:
        file.write(page)
    return path


def render(document: Document) -> str:
    """Returns the HTML page of ``document``, the content of a run.json, which may lack entries that a finished run
    has."""
    run = {name: {} for name in _MAPPINGS} | {name: [] for name in _LISTS} | {"steps": 0} | dict(document)
    template, style, script, digest = _files()
    page = template.render(
        run=run, style=style, script=script, digest=digest, width=WIDTH, height=HEIGHT, charts=_charts(run),
        memory=_memory(run), figures=_figures(run),
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode("utf-8")  # an answer of a byte tokenizer may contain a lone surrogate


@functools.lru_cache(maxsize=1)
def _files() -> tuple[Any, Any, Any, str]:
    """Returns the template, the style sheet, the script, and the script's digest for the Content-Security-Policy."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else clip(value),
    )  # fmt: skip
    environment.filters |= {
        "whole": escape, "count": count, "short": short, "percent": percent, "number": number, "duration": duration,
        "mib": lambda value: format_bytes(None if number(value) is None else value * 2**20),
        "disk": lambda value: format_bytes(number(value), binary=False),
    }  # fmt: skip
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html"), Markup(style), Markup(script), digest


# --- the history ------------------------------------------------------------------------------------------------------


def _history(document: Document) -> SimpleNamespace:
    """Returns a namespace with the lists of the training curves, each as long as ``step``, and the points of the
    held-out curve.

    A list of a training curve has None where a value is missing or not finite.
    """
    history, losses = document["history"], document["losses"]
    step = [int(s) for s in history.get("step", [])] or list(range(1, len(losses) + 1))
    if len(step) != len(losses):
        raise ValueError(f"{len(losses)} losses of {len(step)} steps")

    def column(name: str) -> list[Optional[float]]:
        return [number(v) for v in history.get(name) or [None] * len(step)]

    speed = [t / s if s and t else None for s, t in zip(column("step_s"), column("tokens"), strict=True)]
    held_out = [(x, y) for x, y in zip(step, column("held_out_loss"), strict=True) if y is not None]
    ends = [[(int(x), number(y)) for x, y in [document["held_out"][end]]] if end in document["held_out"] else []
            for end in ("first", "last")]  # fmt: skip
    return SimpleNamespace(step=step, loss=[number(v) for v in losses], lr=column("learning_rate"), speed=speed,
                           held_out=ends[0] + held_out + ends[1])  # fmt: skip


# --- sections ---------------------------------------------------------------------------------------------------------


def _charts(document: Document) -> list[dict[str, Any]]:
    h = _history(document)
    steps = int(number(document.get("steps_wanted")) or (h.step[-1] if h.step else 1))
    over = max(5, len(h.step) // 20)
    of, all_of = number(document["held_out"].get("examples")), number(document["examples"].get("held_out"))
    which = f"{count(of)} of {count(all_of)} held-out examples" if of and of != all_of else "all held-out examples"
    held_out = Series("held out", "s2", [p[0] for p in h.held_out], [p[1] for p in h.held_out], dots=True)
    loss = [
        Series("training, each step", "raw", h.step, h.loss),
        Series(f"smoothed over {over} steps", "s1", h.step, smoothed(h.loss, over), band=False),
        held_out,
    ]
    nats = "mean cross-entropy, nats per token"
    return [
        draw_chart("loss", "Loss", nats, loss, zero=False, steps=steps),
        draw_chart("held-out", "Held-out loss", f"{nats}; {which}, the same at each point; step 0 is the base model",
                   [held_out], zero=False, steps=steps),
        draw_chart("lr", "Learning rate", "of the step", [Series("learning rate", "s3", h.step, h.lr)], zero=True,
                   steps=steps),
        draw_chart("speed", "Speed", "tokens per second within the step: no evaluation, no saving",
                   [Series("tokens/s", "s4", h.step, h.speed)], zero=True, steps=steps),
    ]  # fmt: skip


def _memory(document: Document) -> Optional[dict[str, Any]]:
    """Returns a dict with the parts of the memory bar, the peak in MiB and the rows of the memory table.

    ``_memory`` returns None where no tensors were measured.
    """
    gpu, process = number(document.get("peak_cuda_mib")), number(document.get("peak_mib"))
    peak = process if gpu is None else gpu
    kinds = [(name, label, size) for name, label in _KINDS.items()
             if (size := number(document["memory"].get(name))) is not None]  # fmt: skip
    if not kinds:
        return None
    held = sum(size for *_, size in kinds)
    if peak is not None and peak * 2**20 > held:
        rest = "activations, logits, what operators need" + "; Python and its libraries, loading" * (gpu is None)
        kinds.append(("rest", f"the rest at the peak: {rest}", peak * 2**20 - held))
    total, bars, start = sum(size for *_, size in kinds) or 1.0, [], 0.0
    for name, _, size in kinds:
        width = WIDTH * size / total
        bars.append((name, f"{start:.1f}", f"{max(width - 2, 1):.1f}"))
        start += width
    rows = [(name, label, format_bytes(size), percent(size / total)) for name, label, size in kinds]
    return {"bars": bars, "peak": peak, "rows": rows}


def _figures(document: Document) -> Optional[dict[str, Any]]:
    h = _history(document)
    if not h.step:
        return None
    held = dict(h.held_out)
    most = min(len(h.step), _ROWS)
    picked = {round(i * (len(h.step) - 1) / max(most - 1, 1)) for i in range(most)}
    picked |= {i for i, step in enumerate(h.step) if step in held}
    rows = [(count(h.step[i]), short(h.loss[i]), short(held.get(h.step[i])), short(h.lr[i]), count(h.speed[i]))
            for i in sorted(picked)]  # fmt: skip
    if 0 in held:
        rows.insert(0, ("0", "–", short(held[0]), "–", "–"))
    return {"caption": f"{len(picked)} of {len(h.step):,} steps; all are in run.json", "rows": rows}
