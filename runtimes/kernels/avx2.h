/* Sixteen floats in two registers: x86 with AVX2 and FMA. */

#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline TARGET __attribute__((always_inline))
#define PRODUCT TARGET
#define INLINE_PRODUCT INLINE

typedef struct {
    __m256 low, high;
} vec;
typedef __m256 nans;

INLINE __m256i first_lanes(ptrdiff_t count) {
    int lanes = count > 8 ? 8 : count < 0 ? 0 : (int)count;
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

INLINE vec load(const float *from) {
    return (vec){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
INLINE void store(float *to, vec x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
INLINE vec load_part(const float *from, ptrdiff_t count) {
    if (count >= 16) return load(from);
    return (vec){_mm256_maskload_ps(from, first_lanes(count)),
                 _mm256_maskload_ps(from + 8, first_lanes(count - 8))};
}
INLINE void store_part(float *to, ptrdiff_t count, vec x) {
    if (count >= 16) {
        store(to, x);
        return;
    }
    _mm256_maskstore_ps(to, first_lanes(count), x.low);
    _mm256_maskstore_ps(to + 8, first_lanes(count - 8), x.high);
}
INLINE vec keep_first(vec x, ptrdiff_t count, vec others) {
    __m256 low = _mm256_castsi256_ps(first_lanes(count));
    __m256 high = _mm256_castsi256_ps(first_lanes(count - 8));
    return (vec){_mm256_blendv_ps(others.low, x.low, low),
                 _mm256_blendv_ps(others.high, x.high, high)};
}
INLINE vec set(float x) { return (vec){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vec add(vec a, vec b) {
    return (vec){_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}
INLINE vec subtract(vec a, vec b) {
    return (vec){_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
INLINE vec times(vec a, vec b) {
    return (vec){_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
INLINE vec divide(vec a, vec b) {
    return (vec){_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}
INLINE vec fma_add(vec a, vec b, vec c) {
    return (vec){_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE vec fma_negated(vec a, vec b, vec c) {
    return (vec){_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
INLINE vec fma_subtract(vec a, vec b, vec c) {
    return (vec){_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
/* Return `b` if either is NaN. */
INLINE vec smaller(vec a, vec b) {
    return (vec){_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
INLINE vec larger(vec a, vec b) {
    return (vec){_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
INLINE vec absolute(vec x) {
    __m256 sign = _mm256_set1_ps(-0.0f);
    return (vec){_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
INLINE vec nearest(vec x) {
    return (vec){_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)};
}
INLINE __m256 power_of_two_half(__m256 n) {
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
INLINE vec power_of_two(vec n) {
    return (vec){power_of_two_half(n.low), power_of_two_half(n.high)};
}
INLINE float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
INLINE float first_lane(vec x) { return _mm256_cvtss_f32(x.low); }

/* Add lanes i and i + 8, then i + 4, i + 2, i + 1: the same order in every instruction set. */
INLINE float sum(vec x) {
    __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float maximum(vec x) {
    __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE nans no_nans(void) { return _mm256_setzero_ps(); }
INLINE nans find_nans(nans found, vec x) {
    return _mm256_or_ps(found, _mm256_cmp_ps(x.low, x.high, _CMP_UNORD_Q));
}
INLINE int any_nan(nans found) { return _mm256_movemask_ps(found) != 0; }

INLINE __m256i code_half(__m256 x, int zero) {
    __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero));
    code = _mm256_max_epi32(code, _mm256_set1_epi32(zero - 128));
    code = _mm256_min_epi32(code, _mm256_set1_epi32(zero + 127));
    return _mm256_and_si256(code, _mm256_set1_epi32(255));
}

/* Store round(x) + zero, clamped to zero - 128 .. zero + 127. */
INLINE void store_codes(uint8_t *codes, ptrdiff_t count, vec x, int zero) {
    __m256i words = _mm256_packus_epi32(code_half(x.low, zero), code_half(x.high, zero));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (count >= 16) {
        _mm_storeu_si128((__m128i *)codes, bytes);
        return;
    }
    uint8_t all[16];
    _mm_storeu_si128((__m128i *)all, bytes);
    for (ptrdiff_t i = 0; i < count; i++) codes[i] = all[i];
}

/* Heads of neighbouring tokens are too far apart for the hardware prefetcher. */
INLINE void prefetch(const float *from, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 16) _mm_prefetch((const char *)(from + i), _MM_HINT_T0);
}

/* Transpose [8, 8]: pairs, then fours within half a register, then the halves. */
INLINE void transpose_eight(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row) {
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + i * from_row);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        __m256d x = _mm256_castps_pd(b[i / 4 * 4 + i % 4 / 2]);
        __m256d y = _mm256_castps_pd(b[i / 4 * 4 + i % 4 / 2 + 2]);
        a[i] = _mm256_castpd_ps(i % 2 ? _mm256_unpackhi_pd(x, y) : _mm256_unpacklo_pd(x, y));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

/* Transpose [16, 16]. */
INLINE void transpose(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row) {
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 16; j += 8)
            transpose_eight(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
}

/* Attention's tile: 6 queries by 16 keys, in 12 of 16 registers. */
enum { TILE_ROWS = 6, TILE_VECTORS = 1 };

/* Rounded activations are int8. vpmaddubsw multiplies uint8 by int8 and adds two products in 16 bits. With
   unsigned weights of 4 bits, 16 bits hold eight such sums: 15 x 128 x 16 = 30,720. With 8-bit weights they
   hold only one, of the weight's magnitude by the activation with the weight's sign: 128 x 127 x 2 = 32,512. */
enum { ZERO_BY_4_BITS = 0, ZERO_BY_8_BITS = 0, UNSIGNED_NIBBLES = 1, GROUP_ROWS = 4 };

/* Keep the sums in the written order: gcc would compute all summands first, and run out of registers. */
INLINE __m256i in_order(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
}

INLINE __m256i four_inputs(const uint8_t *a) {
    int32_t four;
    __builtin_memcpy(&four, a, sizeof four);
    return _mm256_set1_epi32(four);
}

/* sums += eight steps by 16 outputs, for 4-bit weights: 16 bits hold their sums. */
INLINE void add_nibbles(int rows, const uint8_t *a, const int8_t *w, __m256i ones,
                        __m256i sums[GROUP_ROWS][2]) {
    __m256i words[GROUP_ROWS][2];
#pragma GCC unroll 8
    for (int step = 0; step < 8; step++, a += 4 * GROUP_ROWS, w += 128) {
        __m256i left = _mm256_loadu_si256((const __m256i *)w);
        __m256i right = _mm256_loadu_si256((const __m256i *)(w + 32));
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m256i x = four_inputs(a + 4 * i);
            __m256i first = _mm256_maddubs_epi16(left, x);
            __m256i second = _mm256_maddubs_epi16(right, x);
            words[i][0] = in_order(step ? _mm256_add_epi16(words[i][0], first) : first);
            words[i][1] = in_order(step ? _mm256_add_epi16(words[i][1], second) : second);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 2; j++)
            sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(words[i][j], ones));
}

/* sums += one step by 16 outputs, for 8-bit weights. */
INLINE void add_bytes(int rows, const uint8_t *a, const int8_t *w, __m256i ones,
                      __m256i sums[GROUP_ROWS][2]) {
#pragma GCC unroll 4
    for (int j = 0; j < 2; j++) {
        __m256i weights = _mm256_loadu_si256((const __m256i *)(w + 32 * j));
        __m256i sizes = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m256i x = _mm256_sign_epi8(four_inputs(a + 4 * i), weights);
            __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(sizes, x), ones);
            sums[i][j] = in_order(_mm256_add_epi32(sums[i][j], pairs));
        }
    }
}

/* c += one group of inputs of `rows` tokens by 32 outputs: see product.h. */
INLINE void multiply_group(int bits, int rows, ptrdiff_t steps, const struct row_group *tokens,
                           const struct weight_group *weights, float *c) {
    __m256i ones = _mm256_set1_epi16(1);
    for (int half = 0; half < 32; half += 16) {
        const uint8_t *a = tokens->codes;
        const int8_t *w = weights->weights + 4 * half;
        __m256i sums[GROUP_ROWS][2];
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
        if (bits == 4)
            for (ptrdiff_t k = 0; k < steps; k += 8)
                add_nibbles(rows, a + 4 * GROUP_ROWS * k, w + 128 * k, ones, sums);
        else
            for (ptrdiff_t k = 0; k < steps; k++)
                add_bytes(rows, a + 4 * GROUP_ROWS * k, w + 128 * k, ones, sums);
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
            __m256 scale = _mm256_set1_ps(tokens->scales[i]), sum = _mm256_set1_ps(tokens->sums[i]);
#pragma GCC unroll 4
            for (int j = 0; j < 2; j++) {
                ptrdiff_t at = half + 8 * j;
                __m256 value = _mm256_cvtepi32_ps(sums[i][j]);
                /* Exact: both are whole numbers, and below 2^24. */
                if (bits == 4)
                    value = _mm256_fnmadd_ps(_mm256_loadu_ps(weights->zeros + at), sum, value);
                __m256 factor = _mm256_mul_ps(scale, _mm256_loadu_ps(weights->scales + at));
                float *to = c + 32 * i + at;
                _mm256_storeu_ps(to, _mm256_fmadd_ps(value, factor, _mm256_loadu_ps(to)));
            }
        }
    }
}
