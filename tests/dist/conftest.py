"""The pools of worker processes, shared by every distributed test of the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dist.pool import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """pools[4].run(fn, *args): fn(rank, 4, *args) on four ranks. A pool starts when it is first asked for."""
    pools = Pools()
    yield pools
    pools.close()
