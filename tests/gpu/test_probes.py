"""The probes on this GPU: it is good, and a single wrong bit in 67 million is seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zaya.resilience import health, probes

DEVICE = torch.device("cuda:0")


def test_this_gpu_is_good_and_its_readings_are_those_of_a_gpu() -> None:
    report = health.check_node(("cuda:0",), matmul_s=1)
    (device,) = report.devices
    assert report.faults == () and set(device.readings) == set(health.ALONE)
    assert device.readings["tflops"] > 50 and device.readings["copy_gbs"] > 300


def test_one_wrong_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = torch.mm

    def spoiled(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        multiply(a, b, **kwargs)
        kwargs["out"].view(torch.int16)[5000, 3000] ^= 1
        return kwargs["out"]

    monkeypatch.setattr(torch, "mm", spoiled)
    assert probes.matmul(DEVICE, probes.GPU_SIZES, 0)[1] == ["10 of 671,088,640 elements of 10 bf16 products are wrong"]
