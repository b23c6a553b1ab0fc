"""Tests charts: lengths and points that are read from an SVG's coordinates must be the numbers of the result files.

The bars and curves of an SVG have ids. The tests read the scales from elements whose numbers are known.
"""

import importlib
import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
pytest.importorskip("benchmarks", reason="benchmarks/ is not here: not a checkout")
charts, files = (importlib.import_module(f"benchmarks.{name}") for name in ("charts", "files"))

from peft_ext.chart import Scale, identifier  # noqa: E402
from peft_ext.cli import bench as command  # noqa: E402
from peft_ext.run import RunError  # noqa: E402

PICTURES = sorted((ROOT / "docs/images").glob("*.svg"))
committed = pytest.mark.skipif(not files.RESULTS.is_dir(), reason="the result files are not here: not a checkout")
MACHINE = {"cpu": "CPU", "threads": 2, "isa": "avx2", "environment": {}, "date": "2026-01-02",
           "versions": {"torch": "1.2"}}  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"
CEILINGS = {"copy_gb_s": 10.0, "matmul_bf16_tflop_s": 0.5, "matmul_f32_tflop_s": 0.1}


class Drawing:
    """Has the elements of an SVG by id: the corners of bars and the points of paths, with y pointing downwards."""

    def __init__(self, data: bytes) -> None:
        root = ElementTree.fromstring(data)
        self.caption = root.find(f"{SVG}desc").text
        self.texts = [text for element in root.iter(f"{SVG}text") for text in element.itertext()]
        self.elements = {}
        for element in root.iter():
            if ":" not in (name := element.get("id", "")):
                continue
            assert name not in self.elements, name
            if "d" in element.keys():
                points = re.findall(r"[ML](\S+?) ([^MLh]+)", element.get("d"))
            else:
                x, y, width, height = (float(element.get(side, 0)) for side in ("x", "y", "width", "height"))
                points = [(x, y), (x + width, y + height)] if element.tag == f"{SVG}rect" else [(x, y)]
            self.elements[name] = [(float(x), float(y)) for x, y in points]

    def named(self, *prefix: str) -> dict:
        start = ":".join(prefix) + ":"
        return {name: points for name, points in self.elements.items() if name.startswith(start)}

    def length(self, *name: str) -> float:
        (left, _), (right, _) = self.elements[identifier(*name)]
        return right - left


def drawn(draw, result) -> Drawing:
    return Drawing(draw(result).svg())


def row(op, case, speedup, tokens=512, flops=10**9, moved=10**7, **changes):
    times = {"ours": 2.0, **{name: 2.0 * ratio for name, ratio in speedup.items()}}
    return {"op": op, "case": f"T={tokens} 4096->4096, {case}", "tokens": tokens, "k": 4096, "n": 4096,
            "weights": "rotating", "milliseconds": times, "speedup": speedup, "bytes_moved": moved, "flops": flops,
            **changes}  # fmt: skip


def kernels(*rows, **machine):
    return {"machine": {**MACHINE, **machine}, "ceilings": CEILINGS, "left_out": [], "rows": list(rows)}


FULL = {"PEFT": 1.5, "torch eager": 2.0, "torch.compile": 1.2, "frozen": 0.8}


def lengths(drawing: Drawing, base: str) -> dict:
    """Returns the length of each bar by its id, in units of the distance from 0 to the dashed line (the value 1)."""
    bars = {name: points for name, points in drawing.named(f"layers.{base}").items()}
    (one, _), *_ = drawing.elements[identifier("layers", base, "frozen")]
    return {name: (max(x for x, _ in p) - min(x for x, _ in p)) / (one - min(x for x, _ in p))
            for name, p in bars.items()}  # fmt: skip


# --- layers -----------------------------------------------------------------------------------------------------------


