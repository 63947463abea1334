"""Triton kernels of linear_logprob. Launchers and the choice between them: linear_logprob_triton.

Two ways to the same numbers. Chunked: cuBLAS writes fp32 logits of one (token, vocabulary) chunk that stays
in L2, `chunk_statistics` / `chunk_dlogits` read them once. Fused: the GEMM itself, with statistics or dlogits
as its epilogue (`fused_statistics`, `fused_dlogits`), nothing but the result leaving the SM.

Statistics are those of vocab_parallel, in nats; exponentials are taken in base 2, the hardware's own.
"""

import triton
import triton.language as tl

# Sizes and offsets that change from call to call are not specialised on, so that one binary serves all of
# them: the one that compile_check inspects.

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# vocab_parallel.EMPTY: finite, so that 0 * (EMPTY - m) stays 0
EMPTY = tl.constexpr(-1e30)


@triton.jit
def _merge(m0, s0, u0, m1, s1, u1):
    """Statistics of two disjoint column ranges -> statistics of their union."""
    m = tl.maximum(m0, m1)
    d0 = m0 - m
    d1 = m1 - m
    c0 = tl.exp2(d0 * LOG2E)
    c1 = tl.exp2(d1 * LOG2E)
    return m, c0 * s0 + c1 * s1, c0 * (u0 + s0 * d0) + c1 * (u1 + s1 * d1)


