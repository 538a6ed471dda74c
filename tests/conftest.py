"""Rules of the whole test suite: no network, tests/gpu only where there is a GPU, and other seeds in every round of `make soak`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from zaya.preemption import SIGNALS

# Whatever a test loads lies on the disk; a missing file must fail at once instead of asking a hub.
os.environ["HF_HUB_OFFLINE"] = "1"


def has_gpu() -> bool:
    """Whether this machine shows a GPU (AMD, NVIDIA, NVIDIA under WSL), told by its device files: torch would take seconds to say so."""
    hidden = "" in (os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("HIP_VISIBLE_DEVICES"))
    return not hidden and any(True for pattern in ("kfd", "nvidia[0-9]*", "dxg") for _ in Path("/dev").glob(pattern))


# Triton reads it once, as it is imported: without a GPU its kernels run on the CPU, in its interpreter.
if not has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GPU_TESTS = Path(__file__).parent / "gpu"


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """A training run that was signalled ignores these from then on, and so would every process that later tests start."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def terminal(_signals_as_before: None) -> None:
    """The test's processes start as a terminal's, also where the suite itself runs behind nohup or a shell's &, which ignore signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def soak_seed() -> int:
    """For a test to add to its seeds: 0, and in every round of `make soak` another number."""
    return int(os.environ.get("ZAYA_SOAK", "0"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "soak_seed" in getattr(item, "fixturenames", ()):
            item.add_marker("soak")
    gpu_items = [item for item in items if GPU_TESTS in item.path.parents]
    if not gpu_items:
        return
    import torch  # here, because most sessions that collect no GPU test need not pay for it

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
