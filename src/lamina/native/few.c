/* Sums of matrix products in bfloat16 with few rows or few columns: out = scale·Σ aᵢ·bᵢ + bias + onto, summed in fp32 and rounded once.

   Such a product waits for the memory of its larger factors, so these are read once, where they lie: a thread takes LANES lines of
   them at a time, and HIGH lines of the few run over WIDE of those; the few stay in a core's cache. Both lie line after line along
   the sum, of which a register holds 32 terms; at the end its lanes are added. A line's sums are the same among any others.

   Lines of the few are rows of the result and the many its columns, or the other way round. */
#include "vector.h"
#include <omp.h>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)

enum {
    HIGH = 6, /* lines of the few at one time */
    WIDE = 4, /* lines of the many */
    MOST = 64, /* more than the lines of the few: FEW in ops/products.py */
    TERMS = 2 * LANES, /* of a sum in a register */
    AHEAD = 8, /* lines of the many from those that are multiplied to those that are fetched */
    WORTH = 1 << 16 /* terms of all sums, or numbers of the many, that are worth waking a thread for */
};

/* Numbers and addresses one after the other, as ops/products.py lays them out. */
typedef struct {
    const bf16 *few, *many;
    long inner, few_line, many_line;
} factors;

typedef struct {
    void *to;
    long few, many, row, column; /* lines; of the result, from one row or column to the next */
    long single, onto;           /* whether it is in fp32, and whether sums are added to what is there */
    long columns_are_few, waits; /* whether it reads what those before it make */
    const bf16 *bias;
    double scale;
    long count;
    factors of[];
} sum_of_products;

/* Whether this processor multiplies few lines faster here than by oneDNN. */
long few_here(void) { return 1; }

/* Sums of `high` of the few with WIDE of the many, of which the last may be the same, to sums[line][LANES]. */
INLINE void block(int high, const sum_of_products *job, long f, const long *m, long from, long fetch, float *sums) {
    floats s[HIGH][WIDE];
    for (int i = 0; i < high; i++)
        for (int j = 0; j < WIDE; j++) s[i][j] = all(0);
    for (long p = 0; p < job->count; p++) {
        const factors *of = job->of + p;
        const bf16 *few = of->few + f * of->few_line, *many[WIDE];
        const bf16 *ahead = of->many + (m[0] + AHEAD) * of->many_line + from * of->inner;
        long k = 0;
        for (int j = 0; j < WIDE; j++) many[j] = of->many + m[j] * of->many_line;
        for (; k + TERMS <= of->inner; k += TERMS) {
            words w[WIDE];
            for (long i = 0; i < fetch; i++, ahead += TERMS) __builtin_prefetch(ahead, 0, 2);
            for (int j = 0; j < WIDE; j++) w[j] = load_words((const pair *)(many[j] + k));
            for (int i = 0; i < high; i++) {
                words x = load_words((const pair *)(few + i * of->few_line + k));
                for (int j = 0; j < WIDE; j++) s[i][j] = dot2(s[i][j], x, w[j]);
            }
        }
        if (k < of->inner) {
            __mmask32 rest = (1u << (of->inner - k)) - 1;
            words w[WIDE];
            for (int j = 0; j < WIDE; j++) w[j] = (words)_mm512_maskz_loadu_epi16(rest, many[j] + k);
            for (int i = 0; i < high; i++) {
                words x = (words)_mm512_maskz_loadu_epi16(rest, few + i * of->few_line + k);
                for (int j = 0; j < WIDE; j++) s[i][j] = dot2(s[i][j], x, w[j]);
            }
        }
    }
    for (int i = 0; i < high; i++) sums_of_four(s[i], sums + i * LANES);
}

static void blocks(long high, const sum_of_products *job, long f, const long *m, long from, long fetch, float *sums) {
    switch (high) { /* a compiler keeps the sums in registers where it knows their number */
    case 6: block(6, job, f, m, from, fetch, sums); return;
    case 5: block(5, job, f, m, from, fetch, sums); return;
    case 4: block(4, job, f, m, from, fetch, sums); return;
    case 3: block(3, job, f, m, from, fetch, sums); return;
    case 2: block(2, job, f, m, from, fetch, sums); return;
    case 1: block(1, job, f, m, from, fetch, sums);
    }
}

