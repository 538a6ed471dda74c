/* Ops of zaya/kernels/reference.py for a CPU in fp32; zaya/kernels/cpu.py compiles and calls them, and says which.
 *
 * What torch's operations cannot do is stay in a cache: here a tile of scores, of a head's channels or of the stream is made, used and
 * dropped while it is there. Every product is `product` below, a register tile over rows that lie in one stride; what does not (the tokens
 * before a chunk or a document, an expert's rows) is copied into a small buffer first, zeros where nothing is.
 *
 * All tensors are contiguous; x in cpu.py's table of signatures is fp32, i int64, s int32. Results do not depend on the number of threads: a
 * thread owns what it adds to. Functions return 0, or 1 where memory was refused.
 *
 * Letters as in reference.py: B batch rows, T tokens, S keys, N heads, G KV heads, H head dim, K chunks, D and F widths; H is 32, 64 or
 * MAX_HEAD_DIM.
 */
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

const long lanes = LANES, rows_of_a_block = BLOCK, tokens_of_a_share = TOKENS; /* cpu.py sizes its buffers by them */

#define REFUSED(failed) do { _Pragma("omp atomic write") failed = 1; } while (0)

static float *buffer(long floats) { return aligned_alloc(64, round_up(4 * floats, 64)); }

/* ---------------------------------------------------------------------------------------------------------------- attention */

/* to (H, padded): column s is key s of x; what lies beyond S is never seen. */
static void transpose(float *to, long padded, const float *x, long stride, long S, long H)
{
    for (long start = 0; start < S; start += LANES)
        for (long h = 0; h < H; h++)
            for (long s = start; s < smaller(S, start + LANES); s++) to[h * padded + s] = x[s * stride + h];
}

/* Row i of a group is head i % m of token i / m, m heads to a group; rows beyond the last stand for the last token's, and are not written. */
typedef struct { long b, g, T, N, m; } group;

INLINE long token_of(group of, long i) { return smaller(i / of.m, of.T - 1); }
INLINE long head_at(group of, long i) { return (of.b * of.T + token_of(of, i)) * of.N + of.g * of.m + i % of.m; }

/* The keys [from, to) that a row sees: itself at least. */
typedef struct { long from, to; } keys;

INLINE keys keys_of(group of, long i, const int64_t *first_key, const int64_t *offsets, long chunk)
{
    long t = token_of(of, i), own = offsets[t / chunk] + t % chunk, first = first_key[of.b * of.T + t];
    return (keys){first < 0 ? 0 : smaller(first, own), own + 1};
}

/* What lies in [lo, hi) of a row of scores, but not in `seen`. */
INLINE void cover(float *row, keys seen, long lo, long hi, float by)
{
    for (long s = lo; s < seen.from; s++) row[s] = by;
    for (long s = seen.to; s < hi; s++) row[s] = by;
}

/* Arguments of attention_forward. */
typedef struct { const float *q, *v; const int64_t *first_key, *offsets; float *out, *softmax; long S, G, chunk, padded; } forward_call;

/* ROWS rows of a group from `start` on. kt: its keys, transposed; p (ROWS, padded): room for their scores. */
INLINE int attend(group of, const forward_call *call, const float *kt, float *p, long start, long H)
{
    long padded = call->padded, rows = of.T * of.m, stride = call->G * H, lo = call->S, hi = 0;
    float scaled[ROWS * MAX_HEAD_DIM], inverse[ROWS], scale = 1 / sqrtf(H);
    keys seen[ROWS];
    for (int r = 0; r < ROWS; r++) {
        seen[r] = keys_of(of, start + r, call->first_key, call->offsets, call->chunk);
        lo = smaller(lo, seen[r].from / COLS * COLS), hi = larger(hi, seen[r].to);
        for (long h = 0; h < H; h += LANES) store(scaled + r * H + h, load(call->q + head_at(of, start + r) * H + h) * scale);
    }
    long end = round_up(hi, COLS);
    for (long s = lo; s < end; s += COLS) {
        tile scores = {0};
        product(scores, scaled, H, 1, kt + s, padded, H);
        store_tile(p + s, padded, scores);
    }
    for (int r = 0; r < ROWS; r++) {
        float *row = p + r * padded;
        cover(row, seen[r], lo, end, -INFINITY);
        vec largest = load(row + lo), total = {0};
        for (long s = lo; s < end; s += LANES) largest = pick(load(row + s) > largest, load(row + s), largest);
        float top = largest[0];
        for (int i = 1; i < LANES; i++) top = largest[i] > top ? largest[i] : top;
        for (long s = lo; s < end; s += LANES) {
            vec x = exponential(load(row + s) - top);
            store(row + s, x);
            total += x;
        }
        inverse[r] = 1 / sum(total);
        if (start + r < rows) {
            float *softmax = call->softmax + 2 * head_at(of, start + r);
            softmax[0] = top, softmax[1] = inverse[r];
        }
    }
    for (long h = 0; h < H; h += COLS) {
        tile sums = {0};
        product(sums, p + lo, padded, 1, call->v + of.b * call->S * stride + lo * stride + of.g * H + h, stride, hi - lo);
        for (int r = 0; r < smaller(ROWS, rows - start); r++) {
            float *to = call->out + head_at(of, start + r) * H + h;
            store(to, sums[r][0] * inverse[r]), store(to + LANES, sums[r][1] * inverse[r]);
        }
    }
    return 0;
}

