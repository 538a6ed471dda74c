"""The grouped matrix products of the experts: rows sorted by expert, each group times its expert's matrix.

Three kernels over tiles of rows, whose table (`_tiles_kernel`) is made on the device from the group sizes, so nothing waits for the host:
gate_up with SwiGLU, its backward, and one plain product that serves down and the gradient of the input. A fourth makes weight gradients.
Any group may be empty or hold all rows; rows of no expert (skipped tokens) come last, and their results are zero.

A program walks the tiles in steps of the grid. Over several dies the grid is persistent, as many programs as fill the CUs: work-groups go
round-robin over the dies, so program ids are first renumbered to give each die (XCD) neighbouring tiles, which share its L2. On one die it
has a program per tile, which the hardware hands out as multiprocessors become free, as tiles do not cost the same: the last one of a group
is a tail tile, computed with TAIL_M rows, where it has no more than that. With a TAIL_M of BLOCK_M there are no tail tiles.

Out-of-range rows and columns read valid ones instead of being masked: what they compute is not stored, and the inner loop stays free of
masks. Scalar bases are 64-bit, offsets inside a tile 32-bit; so are those of gathered rows unless their tensor is larger than
that (WIDE).

Letters: R assignments (rows in the order of experts), D hidden, F expert width, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tiles_kernel(sizes, tiles, offsets, largest_first, num_rows, max_tiles, E: tl.constexpr, BLOCK_E: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """sizes (E,) -> tiles (1 + max_tiles, 4) int32: [0, 0] = their number, row 1 + t = (expert, first row, end row); offsets (E + 1,):
    first row of each expert, then of the rows of none; largest_first (E,): experts by size."""
    groups = tl.arange(0, BLOCK_E)
    size = _size(sizes, groups, num_rows, E)
    end = tl.minimum(tl.cumsum(size, axis=0), num_rows)
    start = tl.minimum(end, tl.cumsum(size, axis=0) - size)
    num_tiles = tl.cdiv(end - start, BLOCK_M)
    tile_end = tl.cumsum(num_tiles, axis=0)
    tile_start = tile_end - num_tiles

    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    group = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    mine = group[:, None] == groups[None, :]
    first = tl.sum(tl.where(mine, start[None, :] + (tile[:, None] - tile_start[None, :]) * BLOCK_M, 0), axis=1)
    last = tl.sum(tl.where(mine, end[None, :], 0), axis=1)
    at = tiles + 4 * (1 + tile)
    tl.store(at, group, mask=tile < max_tiles)
    tl.store(at + 1, first, mask=tile < max_tiles)
    tl.store(at + 2, last, mask=tile < max_tiles)
    # There are at least as many tiles in the grid as experts: each program ranks those that bear its tiles' numbers.
    own, other = _size(sizes, tile, num_rows, E)[:, None], tl.where(groups < E, size, -1)[None, :]
    ahead = (other > own) | ((other == own) & (groups[None, :] < tile[:, None]))
    tl.store(largest_first + tl.sum(ahead.to(tl.int32), axis=1), tile, mask=tile < E)
    if tl.program_id(0) == 0:
        tl.store(tiles, tl.sum(num_tiles, axis=0))
        tl.store(offsets + groups, start, mask=groups <= E)


@triton.jit
def _size(sizes, groups, num_rows, E: tl.constexpr):
    """Rows of each, 0 of those that are no expert. A wrong one must neither leave the rows nor overflow a sum."""
    size = tl.load(sizes + groups, mask=groups < E, other=0)
    return tl.minimum(tl.maximum(size, 0), num_rows).to(tl.int32)


@triton.jit
def _by_die(pid, num_programs, CHUNK: tl.constexpr, NUM_XCDS: tl.constexpr):
    """Renumber programs so that each die gets runs of CHUNK neighbouring numbers; programs beyond whole rounds keep theirs."""
    whole = num_programs // (CHUNK * NUM_XCDS) * (CHUNK * NUM_XCDS)
    die, turn = pid % NUM_XCDS, pid // NUM_XCDS
    moved = turn // CHUNK * (CHUNK * NUM_XCDS) + die * CHUNK + turn % CHUNK
    return tl.where(pid < whole, moved, pid)


@triton.jit
def _tile_at(tile, num_m, NUM_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile number -> (m, n): GROUP_M tiles below one another, then the next column, so that neighbours share rows and weights."""
    first = tile // (GROUP_M * NUM_N) * GROUP_M
    num_below = tl.minimum(num_m - first, GROUP_M)
    inside = tile % (GROUP_M * NUM_N)
    return first + inside % num_below, inside // num_below


