/* The convolutions of compressed attention with the mean, the norm and the rotation of a head, and their gradients. */
#include "tile.h"

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
                 const float *dout, float *dx, float *dother, float *dkernel, float *dconstant, float *dtemperature, float *dhalo, long B,
                 long T, long N, long H, long K)
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
