/* The passes of a layer that are no products, each over its tensors once, in fp32, and rounded to bfloat16 at the end.

   Formulas and reasons are beside the plain forms: ops/norm.py, ops/swiglu.py, ops/rotary.py, ops/dropout.py. Every width is a multiple of 16. */
#include "vector.h"

#define SMALL 16384 /* numbers that are not worth waking a thread for */

INLINE float inverse_root(const bf16 *x, long width, float eps) {
    floats squares = all(0);
    for (long d = 0; d < width; d += LANES) squares += widen(x + d) * widen(x + d);
    return 1 / sqrtf(sum(squares) / width + eps);
}

/* out = x/√(mean x² + ε)·weight; x and out [rows][width]. */
void norm(const bf16 *x, const bf16 *weight, bf16 *out, long rows, long width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (long r = 0; r < rows; r++) {
        const bf16 *from = x + r * width;
        float inverse = inverse_root(from, width, eps);
        for (long d = 0; d < width; d += LANES)
            narrow(out + r * width + d, widen(from + d) * inverse * widen(weight + d));
    }
}

/* With u = x/rms and v = grad·weight: out = (v - u·mean(u·v))/rms. */
void norm_back(const bf16 *x, const bf16 *weight, const bf16 *grad, bf16 *out, long rows, long width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > SMALL)
    for (long r = 0; r < rows; r++) {
        const bf16 *from = x + r * width, *pulled = grad + r * width;
        float inverse = inverse_root(from, width, eps);
        floats both = all(0);
        for (long d = 0; d < width; d += LANES) both += widen(from + d) * widen(pulled + d) * widen(weight + d);
        float along = sum(both) * inverse * inverse / width;
        for (long d = 0; d < width; d += LANES)
            narrow(out + r * width + d, (widen(pulled + d) * widen(weight + d) - widen(from + d) * along) * inverse);
    }
}

INLINE floats sigmoid(floats x) { return 1 / (1 + exponential(-x)); }

/* out = gate·σ(gate)·up; all [count]. */
void gate(const bf16 *gates, const bf16 *ups, bf16 *out, long count, int threads) {
#pragma omp parallel for num_threads(threads) if (count > SMALL)
    for (long i = 0; i < count; i += LANES) {
        floats g = widen(gates + i);
        narrow(out + i, g * sigmoid(g) * widen(ups + i));
    }
}

/* Either gradient may be left out: a null pointer. */
void gate_back(const bf16 *gates, const bf16 *ups, const bf16 *grad, bf16 *gate_grad, bf16 *up_grad, long count, int threads) {
#pragma omp parallel for num_threads(threads) if (count > SMALL)
    for (long i = 0; i < count; i += LANES) {
        floats g = widen(gates + i), s = sigmoid(g), pulled = widen(grad + i);
        if (up_grad) narrow(up_grad + i, pulled * g * s);
        if (gate_grad) narrow(gate_grad + i, pulled * widen(ups + i) * s * (1 + g * (1 - s)));
    }
}

/* Turns the pairs (x[i], x[i + width/2]) of every head by the angle of its token, or back with sign = -1; x and out
   [tokens][heads][width], cosines and sines [tokens][width/2]; the width is a multiple of 32. */
void rotate(const bf16 *x, const bf16 *cosines, const bf16 *sines, bf16 *out, long tokens, long heads, long width, float sign, int threads) {
    long half = width / 2;
#pragma omp parallel for num_threads(threads) if (tokens * heads * width > SMALL)
    for (long t = 0; t < tokens; t++)
        for (long at = t * heads * width; at < (t + 1) * heads * width; at += width)
            for (long i = 0; i < half; i += LANES) {
                floats low = widen(x + at + i), high = widen(x + at + half + i);
                floats cosine = widen(cosines + t * half + i), sine = widen(sines + t * half + i) * sign;
                narrow(out + at + i, low * cosine - high * sine);
                narrow(out + at + half + i, high * cosine + low * sine);
            }
}

