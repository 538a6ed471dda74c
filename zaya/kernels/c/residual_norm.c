/* The residual join with the norm that follows, and their gradients. */
#include "tile.h"

const long rows_of_a_block = BLOCK; /* cpu.py sizes the sums by it */

/* Numbers i to i + n of (branch + b_h) a_h + (stream + b_x) a_x. */
INLINE vec joined(const float *stream, const float *branch, const float *a_h, const float *b_h, const float *a_x, const float *b_x, long i,
                  long n)
{
    return (load_n(branch + i, n) + load_n(b_h + i, n)) * load_n(a_h + i, n)
           + (load_n(stream + i, n) + load_n(b_x + i, n)) * load_n(a_x + i, n);
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