/* softmax (B, T, N, 2): of each row the largest score, and one over the sum of exp(score - largest). */
int attention_forward(const float *q, const float *k, const float *v, const int64_t *first_key, const int64_t *offsets, float *out,
                      float *softmax, long B, long T, long S, long N, long G, long H, long chunks)
{
    long m = N / G, padded = round_up(S, COLS), rows = T * m;
    int failed = 0;
    forward_call call = {q, v, first_key, offsets, out, softmax, S, G, T / chunks, padded};
    float *kt = buffer(B * G * H * padded);
    if (!kt) return 1;
    #pragma omp parallel
    {
        float *p = buffer(ROWS * padded);
        if (!p) REFUSED(failed);
        #pragma omp for
        for (long bg = 0; bg < B * G; bg++) transpose(kt + bg * H * padded, padded, k + (bg / G * S * G + bg % G) * H, G * H, S, H);
        #pragma omp for collapse(2) schedule(dynamic)
        for (long bg = 0; bg < B * G; bg++)
            for (long block = 0; block < rows; block += 8 * ROWS)
                for (long start = block; p && start < smaller(rows, block + 8 * ROWS); start += ROWS) {
                    group of = {bg / G, bg % G, T, N, m};
                    BY_HEAD_DIM(attend, of, &call, kt + bg * H * padded, p, start);
                }
        free(p);
    }
    free(kt);
    return failed;
}

typedef struct {
    const float *q, *k, *v, *out, *softmax, *dout;
    const int64_t *first_key, *offsets;
    float *dq;
    long S, G, chunk, padded;
} backward_call;

/* What a thread keeps of its group: keys and values, transposed (H, padded); their gradients (padded, H); of BLOCK rows, probabilities and the
 * gradients of scores (BLOCK, padded). */
typedef struct { float *kt, *vt, *dk, *dv, *p, *ds; } room;

/* BLOCK rows of a group from `start` on: their dq, and what they add to dk and dv. */
INLINE int attend_back(group of, const backward_call *call, room at, long start, long H)
{
    long padded = call->padded, rows = of.T * of.m, stride = call->G * H, lo = call->S, hi = 0;
    float scaled[BLOCK * MAX_HEAD_DIM], grad[BLOCK * MAX_HEAD_DIM], along[BLOCK], top[BLOCK], inverse[BLOCK], scale = 1 / sqrtf(H);
    keys seen[BLOCK];
    for (int r = 0; r < BLOCK; r++) {
        long head = head_at(of, start + r);
        vec dot = {0};
        seen[r] = keys_of(of, start + r, call->first_key, call->offsets, call->chunk);
        lo = smaller(lo, seen[r].from / COLS * COLS), hi = larger(hi, seen[r].to);
        for (long h = 0; h < H; h += LANES) {
            vec d = load(call->dout + head * H + h);
            dot += d * load(call->out + head * H + h);
            store(scaled + r * H + h, load(call->q + head * H + h) * scale);
            store(grad + r * H + h, d);
        }
        along[r] = sum(dot), top[r] = call->softmax[2 * head], inverse[r] = call->softmax[2 * head + 1];
        if (start + r >= rows) top[r] = INFINITY; /* a row that stands for the last token's has no probabilities */
    }
    long end = round_up(hi, COLS);
    for (int first = 0; first < BLOCK; first += ROWS) {
        for (long s = lo; s < end; s += COLS) {
            tile x = {0};
            product(x, scaled + first * H, H, 1, at.kt + s, padded, H);
            UNROLLED (int r = 0; r < ROWS; r++)
                for (int j = 0; j < 2; j++) x[r][j] = exponential(x[r][j] - top[first + r]) * inverse[first + r];
            store_tile(at.p + first * padded + s, padded, x);
        }
        for (int r = first; r < first + ROWS; r++) cover(at.p + r * padded, seen[r], lo, end, 0);
        for (long s = lo; s < end; s += COLS) {
            tile x = {0}, probs;
            product(x, grad + first * H, H, 1, at.vt + s, padded, H);
            load_tile(probs, at.p + first * padded + s, padded);
            UNROLLED (int r = 0; r < ROWS; r++)
                for (int j = 0; j < 2; j++) x[r][j] = probs[r][j] * (x[r][j] - along[first + r]);
            store_tile(at.ds + first * padded + s, padded, x);
        }
        for (long h = 0; h < H; h += COLS) {
            tile sums = {0};
            product(sums, at.ds + first * padded + lo, padded, 1, call->k + (of.b * call->S + lo) * stride + of.g * H + h, stride, hi - lo);
            for (int r = 0; r < smaller(ROWS, rows - start - first); r++) {
                float *to = call->dq + head_at(of, start + first + r) * H + h;
                store(to, sums[r][0] * scale), store(to + LANES, sums[r][1] * scale);
            }
        }
    }
    for (long s = lo; s < hi; s += ROWS)
        for (long h = 0; h < H; h += COLS) {
            tile sums;
            load_tile(sums, at.dv + s * H + h, H);
            product(sums, at.p + s, 1, padded, grad + h, H, BLOCK);
            store_tile(at.dv + s * H + h, H, sums);
            load_tile(sums, at.dk + s * H + h, H);
            product(sums, at.ds + s, 1, padded, scaled + h, H, BLOCK);
            store_tile(at.dk + s * H + h, H, sums);
        }
    return 0;
}

