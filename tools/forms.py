"""Draws peft_ext/integrations/forms/forms.tsv, the table of known forms, and the coverage in docs/known-forms.md.

    python tools/forms.py            draws the table and the coverage, from the releases of transformers in RELEASES
    python tools/forms.py --share    prints how many norms, attentions and MLPs of the installed transformers have a
                                     known form

pip installs each release into a folder of build/forms, and a separate process reads each release. A form gets a row if
a formula of peft_ext passes the proof for a class with this form (peft_ext/verification/proof.py and
tests/support/form_proofs.py). Rows of dropouts, and of attentions that keep their own forward, need no proof. The row
of an attention also names the layers that receive one input tensor, which tools/reads_of_attention.py reads from the
source of the attention's forward; ``peft_ext.accelerate`` only reads the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("5.1.0", "5.4.0", "5.8.0", "5.12.0", "5.15.0", "5.20.0", "5.24.0")
TABLE = ROOT / "peft_ext/integrations/forms/forms.tsv"
PAGE = ROOT / "docs/known-forms.md"
# docs/known-forms.md has a row for each of these architectures of transformers: decoders and encoders in wide use.
DECODERS = (
    "llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 gemma4 phi phi3 phimoe gpt_oss"
    " deepseek_v2 deepseek_v3 glm glm4 glm4_moe olmo olmo2 olmo3 olmoe granite granitemoe smollm3 falcon gpt_neox gpt2"
    " gptj opt bloom starcoder2 stablelm cohere cohere2 nemotron exaone4 ernie4_5"
).split()
ENCODERS = "bert roberta distilbert electra modernbert t5 bart whisper clip vit".split()
KINDS = {
    "norm": ("rms_norm", "float_layer_norm", "layer_norm"),
    "attention": ("attention", "projections"),
    "MLP": ("mlp",),
}

# REASONS maps the names of classes of the architectures in DECODERS and ENCODERS to the reason why the class has no
# known form (row of forms.tsv).
_HOLDS = "holds another attention, which has a known form"
REASONS = {
    "BertAttention": _HOLDS,
    "BloomAttention": "rounds the scores to the dtype of q before the softmax, which the attention operator does not",
    "BloomMLP": "takes the residual as a second input, and computes GELU in an autograd function of its own",
    "ElectraAttention": _HOLDS,
    "FalconAttention": "calls PyTorch's function by name, not from transformers' registry, and takes q, k and v from "
    "the output of one layer in one of three layouts",
    "Gemma4AudioFeedForward": "limits its input and its output with torch.clamp; its norms are fused alone",
    "GptOssMLP": "is a router with experts; the experts are a layer of their own, which PEFT adapts",
    "RobertaAttention": _HOLDS,
    "T5LayerCrossAttention": _HOLDS,
    "T5LayerSelfAttention": _HOLDS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", action="store_true", help="the share of known classes in the installed transformers")
    # --scan takes two files: one with known rows of the table, and one for the rows that the process finds.
    parser.add_argument("--scan", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.ERROR)  # transformers would warn about packages that are not installed
    warnings.simplefilter("ignore")
    if args.scan:
        known, out = map(Path, args.scan)
        out.write_text(json.dumps(scan(json.loads(known.read_text()))))
    elif args.share:
        print(share())
    else:
        draw()


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw() -> None:
    from peft_ext.integrations.forms import HEADER, Row

    found: dict[str, dict[str, Any]] = {}
    coverage: dict[str, Any] = {}
    battery: dict[str, list[int]] = {}
    for release in reversed(RELEASES):
        scanned = _scanned(release, found)
        coverage, battery = coverage or scanned["coverage"], battery or scanned["battery"]
        for digest, one in scanned["rows"].items():
            found[digest] = {**one, **found.get(digest, {}), "since": release}
        print(f"{release}: {len(scanned['rows'])} known forms, {len(found)} in all", flush=True)
    rows = [Row(digest, one["kind"], tuple(one["formula"].items()), one["example"], one["classes"], one["since"])
            for digest, one in found.items()]  # fmt: skip
    rows.sort(key=lambda row: (row.kind, -row.classes, row.example, row.digest))
    TABLE.write_text("\n".join(["\t".join(HEADER), *(row.line() for row in rows)]) + "\n")
    PAGE.write_text(_page(rows, coverage, battery))


def _scanned(release: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Runs :func:`scan` in a process that imports transformers ``release``, and returns the result. ``found``:
    the rows of the table that other releases gave, by digest."""
    place, out = ROOT / "build/forms" / release, ROOT / "build/forms" / f"{release}.json"
    known = out.with_name("known.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(found))
    if not place.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place)]
        # pip also installs the packages that this release of transformers needs.
        subprocess.run([*pip, f"transformers=={release}"], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{place}{os.pathsep}{ROOT}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, __file__, "--scan", str(known), str(out)], check=True, env=environment)
    return json.loads(out.read_text())


