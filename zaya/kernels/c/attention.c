/* Causal grouped-query attention over packed documents, with its gradients. */
#include "tile.h"

const long lanes = LANES; /* for the tests of both widths */

/* to (H, padded): column s is key s of x; what lies beyond S is never seen. */
static void transpose(float *to, long padded, const float *x, long stride, long S, long H)
{
    for (long start = 0; start < S; start += LANES)
        for (long h = 0; h < H; h++)
            for (long s = start; s < smaller(S, start + LANES); s++) to[h * padded + s] = x[s * stride + h];
}

/* Row i of a group is head i % m of token i / m, m heads to a group; rows beyond the last stand for the last token's, and are not
 * written. */
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

/* What a thread keeps of its group: keys and values, transposed (H, padded); their gradients (padded, H); of BLOCK rows, probabilities
 * and the gradients of scores (BLOCK, padded). */
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
                       const float *softmax, const float *dout, float *dq, float *dk, float *dv, long B, long T, long S, long N, long G,
                       long H, long chunks)
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
        room at = {all_room, all_room + each, all_room + 2 * each, all_room + 3 * each, all_room + 4 * each,
                   all_room + 4 * each + BLOCK * padded};
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
