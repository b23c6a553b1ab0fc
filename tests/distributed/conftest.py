"""The runs that tests of ``peft-ext finetune`` in several processes share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(tiny, folder) -> Path:
    """Returns the output folder of a run of one process, with four examples a step."""
    from launched import options_of  # `launched` imports packages that other tests of this folder do not need

    from peft_ext.cli.main import main

    assert main(options_of(tiny, folder / "alone", 4)) == 0
    return folder / "alone"