@triton.jit
def _table_entry(tiles, m):
    """Row m of the table: expert, first row, and height: how many rows the tile has, at least one and at most BLOCK_M."""
    expert = tl.load(tiles + 4 * (1 + m)).to(tl.int64)
    first = tl.load(tiles + 4 * (1 + m) + 1)
    return expert, first, tl.load(tiles + 4 * (1 + m) + 2) - first


@triton.jit
def _own_rows(height, BLOCK_M: tl.constexpr):
    """A tile's rows counted from its first (the last valid one repeated), and which of them are its own."""
    rows = tl.arange(0, BLOCK_M)
    # A tile has a row; saying so lets the compiler see that no offset is negative, and use loads with 32-bit offsets.
    return tl.minimum(rows, tl.maximum(height - 1, 0)), rows < height


@triton.jit
def _columns(first, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of a tile counted from its first, none beyond the last valid one; only where N does not divide into tiles is there a choice.
    Where 8 divides N the columns beyond are the tile's first eight again, in order, so that loads stay wide; elsewhere the last one."""
    columns = tl.arange(0, BLOCK_N)
    if N % BLOCK_N == 0:
        return columns
    elif N % 8 == 0:
        return tl.max_contiguous(tl.multiple_of(tl.where(columns < N - first, columns, columns % 8), 8), 8)
    else:
        return tl.minimum(columns, N - 1 - first)


@triton.jit
def _row_offsets(rows, width: tl.constexpr, WIDE: tl.constexpr):
    """Where rows of any tensor start: 32-bit where the whole tensor allows it, which saves registers and additions."""
    return rows.to(tl.int64) * width if WIDE else rows * width


@triton.jit
def _token_rows(x, order, first, rows, width: tl.constexpr, TOP_K: tl.constexpr, WIDE: tl.constexpr):
    """A scalar pointer into x, which has a row per token, and from there the offsets of a tile's rows. order None: x is sorted already."""
    if order is None:
        start, offsets = x + first.to(tl.int64) * width, rows * width
    else:
        start, offsets = x, _row_offsets(tl.load(order + first + rows) // TOP_K, width, WIDE)
    return start, offsets


@triton.jit
def _product(a, a_at, b, b_at, b_step, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """sum over K of a (BLOCK_M, BLOCK_K) @ b (BLOCK_K, BLOCK_N) in fp32. Offsets *_at stay, the scalar pointers a and b move: they live
    in scalar registers."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ks = tl.arange(0, BLOCK_K)
    for k in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x, w = tl.load(a + a_at), tl.load(b + b_at)
        else:
            x = tl.load(a + a_at, mask=ks[None, :] < K - k, other=0.0)
            w = tl.load(b + b_at, mask=ks[:, None] < K - k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        a += BLOCK_K
        b += b_step
    return acc


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of a tile: the matrix cores' layout has them in different registers of a lane, so it costs nothing."""
    return x.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()


@triton.jit
def _inside(is_row, columns, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mask of a tile's stores; one of rows alone where the columns divide into tiles."""
    return is_row[:, None] if N % BLOCK_N == 0 else is_row[:, None] & (columns < N)[None, :]


@triton.jit
def _swiglu_fwd(gate, up, h, act, rows, is_row, columns, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """A part of the epilogue of a tile of BLOCK_N columns of gate and as many of up: writes h and act."""
    mask = _inside(is_row, columns, F, BLOCK_N)
    to_h = h + rows[:, None] * (2 * F) + columns[None, :]
    tl.store(to_h, gate.to(h.dtype.element_ty), mask=mask)
    tl.store(to_h + F, up.to(h.dtype.element_ty), mask=mask)
    tl.store(act + rows[:, None] * F + columns[None, :], (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty), mask=mask)


@triton.jit
def _gate_up_fwd_tile(x, weights, order, h, act, expert, first, height, n, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile of _gate_up_fwd_kernel, BLOCK_M rows high: the kernel's own BLOCK_M or its TAIL_M."""
    HALF: tl.constexpr = BLOCK_N // 2
    rows, is_row = _own_rows(height, BLOCK_M)
    a, a_rows = _token_rows(x, order, first, rows, D, TOP_K, WIDE)
    both, ks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    column = both % HALF
    if F % HALF:
        column = tl.minimum(column, F - 1 - n * HALF)
    column = tl.where(both < HALF, column, column + F)
    b = weights + expert * (2 * F * D) + n * HALF * D
    acc = _product(a, a_rows[:, None] + ks[None, :], b, column[None, :] * D + ks[:, None], BLOCK_K, D, BLOCK_M, BLOCK_N, BLOCK_K)
    gate, up = _halves(acc, BLOCK_M, HALF)
    gates, ups = _halves(gate, BLOCK_M, HALF // 2), _halves(up, BLOCK_M, HALF // 2)
    start, columns = first.to(tl.int64), n * HALF + tl.arange(0, HALF // 2)
    for half in tl.static_range(2):  # a lane then stores half as many rows; their numbers stay in registers all the while
        _swiglu_fwd(gates[half], ups[half], h + start * (2 * F), act + start * F, rows, is_row, columns + half * (HALF // 2), F, HALF)


@triton.jit
def _gate_up_fwd_kernel(x, weights, order, tiles, h, act, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, NUM_XCDS: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr, GROUP_M: tl.constexpr,
                        TAIL_M: tl.constexpr):
    """h = x[token] @ [gate | up]^T (R, 2F) and act = silu(gate) * up (R, F). A tile holds BLOCK_N / 2 columns of gate on its left and the
    same columns of up on its right. order None: x is sorted already."""
    NUM_N: tl.constexpr = (2 * F + BLOCK_N - 1) // BLOCK_N
    num_programs = tl.num_programs(0)
    num_m = tl.load(tiles)
    for tile in range(_by_die(tl.program_id(0), num_programs, num_programs // NUM_XCDS, NUM_XCDS), num_m * NUM_N, num_programs):
        m, n = _tile_at(tile, num_m, NUM_N, GROUP_M)
        expert, first, height = _table_entry(tiles, m)
        if TAIL_M < BLOCK_M and height <= TAIL_M:  # the first half is known when compiling: where it is false, one product is compiled
            _gate_up_fwd_tile(x, weights, order, h, act, expert, first, height, n, D, F, TOP_K, BLOCK_N, BLOCK_K, WIDE, BLOCK_M=TAIL_M)
        else:
            _gate_up_fwd_tile(x, weights, order, h, act, expert, first, height, n, D, F, TOP_K, BLOCK_N, BLOCK_K, WIDE, BLOCK_M=BLOCK_M)


@triton.jit
def _swiglu_bwd(dact, h, dh, act, row_gate, rows, is_row, columns, F: tl.constexpr, BLOCK_N: tl.constexpr):
    """A part of the epilogue of a tile of BLOCK_N columns: writes dh and gate * act, returns each row's share of <dact, act>."""
    mask = _inside(is_row, columns, F, BLOCK_N)
    at = rows[:, None] * (2 * F) + columns[None, :]
    if F % BLOCK_N:
        gate, up = tl.load(h + at, mask=mask, other=0.0).to(tl.float32), tl.load(h + at + F, mask=mask, other=0.0).to(tl.float32)
    else:
        gate, up = tl.load(h + at).to(tl.float32), tl.load(h + at + F).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    share = tl.sum(dact * (silu * up), axis=1)
    dact *= row_gate[:, None]
    tl.store(dh + at, (dact * up * (sigmoid + silu * (1 - sigmoid))).to(dh.dtype.element_ty), mask=mask)
    tl.store(dh + at + F, (dact * silu).to(dh.dtype.element_ty), mask=mask)
    to_act = act + rows[:, None] * F + columns[None, :]
    tl.store(to_act, (silu * up * row_gate[:, None]).to(act.dtype.element_ty), mask=mask)
    return share


@triton.jit
def _gate_up_bwd_tile(dy, weights, order, gates, h, dh, act, dgate_parts, num_rows, expert, first, height, n, D: tl.constexpr,
                      F: tl.constexpr, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
                      BLOCK_M: tl.constexpr):
    """A tile of _gate_up_bwd_kernel, BLOCK_M rows high: the kernel's own BLOCK_M or its TAIL_M."""
    HALF: tl.constexpr = BLOCK_N // 2
    rows, is_row = _own_rows(height, BLOCK_M)
    a, a_rows = _token_rows(dy, order, first, rows, D, TOP_K, WIDE)
    ks = tl.arange(0, BLOCK_K)
    b = weights + expert * (D * F) + n * BLOCK_N
    b_at = ks[:, None] * F + _columns(n * BLOCK_N, F, BLOCK_N)[None, :]
    acc = _product(a, a_rows[:, None] + ks[None, :], b, b_at, BLOCK_K * F, D, BLOCK_M, BLOCK_N, BLOCK_K)
    left, right = _halves(acc, BLOCK_M, HALF)
    row_gate = tl.full((BLOCK_M,), 1.0, tl.float32) if gates is None else tl.load(gates + tl.load(order + first + rows))
    start = first.to(tl.int64)
    to_h, to_dh, to_act = h + start * (2 * F), dh + start * (2 * F), act + start * F
    columns = n * BLOCK_N + tl.arange(0, HALF // 2)
    share = tl.zeros((BLOCK_M,), tl.float32)
    for half in tl.static_range(2):
        one, two = _halves(left if half == 0 else right, BLOCK_M, HALF // 2)
        share += _swiglu_bwd(one, to_h, to_dh, to_act, row_gate, rows, is_row, columns, F, BLOCK_N)
        share += _swiglu_bwd(two, to_h, to_dh, to_act, row_gate, rows, is_row, columns + HALF // 2, F, BLOCK_N)
        columns += HALF
    if dgate_parts is not None:
        tl.store(dgate_parts + n.to(tl.int64) * num_rows + first + rows, share, mask=is_row)


@triton.jit
def _gate_up_bwd_kernel(dy, weights, order, gates, tiles, h, dh, act, dgate_parts, num_rows, D: tl.constexpr, F: tl.constexpr,
                        TOP_K: tl.constexpr, NUM_XCDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr, WIDE: tl.constexpr, GROUP_M: tl.constexpr, TAIL_M: tl.constexpr):
    """dact = dy[token] @ down (before the gate), and from it and h: dh (R, 2F), gate * act (R, F) for down's gradient, and per column of
    tiles the sum of dact * act (columns, R), which is the gate's gradient <dy, y> without y."""
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    num_programs = tl.num_programs(0)
    num_m = tl.load(tiles)
    for tile in range(_by_die(tl.program_id(0), num_programs, num_programs // NUM_XCDS, NUM_XCDS), num_m * NUM_N, num_programs):
        m, n = _tile_at(tile, num_m, NUM_N, GROUP_M)
        expert, first, height = _table_entry(tiles, m)
        if TAIL_M < BLOCK_M and height <= TAIL_M:
            _gate_up_bwd_tile(dy, weights, order, gates, h, dh, act, dgate_parts, num_rows, expert, first, height, n, D, F, TOP_K,
                              BLOCK_N, BLOCK_K, WIDE, BLOCK_M=TAIL_M)
        else:
            _gate_up_bwd_tile(dy, weights, order, gates, h, dh, act, dgate_parts, num_rows, expert, first, height, n, D, F, TOP_K,
                              BLOCK_N, BLOCK_K, WIDE, BLOCK_M=BLOCK_M)


@triton.jit
def _store_rows(tile, out, order, first, rows, is_row, n, N: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a tile to their places: out[order[row]], or out[row] where they are to stay sorted."""
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = _inside(is_row, columns, N, BLOCK_N)
    if order is None:
        to = out + first.to(tl.int64) * N + rows[:, None] * N + columns[None, :]
    else:
        to = out + _row_offsets(tl.load(order + first + rows), N, WIDE)[:, None] + columns[None, :]
    tl.store(to, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rows_tile(a_rows, weights, order, gates, out, expert, first, height, n, K: tl.constexpr, N: tl.constexpr, K_IS_INNER: tl.constexpr,
               WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile of _rows_kernel, BLOCK_M rows high: the kernel's own BLOCK_M or its TAIL_M."""
    rows, is_row = _own_rows(height, BLOCK_M)
    ks, column = tl.arange(0, BLOCK_K), _columns(n * BLOCK_N, N, BLOCK_N)
    a, b = a_rows + first.to(tl.int64) * K, weights + expert * (K * N)
    a_at = rows[:, None] * K + ks[None, :]
    if K_IS_INNER:
        b_at = column[None, :] * K + ks[:, None]
        acc = _product(a, a_at, b + n * BLOCK_N * K, b_at, BLOCK_K, K, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        b_at = ks[:, None] * N + column[None, :]
        acc = _product(a, a_at, b + n * BLOCK_N, b_at, BLOCK_K * N, K, BLOCK_M, BLOCK_N, BLOCK_K)
    if gates is not None:
        acc *= tl.load(gates + tl.load(order + first + rows))[:, None]
    _store_rows(acc, out, order, first, rows, is_row, n, N, BLOCK_N, WIDE)


@triton.jit
def _rows_kernel(a_rows, weights, order, gates, tiles, offsets, out, num_rows, E: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
                 K_IS_INNER: tl.constexpr, WIDE: tl.constexpr, NUM_XCDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, TAIL_M: tl.constexpr):
    """out[order[r]] = gate * (a_rows[r] @ weights[expert]); rows of no expert become zero. weights (E, N, K) where K_IS_INNER, else
    (E, K, N). order None: out[r]; gates None: no gate."""
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    num_programs = tl.num_programs(0)
    pid = _by_die(tl.program_id(0), num_programs, num_programs // NUM_XCDS, NUM_XCDS)
    num_m = tl.load(tiles)
    for tile in range(pid, num_m * NUM_N, num_programs):
        m, n = _tile_at(tile, num_m, NUM_N, GROUP_M)
        expert, first, height = _table_entry(tiles, m)
        if TAIL_M < BLOCK_M and height <= TAIL_M:
            _rows_tile(a_rows, weights, order, gates, out, expert, first, height, n, K, N, K_IS_INNER, WIDE, BLOCK_N, BLOCK_K,
                       BLOCK_M=TAIL_M)
        else:
            _rows_tile(a_rows, weights, order, gates, out, expert, first, height, n, K, N, K_IS_INNER, WIDE, BLOCK_N, BLOCK_K,
                       BLOCK_M=BLOCK_M)
    # Row by row, because another loop over whole tiles would cost the first one registers.
    for row in range(tl.load(offsets + E) + pid, num_rows, num_programs):
        place = tl.cast(row if order is None else tl.load(order + row), tl.int64)
        for column in range(0, N, 1024):
            columns = column + tl.arange(0, 1024)
            tl.store(out + place * N + columns, tl.zeros((1024,), out.dtype.element_ty), mask=columns < N)


@triton.jit
def _dgate_kernel(parts, order, offsets, dgate, num_rows, E: tl.constexpr, NUM_PARTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """dgate[order[r]] = sum of the parts of row r, one after the other; 0 for rows of no expert."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row, is_routed = rows < num_rows, rows < tl.load(offsets + E)
    total = tl.zeros((BLOCK_R,), tl.float32)
    at = parts + rows
    for _ in range(NUM_PARTS):
        total += tl.load(at, mask=is_row, other=0.0)
        at += num_rows
    total = tl.where(is_routed, total, 0.0)
    tl.store(dgate + tl.load(order + rows, mask=is_row, other=0), total, mask=is_row)


@triton.jit
def _store_tile(tile, out, rows, columns, M: tl.constexpr, N: tl.constexpr, ACCUMULATE: tl.constexpr):
    """A tile of out (M, N), or a part of one, replaced or added to."""
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    to = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    if ACCUMULATE:
        tile += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, tile.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _weight_grad_kernel(a_rows, b_rows, order, offsets, largest_first, out, E: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
                        TOP_K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, ACCUMULATE: tl.constexpr,
                        NUM_XCDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                        WIDE: tl.constexpr, GROUP_M: tl.constexpr):
    """out[expert] (M, N) = sum over the expert's rows of a_rows[r]^T b_rows[r], in fp32; added to out where ACCUMULATE. GATHER_A, GATHER_B:
    that operand is in token order. A program per tile, largest experts first: the hardware hands out tiles as CUs become free, which
    keeps them busy under skewed routing, where a fixed share for each would wait for the largest."""
    NUM_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = _by_die(tl.program_id(0), E * NUM_M * NUM_N, 32, NUM_XCDS)
    expert = tl.load(largest_first + tile // (NUM_M * NUM_N))
    m, n = _tile_at(tile % (NUM_M * NUM_N), NUM_M, NUM_N, GROUP_M)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    a_rows += m * BLOCK_M
    b_rows += n * BLOCK_N
    a_column, b_column, ks = _columns(m * BLOCK_M, M, BLOCK_M), _columns(n * BLOCK_N, N, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    GATHER: tl.constexpr = GATHER_A or GATHER_B
    places = tl.load(order + start + ks, mask=start + ks < end, other=0) if GATHER else ks
    for first in range(start, whole, BLOCK_K):
        rows, tokens = first + ks, places // TOP_K
        a_at, b_at = _row_offsets(tokens if GATHER_A else rows, M, WIDE), _row_offsets(tokens if GATHER_B else rows, N, WIDE)
        if GATHER:  # a block ahead (in the last block its own again): a load that waits for another one's result cannot be issued early
            places = tl.load(order + tl.minimum(first + BLOCK_K, whole - BLOCK_K) + ks)
        a = tl.load(a_rows + a_at[None, :] + a_column[:, None])
        b = tl.load(b_rows + b_at[:, None] + b_column[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if whole < end:  # the last, partial block of rows: the only one with a mask
        rows = whole + ks
        is_row = rows < end
        tokens = tl.load(order + rows, mask=is_row, other=0) // TOP_K if GATHER else rows
        a_at, b_at = _row_offsets(tokens if GATHER_A else rows, M, WIDE), _row_offsets(tokens if GATHER_B else rows, N, WIDE)
        a = tl.load(a_rows + a_at[None, :] + a_column[:, None], mask=is_row[None, :], other=0.0)
        b = tl.load(b_rows + b_at[:, None] + b_column[None, :], mask=is_row[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    rows, column = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N
    out += expert.to(tl.int64) * (M * N)
    if ACCUMULATE:  # a quarter at a time: beside a tile there are no registers for another
        columns = column + tl.arange(0, BLOCK_N // 4)
        left, right = _halves(acc, BLOCK_M, BLOCK_N // 2)
        for half in tl.static_range(2):
            one, two = _halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 4)
            _store_tile(one, out, rows, columns, M, N, True)
            _store_tile(two, out, rows, columns + BLOCK_N // 4, M, N, True)
            columns += BLOCK_N // 2
    else:
        _store_tile(acc, out, rows, column + tl.arange(0, BLOCK_N), M, N, False)
