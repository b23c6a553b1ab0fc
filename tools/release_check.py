"""Checks that a tag, the package's version and the changelog name the same release, and that the release's files exist.

    python tools/release_check.py v1.2.3 [--files dist]

The tag must be "v" and the version of peft_ext/_version.py. The first entry of CHANGELOG.md must have this version and
a date. With ``--files`` the folder must hold the source distribution, the wheel without native library, and a wheel for
each Python version of pyproject.toml's classifiers on each architecture, and no other file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import old_runtime

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "peft_ext"


def version(text: str) -> str:
    """Returns the version that the text of peft_ext/_version.py states."""
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def pythons(text: str) -> list[str]:
    """Returns the Python versions of the classifiers in the text of pyproject.toml, such as "3.10"."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def wanted_files(release: str, versions: Iterable[str]) -> set[str]:
    """Returns the names of the files that the release must have, with wheels for the Python versions ``versions``."""
    tags = [f"cp{version.replace('.', '')}" for version in versions]
    wheels = {f"{tag}-{tag}-{old_runtime.TAG}_{machine}" for tag in tags for machine in old_runtime.LOADERS}
    return {f"{PACKAGE}-{release}.tar.gz", *(f"{PACKAGE}-{release}-{tags}.whl" for tags in {*wheels, "py3-none-any"})}


def problems(tag: str, release: str, changelog: str) -> list[str]:
    """Returns a line for each difference between the tag, the version ``release`` and the first entry of the
    changelog."""
    found = []
    if tag != f"v{release}":
        found.append(f"the tag is {tag}, wanted v{release}: peft_ext/_version.py states {release}")
    entry = re.search(r"^## \[(.+?)\](?: - (.+))?$", changelog, re.MULTILINE)
    if entry is None or entry[1] != release:
        found.append(f"CHANGELOG.md begins with {entry[1] if entry else 'no entry'}, wanted {release}")
    elif not re.fullmatch(r"\d{4}-\d{2}-\d{2}", entry[2] or ""):
        found.append(f"CHANGELOG.md has {entry[2] or 'nothing'} as the date of {release}, wanted year-month-day")
    return found


def file_problems(names: set[str], wanted: set[str]) -> list[str]:
    """Returns a line for each file of ``wanted`` that is missing, and for each file of ``names`` that is not in
    ``wanted``."""
    missing = [f"missing: {name}" for name in sorted(wanted - names)]
    return missing + [f"not of this release: {name}" for name in sorted(names - wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tag")
    parser.add_argument("--files", type=Path, help="the folder that holds the release's files")
    asked = parser.parse_args()
    release = version((ROOT / PACKAGE / "_version.py").read_text())
    found = problems(asked.tag, release, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if asked.files is not None:
        wanted = wanted_files(release, pythons((ROOT / "pyproject.toml").read_text()))
        found += file_problems({path.name for path in asked.files.iterdir()}, wanted)
    if found:
        sys.exit("release-check: " + "\nrelease-check: ".join(found))
    print(f"release-check: {asked.tag} is release {release}")


if __name__ == "__main__":
    main()
