"""Measures how strong the tests are: breaks the code in one line at a time, and records which test notices.

    python tools/mutations.py --list | --check | --killers
    python tools/mutations.py --tier fast | all [--only NAME ...] [--part PART ...] [--only-unknown] [--likely]

The mutations are written by hand in tests/mutations.ini: mutmut and cosmic-ray mutate no C++, and the build and the
tests of one mutation take minutes, so that few mutations can run. Results are in tests/mutations.tsv, which is updated
after each mutation. --only-unknown leaves out mutations that have a result of the tier and have not changed, so that
several nights can share one run.

The tool works on a copy of the checkout in build/mutations, with the files of the working tree, committed or not. The
copy has its own build folder: the first mutation of C++ builds the whole library, and each further mutation of C++
builds the files of this mutation and of the mutation before. The tests that a mutation names as likely
run first. If these tests pass, the whole tier runs, except with --likely. The likely tests of a CUDA kernel run on the
emulator, in the tier "all" alone. Each run stops at the first failure. A
mutation is killed by a failing test, by a failing build, by a timeout, or by another failure of pytest. At the end, the
tests that killed a mutation run on the restored code. If such a test fails on the restored code as well, the result of
the mutation is removed.
"""

from __future__ import annotations

import argparse
import configparser
import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import limit

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build/mutations"
MUTATIONS = ROOT / "tests/mutations.ini"
RESULTS = ROOT / "tests/mutations.tsv"
# TIERS has pytest's arguments that choose the tests of each tier; WHOLE has additional arguments for a whole tier.
TIERS = {"fast": ["-m", "not slow"], "all": []}
WHOLE = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
LIKELY_SECONDS, WHOLE_SECONDS, BUILD_SECONDS = 1200, 7200, 3600
COLUMNS = ("name", "part", "file", "fast", "fast_seconds", "all", "all_seconds", "digest")
# pytest's arguments that run the CUDA kernels on the emulator, and the mark of such a run's tests in the results.
EMULATED, ON_EMULATOR = ["--device", "emulated"], "on the emulator: "
PYTEST_PASSED, PYTEST_USAGE, PYTEST_NO_TESTS, INTERRUPTED, TERMINATED, SURVIVED = 0, 4, 5, 130, 143, "survived"


@dataclass(frozen=True)
class Mutation:
    """A change of one line of a file: the text ``old``, which the file contains once, becomes ``new``. ``likely``:
    names of tests that probably notice the change."""

    name: str
    part: str
    file: str
    old: str
    new: str
    likely: tuple[str, ...]
    keyword: str = ""  # value of pytest's option -k for the likely tests
    device: str = ""  # value of pytest's option --device for the likely tests: "emulated" or ""

    @property
    def digest(self) -> str:
        """Returns a checksum of ``file``, ``old`` and ``new``. A result with another checksum belongs to an earlier
        version of the mutation."""
        return f"{zlib.crc32(chr(10).join((self.file, self.old, self.new)).encode()):08x}"

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc/") and self.file.endswith((".cpp", ".h"))


def read_mutations(path: Path = MUTATIONS) -> list[Mutation]:
    """Returns the mutations in the order of their files: Python files, which need no build, come before C++ files."""
    parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), interpolation=None, strict=True)
    parser.read_string(path.read_text(encoding="utf-8"))
    found: list[Mutation] = []
    for name in parser.sections():
        part, file, old, new, likely = (parser[name][key] for key in ("part", "file", "old", "new", "likely"))
        options = {key: parser[name].get(key, "") for key in ("keyword", "device")}
        found.append(Mutation(name, part, file, old, new, tuple(likely.split()), **options))
    return sorted(found, key=lambda each: (each.native, each.file))


