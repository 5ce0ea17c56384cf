/* Causal attention over packed examples in bfloat16, and its gradients; the formulas are in ops/attention.py.

   A thread takes one key head of one example, and of the query heads that read it BLOCK queries at a time. Their scores
   with all keys up to the last of them lie in fp32 in a core's cache (100 bytes a key), so a softmax sees its whole row and nothing has to be put
   right afterwards. The backward pass computes them again: q, k, v and, of each softmax, its highest score and 1/Σ are all that is
   kept. Products take bfloat16 and sum in fp32; probabilities and the gradients of the scores are rounded for that, and nothing
   else is before the end.

   Layouts: q, its gradient and the output [tokens][heads][width]; k, v and theirs [tokens][key heads][width]; what is kept
   [tokens][heads][2]. Width is a multiple of 16, at most 256. Example e holds the tokens starts[e] … starts[e + 1] - 1. */
#include "vector.h"
#include <omp.h>

#define BLOCK 24 /* queries at one time */
#define WIDEST 256
#ifdef __AVX512F__
enum { ROWS = 6, COLUMNS = 4 }; /* of a tile of a product: 24 of 32 registers */
#else
enum { ROWS = 2, COLUMNS = 2 };
#endif

/* Numbers from one row of scores to the next: an odd multiple of a cache line, so that a column is not all in one set. */
static long pitch(long tokens) { return up(tokens, LANES) / LANES % 2 ? up(tokens, LANES) : up(tokens, LANES) + LANES; }

