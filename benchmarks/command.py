"""What the commands ``python -m benchmarks.<name>`` have in common."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

from .files import Result, newest


def command_parser(name: str, help_text: Optional[str]) -> argparse.ArgumentParser:
    """Returns a parser of ``python -m <name>`` whose help begins with ``help_text``, line by line as it is."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {name}", description=help_text, formatter_class=raw)


def run_alone(name: str, *arguments: object, timeout: Optional[float] = None) -> Any:
    """Runs ``python -m benchmarks.<name>`` in a process of its own. Returns the value that the last line of the
    process's output, a line of JSON, stands for.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=timeout)
    return json.loads(done.stdout.splitlines()[-1])


def measured(asked: argparse.ArgumentParser, name: str, file: Optional[Path] = None) -> Result:
    """Returns the content of the result file ``file``, or of the newest result file called ``name`` if ``file`` is
    None. Ends the program with an error if no such result file exists."""
    found = json.loads(file.read_text()) if file else newest(name)
    if not found:
        asked.error("nothing was measured yet: there is no result file")
    return found


def markdown(titles: str, rows: Iterable[Iterable[str]]) -> str:
    """Returns a Markdown table with the line ``titles``, such as "| case | ms |", and a line for each of ``rows``."""
    return "\n".join([titles, "|---" * (titles.count("|") - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)])
