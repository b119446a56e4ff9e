/* The delta product on a CPU, (x·V̂ᵀ)·Ûᵀ and its transpose: codes become levels in registers.
 *
 * A vector register holds the same element of LANES neighbouring byte columns. A block is that many
 * byte columns, 8·LANES elements: x is turned into this order first, y is turned back at the end.
 * Sums run over blocks, and over ranks, in one order whatever the number of threads and rows.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
enum { LANES = 16, TABLE_BITS = 4 }; /* widths whose levels fit a register */
#elif defined(__AVX2__)
enum { LANES = 8, TABLE_BITS = 3 };
#else
enum { LANES = 4, TABLE_BITS = 0 };
#endif
enum {
    BLOCK = 8 * LANES,
    LINE = 64 / LANES, /* blocks whose codes share a cache line */
    ROWS = 8,          /* that share a decoded level, at most */
    TILE = 32,         /* ranks whose codes stay in the cache from block to block */
    RANKS = 8,         /* of a thread's part */
    SMALL = 1 << 19    /* multiplications that no second thread is worth waking for */
};

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* level(c) = alpha·c + beta·c³ of a centred code c, by width (docs/format.md). */
static const float CUBIC[9][2] = {
    {0, 0},
    {1.5957691f, 0},
    {0.892898f, 0.0506908f},
    {0.471466f, 0.0115843f},
    {0.240515f, 0.00209738f},
    {0.121831f, 3.36750e-4f},
    {0.0617039f, 5.08628e-5f},
    {0.0312720f, 7.40792e-6f},
    {0.0158606f, 1.05197e-6f},
};

/* A packed matrix, V first, then U, and the rows that it multiplies; fields as in native.py. */
typedef struct {
    const uint8_t *codes[2];
    const int16_t *ranks; /* [k, stride]: bits, scales of V, scales of U */
    const int32_t *runs;  /* [run_count, 3]: ranks, bits of V, bits of U */
    int64_t k, run_count, stride, lengths[2], group_bits[2]; /* 2^bits elements; 0: all */
    int64_t rows;
    const float *x;        /* [rows, the one length], or NULL: */
    const int64_t *tokens; /* [rows] elements of U */
    float *y;              /* [rows, the other length] */
    float *turned, *h;     /* scratch: [rows, blocks, 8, LANES] and [rows, k], see `rows_at` */
} Item;

typedef struct {
    Floats table, alpha, beta, half;
} Levels;

INLINE Floats all(float value) { return value - (Floats){0}; }
INLINE int64_t columns_of(int64_t length) { return (length + 7) / 8; }
INLINE int64_t blocks_of(int64_t length) { return (length + BLOCK - 1) / BLOCK; }
INLINE int64_t pieces(int64_t of, int64_t size) { return (of + size - 1) / size; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* a·b + c. Spelled out, and compilers left no choice (-ffp-contract=off), or bodies for different
 * numbers of rows would round in different places. */
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE float scale_of(int16_t bits) {
    uint32_t wide = (uint32_t)(uint16_t)bits << 16;
    float scale;
    memcpy(&scale, &wide, 4);
    return scale;
}

INLINE Levels levels_of(int width) {
    float alpha = CUBIC[width][0], beta = CUBIC[width][1], half = ((1 << width) - 1) * 0.5f;
    Levels found = {.alpha = all(alpha), .beta = all(beta), .half = all(half)};
    for (int i = 0; i < LANES; i++) {
        float c = (i & ((1 << width) - 1)) - half;
        found.table[i] = c * (alpha + beta * (c * c));
    }
    return found;
}

INLINE Ints bytes_at(const uint8_t *p) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return (Ints){p[0], p[1], p[2], p[3]};
#endif
}

/* Element j of a plane of `bits` bits whose byte rows begin with `row`; anything above them. */
INLINE Ints plane(const uint8_t *p, int64_t stride, int row, int bits, int up, int j) {
    return bytes_at(p + (row + j * bits / 8) * stride) << up >> (j * bits % 8);
}