def problems(mutations: Iterable[Mutation], root: Path = ROOT) -> list[str]:
    """Returns a line for each error in ``mutations``, such as an old text that the mutation's file does not contain."""
    wrong = []
    for each in mutations:
        file = root / each.file
        times = file.read_text(encoding="utf-8").count(each.old) if file.is_file() else 0
        if times != 1:
            wrong.append(f"{each.name}: {each.file} holds the old text {times} times, wanted once: {each.old}")
        wrong += [f"{each.name}: the new text is the old one"] * (each.old == each.new)
        missing = [path for path in each.likely if not (root / path.split("::")[0]).is_file()]
        wrong += [f"{each.name}: the likely test {path} is not there" for path in missing]
        if not 1 <= len(each.likely) <= 3:
            wrong.append(f"{each.name}: has {len(each.likely)} likely tests, wanted one to three")
    return wrong


def read_results(path: Path = RESULTS) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file, delimiter="\t")}


def write_results(results: dict[str, dict[str, str]], mutations: Sequence[Mutation], path: Path = RESULTS) -> None:
    """Writes the file ``path`` with one row for each mutation in ``mutations``, sorted by part and then by name."""
    rows = [results.get(each.name, {}) | _facts(each) for each in sorted(mutations, key=lambda m: (m.part, m.name))]
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _facts(each: Mutation) -> dict[str, str]:
    return {"name": each.name, "part": each.part, "file": each.file, "digest": each.digest}


def collected(tier: str, files: Iterable[str], root: Path = ROOT) -> set[str]:
    """Returns the names of the tests that pytest collects in ``files`` for the tier."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *TIERS[tier], *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode not in (PYTEST_PASSED, PYTEST_NO_TESTS):
        raise SystemExit(f"mutations: pytest collects no tests: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return set(done.stdout.splitlines())


def killers_that_left(
    results: Mapping[str, Mapping[str, str]], mutations: Iterable[Mutation], root: Path = ROOT
) -> list[str]:
    """Returns a line for each result whose test is no longer in the tier in which the test killed the mutation. Leaves
    out results of earlier versions of a mutation."""
    wrong, named = [], [(each, results.get(each.name, {})) for each in mutations]
    for tier in TIERS:
        killed = {each.name: row.get(tier, "") for each, row in named if row.get("digest") == each.digest}
        killed = {name: test for name, test in killed.items() if "::" in test}
        files = sorted({test.split("::")[0] for test in killed.values()})
        found = collected(tier, files, root) if files else set()
        wrong += [f"{name}: {test} is not in the tier {tier}" for name, test in killed.items() if test not in found]
    return wrong


def summary(results: dict[str, dict[str, str]], mutations: Sequence[Mutation]) -> str:
    """Returns, as text, how many mutations each tier killed, and how many have no result in the tier. A result of an
    earlier version of a mutation does not count."""
    said = []
    for tier in TIERS:
        rows = [(each, results.get(each.name, {})) for each in mutations]
        known = [row.get(tier, "") if row.get("digest") == each.digest else "" for each, row in rows]
        killed, unknown = sum(value not in ("", SURVIVED) for value in known), known.count("")
        said.append(f"{tier} {killed} of {len(known)} killed" + (f" ({unknown} not run)" if unknown else ""))
    return ", ".join(said)


class Copy:
    """The copy of the checkout in which mutations are made and tests run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._mutated = folder.resolve(), ""
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        tracked = {name for name in names if name and (ROOT / name).is_file()}
        for name in tracked:
            self._restore(name)
        for top in ("csrc", "peft_ext", "tests", "tools"):
            for path in (self.folder / top).rglob("*"):
                source = path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
                if source and str(path.relative_to(self.folder)) not in tracked:
                    path.unlink()
        if any(self.folder.glob("build/temp*")):  # an interrupted run may leave a mutated library
            self.build(is_whole=True)
        else:
            for library in ROOT.glob("peft_ext/*.so"):
                shutil.copy2(library, self.folder / "peft_ext")

    def _restore(self, name: str) -> None:
        """Copies a file of the checkout if the copy has another content. An equal file keeps its modification time, so
        that the file is not compiled again."""
        source, target = ROOT / name, self.folder / name
        content = source.read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            self._write(target, content)
            target.chmod(source.stat().st_mode)

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if path.suffix == ".py":  # Python would use old bytecode if the size and the second of the change are equal
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def restore(self) -> None:
        if self._mutated:
            self._restore(self._mutated)

    def mutate(self, mutation: Mutation) -> None:
        self.restore()
        path, self._mutated = self.folder / mutation.file, mutation.file
        self._write(path, path.read_bytes().replace(mutation.old.encode(), mutation.new.encode()))

    def run(self, command: Sequence[str], seconds: float) -> tuple[int, str]:
        """Runs a command in the copy. Returns the exit status (limit.ENDED after a timeout) and the printed text."""
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
            code = limit.run(command, seconds, cwd=self.folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
            out.seek(0)
            return code, out.read()

    def build(self, is_whole: bool = False) -> bool:
        """Builds the native library and returns whether the build succeeded. ``is_whole`` says that the code has no
        mutation, so that a failed build ends the program."""
        code, said = self.run([sys.executable, "setup.py", "build_ext", "--inplace"], BUILD_SECONDS)
        if code and is_whole:
            raise SystemExit(f"mutations: the code without a mutation does not build: {said[-2000:]}")
        return code == 0

    def test(self, arguments: Sequence[str], seconds: float) -> str | None:
        """Runs pytest. Returns the name of the test that failed, "timeout" or pytest's exit status if pytest failed
        otherwise, and None if no test failed."""
        command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "--tb=no", *arguments]
        code, said = self.run(command, seconds)
        if code in (PYTEST_PASSED, PYTEST_NO_TESTS):
            return None
        found = "timeout" if code == limit.ENDED else failed_test(said)
        if found is None and code in (PYTEST_USAGE, INTERRUPTED, TERMINATED):
            raise SystemExit(f"mutations: pytest {' '.join(arguments)} ended with {code}: {said[-500:]}")
        return found or f"exit status {code} of pytest"