/* A group has one thread, which adds up dk and dv over its blocks of rows. */
int attention_backward(const float *q, const float *k, const float *v, const int64_t *first_key, const int64_t *offsets, const float *out,
                       const float *softmax, const float *dout, float *dq, float *dk, float *dv, long B, long T, long S, long N, long G, long H,
                       long chunks)
{
    long padded = round_up(S, COLS), each = H * padded;
    int failed = 0;
    backward_call call = {q, k, v, out, softmax, dout, first_key, offsets, dq, S, G, T / chunks, padded};
    #pragma omp parallel for schedule(dynamic)
    for (long bg = 0; bg < B * G; bg++) {
        group of = {bg / G, bg % G, T, N, N / G};
        long own = (of.b * S * G + of.g) * H;
        float *all_room = buffer(4 * each + 2 * BLOCK * padded);
        if (!all_room) {
            REFUSED(failed);
            continue;
        }
        room at = {all_room, all_room + each, all_room + 2 * each, all_room + 3 * each, all_room + 4 * each, all_room + 4 * each + BLOCK * padded};
        transpose(at.kt, padded, k + own, G * H, S, H);
        transpose(at.vt, padded, v + own, G * H, S, H);
        memset(at.dk, 0, 4 * 2 * each);
        for (long start = 0; start < T * of.m; start += BLOCK) BY_HEAD_DIM(attend_back, of, &call, at, start);
        for (long s = 0; s < S; s++) {
            memcpy(dk + own + s * G * H, at.dk + s * H, 4 * H);
            memcpy(dv + own + s * G * H, at.dv + s * H, 4 * H);
        }
        free(all_room);
    }
    return failed;
}

/* ---------------------------------------------------------------------------------------------------------------- cca */

/* x, unit, dx and the like (B, T, N, H); other (B, T, G, H); halo (B, K, 2, N H); kernel and transposed (N, 3 H, H); constant (N, H);
 * temperature (N); keep (B, T), 0 where the document is younger than one or two tokens; cosine and sine (B, T, H / 4); inverse
 * (B, T, N), negative where |u| was clamped to eps. */
typedef struct {
    const float *x, *other, *kernel, *transposed, *constant, *temperature, *halo, *keep[2], *cosine, *sine, *dout;
    float eps, *unit, *inverse, *out, *dx, *dother, *dkernel, *dconstant, *dtemperature, *dhalo;
    long T, N, G, K;
} mix_call;

/* One head of one chunk of a row: its first number in x and in halo, its first token, its tokens, the stride of both. */
typedef struct { long x, halo, token, L, C, head, number; } strip;

INLINE strip strip_of(const mix_call *call, long number, long H)
{
    long L = call->T / call->K, C = call->N * H, head = number % call->N, chunk = number / call->N;
    return (strip){chunk * L * C + head * H, chunk * 2 * C + head * H, chunk * L, L, C, head, number};
}

INLINE int follows(const mix_call *call, strip of, long t, long by)
{
    return t >= 0 && t < of.L && (!by || call->keep[by - 1][of.token + t] != 0);
}