def test_a_bar_is_as_long_as_the_ratio_in_the_file():
    nf4 = {"PEFT + bitsandbytes": 3.0, "torch eager": 4.0, "frozen": 1.25}
    drawing = drawn(
        charts.layers, kernels(row("lora_linear", "bf16 base", FULL), row("ia3_linear", "NF4 base, output", nf4))
    )
    assert lengths(drawing, "bf16") == {
        "layers.bf16:LoRA:ours": pytest.approx(1 / 0.8, rel=1e-4),
        "layers.bf16:LoRA:stock": pytest.approx(1.5 / 0.8, rel=1e-4),
        "layers.bf16:LoRA:torch-eager": pytest.approx(2.0 / 0.8, rel=1e-4),
        "layers.bf16:LoRA:torch.compile": pytest.approx(1.2 / 0.8, rel=1e-4),
    }
    assert lengths(drawing, "nf4") == {
        "layers.nf4:IA3-output:ours": pytest.approx(1 / 1.25, rel=1e-4),
        "layers.nf4:IA3-output:stock": pytest.approx(3 / 1.25, rel=1e-4),
        "layers.nf4:IA3-output:torch-eager": pytest.approx(4 / 1.25, rel=1e-4),
    }
    for text in ("1.25", "1.88", "2.50", "1.50", "0.80", "2.40", "3.20"):
        assert drawing.texts.count(text) == 1, text


def test_rows_that_the_picture_is_not_about_are_left_out():
    rows = [row("lora_linear", "bf16 base", FULL), row("lora_linear", "NF4 base", {"frozen": 0.5}),
            row("dora_linear", "bf16 base", {"PEFT": 2.0}),  # a row without the frozen layer is not drawn
            row("ia3_linear", "bf16 base, output", FULL, weights="hot"),
            row("nf4_linear", "forward", FULL),  # a layer without an adapter is not drawn
            row("lora_linear", "bf16 base, dropout 0.05", FULL, tokens=2048)]  # fmt: skip
    drawing = drawn(charts.layers, kernels(*rows))
    assert {name.split(":")[1] for name in lengths(drawing, "bf16")} == {"LoRA"}
    assert set(lengths(drawing, "nf4")) == {"layers.nf4:LoRA:ours"}
    assert drawing.texts.count("not measured") == 3  # PEFT, eager and compiled have no time over NF4
    assert charts.layers(kernels()) is None and charts.layers(kernels(rows[2])) is None
    assert "PEFT cannot drop on the low rank" not in drawing.caption
    dropped = row("dora_linear", "bf16 base, dropout 0.05 on the low rank", FULL)
    assert "PEFT cannot drop on the low rank" in drawn(charts.layers, kernels(dropped)).caption


def test_a_caption_says_where_the_numbers_are_from():
    assert drawn(charts.layers, kernels(row("lora_linear", "bf16 base", FULL))).caption.endswith(
        "CPU, 2 threads, path avx2; 2026-01-02; torch 1.2."
    )


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_whole_steps_have_bars_of_their_ratios():
    rows = [{"method": "LoRA, dropout 0.05", "tokens_per_s": {"ours": [30.0], "stock": [15.0]}, "speedup": 2.0,
             "peak_mib": {"ours": [100], "stock": [400]}, "memory": 0.25},
            {"method": "IA3", "tokens_per_s": {"ours": [20.0, 22.0], "stock": [28.0]}, "speedup": 0.75,
             "peak_mib": {"ours": [300], "stock": [200]}, "memory": 1.5}]  # fmt: skip
    drawing = drawn(charts.training, {"machine": MACHINE, "what": "a model, 5 steps", "rows": rows})
    for key in ("speedup", "memory"):
        (one, _), *_ = drawing.elements[identifier("training", "stock", key)]
        for method in rows:
            name = identifier("training", method["method"], key)
            left = min(x for x, _ in drawing.elements[name])
            assert drawing.length("training", method["method"], key) / (one - left) == pytest.approx(
                method[key], rel=1e-4
            )
    assert drawing.texts.count("30 / 15") == drawing.texts.count("100 / 400 MiB") == drawing.texts.count("21 / 28") == 1
    assert drawing.caption.startswith("A model, 5 steps. ")
    assert charts.training({"machine": MACHINE, "what": "nothing", "rows": []}) is None


