/* Partial sums and softmax of a block of logits. */
#include "tile.h"

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
