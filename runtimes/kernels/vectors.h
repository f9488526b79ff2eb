/* Sixteen floats at a time. */

#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

/* On each function that needs it, and on no other: what decides whether they run, runs anywhere.
   Products of bf16 are made by name only, so functions that may make them run without them too. */
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define INLINE static inline AVX512 __attribute__((always_inline))

enum { LANES = 16 };

/* Lanes of a vector that lie within `count`, `done` of which came before. */
INLINE __mmask16 lanes(ptrdiff_t count, ptrdiff_t done) {
    ptrdiff_t left = count - done;
    return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* Heads of neighbouring tokens lie too far apart for the processor to foresee. */
INLINE void prefetch(const float *from, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES)
        _mm_prefetch((const char *)(from + i), _MM_HINT_T0);
}

/* A row's floats as pairs of bf16, rounded to nearest, in its first half. */
INLINE void round_row(float *row, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 2 * LANES) {
        __m512 first = _mm512_loadu_ps(row + i), second = _mm512_loadu_ps(row + i + LANES);
        _mm512_storeu_si512(row + i / 2, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

/* Two rows of 16 floats as pairs of what stands one above the other. */
INLINE void round_columns(const float *first, const float *second, float *to) {
    __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(second), _mm512_loadu_ps(first));
    __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256((__m512i)both));
    __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64((__m512i)both, 1));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/* e^x: 2^n e^r with |r| <= ln(2) / 2, whose Taylor series ends at r^7 / 7!. */
INLINE __m512 exponential(__m512 x) {
    /* The second operand is given where one is NaN. Below -126 all is zero. */
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 720));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

/* 1 / sqrt(mean of squares + eps), RMSNorm's factor (arXiv:1910.07467). */
INLINE float norm_factor(__m512 squares, ptrdiff_t count, float eps) {
    float mean = _mm512_reduce_add_ps(squares) / (float)count;
    return 1 / _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(mean + eps)));
}

/* [16, 16] turned over: pairs, then fours within a quarter of a vector, then the quarters. */
INLINE void transpose(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row) {
    __m512 a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) a[i] = _mm512_loadu_ps(from + i * from_row);
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
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
