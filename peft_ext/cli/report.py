"""``report.html`` of a run: what run.json says, on one page that needs nothing else, neither files nor a network.

::

    report("outputs/finetune")           # draws it again from run.json

Curves are :func:`peft_ext.chart.page_plot`'s inline SVG. A Content-Security-Policy in the page forbids every request,
and every script but the page's own, which shows the figures under the pointer; without scripts the page lacks that
alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Optional, Union

from ..chart import Series, page_plot, short
from ..files import atomic_file
from . import CliError

__all__ = ["render", "report", "write"]

_MOST_TEXT = 4000  # characters of one text
_ROWS = 21  # of the table of figures
_WIDTH = 1000  # of the bar of memory, stretched to the place it gets
_MIB, _MB = 2**20, 1e6

_KINDS = (
    ("frozen", "frozen weights and their scales"),
    ("adapter", "adapter"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer's states"),
)


def report(folder: Union[str, Path]) -> Path:
    """Draw ``report.html`` in ``folder`` again, from the run.json there; returns its path.

    Raises: CliError where there is no run.json, where it is not one that a run wrote, or where the folder can't be
    written to.
    """
    path = Path(folder).expanduser() / "run.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}, wanted the run.json of a run") from None
    except (ValueError, RecursionError) as error:
        raise CliError(f"{path}: not JSON ({error})") from None
    if not isinstance(document, dict) or not isinstance(document.get("options"), dict):
        raise CliError(f"{path}: no options in it, wanted the run.json of a run")
    try:
        return write(path.parent, document)
    except OSError as error:
        raise CliError(f"{path.parent / 'report.html'}: {error.strerror}") from None
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise CliError(f"{path}: not as a run writes it ({error})") from None


def write(folder: Path, document: Mapping[str, Any]) -> Path:
    """``report.html`` in ``folder``, whole or not at all; returns its path."""
    path, page = folder / "report.html", render(document)
    with atomic_file(path) as file:
        file.write(page)
    return path


def render(document: Mapping[str, Any]) -> str:
    """The page of a run.json's ``document``; what a run that stopped early has not is said to be missing."""
    options = _mapping(document, "options")
    title = f"{options.get('model', 'a model')}, {options.get('method', 'an adapter')}"
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    sections = (
        _summary, _curves, _samples, _memory, _checked, _layers, _size, _time, _configuration, _machine, _figures,
    )  # fmt: skip
    body = "\n".join(section(document) for section in sections)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_text(title)}: peft-ext finetune</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
{_header(document, title)}
{body}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""
    return page.encode("utf-8", "replace").decode("utf-8")  # a byte tokenizer may answer with half a character


# --- text and numbers -------------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """HTML of any value, cut where it is very long."""
    text = str(value)
    if len(text) > _MOST_TEXT:
        text = f"{text[:_MOST_TEXT]} … ({len(text) - _MOST_TEXT:,} characters more)"
    return escape(text)


