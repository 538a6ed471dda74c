"""Rules of the whole test suite: no network, and tests/gpu only where there is a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Whatever a test loads lies on the disk; a missing file must fail at once instead of asking a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if GPU_TESTS in item.path.parents]
    if not gpu_items:
        return
    import torch  # here, because most sessions that collect no GPU test need not pay for it

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
