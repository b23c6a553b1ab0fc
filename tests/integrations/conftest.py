"""Fixtures of the tests of integrations.

In these tests, a call on the fast path still asserts that the checks of the layer find no reason, and LayerNorms are
fused for few elements too, because the tests use few elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest

lora = pytest.importorskip("peft_ext.integrations.adapter_layers.lora")
known = pytest.importorskip("peft_ext.integrations.adapter_layers.known")
ia3 = pytest.importorskip("peft_ext.integrations.adapter_layers.ia3")
norm = pytest.importorskip("peft_ext.integrations.model_blocks.norm")


@pytest.fixture(autouse=True)
def few_elements(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Removes the limits below which PyTorch computes a norm, and returns the removed limits by dtype."""
    usual = norm.LEAST
    monkeypatch.setattr(norm, "LEAST", {})
    return usual


@pytest.fixture(autouse=True)
def what_is_known_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def checking(common: Callable[[Any, Any], Optional[tuple]]) -> Callable[[Any, Any], Optional[tuple]]:
        def checked(layer: Any, x: Any) -> Optional[tuple]:
            found = common(layer, x)
            assert found is None or found[0] not in known.KNOWN or layer._reasons() == (None, None)
            return found

        return checked

    for kind in (lora.LowRank, ia3.IA3Layer):
        monkeypatch.setattr(kind, "_common", checking(kind._common))
