/* What stands between two 8-bit products, each in one pass over memory.

   A token's codes are round(127 x / max|x|) + 128, and its scale is max|x| / 127. */

#include "kernels.h"
#include "vectors.h"

static const float TINY = 1e-20f; /* stands for the largest value of a token of zeros */

/* The largest magnitude so far, and which lanes met NaN, which max() does not hand on. */
struct largest {
    __m512 value;
    __mmask16 nan;
};

INLINE void enlarge(struct largest *largest, __m512 x) {
    largest->value = _mm512_max_ps(largest->value, _mm512_abs_ps(x));
    largest->nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
}

INLINE float reduce(struct largest largest) {
    float value = _mm512_reduce_max_ps(largest.value);
    return largest.nan ? __builtin_nanf("") : value > TINY ? value : TINY;
}

INLINE void store_codes(uint8_t *codes, __mmask16 mask, __m512 x) {
    __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128));
    code = _mm512_min_epi32(_mm512_max_epi32(code, _mm512_setzero_si512()), _mm512_set1_epi32(255));
    _mm512_mask_cvtepi32_storeu_epi8(codes, mask, code);
}

AVX512 static void quantize_row(const float *x, ptrdiff_t width, uint8_t *codes, float *scale) {
    struct largest largest = {_mm512_setzero_ps(), 0};
    for (ptrdiff_t i = 0; i < width; i += LANES)
        enlarge(&largest, _mm512_maskz_loadu_ps(lanes(width, i), x + i));
    float most = reduce(largest);
    __m512 factor = _mm512_set1_ps(127.0f / most);
    for (ptrdiff_t i = 0; i < width; i += LANES) {
        __mmask16 mask = lanes(width, i);
        store_codes(codes + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor));
    }
    *scale = most * (1 / 127.0f);
}

AVX512 void quantize(const struct rows *rows, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t width = rows->width;
    for (ptrdiff_t row = first; row < last; row++)
        quantize_row(rows->value + row * width, width, rows->codes + row * width,
                     rows->row_scales + row);
}

AVX512 void add_norm(const struct rows *rows, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t width = rows->width;
    for (ptrdiff_t row = first; row < last; row++) {
        const float *residual = rows->residual + row * width, *value = rows->value + row * width;
        float *total = rows->total + row * width;
        __m512 scale = _mm512_set1_ps(rows->scales[row]), squares = _mm512_setzero_ps();
        for (ptrdiff_t i = 0; i < width; i += LANES) {
            __mmask16 mask = lanes(width, i);
            __m512 x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, value + i), scale,
                                       _mm512_maskz_loadu_ps(mask, residual + i));
            squares = _mm512_fmadd_ps(x, x, squares);
            _mm512_mask_storeu_ps(total + i, mask, x);
        }
        __m512 factor = _mm512_set1_ps(norm_factor(squares, width, rows->eps));
        struct largest largest = {_mm512_setzero_ps(), 0};
        for (ptrdiff_t i = 0; i < width; i += LANES) {
            __mmask16 mask = lanes(width, i);
            __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, total + i), factor);
            x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, rows->gains + i));
            enlarge(&largest, x);
            if (rows->result) _mm512_mask_storeu_ps(rows->result + row * width + i, mask, x);
        }
        if (!rows->codes) continue;
        float most = reduce(largest);
        __m512 rounding = _mm512_set1_ps(127.0f / most);
        for (ptrdiff_t i = 0; i < width; i += LANES) {
            __mmask16 mask = lanes(width, i);
            __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, total + i), factor);
            x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, rows->gains + i));
            store_codes(rows->codes + row * width + i, mask, _mm512_mul_ps(x, rounding));
        }
        rows->row_scales[row] = most * (1 / 127.0f);
    }
}

AVX512 void swiglu(const struct rows *rows, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t width = rows->width;
    float buffer[rows->result ? 1 : width];
    __m512 one = _mm512_set1_ps(1.0f);
    for (ptrdiff_t row = first; row < last; row++) {
        const float *gate = rows->value + row * width, *up = rows->up + row * width;
        __m512 scale = _mm512_set1_ps(rows->scales[row]);
        float *product = rows->result ? rows->result + row * width : buffer;
        for (ptrdiff_t i = 0; i < width; i += LANES) {
            __mmask16 mask = lanes(width, i);
            __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, gate + i), scale);
            __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
            x = _mm512_div_ps(x, _mm512_add_ps(one, e));
            x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, up + i));
            _mm512_mask_storeu_ps(product + i, mask, x);
        }
        if (rows->codes)
            quantize_row(product, width, rows->codes + row * width, rows->row_scales + row);
    }
}
