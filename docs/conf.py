"""The documentation: ``make docs`` builds it, strictly, without the network."""

from __future__ import annotations

import inspect
import re
from typing import Any

import peft_ext

project = "peft_ext"
author = "The peft_ext authors"
copyright = f"{author}, Apache-2.0"
version = release = peft_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
templates_path: list[str] = []

myst_heading_anchors = 4  # pages link to headings by GitHub's names of them, so that both places have them

autodoc_mock_imports = ["trl"]  # of peft_ext[examples], without which the documents are built as well
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # torch's and PEFT's say nothing of what a method does here
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

# Names that have no page here: other projects' (nothing is fetched, so no intersphinx), and what is not public.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|peft|transformers|bitsandbytes|nn|abc|collections|pathlib)\b.*"),
    (r"py:class", r"(Tensor|Path|Callable|Mapping|PeftConfig|PeftModel|PeftType|TaskType|PreTrainedModel|Trainer\w*)"),
    (r"py:class", r"(.*_Model|_Names|peft_ext\.nn\.((adapted|prompt)\.\w+|packed\.HoldsPacked))"),
    (r"py:class", r"peft_ext\.run\.(prepare\.Run|config\.Config|shard_memory\.ShardedMemory)"),
    (r"py:class", r"peft_ext\.sources\.(tensor_files|conversion)\.\w+"),
]

html_theme = "furo"
html_title = f"peft_ext {release}"
html_show_sourcelink = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
_small = {"code-font-size": "75%"}
html_theme_options = {"top_of_page_buttons": [], "light_css_variables": _small, "dark_css_variables": _small}
pygments_style = "default"
pygments_dark_style = "github-dark"


def _parameters(obj: Any) -> set[str]:
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


_ITEM = re.compile(r"(?<=[.;`]) (?=(?:\w+, )*\w+: )")


def _as_sphinx_reads_it(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read in the source; this makes of them what napoleon wants.

    An indented block after a paragraph, without ``::``, is a formula. Several parameters on one line,
    "x: ... y: ...", get a line each.
    """
    found: list[str] = []
    outside = section = ""  # the last line that is not indented; the section, while in one
    parameters = _parameters(obj)
    for i, line in enumerate(lines):
        if line.strip() and not line.startswith(" "):
            outside, section = line, line if line in ("Args:", "Attributes:") else ""
        elif section and line.strip():
            first, *others = _ITEM.split(line)
            pieces = [first]
            for piece in others:
                if set(piece.partition(":")[0].split(", ")) <= parameters:
                    pieces.append(f"    {piece}")
                else:
                    pieces[-1] += f" {piece.lstrip()}"
            for piece in (piece.removesuffix(";") for piece in pieces):
                names, colon, text = piece.partition(":")
                names = names.strip().split(", ")
                if section == "Attributes:" and len(names) > 1 and set(names) <= parameters:
                    found += [f"    {each}:{text}" for each in names]
                else:
                    found.append(piece)
            continue
        elif line.startswith(" ") and i > 1 and not lines[i - 1].strip() and lines[i - 2] == outside:
            if outside and not re.match(r"[*-] |.*::$", outside):
                found += [".. code-block:: text", ""]
        found.append(line)
    lines[:] = found


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _as_sphinx_reads_it, priority=400)  # before napoleon's, which has 500