/* to (ROWS, 3 H): tokens t, t - 1 and t - 2 side by side, for t from start on; zeros where the document begins between. */
INLINE void taps(float *to, const mix_call *call, strip of, long start, long H)
{
    for (int r = 0; r < ROWS; r++)
        for (int by = 0; by < 3; by++, to += H) {
            long from = start + r - by;
            if (!follows(call, of, start + r, by)) memset(to, 0, 4 * H);
            else memcpy(to, from >= 0 ? call->x + of.x + from * of.C : call->halo + of.halo + (2 + from) * of.C, 4 * H);
        }
}

/* to (H): x (H), its first quarter a and second b as a c - b s, b c + a s; sign -1 turns back. */
INLINE void rotate(float *to, const float *x, const mix_call *call, long token, float sign, long H)
{
    const float *cosine = call->cosine + token * H / 4, *sine = call->sine + token * H / 4;
    for (long h = 0; h < H / 4; h++) {
        float a = x[h], b = x[H / 4 + h], s = sign * sine[h];
        to[h] = a * cosine[h] - b * s;
        to[H / 4 + h] = b * cosine[h] + a * s;
    }
    memcpy(to + H / 2, x + H / 2, 4 * H / 2);
}

INLINE int mix(const mix_call *call, long number, long H)
{
    strip of = strip_of(call, number, H);
    float stretch = call->temperature ? call->temperature[of.head] : 1;
    for (long start = 0; start < of.L; start += ROWS) {
        float tap[ROWS * 3 * MAX_HEAD_DIM], mixed[ROWS * MAX_HEAD_DIM];
        taps(tap, call, of, start, H);
        for (long h = 0; h < H; h += COLS) {
            tile sums;
            load_tile(sums, call->constant + of.head * H + h, 0);
            product(sums, tap, 3 * H, 1, call->kernel + of.head * 3 * H * H + h, H, 3 * H);
            store_tile(mixed + h, H, sums);
        }
        for (int r = 0; r < smaller(ROWS, of.L - start); r++) {
            long at = of.x + (start + r) * of.C, token = of.token + start + r;
            const float *other = call->other + (token * call->G + of.head * call->G / call->N) * H;
            float *u = mixed + r * H;
            vec square = {0};
            for (long h = 0; h < H; h += LANES) {
                vec value = load(u + h) + 0.5f * (load(call->x + at + h) + load(other + h));
                square += value * value;
                store(u + h, value);
            }
            float norm = sqrtf(sum(square)), clamped = norm < call->eps, shortened = sqrtf(H) / (clamped ? call->eps : norm);
            call->inverse[token * call->N + of.head] = clamped ? -shortened : shortened;
            for (long h = 0; h < H; h += LANES) {
                vec value = load(u + h) * shortened;
                store(call->unit + at + h, value);
                store(u + h, value * stretch);
            }
            rotate(call->out + at, u, call, token, 1, H);
        }
    }
    return 0;
}

/* `_MixNormRotate`. */
int mix_forward(const float *x, const float *other, const float *kernel, const float *constant, const float *temperature, const float *halo,
                const float *keep_1, const float *keep_2, const float *cosine, const float *sine, float eps, float *unit, float *inverse,
                float *out, long B, long T, long N, long G, long H, long K)
{
    mix_call call = {.x = x, .other = other, .kernel = kernel, .constant = constant, .temperature = temperature, .halo = halo,
                     .keep = {keep_1, keep_2}, .cosine = cosine, .sine = sine, .eps = eps, .unit = unit, .inverse = inverse, .out = out,
                     .T = T, .N = N, .G = G, .K = K};
    #pragma omp parallel for
    for (long number = 0; number < B * K * N; number++) BY_HEAD_DIM(mix, &call, number);
    return 0;
}