/* Codes of element j; anything above `width` bits. */
INLINE Ints codes_at(int width, const uint8_t *p, int64_t s, int j) {
    switch (width) {
    case 3: return (plane(p, s, 0, 2, 1, j) & 6) | (plane(p, s, 2, 1, 0, j) & 1);
    case 5: return (plane(p, s, 0, 4, 1, j) & 30) | (plane(p, s, 4, 1, 0, j) & 1);
    case 6: return (plane(p, s, 0, 4, 2, j) & 60) | (plane(p, s, 4, 2, 0, j) & 3);
    case 7:
        return (plane(p, s, 0, 4, 3, j) & 120) | (plane(p, s, 4, 2, 1, j) & 6) |
               (plane(p, s, 6, 1, 0, j) & 1);
    default: return plane(p, s, 0, width, 0, j);
    }
}

INLINE Floats level(int width, Ints codes, const Levels *levels) {
    if (width <= TABLE_BITS) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
        return (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)levels->table);
#elif defined(__AVX2__)
        return (Floats)_mm256_permutevar8x32_ps((__m256)levels->table, (__m256i)codes);
#endif
    }
    if (width == 1 || width == 2 || width == 4) codes &= (1 << width) - 1;
    Floats c = __builtin_convertvector(codes, Floats) - levels->half;
    return c * multiply_add(levels->beta, c * c, levels->alpha);
}

/* The byte rows of a rank's block: where they are, or copied to `end` if the vector ends. */
INLINE const uint8_t *block(int width, const uint8_t *p, int64_t columns, int64_t b,
                            uint8_t end[8 * LANES], int64_t *stride) {
    int64_t left = columns - b * LANES;
    *stride = left < LANES ? LANES : columns;
    if (left >= LANES) return p + b * LANES;
    memset(end, 0, 8 * LANES);
    for (int i = 0; i < width; i++) memcpy(end + i * LANES, p + i * columns + b * LANES, left);
    return end;
}

/* The scales of a block's byte columns. */
INLINE Floats scales_at(const int16_t *scales, int group_bits, int64_t b, int64_t columns) {
    int bits = group_bits - 3;
    if (LANES <= 1 << bits) return all(scale_of(scales[b * LANES >> bits]));
    Floats found;
    for (int i = 0; i < LANES; i++)
        found[i] = scale_of(scales[least(b * LANES + i, columns - 1) >> bits]);
    return found;
}

/* h [M] of one rank and M interleaved rows: sums over its vector. */
INLINE void enter_rank(int width, int M, const uint8_t *p, int64_t length, const float *x,
                       const int16_t *scales, int group_bits, float *h) {
    Levels levels = levels_of(width);
    int64_t columns = columns_of(length), stride;
    uint8_t end[8 * LANES];
    Floats sums[ROWS], part[ROWS];
    UNROLL for (int r = 0; r < M; r++) sums[r] = all(0);
    for (int64_t b = 0; b < blocks_of(length); b++) {
        const uint8_t *q = block(width, p, columns, b, end, &stride);
        UNROLL for (int j = 0; j < 8; j++) {
            Floats l = level(width, codes_at(width, q, stride, j), &levels);
            UNROLL for (int r = 0; r < M; r++, x += LANES) {
                Floats v;
                memcpy(&v, x, sizeof v);
                part[r] = j ? multiply_add(l, v, part[r]) : l * v;
            }
        }
        Floats s = group_bits ? scales_at(scales, group_bits, b, columns) : all(1);
        UNROLL for (int r = 0; r < M; r++) sums[r] =
            group_bits ? multiply_add(part[r], s, sums[r]) : sums[r] + part[r];
    }
    for (int r = 0; r < M; r++) {
        h[r] = 0;
        for (int i = 0; i < LANES; i++) h[r] += sums[r][i];
        if (!group_bits) h[r] *= scale_of(scales[0]);
    }
}

