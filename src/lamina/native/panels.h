/* Tiles of a product in bfloat16, and the packed panels of columns that they run over (products.c, integers.c). */
#pragma once
#include "vector.h"

enum {
    ROWS = 6, /* of a tile, PANEL columns wide: 24 of 32 registers */
    COLUMNS = 4,
    PANEL = COLUMNS * LANES,
    AHEAD = 16 /* rows from one that is packed to one that is fetched */
};

/* c, with a·b of `rows` rows, at most ROWS, or with `add` what it was plus that; `inner` pairs, `step` numbers of a row apart. */
INLINE void tile(int rows, long inner, const bf16 *a, long row, long step, const pair *b, float *c, int add) {
    floats s[ROWS][COLUMNS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < COLUMNS; j++) s[i][j] = add ? load(c + i * PANEL + LANES * j) : all(0);
    for (long k = 0; k < inner; k++) {
        words right[COLUMNS];
        if (step == 2 && k % LANES < ROWS) __builtin_prefetch(a + (ROWS + k % LANES) * row + k / LANES * 2 * LANES); /* the next tile's */
        for (int j = 0; j < COLUMNS; j++) right[j] = load_words(b + k * PANEL + LANES * j);
        for (int i = 0; i < rows; i++) {
            pair left;
            memcpy(&left, a + i * row + k * step, sizeof left);
            for (int j = 0; j < COLUMNS; j++) s[i][j] = dot2(s[i][j], all_words(left), right[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < COLUMNS; j++) store(c + i * PANEL + LANES * j, s[i][j]);
}

static void tile_of(long rows, long inner, const bf16 *a, long row, long step, const pair *b, float *c, int add) {
    switch (rows) { /* a compiler keeps the sums in registers where it knows their number */
    case 6: tile(6, inner, a, row, step, b, c, add); return;
    case 5: tile(5, inner, a, row, step, b, c, add); return;
    case 4: tile(4, inner, a, row, step, b, c, add); return;
    case 3: tile(3, inner, a, row, step, b, c, add); return;
    case 2: tile(2, inner, a, row, step, b, c, add); return;
    case 1: tile(1, inner, a, row, step, b, c, add);
    }
}

/* Asks for where a tile's result in bfloat16 goes, `row` numbers apart, so that its lines are in the cache when the sums are. */
INLINE void expect(const bf16 *to, long rows, long row) {
    for (long i = 0; i < rows; i++) __builtin_prefetch(to + i * row, 1), __builtin_prefetch(to + i * row + 2 * LANES, 1);
}

typedef uint16_t line __attribute__((vector_size(64), aligned(2)));

/* x[inner][columns] to out[panels][inner/2][PANEL], pairs of a number and the one below it; zeros are added. */
static void pack(const bf16 *x, long row, long inner, long columns, pair *out) {
    for (long k = 0; k < inner; k += 2, out += PANEL)
        for (long d = 0; d < up(columns, PANEL); d += 2 * LANES) {
            line above = {0}, below = {0};
            const bf16 *from = x + k * row + d;
            if (d + 2 * LANES <= columns) {
                __builtin_prefetch(from + AHEAD * row), __builtin_prefetch(from + (AHEAD + 1) * row);
                above = *(const line *)from;
                if (k + 1 < inner) below = *(const line *)(from + row);
            } else if (d < columns) {
                memcpy(&above, from, sizeof(bf16) * (columns - d));
                if (k + 1 < inner) memcpy(&below, from + row, sizeof(bf16) * (columns - d));
            }
            pair *to = out + d / PANEL * up(inner, 2) / 2 * PANEL + d % PANEL;
            store_words(to, (words)SHUFFLED(line, above, below, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10,
                                            42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47));
            store_words(to + LANES, (words)SHUFFLED(line, above, below, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                    24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63));
        }
}

INLINE void transpose(words x[LANES]) {
    for (int round = 0; round < 4; round++) { /* each interleaves the first half with the second */
        words y[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            words a = x[i], b = x[i + LANES / 2];
            y[2 * i] = SHUFFLED(words, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = SHUFFLED(words, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

/* The same of x[columns][inner], at most PANEL columns; inner is even. */
static void pack_turned(const bf16 *x, long row, long inner, long columns, pair *out) {
    for (long d = 0; d < PANEL; d += LANES)
        for (long k = 0; k < inner / 2; k += LANES) {
            long some = inner / 2 - k < LANES ? inner / 2 - k : LANES;
            words lines[LANES];
            for (long i = 0; i < LANES; i++) {
                const bf16 *from = x + (d + i) * row + 2 * k;
                lines[i] = all_words(0);
                if (d + i < columns && some == LANES) memcpy(&lines[i], from, sizeof(words)); /* a size that is known is one load */
                else if (d + i < columns) memcpy(&lines[i], from, sizeof(pair) * some);
            }
            transpose(lines);
            for (long i = 0; i < some; i++) store_words(out + (k + i) * PANEL + d, lines[i]);
        }
}