/* Random words: xoshiro128++ (Blackman & Vigna 2021, doi:10.1145/3460772), sixteen streams beside each other. */
typedef struct { words a, b, c, d; } streams;

INLINE words turned(words x, int by) { return x << by | x >> (32 - by); }

/* The end of MurmurHash3: near words become far ones. */
INLINE words mixed(words x) {
    x = (x ^ x >> 16) * 0x85ebca6b, x = (x ^ x >> 13) * 0xc2b2ae35;
    return x ^ x >> 16;
}

INLINE words random_words(streams *s) {
    words result = turned(s->a + s->d, 7) + s->a, b = s->b << 9;
    s->c ^= s->a, s->d ^= s->b, s->b ^= s->c, s->a ^= s->d, s->c ^= b, s->d = turned(s->d, 11);
    return result;
}

/* out, or with `onto` what is added to it, = x·raise where a random word is at least `limit`, and 0 elsewhere. Which words these are
   depends on seed and place alone: every 4096 numbers have streams of their own. The count is a multiple of 16. */
#define STREAM 4096
void dropout(const bf16 *x, bf16 *out, long count, long seed, long limit, float raise, long onto, int threads) {
#pragma omp parallel for num_threads(threads) if (count > SMALL)
    for (long from = 0; from < count; from += STREAM) {
        words start[4], numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int k = 0; k < 4; k++) {
            words place = numbers + (pair)(from / STREAM * 4 * LANES + k * LANES);
            start[k] = mixed(mixed(mixed(place) ^ (pair)seed) ^ (pair)(seed >> 32));
        }
        streams s = {start[0], start[1], start[2], start[3]};
        for (long i = from; i < from + STREAM && i < count; i += LANES) {
            integers kept = (integers)(random_words(&s) >= all_words(limit));
            floats raised = chosen(kept, widen(x + i) * raise, all(0));
            narrow(out + i, onto ? widen(out + i) + raised : raised);
        }
    }
}

/* The first `count` of sixteen numbers, and -∞ for the others. */
INLINE floats first_of(const bf16 *from, long count) {
    bf16 some[LANES];
    for (int i = 0; i < LANES; i++) some[i] = i < count ? from[i] : 0xff80;
    return widen(some);
}

/* Cross-entropy of each row, log Σ exp(logit) - logit[target]; with `differentiate`, its gradient softmax - onehot in place of the
   logits. logits [rows][vocabulary], of any size. */
void cross_entropy(bf16 *logits, const int64_t *targets, float *losses, long rows, long vocabulary, long differentiate, int threads) {
    long whole = vocabulary / LANES * LANES, rest = vocabulary - whole;
#pragma omp parallel for num_threads(threads) if (rows * vocabulary > SMALL)
    for (long r = 0; r < rows; r++) {
        bf16 *row = logits + r * vocabulary;
        floats most = first_of(row + whole, rest), total = all(0), logit;
        for (long j = 0; j < whole; j += LANES) logit = widen(row + j), most = chosen(logit < most, most, logit);
        float highest = largest(most), target = first_of(row + targets[r], 1)[0];
        for (long j = 0; j < whole; j += LANES) total += exponential(widen(row + j) - highest);
        if (rest) total += exponential(first_of(row + whole, rest) - highest);
        float all_of_it = sum(total), inverse = 1 / all_of_it;
        losses[r] = logf(all_of_it) + (highest - target);
        if (!differentiate) continue;
        bf16 last[LANES], of_target[LANES];
        narrow(of_target, all(expf(target - highest) * inverse - 1));
        narrow(last, exponential(first_of(row + whole, rest) - highest) * inverse);
        for (long j = 0; j < whole; j += LANES) narrow(row + j, exponential(widen(row + j) - highest) * inverse);
        memcpy(row + whole, last, sizeof(bf16) * rest);
        row[targets[r]] = of_target[0];
    }
}
