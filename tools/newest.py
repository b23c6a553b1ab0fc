"""Runs tests on the newest releases that pip offers of transformers, PEFT, bitsandbytes and the accelerate library.

    python tools/newest.py [--always] [--transformers VERSION] [--folder .venv-newest] [pytest arguments]

The tests are those of the integrations, of packed weights and of GGUF files. The packages are installed into a new
environment, which also sees the packages of the running Python. The native library is not built again. The program
prints which share of the classes of norms, attentions and MLPs of the newest transformers has a known form;
peft_ext does not fuse modules of the other classes. If the newest versions are already those of the running Python,
no test runs without --always. --transformers installs the named release of transformers in place of the newest, and
always runs the tests. The last line of the output names the versions and the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("transformers", "peft", "bitsandbytes", "accelerate")
# Packed weights and GGUF files are tested too, because the code that loads them uses transformers' internals.
TESTS = ("tests/integrations", "tests/weights", "tests/gguf")
VERSIONS = "import json, sys; from importlib.metadata import version; print(json.dumps([*map(version, sys.argv[1:])]))"


def versions(python: str) -> dict[str, str]:
    done = subprocess.run([python, "-c", VERSIONS, *PACKAGES], check=True, stdout=subprocess.PIPE, text=True)
    return dict(zip(PACKAGES, json.loads(done.stdout), strict=True))


def install(folder: Path, transformers: Optional[str] = None) -> str:
    """Returns the Python of an environment in ``folder`` with the newest PACKAGES. ``transformers``: the release of
    transformers to install in place of the newest."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin/python")
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "zz-below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    pip += [f"{name}=={transformers}" if name == "transformers" and transformers else name for name in PACKAGES]
    subprocess.run(pip, check=True, env=environment)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--always", action="store_true", help="run the tests whatever the versions are")
    parser.add_argument("--transformers", metavar="VERSION", help="a release of transformers in place of the newest")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-newest")
    options, rest = parser.parse_known_args()
    python = install(options.folder, options.transformers)
    here, newest = versions(sys.executable), versions(python)
    said = ", ".join(f"{name} {newest[name]}" + (f" (here {here[name]})" if newest[name] != here[name] else "")
                     for name in PACKAGES)  # fmt: skip
    print(f"newest: {said}", flush=True)
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PEFT_EXT_REQUIRE": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run([python, str(ROOT / "tools/forms.py"), "--share"], cwd=ROOT, env=environment)
    if newest == here and not (options.always or options.transformers):
        print(f"newest: SAME as in this environment, whose tests say what holds: {said}")
        return 0
    # The tests import peft_ext from this checkout, because the checkout is first in PYTHONPATH.
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "auto", "--maxprocesses", "4",
               *(rest or TESTS)]  # fmt: skip
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    print(f"newest: {'PASSED' if code == 0 else 'FAILED FAILED FAILED'} on {said}")
    return code


if __name__ == "__main__":
    sys.exit(main())
