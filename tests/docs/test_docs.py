"""Tests of the documents: every Python block runs, every command parses, every link has a target, and every public name
is in the reference.

    PEFT_EXT_REDRAW=1 python -m pytest tests/docs/test_docs.py

draws the option tables of docs/cli.md again. ``make docs`` builds the site with all its links and references, and
treats warnings as errors.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional
from urllib.parse import unquote

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import fully_shard

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")
pytest.importorskip("aenum")

import peft
import transformers as hf
import typer
from tiers import first

import peft_ext
from peft_ext.cli.main import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)])
COMMANDS = typer.main.get_command(app)

pytestmark = pytest.mark.cpu_only("documents are the same for every device")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # line number of the block's first line
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


_FENCE = re.compile(r"^(`{3,}|~{3,})(.*)$")


def blocks(page: Path) -> Iterator[Block]:
    """Yields the fenced blocks of a page."""
    opened: Optional[tuple[str, str, int]] = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None:
            if fence:
                opened, lines = (fence[1], fence[2].strip(), number + 1), []
        elif fence and fence[1].startswith(opened[0]) and not fence[2].strip():
            yield Block(page, opened[2], opened[1], "\n".join(lines) + "\n")
            opened = None
        else:
            lines.append(line)
    assert opened is None, f"{page}:{opened[2]}: the block has no end"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_the_collector_finds_blocks_and_what_is_in_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nx = 1\n```\n\n````md\n```bash\nls\n```\n````\n```bash\n$ ls\n```\n")
    found = list(blocks(page))
    assert [(b.language, b.line) for b in found] == [("python", 3), ("md", 7), ("bash", 12)]
    assert found[0].text == "x = 1\n" and found[1].text == "```bash\nls\n```\n"


# --- Python -----------------------------------------------------------------------------------------------------------


def _readme() -> dict[str, Any]:
    """Returns the names that README's code assumes: a model and its configuration, data, tensors of a layer."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    linear = nn.Linear(64, 96)
    return {
        "peft": peft,
        "transformers": hf,
        "model": hf.LlamaForCausalLM(config),
        "lora_config": peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        "args": hf.TrainingArguments("run", use_cpu=True, report_to=[]),
        "data": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}],
        "linear": linear,
        "weight": linear.weight,
        "x": torch.randn(8, 64, requires_grad=True),
        "lora_A": torch.randn(16, 64),
        "lora_B": torch.randn(96, 16),
        "magnitude": torch.ones(96),
    }


def _scaling() -> dict[str, Any]:
    """Returns the names of a program that torchrun started: a group of one process, and a function that loads the
    base.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names = {name: getattr(state_dict, name) for name in ("StateDictOptions", "get_model_state_dict")}
    return {
        "peft_ext": peft_ext,
        "dist": dist,
        "fully_shard": fully_shard,
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "load_base": lambda: _readme()["model"],
        "config": peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        "folder": "adapter",
        **names,
    }


def _small_model() -> dict[str, Any]:
    """Makes a small model in the folder my/model, and data of questions and answers."""
    from tiny_run import write_tiny_model

    write_tiny_model(Path("my/model"))
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(24)]
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {}


def _packed_checkpoints() -> dict[str, Any]:
    """Makes tiny checkpoints under the names of the checkpoints that the page loads."""
    import packed_checkpoints as pc

    pc.write_gpt_oss(Path("openai/gpt-oss-20b"))
    pc.write(Path("Qwen/Qwen3-8B-FP8"), "fp8", "qwen3")
    pc.write(Path("Qwen/Qwen2.5-7B-Instruct-AWQ"), "awq")
    return {}


def _gguf() -> dict[str, Any]:
    """Makes a tiny GGUF file under the name that the page loads."""
    from tiny_gguf import tiny_model, write_tiny_gguf

    write_tiny_gguf("model.gguf", tiny_model(), "Q8_0")
    return {}


BEFORE = {
    "docs/gguf.md": _gguf,
    "README.md": _readme,
    "docs/scaling.md": _scaling,
    "docs/cli.md": _small_model,
    "docs/lesson.md": _small_model,
    "docs/formats.md": _packed_checkpoints,
}
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
# Pages whose code takes seconds: the lesson trains, cli.md traces a training step of 7 billion parameters.
OF_SECONDS = {DOCS / "lesson.md", DOCS / "cli.md", *(DOCS / "methods").glob("*.md")} - {DOCS / "methods/lora.md"}


@pytest.mark.parametrize("page", first(WITH_PYTHON, {*WITH_PYTHON} - OF_SECONDS), ids=name)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace. A block that begins with ``>>>`` shows its output."""
    monkeypatch.chdir(tmp_path)
    before = BEFORE.get(name(page))
    namespace: dict[str, Any] = {"__name__": "__main__", **(before() if before else {})}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers and PEFT warn about names that they will change
            for block in blocks(page):
                if block.language == "python":
                    _run(block, namespace)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _run(block: Block, namespace: dict[str, Any]) -> None:
    if block.text.startswith(">>>"):
        test = doctest.DocTestParser().get_doctest(block.text, {}, block.where, str(block.page), block.line - 1)
        test.globs = namespace  # get_doctest copies the namespace, which the blocks of a page share
        said: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
        runner.run(test, out=said.append, clear_globs=False)
        assert runner.summarize(verbose=False).failed == 0, "".join(said)
        return
    # Pads the code so that line numbers of a traceback are those of the page.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", flags=0, dont_inherit=True)
    exec(code, namespace)