INLINE int mix_back(const mix_call *call, long number, long H)
{
    strip of = strip_of(call, number, H);
    long padded = round_up(of.L, BLOCK);
    float *dz = buffer(padded * H), *dkernel = call->dkernel + number * 3 * H * H, stretch = 1, along_all = 0;
    if (!dz) return 1;
    if (call->temperature) stretch = call->temperature[of.head];
    memset(dz + of.L * H, 0, 4 * (padded - of.L) * H);
    memset(dkernel, 0, 4 * 3 * H * H);
    vec dconstant[MAX_HEAD_DIM / LANES] = {{0}};
    for (long t = 0; t < of.L; t++) {
        long at = of.x + t * of.C, token = of.token + t;
        float d[MAX_HEAD_DIM], inverse = call->inverse[token * call->N + of.head], shortened = fabsf(inverse);
        rotate(d, call->dout + at, call, token, -1, H);
        vec dot = {0};
        for (long h = 0; h < H; h += LANES) dot += load(d + h) * load(call->unit + at + h);
        float along = sum(dot), part = inverse < 0 ? 0 : along * stretch / H;
        along_all += along;
        for (long h = 0; h < H; h += LANES) {
            vec du = (load(d + h) * stretch - load(call->unit + at + h) * part) * shortened;
            store(dz + t * H + h, du), store(call->dother + at + h, 0.5f * du);
            dconstant[h / LANES] += du;
        }
    }
    for (long h = 0; h < H; h += LANES) store(call->dconstant + number * H + h, dconstant[h / LANES]);
    if (call->temperature) call->dtemperature[number] = along_all;
    for (long start = 0; start < of.L; start += BLOCK) {
        float tap[BLOCK * 3 * MAX_HEAD_DIM];
        for (int r = 0; r < BLOCK; r += ROWS) taps(tap + r * 3 * H, call, of, start + r, H);
        for (long in = 0; in < 3 * H; in += ROWS)
            for (long h = 0; h < H; h += COLS) {
                tile sums;
                load_tile(sums, dkernel + in * H + h, H);
                product(sums, tap + in, 1, 3 * H, dz + start * H + h, H, BLOCK);
                store_tile(dkernel + in * H + h, H, sums);
            }
    }
    /* Token t goes into t, t + 1 and t + 2; the two before the chunk are the halo's, and have no dz here. */
    for (long start = -2; start < of.L; start += ROWS) {
        float later[ROWS * 3 * MAX_HEAD_DIM], *to = later;
        for (int r = 0; r < ROWS; r++)
            for (int by = 0; by < 3; by++, to += H) {
                long t = start + r + by;
                if (follows(call, of, t, by)) memcpy(to, dz + t * H, 4 * H);
                else memset(to, 0, 4 * H);
            }
        for (long h = 0; h < H; h += COLS) {
            tile sums = {0};
            product(sums, later, 3 * H, 1, call->transposed + of.head * 3 * H * H + h, H, 3 * H);
            for (int r = 0; r < smaller(ROWS, of.L - start); r++) {
                long t = start + r;
                float *at = (t < 0 ? call->dhalo + of.halo + (2 + t) * of.C : call->dx + of.x + t * of.C) + h;
                for (int j = 0; j < 2; j++) {
                    if (t >= 0) sums[r][j] += 0.5f * load(dz + t * H + h + j * LANES);
                    store(at + j * LANES, sums[r][j]);
                }
            }
        }
    }
    free(dz);
    return 0;
}

/* Its gradients: dx and dhalo; to be summed, dother by head, and those of kernel, constant and temperature by row and chunk, (B K, ...).
 * transposed: kernel with each tap's H x H turned around. */
int mix_backward(const float *x, const float *transposed, const float *temperature, const float *halo, const float *keep_1,
                 const float *keep_2, const float *cosine, const float *sine, const float *unit, const float *inverse,
                 const float *dout, float *dx, float *dother, float *dkernel, float *dconstant, float *dtemperature, float *dhalo, long B, long T,
                 long N, long H, long K)
{
    mix_call call = {.x = x, .transposed = transposed, .temperature = temperature, .halo = halo, .keep = {keep_1, keep_2}, .cosine = cosine,
                     .sine = sine, .unit = (float *)unit, .inverse = (float *)inverse, .dout = dout, .dx = dx, .dother = dother,
                     .dkernel = dkernel, .dconstant = dconstant, .dtemperature = dtemperature, .dhalo = dhalo, .T = T, .N = N, .K = K};
    int failed = 0;
    #pragma omp parallel for
    for (long number = 0; number < B * K * N; number++)
        if (BY_HEAD_DIM(mix_back, &call, number)) REFUSED(failed);
    return failed;
}

/* ---------------------------------------------------------------------------------------------------------------- stream */

/* Numbers i to i + n of (branch + b_h) a_h + (stream + b_x) a_x. */
INLINE vec joined(const float *stream, const float *branch, const float *a_h, const float *b_h, const float *a_x, const float *b_x, long i, long n)
{
    return (load_n(branch + i, n) + load_n(b_h + i, n)) * load_n(a_h + i, n) + (load_n(stream + i, n) + load_n(b_x + i, n)) * load_n(a_x + i, n);
}

/* `_ResidualNorm` over rows of width D; a_h, b_h, a_x, b_x, weight (D), inverse_rms (rows). */
int residual_norm_forward(const float *stream, const float *branch, const float *a_h, const float *b_h, const float *a_x, const float *b_x,
                          const float *weight, float eps, float *sum_of_both, float *inverse_rms, float *out, long rows, long D)
{
    #pragma omp parallel for if (rows * D >= MIN_PARALLEL)
    for (long row = 0; row < rows; row++) {
        const float *x = stream + row * D, *branch_row = branch + row * D;
        float *new = sum_of_both + row * D;
        vec square = {0};
        for (long i = 0; i < D; i += LANES) {
            long n = D - i;
            vec value = joined(x, branch_row, a_h, b_h, a_x, b_x, i, n);
            store_n(new + i, value, n);
            square += value * value;
        }
        float r = inverse_rms[row] = 1 / sqrtf(sum(square) / D + eps);
        for (long i = 0; i < D; i += LANES) store_n(out + row * D + i, load_n(new + i, D - i) * r * load_n(weight + i, D - i), D - i);
    }
    return 0;
}

