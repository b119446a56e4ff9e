/* Runs the products of a table of cases (test_native_table.py) by native.c, in memory of the exact
 * size; prints the largest error. For sanitizers, other instructions, and machines under qemu. */

#include <math.h>
#include <stdio.h>
#include "native.c"

static void *part(FILE *file, size_t size) {
    void *found = malloc(size ? size : 1);
    if (fread(found, 1, size, file) != size) exit(2);
    return found;
}

int main(int count, char **arguments) {
    FILE *file = count == 2 ? fopen(arguments[1], "rb") : NULL;
    if (!file) return 2;
    double worst = 0;
    int64_t h[11], cases = 0;
    for (; fread(h, sizeof h, 1, file) == 1; cases++) {
        int64_t k = h[0], runs = h[1], stride = h[2], n = h[3], m = h[4], rows = h[7];
        int transposed = h[8], tokens = h[9];
        int64_t in = transposed ? m : n, out = transposed ? n : m;
        Item item = {.k = k,
                     .run_count = runs,
                     .stride = stride,
                     .lengths = {n, m},
                     .group_bits = {h[5], h[6]},
                     .rows = rows};
        int32_t *held_runs = part(file, 12 * runs);
        int64_t bytes[2] = {0, 0};
        for (int64_t i = 0; i < runs; i++)
            for (int side = 0; side < 2; side++)
                bytes[side] += (int64_t)held_runs[3 * i] * held_runs[3 * i + 1 + side] *
                               columns_of(item.lengths[side]);
        int16_t *ranks = part(file, 2 * k * stride);
        uint8_t *v = part(file, bytes[0]), *u = part(file, bytes[1]);
        void *x = part(file, tokens ? 8 * rows : 4 * rows * in);
        float *expected = part(file, 4 * rows * out), *y = malloc(4 * rows * out + 1);
        for (int64_t i = 0; i < rows * out; i++) y[i] = NAN;
        item.codes[0] = v, item.codes[1] = u, item.ranks = ranks, item.runs = held_runs, item.y = y;
        if (tokens)
            item.tokens = x;
        else
            item.x = x;
        if (dm_products(1, &item, transposed, 0, 1)) return 3;
        double largest = 1e-30, error = 0;
        for (int64_t i = 0; i < rows * out; i++) {
            double off = fabs((double)y[i] - expected[i]);
            if (fabs((double)expected[i]) > largest) largest = fabs((double)expected[i]);
            if (!(off <= error)) error = off;
        }
        if (!(error / largest <= worst)) worst = error / largest;
        for (int side = 0; side < 2;
             side++) { /* the factors too; their values are tested elsewhere */
            float *factor = malloc(4 * k * item.lengths[side] + 1);
            dm_decode(&item, side, factor, 1);
            free(factor);
        }
        free(held_runs), free(ranks), free(v), free(u), free(x), free(expected), free(y);
    }
    printf("%lld cases, largest error %.3g\n", (long long)cases, worst);
    return !(worst <= 1e-4) || !cases; /* terms cancel in a 1 x 1; a wrong bit is above 0.01 */
}
