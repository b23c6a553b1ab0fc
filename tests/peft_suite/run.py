"""Run PEFT's own tests without and with accelerated layers, and compare gradients over their configurations; fail where
a test passes only without, where a gradient is worse than PEFT's, or where too little was fused to say so.

    python tests/peft_suite/run.py [--mode quick|lora|full] [--cache FOLDER] [--sdist FILE]

The tests come with the sdist of the installed PEFT (unpacked into the cache folder once) and run offline. Tests that
fail without the plugin (they want a hub or a package that is not here) are listed by number and do not count.

Modes: ``quick``, plain LoRA, DoRA, AdaLoRA and (IA)³ over linear layers and several adapters of them, about two minutes
for both runs; ``lora``, all that LoRA touches, DoRA included, about four; ``full``, every test of the file. In each the
gradients (gradients.py, 15 s) are of all configurations.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = "tests/test_custom_models.py"
_OTHERS = "".join(f" and not {name}" for name in ("adalora", "randlora", "gralora", "vblora", "unilora", "delora"))
_CLASSES = "LayerRepr or DynamicDispatch or MixedAdapter"
# "timing" compares run times of two PEFT versions of one forward.
_METHODS = "(mlp and (dora or adalora or ia3) and not timing) or (MultipleActive and (lora or ia3))"
MODES = {
    "quick": f"((mlp and lora) or {_CLASSES}) and not dora and not velora and not timing and not Parameter{_OTHERS}"
    f" or {_METHODS}",
    "lora": f"(lora or {_CLASSES} or MultipleActive) and not timing{_OTHERS}",
    "full": "not timing",
}
# What has to be fused at least once; "quick" and "full" meet all of it.
METHODS = ("LoRA", "DoRA", "AdaLoRA", "IA3", "LoRA, several adapters", "IA3, several adapters")
LORA_METHODS = tuple(name for name in METHODS if not name.startswith(("AdaLoRA", "IA3")))
# So many layers, each counted once, have to run fused, in PEFT's tests and where gradients are compared.
LEAST_LAYERS = {"quick": 500, "lora": 400, "full": 500}
# The shared test code imports this class; the tests of this file never use it.
_DIFFUSERS = "class StableDiffusionPipeline:\n    pass\n"


def unpack(cache: Path, sdist: Path | None) -> Path:
    """The unpacked sdist of the installed PEFT, made ready to be collected."""
    name = f"peft-{version('peft')}"
    folder = cache / name
    if not (folder / TESTS).exists():
        cache.mkdir(parents=True, exist_ok=True)
        if sdist is None:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", str(cache)]
            subprocess.run([*pip, "--no-build-isolation", f"peft=={version('peft')}"], check=True)
            sdist = cache / f"{name}.tar.gz"
        with tarfile.open(sdist) as archive:
            archive.extractall(cache, filter="data")
    (folder / "tests" / "__init__.py").touch()  # the tests import each other relatively; the sdist leaves this out
    if importlib.util.find_spec("diffusers") is None:
        (folder / "diffusers.py").write_text(_DIFFUSERS)
    return folder


def _environment(*paths: Path) -> dict[str, str]:
    python_path = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    return {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": python_path}


def run(folder: Path, report: Path, select: str, plugin: bool) -> dict[str, str]:
    """Outcomes by test: passed, failed or skipped."""
    command = [sys.executable, "-m", "pytest", TESTS, "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--tb=short", "--no-header", f"--junitxml={report}", "-k", select]
    if plugin:
        command += ["-p", "plugin"]
    environment = _environment(*[HERE] * plugin)
    environment["PEFT_EXT_SUITE_COUNT"] = str(report.with_suffix(".count"))
    report.unlink(missing_ok=True)
    with open(report.with_suffix(".log"), "w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not report.exists():
        raise SystemExit(f"pytest did not run to its end; see {report.with_suffix('.log')}")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def compare_gradients(folder: Path, count: Path) -> tuple[int, str]:
    """The exit status of gradients.py and what it prints; ``count`` gets the layers it fused."""
    command = [sys.executable, str(HERE / "gradients.py"), "--count", str(count)]
    count.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
    if not count.exists():
        raise SystemExit(f"gradients.py did not run to its end:\n{done.stderr}")
    return done.returncode, done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mode", choices=MODES, default="lora")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft_ext"
    parser.add_argument("--cache", type=Path, default=default, help="where the sdist and the reports go")
    parser.add_argument("--sdist", type=Path, help="a PEFT sdist that is here already")
    options = parser.parse_args()

    folder = unpack(options.cache, options.sdist)
    reports = [options.cache / f"{options.mode}-{kind}.xml" for kind in ("stock", "accelerated")]
    stock = run(folder, reports[0], MODES[options.mode], plugin=False)
    accelerated = run(folder, reports[1], MODES[options.mode], plugin=True)

    for kind, outcomes in (("stock", stock), ("accelerated", accelerated)):
        counts = {which: list(outcomes.values()).count(which) for which in ("passed", "failed", "skipped")}
        print(f"{kind:>12}: " + ", ".join(f"{count} {which}" for which, count in counts.items()))
    status, text = compare_gradients(folder, options.cache / f"{options.mode}-gradients.count")
    print(text)
    in_tests, in_gradients = (
        json.loads(path.read_text())
        for path in (reports[1].with_suffix(".count"), options.cache / f"{options.mode}-gradients.count")
    )
    fused = in_tests["forwards"]
    print("fused forwards: " + ", ".join(f"{count} {name}" for name, count in fused.items()))
    layers = Counter(in_tests["layers"]) + Counter(in_gradients["layers"])
    print(f"fused layers: {layers.total()}, {sum(in_gradients['layers'].values())} of them with gradients compared")
    for name, count in layers.most_common():
        print(f"{count:>6}  {name}")
    worse = [name for name, outcome in stock.items() if outcome == "passed" and accelerated.get(name) != "passed"]
    for name in worse:
        print(f"passes only without: {name}")
    wanted = LORA_METHODS if options.mode == "lora" else METHODS
    untested = [f"in PEFT's tests: {name}" for name in wanted if not fused.get(name)]
    untested += [f"with gradients compared: {name}" for name in METHODS if not in_gradients["forwards"].get(name)]
    for name in untested:
        print(f"never fused {name}")
    least = LEAST_LAYERS[options.mode]
    too_few = layers.total() < least
    if too_few:
        print(f"{layers.total()} layers ran fused, wanted at least {least}")
    return int(bool(worse or untested or too_few or status))


if __name__ == "__main__":
    raise SystemExit(main())