def _page(rows: list[Any], coverage: dict[str, dict[str, list]], battery: dict[str, list[int]]) -> str:
    kinds = Counter(row.kind for row in rows)
    lines = [
        "# Known forms", "",
        "<!-- drawn by tools/forms.py -->", "",
        "`accelerate` fuses a norm, an MLP, an attention or a decoder layer if the code of its forward is one of the "
        "forms in the table `peft_ext/integrations/forms/forms.tsv`, or a form that was registered with "
        "`register_form`; the name of the class does not matter. Any other forward runs unchanged, and `explain` says "
        "so. [What a known form is](faq.md#what-is-a-known-form) tells how forms are compared, and how to add a form.",
        "",
        "The forms in `forms.tsv` were read from the classes and functions of PyTorch and of transformers "
        f"{', '.join(RELEASES)}. `forms.tsv` has these numbers of forms:", "",
        "| kind | forms |", "|---|---|",
        *(f"| {kind} | {count} |" for kind, count in sorted(kinds.items())), "",
        f"## Classes of transformers {RELEASES[-1]}, by architecture", "",
        "The columns norms, attentions and MLPs show how many of an architecture's classes of norms, attentions and "
        "MLPs have a known form. The column stock names the classes without a known form. In an attention with a known "
        "form, peft_ext computes the linear layers of one input (such as q, k and v) together, or computes "
        "softmax(q kᵀ) v in place of the function from transformers' registry, or does both.", "",
        "| architecture | norms | attentions | MLPs | stock |", "|---|---|---|---|---|",
    ]  # fmt: skip
    totals: Counter[tuple[str, bool]] = Counter()
    for name in (*DECODERS, *ENCODERS):
        cells, stock = [], []
        for kind in KINDS:
            known, unknown = coverage.get(name, {}).get(kind, [0, []])
            totals[kind, True] += known
            totals[kind, False] += len(unknown)
            cells.append(f"{known} of {known + len(unknown)}" if known or unknown else "")
            stock += unknown
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(stock)} |")
    shares = [f"{totals[kind, True]} of {totals[kind, True] + totals[kind, False]}" for kind in KINDS]
    lines += [f"| all | {' | '.join(shares)} | |", "", "These classes have no known form:", "",
              "| class | reason |", "|---|---|"]  # fmt: skip
    unknown = sorted({name for one in (*DECODERS, *ENCODERS) for cell in coverage.get(one, {}).values()
                      for name in cell[1]})  # fmt: skip
    lines += [*(f"| {name} | {REASONS[name]} |" for name in unknown), ""]
    lines += [
        "## Replaced code", "",
        "For each class with a known form of the architectures above, the values that the class's forward looks up by "
        "name were replaced, one after the other: functions of the Python module, attributes of the class, functions "
        "of PyTorch, numbers, and transformers' attention functions. A value for which the tool has no replacement was "
        "not replaced. The column known is the number of replacements after which the class still had a known form: "
        "`accelerate` would have fused the changed class, "
        "which would be an error. The forward of a decoder layer looks up nothing by name; it only calls its norms, "
        "its attention and its MLP, which are blocks of their own. A call of few tokens computes a decoder layer as a "
        "whole only if each of these blocks is fused, and neither the decoder layer nor one of these blocks has a "
        "forward of its own or a hook on its forward. Otherwise the forward of the decoder layer's class runs. For "
        "some of these classes, `tests/integrations/test_battery.py` replaces hooks, forwards, attributes, parameters, "
        "activations and registry entries before `accelerate`, and compares the accelerated model with the stock "
        "model that was changed alike.", "",
        "| kind | classes | replacements | known |", "|---|---|---|---|",
        *(f"| {kind} | {' | '.join(map(str, counts))} |" for kind, counts in sorted(battery.items())), "",
    ]  # fmt: skip
    return "\n".join(lines)


