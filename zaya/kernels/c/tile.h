/* What the ops in C share: ops of zaya/kernels/reference.py for a CPU in fp32, which zaya/kernels/cpu.py compiles and calls.
 *
 * What torch's operations cannot do is stay in a cache: here a tile of scores, of a head's channels or of the stream is made, used and
 * dropped while it is there. Every product is `product` below, a register tile over rows that lie in one stride; what does not (the tokens
 * before a chunk or a document, an expert's rows) is copied into a small buffer first, zeros where nothing is.
 *
 * All tensors are contiguous; x in cpu.py's table of signatures is fp32, i int64, s int32. Results do not depend on the number of threads:
 * a thread owns what it adds to. Functions return 0, or 1 where memory was refused.
 *
 * Letters as in reference.py: B batch rows, T tokens, S keys, N heads, G KV heads, H head dim, K chunks, D and F widths; H is 32, 64 or
 * MAX_HEAD_DIM.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, ROWS = 8 }; /* 32 registers: 16 hold a tile */
#else
enum { LANES = 8, ROWS = 4 }; /* 16 registers: 8 hold a tile */
#endif
enum { COLS = 2 * LANES, BLOCK = 32, TOKENS = 32, MAX_HEAD_DIM = 128, MIN_PARALLEL = 1 << 13 };

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef vec tile[ROWS][2];

#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 8") for

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec x) { *(vec *)to = x; }
INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec pick(ivec where, vec x, vec y) { return (vec)((where & (ivec)x) | (~where & (ivec)y)); }
INLINE long smaller(long a, long b) { return a < b ? a : b; }
INLINE long larger(long a, long b) { return a > b ? a : b; }
INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* The first n of LANES floats; beyond them nothing is read or written. */
INLINE vec load_n(const float *from, long n)
{
    vec x = {0};
    if (n >= LANES) return load(from);
    memcpy(&x, from, 4 * n);
    return x;
}

INLINE void store_n(float *to, vec x, long n)
{
    if (n >= LANES) store(to, x);
    else memcpy(to, &x, 4 * n);
}

INLINE float sum(vec x)
{
    float part[LANES];
    store(part, x);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

/* e^x to 2 ulp: 2^n e^r with |r| <= ln 2 / 2 (Cephes' polynomial); 0 below -87.3, infinite above 88. NaN stays NaN. */
INLINE vec exponential(vec x)
{
    ivec tiny = x < -87.3f, huge = x > 88.0f;
    vec rounded = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: n is in the lowest bits */
    vec n = rounded - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f, p = all(1.9875691500e-4f);
    vec power = (vec)(((ivec)rounded << 23) + (127 << 23));
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return pick(huge, all(INFINITY), pick(tiny, (vec){0}, (p * r * r + r + 1.0f) * power));
}

/* sums[r] += sum over i < k of a[r a_row + i a_step] * b[i b_row ... + COLS] */
INLINE void product(tile sums, const float *a, long a_row, long a_step, const float *b, long b_row, long k)
{
    for (long i = 0; i < k; i++) {
        vec left = load(b + i * b_row), right = load(b + i * b_row + LANES);
        UNROLLED (int r = 0; r < ROWS; r++) {
            float x = a[r * a_row + i * a_step];
            sums[r][0] += x * left;
            sums[r][1] += x * right;
        }
    }
}

INLINE void load_tile(tile x, const float *from, long row)
{
    UNROLLED (int r = 0; r < ROWS; r++) x[r][0] = load(from + r * row), x[r][1] = load(from + r * row + LANES);
}

INLINE void store_tile(float *to, long row, tile x)
{
    UNROLLED (int r = 0; r < ROWS; r++) store(to + r * row, x[r][0]), store(to + r * row + LANES, x[r][1]);
}

/* f with H as a constant, so that its loops over channels become straight code; f is INLINE, its last parameter H. */
#define BY_HEAD_DIM(f, ...) (H == 32 ? f(__VA_ARGS__, 32) : H == 64 ? f(__VA_ARGS__, 64) : f(__VA_ARGS__, MAX_HEAD_DIM))

#define REFUSED(failed) do { _Pragma("omp atomic write") failed = 1; } while (0)

INLINE float *buffer(long floats) { return aligned_alloc(64, round_up(4 * floats, 64)); }
