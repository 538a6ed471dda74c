"""The worker pool itself: what every distributed test takes for granted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.dist.pool import Pools, WorkerError, WorkerPool


def describe(rank: int, world_size: int, word: str) -> tuple[int, int, str, int]:
    return rank, world_size, word, torch.get_num_threads()


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def summed(rank: int, world_size: int, factor: float) -> torch.Tensor:
    x = torch.full((3,), factor * (rank + 1))
    dist.all_reduce(x)
    return x


def raise_on(rank: int, world_size: int, bad: int, collective: bool) -> None:
    if rank == bad:
        raise ValueError(f"rank {rank} says no")
    if collective:
        dist.barrier()  # for ever: the bad rank never comes


def leave_message_behind(rank: int, world_size: int) -> None:
    """Rank 0 sends what rank 1 never receives: the next call must not receive it either."""
    if rank == 0:
        dist.isend(torch.full((1,), -1.0), dst=1)
    raise ValueError("out of step")


def exchange(rank: int, world_size: int) -> float:
    x = torch.full((1,), 7.0)
    if rank == 0:
        dist.send(x, dst=1)
    else:
        dist.recv(x, src=0)
    return x.item()


def destroy(rank: int, world_size: int) -> bool:
    dist.destroy_process_group()
    return dist.is_initialized()


def sleep_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        time.sleep(600)


def die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(9)
    dist.barrier()


def test_results_come_by_rank_and_workers_have_one_thread(pools: Pools) -> None:
    assert pools[2].run(describe, "hi") == [(0, 2, "hi", 1), (1, 2, "hi", 1)]


def test_collectives_work_and_reuse_is_fast(pools: Pools) -> None:
    pools[2].run(summed, 1.0)
    start = time.monotonic()
    results = pools[2].run(summed, 2.0)
    assert time.monotonic() - start < 1.0
    assert [r.tolist() for r in results] == [[6.0] * 3] * 2


def test_a_raising_rank_is_reported_and_the_workers_live_on(pools: Pools) -> None:
    before = pools[2].run(process_id)
    with pytest.raises(WorkerError, match="(?s)rank 1 of 2 raised.*in raise_on.*ValueError: rank 1 says no") as caught:
        pools[2].run(raise_on, 1, False)
    assert caught.value.rank == 1
    assert pools[2].run(process_id) == before


def test_a_failed_call_leaves_no_message_to_the_next(pools: Pools) -> None:
    with pytest.raises(WorkerError, match="out of step"):
        pools[2].run(leave_message_behind)
    assert pools[2].run(exchange) == [7.0, 7.0]


def test_a_destroyed_group_is_made_anew(pools: Pools) -> None:
    before = pools[2].run(process_id)
    assert pools[2].run(destroy) == [False, False]
    assert pools[2].run(summed, 1.0)[0].tolist() == [3.0] * 3
    assert pools[2].run(process_id) == before


@pytest.fixture(scope="module")
def own_pool() -> Iterator[WorkerPool]:
    """Of this file alone: its workers get killed."""
    pool = WorkerPool(2)
    yield pool
    pool.close()


def test_a_hang_is_killed_in_time_and_says_where(own_pool: WorkerPool) -> None:
    before = own_pool.run(process_id)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="(?s)rank 1 did not answer within 1 s.*in sleep_on") as caught:
        own_pool.run(sleep_on, 1, timeout_s=1)
    assert time.monotonic() - start < 5
    assert caught.value.rank == 1
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert own_pool.run(summed, 1.0)[1].tolist() == [3.0] * 3


def test_the_culprit_is_named_while_others_wait_in_a_collective(own_pool: WorkerPool) -> None:
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 0 says no") as caught:
        own_pool.run(raise_on, 0, True)
    assert time.monotonic() - start < 8  # the grace, not the timeout of 120 s
    assert caught.value.rank == 0


def test_a_dead_worker_is_named(own_pool: WorkerPool) -> None:
    with pytest.raises(WorkerError, match="rank 1 died with exit code 9"):
        own_pool.run(die)
    assert own_pool.run(describe, "again")[1][:3] == (1, 2, "again")
