"""Where an op adds its weight's gradient by itself: a sum over the micro-batches of a step, in the accumulation dtype (fp32, or fp64).

An op that is given a `GradientSum` adds to it, in that dtype, what autograd would have got rounded to the weight's; autograd gets
`for_autograd`, a zero without memory, by which hooks on the weight learn that the gradient is complete. An op that is given none makes a
temporary one, and hands autograd its total: backward is the same either way. The optimizer's buckets are such sums
(zaya/parallel/zero1.py). Megatron-core's `main_grad` serves the same end by an attribute of the parameter. Knows no op.

Letters: V rows of a weight, D their length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass
class GradientSum:
    """The sum of one weight's gradients, of the weight's shape."""

    total: Tensor
    is_temporary: bool = False
    """total is autograd's own, and rounded as the weight is."""
    begun: bool = False
    """total holds a gradient of this step."""
    added: bool = False
    """Something was added since somebody last set this to False (the optimizer does so once a micro-batch)."""

    @classmethod
    def temporary(cls, weight: Tensor, dtype: torch.dtype | None = None) -> GradientSum:
        """One that lives for a backward pass, in weight's dtype or another."""
        return cls(torch.empty_like(weight, dtype=dtype), is_temporary=True)

    def restart(self) -> None:
        """A new step: what total holds is to be replaced."""
        self.begun = self.added = False

    def first(self) -> bool:
        """Whether the gradient that the caller writes now is the step's first, which replaces total; later ones are added."""
        first, self.begun, self.added = not self.begun, True, True
        return first

    def add(self, gradient: Tensor) -> None:
        """gradient: of total's shape, any dtype."""
        self.total.copy_(gradient) if self.first() else self.total.add_(gradient)

    def add_scaled(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient * factor (0-dim), both in the accumulation dtype."""
        torch.mul(gradient, factor, out=self.total) if self.first() else self.total.addcmul_(gradient, factor)

    def add_rows(self, rows: Tensor, gradients: Tensor) -> None:
        """gradients (..., D), each to the row of total (V, D) that rows (...) int64 names; in a fixed order where several go to one row."""
        if self.first():
            self.total.zero_()
        rows, gradients = rows.flatten(), gradients.flatten(0, -2).to(self.total.dtype)
        if self.total.device.type == "cpu":
            self.total.index_add_(0, rows, gradients)  # on a GPU it uses atomics, in any order
        else:
            self.total.index_put_((rows,), gradients, accumulate=True)  # and this does on a CPU

    def for_autograd(self, dtype: torch.dtype) -> Tensor:
        """What the op's backward returns for the weight, of that dtype: total where it is temporary, else a zero without memory."""
        return self.total.to(dtype) if self.is_temporary else torch.zeros_like(self.total, dtype=dtype, layout=torch.sparse_coo)


class ExpertSums(NamedTuple):
    """Of the experts' two weights."""

    gate_up: GradientSum
    down: GradientSum

    @classmethod
    def temporary(cls, gate_up: Tensor, down: Tensor, dtype: torch.dtype | None = None) -> ExpertSums:
        """See GradientSum.temporary."""
        return cls(GradientSum.temporary(gate_up, dtype), GradientSum.temporary(down, dtype))
