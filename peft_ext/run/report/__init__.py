"""``report.html`` of a run: the content of run.json on one page, which needs no other file and no network.

::

    redraw("outputs/finetune")           # draws it again from run.json

page.html is the template and style.css the style sheet. script.js shows the figures under the pointer; all else works
without scripts. A Content-Security-Policy in the page forbids every request, and every script except script.js.
"""

from .page import redraw, render, write_report

__all__ = ["redraw", "render", "write_report"]
