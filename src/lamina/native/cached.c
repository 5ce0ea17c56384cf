/* Attention of one new token of each sequence in bfloat16 over a cache of keys and values; the plain form is in ops/cache.py.

   A thread takes one key head of one sequence, of which it reads every key and value once for all query heads that share it. Products
   of queries and keys take bfloat16 and sum in fp32; what follows is fp32 throughout, and rounded at the end.

   Layouts: q and out [sequences][heads][width], k and v [sequences][key heads][width]; the caches of keys and values [sequences][key
   heads][slots][width], whose sequences and key heads lie apart. Width is a multiple of 16, at most 256. */
#include "vector.h"
#include <omp.h>

enum { WIDEST = 256, SMALL = 16384 /* numbers of keys that are not worth waking a thread for */ };

/* Up to 32 numbers, with zeros behind them. */
INLINE words pairs_of(const bf16 *x, long some) {
    words out = {0};
    if (some == 2 * LANES) return load_words((const pair *)x);
    memcpy(&out, x, sizeof(bf16) * LANES); /* widths are multiples of 16 */
    return out;
}

/* scores = q·k of `slots` keys, and to what is above them -infinity, up to a multiple of LANES. */
static void scores_of(const bf16 *q, const bf16 *keys, long slots, long width, float *scores) {
    for (long t = 0; t < slots; t += 4) {
        floats s[4] = {0};
        for (long d = 0; d < width; d += 2 * LANES) {
            long some = width - d < 2 * LANES ? LANES : 2 * LANES;
            words left = pairs_of(q + d, some);
            for (long i = 0; i < 4; i++) s[i] = dot2(s[i], left, pairs_of(keys + (t + i < slots ? t + i : slots - 1) * width + d, some));
        }
        sums_of_four(s, scores + t);
    }
    for (long t = slots; t < up(slots, LANES); t++) scores[t] = -INFINITY;
}

/* Scores to exp(scale·(score - highest)); returns 1/Σ. */
static float weights_of(float *scores, long slots, float scale) {
    floats most = all(-INFINITY), total = all(0);
    for (long t = 0; t < slots; t += LANES) most = larger(load(scores + t), most);
    float highest = largest(most);
    for (long t = 0; t < slots; t += LANES) {
        floats e = exponential((load(scores + t) - highest) * scale);
        store(scores + t, e), total += e;
    }
    return 1 / sum(total);
}

/* out = inverse·Σ weight·value; COLUMNS registers at one time. */
static void mix(const float *weights, const bf16 *values, long slots, long width, float inverse, bf16 *out) {
    enum { COLUMNS = 4 };
    for (long d = 0; d < width; d += COLUMNS * LANES) {
        long columns = (width - d < COLUMNS * LANES ? width - d : COLUMNS * LANES) / LANES;
        floats s[COLUMNS] = {0};
        if (columns == COLUMNS)
            for (long t = 0; t < slots; t++)
                for (int j = 0; j < COLUMNS; j++) s[j] += widen(values + t * width + d + j * LANES) * weights[t];
        else
            for (long t = 0; t < slots; t++)
                for (int j = 0; j < columns; j++) s[j] += widen(values + t * width + d + j * LANES) * weights[t];
        for (int j = 0; j < columns; j++) narrow(out + d + j * LANES, s[j] * inverse);
    }
}

/* Words of four bytes that one thread needs for so many slots. */
long cached_memory(long slots) { return up(slots, LANES); }

/* Stores k and v in slot `now` and attends it to itself and to those from starts[sequence], or from `first`, on.
   `sequence` and `head`: numbers from one of the cache to the next. `memory` holds cached_memory(now + 1) words for each thread. */
void cached_attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *keys, bf16 *values, const int64_t *starts, bf16 *out,
                      long sequences, long heads, long key_heads, long width, long sequence, long head, long first, long now,
                      float *memory, int threads) {
    float scale = 1 / sqrtf(width);
    long group = heads / key_heads;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads) if (sequences * key_heads * (now - first) * width > SMALL)
    for (long b = 0; b < sequences; b++)
        for (long h = 0; h < key_heads; h++) {
            float *scores = memory + omp_get_thread_num() * cached_memory(now + 1);
            bf16 *own_keys = keys + b * sequence + h * head, *own_values = values + b * sequence + h * head;
            long from = starts[b] > first ? starts[b] : first, slots = now + 1 - from;
            memcpy(own_keys + now * width, k + (b * key_heads + h) * width, sizeof(bf16) * width);
            memcpy(own_values + now * width, v + (b * key_heads + h) * width, sizeof(bf16) * width);
            for (long g = 0; g < group; g++) {
                long at = ((b * key_heads + h) * group + g) * width;
                scores_of(q + at, own_keys + from * width, slots, width, scores);
                float inverse = weights_of(scores, slots, scale);
                mix(scores, own_values + from * width, slots, width, inverse, out + at);
            }
        }
}