def test_a_wrong_output_and_a_wrong_name_fail(tmp_path: Path) -> None:
    block = Block(ROOT / "page.md", 1, "python", ">>> x + 1\n3\n")
    _run(block, {"x": 2})
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+4"):
        _run(block, {"x": 3})
    with pytest.raises(NameError):
        _run(Block(ROOT / "page.md", 1, "python", "y\n"), {})


def test_languages_are_known_ones() -> None:
    """Tests the language names of code blocks, because a Python block under another language name would not run."""
    known = {"python", "bash", "text", "diff", "json", "yaml", "cpp", "bibtex", "svg"}
    for page in PAGES:
        for block in blocks(page):
            assert block.language in known or block.language.startswith("{"), f"{block.where}: {block.language!r}"


def test_docstrings_have_no_examples_that_nothing_runs() -> None:
    """Runs the examples in docstrings; at present no docstring has an example."""
    failed = 0
    for module in sorted({m for m in sys.modules if m.split(".")[0] == "peft_ext"}):
        for test in doctest.DocTestFinder(exclude_empty=True).find(sys.modules[module], module):
            if test.examples:
                failed += doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed
    assert failed == 0


# --- commands ---------------------------------------------------------------------------------------------------------


def shell_lines(text: str) -> Iterator[list[str]]:
    """Yields the words of each command, without comments and without variables that are set before the command."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\|\||[|;])\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def check_command(words: list[str]) -> Optional[str]:
    """Returns what is wrong with a command that a document shows, or None."""
    program, *rest = words
    if program == ".":
        return None if rest[0].endswith("/bin/activate") else f"{rest[0]} is no script of an environment"
    program = {"python3": "python"}.get(Path(program).name, Path(program).name)
    if program == "srun":
        return check_command(rest[next(i for i, word in enumerate(rest) if not word.startswith("-")) :])
    if program == "torchrun" and "peft_ext" in rest:
        place = rest.index("peft_ext")
        return _check_cli(rest[place + 1 :]) if rest[place - 1] == "-m" else "peft_ext without -m before it"
    if program == "python" and rest[:2] == ["-m", "peft_ext"]:
        program, rest = "peft-ext", rest[2:]
    if program == "peft-ext":
        return _check_cli(rest)
    if program == "torchrun":
        script = next((word for word in rest if word.endswith(".py")), "")
        return None if (ROOT / script).is_file() else f"{script!r} is no file"
    if program == "make":
        targets = {t for line in (ROOT / "Makefile").read_text().splitlines()
                   if (found := re.match(r"([\w-]+(?: [\w-]+)*):(?!=)", line)) for t in found[1].split()}  # fmt: skip
        return next((f"make has no target {word!r}" for word in rest if "=" not in word and word not in targets), None)
    if program in ("python", "bash") and rest[0] != "-m":
        return None if (ROOT / rest[0]).is_file() else f"{rest[0]} is no file"
    if program == "python" and rest[1].split(".")[0] == "benchmarks":
        path = ROOT / rest[1].replace(".", "/")
        return None if path.is_dir() or path.with_suffix(".py").is_file() else f"{rest[1]} is no module"
    if program == "python":
        known = ("pytest", "venv", "pip", "peft_ext.verification")
        return None if rest[1] in known else f"{rest[1]} is no known module"
    if program == "pip":
        extras = re.findall(r"\[(\w+)\]", " ".join(rest))
        there = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        return next((f"there is no extra [{extra}]" for extra in extras if extra not in there), None)
    if program in ("llama-cli", "ollama"):
        return None  # programs of other projects, which take a GGUF file
    return None if program in ("ls", "cat", "cd", "git", "export", "printf") else f"{program} is no known program"


def _check_cli(arguments: list[str]) -> Optional[str]:
    if arguments and arguments[0] in ("--help", "--version"):
        return None
    if not arguments or arguments[0] not in COMMANDS.commands:
        return f"peft-ext has no command {arguments[:1]}"
    command = COMMANDS.commands[arguments[0]]
    if "--help" in arguments:
        return None
    try:
        command.make_context(arguments[0], list(arguments[1:]))
    except Exception as error:  # the error is typer's or click's, see peft_ext.cli.main
        if not hasattr(error, "format_message"):
            raise
        return error.format_message()
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_parses(page: Path) -> None:
    wrong = [
        f"{block.where}: {' '.join(words)}: {reason}"
        for block in blocks(page)
        if block.language == "bash"
        for words in shell_lines(block.text)
        if (reason := check_command(words))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line, said",
    [
        ("peft-ext finetune --learning-rate 1", "No such option: --learning-rate"),
        ("python -m peft_ext merge --output a", "Missing option"),
        ("peft-ext train", "no command"),
        ("peft-ext bench --hidden wide", "--hidden"),
        ("make everything", "no target 'everything'"),
        ("python docs/examples/none.py", "is no file"),
        ("python -m benchmarks.none", "is no module"),
        ("pip install '.[none]'", "no extra [none]"),
    ],
)
def test_a_wrong_command_fails(line: str, said: str) -> None:
    assert said in (check_command(next(shell_lines(line))) or "")


def test_inline_commands_and_options_exist() -> None:
    """Tests names of commands and options in running text: `peft-ext merge`, `peft-ext finetune --stock`."""
    wrong = []
    for page in PAGES:
        for command, options in re.findall(r"`peft-ext ([a-z]+)((?: --[a-z-]+)*)[^`]*`", page.read_text()):
            there = COMMANDS.commands.get(command)
            known = {o for p in there.params for o in (*p.opts, *p.secondary_opts)} if there else set()
            wrong += [f"{name(page)}: {command}"] * (there is None)
            wrong += [f"{name(page)}: {command} {o}" for o in options.split() if o not in {*known, "--help"}]
    assert not wrong, wrong


# --- docs/cli.md ------------------------------------------------------------------------------------------------------

_START, _END = "<!-- options of {0}: drawn by tests/docs/test_docs.py -->\n", "<!-- /options of {0} -->"


def _option_table(command: Any) -> str:
    parameters = [
        parameter
        for parameter in command.params
        if parameter.name != "help" and not getattr(parameter, "hidden", False)
    ]
    if not parameters:
        return "No options.\n"
    rows = [("option", "default", "what it is"), ("---", "---", "---")]
    for parameter in parameters:
        names = ", ".join(f"`{o}`" for o in (*parameter.opts, *parameter.secondary_opts))
        if not parameter.opts[0].startswith("-"):
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        default = parameter.default
        if parameter.required:
            default = "required"
        elif default is None or default is False:
            default = ""
        elif default is True:
            default = "on"
        else:
            default = f"`{default}`"
        rows.append((names, default, re.sub(r"(--[a-z-]+)", r"`\1`", (parameter.help or "").replace("|", r"\|"))))
    return "\n".join(f"| {' | '.join(row)} |".replace("  |", " |") for row in rows) + "\n"


def test_the_page_of_commands_has_every_command_and_its_options() -> None:
    page = DOCS / "cli.md"
    text = page.read_text()
    drawn = text
    for command in COMMANDS.commands:
        assert f"\n## {command}\n" in text, f"docs/cli.md has no section on {command}"
        start, end = _START.format(command), _END.format(command)
        assert text.count(start) == text.count(end) == 1, f"docs/cli.md has no {start.strip()}"
        before, _, rest = drawn.partition(start)
        drawn = f"{before}{start}\n{_option_table(COMMANDS.commands[command])}\n{end}{rest.partition(end)[2]}"
    headings = set(re.findall(r"^## ([a-z]+)$", text, re.MULTILINE))
    assert headings == set(COMMANDS.commands), "docs/cli.md has sections on commands that are not there"
    if os.environ.get("PEFT_EXT_REDRAW"):
        page.write_text(drawn)
    else:
        assert text == drawn, (
            "docs/cli.md is out of date; draw it: PEFT_EXT_REDRAW=1 python -m pytest tests/docs/test_docs.py"
        )


# --- links ------------------------------------------------------------------------------------------------------------

_LINK = re.compile(r"(?<!\\)\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|srcset|href)=\"([^\"]+)\"")


def anchors(page: Path) -> set[str]:
    """Returns GitHub's names of a page's headings."""
    found: dict[str, int] = {}
    text = re.sub(r"^(`{3,}).*?^\1`*\s*$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    names = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(slug if count == 0 else f"{slug}-{count}")
    return names


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    wrong = []
    text = re.sub(r"^(`{3,}).*?^\1`*\s*$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in (a or b for a, b in _LINK.findall(re.sub(r"`[^`\n]*`", "", text))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            wrong.append(f"{link}: there is no {target}")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            wrong.append(f"{link}: {name(target)} has no heading {anchor!r}")
    assert not wrong, "\n".join(wrong)


def test_files_that_the_documents_name_are_there() -> None:
    """Tests paths in running text: `csrc/linear/passes.h`, `tests/support/op_db.py`."""
    wrong = []
    for page in PAGES:
        for path in re.findall(r"`((?:csrc|peft_ext|tests|benchmarks|tools|docs)/[\w./-]+)`", page.read_text()):
            if not any(mark in path for mark in ("<", "*")) and not (ROOT / path).exists():
                wrong.append(f"{name(page)}: {path}")
    assert not wrong, "\n".join(wrong)


# --- the reference ----------------------------------------------------------------------------------------------------

# Modules whose __all__ is public, with the page that documents the names of the module.
PUBLIC = {
    "peft_ext": "peft_ext",
    "peft_ext.ops": "ops",
    "peft_ext.nn": "nn",
    "peft_ext.reference": "reference",
    "peft_ext.tuners": "tuners",
    "peft_ext.integrations.peft": "peft_ext",
    "peft_ext.integrations.transformers": "integrations",
    **({"peft_ext.integrations.trl": "integrations"} if importlib.util.find_spec("trl") else {}),
    "peft_ext.integrations.bitsandbytes": "integrations",
    "peft_ext.files": "peft_ext",
    "peft_ext.run": "run",
    "peft_ext.methods": "run",
    "peft_ext.recipes": "recipes",
    "peft_ext.sharded": "sharded",
}
_DIRECTIVE = re.compile(
    r"^\.\. (?:auto(?:function|class|exception|module)|py:data):: ([\w.]+)(\n   :members:)?$", re.MULTILINE
)


def _objects() -> dict[int, str]:
    """Returns every object that a directive names, by the identity of the object."""
    found = {}
    for page in (DOCS / "api").glob("*.md"):
        for path, members in _DIRECTIVE.findall(page.read_text()):
            if members and inspect.ismodule(module := _resolve(path)):
                found |= {id(getattr(module, name)): f"{path}.{name}" for name in module.__all__}
            if not path.startswith("peft_ext.integrations.trl") or "peft_ext.integrations.trl" in PUBLIC:
                found[id(_resolve(path))] = path
    return found


def _resolve(path: str) -> Any:
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"the reference names {path}, which is not there")


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    there = _objects()
    names = importlib.import_module(module).__all__
    missing = [name for name in names if id(getattr(importlib.import_module(module), name)) not in there]
    assert not missing, f"docs/api says nothing of {module}: {missing}"
    page = (DOCS / "api" / f"{PUBLIC[module]}.md").read_text()
    assert f":: {module}" in page


def test_every_public_name_has_a_docstring_that_says_what_is_raised() -> None:
    """Tests operators, and functions that check their arguments: formula or sentence first, then errors."""
    for operator in peft_ext.ops.__all__:
        text = getattr(peft_ext.ops, operator).__doc__
        assert "Raises:" in text, f"ops.{operator} does not say what it raises"
        assert "``" in text.splitlines()[0] or operator == "nf4_quantize", (
            f"ops.{operator} does not open with a formula"
        )
    for module in PUBLIC:
        for public in importlib.import_module(module).__all__:
            value = getattr(importlib.import_module(module), public)
            if callable(value):
                text = value.__doc__ or ""
                assert text and not text.startswith(f"{public}("), f"{module}.{public} has no docstring"


def test_configuration_imports_nothing_beyond_its_extensions() -> None:
    """No extension fetches anything, so the site can be built without a network."""
    tree = ast.parse((DOCS / "conf.py").read_text())
    values = {t.id: node.value for node in tree.body if isinstance(node, ast.Assign)
              for t in node.targets if isinstance(t, ast.Name)}  # fmt: skip
    extensions = ast.literal_eval(values["extensions"])
    assert not {"sphinx.ext.intersphinx", "sphinx.ext.mathjax"} & set(extensions)
    assert ast.literal_eval(values["nitpicky"]) is True