/* Its gradients; sums (blocks, 4, D), to be summed over blocks of BLOCK rows: of dt, dt branch, dt stream, and the weight's. */
int residual_norm_backward(const float *stream, const float *branch, const float *inverse_rms, const float *a_h, const float *b_h,
                           const float *a_x, const float *b_x, const float *weight, const float *dsum, const float *dout, float *dstream,
                           float *dbranch, float *sums, long rows, long D)
{
    #pragma omp parallel for if (rows * D >= MIN_PARALLEL)
    for (long block = 0; block < (rows + BLOCK - 1) / BLOCK; block++) {
        float *own = sums + block * 4 * D;
        memset(own, 0, 4 * 4 * D);
        for (long row = block * BLOCK; row < smaller(rows, (block + 1) * BLOCK); row++) {
            const float *dx = dout + row * D;
            float r = inverse_rms[row], *t = dstream + row * D; /* t, until its gradient takes the place */
            vec dot = {0};
            for (long i = 0; i < D; i += LANES) {
                vec value = joined(stream + row * D, branch + row * D, a_h, b_h, a_x, b_x, i, D - i);
                store_n(t + i, value, D - i);
                dot += load_n(dx + i, D - i) * value * load_n(weight + i, D - i);
            }
            float part = sum(dot) * r * r * r / D;
            for (long i = 0; i < D; i += LANES) {
                long n = D - i, at = row * D + i;
                vec grad = load_n(dx + i, n) * r, value = load_n(t + i, n);
                vec dt = load_n(dsum + at, n) + grad * load_n(weight + i, n) - value * part;
                store_n(dstream + at, dt * load_n(a_x + i, n), n);
                store_n(dbranch + at, dt * load_n(a_h + i, n), n);
                store_n(own + i, load_n(own + i, n) + dt, n);
                store_n(own + D + i, load_n(own + D + i, n) + dt * load_n(branch + at, n), n);
                store_n(own + 2 * D + i, load_n(own + 2 * D + i, n) + dt * load_n(stream + at, n), n);
                store_n(own + 3 * D + i, load_n(own + 3 * D + i, n) + grad * value, n);
            }
        }
    }
    return 0;
}

/* ---------------------------------------------------------------------------------------------------------------- experts */

/* Up to TOKENS assignments of one expert. They are columns here, and weights are what `product` spreads, so that no weight is packed. */
typedef struct { long expert, first, n; } share;

/* The shares of all experts one after the other, and at starts (E + 1) the first of each; free the result. NULL where memory is refused. */
static share *shares_of(const int64_t *sizes, long E, const long **starts)
{
    long count = 0, first = 0;
    for (long e = 0; e < E; e++) count += (sizes[e] + TOKENS - 1) / TOKENS;
    share *shares = malloc(count * sizeof(share) + (E + 1) * sizeof(long));
    if (!shares) return NULL;
    long *own = (long *)(shares + count), at = 0;
    for (long e = 0; e < E; first += sizes[e++]) {
        own[e] = at;
        for (long i = 0; i < sizes[e]; i += TOKENS) shares[at++] = (share){e, first + i, smaller(TOKENS, sizes[e] - i)};
    }
    own[E] = at;
    *starts = own;
    return shares;
}

/* order (R) brings assignments (token * k + slot) together by expert, gate (R) is by assignment; both NULL where rows are sorted. gate_up
 * (E, 2 F, D), down (E, D, F); by share: hidden (2 F, TOKENS), dhidden likewise, dy_columns (D, TOKENS), x_rows (TOKENS, D), gated (TOKENS, F). */
typedef struct {
    const float *x, *gate_up, *down, *gate, *dy;
    const int32_t *order;
    float *hidden, *y, *dhidden, *dy_columns, *x_rows, *gated, *dx, *dgate;
    long k, D, F;
} experts_call;

INLINE long row_of(const experts_call *call, share of, long t) { return call->order ? call->order[of.first + t] : of.first + t; }

/* to (width, TOKENS): of.n rows of x, each at its assignment, or at its token where `k` assignments share one; the other columns are zero. */
static void gather(float *to, const experts_call *call, share of, const float *x, long k, long width)
{
    for (long t = 0; t < TOKENS; t++)
        for (long i = 0; i < width; i++) to[i * TOKENS + t] = t < of.n ? x[row_of(call, of, t) / k * width + i] : 0;
}