def _mapping(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = document.get(name)
    return value if isinstance(value, Mapping) else {}


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    value = document.get(name)
    return value if isinstance(value, list) else []


def _number(value: Any) -> Optional[float]:
    """A finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _count(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{number:,.0f}"


def _mib(value: Optional[float]) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f} MiB" if value >= 100 else f"{value:.2f} MiB"


def _mb(value: Optional[float]) -> str:
    if value is None:
        return "–"
    return (
        f"{value / 1e9:.2f} GB"
        if value >= 1e9
        else f"{value / _MB:.1f} MB"
        if value >= _MB
        else f"{value / 1e3:.1f} KB"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _duration(value: Optional[float]) -> str:
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _section(name: str, heading: str, *content: str) -> str:
    inner = "\n".join(part for part in content if part)
    title = f'<h2 id="{name}-heading">{heading}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-heading">\n{title}\n{inner}\n</section>'


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML; the first of a row is its header. ``numbers``: the columns that are set to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        made = []
        for i, cell in enumerate(row):
            kind = ' class="n"' if i in numbers else ""
            made.append(f'<th scope="col"{kind}>{cell}</th>' if tag == "th" else
                        f'<th scope="row"{kind}>{cell}</th>' if i == 0 else f"<td{kind}>{cell}</td>")  # fmt: skip
        return f"<tr>{''.join(made)}</tr>"

    body = "\n".join(cells(row, "td") for row in rows)
    return (
        f'<div class="wide"><table><caption>{caption}</caption>\n<thead>{cells(head, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


# --- the history ------------------------------------------------------------------------------------------------------


def _smoothed(values: Sequence[Optional[float]], over: int) -> list[Optional[float]]:
    """``m_t = Σ_i b^(t−i) v_i / Σ_i b^(t−i)`` with ``b = 1 − 1/over``, over the finite values up to t."""
    decay, total, weight = 1 - 1 / over, 0.0, 0.0
    smooth: list[Optional[float]] = []
    for value in values:
        total, weight = decay * total, decay * weight
        if value is not None:
            total, weight = total + value, weight + 1
        smooth.append(total / weight if value is not None else None)
    return smooth


@dataclass(frozen=True)
class _History:
    """By step: columns as long as ``step``, None where a value is missing or not finite."""

    step: list[int]
    loss: list[Optional[float]]
    lr: list[Optional[float]]
    speed: list[Optional[float]]
    held_out: list[tuple[int, Optional[float]]]


def _history(document: Mapping[str, Any]) -> _History:
    history, losses = _mapping(document, "history"), _list(document, "losses")
    step = [int(s) for s in _list(history, "step")] or list(range(1, len(losses) + 1))
    if len(step) != len(losses):
        raise ValueError(f"{len(losses)} losses of {len(step)} steps")

    def column(name: str) -> list[Optional[float]]:
        values = [_number(v) for v in _list(history, name)]
        return values if len(values) == len(step) else [None] * len(step)

    seconds, tokens = column("step_s"), column("tokens")
    speed = [t / s if s and t else None for s, t in zip(seconds, tokens, strict=True)]
    held_out = [(x, y) for x, y in zip(step, column("held_out_loss"), strict=True) if y is not None]
    curve = _mapping(document, "held_out")
    for end, name in ((0, "first"), (len(held_out) + 1, "last")):
        if len(point := _list(curve, name)) == 2:
            held_out.insert(end, (int(point[0]), _number(point[1])))
    return _History(step, [_number(v) for v in losses], column("learning_rate"), speed, held_out)


# --- sections ---------------------------------------------------------------------------------------------------------


def _header(document: Mapping[str, Any], title: str) -> str:
    options, check = _mapping(document, "options"), _mapping(document, "check")
    done, wanted = _count(document.get("steps", 0)), _count(document.get("steps_wanted", document.get("steps")))
    if not document.get("finished"):
        state, kind = f"unfinished: {done} of {wanted} steps", "warn"
    elif check.get("ok") is False:
        state, kind = "finished, and stock PEFT re-reads it with another result", "bad"
    else:
        state, kind = f"finished: {done} step{'' if done == '1' else 's'}", "good"
    about = [f"data: {_text(options.get('data', '–'))}"]
    if "started" in document:
        about.append(f"started {_text(str(document['started']).replace('T', ' ').replace('+00:00', ' UTC'))}")
    if resumed := _list(document, "resumed"):
        about.append(f"resumed after step {', '.join(_count(s) for s in resumed)}")
    return (
        f'<header>\n<p class="by">peft-ext finetune</p>\n<h1>{_text(title)}</h1>\n'
        f'<p class="about"><span class="state {kind}">{state}</span> {" · ".join(about)}</p>\n</header>'
    )


def _summary(document: Mapping[str, Any]) -> str:
    perplexity = _mapping(document, "perplexity")
    before, after = _number(perplexity.get("before")), _number(perplexity.get("after"))
    examples = _mapping(document, "examples")
    change = (
        f"{100 * (after / before - 1):+.1f}%".replace("-", "−") if before and after else "not evaluated after training"
    )
    trained, total = _number(document.get("trainable_parameters")), _number(document.get("parameters"))
    seconds = [s for s in map(_number, _mapping(document, "seconds").values()) if s is not None]
    median = _number(document.get("median_step_s"))
    size = _number(document.get("adapter_bytes"))
    gpu = _number(document.get("peak_cuda_mib"))
    peak = _number(document.get("peak_mib")) if gpu is None else gpu
    tiles = [
        ("Held-out perplexity", f"{short(before)} → {short(after)}",
         f"{change}; {_count(examples.get('held_out'))} examples"),
        ("Trainable parameters", _count(trained),
         f"{_percent(trained / total)} of the base's {_count(total)}" if trained and total else ""),
        ("Training speed", f"{_count(document.get('tokens_per_s'))} tokens/s",
         f"median step {short(median, 3)} s" if median is not None else "not measured"),
        ("Peak memory", _mib(peak), "of the process" if gpu is None else "of PyTorch's tensors on the GPU"),
        ("Adapter on disk", _mb(size), "adapter_model.<wbr>safetensors" if size else "not saved"),
        ("Time", _duration(sum(seconds)), "all phases"),
    ]  # fmt: skip
    made = "".join(f'<div><dt>{n}</dt><dd>{value}</dd><dd class="note">{note}</dd></div>' for n, value, note in tiles)
    return f'<section id="summary" aria-label="Summary">\n<dl class="tiles">{made}</dl>\n</section>'


def _curves(document: Mapping[str, Any]) -> str:
    h = _history(document)
    steps = int(_number(document.get("steps_wanted")) or (h.step[-1] if h.step else 1))
    over = max(5, len(h.step) // 20)
    held = _mapping(document, "held_out")
    of, all_of = _number(held.get("examples")), _number(_mapping(document, "examples").get("held_out"))
    which = f"{_count(of)} of {_count(all_of)} held-out examples" if of and of != all_of else "all held-out examples"
    x, y = [p[0] for p in h.held_out], [p[1] for p in h.held_out]
    loss = [
        Series("training, each step", "raw", h.step, h.loss),
        Series(f"smoothed over {over} steps", "s1", h.step, _smoothed(h.loss, over), band=False),
        Series("held out", "s2", x, y, dots=True),
    ]
    nats = "mean cross-entropy, nats per token"
    return _section(
        "curves", "Curves",
        page_plot("loss", "Loss", nats, loss, zero=False, steps=steps),
        '<div class="grid">',
        page_plot("held-out", "Held-out loss", f"{nats}; {which}, the same at each point; step 0 is the base model",
                  [Series("held out", "s2", x, y, dots=True)], zero=False, steps=steps),
        page_plot("lr", "Learning rate", "of the step", [Series("learning rate", "s3", h.step, h.lr)],
                  zero=True, steps=steps),
        page_plot("speed", "Speed", "tokens per second within the step: no evaluation, no saving",
                  [Series("tokens/s", "s4", h.step, h.speed)], zero=True, steps=steps),
        "</div>",
    )  # fmt: skip


def _samples(document: Mapping[str, Any]) -> str:
    samples = _list(document, "samples") or [s for s in [_mapping(document, "answers")] if s]
    made = []
    for number, sample in enumerate(samples):
        whose = "the prompt of the run" if number == 0 else "held out"
        answers = [("base", sample.get("before")), ("base and adapter", sample.get("after"))]
        if "expected" in sample:
            answers.append(("in the data", sample["expected"]))
        columns = "".join(
            f"<div><h4>{name}</h4>"
            + ('<p class="note">not asked: the run did not get there</p>' if answer is None else
               f'<p class="said" dir="auto">{_text(answer) or "(nothing)"}</p>') + "</div>"
            for name, answer in answers
        )  # fmt: skip
        made.append(
            f'<article><h3><span class="note">{whose}</span></h3><p class="said prompt" dir="auto">'
            f'{_text(sample.get("prompt", ""))}</p>\n<div class="answers">{columns}</div></article>'
        )
    tokens = f", at most {_count(document['new_tokens'])} tokens" if "new_tokens" in document else ""
    note = f'<p class="note">The likeliest token each time{tokens}.</p>'
    return _section("samples", "Before and after", note, *(made or ['<p class="note">Nothing was asked.</p>']))


def _memory(document: Mapping[str, Any]) -> str:
    memory = _mapping(document, "memory")
    gpu, process = _number(document.get("peak_cuda_mib")), _number(document.get("peak_mib"))
    peak = process if gpu is None else gpu
    kinds = [(name, label, _number(memory.get(name))) for name, label in _KINDS]
    kinds = [(name, label, size / _MIB) for name, label, size in kinds if size is not None]
    if not kinds:
        return _section("memory", "Memory", '<p class="note">Not measured: no step was taken.</p>')
    held = sum(size for _, _, size in kinds)
    if peak is not None and peak > held:
        rest = "activations, logits, what operators need" + (
            "; Python and its libraries, loading" if gpu is None else ""
        )
        kinds.append(("rest", f"the rest at the peak: {rest}", peak - held))
    total, bars, start = sum(size for _, _, size in kinds) or 1.0, [], 0.0
    for name, _, size in kinds:
        width = _WIDTH * size / total
        bars.append(f'<rect class="{name}" x="{start:.1f}" width="{max(width - 2, 1):.1f}" height="20"/>')
        start += width
    told = ", ".join(f"{label} {_mib(size)}" for _, label, size in kinds)
    rows = [(f'<i class="key {name}"></i>{label}', _mib(size), _percent(size / total)) for name, label, size in kinds]
    rows.append(("<b>peak</b>", f"<b>{_mib(peak)}</b>", ""))
    if gpu is None:
        how = "The peak is the most that the process ever had in memory until training ended."
    else:
        how = f"The peak is the most that PyTorch's tensors had on the GPU; the process had {_mib(process)}."
    return _section(
        "memory", "Memory",
        f'<svg class="bar" viewBox="0 0 {_WIDTH} 20" preserveAspectRatio="none" role="img" '
        f'aria-label="Memory: {told}">{"".join(bars)}</svg>',
        _table("Memory by kind", ("kind", "size", "share"), rows, numbers=(1, 2)),
        f'<p class="note">Bytes of the tensors themselves as the first step ends, each storage counted once. {how}</p>',
    )  # fmt: skip


def _checked(document: Mapping[str, Any]) -> str:
    check = _mapping(document, "check")
    if not check:
        return _section("check", "Check", '<p class="note">Not checked: the run did not get there.</p>')
    ok = check.get("ok") is True
    verdict = "Stock PEFT re-reads the adapter." if ok else "Stock PEFT re-reads the adapter with another result."
    found, bound = short(_number(check.get("max_difference"))), short(_number(check.get("bound")))
    rows = [
        ("the adapter as stock PEFT re-reads it, and the trained model on its stock path", found, f"at most {bound}")
    ]
    if check.get("accelerated_difference") is not None:
        found = short(_number(check["accelerated_difference"]))
        dtype = _text(str(_mapping(document, "machine").get("dtype", "bfloat16")).partition(":")[0])
        rows.append(("the trained model, fused, and on its stock path", found, f"no bound: {dtype} rounds in both"))
    state = f'<span class="state {"good" if ok else "bad"}">{"passed" if ok else "failed"}</span>'
    caption = "Greatest difference between logits, on two held-out examples"
    return _section("check", "Check", f"<p>{state} {verdict}</p>",
                    _table(caption, ("logits of", "difference", "wanted"), rows, (1,)))  # fmt: skip


def _layers(document: Mapping[str, Any]) -> str:
    fused = _mapping(document, "fused")
    if _mapping(document, "options").get("stock"):
        note = '<p class="note">A --stock run: PEFT and bitsandbytes alone, nothing is fused.</p>'
        return _section("layers", "Fused layers", note)
    if not fused:
        return _section("layers", "Fused layers", '<p class="note">Not known: the run did not get there.</p>')
    if not fused.get("layers"):
        return _section("layers", "Fused layers", '<p class="note">The method adapts no layers.</p>')
    share = f"<b>{_count(fused.get('fused'))} of {_count(fused.get('layers'))}</b>"
    share = f"<p>{share} adapted or quantized layers run fused.</p>"
    rows = [
        (_count(group.get("layers")),
         f'{_text(group.get("kind"))}<br><code class="note">{_text(group.get("first"))}</code>',
         "yes" if group.get("fused") else "no", _text(group.get("reason") or "–"))
        for group in _list(fused, "groups")
    ]  # fmt: skip
    if rows:
        listed = _table("Layers by kind, with the first of each", ("layers", "kind", "fused", "reason"), rows)
    else:
        listed = "".join(f"<p>{_text(reason)}</p>" for reason in _list(fused, "reasons"))
    return _section("layers", "Fused layers", share, listed)


def _size(document: Mapping[str, Any]) -> str:
    size, parameters = _number(document.get("adapter_bytes")), _number(document.get("parameters"))
    dense = 2 * parameters if parameters else None
    rows = []
    for name, value in (("adapter_model.safetensors", size), ("the base model, dense, in bfloat16", dense)):
        share = f"{_percent(value / dense)}" if value and dense else "–"
        rows.append((name, _mb(value) if value else "not saved", share))
    return _section(
        "size", "Size on disk", _table("Files", ("file", "size", "of the base"), rows, (1, 2)),
        '<p class="note">The adapter\'s is its file\'s; the base\'s is two bytes for each of its '
        f"{_count(parameters)} parameters.</p>" if parameters else "",
    )  # fmt: skip


def _time(document: Mapping[str, Any]) -> str:
    seconds = {name: s for name, v in _mapping(document, "seconds").items() if (s := _number(v)) is not None}
    total = sum(seconds.values()) or 1.0
    rows = [
        (_text(name), f'<span class="meter" style="--part:{100 * spent / total:.1f}%"></span>', f"{spent:,.1f} s")
        for name, spent in seconds.items()
    ]
    return _section("time", "Time", _table("Seconds by phase", ("phase", "share", "time"), rows, (2,)))


def _configuration(document: Mapping[str, Any]) -> str:
    options, changed = _mapping(document, "options"), set(map(str, _list(document, "changed")))
    rows = []
    for name, value in options.items():
        shown = "–" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else _text(value)
        if name == "lr" and value is None and "learning_rate" in document:
            shown = f"{short(_number(document['learning_rate']))}, the method's"
        if name == "max_steps" and value is None and options.get("epochs") is None and "steps_wanted" in document:
            shown = f"{_count(document['steps_wanted'])}, the default"
        mark = '<span class="chip">changed</span>' if name in changed else ""
        rows.append((f"<code>--{_text(name.replace('_', '-'))}</code>", f"<span>{shown}</span> {mark}"))
    count = f"{len(changed)} of {len(rows)} options are not the defaults." if "changed" in document else ""
    half = (len(rows) + 1) // 2
    parts = [part for part in (("Options", rows[:half]), ("Options, continued", rows[half:])) if part[1]]
    tables = "\n".join(_table(caption, ("option", "value"), part) for caption, part in parts)
    return _section(
        "configuration", "Configuration", f'<p class="note">{count}</p>', f'<div class="grid">\n{tables}\n</div>'
    )


def _machine(document: Mapping[str, Any]) -> str:
    machine, versions = _mapping(document, "machine"), _mapping(document, "versions")
    names = {
        "cpu": "CPU",
        "threads": "threads",
        "isa": "CPU path of the kernels",
        "dtype": "computes in",
        "device": "trained on",
        "system": "system",
    }
    return _section(
        "machine", "Machine and versions", '<div class="grid">',
        _table("Machine", ("what", "which"), [(names.get(n, _text(n)), _text(v)) for n, v in machine.items()]),
        _table("Versions", ("package", "version"), [(_text(n), _text(v)) for n, v in versions.items()]),
        "</div>",
    )  # fmt: skip


def _figures(document: Mapping[str, Any]) -> str:
    h = _history(document)
    if not h.step:
        return _section("figures", "Figures", '<p class="note">No step was taken.</p>')
    held = dict(h.held_out)
    count = min(len(h.step), _ROWS)
    picked = {round(i * (len(h.step) - 1) / max(count - 1, 1)) for i in range(count)}
    picked |= {i for i, step in enumerate(h.step) if step in held}
    rows = [
        (_count(h.step[i]), short(h.loss[i]), short(held.get(h.step[i])), short(h.lr[i]), _count(h.speed[i]))
        for i in sorted(picked)
    ]
    if 0 in held:
        rows.insert(0, ("0", "–", short(held[0]), "–", "–"))
    head = ("step", "loss", "held-out loss", "learning rate", "tokens/s")
    table = _table(f"{len(picked)} of {len(h.step):,} steps; all are in run.json", head, rows, range(5))
    return _section("figures", "Figures", f"<details><summary>The curves as a table</summary>\n{table}\n</details>")


# --- looks ------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { --page: #f7f7f5; --card: #ffffff; --ink: #16161a; --soft: #55545a; --rule: #e1e0dc; --raw: #a9c6ea;
  --c1: #2a6fc9; --c2: #b3500f; --c3: #6a4bb5; --c4: #0b7a5b; --c5: #a77900; --rest: #b9b8b2;
  --good: #0b6b3f; --good-bg: #e2f4ea; --warn: #7a4b00; --warn-bg: #fdf0d5; --bad: #a3201c; --bad-bg: #fde7e5; }
@media (prefers-color-scheme: dark) { :root { --page: #131316; --card: #1c1c20; --ink: #f1f0ec; --soft: #b4b2ab;
  --rule: #37373d; --raw: #4a6f9f; --c1: #6ba6f2; --c2: #f0965a; --c3: #ab92ee; --c4: #45c39b; --c5: #dcae3c;
  --rest: #63636a; --good: #7fdcab; --good-bg: #163324; --warn: #f3c66c; --warn-bg: #3a2c10; --bad: #ff9d96;
  --bad-bg: #431b19; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px; }
h1, h2, h3, h4, p, dl, dd, figure { margin: 0; }
h1 { font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin-bottom: 10px; }
h3 { font-size: 15px; }
h4 { font-size: 13px; color: var(--soft); font-weight: 600; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.by, .note, .about, caption, summary { color: var(--soft); font-size: 13px; }
.about { margin-top: 8px; overflow-wrap: anywhere; }
section { margin-top: 20px; background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 18px; }
#summary { padding: 0; background: none; border: 0; }
.state, .chip { display: inline-block; border-radius: 4px; padding: 1px 8px; font-size: 13px; font-weight: 600; }
.state { margin-right: 6px; }
.good { color: var(--good); background: var(--good-bg); }
.warn, .chip { color: var(--warn); background: var(--warn-bg); }
.bad { color: var(--bad); background: var(--bad-bg); }
.tiles { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px; }
.tiles > div { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { font-size: 21px; font-weight: 600; line-height: 1.35; }
.tiles dd.note { font-size: 13px; font-weight: 400; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 18px 24px; }
.grid > * { min-width: 0; }
.chart + .grid { margin-top: 18px; }
figure.chart { display: flex; flex-direction: column; }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; margin: 6px 0 10px; font-size: 13px; min-height: 20px; }
.binned .legend { min-height: 40px; align-content: flex-start; }
.legend b { min-width: 76px; }
.legend span { color: var(--soft); }
output { display: inline; color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.plot { position: relative; height: 150px; margin: auto 14px 40px 52px; touch-action: pan-y; }
#chart-loss .plot { height: 260px; }
.plot:focus-visible { outline: 2px solid var(--c1); outline-offset: 4px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot span { position: absolute; color: var(--soft); font-size: 12px; line-height: 1; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.plot .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 8px); transform: translateX(-50%); }
.plot .axis { top: calc(100% + 24px); right: 0; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }
.plot .rule { stroke: var(--rule); stroke-width: 1; }
.plot .line { stroke: var(--c); stroke-width: 2; }
.plot .line.raw { stroke-width: 1.25; }
.plot .dots { stroke: var(--c); stroke-width: 8; }
.plot .band { fill: var(--c); opacity: 0.25; }
.plot .at { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--soft); pointer-events: none; }
.plot .dot { position: absolute; width: 9px; height: 9px; margin: -4.5px; border-radius: 50%; background: var(--c);
  border: 1.5px solid var(--card); pointer-events: none; }
.raw { --c: var(--raw); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); }
.frozen { --c: var(--c1); } .adapter { --c: var(--c2); } .gradients { --c: var(--c5); } .optimizer { --c: var(--c3); }
.rest { --c: var(--rest); }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; background: var(--c); margin-right: 6px;
  vertical-align: -1px; }
.legend .key { height: 4px; vertical-align: 3px; }
.bar { display: block; width: 100%; height: 22px; margin-bottom: 12px; }
.bar rect { fill: var(--c); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { text-align: left; padding-bottom: 4px; }
th, td { text-align: left; font-weight: 400; padding: 5px 14px 5px 0; border-top: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: anywhere; }
thead th { border-top: 0; color: var(--soft); font-size: 13px; overflow-wrap: normal; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr > :last-child { padding-right: 0; }
.meter { display: block; width: 100%; min-width: 60px; height: 10px; margin-top: 6px;
  background: linear-gradient(var(--c1), var(--c1)) left / var(--part) 100% no-repeat; }
#time td:nth-child(2) { width: 60%; }
#configuration th { width: 52%; }
.grid > .wide { margin-top: 0; }
p + .grid { margin-top: 8px; }
.wide + .note, .note + .wide, p + .wide { margin-top: 8px; }
article { border-top: 1px solid var(--rule); padding: 12px 0; }
#samples > .note { margin-bottom: 10px; }
article:last-child { padding-bottom: 0; }
article h3 { line-height: 1; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 600; margin: 2px 0 8px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 12px 24px; }
.answers > div { border-left: 3px solid var(--rule); padding-left: 12px; min-width: 0; }
.answers > div:nth-child(2) { border-left-color: var(--c2); }
summary { cursor: pointer; }
details table { margin-top: 10px; }
@media (max-width: 480px) { main { padding: 18px 10px 32px; } section { padding: 14px 12px; } h1 { font-size: 21px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); } .tiles dd { font-size: 17px; }
  .tiles > div { padding: 10px; }
  #chart-loss .plot { height: 210px; } #chart-loss .legend { min-height: 80px; align-content: flex-start; }
  th, td { padding-right: 8px; } }
@media print { :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ccc;
  --raw: #a9c6ea; --c1: #2a6fc9; --c2: #b3500f; --c3: #6a4bb5; --c4: #0b7a5b; --c5: #a77900; --rest: #b9b8b2;
  --good: #0b6b3f; --good-bg: #fff; --warn: #7a4b00; --warn-bg: #fff; --bad: #a3201c; --bad-bg: #fff; }
  main { max-width: none; padding: 0; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section { border: 0; padding: 0; } figure, article, tr, .tiles > div { break-inside: avoid; }
  h2 { break-after: avoid; } }
"""

# A step at the pointer: the nearest point of each curve, its own step where that is another one.
_SCRIPT = """
"use strict";
function short(v) {
  if (v === null || v === undefined) return "–";
  const a = Math.abs(v);
  const text = a === 0 || (a >= 1e-3 && a < 1e6) ? String(a < 1e4 ? +a.toPrecision(4) : Math.round(a))
    : a.toExponential(3).replace(/\\.?0*e/, "e").replace("+", "");
  return v < 0 ? "−" + text : text;
}
const count = n => n.toLocaleString("en");
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (xs[mid] <= x) low = mid; else high = mid; }
  return xs[high] - x < x - xs[low] ? high : low;
}
for (const plot of document.querySelectorAll(".plot")) {
  const chart = JSON.parse(plot.dataset.chart), figure = plot.closest("figure");
  const label = figure.querySelector(".legend b"), values = figure.querySelectorAll("output");
  const rest = [label.textContent, ...[...values].map(v => v.textContent)];
  const main = chart.s[0], marks = [];
  let index = main.x.length - 1;
  function mark(name) {
    const made = document.createElement("div");
    made.className = name;
    plot.append(made);
    marks.push(made);
    return made;
  }
  const part = (v, [a, b]) => (v - a) / (b - a);
  function clear() {
    marks.splice(0).forEach(m => m.remove());
    [label, ...values].forEach((place, i) => { place.textContent = rest[i]; });
  }
  function show(i) {
    clear();
    index = i;
    const step = main.x[i], last = Math.min(step + main.width - 1, main.last);
    const middle = s => (s.width - 1) / 2;
    label.textContent = last > step ? `steps ${count(step)}–${count(last)}` : `step ${count(step)}`;
    mark("at").style.left = 100 * part(step + middle(main), chart.x) + "%";
    chart.s.forEach((s, k) => {
      const j = nearest(s.x, step), v = s.y[j];
      let text = short(v);
      if (v !== null && s.low) text += ` (${short(s.low[j])} to ${short(s.high[j])})`;
      if (v !== null && s.x[j] !== step) text += ` at ${count(s.x[j])}`;
      values[k].textContent = text;
      if (v === null) return;
      const dot = mark("dot " + s.look);
      dot.style.left = 100 * part(s.x[j] + middle(s), chart.x) + "%";
      dot.style.top = 100 * (1 - part(v, chart.y)) + "%";
    });
  }
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const x = chart.x[0] + (event.clientX - box.left) / box.width * (chart.x[1] - chart.x[0]);
    show(nearest(main.x, x - (main.width - 1) / 2));
  });
  plot.addEventListener("pointerleave", clear);
  plot.addEventListener("blur", clear);
  plot.addEventListener("keydown", event => {
    const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: main.x.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(Math.min(Math.max(to, 0), main.x.length - 1));
  });
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => { d.open = true; }));
"""