/* Add h [count, M] times levels of TILE ranks at most of one width to y [M, LINE, 8, LANES]. */
INLINE void leave_ranks(int width, int M, const uint8_t *p, int count, int64_t length,
                        int64_t first, int64_t last, const float *h, const int16_t *scales,
                        int64_t scale_stride, int group_bits, Floats *y) {
    const int J = M == 1 ? 8 : M == 4 ? 2 : 1;
    Levels levels = levels_of(width);
    int64_t columns = columns_of(length);
    uint8_t end[TILE * 8 * LANES];
    for (int64_t b = first; b < last; b++, y += 8) {
        int64_t left = columns - b * LANES, stride = columns;
        const uint8_t *start = p + b * LANES;
        if (left < LANES) { /* the vector ends in this block: copies, with zeros behind them */
            memset(end, 0, count * width * LANES);
            for (int i = 0; i < count * width; i++)
                memcpy(end + i * LANES, start + i * columns, left);
            start = end, stride = LANES;
        }
        for (int part = 0; part < 8; part += J) {
            Floats sums[8];
            UNROLL for (int r = 0; r < M; r++) UNROLL for (int j = 0; j < J; j++) sums[r * J + j] =
                y[r * LINE * 8 + part + j];
            const uint8_t *q = start;
            for (int k = 0; k < count; k++, q += width * stride) {
                Floats s = group_bits ? scales_at(scales + k * scale_stride, group_bits, b, columns)
                                      : all(1);
                UNROLL for (int j = 0; j < J; j++) {
                    Floats l = level(width, codes_at(width, q, stride, part + j), &levels);
                    if (group_bits) l *= s;
                    UNROLL for (int r = 0; r < M; r++) sums[r * J + j] =
                        multiply_add(l, all(h[k * M + r]), sums[r * J + j]);
                }
            }
            UNROLL for (int r = 0; r < M; r++) UNROLL for (int j = 0; j < J; j++)
                y[r * LINE * 8 + part + j] = sums[r * J + j];
        }
    }
}

/* Levels times scales of one rank, in order: out [length]. */
INLINE void decode_rank(int width, const uint8_t *p, int64_t length, const int16_t *scales,
                        int group_bits, float *out) {
    Levels levels = levels_of(width);
    int64_t columns = columns_of(length), stride;
    uint8_t end[8 * LANES];
    for (int64_t b = 0; b < blocks_of(length); b++) {
        const uint8_t *q = block(width, p, columns, b, end, &stride);
        Floats s = group_bits ? scales_at(scales, group_bits, b, columns)
                              : all(scale_of(scales[0])),
               found[8];
        UNROLL for (int j = 0; j < 8; j++) found[j] =
            level(width, codes_at(width, q, stride, j), &levels) * s;
        int64_t left = least(length - b * BLOCK, BLOCK);
        for (int i = 0; i < LANES; i++)
            for (int j = 0; j < 8; j++)
                if (i * 8 + j < left) out[b * BLOCK + i * 8 + j] = found[j][i];
    }
}

/* Rows that are interleaved, from those that are left. */
INLINE int rows_at(int64_t left) { return left >= 8 ? 8 : left >= 4 ? 4 : 1; }

/* A body for every number of rows and width, widths 5 to 7 together. */
#define ROWS_OF(DO, WIDTH)                                                                         \
    do {                                                                                           \
        if (M == 8)                                                                                \
            DO(WIDTH, 8);                                                                          \
        else if (M == 4)                                                                           \
            DO(WIDTH, 4);                                                                          \
        else                                                                                       \
            DO(WIDTH, 1);                                                                          \
    } while (0)
#define WIDTHS(OF, DO)                                                                             \
    switch (width) {                                                                               \
    case 1: OF(DO, 1); break;                                                                      \
    case 2: OF(DO, 2); break;                                                                      \
    case 3: OF(DO, 3); break;                                                                      \
    case 4: OF(DO, 4); break;                                                                      \
    case 8: OF(DO, 8); break;                                                                      \
    default: OF(DO, width);                                                                        \
    }

/* Where the scales of a side begin in a row of `ranks`. */
INLINE const int16_t *scales_of(const Item *item, int side) {
    int64_t v = item->group_bits[0] ? pieces(item->lengths[0], 1 << item->group_bits[0]) : 1;
    return item->ranks + 1 + (side ? v : 0);
}

