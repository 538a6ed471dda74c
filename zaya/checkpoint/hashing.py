"""The hashes of a checkpoint: of bytes in memory, and of a range of a file."""

from __future__ import annotations

import os
from collections.abc import Callable

import xxhash

CHUNK_BYTES = 1 << 20
"""Read, hashed, converted and written while it is in the cache of a core."""


def new_hash() -> xxhash.xxh3_128:
    """For bytes that come piece by piece."""
    return xxhash.xxh3_128()


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """The hash of this format: XXH3, 128 bits, as 32 lower-case hex digits (big-endian, as the xxhash tools print it)."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_range(fd: int, begin: int, end: int, progress: Callable[[int], None] = lambda count: None,
               chunk_bytes: int = CHUNK_BYTES) -> str:
    """The hash of bytes [begin, end) of a file, through one buffer of `chunk_bytes`."""
    digest = new_hash()
    buffer = memoryview(bytearray(min(chunk_bytes, end - begin)))
    while begin < end:
        count = os.preadv(fd, [buffer[:end - begin]], begin)
        if not count:
            raise OSError(0, "it ended early")
        digest.update(buffer[:count])
        begin += count
        progress(count)
    return digest.hexdigest()
