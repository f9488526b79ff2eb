/* Sixteen floats in one register: x86 with AVX-512 F, BW, DQ and VL. */

#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

/* Only on functions that need it: the code that checks the CPU must run on any CPU. */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE static inline TARGET __attribute__((always_inline))
/* On functions for products with grouped weights, which run only on CPUs with VNNI. */
#define PRODUCT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE_PRODUCT static inline PRODUCT __attribute__((always_inline))

typedef __m512 vec;
typedef __mmask16 nans;

INLINE __mmask16 first_lanes(ptrdiff_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

INLINE vec load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void store(float *to, vec x) { _mm512_storeu_ps(to, x); }
INLINE vec load_part(const float *from, ptrdiff_t count) {
    return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
INLINE void store_part(float *to, ptrdiff_t count, vec x) {
    _mm512_mask_storeu_ps(to, first_lanes(count), x);
}
INLINE vec keep_first(vec x, ptrdiff_t count, vec others) {
    return _mm512_mask_mov_ps(others, first_lanes(count), x);
}
INLINE vec set(float x) { return _mm512_set1_ps(x); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec subtract(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec times(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec fma_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec fma_negated(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE vec fma_subtract(vec a, vec b, vec c) { return _mm512_fmsub_ps(a, b, c); }
/* Return `b` if either is NaN. */
INLINE vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
INLINE vec absolute(vec x) { return _mm512_abs_ps(x); }
INLINE vec nearest(vec x) { return _mm512_roundscale_ps(x, 8); }
INLINE vec power_of_two(vec n) {
    __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}
INLINE float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
INLINE float first_lane(vec x) { return _mm512_cvtss_f32(x); }

/* Add lanes i and i + 8, then i + 4, i + 2, i + 1: the same order in every instruction set. */
INLINE float sum(vec x) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float maximum(vec x) { return _mm512_reduce_max_ps(x); }

INLINE nans no_nans(void) { return 0; }
INLINE nans find_nans(nans found, vec x) {
    return found | _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
}
INLINE int any_nan(nans found) { return found != 0; }

/* Store round(x) + zero, clamped to zero - 128 .. zero + 127. */
INLINE void store_codes(uint8_t *codes, ptrdiff_t count, vec x, int zero) {
    __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero));
    code = _mm512_max_epi32(code, _mm512_set1_epi32(zero - 128));
    code = _mm512_min_epi32(code, _mm512_set1_epi32(zero + 127));
    _mm512_mask_cvtepi32_storeu_epi8(codes, first_lanes(count), code);
}

/* Heads of neighbouring tokens are too far apart for the hardware prefetcher. */
INLINE void prefetch(const float *from, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 16) _mm_prefetch((const char *)(from + i), _MM_HINT_T0);
}

/* Transpose [16, 16]: pairs, then fours within a quarter of a vector, then the quarters. */
INLINE void transpose(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row) {
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * from_row);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        __m512d x = _mm512_castps_pd(b[i / 4 * 4 + i % 4 / 2]);
        __m512d y = _mm512_castps_pd(b[i / 4 * 4 + i % 4 / 2 + 2]);
        a[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 first = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x44);
        __m512 second = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xee);
        __m512 third = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x44);
        __m512 fourth = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xee);
        _mm512_storeu_ps(to + i * to_row, _mm512_shuffle_f32x4(first, third, 0x88));
        _mm512_storeu_ps(to + (i + 4) * to_row, _mm512_shuffle_f32x4(first, third, 0xdd));
        _mm512_storeu_ps(to + (i + 8) * to_row, _mm512_shuffle_f32x4(second, fourth, 0x88));
        _mm512_storeu_ps(to + (i + 12) * to_row, _mm512_shuffle_f32x4(second, fourth, 0xdd));
    }
}

/* Attention's tile: 6 queries by 64 keys. */
enum { TILE_ROWS = 6, TILE_VECTORS = 4 };

/* The zero point of rounded activations: AVX-512 VNNI multiplies uint8 by int8. */
enum { ZERO_BY_4_BITS = 128, ZERO_BY_8_BITS = 128, UNSIGNED_NIBBLES = 0, GROUP_ROWS = 8 };

/* sums += four products per lane. In assembly: gcc 12 copies the intrinsic's sums to another register and
   back. */
INLINE_PRODUCT void dot(__m512i *sums, __m512i x, __m512i w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(x), "v"(w));
}

/* c += one group of inputs of `rows` tokens by 32 outputs: see product.h. */
INLINE_PRODUCT void multiply_group(int bits, int rows, ptrdiff_t steps,
                                   const struct row_group *tokens,
                                   const struct weight_group *weights, float *c) {
    const uint8_t *a = tokens->codes;
    const int8_t *w = weights->weights;
    __m512i sums[GROUP_ROWS][2];
    (void)bits;
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        sums[i][0] = _mm512_loadu_si512(weights->start);
        sums[i][1] = _mm512_loadu_si512(weights->start + 16);
    }
    for (ptrdiff_t k = 0; k < steps; k++, a += 4 * GROUP_ROWS, w += 128) {
        __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            int32_t four;
            __builtin_memcpy(&four, a + 4 * i, sizeof four);
            __m512i x = _mm512_set1_epi32(four);
            dot(&sums[i][0], x, left);
            dot(&sums[i][1], x, right);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        __m512 scale = _mm512_set1_ps(tokens->scales[i]);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            __m512 factor = _mm512_mul_ps(scale, _mm512_loadu_ps(weights->scales + 16 * j));
            float *to = c + 32 * i + 16 * j;
            _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[i][j]), factor,
                                                 _mm512_loadu_ps(to)));
        }
    }
}