static void turn(const Item *item, int side, int64_t row, int M) {
    int64_t length = item->lengths[side], blocks = blocks_of(length);
    float *out = item->turned + row * blocks * BLOCK;
    for (int r = 0; r < M; r++) {
        const float *x = item->x + (row + r) * length;
        for (int64_t b = 0; b < blocks; b++)
            for (int j = 0; j < 8; j++)
                for (int i = 0; i < LANES; i++) {
                    int64_t e = (b * LANES + i) * 8 + j;
                    out[((b * 8 + j) * M + r) * LANES + i] = e < length ? x[e] : 0;
                }
    }
}

/* h of ranks `first` to `last`, with the scales of both sides that are for whole vectors. */
static void enter(const Item *item, int side, int64_t first, int64_t last) {
    int64_t length = item->lengths[side], size = blocks_of(length) * BLOCK, k = 0;
    const int16_t *scales = scales_of(item, side), *others = scales_of(item, !side);
    const uint8_t *start = item->codes[side];
    for (const int32_t *run = item->runs; k < last; run += 3) {
        int width = run[1 + side];
        int64_t bytes = width * columns_of(length), end = k + run[0];
        for (int64_t own = first > k ? first : k; own < least(end, last); own++) {
            const uint8_t *p = start + (own - k) * bytes;
            for (int64_t row = 0, M; row < item->rows; row += M) {
                M = rows_at(item->rows - row);
                float *h = item->h + row * item->k + own * M;
#define ENTER(W, R)                                                                                \
    enter_rank(W, R, p, length, item->turned + row * size, scales + own * item->stride,            \
               item->group_bits[side], h)
                WIDTHS(ROWS_OF, ENTER)
                if (!item->group_bits[!side])
                    for (int m = 0; m < M; m++) h[m] *= scale_of(others[own * item->stride]);
            }
        }
        start += run[0] * bytes;
        k = end;
    }
}

/* The same of U's elements `tokens`. */
static void look_up(const Item *item, int64_t row, int M) {
    int64_t columns = columns_of(item->lengths[1]), k = 0;
    const int16_t *scales = scales_of(item, 1), *others = scales_of(item, 0);
    const uint8_t *p = item->codes[1];
    for (const int32_t *run = item->runs; k < item->k; run += 3) {
        int width = run[2];
        Levels levels = levels_of(width);
        for (int64_t i = 0; i < run[0]; i++, k++, p += width * columns)
            for (int r = 0; r < M; r++) {
                int64_t token = item->tokens[row + r];
                uint8_t bytes[8][LANES] = {0};
                for (int w = 0; w < width; w++) bytes[w][0] = p[w * columns + token / 8];
                float scale =
                    scale_of(scales[k * item->stride +
                                    (item->group_bits[1] ? token >> item->group_bits[1] : 0)]);
                float h =
                    level(width, codes_at(width, bytes[0], LANES, token % 8), &levels)[0] * scale;
                item->h[row * item->k + k * M + r] =
                    item->group_bits[0] ? h : h * scale_of(others[k * item->stride]);
            }
    }
}

/* y of blocks `first` to `last`, LINE at most. */
static void leave(const Item *item, int side, int add, int64_t first, int64_t last) {
    int64_t length = item->lengths[side], columns = columns_of(length);
    const int16_t *scales = scales_of(item, side);
    for (int64_t row = 0, M; row < item->rows; row += M) {
        M = rows_at(item->rows - row);
        Floats y[ROWS * LINE * 8];
        memset(y, 0, sizeof y);
        const uint8_t *p = item->codes[side];
        const float *h = item->h + row * item->k;
        int64_t k = 0;
        for (const int32_t *run = item->runs; k < item->k; run += 3) {
            int width = run[1 + side];
            for (int64_t i = 0, n; i < run[0]; i += n, k += n, p += n * width * columns) {
                n = least(run[0] - i, TILE);
#define LEAVE(W, R)                                                                                \
    leave_ranks(W, R, p, n, length, first, last, h + k * M, scales + k * item->stride,             \
                item->stride, item->group_bits[side], y)
                WIDTHS(ROWS_OF, LEAVE)
            }
        }
        for (int m = 0; m < M; m++) {
            float *out = item->y + (row + m) * length;
            for (int64_t b = first; b < last; b++)
                for (int i = 0; i < LANES; i++)
                    for (int j = 0; j < 8; j++) {
                        int64_t e = (b * LANES + i) * 8 + j;
                        if (e < length)
                            out[e] = (add ? out[e] : 0) + y[(m * LINE + b - first) * 8 + j][i];
                    }
        }
    }
}