def test_the_parts_of_a_step_have_bars_over_the_frozen_step():
    def times(**parts):
        return {**dict.fromkeys(charts.PARTS, 1.0), **parts}

    rows = [{"shape": "1b", "what": "a width", "milliseconds": {
        "frozen": times(step=8.0), "stock": times(step=12.0, attention=3.0), "ours": times(step=6.0)}}]  # fmt: skip
    drawing = drawn(charts.parts, {"machine": MACHINE, "what": "a model", "rows": rows})
    (left, _), _ = drawing.elements[identifier("parts", "1b", "step") + ":ours"]
    unit = drawing.elements[identifier("parts", "1b", "frozen")][0][0] - left

    def length(part, kind):
        return drawing.length("parts", "1b", part, kind) / unit

    assert length("step", "ours") == pytest.approx(6 / 8, abs=1e-3)
    assert length("step", "stock") == pytest.approx(12 / 8, abs=1e-3)
    assert length("attention", "stock") == pytest.approx(3 / 8, abs=1e-3)
    assert length("linear layers", "frozen") == pytest.approx(1 / 8, abs=1e-3)
    assert charts.parts({"machine": MACHINE, "what": "a model", "rows": []}) is None


def test_loss_curves_have_every_step():
    def run(method, dtype="bfloat16", beside="PEFT", pruned=None, **curves):
        return {"method": method, "dtype": dtype, "twin": beside, "pruned": pruned, "losses": curves}

    rows = [run("LoRA", ours=[8.0, 4.0, 2.5], twin=[8.0, 4.5, 2.0]), run("BitFit", beside="", ours=[8.0, 5.0, 3.0]),
            run("Diff Pruning", beside="", ours=[8.0, 5.0, 6.0], pruned=1)]  # fmt: skip
    rows += [run("LoRA", "float32", ours=[8.0, 4.0], twin=[8.0, 4.0 + 3e-6]),
             run("BitFit", "float32", "parameters", ours=[8.0, 5.0], twin=[8.0, 5.0])]  # fmt: skip
    settings = {"steps": 3, "steps_float32": 2, "batch": 8}
    drawing = drawn(charts.losses, {"machine": MACHINE, "settings": settings, "rows": rows})
    assert set(drawing.named("losses")) == {"losses:LoRA:ours", "losses:LoRA:twin", "losses:BitFit:ours",
                                            "losses:Diff-Pruning:ours"}  # fmt: skip
    (_, eight), (_, four), _ = drawing.elements["losses:LoRA:ours"]
    for method in rows[:3]:
        for who, curve in method["losses"].items():
            points = drawing.elements[identifier("losses", method["method"], who)]
            assert [4 * 2 ** ((y - four) / (eight - four)) for _, y in points] == pytest.approx(curve, rel=1e-3)
            assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], rel=1e-4)
    for text in ("bf16: 0.5", "float32: 3.0e-06", "float32: 0", "nothing to compare with", "pruned"):
        assert drawing.texts.count(text) == 1, text
    assert charts.losses({"machine": MACHINE, "settings": settings, "rows": rows[3:]}) is None


# --- the committed pictures -------------------------------------------------------------------------------------------


@committed
def test_committed_pictures_are_what_the_files_draw(capsys):
    charts.main(["--check"])
    assert capsys.readouterr().out == ""


