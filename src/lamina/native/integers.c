/* Products with a weight in int8: rows in bfloat16 to bytes, then out = row·column·Σ bytes·codes + bias + more·b, the sum of
   bytes·codes exact in int32, more·b a narrow product in bfloat16, as an adapter adds it.

   The instruction multiplies bytes without a sign by codes with one, so a row is kept as q + 128, and sums start at -128·Σ codes. Both
   sides wrap around in int32, and the sum of q·codes, which does not, is what is left.

   As in products.c a thread packs PANEL columns and lets ROWS rows at a time run over them; here four terms of a sum are a word. The
   arithmetic behind the sums is that of ops/int8.py, operation by operation. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(__AMX_INT8__)
#include "panels.h"
#include <immintrin.h>
#include <omp.h>

enum {
    LOW = 48,     /* fewest rows of a task, but at the end */
    LINE = 64,    /* bytes of a cache line */
    NARROW = 256  /* most terms of a sum of the narrow product */
};

typedef uint8_t byte;
typedef int8_t code;
typedef uint32_t word; /* four terms of a sum, the first in the lowest byte */
typedef byte sixteen __attribute__((vector_size(16), aligned(1)));

/* What the sums of a panel start at, and what they are multiplied by and added to. */
typedef struct {
    integers start[COLUMNS];
    floats scale[COLUMNS], bias[COLUMNS];
} columns_of_panel;

/* Whether this processor multiplies bytes faster here than by oneDNN. */
long integers_here(void) { return 1; }

/* Bytes from one row to the next: an odd number of lines, so that neighbouring rows do not share the places of a cache. */
long integer_step(long inner) { return up(inner, LINE) | LINE; }

/* Bytes of a thread's packed columns, of codes and of the narrow product's b. */
long integer_panel(long inner) { return up(inner, 4) * PANEL + (long)sizeof(bf16) * NARROW * PANEL; }

/* Most terms of the narrow product. */
long integer_narrow(void) { return NARROW; }

INLINE floats numbers(const bf16 *x, const float *factors, long some) {
    bf16 copied[LANES] = {0};
    float few[LANES] = {0};
    if (some < LANES) {
        memcpy(copied, x, sizeof(bf16) * some), x = copied;
        if (factors) memcpy(few, factors, sizeof(float) * some), factors = few;
    }
    return factors ? widen(x) * load(factors) : widen(x);
}

/* Rows of x·factors as bytes round(x·(127/largest)) + 128, and the scale of each, largest/127. */
void integer_rows(const bf16 *x, long row, const float *factors, long rows, long inner, float smallest, byte *to, float *scales, int threads) {
    long step = integer_step(inner);
#pragma omp parallel for num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const bf16 *from = x + i * row;
        integers most = {0}; /* magnitudes are ordered as their bits are, and what is not a number stands above infinity */
        for (long k = 0; k < inner; k += LANES) {
            integers bits = (integers)numbers(from + k, factors ? factors + k : factors, inner - k) & 0x7fffffff;
            integers more = bits > most;
            most = (more & bits) | (~more & most);
        }
        int32_t bits = 0;
        for (int j = 0; j < LANES; j++) bits = most[j] > bits ? most[j] : bits;
        float largest;
        memcpy(&largest, &bits, sizeof largest);
        if (largest < smallest) largest = smallest;
        floats by = all(1 / largest * 127); /* as torch divides a number by a tensor */
        for (long k = 0; k < inner; k += LANES) {
            floats exact = numbers(from + k, factors ? factors + k : factors, inner - k) * by;
            __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)exact), _mm512_set1_epi32(128));
            _mm_storeu_si128((__m128i *)(to + i * step + k), _mm512_cvtepi32_epi8(whole));
        }
        scales[i] = largest / 127.0f;
    }
}

INLINE integers dot4(integers c, words a, words b) {
    return (integers)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
}

