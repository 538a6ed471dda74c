/* The experts from token rows to rows by assignment, and their gradients. */
#include "tile.h"

const long tokens_of_a_share = TOKENS; /* cpu.py sizes its buffers by it */

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
 * (E, 2 F, D), down (E, D, F); by share: hidden (2 F, TOKENS), dhidden likewise, dy_columns (D, TOKENS), x_rows (TOKENS, D), gated
 * (TOKENS, F). */
typedef struct {
    const float *x, *gate_up, *down, *gate, *dy;
    const int32_t *order;
    float *hidden, *y, *dhidden, *dy_columns, *x_rows, *gated, *dx, *dgate;
    long k, D, F;
} experts_call;

INLINE long row_of(const experts_call *call, share of, long t) { return call->order ? call->order[of.first + t] : of.first + t; }

/* to (width, TOKENS): of.n rows of x, each at its assignment, or at its token where `k` assignments share one; the other columns are
 * zero. */
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
    experts_call call = {.x = x, .gate_up = gate_up, .down = down, .gate = gate, .order = order, .hidden = hidden, .y = y,
                         .k = k, .D = D, .F = F};
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
    float *x_rows = call->x_rows + number * TOKENS * D, *gated = call->gated + number * TOKENS * F;
    float gates[TOKENS] = {0}, dgates[TOKENS] = {0};
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
        for (long i = from; i < to; i++)
            product(sums, left + (i * rows + row) * TOKENS, TOKENS, 1, right + i * TOKENS * width, width, TOKENS);
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
                weight_gradient(dgate_up + e * 2 * F * D + column, add_gate_up, dhidden, x_rows + column, 2 * F, D, starts[e],
                                starts[e + 1]);
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
