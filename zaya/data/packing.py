"""Labels, positions and documents of packed rows: the one place that knows what may predict what.

Third stage of a batch's path: token windows and their document borders in, the model's inputs out. Pure arrays: knows no file and no order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from zaya.kernels.reference import IGNORE


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, all int64 on the CPU."""

    tokens_BT: torch.Tensor
    """Token ids."""
    labels_BT: torch.Tensor
    """Id of the next token of the same document, or IGNORE."""
    positions_BT: torch.Tensor
    """Index inside the document's piece in this row: 0 at every row start and every document start."""
    documents_BT: torch.Tensor
    """Number of the document's piece in this row: 0, 1, ..."""

    def columns(self, index_T: torch.Tensor) -> Batch:
        """The tokens at these places of every row, as context parallelism divides them."""
        return Batch(*(getattr(self, field.name)[:, index_T] for field in fields(self)))

    def to(self, device: torch.device) -> Batch:
        """In one copy, from pinned memory, so that the host goes on: from other memory it would wait until the device has done all that it
        was given."""
        together = torch.stack([getattr(self, field.name) for field in fields(self)])
        if device.type == "cuda":
            together = together.pin_memory()
        return Batch(*together.to(device, non_blocking=True))


def pack(tokens_BS: NDArray[np.int64], starts_BS: NDArray[np.bool_], targets_BS: NDArray[np.bool_]) -> Batch:
    """Rows of S = T + 1 tokens (the last one is only a label), which of them start a document, which may be predicted.

    The last token of a document predicts nothing: the end token is stored as a document's last token, and nothing predicts across a border.
    """
    starts_BT = starts_BS[:, :-1].copy()
    starts_BT[:, 0] = True  # what stands left of a row is not seen: its first token opens a piece
    index_T = np.arange(starts_BT.shape[1])
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BS[:, :-1].copy()),
        labels_BT=torch.from_numpy(np.where(targets_BS[:, 1:] & ~starts_BS[:, 1:], tokens_BS[:, 1:], IGNORE)),
        positions_BT=torch.from_numpy(index_T - np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)),
        documents_BT=torch.from_numpy(np.cumsum(starts_BT, axis=1) - 1),
    )
