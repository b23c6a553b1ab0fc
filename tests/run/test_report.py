"""Tests that report.html shows a run's measurements and escapes all texts, and that a browser makes no request."""

import json
import math
import os
import re
import shutil
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_run import finetune, needs_hf

from peft_ext.run import RunError, evaluate, redraw, render
from peft_ext.run.report import curves, page
from peft_ext.run.report.figures import short

pytestmark = pytest.mark.cpu_only("the commands choose the device themselves")
SECTIONS = (
    "summary", "curves", "samples", "memory", "check", "layers", "size", "time", "configuration", "machine", "figures",
)  # fmt: skip
CHARTS = ("loss", "held-out", "lr", "speed")
EVIL = '<script>window.hacked = 1</script>"\'><img src=x onerror="window.hacked = 1">'


def document(steps: int = 60, **changes) -> dict:
    """Returns an example of the content of run.json, for a finished run of ``steps`` steps."""
    losses = [3 - i / steps + 0.2 * math.sin(7 * i) for i in range(steps)]
    held_out = {steps * i // 5: 2.9 - i / 20 for i in range(1, 5)}
    made = {
        "options": {"model": "some/model", "method": "lora", "data": "a.jsonl", "rank": 8, "lr": None, "stock": False},
        "changed": ["rank"], "learning_rate": 2e-4, "trainable_parameters": 1000, "parameters": 100_000,
        "versions": {"torch": "2.13"}, "machine": {"cpu": "some CPU", "threads": 2},
        "examples": {"train": 374, "held_out": 42, "kind": "text", "cut": 0},
        "started": "2026-01-02T03:04:05+00:00", "steps_wanted": steps, "new_tokens": 48, "seconds": {"train": 75.0},
        "tokens_per_s": 357.4, "median_step_s": 2.87, "peak_mib": 2335.0, "peak_cuda_mib": None,
        "losses": losses, "steps": steps, "finished": True, "perplexity": {"before": 22.2, "after": 20.12},
        "history": {
            "step": list(range(1, steps + 1)), "learning_rate": [2e-4 * (1 - i / steps) for i in range(steps)],
            "step_s": [2.5] * steps, "tokens": [1000 + i % 7 for i in range(steps)],
            "held_out_loss": [held_out.get(i) for i in range(1, steps + 1)],
        },
        "held_out": {"examples": 12, "first": [0, 3.1], "last": [steps, 2.7]},
        "samples": [{"prompt": "Why?", "before": "No.", "after": "Because."}],
        "memory": {"frozen": 100 * 2**20, "adapter": 2**20, "gradients": 2**20, "optimizer": 2 * 2**20},
        "fused": {"layers": 14, "fused": 12, "reasons": ["too wide"], "groups": [
            {"kind": "LoRA over NF4Linear", "fused": True, "reason": "", "layers": 12, "first": "layers.0.q_proj"},
            {"kind": "LoRA over Linear", "fused": False, "reason": "too wide", "layers": 2, "first": "lm_head"},
        ]},
        "check": {"max_difference": 0.0, "bound": 0.5, "ok": True, "accelerated_difference": 0.25},
        "adapter_bytes": 19_600_000,
    }  # fmt: skip
    return {**made, **changes}


class Parsed(HTMLParser):
    """Parses a page into tags, texts, and the data and paths of each chart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts, self.charts, self.paths, self._figure = [], [], {}, {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.tags.append((tag, at))
        if tag == "figure":
            self._figure = at["id"].removeprefix("chart-")
        if "data-chart" in at:
            self.charts[self._figure] = json.loads(at["data-chart"])
        if tag == "path":
            self.paths.setdefault(self._figure, []).append((at["class"], at["d"]))

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


# --- the page of a document -------------------------------------------------------------------------------------------


def test_every_section_shows_its_figures():
    parsed = Parsed(render(document()))
    ids = [at["id"] for tag, at in parsed.tags if tag == "section"]
    assert tuple(ids) == SECTIONS
    for wanted in ("22.2 → 20.12", "−9.4%", "1,000", "1% of the base's 100,000", "357 tokens/s", "2.28 GiB", "19.6 MB",
                   "1 min 15 s", "12 of 42 held-out examples", "12 of 14", "too wide", "Because.", "2.13", "--rank",
                   "2e-4, the method's", "finished: 60 steps", "2026-01-02 03:04:05 UTC", "2.18 GiB"):  # fmt: skip
        assert wanted in parsed.text, wanted
    changed = [at for tag, at in parsed.tags if tag == "span" and at.get("class") == "chip"]
    assert len(changed) == 1 and "1 of 6 options are not the defaults" in parsed.text
    assert [tag for tag, _ in parsed.tags if tag in ("h1", "title", "main")] == ["title", "main", "h1"]
    tables = sum(tag == "table" for tag, _ in parsed.tags)
    assert tables == sum(tag == "caption" for tag, _ in parsed.tags) >= 8
    assert all("aria-label" in at for tag, at in parsed.tags if tag == "svg")


def test_curves_are_the_run():
    given = document()
    parsed = Parsed(render(given))
    assert tuple(parsed.charts) == CHARTS
    raw, smooth, held_out = parsed.charts["loss"]["s"]
    assert raw["x"] == given["history"]["step"] and raw["y"] == pytest.approx(given["losses"], rel=1e-4)
    assert held_out["x"] == [0, 12, 24, 36, 48, 60] and held_out["y"] == [3.1, 2.85, 2.8, 2.75, 2.7, 2.7]
    assert smooth["y"] == pytest.approx(curves.smoothed(given["losses"], 5), rel=1e-4)
    assert parsed.charts["speed"]["s"][0]["y"][:2] == [400.0, 400.4]
    assert parsed.charts["speed"]["y"][0] == parsed.charts["lr"]["y"][0] == 0  # the axes of speed and lr begin at 0
    (low, high), values = parsed.charts["loss"]["y"], raw["y"] + held_out["y"]
    assert 0 < low < min(values) < max(values) < high
    assert f"the axis begins at {low:.3g}" in parsed.text
    (path,) = [d for kind, d in parsed.paths["loss"] if kind == "line raw"]
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    assert len(points) == 60
    for (x, y), step, loss in zip(points, raw["x"], given["losses"], strict=True):
        assert x == pytest.approx(1000 * step / 60, abs=0.06)
        assert y == pytest.approx(300 * (high - loss) / (high - low), abs=0.06)


def test_smoothing_is_a_weighted_mean_of_what_was():
    values = [2.0, 4.0, None, 6.0]
    smooth = curves.smoothed(values, 2)
    assert smooth[:3] == [2.0, (2 / 2 + 4) / (1 / 2 + 1), None]
    assert smooth[3] == pytest.approx((2 / 8 + 4 / 4 + 6) / (1 / 8 + 1 / 4 + 1))
    assert curves.smoothed([0.7] * 50, 5) == pytest.approx([0.7] * 50)


@pytest.mark.parametrize("steps", [1000, 20_000])
def test_a_long_run_is_a_small_page(steps):
    given = document(steps)
    given["losses"][steps // 2] = 99.0  # one step has an outlier
    text = render(given)
    assert len(text.encode()) < 200_000
    parsed = Parsed(text)
    raw = parsed.charts["loss"]["s"][0]
    if steps <= curves.MOST_POINTS:
        assert len(raw["x"]) == steps and raw["low"] is None
        return
    width = raw["width"]
    assert len(raw["x"]) == math.ceil(steps / width) <= 400
    assert max(raw["high"]) == 99.0 and f"each point is the mean of {width} steps" in parsed.text
    for i in (0, 7, len(raw["x"]) - 1):
        part = given["losses"][i * width : (i + 1) * width]
        found = (raw["low"][i], raw["y"][i], raw["high"][i])
        assert found == pytest.approx((min(part), sum(part) / len(part), max(part)), rel=1e-4)
    assert [kind for kind, _ in parsed.paths["loss"]].count("band raw") == 1


def test_what_is_not_finite_is_left_out_and_counted():
    given = document(10)
    given["losses"][3:5] = [math.nan, math.inf]
    given["perplexity"]["after"] = math.nan
    parsed = Parsed(render(given))
    assert "2 without a finite value are left out" in parsed.text
    assert not [d for paths in parsed.paths.values() for _, d in paths if re.search("nan|inf", d)]
    (path,) = [d for kind, d in parsed.paths["loss"] if kind == "line raw"]
    assert path.count("M") == 2  # the curve has a gap, which no line crosses
    assert parsed.charts["loss"]["s"][0]["y"][3:5] == [None, None]
    given["losses"] = [math.nan] * 10
    assert "Loss" in Parsed(render(given)).text


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({"options": {}}, "unfinished: 0 of – steps"),
        (document(1), "finished: 1 step "),
        (document(0, finished=False, steps_wanted=60), "unfinished: 0 of 60 steps"),
        (document(losses=[2.0] * 60), "finished: 60 steps"),
        ({"options": {"model": "m"}, "losses": [3.0, 2.0], "steps": 2, "finished": True}, "finished: 2 steps"),
        (document(check={"ok": False, "max_difference": 3.0, "bound": 0.5}), "stock PEFT re-reads it with another"),
        (document(peak_cuda_mib=900.0), "900 MiB of PyTorch's tensors on the GPU"),
        (document(peak_mib=50.0), "peak 50.0 MiB"),
        (document(resumed=[20, 40]), "resumed after step 20, 40"),
    ],
)
def test_a_page_of_what_there_is(given, wanted):
    parsed = Parsed(render(given))
    assert wanted in parsed.text
    assert tuple(at["id"] for tag, at in parsed.tags if tag == "section") == SECTIONS


def test_a_stopped_run_shows_what_it_has():
    given = document(finished=False, steps=30, steps_wanted=60, perplexity={"before": 22.2})
    given["samples"] = [{"prompt": "Why?", "before": "No.", "expected": "So."}]
    for name in ("check", "adapter_bytes"):
        del given[name]
    del given["held_out"]["last"]
    text = Parsed(render(given)).text
    for wanted in ("unfinished: 30 of 60 steps", "22.2 → –", "not asked: the run did not get there",
                   "Not checked: the run did not get there", "not saved"):  # fmt: skip
        assert wanted in text, wanted


def evil() -> dict:
    """Returns the content of a run.json in which each text value is the markup EVIL."""
    given = document(5)

    def spoil(value):
        if isinstance(value, dict):
            return {name: spoil(v) for name, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return EVIL if isinstance(value, str) else value

    spoiled = spoil(given)
    spoiled["versions"] = spoiled["seconds"] = {EVIL: 1.0}
    spoiled["options"] |= {EVIL: EVIL}
    spoiled["machine"] = {EVIL: EVIL}
    return spoiled


def test_texts_are_never_markup():
    own, parsed = Parsed(render(document(5))), Parsed(render(evil()))
    assert {tag for tag, _ in parsed.tags} <= {tag for tag, _ in own.tags}
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not [at for _, at in parsed.tags if any(name.startswith("on") for name in at)]
    assert parsed.text.count("window.hacked") >= 12
    # A lone surrogate can't be encoded.
    assert "\ufffd" not in render(document()) and "?" in render(document(started="\ud800"))


def test_the_page_asks_for_nothing():
    text = render(document())
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<(iframe|object|embed)", text)
    policy = next(at["content"] for tag, at in Parsed(text).tags if at.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


@pytest.mark.parametrize(
    "content, wanted",
    [
        (None, "No such file or directory, wanted the run.json of a run"),
        ("{", "not JSON"),
        ("[]", "no options in it"),
        ('{"options": 3}', "no options in it"),
        (
            '{"options": {}, "losses": [1.0], "history": {"step": [1, 2]}}',
            "not as a run writes it (1 losses of 2 steps)",
        ),
        ('{"options": {}, "samples": [3]}', "not as a run writes it"),
    ],
)
def test_a_folder_without_a_run_is_refused(tmp_path, content, wanted):
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError) as raised:
        redraw(tmp_path)
    assert wanted in str(raised.value) and "\n" not in str(raised.value) and "run.json" in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_numbers_have_four_digits():
    wanted = {0.99996: "1", 999.96: "1000", 9999.4: "9999", 9999.7: "10000", 123456.7: "123457", 1e6: "1e6"}
    assert {value: short(value) for value in wanted} == wanted
    assert short(-9999.7) == "−10000" and short(None) == short(float("nan")) == "–"


# --- the page of a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "NEW_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Returns the folder of a finished run of ten steps, with a checkpoint after the fifth step."""
    folder = tmp_path_factory.mktemp("report") / "run"
    assert finetune(tiny, folder, "--save-steps", "5", "--eval-fraction", "0.4", steps=10) == 0
    return folder


def read(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@needs_hf
def test_a_run_leaves_its_report(run):
    found = read(run)
    assert (run / "report.html").read_text() == render(found)
    history = found["history"]
    assert history["step"] == list(range(1, 11)) and all(s > 0 for s in history["step_s"] + history["tokens"])
    assert history["learning_rate"][-1] < max(history["learning_rate"]) == pytest.approx(2e-4)
    evaluated = {s: loss for s, loss in zip(history["step"], history["held_out_loss"], strict=True) if loss is not None}
    assert list(evaluated) == [2, 4, 6, 8] and found["held_out"]["last"][0] == 10
    first, last = found["held_out"]["first"][1], found["held_out"]["last"][1]
    assert last < evaluated[8] < evaluated[2] < first
    assert "evaluate in training" in found["seconds"]
    assert 4 <= found["held_out"]["examples"] < found["examples"]["held_out"]
    assert found["adapter_bytes"] == (run / "adapter_model.safetensors").stat().st_size
    asked = [sample["prompt"] for sample in found["samples"]]
    assert len(set(asked)) == 4 and all({"before", "after", "expected"} <= set(s) for s in found["samples"])
    assert found["answers"]["prompt"] == asked[0]
    assert {"rank", "model", "max_steps"} <= set(found["changed"]) and "lr" not in found["changed"]


@needs_hf
def test_memory_is_the_bytes_of_the_tensors(run):
    found, tensors = read(run), 28  # lora_A and lora_B of each of 14 layers
    memory, adapter = found["memory"], 4 * found["trainable_parameters"]
    assert memory["adapter"] == memory["gradients"] == adapter
    # Two moments of AdamW for each parameter, and a step count for each tensor.
    assert memory["optimizer"] == 2 * adapter + 4 * tensors
    hidden, inner, vocab = 64, 128, 258
    linear = 2 * (2 * hidden * hidden + 2 * hidden * 32 + 3 * hidden * inner)
    dense = 2 * (vocab * hidden + 5 * hidden)  # bytes of the tied embedding and of the norms
    assert found["parameters"] == linear + vocab * hidden + 5 * hidden
    scales = memory["frozen"] - dense - linear // 2
    # The other bytes are one byte for each NF4 block, the scales of these bytes, and the rotary tables.
    assert linear // 64 <= scales < linear // 64 + 20_000


@pytest.mark.slow
@needs_hf
def test_the_curve_costs_nothing_but_time(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "HELD_OUT_POINTS", 0)
    monkeypatch.setattr(evaluate, "curve_examples", lambda run: [0])
    assert finetune(tiny, tmp_path / "run", "--eval-fraction", "0.4", steps=10) == 0
    assert not any(read(tmp_path / "run")["history"]["held_out_loss"])
    assert read(tmp_path / "run")["losses"] == read(run)["losses"]
    same = [(folder / "adapter_model.safetensors").read_bytes() for folder in (run, tmp_path / "run")]
    assert same[0] == same[1]


@pytest.mark.slow
@needs_hf
def test_curves_go_on_in_a_resumed_run(run, tiny, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / "checkpoints/checkpoint-5", folder / "checkpoints/checkpoint-5")
    shutil.copy(run / "run.json", folder)
    assert finetune(tiny, folder, "--save-steps", "5", "--eval-fraction", "0.4", "--resume", steps=10) == 0
    whole, resumed = read(run), read(folder)
    assert resumed["losses"] == whole["losses"] and resumed["held_out"] == whole["held_out"]
    for column in ("step", "tokens", "held_out_loss", "learning_rate"):
        assert resumed["history"][column] == whole["history"][column], column
    assert resumed["history"]["step_s"][:5] == whole["history"]["step_s"][:5]
    assert whole["resumed"] == [] and resumed["resumed"] == [5]


@pytest.mark.slow
@needs_hf
@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_a_report_of_what_there_is(tiny, tmp_path, monkeypatch, capsys, times):
    losses = evaluate.held_out_losses

    def interrupted(run, model, chosen=None):
        for _ in range(times if chosen is not None else 0):
            signal.raise_signal(signal.SIGINT)
        return losses(run, model, chosen)

    monkeypatch.setattr(evaluate, "held_out_losses", interrupted)
    assert finetune(tiny, tmp_path / "run", steps=10) == 130
    found = read(tmp_path / "run")
    steps = 2 if times == 1 else 1  # a second Ctrl-C comes before the step is logged
    assert not found["finished"] and found["steps"] == len(found["losses"]) == steps
    text = Parsed((tmp_path / "run/report.html").read_text()).text
    assert f"unfinished: {steps} of 10 steps" in text
    assert ("report: " in capsys.readouterr().out) == (times == 1)


@pytest.mark.slow
@needs_hf
def test_a_run_is_not_lost_for_a_picture(tiny, tmp_path, monkeypatch, capsys):
    def broken(document):
        raise ZeroDivisionError("no\nink")

    monkeypatch.setattr(page, "render", broken)
    assert finetune(tiny, tmp_path / "run", steps=2) == 0
    out, err = capsys.readouterr()
    assert "warning: no report, it could not be drawn: ZeroDivisionError: no ink\n" in err and "report:" not in out
    assert read(tmp_path / "run")["finished"] and not (tmp_path / "run/report.html").exists()
    monkeypatch.undo()
    assert redraw(tmp_path / "run") == tmp_path / "run/report.html"
    assert "finished: 2 steps" in Parsed((tmp_path / "run/report.html").read_text()).text


# --- in a browser -----------------------------------------------------------------------------------------------------

_CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const worst = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
    if (["SCRIPT", "STYLE"].includes(e.tagName)) continue;
    let at = e, under;
    do { under = parse(getComputedStyle(at).backgroundColor); at = at.parentElement; } while (under[3] === 0 && at);
    const [a, b] = [light(parse(getComputedStyle(e).color).slice(0, 3)), light(under.slice(0, 3))];
    worst.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + " " + e.textContent.slice(0, 40)]);
  }
  return worst.sort((x, y) => x[0] - y[0]);
}"""


@pytest.fixture
def shown(browser):
    """Opens a file in a browser. At the end of the test the page must have no error and no request but the file."""
    contexts, complaints, requests, files = [], [], [], []

    def show(file: Path, width: int = 1200, scheme: str = "light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        files.append(file.as_uri())
        tab.goto(files[-1])
        return tab

    yield show
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == files


@pytest.fixture(scope="module")
def pages(run, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"short": document(1), "long": document(3000), "evil": evil()}
    for name, given in made.items():
        (folder / f"{name}.html").write_text(render(given))
    return {"run": run / "report.html", **{name: folder / f"{name}.html" for name in made}}


@needs_hf
@pytest.mark.parametrize("name", ["run", "short", "long", "evil"])
def test_it_is_drawn(shown, pages, name):
    tab = shown(pages[name])
    for section in SECTIONS:
        assert tab.locator(f"section#{section}").bounding_box()["height"] > 30, section
    for chart in CHARTS:
        box = tab.locator(f"#chart-{chart} .plot svg").bounding_box()
        assert box["width"] > 200 and box["height"] > 100
        sizes = tab.eval_on_selector_all(
            f"#chart-{chart} path.line", "all => all.map(p => [p.getBBox().width, p.getBBox().height])"
        )
        assert sizes and all(0 <= w <= 1001 and 0 <= h <= 301 for w, h in sizes)
        assert name == "short" or all(w > 500 for w, _ in sizes)
    assert tab.evaluate("window.hacked") is None


@needs_hf
@pytest.mark.parametrize("name", ["run", "long"])
def test_the_pointer_and_the_arrows_read_values_out(shown, pages, name):
    tab = shown(pages[name])
    plot, label = tab.locator("#chart-loss .plot"), tab.locator("#chart-loss .legend b")
    first = tab.locator("#chart-loss output").first
    data = json.loads(plot.get_attribute("data-chart"))
    before = tab.locator("#chart-loss .legend").inner_text()
    box = plot.bounding_box()
    tab.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 20)
    raw = data["s"][0]
    index = next(i for i, x in enumerate(raw["x"]) if x + raw["width"] > (data["x"][0] + data["x"][1]) / 2)
    step = raw["x"][index]
    wanted = f"step {step}" if raw["width"] == 1 else f"steps {step:,}–{step + raw['width'] - 1:,}"
    assert label.inner_text() == wanted
    assert first.inner_text().startswith(short(raw["y"][index]))
    assert tab.locator("#chart-loss .dot").count() == 3
    at = tab.locator("#chart-loss .at").bounding_box()
    assert at["x"] == pytest.approx(box["x"] + 0.5 * box["width"], abs=box["width"] / len(raw["x"]) + 1)
    tab.mouse.move(0, 0)
    assert tab.locator("#chart-loss .legend").inner_text() == before and tab.locator(".dot").count() == 0
    plot.focus()
    for key, index in (("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowLeft", 0), ("End", -1)):
        tab.keyboard.press(key)
        assert first.inner_text().startswith(short(raw["y"][index])), key


@needs_hf
@pytest.mark.parametrize("name", ["run", "long", "evil"])
def test_a_narrow_screen_shows_all_of_it(shown, pages, name):
    tab = shown(pages[name], width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    out = "all => all.filter(e => { const b = e.getBoundingClientRect(); return b.left < 0 || b.right > 360; }).length"
    assert tab.eval_on_selector_all(".plot span, h1, h2, dd, .said, th, caption", out) == 0
    apart = """all => all.slice(1).every((e, i) => e.parentElement !== all[i].parentElement ||
      e.getBoundingClientRect().left >= all[i].getBoundingClientRect().right + 2)"""
    assert tab.eval_on_selector_all(".plot .x", apart)


@needs_hf
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "evil"])
def test_texts_stand_out(shown, pages, name, scheme):
    tab = shown(pages[name], scheme=scheme)
    tab.eval_on_selector("details", "d => { d.open = true; }")
    found = tab.evaluate(_CONTRAST)
    assert len(found) > 80 and found[0][0] >= 4.5, found[:3]
    ink, paper = tab.evaluate("['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])")
    darker = sum(map(int, re.findall(r"\d+", ink)[:3])) < sum(map(int, re.findall(r"\d+", paper)[:3]))
    assert darker == (scheme == "light")


@needs_hf
def test_it_prints_in_ink_on_paper_with_its_tables_open(shown, pages, tmp_path):
    tab = shown(pages["run"], scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate(_CONTRAST)[0][0] >= 4.5
    pdf = tab.pdf()
    assert len(pdf) > 10_000 and tab.evaluate("document.querySelector('details').open")
