"""Runs PEFT's own tests without and with accelerated layers, and compares gradients over the tests' configurations.

The script fails where a test passes only without accelerated layers, where a gradient is worse than PEFT's, or where
too few layers ran fused for a judgement.

    python tests/peft_suite/run.py [--mode quick|lora|experts|others|full] [--cache FOLDER] [--sdist FILE]
                                   [--reports FOLDER]

The tests come from the sdist of the installed PEFT, which is unpacked into the cache folder once. Several runs may use
one cache folder at the same time: pytest's reports and logs are in another folder, a temporary folder or the folder of
--reports. The tests run offline, on stand-ins for the hub's tiny models (models.py). Tests that need other files of the
hub are skipped and counted in both runs. Tests that fail without the plugin do not count as failures; their number is
printed. In the mode ``quick`` only the tests that fail with the plugin also run without the plugin. A test that fails
only with the plugin runs once more with the plugin of rounding.py, which lets differences of up to 2e-6 of the largest
value pass. A test that passes with rounding.py differs by rounding; the number of these tests and the largest
difference are printed.

The mode ``quick`` has plain LoRA, DoRA, AdaLoRA and (IA)³ over linear layers, several adapters at once, mixed tuners,
LoRA's variants, and LoRA in a Llama. The mode ``experts`` has the tests of ``target_parameters``. The mode ``lora`` has
the tests of test_custom_models.py that concern LoRA. The mode ``others`` has all tests of the files OTHERS. The mode
``full`` has all tests of the other modes. In each mode the gradients of all configurations are compared (gradients.py,
15 s).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from models import give_name, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = "tests/test_custom_models.py"
_OTHERS = "".join(f" and not {name}" for name in ("adalora", "randlora", "gralora", "vblora", "unilora", "delora"))
_CLASSES = "LayerRepr or DynamicDispatch or MixedAdapter"
# Tests with "timing" in their name compare the run times of two versions of one forward of PEFT.
_METHODS = "(mlp and (dora or adalora or ia3) and not timing) or (MultipleActive and (lora or ia3))"
OTHERS = tuple(
    f"tests/test_{name}.py" for name in ("lora_variants", "initialization", "mixed", "decoder_models", "seq_classifier")
)
_QUICK = (
    f"((mlp and lora) or {_CLASSES}) and not dora and not velora and not timing and not Parameter{_OTHERS}"
    f" or {_METHODS}"
)
# Leaves out the tests that count how often PEFT forms W + s B A, because fused layers do not form this sum.
_EXPERTS = "not multiple_parameters_on_same_module and not forward_under_autocast and not result_caching_works"
# For each mode, the runs of pytest in turn: the files, and the expression for pytest's option -k.
MODES: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "quick": [
        ((TESTS,), _QUICK),
        (("tests/test_lora_variants.py", "tests/test_mixed.py"), ""),
        (
            ("tests/test_decoder_models.py", "tests/test_seq_classifier.py"),
            "LoraConfig and Llama and (merge or training)",
        ),
    ],
    "lora": [((TESTS,), f"(lora or {_CLASSES} or MultipleActive) and not timing{_OTHERS}")],
    "experts": [(("tests/test_target_parameters.py",), _EXPERTS)],
    "others": [(OTHERS, "")],
    "full": [((TESTS,), "not timing"), (OTHERS, ""), (("tests/test_target_parameters.py",), _EXPERTS)],
}
# Methods of which a layer must run fused at least once. The modes "quick" and "full" test all METHODS.
METHODS = ("LoRA", "DoRA", "AdaLoRA", "IA3", "LoRA, several adapters", "IA3, several adapters")
LORA_METHODS = tuple(name for name in METHODS if not name.startswith(("AdaLoRA", "IA3")))
SECONDS = 900  # Time limit of one test, in seconds.
# For each mode, the least number of layers that must run fused in PEFT's tests and in the comparison of gradients.
LEAST_LAYERS = {"quick": 500, "lora": 400, "experts": 100, "others": 100, "full": 500}
# A stand-in for the package diffusers: PEFT's shared test code imports its StableDiffusionPipeline, but the tests that
# run do not use this class.
_DIFFUSERS = "class StableDiffusionPipeline:\n    pass\n"


def unpack(cache: Path, sdist: Path | None) -> Path:
    """Returns the folder of the unpacked sdist of the installed PEFT, prepared so that pytest can collect the tests.

    Several processes may use one cache: the sdist is unpacked into a temporary folder, which then gets its name.
    """
    name = f"peft-{version('peft')}"
    folder = cache / name
    if not (folder / TESTS).exists():
        cache.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete folder
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=cache) as temporary:
            if sdist is None:
                pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
                pip += ["--dest", temporary, "--no-build-isolation", f"peft=={version('peft')}"]
                subprocess.run(pip, check=True)
                sdist = Path(temporary, f"{name}.tar.gz")
            with tarfile.open(sdist) as archive:
                archive.extractall(temporary, filter="data")
            give_name(Path(temporary, name), folder)
    (folder / "tests" / "__init__.py").touch()  # the sdist lacks __init__.py, which relative imports need
    return folder


def _packages(reports: Path) -> list[Path]:
    """Returns a folder with the stand-in for diffusers, in the folder of the reports, if diffusers is not installed."""
    if importlib.util.find_spec("diffusers") is not None:
        return []
    (reports / "packages").mkdir(exist_ok=True)
    (reports / "packages/diffusers.py").write_text(_DIFFUSERS)
    return [reports / "packages"]


def _environment(*paths: Path) -> dict[str, str]:
    python_path = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    return {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": python_path}


def run(
    folder: Path, report: Path, files: Sequence[str], select: str, *plugins: str, **variables: str
) -> dict[str, str]:
    """Runs pytest; returns by test "passed", "failed", "skipped", or "hub" for tests skipped without the hub."""
    command = [sys.executable, "-m", "pytest", *files, "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--tb=short", "--no-header", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    command += ["-o", f"faulthandler_timeout={SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    command += ["-k", select] if select else []
    command += [word for plugin in ("offline", *plugins) for word in ("-p", plugin)]
    # The folder of PEFT's tests is first on PYTHONPATH, because peft_ext's tests are a package with the name "tests"
    # too.
    environment = (
        _environment(folder, HERE, *_packages(report.parent))
        | {"HF_HUB_CACHE": str(write(folder.parent / "hub"))}
        | variables
    )
    report.unlink(missing_ok=True)
    with open(report.with_suffix(".log"), "w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not report.exists():
        end = report.with_suffix(".log").read_text(errors="replace")[-4000:]
        raise SystemExit(f"pytest did not run to its end; the end of {report.with_suffix('.log')}:\n{end}")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if "error" in kinds and kinds["error"].get("message") == "collection failure":  # then pytest ran no test
            raise SystemExit(f"{case.get('name')} can't be collected:\n{kinds['error'].text}")
        if "skipped" in kinds:
            outcome = "hub" if "wants the hub" in kinds["skipped"].get("message", "") else "skipped"
        else:
            outcome = "failed" if kinds.keys() & {"failure", "error"} else "passed"
        # The name is pytest's id of the test, without the module's name where the report has it in place of a class.
        name = f"{case.get('file')}::{case.get('classname').rpartition('.')[2]}::{case.get('name')}"
        outcomes[name.replace(f"::{Path(case.get('file')).stem}::", "::")] = outcome
    return outcomes


def _rounds(folder: Path, report: Path, names: Sequence[str]) -> dict[str, float]:
    """Returns, of the tests ``names``, the tests that differ only by rounding, and the largest difference in each."""
    if not names:
        return {}
    taken = report.with_suffix(".json")
    taken.unlink(missing_ok=True)
    found = run(folder, report, names, "", "plugin", "rounding", PEFT_EXT_SUITE_ROUNDING=str(taken))
    apart = json.loads(taken.read_text())
    return {name: max(apart[name]) for name in names if found.get(name) == "passed" and apart.get(name)}


def compare_gradients(folder: Path, count: Path) -> tuple[int, str]:
    """Runs gradients.py; returns its exit status and its output.

    The file ``count`` gets the numbers of fused layers.
    """
    command = [sys.executable, str(HERE / "gradients.py"), "--count", str(count)]
    count.unlink(missing_ok=True)
    done = subprocess.run(
        command, cwd=folder, env=_environment(*_packages(count.parent)), capture_output=True, text=True
    )
    if not count.exists():
        raise SystemExit(f"gradients.py did not run to its end:\n{done.stderr}")
    return done.returncode, done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=MODES, default="lora")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft_ext"
    parser.add_argument("--cache", type=Path, default=default, help="where the sdist and the stand-ins go")
    parser.add_argument("--sdist", type=Path, help="a PEFT sdist that is here already")
    parser.add_argument("--reports", type=Path, help="where pytest's reports and logs stay; default: they are removed")
    options = parser.parse_args()

    folder = unpack(options.cache.absolute(), options.sdist)
    if options.reports is not None:
        options.reports.mkdir(parents=True, exist_ok=True)
        return compare(options.mode, folder, options.reports.absolute())
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as reports:
        status = compare(options.mode, folder, Path(reports))
    if status:
        print("--reports FOLDER keeps pytest's reports and logs, which have the errors of the tests")
    return status


def compare(mode: str, folder: Path, reports: Path) -> int:
    """Runs PEFT's tests of a mode in ``folder``, prints the differences and returns the exit status."""
    stock: dict[str, str] = {}
    accelerated: dict[str, str] = {}
    in_tests: dict[str, Counter[str]] = {"forwards": Counter(), "layers": Counter()}
    for number, (files, select) in enumerate(MODES[mode]):
        report = reports / f"{mode}-{number}"
        count = report.with_suffix(".count")
        found = run(folder, report.with_suffix(".accelerated.xml"), files, select, "plugin",
                    PEFT_EXT_SUITE_COUNT=str(count))  # fmt: skip
        accelerated |= found
        if mode == "quick":
            failed = [name for name, outcome in found.items() if outcome == "failed"]
            stock |= run(folder, report.with_suffix(".stock.xml"), failed, "") if failed else {}
        else:
            stock |= run(folder, report.with_suffix(".stock.xml"), files, select)
        for which, counts in json.loads(count.read_text()).items():
            in_tests[which].update(counts)

    for kind, outcomes in (("stock", stock), ("accelerated", accelerated)):
        counts = Counter(outcomes.values())
        print(f"{kind:>12}: " + ", ".join(f"{counts[which]} {which}" for which in ("passed", "failed", "skipped"))
              + f", {counts['hub']} skipped for the hub")  # fmt: skip
    for file in dict.fromkeys(name.partition("::")[0] for name in accelerated):
        counts = [Counter(o for name, o in arm.items() if name.startswith(f"{file}::")) for arm in (stock, accelerated)]
        print(f"{file:>32}: " + "; ".join(", ".join(f"{n} {which}" for which, n in c.items()) for c in counts if c))
    status, text = compare_gradients(folder, reports / f"{mode}-gradients.count")
    print(text)
    in_gradients = json.loads((reports / f"{mode}-gradients.count").read_text())
    fused = in_tests["forwards"]
    print("fused forwards: " + ", ".join(f"{count} {name}" for name, count in fused.items()))
    layers = Counter(in_tests["layers"]) + Counter(in_gradients["layers"])
    print(f"fused layers: {layers.total()}, {sum(in_gradients['layers'].values())} of them with gradients compared")
    for name, count in layers.most_common():
        print(f"{count:>6}  {name}")
    worse = [name for name, outcome in stock.items() if outcome == "passed" and accelerated.get(name) != "passed"]
    rounds = _rounds(folder, reports / f"{mode}-rounding.xml", worse)
    worse = [name for name in worse if name not in rounds]
    largest = max(rounds.values(), default=0.0)
    print(f"differ by rounding: {len(rounds)} tests, by at most {largest:.2g} of the largest value")
    for name in worse:
        print(f"passes only without: {name}")
    wanted = {"lora": LORA_METHODS, "others": ("LoRA", "DoRA"), "experts": ("LoRA",)}.get(mode, METHODS)
    untested = [f"in PEFT's tests: {name}" for name in wanted if not fused.get(name)]
    untested += [f"with gradients compared: {name}" for name in METHODS if not in_gradients["forwards"].get(name)]
    for name in untested:
        print(f"never fused {name}")
    least = LEAST_LAYERS[mode]
    too_few = layers.total() < least
    if too_few:
        print(f"{layers.total()} layers ran fused, wanted at least {least}")
    return int(bool(worse or untested or too_few or status))


if __name__ == "__main__":
    raise SystemExit(main())
