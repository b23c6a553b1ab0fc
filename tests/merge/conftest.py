import pytest
import torch


@pytest.fixture
def made(tmp_path):
    """Returns ``made(model, config)``, which saves a base and an adapter and returns the two folders."""
    from merged_models import MODELS, trained

    def make(name, config, dtype=torch.float32):
        model = MODELS[name].build().to(dtype)
        model.save_pretrained(tmp_path / "base")
        trained(type(model).from_pretrained(tmp_path / "base", dtype=dtype), config).save_pretrained(
            tmp_path / "adapter"
        )
        return tmp_path / "base", tmp_path / "adapter"

    return make
