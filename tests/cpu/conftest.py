"""What tests in one process share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from zaya.kernels import backend


@pytest.fixture(autouse=True)
def reference_afterwards() -> Iterator[None]:
    """The choice of kernels is one for the process: the next test shall not inherit it."""
    yield
    backend.choose("reference", torch.device("cpu"), torch.float64, 32)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, or an integer that is no row and no class: what a kernel forgets to write shows."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_sparse:  # GradientSum.for_autograd: there is nothing to poison
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(-(10**9)) if tensor.dtype in (torch.int32, torch.int64) else tensor

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