/* The other way, times `gate` where there is one. */
static void scatter(float *x, const experts_call *call, share of, const float *from, const float *gate, long width)
{
    for (long t = 0; t < of.n; t++) {
        long row = row_of(call, of, t);
        float by = gate ? gate[row] : 1;
        for (long i = 0; i < width; i++) x[row * width + i] = from[i * TOKENS + t] * by;
    }
}

/* out (rows, TOKENS) = weight x, x (k, TOKENS); an entry of weight is at row * w_row + i * w_step. */
static void apply(float *out, const float *weight, long w_row, long w_step, const float *x, long rows, long k)
{
    for (long row = 0; row < rows; row += ROWS)
        for (int j = 0; j < TOKENS; j += COLS) {
            tile sums = {0};
            product(sums, weight + row * w_row, w_row, w_step, x + j, TOKENS, k);
            store_tile(out + row * TOKENS + j, TOKENS, sums);
        }
}

/* y by assignment; zero for those of no expert. */
int experts_forward(const float *x, const int64_t *sizes, const float *gate_up, const float *down, const int32_t *order, const float *gate,
                    float *hidden, float *y, long R, long k, long E, long D, long F)
{
    experts_call call = {.x = x, .gate_up = gate_up, .down = down, .gate = gate, .order = order, .hidden = hidden, .y = y, .k = k, .D = D, .F = F};
    const long *starts;
    long routed = 0;
    int failed = 0;
    share *shares = shares_of(sizes, E, &starts);
    if (!shares) return 1;
    for (long e = 0; e < E; e++) routed += sizes[e];
    #pragma omp parallel
    {
        float *columns = buffer((2 * D + F) * TOKENS), *activated = columns + D * TOKENS, *out = activated + F * TOKENS;
        if (!columns) REFUSED(failed);
        #pragma omp for schedule(dynamic)
        for (long i = 0; i < starts[E]; i++) {
            if (!columns) continue;
            share of = shares[i];
            float *own = hidden + i * 2 * F * TOKENS;
            gather(columns, &call, of, x, k, D);
            apply(own, gate_up + of.expert * 2 * F * D, D, 1, columns, 2 * F, D);
            for (long j = 0; j < F * TOKENS; j += LANES) {
                vec gate_part = load(own + j), up = load(own + F * TOKENS + j);
                store(activated + j, gate_part / (1 + exponential(-gate_part)) * up);
            }
            apply(out, down + of.expert * D * F, F, 1, activated, D, F);
            scatter(y, &call, of, out, gate, D);
        }
        #pragma omp for
        for (long i = routed; i < R; i++) memset(y + (order ? order[i] : i) * D, 0, 4 * D);
        free(columns);
    }
    free(shares);
    return failed;
}

/* With a = silu(gate part) * up and dh = down^T dy:  dgate = a . dh;  what enters gate_up is dh times the gate and SwiGLU's derivative. */
static void experts_back(const experts_call *call, share of, long number, float *room)
{
    long D = call->D, F = call->F;
    float *columns = room, *activated = columns + D * TOKENS, *hidden = call->hidden + number * 2 * F * TOKENS;
    float *dhidden = call->dhidden + number * 2 * F * TOKENS, *dy = call->dy_columns + number * D * TOKENS;
    float *x_rows = call->x_rows + number * TOKENS * D, *gated = call->gated + number * TOKENS * F, gates[TOKENS] = {0}, dgates[TOKENS] = {0};
    for (long t = 0; t < TOKENS; t++) {
        if (t < of.n) memcpy(x_rows + t * D, call->x + row_of(call, of, t) / call->k * D, 4 * D);
        else memset(x_rows + t * D, 0, 4 * D);
        if (t < of.n) gates[t] = call->gate ? call->gate[row_of(call, of, t)] : 1;
    }
    gather(dy, call, of, call->dy, call->k, D);
    apply(dhidden, call->down + of.expert * D * F, 1, F, dy, F, D);
    for (long f = 0; f < F; f++)
        for (int j = 0; j < TOKENS; j += LANES) {
            long at = f * TOKENS + j;
            vec gate = load(hidden + at), up = load(hidden + F * TOKENS + at), dh = load(dhidden + at), weight = load(gates + j);
            vec sigmoid = 1 / (1 + exponential(-gate)), silu = gate * sigmoid;
            store(dgates + j, load(dgates + j) + silu * up * dh);
            store(dhidden + at, dh * weight * up * sigmoid * (1 + gate * (1 - sigmoid)));
            store(dhidden + F * TOKENS + at, dh * weight * silu);
            store(activated + at, silu * up * weight);
        }
    for (long t = 0; t < TOKENS; t++)
        for (long f = 0; f < F; f++) gated[t * F + f] = activated[f * TOKENS + t];
    for (long t = 0; call->dgate && t < of.n; t++) call->dgate[row_of(call, of, t)] = dgates[t];
    apply(columns, call->gate_up + of.expert * 2 * F * D, 1, D, dhidden, D, 2 * F);
    scatter(call->dx, call, of, columns, NULL, D);
}