INLINE void tile(int rows, int columns, long inner, const pair *a, long a_row, long a_step, const pair *b, long b_step,
                 float *c, long c_row, int add) {
    floats s[ROWS][COLUMNS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) s[i][j] = add ? load(c + i * c_row + LANES * j) : all(0);
    for (long k = 0; k < inner; k++) {
        words right[COLUMNS];
        for (int j = 0; j < columns; j++) right[j] = load_words(b + k * b_step + LANES * j);
        for (int i = 0; i < rows; i++) {
            words left = all_words(a[i * a_row + k * a_step]);
            for (int j = 0; j < columns; j++) s[i][j] = dot2(s[i][j], left, right[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) store(c + i * c_row + LANES * j, s[i][j]);
}

INLINE void columns_of(int columns, long rows, long inner, const pair *a, long a_row, long a_step, const pair *b,
                       long b_step, float *c, long c_row, int add) {
    long i = 0;
    for (; i + ROWS <= rows; i += ROWS)
        tile(ROWS, columns, inner, a + i * a_row, a_row, a_step, b, b_step, c + i * c_row, c_row, add);
    for (; i < rows; i++) tile(1, columns, inner, a + i * a_row, a_row, a_step, b, b_step, c + i * c_row, c_row, add);
}

/* c[rows][width] = Σₖ a[row][k]·b[k][column] over `inner` pairs k, added to c or not; width is a multiple of LANES. */
static void product(long rows, long width, long inner, const pair *a, long a_row, long a_step, const pair *b, long b_step,
                    float *c, long c_row, int add) {
    long j = 0;
    for (; j + COLUMNS * LANES <= width; j += COLUMNS * LANES)
        columns_of(COLUMNS, rows, inner, a, a_row, a_step, b + j, b_step, c + j, c_row, add);
    long rest = (width - j) / LANES;
    if (COLUMNS > 3 && rest == 3) columns_of(3, rows, inner, a, a_row, a_step, b + j, b_step, c + j, c_row, add);
    else if (COLUMNS > 2 && rest == 2) columns_of(2, rows, inner, a, a_row, a_step, b + j, b_step, c + j, c_row, add);
    else if (rest) columns_of(1, rows, inner, a, a_row, a_step, b + j, b_step, c + j, c_row, add);
}

/* The same rows, close together: out[rows][width/2], pairs along a row. */
static void along(const bf16 *x, long stride, long rows, long width, pair *out) {
    for (long t = 0; t < rows; t++) memcpy(out + t * width / 2, x + t * stride, sizeof(bf16) * width);
}

/* out[padded/2][width], pairs of a number and the one below it; rows of zeros are added. */
static void across(const bf16 *x, long stride, long rows, long padded, long width, pair *out) {
    for (long t = 0; t < padded; t += 2)
        for (long d = 0; d < width; d += LANES) {
            words above = t < rows ? load_halves(x + t * stride + d) : all_words(0);
            words below = t + 1 < rows ? load_halves(x + (t + 1) * stride + d) : all_words(0);
            store_words(out + t / 2 * width + d, above | below << 16);
        }
}

/* out[width/2][pitch], pairs along a row of x, which is a column here; columns of zeros are added. */
static void transposed(const bf16 *x, long stride, long rows, long width, pair *out, long out_row) {
    pair part[LANES][WIDEST / 2];
    for (long t = 0; t < rows; t += LANES) {
        for (long i = 0; i < LANES; i++)
            if (t + i < rows) memcpy(part[i], x + (t + i) * stride, sizeof(bf16) * width);
            else memset(part[i], 0, sizeof(bf16) * width);
        for (long d = 0; d < width / 2; d++)
            for (int i = 0; i < LANES; i++) out[d * out_row + t + i] = part[i][d];
    }
}

/* What a query does not see, up to `padded` keys. */
INLINE void hide(float *scores, long seen, long padded) {
    for (long j = seen; j < padded; j++) scores[j] = -INFINITY;
}

/* Scores of one query to weights 2^(slope·(score - highest)) in bfloat16, which are 0 for keys it does not see; what the backward
   pass needs of them is kept. */
static void weigh(float *scores, float slope, long seen, long padded, bf16 *weights, float *kept) {
    floats most = all(-INFINITY), total = all(0);
    hide(scores, seen, padded);
    for (long j = 0; j < padded; j += LANES) most = larger(load(scores + j), most);
    float highest = largest(most);
    for (long j = 0; j < padded; j += LANES) {
        floats weight = power_of_two((load(scores + j) - highest) * slope);
        narrow(weights + j, weight), total += weight;
    }
    kept[0] = highest, kept[1] = 1 / sum(total);
}

/* Words of four bytes that one thread needs for examples of up to so many tokens. */
long attention_memory(long tokens, long width) { return BLOCK * pitch(tokens) * 3 / 2 + width * pitch(tokens) + BLOCK * width * 3 / 2; }

long attention_back_memory(long tokens, long width) { return BLOCK * pitch(tokens) * 7 / 2 + width * pitch(tokens) * 7 / 2 + BLOCK * width * 3; }

static long longest_of(const int64_t *starts, long examples) {
    long longest = 0;
    for (long e = 0; e < examples; e++)
        if (starts[e + 1] - starts[e] > longest) longest = starts[e + 1] - starts[e];
    return longest;
}

/* `memory` holds attention_memory(longest example, width) words for each thread. */
void attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *kept, const int64_t *starts, long examples,
               long heads, long key_heads, long width, pair *memory, int threads) {
    long longest = longest_of(starts, examples), line = pitch(longest), group = heads / key_heads;
    float slope = LOG2_E / sqrtf(width);
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long e = 0; e < examples; e++)
        for (long key_head = 0; key_head < key_heads; key_head++) {
            long first = starts[e], tokens = starts[e + 1] - first, at = (first * key_heads + key_head) * width;
            pair *keys = memory + omp_get_thread_num() * attention_memory(longest, width);
            pair *values = keys + width / 2 * line, *weights = values + width / 2 * line, *query = weights + BLOCK * line / 2;
            float *scores = (float *)(query + BLOCK * width / 2), *mixed = scores + BLOCK * line;
            transposed(k + at, key_heads * width, tokens, width, keys, line);
            across(v + at, key_heads * width, tokens, up(tokens, LANES), width, values);
            for (long head = key_head * group; head < (key_head + 1) * group; head++)
                for (long start = 0; start < tokens; start += BLOCK) {
                    long rows = tokens - start < BLOCK ? tokens - start : BLOCK, padded = up(start + rows, LANES);
                    long here = ((first + start) * heads + head) * width;
                    along(q + here, heads * width, rows, width, query);
                    product(rows, padded, width / 2, query, width / 2, 1, keys, line, scores, line, 0);
                    for (long i = 0; i < rows; i++)
                        weigh(scores + i * line, slope, start + i + 1, padded, (bf16 *)(weights + i * line / 2),
                              kept + 2 * ((first + start + i) * heads + head));
                    product(rows, width, padded / 2, weights, line / 2, 1, values, width, mixed, width, 0);
                    for (long i = 0; i < rows; i++)
                        for (long d = 0; d < width; d += LANES)
                            narrow(out + here + i * heads * width + d, load(mixed + i * width + d) * kept[2 * ((first + start + i) * heads + head) + 1]);
                }
        }
}

/* Scores of one query to probabilities p; returns Σ p·g over the gradients g of the probabilities. */
static float probabilities(float *scores, const float *grads, float slope, long seen, long padded, const float *kept) {
    floats along_both = all(0);
    hide(scores, seen, padded);
    for (long j = 0; j < padded; j += LANES) {
        floats p = power_of_two((load(scores + j) - kept[0]) * slope) * kept[1];
        store(scores + j, p), along_both += p * load(grads + j);
    }
    return sum(along_both);
}

/* Of two queries: p, and the gradients of their scores, p·(g - Σ p·g), as pairs of both and those also as rows. */
static void pull_back(const float *p, const float *grads, long line, const float *means, long padded, pair *p_pairs, pair *s_pairs,
                      pair *s_rows) {
    for (long j = 0; j < padded; j += LANES) {
        floats first = load(p + j), second = load(p + line + j);
        store_words(p_pairs + j, rounded(first) | rounded(second) << 16);
        first *= load(grads + j) - means[0], second *= load(grads + line + j) - means[1];
        store_words(s_pairs + j, rounded(first) | rounded(second) << 16);
        narrow((bf16 *)s_rows + j, first), narrow((bf16 *)(s_rows + line / 2) + j, second);
    }
}

/* `memory` holds attention_back_memory(longest example, width) words for each thread. */
void attention_back(const bf16 *q, const bf16 *k, const bf16 *v, const float *kept, const bf16 *grad, bf16 *q_grad, bf16 *k_grad,
                    bf16 *v_grad, const int64_t *starts, long examples, long heads, long key_heads, long width, pair *memory, int threads) {
    long longest = longest_of(starts, examples), line = pitch(longest), group = heads / key_heads;
    float scale = 1 / sqrtf(width), slope = LOG2_E * scale;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (long e = 0; e < examples; e++)
        for (long key_head = 0; key_head < key_heads; key_head++) {
            long first = starts[e], tokens = starts[e + 1] - first, at = (first * key_heads + key_head) * width;
            long key_row = key_heads * width, row = heads * width;
            pair *keys = memory + omp_get_thread_num() * attention_back_memory(longest, width);
            pair *values = keys + width / 2 * line, *key_pairs = values + width / 2 * line;
            pair *p_pairs = key_pairs + width / 2 * line, *s_pairs = p_pairs + BLOCK / 2 * line;
            pair *s_rows = s_pairs + BLOCK / 2 * line, *query = s_rows + BLOCK / 2 * line, *pulled = query + BLOCK * width / 2;
            pair *query_pairs = pulled + BLOCK * width / 2, *pulled_pairs = query_pairs + BLOCK * width / 2;
            float *p = (float *)(pulled_pairs + BLOCK * width / 2), *s = p + BLOCK * line, *sums = s + BLOCK * line;
            float *key_sums = sums + BLOCK * width, *value_sums = key_sums + width * line;
            transposed(k + at, key_row, tokens, width, keys, line);
            transposed(v + at, key_row, tokens, width, values, line);
            across(k + at, key_row, tokens, up(tokens, LANES), width, key_pairs);
            memset(key_sums, 0, sizeof(float) * tokens * width);
            memset(value_sums, 0, sizeof(float) * tokens * width);
            for (long head = key_head * group; head < (key_head + 1) * group; head++)
                for (long start = 0; start < tokens; start += BLOCK) {
                    long rows = tokens - start < BLOCK ? tokens - start : BLOCK, even = up(rows, 2);
                    long end = start + rows, padded = up(end, LANES), here = ((first + start) * heads + head) * width;
                    along(q + here, row, rows, width, query);
                    along(grad + here, row, rows, width, pulled);
                    across(q + here, row, rows, even, width, query_pairs);
                    across(grad + here, row, rows, even, width, pulled_pairs);
                    product(rows, padded, width / 2, query, width / 2, 1, keys, line, p, line, 0);
                    product(rows, padded, width / 2, pulled, width / 2, 1, values, line, s, line, 0);
                    float means[BLOCK] = {0};
                    for (long i = 0; i < rows; i++)
                        means[i] = probabilities(p + i * line, s + i * line, slope, start + i + 1, padded,
                                                 kept + 2 * ((first + start + i) * heads + head));
                    if (even > rows) {
                        memset(p + rows * line, 0, sizeof(float) * padded);
                        memset(s + rows * line, 0, sizeof(float) * padded);
                    }
                    for (long i = 0; i < even; i += 2)
                        pull_back(p + i * line, s + i * line, line, means + i, padded, p_pairs + i / 2 * line,
                                  s_pairs + i / 2 * line, s_rows + i * line / 2);
                    product(end, width, even / 2, p_pairs, 1, line, pulled_pairs, width, value_sums, width, 1);
                    product(end, width, even / 2, s_pairs, 1, line, query_pairs, width, key_sums, width, 1);
                    product(rows, width, padded / 2, s_rows, line / 2, 1, key_pairs, width, sums, width, 0);
                    for (long i = 0; i < rows; i++)
                        for (long d = 0; d < width; d += LANES)
                            narrow(q_grad + here + i * row + d, load(sums + i * width + d) * scale);
                }
            for (long t = 0; t < tokens; t++)
                for (long d = 0; d < width; d += LANES) {
                    narrow(k_grad + at + t * key_row + d, load(key_sums + t * width + d) * scale);
                    narrow(v_grad + at + t * key_row + d, load(value_sums + t * width + d));
                }
        }
}