@committed
@pytest.mark.parametrize("name", ["layers", "layers-dora"])
def test_the_committed_bars_are_the_newest_files(name):
    drawing = Drawing((charts.IMAGES / f"{name}.svg").read_bytes())
    found = {**lengths(drawing, "bf16"), **lengths(drawing, "nf4")}
    for layer in charts.adapted_layers(files.newest(charts.CHARTS[name][0])):
        for name, time in layer.times.items():
            bar = identifier(f"layers.{layer.base}", layer.label, charts._contender(name))
            assert found.pop(bar) == pytest.approx(time, rel=1e-4)
    assert not found


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_committed_pictures_are_small_and_their_text_is_text(path):
    root = ElementTree.fromstring(path.read_bytes())
    assert path.stat().st_size < 60_000
    assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    assert sum(1 for _ in root.iter(f"{SVG}text")) > 10
    assert not [element.tag for element in root.iter() if element.tag in (f"{SVG}image", f"{SVG}script")]
    assert not re.search(rb"@import|url\([^#]|href=\"[^#]", path.read_bytes())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_committed_pictures_read_in_a_browser(browser, path, scheme):
    """No text leaves the picture or touches another text, and each text has enough contrast to its background."""
    context = browser.new_context(viewport={"width": 1000, "height": 1200}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(path.as_uri())
    texts, width, height = tab.evaluate(_TEXTS)
    context.close()
    assert len(texts) > 10
    for text, left, top, right, bottom, contrast in texts:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height, text
        assert contrast >= 4.5, (text, contrast)
    for (one, *a, _), (other, *b, _) in itertools.combinations(texts, 2):
        assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (one, other)


# JavaScript that returns the box of each text, without the space above and below the letters, and the text's contrast.
_TEXTS = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const card = document.querySelector("rect"), under = light(parse(getComputedStyle(card).fill));
  const root = document.documentElement.getBoundingClientRect();
  return [[...document.querySelectorAll("text")].map(e => {
    const box = e.getBoundingClientRect(), own = light(parse(getComputedStyle(e).fill).slice(0, 3));
    return [e.textContent, box.left - root.left, box.top - root.top + 2, box.right - root.left,
      box.bottom - root.top - 2, (Math.max(own, under) + 0.05) / (Math.min(own, under) + 0.05)];
  }), root.width, root.height];
}"""


def test_the_same_numbers_give_the_same_bytes():
    result = kernels(row("lora_linear", "bf16 base", FULL))
    assert charts.layers(result).svg() == charts.layers(result).svg()


@pytest.mark.parametrize(
    "scale, ticks",
    [
        (Scale(0, 3.2), [0, 1, 2, 3]),
        (Scale(-0.3, 0.31), [-0.2, 0, 0.2]),
        (Scale(0, 7), [0, 2, 4, 6]),
        (Scale(0.8, 3000, log=True), [1, 10, 100, 1000]),
        (Scale(0.3, 9, log=True), [0.5, 1, 2, 5]),
        # Fewer than two numbers of the form 1, 2 or 5 times a power of ten are within this scale.
        (Scale(2.1, 4.8, log=True), [3, 4]),
    ],
)
def test_ticks_are_round_numbers_within(scale, ticks):
    assert scale.ticks() == ticks
    assert [scale(scale.low), scale(scale.high)] == [0, 1]


def test_check_finds_what_is_stale(tmp_path, monkeypatch, capsys):
    results, images = tmp_path / "results", tmp_path / "images"
    results.mkdir()
    monkeypatch.setattr(files, "RESULTS", results)
    monkeypatch.setattr(charts, "CHARTS", {name: charts.CHARTS[name] for name in ("layers", "training")})

    def measured(ratio):
        found = kernels(row("lora_linear", "bf16 base", {**FULL, "PEFT": ratio}))
        (results / f"{charts.LORA}-2026-01-02.json").write_text(json.dumps(found))

    measured(1.5)
    charts.main(["--out", str(images)])
    out = capsys.readouterr().out
    assert f"drawn: {images}/layers.svg" in out and f"not drawn: training: no result file {charts.METHODS}-" in out
    assert sorted(path.name for path in images.iterdir()) == ["layers.svg"]
    charts.main(["--check", "--out", str(images)])
    picture = (images / "layers.svg").read_bytes()
    (images / "layers.svg").write_bytes(picture.replace(b"L", b"L ", 1))
    with pytest.raises(SystemExit, match=r"^error: layers.svg in .*run python -m benchmarks\.charts$"):
        charts.main(["--check", "--out", str(images)])
    (images / "layers.svg").write_bytes(picture)
    measured(1.6)
    with pytest.raises(SystemExit, match=r"^error: layers.svg in"):
        charts.main(["--check", "--out", str(images)])
    (images / "layers.svg").unlink()
    with pytest.raises(SystemExit, match=r"^error: layers.svg in"):
        charts.main(["--check", "--out", str(images)])
    (results / f"{charts.LORA}-2026-01-02.json").unlink()
    (images / "layers.svg").write_bytes(picture)
    with pytest.raises(SystemExit, match=r"^error: layers.svg in"):  # no result file is left for this picture
        charts.main(["--check", "--out", str(images)])


def test_a_gpu_has_charts_of_its_own(tmp_path, monkeypatch, capsys):
    gpu = {"name": "NVIDIA Toy 80GB", "capability": "9.0", "multiprocessors": 4, "memory_gib": 80, "cuda": "13.0"}
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    peers = {**FULL, "Unsloth": 1.1}
    found = kernels(row("lora_linear", "NF4 base", peers, tokens=2048), gpu=gpu)
    (tmp_path / "layer-all-toy-2026-01-02.json").write_text(json.dumps(found))
    charts.main(["--out", str(tmp_path)])
    assert "not drawn: layers: no result file" in capsys.readouterr().out
    drawing = Drawing((tmp_path / "layers-nvidia-toy-80gb.svg").read_bytes())
    assert lengths(drawing, "nf4")["layers.nf4:LoRA:Unsloth"] == pytest.approx(1.1 / 0.8, rel=1e-4)
    assert "NVIDIA Toy 80GB, capability 9.0" in drawing.caption and "2048 tokens" in drawing.caption


# --- peft-ext bench ---------------------------------------------------------------------------------------------------


def bench(**changes):
    options = dict(method=["ia3", "lora"], base=["bf16"], hidden=64, tokens=8, rank=4, seconds=0.01, threads=1,
                   chart=None, as_json=False)  # fmt: skip
    command.bench(**{**options, **changes})


def test_bench_leaves_numbers_and_pictures(tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    bench(output=folder)
    out = capsys.readouterr().out
    assert out.endswith(f"written: {folder}/bench.json, {folder}/bench.svg\n")
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.svg"]
    document = json.loads((folder / "bench.json").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", document["machine"]["date"])
    drawing = Drawing((folder / "bench.svg").read_bytes())
    scale = set()
    for result in document["results"]:
        for name, ms in result["milliseconds"].items():
            bar = ("bench", {"ia3": "IA3", "lora": "LoRA"}[result["method"]], {"PEFT": "stock"}.get(name, name))
            scale.add(round(drawing.length(*bar) / ms / 10, 2))
    assert len(drawing.named("bench")) == 6 and max(scale) / min(scale) < 1.01


def test_bench_refuses_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(RunError, match=rf"^--output {tmp_path}/file/x: {tmp_path}/file is no folder$"):
        bench(output=tmp_path / "file" / "x")
    (tmp_path / "bench.json").mkdir()
    with pytest.raises(RunError, match=rf"^--output {tmp_path}/bench.json: Is a directory$"):
        bench(method=["ia3"], output=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "file"]


def test_a_chart_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "chart.svg"
    path.write_text("old")
    monkeypatch.setattr(command, "_drawn", lambda *rest: None)  # the write of the chart then raises, as on a disk error
    with pytest.raises(TypeError):
        bench(method=["ia3"], chart=path)
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["chart.svg"]
