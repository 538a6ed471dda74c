"""The GPU computes: what every other GPU test takes for granted."""

from __future__ import annotations

import torch


def test_bf16_matmul_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 1024, generator=generator).bfloat16()
    b = torch.randn(1024, 256, generator=generator).bfloat16()
    expected = a.float() @ b.float()
    got = (a.cuda() @ b.cuda()).float().cpu()
    # The products are exact in fp32 and summed in fp32; what is left is the result's rounding to bf16, 2^-8 at most (1.7e-3 in RMS here).
    assert (got - expected).norm() / expected.norm() < 2**-8
