/* Sums of matrix products in bfloat16: out = scale·Σ aᵢ·bᵢ + bias + onto, summed in fp32 and rounded once.

   A task is PANEL columns of the output and some of its rows. A thread packs those columns of the bᵢ, pairs along the sum, into what
   a core's cache holds, and lets ROWS rows of the aᵢ at a time run over them, as in Goto and van de Geijn 2008
   (doi:10.1145/1356052.1356053). The rows of an a whose pairs lie side by side are read where they are; those of one that is turned
   are packed as well. Sums are taken along the whole of each product in its order, so a row's result is the same among any others.

   A matrix that is not turned lies row after row, `row` numbers apart; a turned one lies column after column. */
#include "panels.h"
#include <omp.h>

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define HERE 1
#else
#define HERE 0 /* oneDNN is faster where there are tiles, and where there are no products of bf16 */
#endif

enum {
    HIGH = 3072, /* most rows of a task that keeps its sums from pass to pass */
    LOW = 48,    /* fewest rows of any other, but at the end */
    DEEP = 2304,  /* terms of the sums in one pass: 288 kB of packed columns */
    TURNED = 512, /* the same where rows are packed too */
    PARTS = 8     /* most products: MOST in ops/products.py */
};

/* Numbers and addresses one after the other, as ops/products.py lays them out. */
typedef struct {
    const bf16 *a, *b;
    long inner, a_row, a_turned, b_row, b_turned;
} factors;

typedef struct {
    void *to;
    long rows, columns, row, column; /* from one row or column to the next */
    long single, onto;               /* whether it is in fp32, and whether sums are added to what is there */
    const bf16 *bias;
    long count;
    factors of[];
} sum_of_products;

/* A product, or a part of it, in one pass: rows of a from `a` on, and packed columns of b. */
typedef struct {
    const bf16 *a;
    const pair *b;
    long inner, row, step, panel;
} part;

/* The next products, or parts of one, that fit into a pass, packed; `at` and `done` say how far the passes have come. */
static int next_pass(const factors *of, long count, long *at, long *done, long first, long high, long column, long wide,
                     pair *columns, pair *rows, part *parts) {
    int found = 0;
    long turned = of[*at].a_turned, room = turned ? TURNED : DEEP;
    while (*at < count && !(turned && found) && room > 1 && of[*at].a_turned == turned) {
        const factors *f = of + *at;
        long k = *done, inner = f->inner - k < room ? f->inner - k : room;
        if (f->b_turned) pack_turned(f->b + column * f->b_row + k, f->b_row, inner, wide, columns);
        else pack(f->b + k * f->b_row + column, f->b_row, inner, wide, columns);
        if (turned) pack(f->a + k * f->a_row + first, f->a_row, inner, high, rows);
        long pairs = up(inner, 2) / 2;
        parts[found++] = turned ? (part){(const bf16 *)rows, columns, pairs, 2, 2 * PANEL, pairs * PANEL * 2}
                                : (part){f->a + first * f->a_row + k, columns, pairs, f->a_row, 2, PANEL * f->a_row};
        columns += pairs * PANEL, room -= 2 * pairs, *done += inner;
        if (*done == f->inner) ++*at, *done = 0;
    }
    return found;
}

INLINE float widened(bf16 x) {
    pair bits = (pair)x << 16;
    float out;
    return memcpy(&out, &bits, sizeof out), out;
}

/* Lines of sums, of rows from r on and columns from d on. */
INLINE void whole(const sum_of_products *out, float scale, const float *sums, long rows, long r, long d, int single, int onto) {
    floats bias[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) bias[j] = out->bias ? widen(out->bias + d + LANES * j) : all(0);
    for (long i = 0; i < rows; i++)
        for (int j = 0; j < COLUMNS; j++) {
            floats x = load(sums + i * PANEL + LANES * j) * scale + bias[j];
            float *to = (float *)out->to + (r + i) * out->row + d + LANES * j;
            bf16 *half = (bf16 *)out->to + (r + i) * out->row + d + LANES * j;
            if (single) store(to, onto ? x + load(to) : x);
            else narrow(half, onto ? x + widen(half) : x);
        }
}

