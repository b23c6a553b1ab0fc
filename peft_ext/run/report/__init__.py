"""``report.html`` of a run: the content of run.json on one page, which needs no other file and no network.

::

    redraw("outputs/finetune")           # draws report.html again from run.json

page.html is the template and style.css the style sheet. script.js shows the values under the pointer; the other parts
of the page work without scripts. The Content-Security-Policy of the page forbids requests to a network, and scripts
other than script.js.
"""

from .page import redraw, render, write_report

__all__ = ["redraw", "render", "write_report"]
