"""``report.html`` of a run: what run.json says, on one page that needs nothing else, neither files nor a network.

::

    redraw("outputs/finetune")           # draws it again from run.json

page.html is the template, style.css its looks, script.js what shows the figures under the pointer; without scripts the
page lacks that alone. A Content-Security-Policy in the page forbids every request, and every script but this one.
"""

from .page import redraw, render, write_report

__all__ = ["redraw", "render", "write_report"]