def failed_test(said: str) -> str | None:
    """Returns the name of the first failing test in pytest's output, or of the test in which the process crashed; None
    if the output names neither."""
    if found := re.search(r"^(?:FAILED|ERROR) (tests/\S+?(?:\[.*?\])?)(?: - .*)?$", said, re.MULTILINE):
        return found[1]
    if "ImportError while loading conftest" in said:
        return "tests/conftest.py"
    started = re.findall(r"^(tests/\S+::.+?)(?: (?:PASSED|SKIPPED|XFAIL|Fatal Python error).*)?$", said, re.MULTILINE)
    return started[-1].strip() if started and "Fatal Python error" in said else None


def killer(copy: Copy, mutation: Mutation, tier: str, likely_alone: bool) -> str:
    """Returns what kills the mutation in the tier (a test's name, "build", "timeout" or a status), or SURVIVED.

    With ``likely_alone``, only the likely tests run, and the result is "" if they pass. If the mutation has a device,
    only the likely tests run, on the device; the tier "fast" has no such tests.
    """
    if mutation.device and tier == "fast":
        return SURVIVED
    copy.mutate(mutation)
    if mutation.native and not copy.build():
        return "build"
    on = EMULATED if mutation.device else []
    found = copy.test([*TIERS[tier], *on, "-k", mutation.keyword, *mutation.likely], LIKELY_SECONDS)
    if mutation.device:
        return f"{ON_EMULATOR}{found}" if found else SURVIVED
    if found or likely_alone:
        return found or ""
    return copy.test([*TIERS[tier], *WHOLE, "tests"], WHOLE_SECONDS) or SURVIVED


