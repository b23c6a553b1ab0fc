"""Tests of finetune's --config and --dry-run, of progress bars on a terminal, of the help, and of Ctrl-C."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

yaml = pytest.importorskip("yaml")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from commands import refused, said  # noqa: E402
from tiers import first  # noqa: E402
from tiny_run import rank_for  # noqa: E402

from peft_ext import quantize_nf4  # noqa: E402
from peft_ext import run as library  # noqa: E402
from peft_ext.cli import bench  # noqa: E402
from peft_ext.cli import plan as screen  # noqa: E402
from peft_ext.cli.main import main  # noqa: E402
from peft_ext.methods import METHODS  # noqa: E402
from peft_ext.run import Options, RunError, plan, progress, train  # noqa: E402
from peft_ext.run.config import FILE, merged, read_config, write_config  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("the command chooses the device itself")]
ROOT = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX terminals and signals")


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    """Widens the screen, so that no table folds the path of a test's folder."""
    monkeypatch.setenv("COLUMNS", "400")


# --- the file ---------------------------------------------------------------------------------------------------------

FULL = """\
# every kind of value
model: ./some/model
output: ~/out
method: dora
rank: 8
lr: 1e-4          # in YAML 1.1 this is a text
alpha: "16"
warmup: .5
target-modules: [q_proj, "v_proj"]
text_column: no
completion_column: 2020-01-01
prompt: >
  Two lines
  in one
max_steps:
gradient-checkpointing: yes
stock: False
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str | bytes) -> Path:
        (path := tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_values_have_the_types_of_the_options(written):
    assert (config := read_config(written(FULL), Options)).values == {
        "model": "./some/model", "output": Path("~/out").expanduser(), "method": "dora", "rank": 8, "lr": 1e-4,
        "alpha": 16.0, "warmup": 0.5, "target_modules": "q_proj,v_proj", "text_column": "no",
        "completion_column": "2020-01-01", "prompt": "Two lines in one\n", "stock": False,
        "gradient_checkpointing": True,
    }  # fmt: skip
    assert type(config.values["alpha"]) is float and config.lines["lr"] == 6
    for nothing in ("", "# a comment\n", "---\n", "\ufeff"):
        assert read_config(written(nothing), Options).values == {}


def test_flags_win_over_the_file_and_the_file_over_defaults(written):
    config = read_config(written("rank: 8\nepochs: 2\n"), Options)
    assert merged(Options(), config, {}) == Options(rank=8, epochs=2.0)
    assert merged(Options(), config, {"rank": 4}) == Options(rank=4, epochs=2.0)
    assert merged(Options(), config, {"max_steps": 3}) == Options(rank=8, max_steps=3)
    assert merged(Options(), None, {"seed": 1}) == Options(seed=1)


def test_the_command_hands_them_on(written, monkeypatch):
    seen = []
    for name in ("finetune", "dry_run"):
        monkeypatch.setattr(library, name, lambda options, name=name: seen.append((options, name)) or options.nothing)
    path = written("rank: 8\nseed: 3\nstock: true\ngradient_checkpointing: true\n")
    for arguments in (["--config", str(path), "--seed", "0", "--no-stock", "--dry-run"], []):
        with pytest.raises(AttributeError, match="nothing"):  # options.nothing raises the error, before a run
            main(["finetune", *arguments])
    # A flag overrules the file even where the flag's value is the default.
    assert seen == [(Options(rank=8, gradient_checkpointing=True), "dry_run"), (Options(), "finetune")]


BAD = [
    ("rank: 8\nlr: fast\n", "{path}:2: lr is the text 'fast', wanted a number"),
    ("rank: true\n", "{path}:1: rank is the text 'true', wanted a whole number"),
    ("rank: 1.5\n", "{path}:1: rank is the text '1.5', wanted a whole number"),
    ("seed: 1:30\n", "{path}:1: seed is the text '1:30', wanted a whole number"),
    ("seed: " + "9" * 5000 + "\n", "{path}:1: seed is the text '" + "9" * 37 + "...', wanted a whole number"),
    ("rank: 010\n", "{path}:1: rank is the text '010', wanted a whole number"),
    ("rank: 1_000\n", "{path}:1: rank is the text '1_000', wanted a whole number"),
    ("lr: nan\n", "{path}:1: lr is the text 'nan', wanted a number"),
    ("lr: .nan\n", "{path}:1: lr is the text '.nan', wanted a number"),
    ("quant: no\n", "--quant no: wanted one of nf4, mxfp4, nvfp4, fp8, int4, checkpoint, none ({path}:1)"),
    ("stock: 1\n", "{path}:1: stock is the text '1', wanted true or false"),
    ("model:\n", "{path}:1: model has no value, wanted text"),
    ("model: [a]\n", "{path}:1: model is a list, wanted text"),
    ("rank: {{a: 1}}\n", "{path}:1: rank is a mapping, wanted a whole number"),
    ("target_modules: []\n", "{path}:1: target_modules is a list, wanted text"),
    ("target_modules: [[a]]\n", "{path}:1: an item of target_modules is a list, wanted text"),
    ("rnk: 8\n", "{path}:1: no option 'rnk'; did you mean rank?"),
    ("learning_rate: 1\n", "{path}:1: no option 'learning_rate'; did you mean lr?"),
    ("on: 8\n", "{path}:1: no option 'on'; there are: " + ", ".join(
        name for name in Options.__dataclass_fields__ if name not in ("resume", "overwrite"))),
    ("? [a]\n: 1\n", "{path}:1: a list for a name, wanted the name of an option"),
    ("overwrite: true\n", "{path}:1: overwrite belongs to one call: give --overwrite on the command line"),
    ("batch_size: 2\nrank: 8\nbatch-size: 4\n", "{path}:3: batch_size is there twice, first in line 1: leave one out"),
    ("rank: 8\nlr: 1: 2\n", "{path}:2: not YAML: mapping values are not allowed here (column 6)"),
    ("rank: 8\n\tlr: 1\n", "{path}:2: not YAML: while scanning for the next token found character '\\t' that cannot "
     "start any token (column 1)"),
    ('prompt: "a\n', "{path}:2: not YAML: while scanning a quoted scalar found unexpected end of stream (column 1)"),
    ('prompt: "\\UFFFFFFFF"\n', None),
    ('prompt: "a\\0b"\n', "{path}:1: prompt has a NUL character in it"),
    ("- rank\n", "{path}:1: a list, wanted lines of name: value"),
    ("rank=8\n", "{path}:1: the text 'rank=8', wanted lines of name: value"),
    ("rank: 8\n---\nrank: 9\n", "{path}:2: not YAML: expected a single document in the stream but found another "
     "document (column 1)"),
    ("rank: &a 8\nseed: *a\n", "{path}:1: an anchor, an alias or a tag, wanted a plain value"),
    ("seed: *a\n", "{path}:1: an anchor, an alias or a tag, wanted a plain value"),
    ("target_modules: [*a, *a]\n", "{path}:1: an anchor, an alias or a tag, wanted a plain value"),
    ("model: !!python/object/apply:os.system [ls]\n", "{path}:1: an anchor, an alias or a tag, wanted a plain value"),
    ("model: !include a\n", "{path}:1: an anchor, an alias or a tag, wanted a plain value"),
    ("!!python/object:x {{}}\n", "{path}:1: an anchor, an alias or a tag, wanted a plain value"),
    ("[" * 100_000, "{path}:1: nested too deep, wanted lines of name: value"),
    ("model: " + "[" * 100_000, "{path}:1: nested too deep, wanted lines of name: value"),
    ("- " * 100_000, "{path}:1: nested too deep, wanted lines of name: value"),
    ("[[a]]\n", "{path}:1: a list, wanted lines of name: value"),
    ("output: ~nobody-of-this-name/a\nrank: x\n", "{path}:2: rank is the text 'x', wanted a whole number"),
    (b"model: \xff\n", "--config {path}: not UTF-8 text (byte 7)"),
    (b"model: a\x07\n", None),
    (b"#" * 1_000_001, "--config {path}: larger than 1,000,000 characters"),
]  # fmt: skip


@pytest.mark.parametrize("text, message", BAD, ids=range(len(BAD)))
def test_refuses_files(capsys, written, text, message):
    path = written(text.replace("{{", "{").replace("}}", "}") if isinstance(text, str) else text)
    found = refused(capsys, "finetune", "--config", path)
    if message is None:
        assert str(path) in found and "not YAML" in found
    else:
        assert found == message.format(path=path)


def test_refuses_what_is_no_file(capsys, tmp_path, monkeypatch):
    assert refused(capsys, "finetune", "--config", tmp_path / "no.yaml") == (
        f"--config {tmp_path}/no.yaml: No such file or directory"
    )
    assert refused(capsys, "finetune", "--config", tmp_path) == f"--config {tmp_path}: Is a directory"
    there = importlib.util.find_spec
    monkeypatch.setattr("peft_ext.run.errors.find_spec", lambda name: None if name == "yaml" else there(name))
    assert refused(capsys, "finetune", "--config", "a") == "--config needs yaml: pip install 'peft_ext[hf]'"


def test_nothing_of_a_file_is_run(capsys, written, tmp_path):
    mark = tmp_path / "mark"
    refused(capsys, "finetune", "--config", written(f"model: !!python/object/apply:os.mkdir [{mark}]\n"))
    assert not mark.exists()


def test_a_value_that_is_out_of_range_is_named_with_its_line(capsys, written):
    path = written("method: lora\nrank: 0\n")
    assert refused(capsys, "finetune", "--config", path) == f"--rank 0: wanted 1 to 2147483647 ({path}:2)"
    assert refused(capsys, "finetune", "--config", path, "--rank", -1) == "--rank -1: wanted 1 to 2147483647"
    path = written("max_steps: 3\nepochs: 1\n")
    assert refused(capsys, "finetune", "--config", path) == f"--max-steps and --epochs exclude each other ({path}:1)"
    assert refused(capsys, "finetune", "--stock", "--no-stock") == "--stock and --no-stock exclude each other"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--warmup", "inf"), "--warmup inf: wanted steps, or a fraction of them less than 1"),
        (("--warmup", "nan"), "--warmup nan: wanted steps, or a fraction of them less than 1"),
        (("--seed", "-1"), "--seed -1: wanted 0 to 4294967295"),
        (("--rank", "9999999999"), "--rank 9999999999: wanted 1 to 2147483647"),
    ],
)
def test_refuses_numbers_that_no_run_takes(capsys, arguments, message):
    assert refused(capsys, "finetune", *arguments) == message


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(model="no", data="1e-4", output=Path("a: b"), prompt="é\n# x: 'y' \"z\"\t\u2028", lr=1e-7, alpha=1e16),
        Options(epochs=0.1, target_modules="q_proj,v_proj", stock=True, gradient_checkpointing=True, seed=2**32 - 1),
    ],
)
def test_what_is_written_reads_as_it_was(tmp_path, options):
    write_config(tmp_path / FILE, replace(options, overwrite=True))
    assert merged(Options(), read_config(tmp_path / FILE, Options), {}) == options
    assert "overwrite:" not in (tmp_path / FILE).read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / FILE]


def small(tiny: Path, output: Path, *options: object) -> list[str]:
    given = ("--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--output", output, "--batch-size", 2,
             "--block-size", 64, *rank_for(options), "--max-steps", 3, *options)  # fmt: skip
    return ["finetune", *map(str, given)]


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory) -> Path:
    """Returns the folder of a finished run with checkpoints."""
    folder = tmp_path_factory.mktemp("done") / "out"
    assert main(small(tiny, folder, "--lr", "1e-3", "--seed", 5, "--blocksize", 128, "--save-steps", 2)) == 0
    return folder


# --- a dry run --------------------------------------------------------------------------------------------------------


def files(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Returns the size and the modification time of each file, by path, and (0, 0) for folders."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.is_file()} | {
        path: (0, 0) for path in found if path.is_dir()
    }


@pytest.fixture
def weightless(tiny, tmp_path) -> Path:
    """Returns a copy of the tiny model's folder in which the weight file can't be read."""
    folder = tmp_path / "weightless"
    folder.mkdir()
    for path in (tiny / "model").iterdir():
        content = b"not a weight" if path.suffix == ".safetensors" else path.read_bytes()
        (folder / path.name).write_bytes(content)
    return folder


def dry(capsys, *command: object) -> str:
    out = said(capsys, *command, "--dry-run")
    assert "\x1b" not in out
    return out


def rows_of(out: str) -> dict[str, str]:
    """Returns the lines of tables, by the text of the first column."""
    lines = [line.strip() for line in out.splitlines() if "  " in line.strip()]
    return {head: rest.strip() for head, _, rest in (line.partition("  ") for line in lines)}


def test_a_dry_run_reads_no_weight_and_writes_nothing(capsys, tiny, weightless, tmp_path, monkeypatch):
    import safetensors.torch
    from transformers import PreTrainedModel

    def forbidden(*args, **kwargs):
        raise AssertionError("a dry run reads no weight and trains nothing")

    for where, name in ((PreTrainedModel, "from_pretrained"), (safetensors.torch, "load_file"), (torch, "load"),
                        (train, "train"), (torch.optim.AdamW, "step")):  # fmt: skip
        monkeypatch.setattr(where, name, forbidden)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    before = files(tmp_path, tiny)
    out = dry(capsys, *small(tiny, Path("outputs/x"), "--model", weightless, "--save-steps", 2))
    assert files(tmp_path, tiny) == before and not list(work.iterdir())
    assert out.startswith("dry run: no weight is read, nothing is written\n")
    rows = rows_of(out)
    assert rows["model"] == f"{weightless}, LlamaForCausalLM, 90,560 parameters"
    assert rows["method"].startswith("lora, 8,192 trainable parameters, 9.046% of")
    assert rows["to train on"] == "22 examples, 638 tokens" and rows["held out"] == "2, 57 tokens"
    assert rows["steps"] == "3, 0.273 epochs" and rows["of a step"] == "2 examples, 58 tokens on average"
    assert rows["14"].split() == ["LoRA", "over", "NF4Linear", "yes", "q_proj,", "k_proj,", "v_proj,", "o_proj,",
                                  "gate_proj,", "up_proj,", "down_proj"]  # fmt: skip
    assert set(screen._KINDS.values()) <= set(rows) and "needed, at least" in rows and "this machine has" in rows
    assert rows["would write"].startswith("outputs/x: adapter_model.safetensors (")


@pytest.mark.parametrize("method", first(METHODS, ("lora", "qlora", "prompt", "diff-pruning")))
def test_the_plan_is_what_the_run_is(tiny, tmp_path, method, monkeypatch):
    if method == "dora":
        pytest.importorskip("bitsandbytes")
    seen = []
    monkeypatch.setattr(screen, "show_plan", seen.append)
    assert main(small(tiny, tmp_path / "out", "--method", method, "--dry-run")) == 0
    (found,) = seen
    run, adapter = found.run, found.adapter
    from peft_ext import explain
    from peft_ext.files import save_adapter

    model = train.adapt(run, train.load_base(run))
    assert adapter.rows == list(explain(model).rows)
    assert adapter.trainable == run.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parameters == 90_560 and found.load_bytes == 2 * 90_560
    assert found.steps == 3 and found.longest == max(len(e["input_ids"]) for e in run.examples.train)
    save_adapter(model, tmp_path / "saved")
    header = (tmp_path / "saved/adapter_model.safetensors").stat().st_size - adapter.adapter_bytes
    assert 0 < header < 20_000  # the header has names and shapes of the tensors
    assert adapter.memory.total > 0 and found.needed_bytes > adapter.memory.total
    held = adapter.memory.weights + adapter.memory.quantization + adapter.memory.adapters
    assert found.check_bytes == 2 * 90_560 + held and found.needed_bytes >= found.check_bytes + found.held_bytes


def test_the_plan_has_the_second_base_of_the_last_check(tiny, tmp_path, monkeypatch):
    """A run with small steps needs the most memory in the last check, which loads the base a second time."""
    seen = []
    monkeypatch.setattr(screen, "show_plan", seen.append)
    arguments = small(tiny, tmp_path / "out", "--quant", "none", "--dry-run")
    assert main(arguments) == 0
    (found,) = seen
    run = found.run
    model, fresh = train.adapt(run, train.load_base(run)), train.load_base(run)
    both = sum(p.nbytes for one in (model, fresh) for p in one.parameters())
    assert found.load_bytes < both <= found.check_bytes <= found.needed_bytes - found.held_bytes
    small_step = replace(found.adapter.memory, total=found.load_bytes)
    free = replace(found, adapter=replace(found.adapter, memory=small_step), free_bytes=found.check_bytes - 1,
                   held_bytes=0)  # fmt: skip
    assert "it needs more memory than is free; --quant nf4 or a smaller model" in "".join(screen._remarks(free))


def test_the_plan_of_stock_peft_fuses_nothing(capsys, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    rows = rows_of(dry(capsys, *small(tiny, tmp_path / "out", "--stock")))
    assert rows["14"].split()[:4] == ["LoRA", "over", "Linear4bit", "no"] and rows["14"].endswith("--stock")


@pytest.mark.slow
def test_a_dry_run_of_a_resumed_run(capsys, done, tiny):
    before = files(done)
    rows = rows_of(dry(capsys, "finetune", "--config", done / FILE, "--resume", "--max-steps", 9))
    assert rows["steps"].startswith("9, ")
    assert rows["steps"].partition("; ")[2] == f"3 done, 6 to go, from {done}/checkpoints/checkpoint-3"
    rows = rows_of(dry(capsys, "finetune", "--config", done / FILE, "--overwrite"))
    assert rows["would replace"] == f"the run in {done}" and files(done) == before
    names = [part.split()[0] for part in rows["would write"].partition(": ")[2].split(", ")]
    assert len(names) == 5 and set(names) <= {path.name for path in done.iterdir()}


def test_a_dry_run_refuses_what_the_run_refuses(capsys, done, tiny, tmp_path):
    def message(*options: object, output: Path = tmp_path / "out") -> str:
        asked = small(tiny, output, *options)
        found = refused(capsys, *asked, "--dry-run")
        assert found == refused(capsys, *asked) and not (tmp_path / "out").exists()
        return found

    assert message(output=done).startswith(f"--output {done}: not empty")
    assert message("--resume", "--rank", 8, output=done).startswith("--resume: --")
    assert main(["finetune", "--config", str(done / FILE), "--resume", "--max-steps", "2", "--dry-run"]) == 2
    assert "error: --resume: checkpoint-3 has 3 steps, more than the 2 steps of this run" in capsys.readouterr().err
    assert message("--block-size", 512) == "--block-size 512: the model takes at most 256 tokens"
    assert message("--target-modules", "nothing").startswith("--method lora: Target modules {'nothing'} not found")
    assert message("--data", tmp_path / "no.jsonl") == f"--data {tmp_path}/no.jsonl: no such file or folder"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "model/config.json").read_bytes())
    assert message("--model", folder) == (
        f"--model {folder}: no .safetensors file in this folder, wanted the model's weights"
    )
    (folder / "model.safetensors").write_bytes(b"")
    assert message("--model", folder).startswith(f"--model {folder}: no tokenizer (")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 0}')
    assert message("--model", folder).startswith(f"--model {folder}: ")
    (folder / "config.json").write_text("{")
    assert message("--model", folder).startswith(f"--model {folder}: {folder / 'config.json'}:1: not JSON: ")


def test_weights_that_are_broken_or_not_there_are_one_line(capsys, tiny, weightless, tmp_path):
    from safetensors.torch import load_file, save_file

    found = []

    def run() -> str:
        code = main(small(tiny, tmp_path / "out", "--model", weightless))
        found[:] = [capsys.readouterr().err]
        assert code == 2 and found[0].count("\n") == 1 and not (tmp_path / "out").exists()
        return found[0]

    assert run().startswith(f"error: --model {weightless}: ")
    weights = load_file(tiny / "model/model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, weightless / "model.safetensors", metadata={"format": "pt"})
    assert run() == f"error: --model {weightless}: the files lack model.norm.weight, which would be random\n"


@pytest.mark.slow
def test_the_plan_warns_where_memory_does_not_do(capsys, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "memory_of", lambda device: (2**20, 2**18, 0))
    out = dry(capsys, *small(tiny, tmp_path / "out", "--quant", "none"))
    assert "warning: it needs more memory than is free; --quant nf4 or a smaller --batch-size" in out
    monkeypatch.setattr(plan, "memory_of", lambda device: (2**40, 2**40, 0))
    assert "warning" not in dry(capsys, *small(tiny, tmp_path / "out"))


def test_a_step_that_cannot_be_traced_is_said(capsys, tiny, tmp_path, monkeypatch):
    seen = []

    def fails(*args, **kwargs):
        seen.append((kwargs["sequence_length"], kwargs["padding"], kwargs["gradient_checkpointing"]))
        raise RuntimeError("estimate_memory: an operator\nwithout a meta kernel")

    monkeypatch.setattr("peft_ext.memory.estimate_memory", fails)
    assert "a step's memory could not be estimated: an operator\n" in dry(capsys, *small(tiny, tmp_path / "out"))
    dry(capsys, *small(tiny, tmp_path / "out", "--data", tiny / "docs.txt", "--gradient-checkpointing"))
    # Batches of conversations are padded, batches of blocks are not.
    assert seen == [(30, True, False), (64, False, True)]


# --- help -------------------------------------------------------------------------------------------------------------

# For each command: the most lines of its help at 100 columns and at 80 columns.
HELP = {"": (31, 31), "doctor": (16, 18), "report": (16, 16), "finetune": (66, 90), "merge": (34, 52),
        "export": (24, 30), "recommend": (22, 30), "explain": (26, 33), "chat": (22, 26),
        "bench": (24, 28)}  # fmt: skip


@pytest.mark.parametrize("command", HELP)
def test_the_help_fits_a_screen(capsys, monkeypatch, command):
    for columns, most in zip(("100", "80"), HELP[command], strict=True):
        monkeypatch.setenv("COLUMNS", columns)
        capsys.readouterr()
        assert main([*command.split(), "--help"]) == 0
        out, err = capsys.readouterr()
        assert err == "" and len(out.splitlines()) <= most
        assert command or all(name in out for name in HELP)


def test_finetune_shows_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["finetune", "--help"]) == 0
    out = capsys.readouterr().out
    names = [*Options.__dataclass_fields__, "config", "dry_run"]
    assert [name for name in names if f"--{name.replace('_', '-')} " not in out] == []


# --- progress ---------------------------------------------------------------------------------------------------------


def on_a_terminal(code: str, *, interrupt_at: bytes = b"", seconds: float = 600) -> tuple[int, str]:
    """Runs Python ``code`` with a terminal as its three streams; returns the exit code and the output."""
    import fcntl
    import pty
    import select
    import struct
    import termios

    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    code = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT / "tests")}
    run = subprocess.Popen([sys.executable, "-c", code], stdin=there, stdout=there, stderr=there, cwd=ROOT, env=env)
    os.close(there)
    shown, end, sent = b"", time.monotonic() + seconds, False
    try:
        while time.monotonic() < end:
            if select.select([here], [], [], 0.5)[0]:
                try:
                    part = os.read(here, 65536)
                except OSError:  # the other side of the terminal was closed
                    break
                if not part:
                    break
                shown += part
            if interrupt_at and not sent and interrupt_at in shown:
                run.send_signal(signal.SIGINT)
                sent = True
        return run.wait(timeout=120), shown.decode(errors="replace")
    finally:
        run.kill()
        os.close(here)


@pytest.mark.slow
@posix
def test_a_run_again_from_its_file_with_bars_and_ctrl_c_on_a_terminal(done, tmp_path):
    """The test runs its commands in one process, because starting a process takes most of the time."""
    again, dense = str(tmp_path / "again"), str(tmp_path / "dense")
    code = (
        "import sys\n"
        "from peft_ext.cli.main import main\n"
        f"assert main(['finetune', '--config', {str(done / FILE)!r}, '--output', {again!r}]) == 0\n"
        "print('MERGE', flush=True)\n"
        f"assert main(['merge', '--adapter', {again!r}, '--output', {dense!r}]) == 0\n"
        "print('BENCH', flush=True)\n"
        "assert main('bench --hidden 64 --tokens 8 --rank 4 --seconds 0.01 --method ia3'.split()) == 0\n"
        "print('INTERRUPTED', flush=True)\n"
        "sys.exit(main('bench --hidden 512 --rank 4 --seconds 3000 --method lora --base bf16'.split()))\n"
    )
    returned, shown = on_a_terminal(code, interrupt_at=b"timing lora")
    assert returned == 130, shown
    training, rest = shown.split("MERGE")
    merging, rest = rest.split("BENCH")
    benching, interrupted = rest.split("INTERRUPTED")
    assert "loading the model" in training  # the text of a status line
    assert "quantizing:" in training and "held-out loss:" in training
    assert " 2/3 [" in training and "  lr 1.0e-03  " in training  # the Trainer's bar, with loss and learning rate
    assert "'loss'" not in training and "step 1/3" not in training
    assert "merging:" in merging and "B/s]" in merging
    assert "timing ia3 over bf16:" in benching and "timing ia3 over nf4:" in benching and "1/2 [" in benching
    assert interrupted.endswith("error: interrupted\r\n") and "Traceback" not in interrupted
    same_run(done, tmp_path / "again")


def same_run(first: Path, again: Path) -> None:
    old, new = (json.loads((folder / "run.json").read_text()) for folder in (first, again))
    assert new["losses"] == old["losses"] and new["perplexity"] == old["perplexity"]
    assert {k for k, v in old["options"].items() if v != new["options"][k]} == {"output"}
    assert old["options"]["seed"] == 5  # the file's seed is not the default
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (first / name).read_bytes()


def test_the_file_of_a_run_does_not_replace_it(capsys, done):
    assert refused(capsys, "finetune", "--config", done / FILE).startswith(
        f"--output {done}: not empty; --resume continues"
    )


def test_no_bar_without_a_terminal(capsys):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantize_nf4(model)
    assert list(progress.bar([1, 2], "text", "item")) == [1, 2]
    bench.bench(method=["ia3"], base=["bf16"], hidden=64, tokens=8, rank=4, seconds=0.01, threads=1, chart=None,
                as_json=True)  # fmt: skip
    assert capsys.readouterr().err == ""


def test_a_bar_is_cleared_where_the_loop_ends(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(RunError):
        for item in progress.bar(["a", "b"], "text", "item", str.upper):
            if item == "b":
                raise RunError("here")
    err = capsys.readouterr().err
    assert "text A:   0%" in err and "text B:  50%" in err and "1/2" in err and err.endswith("\r")


def test_report_draws_it_again(capsys, done):
    path = done / "report.html"
    first = path.read_bytes()
    path.unlink()
    assert main(["report", str(done)]) == 0
    assert capsys.readouterr().out == f"report: {path}\n" and path.read_bytes() == first
    assert main(["report", str(done / "no")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {done}/no/run.json: No such file")


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["merge", "bench", "chat", "explain", "recommend", "finetune", "doctor", "report"])
def test_ctrl_c_is_130_and_one_line(capsys, monkeypatch, tmp_path, name):
    import importlib

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(f"peft_ext.cli.{name}"), name, interrupted)
    needed = {
        "merge": ["--adapter", "a", "--output", "b"],
        "chat": ["--adapter", "a"],
        "explain": ["a"],
        "report": ["a"],
    }
    assert main([name, *needed.get(name, [])]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: interrupted\n")


def test_ctrl_c_while_a_module_is_imported(capsys, monkeypatch):
    class Interrupts:
        def find_spec(self, name, *rest):
            if name == "peft_ext.cli.bench":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "peft_ext.cli.bench")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert main(["bench"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