/* One line of at most LANES sums to its place, columns from d on. */
INLINE void finish(const sum_of_products *job, floats x, long r, long d, long columns) {
    __mmask16 those = (1u << columns) - 1;
    __m512 bias = job->bias ? (__m512)(words)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(those, job->bias + d)), 16)
                            : _mm512_setzero_ps();
    x = x * (float)job->scale + (floats)bias;
    long at = r * job->row + d * job->column;
    float *to = (float *)job->to + at;
    bf16 *half = (bf16 *)job->to + at;
    if (job->column == 1 && job->single) {
        if (job->onto) x += (floats)_mm512_maskz_loadu_ps(those, to);
        _mm512_mask_storeu_ps(to, those, (__m512)x);
    } else if (job->column == 1) {
        if (job->onto) x += (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(those, half)), 16);
        _mm256_mask_storeu_epi16(half, those, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    } else
        for (long i = 0; i < columns; i++) {
            pair there = job->single || !job->onto ? 0 : (pair)half[i * job->column] << 16;
            float before;
            memcpy(&before, &there, sizeof before);
            if (job->single) to[i * job->column] = job->onto ? to[i * job->column] + x[i] : x[i];
            else half[i * job->column] = rounded(all(before + x[i]))[0];
        }
}

/* LANES lines of the many, from `first` on, and all of the few. */
static void lines(const sum_of_products *job, long first) {
    float sums[MOST][LANES];
    long few = job->few, many = job->many, parts = (few + HIGH - 1) / HIGH, some = many - first < LANES ? many - first : LANES;
    for (long j = 0; j < some; j += WIDE) {
        long m[WIDE], fetch = first + j + AHEAD < many ? WIDE : 0;
        for (long i = 0; i < WIDE; i++) m[i] = j + i < some ? first + j + i : first + some - 1;
        for (long part = 0, f = 0, high; part < parts; part++, f += high) { /* as equal as they can be, and so is what each fetches */
            long from = part * fetch / parts, to = (part + 1) * fetch / parts;
            high = (few - f + parts - part - 1) / (parts - part);
            blocks(high, job, f, m, from, to - from, &sums[f][j]);
        }
    }
    if (!job->columns_are_few)
        for (long f = 0; f < few; f++) finish(job, load(sums[f]), f, first, some);
    else
        for (long j = 0; j < some; j++)
            for (long f = 0; f < few; f += LANES) {
                floats line;
                long those = few - f < LANES ? few - f : LANES;
                for (long i = 0; i < LANES; i++) line[i] = i < those ? sums[f + i][j] : 0;
                finish(job, line, first + j, f, those);
            }
}

INLINE const sum_of_products *next(const sum_of_products *job) { return (const sum_of_products *)(job->of + job->count); }

/* So many sums, which lie one after the other. */
void few_products(const sum_of_products *jobs, long count, int threads) {
    const sum_of_products *job = jobs;
    long numbers = 0, terms = 0;
    for (long i = 0; i < count; i++, job = next(job))
        for (long p = 0; p < job->count; p++)
            numbers += job->many * job->of[p].inner, terms += job->few * job->many * job->of[p].inner;
    if (numbers < WORTH && terms < 16 * WORTH) threads = 1;
#pragma omp parallel num_threads(threads) firstprivate(jobs)
    for (long i = 0; i < count; i++, jobs = next(jobs)) {
        if (jobs->waits) {
#pragma omp barrier
        }
#pragma omp for schedule(guided, 4) nowait
        for (long first = 0; first < jobs->many; first += LANES) lines(jobs, first);
    }
}

#else
long few_here(void) { return 0; } /* oneDNN is faster where there are tiles, and where there are no products of bf16 */
#endif
