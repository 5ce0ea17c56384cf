/* Sixteen numbers at a time, in the vector types that GCC and Clang share, and bfloat16 in and out of them.

   Nothing here names a processor but narrow and dot2. The compiler makes one AVX-512 instruction of an operation, two of AVX2, or four
   of NEON. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef uint16_t bf16;
typedef uint32_t pair; /* two neighbouring bf16, the first in the low half */
typedef float floats __attribute__((vector_size(64), aligned(4)));
typedef uint32_t words __attribute__((vector_size(64), aligned(4)));
typedef int32_t integers __attribute__((vector_size(64), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2)));

#define LANES 16

/* The numbers of a and then of b at these places. */
#ifdef __clang__
#define SHUFFLED(type, a, b, ...) ((type)__builtin_shufflevector(a, b, __VA_ARGS__))
#else /* GCC has that one from 12 on only */
#define SHUFFLED(type, a, b, ...) ((type)__builtin_shuffle(a, b, (type){__VA_ARGS__}))
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE long up(long n, long to) { return (n + to - 1) / to * to; }

INLINE floats load(const float *from) { return *(const floats *)from; }
INLINE void store(float *to, floats x) { *(floats *)to = x; }
INLINE words load_words(const pair *from) { return *(const words *)from; }
INLINE void store_words(pair *to, words x) { *(words *)to = x; }
INLINE words load_halves(const bf16 *from) { return __builtin_convertvector(*(const halves *)from, words); }
INLINE floats all(float x) { return x - (floats){0}; }
INLINE words all_words(pair x) { return x - (words){0}; }

/* bfloat16 is the upper half of a float. */
INLINE floats widen(const bf16 *from) { return (floats)(load_halves(from) << 16); }

/* To the nearest bfloat16, ties to even; what is not a number stays so. */
INLINE words rounded(floats x) {
#ifdef __AVX512BF16__
    return (words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); /* subnormal numbers become zero, as in dot2 */
#else
    words bits = (words)x, nearest = bits + 0x7fff + ((bits >> 16) & 1), broken = (words)(x != x);
    return ((broken & 0x7fc00000u) | (~broken & nearest)) >> 16;
#endif
}
INLINE void narrow(bf16 *to, floats x) {
#ifdef __AVX512BF16__
    *(halves *)to = (halves)_mm512_cvtneps_pbh((__m512)x);
#else
    *(halves *)to = __builtin_convertvector(rounded(x), halves);
#endif
}

/* The halves of x change places; then those of its halves, and so on: after all four each number has met each. */
#define TURNED_8(x) (floats)SHUFFLED(words, (words)x, (words)x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define TURNED_4(x) (floats)SHUFFLED(words, (words)x, (words)x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define TURNED_2(x) (floats)SHUFFLED(words, (words)x, (words)x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define TURNED_1(x) (floats)SHUFFLED(words, (words)x, (words)x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

INLINE float sum(floats x) {
    x += TURNED_8(x), x += TURNED_4(x), x += TURNED_2(x), x += TURNED_1(x);
    return x[0];
}

/* The sums of each of four. */
INLINE void sums_of_four(const floats *x, float *to) {
#ifdef __AVX512BF16__
    __m512 low = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]), _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]));
    __m512 high = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]), _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]));
    __m512 all = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), (__m256)_mm512_extractf64x4_pd((__m512d)all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
    for (int i = 0; i < 4; i++) to[i] = sum(x[i]);
#endif
}
INLINE floats chosen(integers mask, floats yes, floats no) {
    return (floats)((mask & (integers)yes) | (~mask & (integers)no));
}

/* The larger, and the smaller, of each two; b's where one of them is not a number. */
INLINE floats larger(floats a, floats b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return chosen(a > b, a, b);
#endif
}
INLINE floats smaller(floats a, floats b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return chosen(a < b, a, b);
#endif
}

INLINE float largest(floats x) {
    x = larger(x, TURNED_8(x)), x = larger(x, TURNED_4(x)), x = larger(x, TURNED_2(x)), x = larger(x, TURNED_1(x));
    return x[0];
}

/* 2ˣ to 2e-7 of its value; 0 below -126.5 and infinite above 127.5; what is not a number stays so. The whole part of x is written into
   the exponent, where the ends have their bits too; of the rest, at most a half, the polynomial errs least that is 1 at 0. */
INLINE floats power_of_two(floats exact) {
    floats x = smaller(all(128), larger(all(-127), exact));
    floats moved = x + 12582912.0f, rest = x - (moved - 12582912.0f);
    floats p = rest * 1.32647275e-3f + 9.67151286e-3f;
    p = p * rest + 5.55073374e-2f;
    p = p * rest + 2.40222421e-1f;
    p = p * rest + 6.93146978e-1f;
    p = p * rest + 1.0f;
    return p * (floats)(((integers)moved << 23) + (127 << 23));
}

#define LOG2_E 1.44269504f

/* eˣ; x·log₂e is rounded before: to 2e-7 of its value near 0, and to 5e-6 at the ends. */
INLINE floats exponential(floats x) { return power_of_two(x * LOG2_E); }

/* c + a·b of both bf16 of every pair, summed in fp32. */
INLINE floats dot2(floats c, words a, words b) {
#ifdef __AVX512BF16__
    return (floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    return c + (floats)(a << 16) * (floats)(b << 16) + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
#endif
}