/* What the threads share out: parts of all items, one item after the other. */
INLINE const Item *item_of(const Item *items, int64_t (*parts)(const Item *, int), int side,
                           int64_t *part) {
    for (int64_t n; *part >= (n = parts(items, side)); items++) *part -= n;
    return items;
}

static int64_t row_parts(const Item *item, int side) {
    (void)side;
    return pieces(item->rows, ROWS);
}
static int64_t rank_parts(const Item *item, int side) {
    (void)side;
    return item->x ? pieces(item->k, RANKS) : 0;
}
static int64_t line_parts(const Item *item, int side) {
    return pieces(blocks_of(item->lengths[side]), LINE);
}

/* y = (or, with `add`, +=) (x·V̂ᵀ)·Ûᵀ of every item, or `transposed` (x·Û)·V̂, with tokens
 * Û[tokens]·V̂; 1: no memory. */
int dm_products(int64_t count, Item *items, int transposed, int add, int threads) {
    int in = transposed, out = !transposed;
    size_t size = LANES;
    int64_t products = 0;
    for (Item *item = items; item < items + count; item++)
        size += item->rows * ((item->x ? blocks_of(item->lengths[in]) * BLOCK : 0) + item->k),
            products += item->rows * item->k * (item->lengths[0] + item->lengths[1]);
    threads = least(threads, 1 + products / SMALL);
    float *scratch = malloc(size * sizeof *scratch), *next = scratch;
    if (!scratch) return 1;
    int64_t rows = 0, ranks = 0, lines = 0;
    for (Item *item = items; item < items + count; item++) {
        item->turned = next;
        next += item->x ? item->rows * blocks_of(item->lengths[in]) * BLOCK : 0;
        item->h = next;
        next += item->rows * item->k;
        rows += row_parts(item, in), ranks += rank_parts(item, in), lines += line_parts(item, out);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < rows; part++) {
            int64_t own = part;
            const Item *item = item_of(items, row_parts, in, &own);
            int64_t last = least(own * ROWS + ROWS, item->rows);
            for (int64_t row = own * ROWS, M; row < last; row += M) {
                M = rows_at(last - row);
                if (item->x)
                    turn(item, in, row, M);
                else
                    look_up(item, row, M);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < ranks; part++) {
            int64_t own = part;
            const Item *item = item_of(items, rank_parts, in, &own);
            enter(item, in, own * RANKS, least(own * RANKS + RANKS, item->k));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < lines; part++) {
            int64_t own = part;
            const Item *item = item_of(items, line_parts, out, &own);
            leave(item, out, add, own * LINE,
                  least(own * LINE + LINE, blocks_of(item->lengths[out])));
        }
    }
    free(scratch);
    return 0;
}

/* V̂ or Û of one item: [k, length], for a product of many rows. */
void dm_decode(const Item *item, int side, float *out, int threads) {
    int64_t length = item->lengths[side], columns = columns_of(length), k = 0;
    const int16_t *scales = scales_of(item, side);
    const uint8_t *start = item->codes[side];
    for (const int32_t *run = item->runs; k < item->k;
         k += run[0], start += (int64_t)run[0] * run[1 + side] * columns, run += 3) {
        int width = run[1 + side];
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < run[0]; i++) {
#define DECODE(W)                                                                                  \
    decode_rank(W, start + i * W * columns, length, scales + (k + i) * item->stride,               \
                item->group_bits[side], out + (k + i) * length)
#define ALONE(DO, W) DO(W)
            WIDTHS(ALONE, DECODE)
        }
    }
}