# --- one release ------------------------------------------------------------------------------------------------------


def classes() -> Iterator[Any]:
    """Yields five module classes of PyTorch, and the module classes in transformers' activations and modeling files."""
    import transformers
    from torch import nn

    yield from (nn.SiLU, nn.GELU, nn.ReLU, nn.LayerNorm, nn.Dropout)
    package = Path(transformers.__file__).parent
    files = [package / "activations.py", *sorted((package / "models").glob("*/modeling_*.py"))]
    for file in files:
        name = ".".join(("transformers", *file.relative_to(package).with_suffix("").parts))
        try:
            module = importlib.import_module(name)
        except Exception:  # a package that the module needs is not installed
            continue
        for value in list(vars(module).values()):
            if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == name:
                yield value


def scan(known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns a dict with the rows of the table for the imported transformers, the coverage of each architecture, and,
    if ``known`` is empty, the counts of :func:`_battery`. ``known`` are rows from other releases, which are not proved
    again: a form with the same digest is the same code in each release.
    """
    sys.path.insert(0, str(ROOT / "tests/support"))
    import form_proofs
    from reads_of_attention import attention_formulas

    from peft_ext.integrations.forms import REGISTERED, Row, Unknown, form_of
    from peft_ext.integrations.forms.activations import refresh

    for digest, one in known.items():
        REGISTERED[digest] = Row(digest, one["kind"], tuple(one["formula"].items()))
    rows: dict[str, dict[str, Any]] = {}
    refused: set[str] = set()
    by_class: dict[Any, str] = {}

    def meet(subject: Any, method: str, formulas: Any) -> None:
        try:
            form = form_of(subject, method)
        except Unknown:
            return
        by_class[subject] = form.digest if method == "forward" else by_class.get(subject, "")
        if form.digest in rows:
            rows[form.digest]["classes"] += 1
        elif form.digest in known:
            rows[form.digest] = {**known[form.digest], "classes": 1}
        elif form.digest not in refused:
            for kind, formula in formulas(subject, form):
                row = Row(form.digest, kind, tuple(formula.items()))
                proved = kind in ("dropout", "projections") or (kind == "attention" and "forward" not in formula)
                if proved or form_proofs.disproof(subject, row, form) is None:
                    example = f"{subject.__module__}.{subject.__qualname__}"
                    rows[form.digest] = {"kind": kind, "formula": formula, "example": example, "classes": 1}
                    if kind == "activation":
                        REGISTERED[form.digest] = row
                        refresh()
                    return
            refused.add(form.digest)

    def formulas(subject: Any, form: Any) -> Iterator[tuple[str, dict[str, str]]]:
        if subject.__module__.startswith("torch."):
            name = {"LayerNorm": "layer_norm", "Dropout": "dropout"}.get(subject.__name__)
            yield from [(name, {})] if name else form_proofs.proposals(subject, form)
            return
        yield from form_proofs.proposals(subject, form)
        if "GradientCheckpointingLayer" not in (kind.__name__ for kind in subject.__mro__):  # no decoder layer
            yield from attention_formulas(subject, form)

    for cls in classes():
        meet(cls, "forward", formulas)
        if hasattr(cls, "_apply_gate"):
            meet(cls, "_apply_gate", lambda *_: [("gate", {"act": "act_fn"})])
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.loss.loss_utils import ForCausalLMLoss

    biased = "yes" if "position_bias" in sdpa_attention_forward.__code__.co_varnames else "no"
    meet(sdpa_attention_forward, "forward", lambda *_: [("sdpa", {"bias": biased})])
    meet(ForCausalLMLoss, "forward", lambda *_: [("causal_loss", {})])
    from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

    meet(Cache, "update", lambda *_: [("cache", {})])
    meet(DynamicLayer, "update", lambda *_: [("cache_layer", {})])
    meet(DynamicSlidingWindowLayer, "update", lambda *_: [("sliding_cache_layer", {})])
    kinds = {cls: rows[digest]["kind"] for cls, digest in by_class.items() if digest in rows}
    battery = {} if known else _battery(by_class, rows)
    return {"rows": rows, "coverage": _coverage(by_class, kinds), "battery": battery}


def _battery(by_class: dict[Any, str], rows: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """For each class with a known form in the architectures DECODERS and ENCODERS, replaces the values that the class's
    forward finds by name and for which ``another`` has a replacement, one at a time. Returns a dict from each kind of
    form to three numbers: of classes, of replacements, and of replacements after which the form was still known."""
    from unittest.mock import patch

    from reached import another, reached

    from peft_ext.integrations.forms import Unknown, form_of

    counts: dict[str, list[int]] = {}
    for cls, digest in by_class.items():
        if digest not in rows or not isinstance(cls, type) or _architecture(cls) not in (*DECODERS, *ENCODERS):
            continue
        count = counts.setdefault(rows[digest]["kind"], [0, 0, 0])
        count[0] += 1
        for place in reached(cls):
            if place.value is os.environ or (other := another(place.value)) is None:
                continue
            by_item = isinstance(place.owner, dict)
            with patch.dict(place.owner, {place.name: other}) if by_item else patch.object(*place[:2], other):
                try:
                    count[2] += form_of(cls).digest in rows
                except Unknown:
                    pass
            count[1] += 1
    return counts


def _architecture(cls: Any) -> str:
    """Returns the name of the architecture in whose folder of transformers.models ``cls`` is defined; "" for a class of
    another place."""
    parts = cls.__module__.split(".")
    return parts[2] if len(parts) > 3 and parts[1] == "models" else ""


def _coverage(by_class: dict[Any, str], kinds: dict[Any, str]) -> dict[str, dict[str, list]]:
    """Returns a dict from each architecture to a dict from each kind of KINDS to a list: the number of classes with a
    known form, and the names of the classes without one."""
    found: dict[str, dict[str, list]] = {}
    for cls in classes():
        architecture, name = _architecture(cls), cls.__name__.lower()
        if not architecture:
            continue
        is_norm = name.endswith(("norm", "layernorm"))
        is_mlp = name.endswith(
            ("mlp", "feedforward", "ffn", "densereludense", "denseactdense", "gatedactdense", "intermediate")
        )
        kind = "norm" if is_norm else "MLP" if is_mlp else "attention" if name.endswith("attention") else None
        if kind is None or not hasattr(cls, "forward"):
            continue
        cell = found.setdefault(architecture, {}).setdefault(kind, [0, []])
        if kinds.get(cls) in KINDS[kind]:
            cell[0] += 1
        else:
            cell[1].append(cls.__name__)
    return found


def share() -> str:
    """Returns the share of the installed transformers' norms, attentions and MLPs whose form is in the table."""
    import transformers

    from peft_ext.integrations.forms import row_of

    kinds = {cls: found[0].kind for cls in classes() if not isinstance(found := row_of(cls), str)}
    coverage = _coverage({}, kinds)
    said = []
    for kind in KINDS:
        cells = [one[kind] for one in coverage.values() if kind in one]
        known, unknown = sum(cell[0] for cell in cells), sum(len(cell[1]) for cell in cells)
        said.append(f"{kind} {known} of {known + unknown} ({known / max(1, known + unknown):.0%})")
    return f"transformers {transformers.__version__}, classes whose form is known: {', '.join(said)}"


if __name__ == "__main__":
    main()