/* Sums to their place: whole lines at once, and one by one where columns are apart or end. */
static void finish(const sum_of_products *out, float scale, const float *sums, long rows, long r, long d, long wide) {
    if (wide == PANEL && out->column == 1) {
        if (out->single && out->onto) whole(out, scale, sums, rows, r, d, 1, 1);
        else if (out->single) whole(out, scale, sums, rows, r, d, 1, 0);
        else if (out->onto) whole(out, scale, sums, rows, r, d, 0, 1);
        else whole(out, scale, sums, rows, r, d, 0, 0);
        return;
    }
    for (long first = 0; first < rows; first += LANES)
        for (long j = 0; j < wide; j++)
            for (long i = first; i < rows && i < first + LANES; i++) {
                long at = (r + i) * out->row + (d + j) * out->column;
                float x = sums[i * PANEL + j] * scale + (out->bias ? widened(out->bias[d + j]) : 0);
                float *to = (float *)out->to + at;
                bf16 *half = (bf16 *)out->to + at;
                if (out->single) *to = out->onto ? x + *to : x;
                else *half = rounded(all(out->onto ? x + widened(*half) : x))[0];
            }
}

/* Whether this processor multiplies faster here than by oneDNN. */
long products_here(void) { return HERE; }

/* Rows of a task. Where a task packs its columns anew, as few tasks as keep all threads busy; otherwise many small ones. */
static long rows_of_a_task(long rows, long columns, long passes, long threads) {
    long panels = up(columns, PANEL) / PANEL, wanted = passes > 1 ? up(2 * threads, panels) / panels : up(64 * threads, panels) / panels;
    long high = up(rows, wanted) / wanted;
    if (passes > 1) return up(high < HIGH ? high : HIGH, high > PANEL ? PANEL : ROWS); /* packed rows lie in panels too */
    return up(high > LOW ? high : LOW, ROWS);
}

/* Words of four bytes that one thread needs for sums of so many terms in all; with `turned`, where some a is. */
long products_memory(long rows, long columns, long terms, long turned, long threads) {
    long passes = turned || terms > DEEP ? 2 : 1, high = up(rows_of_a_task(rows, columns, passes, threads), PANEL);
    return up(terms < DEEP ? terms : DEEP, 2) / 2 * PANEL + (passes > 1 ? high : ROWS) * PANEL + (turned ? TURNED / 2 * high : 0);
}

/* `memory` holds products_memory words for each thread. */
void products(const sum_of_products *out, float scale, pair *memory, int threads) {
    const factors *of = out->of;
    long rows = out->rows, columns = out->columns, count = out->count, terms = 0, turned = 0;
    for (long i = 0; i < count; i++) terms += up(of[i].inner, 2), turned |= of[i].a_turned;
    long depth = up(terms < DEEP ? terms : DEEP, 2) / 2 * PANEL, mine = products_memory(rows, columns, terms, turned, threads);
    int keep = turned || terms > DEEP; /* the sums of all rows of a task, from pass to pass */
    long high = rows_of_a_task(rows, columns, keep ? 2 : 1, threads), blocks = up(rows, high) / high;
#pragma omp parallel num_threads(threads)
    {
        pair *columns_packed = memory + omp_get_thread_num() * mine, *rows_packed = columns_packed + mine - TURNED / 2 * up(high, PANEL);
        float *sums = (float *)(columns_packed + depth);
        part parts[PARTS];
        long packed = -1;
        int found = 0;
        /* Ever shorter runs of tasks, so that a thread packs a panel once for many of them and none waits long for another. */
#pragma omp for schedule(guided)
        for (long task = 0; task < up(columns, PANEL) / PANEL * blocks; task++) {
            long panel = task / blocks, first = task % blocks * high, some = rows - first < high ? rows - first : high;
            long from = panel * PANEL, wide = columns - from < PANEL ? columns - from : PANEL, at = 0, done = 0;
            for (int add = 0, last = 0; !last; add = 1) {
                if (keep || panel != packed)
                    found = next_pass(of, count, &at, &done, keep ? first : 0, some, from, wide, columns_packed, rows_packed, parts);
                packed = panel, last = !keep || at == count;
                for (long i = 0, height; i < some; i += height) {
                    long r = keep ? i : first + i;
                    height = some - i < ROWS ? some - i : ROWS;
                    if (turned && height > PANEL - i % PANEL) height = PANEL - i % PANEL;
                    if (!keep && !out->single && out->column == 1)
                        expect((bf16 *)out->to + (first + i) * out->row + from, height, out->row);
                    float *here = keep ? sums + i * PANEL : sums;
                    for (int p = 0; p < found; p++)
                        tile_of(height, parts[p].inner, parts[p].a + r / PANEL * parts[p].panel + r % PANEL * parts[p].row, parts[p].row,
                                parts[p].step, parts[p].b, here, add || p);
                    if (!keep) finish(out, scale, here, height, first + i, from, wide);
                }
            }
            if (keep) finish(out, scale, sums, some, first, from, wide);
        }
    }
}