INLINE void integer_tile(int rows, long deep, const byte *a, long step, const word *b, const integers *start, int32_t *sums) {
    integers s[ROWS][COLUMNS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < COLUMNS; j++) s[i][j] = start[j];
    for (long k = 0; k < deep; k++) {
        words right[COLUMNS];
        if (k % LANES < ROWS) __builtin_prefetch(a + (ROWS + k % LANES) * step + k / LANES * 4 * LANES); /* the next tile's */
        for (int j = 0; j < COLUMNS; j++) right[j] = load_words(b + k * PANEL + LANES * j);
        for (int i = 0; i < rows; i++) {
            word left;
            memcpy(&left, a + i * step + 4 * k, sizeof left);
            for (int j = 0; j < COLUMNS; j++) s[i][j] = dot4(s[i][j], all_words(left), right[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < COLUMNS; j++) *(integers *)(sums + i * PANEL + LANES * j) = s[i][j];
}

static void integer_tile_of(long rows, long deep, const byte *a, long step, const word *b, const integers *start, int32_t *sums) {
    switch (rows) { /* a compiler keeps the sums in registers where it knows their number */
    case 6: integer_tile(6, deep, a, step, b, start, sums); return;
    case 5: integer_tile(5, deep, a, step, b, start, sums); return;
    case 4: integer_tile(4, deep, a, step, b, start, sums); return;
    case 3: integer_tile(3, deep, a, step, b, start, sums); return;
    case 2: integer_tile(2, deep, a, step, b, start, sums); return;
    case 1: integer_tile(1, deep, a, step, b, start, sums);
    }
}

/* x[inner][columns], `row` apart and at most PANEL columns, to out[inner/4][PANEL] words; zeros are added. */
static void pack_codes(const code *x, long row, long inner, long columns, word *out) {
    for (long k = 0; k < inner; k += 4)
        for (long d = 0; d < PANEL; d += LANES) {
            sixteen lines[4] = {0};
            for (long i = 0; i < 4 && k + i < inner && d < columns; i++)
                if (d + LANES <= columns) lines[i] = *(const sixteen *)(x + (k + i) * row + d);
                else memcpy(&lines[i], x + (k + i) * row + d, columns - d);
#define INTERLEAVED(a, b, n) \
    SHUFFLED(sixteen, a, b, n, n + 16, n + 1, n + 17, n + 2, n + 18, n + 3, n + 19, n + 4, n + 20, n + 5, n + 21, n + 6, n + 22, n + 7, n + 23)
            for (int half = 0; half < 2; half++) {
                typedef uint16_t eight __attribute__((vector_size(16), aligned(1)));
                eight above = (eight)(half ? INTERLEAVED(lines[0], lines[1], 8) : INTERLEAVED(lines[0], lines[1], 0));
                eight below = (eight)(half ? INTERLEAVED(lines[2], lines[3], 8) : INTERLEAVED(lines[2], lines[3], 0));
                eight *to = (eight *)(out + k / 4 * PANEL + d + 8 * half);
                to[0] = SHUFFLED(eight, above, below, 0, 8, 1, 9, 2, 10, 3, 11);
                to[1] = SHUFFLED(eight, above, below, 4, 12, 5, 13, 6, 14, 7, 15);
            }
        }
}

/* The same of x[columns][inner]. */
static void pack_codes_turned(const code *x, long row, long inner, long columns, word *out) {
    for (long d = 0; d < PANEL; d += LANES)
        for (long k = 0; k < inner; k += 4 * LANES) {
            long some = inner - k < 4 * LANES ? inner - k : 4 * LANES;
            words lines[LANES];
            for (long i = 0; i < LANES; i++) {
                const code *from = x + (d + i) * row + k;
                lines[i] = all_words(0);
                if (d + i < columns && some == 4 * LANES) lines[i] = *(const words *)from;
                else if (d + i < columns) memcpy(&lines[i], from, some);
            }
            transpose(lines);
            for (long i = 0; i < up(some, 4) / 4; i++) store_words(out + (k / 4 + i) * PANEL + d, lines[i]);
        }
}

static columns_of_panel about(const word *packed, long deep, const float *scale, const bf16 *bias, long columns) {
    columns_of_panel of = {0};
    for (long k = 0; k < deep; k++)
        for (int j = 0; j < COLUMNS; j++) of.start[j] = dot4(of.start[j], all_words(0x80808080), load_words(packed + k * PANEL + LANES * j));
    for (int j = 0; j < COLUMNS; j++) of.start[j] = -of.start[j], of.scale[j] = all(1);
    if (scale) memcpy(of.scale, scale, sizeof(float) * columns);
    for (long d = 0; bias && d < columns; d++) {
        word wide = (word)bias[d] << 16;
        memcpy((float *)of.bias + d, &wide, sizeof wide);
    }
    return of;
}

/* Sums to fp32, in their place. */
INLINE void rescale(int32_t *sums, float by, const columns_of_panel *of) {
    for (int j = 0; j < COLUMNS; j++) {
        floats x = __builtin_convertvector(*(const integers *)(sums + LANES * j), floats) * by * of->scale[j];
        /* Rounded after the product too, as torch does; a plain sum becomes one instruction with it. */
        x = (floats)_mm512_add_round_ps((__m512)x, (__m512)of->bias[j], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        store((float *)sums + LANES * j, x);
    }
}

INLINE void finish(const float *x, long columns, bf16 *to) {
    for (long d = 0; d < columns; d += LANES) {
        bf16 end[LANES];
        narrow(columns - d < LANES ? end : to + d, load(x + d));
        if (columns - d < LANES) memcpy(to + d, end, sizeof(bf16) * (columns - d));
    }
}

/* out[rows][columns] of the bytes and scales that integer_rows made, and codes[columns][inner] or, not turned, [inner][columns].
   more[rows][terms] and b[terms][columns], or turned, [columns][terms], have rows that lie apart; `terms` is even, 0 for none.
   `memory` holds integer_panel bytes for each thread. */
void integer_products(const byte *a, const float *scales, const code *codes, long turned, const float *scale, const bf16 *bias,
                      const bf16 *more, long more_row, const bf16 *b, long b_row, long b_turned, long terms, bf16 *out, long rows,
                      long inner, long columns, byte *memory, int threads) {
    long step = integer_step(inner), deep = up(inner, 4) / 4, panels = up(columns, PANEL) / PANEL;
    long wanted = up(64 * threads, panels) / panels, least = up(rows, wanted) / wanted;
    long high = up(least > LOW ? least : LOW, ROWS), blocks = up(rows, high) / high;
#pragma omp parallel num_threads(threads)
    {
        word *packed = (word *)(memory + omp_get_thread_num() * integer_panel(inner)), *pairs = packed + deep * PANEL;
        columns_of_panel of;
        long at = -1;
        /* Ever shorter runs of tasks, so that a thread packs a panel once for many of them and none waits long for another. */
#pragma omp for schedule(guided)
        for (long task = 0; task < panels * blocks; task++) {
            long from = task / blocks * PANEL, first = task % blocks * high, end = first + high < rows ? first + high : rows;
            long wide = columns - from < PANEL ? columns - from : PANEL;
            if (from != at) {
                if (turned) pack_codes_turned(codes + from * inner, inner, inner, wide, packed);
                else pack_codes(codes + from, columns, inner, wide, packed);
                if (terms && b_turned) pack_turned(b + from * b_row, b_row, terms, wide, pairs);
                else if (terms) pack(b + from, b_row, terms, wide, pairs);
                of = about(packed, deep, scale ? scale + from : scale, bias ? bias + from : bias, wide);
                at = from;
            }
            for (long r = first; r < end; r += ROWS) {
                int32_t sums[ROWS * PANEL];
                long some = end - r < ROWS ? end - r : ROWS;
                expect(out + r * columns + from, some, columns);
                integer_tile_of(some, deep, a + r * step, step, packed, of.start, sums);
                for (long i = 0; i < some; i++) rescale(sums + i * PANEL, scales[r + i], &of);
                if (terms) tile_of(some, terms / 2, more + r * more_row, more_row, 2, pairs, (float *)sums, 1);
                for (long i = 0; i < some; i++) finish((float *)sums + i * PANEL, wide, out + (r + i) * columns + from);
            }
        }
    }
}

#else
long integers_here(void) { return 0; } /* oneDNN is faster where there are tiles, and where there are no products of bytes */
#endif
