"""Configuration of Sphinx. ``make docs`` builds the documents without the network; a warning of Sphinx is an error."""

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

myst_heading_anchors = 4  # headings get the anchors that GitHub gives them, so that links work here and on GitHub

autodoc_mock_imports = ["trl"]  # the documents are built without TRL, a package of the extra peft_ext[examples]
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # a method without a docstring does not get the docstring of torch or PEFT
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

# Names that docstrings mention and that have no page: names of other projects, because the build fetches no inventory
# of another project (intersphinx), and names of peft_ext that are not public.
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
    """Rewrites the lines of a docstring of peft_ext to the form that Sphinx's extension napoleon reads.

    An indented block after a paragraph without ``::`` becomes a code block, because the block is a formula. If a line
    describes several parameters ("x: ... y: ..."), each parameter gets a line.
    """
    found: list[str] = []
    # outside: the last line that is not indented. section: "Args:" or "Attributes:" inside of such a section, else "".
    outside = section = ""
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
    app.connect("autodoc-process-docstring", _as_sphinx_reads_it, priority=400)  # napoleon, with 500, runs later