@triton.jit(
    do_not_specialize=["T", "cols", "col0"],
    do_not_specialize_on_alignment=["target_ptr", "stats_ptr", "kept_max_ptr"],
)
def chunk_statistics(
    z_ptr, target_ptr, stats_ptr, kept_ptr, kept_max_ptr,
    T, cols, col0, scale, stride_z, stride_kept,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of raw logits z[row, :cols], columns col0.. of the shard, merged into stats[4, T] in place.

    KEEP: also store exp(z - max) of the row and the max, for the backward pass. cols <= BLOCK.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < cols
    z = tl.load(z_ptr + row * stride_z + offs, mask=inside, other=EMPTY) * scale
    y = tl.load(target_ptr + row) - col0
    m = tl.max(z, 0)
    d = z - m
    e = tl.where(inside, tl.exp2(d * LOG2E), 0.0)
    s = tl.sum(e, 0)
    u = tl.sum(tl.where(inside, e * d, 0.0), 0)
    if KEEP:
        kept_at = kept_ptr + row * stride_kept + offs
        tl.store(kept_at, e.to(kept_ptr.dtype.element_ty), mask=inside)
        tl.store(kept_max_ptr + row, m)
    at = stats_ptr + row
    m, s, u = _merge(tl.load(at), tl.load(at + T), tl.load(at + 2 * T), m, s, u)
    tl.store(at, m)
    tl.store(at + T, s)
    tl.store(at + 2 * T, u)
    if (y >= 0) & (y < cols):
        tl.store(at + 3 * T, tl.sum(tl.where(offs == y, z, 0.0), 0))


@triton.jit(
    do_not_specialize=["cols", "col0"],
    do_not_specialize_on_alignment=[
        "kept_max_ptr",
        "target_ptr",
        "lse_ptr",
        "entropy_ptr",
        "grad_logprob_ptr",
        "grad_entropy_ptr",
    ],
)
def chunk_dlogits(
    z_ptr, kept_max_ptr, target_ptr, lse_ptr, entropy_ptr, grad_logprob_ptr, grad_entropy_ptr, dz_ptr,
    cols, col0, scale, stride_z, stride_dz,
    KEPT: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of dz = g_lp (1[y] - p) - g_H p (log p + entropy), from raw logits or (KEPT) kept exponentials.

    cols <= BLOCK. z_ptr and dz_ptr are at the chunk's first column, which is column col0 of the shard.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < cols
    z = tl.load(z_ptr + row * stride_z + offs, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(target_ptr + row) - col0
    lse = tl.load(lse_ptr + row)
    g_lp = tl.load(grad_logprob_ptr + row)
    if KEPT:
        shift = tl.load(kept_max_ptr + row) - lse
        p = z * tl.exp2(shift * LOG2E)
        # an underflowed exponential has p = 0, and p log p = 0
        log_p = tl.where(z > 0, tl.log(tl.where(z > 0, z, 1.0)) + shift, 0.0)
    else:
        log_p = z * scale - lse
        p = tl.exp2(log_p * LOG2E)
    slope = g_lp
    if ENTROPY:
        slope = g_lp + tl.load(grad_entropy_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    dz = tl.where(offs == y, g_lp, 0.0) - p * slope
    tl.store(dz_ptr + row * stride_dz + offs, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_at(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile): GROUP_M row tiles share each column tile of the weight while it is in L2."""
    width = GROUP_M * tiles_n
    first = tile // width * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    return first + (tile % width) % size, (tile % width) // size


@triton.jit
def _store_tile_statistics(z, scale, col, y, at, T, TILES_T, inside, V, BN: tl.constexpr):
    """Statistics of the fp32 tile z [BM, BN] whose first column is col, at [4, tiles, T]."""
    offs = tl.arange(0, BN)
    z = tl.where((col + offs < V)[None, :], z * scale, EMPTY)
    m = tl.max(z, 1)
    d = z - m[:, None]
    e = tl.exp2(d * LOG2E)
    tl.store(at, m, mask=inside)
    tl.store(at + TILES_T, tl.sum(e, 1), mask=inside)
    # masked columns: e = 0 and d finite, so their product is 0
    tl.store(at + 2 * TILES_T, tl.sum(e * d, 1), mask=inside)
    tl.store(at + 3 * TILES_T, tl.sum(tl.where(offs[None, :] == y[:, None], z, 0.0), 1), mask=inside)


@triton.jit(
    do_not_specialize=["T", "V", "H", "programs"],
    do_not_specialize_on_alignment=["target_ptr", "tiles_ptr"],
)
def fused_statistics(
    hidden, weight, target_ptr, tiles_ptr, T, V, H, scale, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Statistics per (half tile, row) at tiles[4, 2 * cdiv(V, BN), T]; `reduce_statistics` finishes them.

    hidden, weight: tensor descriptors of [T, H] and [V, H] with blocks [BM, BK] and [BN, BK]. Persistent.
    Halves of the accumulator are reduced in turn: a whole one beside its exponentials spills.
    """
    tiles_m = tl.cdiv(T, BM)
    tiles_n = tl.cdiv(V, BN)
    tiles_t = 2 * tiles_n.to(tl.int64) * T
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        pm, pn = _tile_at(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, H, BK):
            acc = tl.dot(hidden.load([pm * BM, k]), weight.load([pn * BN, k]).T, acc)
        z0, z1 = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        rows = pm * BM + tl.arange(0, BM)
        inside = rows < T
        # another shard's target is -1 and matches no column
        y = tl.load(target_ptr + rows, mask=inside, other=-1) - pn * BN
        at = tiles_ptr + 2 * pn.to(tl.int64) * T + rows
        _store_tile_statistics(z0, scale, pn * BN, y, at, T, tiles_t, inside, V, BN // 2)
        _store_tile_statistics(
            z1, scale, pn * BN + BN // 2, y - BN // 2, at + T, T, tiles_t, inside, V, BN // 2
        )


@triton.jit(
    do_not_specialize=["tiles", "T", "stats_stride"],
    do_not_specialize_on_alignment=["tiles_ptr", "stats_ptr"],
)
def reduce_statistics(tiles_ptr, stats_ptr, tiles, T, stats_stride, BT: tl.constexpr, BR: tl.constexpr):
    """tiles[4, tiles, T] -> stats[4, :T], rows stats_stride apart. t is a sum: one tile owns the target."""
    cols = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = cols < T
    m = tl.full([BT], EMPTY, tl.float32)
    s = tl.zeros([BT], tl.float32)
    u = tl.zeros([BT], tl.float32)
    t = tl.zeros([BT], tl.float32)
    plane = tiles.to(tl.int64) * T
    for r0 in range(0, tiles, BR):
        r = r0 + tl.arange(0, BR)
        mask = (r < tiles)[:, None] & inside[None, :]
        at = tiles_ptr + r.to(tl.int64)[:, None] * T + cols[None, :]
        mi = tl.load(at, mask=mask, other=EMPTY)
        si = tl.load(at + plane, mask=mask, other=0.0)
        ui = tl.load(at + 2 * plane, mask=mask, other=0.0)
        t += tl.sum(tl.load(at + 3 * plane, mask=mask, other=0.0), 0)
        m1 = tl.max(mi, 0)
        di = mi - m1[None, :]
        ci = tl.exp2(di * LOG2E)
        m, s, u = _merge(m, s, u, m1, tl.sum(ci * si, 0), tl.sum(ci * (ui + si * di), 0))
    tl.store(stats_ptr + cols, m, mask=inside)
    tl.store(stats_ptr + stats_stride + cols, s, mask=inside)
    tl.store(stats_ptr + 2 * stats_stride + cols, u, mask=inside)
    tl.store(stats_ptr + 3 * stats_stride + cols, t, mask=inside)


@triton.jit
def _dlogits_tile(z, scale, lse, g_lp, g_en, entropy, y, ENTROPY: tl.constexpr, BN: tl.constexpr):
    log_p = z * scale - lse[:, None]
    p = tl.exp2(log_p * LOG2E)
    if ENTROPY:
        p = p * (g_lp[:, None] + g_en[:, None] * (log_p + entropy[:, None]))
    else:
        p = p * g_lp[:, None]
    return tl.where(tl.arange(0, BN)[None, :] == y[:, None], g_lp[:, None] - p, -p)


@triton.jit(
    do_not_specialize=["T", "V", "H", "col0", "programs"],
    do_not_specialize_on_alignment=[
        "target_ptr",
        "lse_ptr",
        "entropy_ptr",
        "grad_logprob_ptr",
        "grad_entropy_ptr",
    ],
)
def fused_dlogits(
    hidden, weight, dz, target_ptr, lse_ptr, entropy_ptr, grad_logprob_ptr, grad_entropy_ptr,
    T, V, H, col0, scale, programs,
    ENTROPY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """dz[T, V] of `chunk_dlogits` for V columns of the shard starting at col0, recomputing their logits.

    weight and dz describe those columns alone; dz has blocks [BM, BN // 2].
    """
    tiles_m = tl.cdiv(T, BM)
    tiles_n = tl.cdiv(V, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs):
        pm, pn = _tile_at(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, H, BK):
            acc = tl.dot(hidden.load([pm * BM, k]), weight.load([pn * BN, k]).T, acc)
        rows = pm * BM + tl.arange(0, BM)
        inside = rows < T
        y = tl.load(target_ptr + rows, mask=inside, other=-1) - col0 - pn * BN
        lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
        g_lp = tl.load(grad_logprob_ptr + rows, mask=inside, other=0.0)
        g_en = g_lp
        entropy = g_lp
        if ENTROPY:
            g_en = tl.load(grad_entropy_ptr + rows, mask=inside, other=0.0)
            entropy = tl.load(entropy_ptr + rows, mask=inside, other=0.0)
        z0, z1 = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        d0 = _dlogits_tile(z0, scale, lse, g_lp, g_en, entropy, y, ENTROPY, BN // 2)
        dz.store([pm * BM, pn * BN], d0.to(dz.dtype))
        d1 = _dlogits_tile(z1, scale, lse, g_lp, g_en, entropy, y - BN // 2, ENTROPY, BN // 2)
        dz.store([pm * BM, pn * BN + BN // 2], d1.to(dz.dtype))