def control(copy: Copy, tests: Iterable[str], native: bool) -> set[str]:
    """Returns the tests of ``tests`` that also fail on the code without a mutation."""
    copy.restore()
    if native:
        copy.build(is_whole=True)
    failing: set[str] = set()
    for mark, on in ("", []), (ON_EMULATOR, EMULATED):
        left = sorted(test.removeprefix(mark) for test in tests if test.startswith(f"{mark}tests/"))
        while left and (found := copy.test([*on, *left], WHOLE_SECONDS)):
            if found not in left:
                raise SystemExit(f"mutations: the tests of the code as it is ended with {found}")
            failing.add(f"{mark}{found}")
            left.remove(found)
    return failing


def run(chosen: Sequence[Mutation], mutations: Sequence[Mutation], tier: str, likely_alone: bool, copy: Copy) -> int:
    killed_by: dict[str, list[Mutation]] = {}
    for each in chosen:
        start = time.monotonic()
        found = killer(copy, each, tier, likely_alone)
        seconds = f"{time.monotonic() - start:.0f}"
        results = read_results()  # another run of this program may have written results meanwhile
        row = results.setdefault(each.name, {})
        if row.get("digest") != each.digest:
            row.clear()
        row |= _facts(each) | {tier: found, f"{tier}_seconds": seconds}
        # The result counts for the tier "all" too, because each test of the tier "fast" is also in the tier "all".
        if tier == "fast" and found not in ("", SURVIVED):
            row |= {"all": row.get("all") or found, "all_seconds": row.get("all_seconds") or seconds}
        write_results(results, mutations)
        print(f"{each.name}: {found or 'its likely tests pass'} ({seconds} s)", flush=True)
        if found not in ("", SURVIVED):
            killed_by.setdefault(found, []).append(each)
    failing = control(copy, killed_by, any(each.native for each in chosen))
    results = read_results()
    for each in (each for test in failing for each in killed_by[test]):
        print(f"{each.name}: removed, the test fails without the mutation as well", flush=True)
        results[each.name] = {}
    write_results(results, mutations)
    print(summary(results, mutations))
    return int(any(results[each.name].get(tier, "") in ("", SURVIVED) for each in chosen))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print the mutations and their results")
    parser.add_argument("--check", action="store_true", help="check the mutations against the code as it is")
    parser.add_argument("--killers", action="store_true", help="check that each test of the results is still in the "
                        "tier in which the test killed a mutation")  # fmt: skip
    parser.add_argument("--tier", choices=TIERS, help="the tests to run on each mutation")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="mutations whose name holds one of these")
    parser.add_argument("--part", nargs="+", default=[], metavar="PART", help="mutations of these parts")
    parser.add_argument("--only-unknown", action="store_true", help="mutations without a result of the tier")
    parser.add_argument("--likely", action="store_true", help="run the likely tests alone; where they pass, the result "
                        "stays unknown")  # fmt: skip
    parser.add_argument(
        "--copy", type=Path, default=COPY, metavar="FOLDER", help="the copy; two runs at a time need two"
    )
    arguments, mutations, results = parser.parse_args(), read_mutations(), read_results()
    chosen = [each for each in mutations if not arguments.part or each.part in arguments.part]
    chosen = [each for each in chosen if not arguments.only or any(word in each.name for word in arguments.only)]
    if arguments.only_unknown and arguments.tier:
        known = {row["digest"] for row in results.values() if row.get(arguments.tier)}
        chosen = [each for each in chosen if each.digest not in known]
    if arguments.list:
        for row in (results.get(each.name, {}) | _facts(each) for each in chosen):
            print(f"{row['part']}: {row['name']} ({row['file']}); fast: {row.get('fast')}, all: {row.get('all')}")
        print(summary(results, mutations))
    if wrong := problems(mutations):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if arguments.killers and (wrong := killers_that_left(results, mutations)):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    if arguments.tier:
        return run(chosen, mutations, arguments.tier, arguments.likely, Copy(arguments.copy))
    print(f"{len(mutations)} mutations, each of whose old texts is in its file once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
