"""From a run.json's document to the page: what each section of page.html shows."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from ...files import atomic_file
from ...text import format_bytes
from ..errors import RunError
from .curves import HEIGHT, WIDTH, Series, draw_chart, smoothed
from .figures import clip, count, duration, items, mapping, number, percent, short

_FOLDER = Path(__file__).parent
_ROWS = 21  # of the table of figures
_KINDS = (
    ("frozen", "frozen weights and their scales"),
    ("adapter", "adapter"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer's states"),
)
_MACHINE = {
    "cpu": "CPU", "threads": "threads", "isa": "CPU path of the kernels", "dtype": "computes in",
    "device": "trained on", "system": "system",
}  # fmt: skip

Document = Mapping[str, Any]


def redraw(folder: Union[str, Path]) -> Path:
    """Draws ``report.html`` in ``folder`` again, from the run.json there; returns its path.

    Raises: RunError where there is no run.json, where it is not one that a run wrote, or where the folder can't be
    written to.
    """
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
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise RunError(f"{path}: not as a run writes it ({error})") from None


def write_report(folder: Path, document: Document) -> Path:
    """Writes ``report.html`` into ``folder``, whole or not at all; returns its path."""
    path, page = folder / "report.html", render(document)
    with atomic_file(path) as file:
        file.write(page)
    return path


def render(document: Document) -> str:
    """Returns the page of a run.json's ``document``; what a run that stopped early has not is said to be missing."""
    options = mapping(document, "options")
    template, style, script, digest = _files()
    page = template.render(
        title=f"{options.get('model', 'a model')}, {options.get('method', 'an adapter')}",
        style=style, script=script, digest=digest, options=options, width=WIDTH, height=HEIGHT,
        **_header(document),
        tiles=_tiles(document), charts=_charts(document), samples=_samples(document), memory=_memory(document),
        check=_check(document), fused=_fused(document), files=_files_on_disk(document), phases=_phases(document),
        configuration=_configuration(document),
        machine=[(_MACHINE.get(name, name), value) for name, value in mapping(document, "machine").items()],
        versions=list(mapping(document, "versions").items()), figures=_figures(document),
        new_tokens=document.get("new_tokens"), parameters=number(document.get("parameters")),
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode("utf-8")  # a byte tokenizer may answer with half a character


@functools.lru_cache(maxsize=1)
def _files() -> tuple[Any, Any, Any, str]:
    """Returns the template, the style sheet, the script, and the script's digest, which lets a browser run it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else clip(value),
    )  # fmt: skip
    environment.filters |= {"count": count, "whole": escape}  # what is escaped here is not cut
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html"), Markup(style), Markup(script), digest


# --- the history ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _History:
    """By step: columns as long as ``step``, None where a value is missing or not finite."""

    step: list[int]
    loss: list[Optional[float]]
    lr: list[Optional[float]]
    speed: list[Optional[float]]
    held_out: list[tuple[int, Optional[float]]]


def _history(document: Document) -> _History:
    history, losses = mapping(document, "history"), items(document, "losses")
    step = [int(s) for s in items(history, "step")] or list(range(1, len(losses) + 1))
    if len(step) != len(losses):
        raise ValueError(f"{len(losses)} losses of {len(step)} steps")

    def column(name: str) -> list[Optional[float]]:
        values = [number(v) for v in items(history, name)]
        return values if len(values) == len(step) else [None] * len(step)

    seconds, tokens = column("step_s"), column("tokens")
    speed = [t / s if s and t else None for s, t in zip(seconds, tokens, strict=True)]
    held_out = [(x, y) for x, y in zip(step, column("held_out_loss"), strict=True) if y is not None]
    curve = mapping(document, "held_out")
    for end, name in ((0, "first"), (len(held_out) + 1, "last")):
        if len(point := items(curve, name)) == 2:
            held_out.insert(end, (int(point[0]), number(point[1])))
    return _History(step, [number(v) for v in losses], column("learning_rate"), speed, held_out)


# --- sections ---------------------------------------------------------------------------------------------------------


def _header(document: Document) -> dict[str, Any]:
    options, check = mapping(document, "options"), mapping(document, "check")
    done, wanted = count(document.get("steps", 0)), count(document.get("steps_wanted", document.get("steps")))
    if not document.get("finished"):
        state, look = f"unfinished: {done} of {wanted} steps", "warn"
    elif check.get("ok") is False:
        state, look = "finished, and stock PEFT re-reads it with another result", "bad"
    else:
        state, look = f"finished: {done} step{'' if done == '1' else 's'}", "good"
    about = [f"data: {options.get('data', '–')}"]
    if "started" in document:
        about.append(f"started {str(document['started']).replace('T', ' ').replace('+00:00', ' UTC')}")
    if resumed := items(document, "resumed"):
        about.append(f"resumed after step {', '.join(count(s) for s in resumed)}")
    return {"state": state, "look": look, "about": about}


def _mib(value: Any) -> str:
    """Returns a number of MiB with its unit."""
    found = number(value)
    return format_bytes(None if found is None else found * 2**20)


def _tiles(document: Document) -> list[tuple[str, str, str]]:
    """Returns name, figure and note of each."""
    perplexity = mapping(document, "perplexity")
    before, after = number(perplexity.get("before")), number(perplexity.get("after"))
    change = "not evaluated after training"
    if before and after:
        change = f"{100 * (after / before - 1):+.1f}%".replace("-", "−")
    trained, total = number(document.get("trainable_parameters")), number(document.get("parameters"))
    seconds = [s for s in map(number, mapping(document, "seconds").values()) if s is not None]
    median, size = number(document.get("median_step_s")), number(document.get("adapter_bytes"))
    gpu = number(document.get("peak_cuda_mib"))
    examples = count(mapping(document, "examples").get("held_out"))
    return [
        ("Held-out perplexity", f"{short(before)} → {short(after)}", f"{change}; {examples} examples"),
        ("Trainable parameters", count(trained),
         f"{percent(trained / total)} of the base's {count(total)}" if trained and total else ""),
        ("Training speed", f"{count(document.get('tokens_per_s'))} tokens/s",
         f"median step {short(median, 3)} s" if median is not None else "not measured"),
        ("Peak memory", _mib(document.get("peak_mib") if gpu is None else gpu),
         "of the process" if gpu is None else "of PyTorch's tensors on the GPU"),
        ("Adapter on disk", format_bytes(size, binary=False), "adapter_model.safetensors" if size else "not saved"),
        ("Time", duration(sum(seconds)), "all phases"),
    ]  # fmt: skip


def _charts(document: Document) -> list[dict[str, Any]]:
    h = _history(document)
    steps = int(number(document.get("steps_wanted")) or (h.step[-1] if h.step else 1))
    over = max(5, len(h.step) // 20)
    held = mapping(document, "held_out")
    of, all_of = number(held.get("examples")), number(mapping(document, "examples").get("held_out"))
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


def _samples(document: Document) -> list[dict[str, Any]]:
    samples = items(document, "samples") or [s for s in [mapping(document, "answers")] if s]
    made = []
    for turn, sample in enumerate(samples):
        answers = [("base", sample.get("before")), ("base and adapter", sample.get("after"))]
        if "expected" in sample:
            answers.append(("in the data", sample["expected"]))
        whose = "the prompt of the run" if turn == 0 else "held out"
        made.append({"whose": whose, "prompt": sample.get("prompt", ""), "answers": answers})
    return made


def _memory(document: Document) -> Optional[dict[str, Any]]:
    measured = mapping(document, "memory")
    gpu, process = number(document.get("peak_cuda_mib")), number(document.get("peak_mib"))
    peak = process if gpu is None else gpu
    kinds = [(name, label, size) for name, label in _KINDS if (size := number(measured.get(name))) is not None]
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
    if gpu is None:
        how = "The peak is the most that the process ever had in memory until training ended."
    else:
        how = f"The peak is the most that PyTorch's tensors had on the GPU; the process had {_mib(process)}."
    return {"bars": bars, "peak": _mib(peak), "how": how, "rows": [
        (name, label, format_bytes(size), percent(size / total)) for name, label, size in kinds]}  # fmt: skip


def _check(document: Document) -> Optional[dict[str, Any]]:
    check = mapping(document, "check")
    if not check:
        return None
    rows = [("the adapter as stock PEFT re-reads it, and the trained model on its stock path",
             short(check.get("max_difference")), f"at most {short(check.get('bound'))}")]  # fmt: skip
    if check.get("accelerated_difference") is not None:
        dtype = str(mapping(document, "machine").get("dtype", "bfloat16")).partition(":")[0]
        rows.append(("the trained model, fused, and on its stock path", short(check["accelerated_difference"]),
                     f"no bound: {dtype} rounds in both"))  # fmt: skip
    return {"ok": check.get("ok") is True, "rows": rows}


def _fused(document: Document) -> dict[str, Any]:
    fused = mapping(document, "fused")
    groups = [{name: group.get(name) for name in ("layers", "kind", "first", "fused", "reason")}
              for group in items(fused, "groups")]  # fmt: skip
    return {"known": bool(fused), "layers": fused.get("layers"), "fused": fused.get("fused"), "groups": groups,
            "reasons": items(fused, "reasons")}  # fmt: skip


def _files_on_disk(document: Document) -> list[tuple[str, str, str]]:
    size, parameters = number(document.get("adapter_bytes")), number(document.get("parameters"))
    dense = 2 * parameters if parameters else None
    return [
        (name, format_bytes(value, binary=False) if value else "not saved",
         percent(value / dense) if value and dense else "–")
        for name, value in (("adapter_model.safetensors", size), ("the base model, dense, in bfloat16", dense))
    ]  # fmt: skip


def _phases(document: Document) -> list[tuple[str, str, str]]:
    seconds = {name: s for name, v in mapping(document, "seconds").items() if (s := number(v)) is not None}
    total = sum(seconds.values()) or 1.0
    return [(name, f"{100 * spent / total:.1f}", f"{spent:,.1f} s") for name, spent in seconds.items()]


def _configuration(document: Document) -> dict[str, Any]:
    options, changed = mapping(document, "options"), set(map(str, items(document, "changed")))
    rows = []
    for name, value in options.items():
        shown = "–" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
        if name == "lr" and value is None and "learning_rate" in document:
            shown = f"{short(document['learning_rate'])}, the method's"
        if name == "max_steps" and value is None and options.get("epochs") is None and "steps_wanted" in document:
            shown = f"{count(document['steps_wanted'])}, the default"
        rows.append((name.replace("_", "-"), shown, name in changed))
    half = (len(rows) + 1) // 2
    note = f"{len(changed)} of {len(rows)} options are not the defaults." if "changed" in document else ""
    return {"note": note, "tables": [(caption, part) for caption, part in (
        ("Options", rows[:half]), ("Options, continued", rows[half:])) if part]}  # fmt: skip


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