/* COLS columns of dweight (rows, width), new or added to: over the shares [from, to), left (rows, TOKENS) times right (TOKENS, width). */
static void weight_gradient(float *dweight, int add, const float *left, const float *right, long rows, long width, long from, long to)
{
    for (long row = 0; row < rows; row += ROWS) {
        tile sums = {0};
        if (add) load_tile(sums, dweight + row * width, width);
        for (long i = from; i < to; i++) product(sums, left + (i * rows + row) * TOKENS, TOKENS, 1, right + i * TOKENS * width, width, TOKENS);
        store_tile(dweight + row * width, width, sums);
    }
}

/* dx by assignment, zero for those of no expert; dgate (R), where not NULL, likewise. dgate_up and ddown are replaced, or added to. */
int experts_backward(const float *x, const int64_t *sizes, const float *gate_up, const float *down, const int32_t *order, const float *gate,
                     const float *hidden, const float *dy, float *dhidden, float *dy_columns, float *x_rows, float *gated, float *dx,
                     float *dgate, float *dgate_up, float *ddown, long add_gate_up, long add_down, long R, long k, long E, long D, long F)
{
    experts_call call = {.x = x, .gate_up = gate_up, .down = down, .gate = gate, .dy = dy, .order = order, .hidden = (float *)hidden,
                         .dhidden = dhidden, .dy_columns = dy_columns, .x_rows = x_rows, .gated = gated, .dx = dx, .dgate = dgate, .k = k,
                         .D = D, .F = F};
    const long *starts;
    long routed = 0, panels = D / COLS + F / COLS;
    int failed = 0;
    share *shares = shares_of(sizes, E, &starts);
    if (!shares) return 1;
    for (long e = 0; e < E; e++) routed += sizes[e];
    #pragma omp parallel
    {
        float *room = buffer((D + F) * TOKENS);
        if (!room) REFUSED(failed);
        #pragma omp for schedule(dynamic)
        for (long i = 0; i < starts[E]; i++)
            if (room) experts_back(&call, shares[i], i, room);
        #pragma omp for schedule(dynamic)
        for (long i = 0; i < E * panels; i++) {
            long e = i / panels, column = i % panels * COLS;
            if (column < D)
                weight_gradient(dgate_up + e * 2 * F * D + column, add_gate_up, dhidden, x_rows + column, 2 * F, D, starts[e], starts[e + 1]);
            else
                weight_gradient(ddown + e * D * F + column - D, add_down, dy_columns, gated + column - D, D, F, starts[e], starts[e + 1]);
        }
        #pragma omp for
        for (long i = routed; i < R; i++) {
            long row = order ? order[i] : i;
            memset(dx + row * D, 0, 4 * D);
            if (dgate) dgate[row] = 0;
        }
        free(room);
    }
    free(shares);
    return failed;
}

/* ---------------------------------------------------------------------------------------------------------------- loss */

/* `cross_entropy_partials` of logits (T, V), which become their softmax; labels count from the shard's first row. */
int cross_entropy_partials(float *logits, const int64_t *labels, float *largest, float *total, float *target, long T, long V)
{
    #pragma omp parallel for if (T * V >= MIN_PARALLEL)
    for (long t = 0; t < T; t++) {
        float *row = logits + t * V, top = row[0];
        target[t] = labels[t] >= 0 && labels[t] < V ? row[labels[t]] : 0;
        vec most = all(row[0]), sums = {0};
        long whole = V / LANES * LANES;
        for (long i = 0; i < whole; i += LANES) most = pick(load(row + i) > most, load(row + i), most);
        for (int i = 0; i < LANES; i++) top = most[i] > top ? most[i] : top;
        for (long i = whole; i < V; i++) top = row[i] > top ? row[i] : top;
        for (long i = 0; i < V; i += LANES) {
            vec x = exponential(load_n(row + i, V - i) - top);
            store_n(row + i, x, V - i);
            sums += V - i >= LANES ? x : load_n(row + i, V - i); /* beyond the row: zeros */
        }
        largest[t] = top, total[t] = sum(sums);
        for (long i = 0; i < V; i += LANES) store_n(row + i, load_n(row + i, V - i) / total[t], V - i);
    }
    return 0;
}
