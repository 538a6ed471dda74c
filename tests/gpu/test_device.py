"""The GPU computes: what every other GPU test takes for granted."""

from __future__ import annotations

from pathlib import Path

import torch

from zaya.checkpoint.read import Checkpoint
from zaya.checkpoint.save import Share
from zaya.checkpoint.saver import Saver


def test_bf16_matmul_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(512, 1024, generator=generator).bfloat16()
    b = torch.randn(1024, 256, generator=generator).bfloat16()
    expected = a.float() @ b.float()
    got = (a.cuda() @ b.cuda()).float().cpu()
    # The products are exact in fp32 and summed in fp32; what is left is the result's rounding to bf16, 2^-8 at most (1.7e-3 in RMS here).
    assert (got - expected).norm() / expected.norm() < 2**-8


def test_a_state_on_the_gpu_is_saved_from_pinned_memory_while_it_changes(tmp_path: Path) -> None:
    tensors = {"wide": torch.randn(1000, 300, device="cuda"), "narrow": torch.randn(777, 64, device="cuda").bfloat16()}
    before = {name: tensor.cpu() for name, tensor in tensors.items()}
    shares = {name: Share(tensor.dtype, tuple(tensor.shape), [(((0, 0), tuple(tensor.shape)), tensor)]) for name, tensor in tensors.items()}
    for limit in (1 << 30, 100_000):  # all of it staged; a part
        saver = Saver(tmp_path / str(limit), gather=lambda value: [value], staging_bytes=limit)
        saver.prepare(shares)
        assert saver._staging is not None and saver._staging._memory.is_pinned()
        for name, tensor in tensors.items():
            tensor.copy_(before[name])
        saver.start(shares, step=1, tokens=0, tokens_by_corpus={}, position=0, recipe={}, layout={})
        for tensor in tensors.values():
            tensor.zero_()
        saver.close()
        checkpoint = Checkpoint.open(tmp_path / str(limit) / "step-00000001")
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in before.items())
