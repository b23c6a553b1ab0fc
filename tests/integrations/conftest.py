"""In each test here a layer that takes its short way is asked for the reasons of the long one as well, and LayerNorms
are not PyTorch's where elements are few, as they are in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest

lora = pytest.importorskip("peft_ext.integrations.adapter_layers.lora")
ia3 = pytest.importorskip("peft_ext.integrations.adapter_layers.ia3")
norm = pytest.importorskip("peft_ext.integrations.model_blocks.norm")


@pytest.fixture(autouse=True)
def few_elements(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What were few, by dtype."""
    usual = norm.LEAST
    monkeypatch.setattr(norm, "LEAST", {})
    return usual


@pytest.fixture(autouse=True)
def the_short_way_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def checking(usual: Callable[[Any, Any], Optional[tuple]]) -> Callable[[Any, Any], Optional[tuple]]:
        def checked(layer: Any, x: Any) -> Optional[tuple]:
            found = usual(layer, x)
            assert found is None or layer._reasons() == (None, None)
            return found

        return checked

    for kind in (lora.LowRank, ia3.IA3Layer):
        monkeypatch.setattr(kind, "_usual", checking(kind._usual))
    yield
