"""In each test here a LoRA layer that takes its short way is asked for the reasons of the long one as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import pytest

lora = pytest.importorskip("peft_ext.integrations.fused.lora")


@pytest.fixture(autouse=True)
def the_short_way_has_no_reason(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    usual = lora.Lora._usual

    def checked(layer: Any, x: Any) -> Optional[tuple]:
        found = usual(layer, x)
        assert found is None or layer._reasons() == (None, None)
        return found

    monkeypatch.setattr(lora.Lora, "_usual", checked)
    yield
