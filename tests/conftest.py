"""Tests run against the native library, offline, and say so where they can't."""

import os

os.environ.setdefault("PEFT_EXT_REQUIRE", "1")  # without it the reference would be compared with itself
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from peft_ext import _native


def pytest_report_header(config: pytest.Config) -> str:
    state = _native.STATE
    return f"peft_ext: CPU path {state.isa}, CUDA library {'loaded' if state.cuda_loaded else 'not loaded'}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def two_threads():
    """Runs the test with two threads, whatever the machine has, and restores the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
