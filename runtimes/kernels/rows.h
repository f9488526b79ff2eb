/* The steps between two matrix products, each in one pass over memory.

   A token's codes are round(127 x / max|x|) + 128, and its scale is max|x| / 127. */

#pragma once
#include "kernels.h"
#include "vectors.h"

enum { ZERO_POINT = 128 };

INLINE void quantize_row(const float *x, ptrdiff_t width, uint8_t *codes, float *scale) {
    struct largest largest = none();
    for (ptrdiff_t i = 0; i < width; i += LANES) enlarge(&largest, load_part(x + i, width - i));
    float most = magnitude(largest);
    vec factor = set(127.0f / most);
    for (ptrdiff_t i = 0; i < width; i += LANES)
        store_codes(codes + i, width - i, times(load_part(x + i, width - i), factor), ZERO_POINT);
    *scale = most * (1 / 127.0f);
}

TARGET static void quantize(const struct rows *rows, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t width = rows->width;
    for (ptrdiff_t row = first; row < last; row++)
        quantize_row(rows->value + row * width, width, rows->codes + row * width,
                     rows->row_scales + row);
}

TARGET static void add_norm(const struct rows *rows, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t width = rows->width;
    for (ptrdiff_t row = first; row < last; row++) {
        const float *residual = rows->residual + row * width, *total = residual;
        vec squares = set(0);
        if (rows->value) {
            const float *value = rows->value + row * width;
            float *to = rows->total + row * width;
            vec scale = set(rows->scales ? rows->scales[row] : 1);
            for (ptrdiff_t i = 0; i < width; i += LANES) {
                ptrdiff_t left = width - i;
                vec x = fma_add(load_part(value + i, left), scale, load_part(residual + i, left));
                squares = fma_add(x, x, squares);
                store_part(to + i, left, x);
            }
            total = to;
        } else {
            for (ptrdiff_t i = 0; i < width; i += LANES) {
                vec x = load_part(residual + i, width - i);
                squares = fma_add(x, x, squares);
            }
        }
        vec factor = set(norm_factor(squares, width, rows->eps));
        struct largest largest = none();
        for (ptrdiff_t i = 0; i < width; i += LANES) {
            ptrdiff_t left = width - i;
            vec x = times(load_part(total + i, left), factor);
            x = times(x, load_part(rows->gains + i, left));
            enlarge(&largest, x);
            if (rows->result) store_part(rows->result + row * width + i, left, x);
        }
        if (!rows->codes) continue;
        float most = magnitude(largest);
        vec rounding = set(127.0f / most);
        for (ptrdiff_t i = 0; i < width; i += LANES) {
            ptrdiff_t left = width - i;
            vec x = times(load_part(total + i, left), factor);
            x = times(x, load_part(rows->gains + i, left));
            store_codes(rows->codes + row * width + i, left, times(x, rounding), ZERO_POINT);
        }
        rows->row_scales[row] = most * (1 / 127.0f);
    }
}

TARGET static void swiglu(const struct rows *rows, ptrdiff_t first, ptrdiff_t last) {
    ptrdiff_t width = rows->width;
    float buffer[rows->result ? 1 : width];
    for (ptrdiff_t row = first; row < last; row++) {
        const float *gate = rows->value + row * width, *up = rows->up + row * width;
        vec scale = set(rows->scales ? rows->scales[row] : 1);
        float *product = rows->result ? rows->result + row * width : buffer;
        for (ptrdiff_t i = 0; i < width; i += LANES) {
            ptrdiff_t left = width - i;
            vec x = times(load_part(gate + i, left), scale);
            vec e = exponential(subtract(set(0), x));
            x = divide(x, add(set(1), e));
            store_part(product + i, left, times(x, load_part(up + i, left)));
        }
        if (rows->codes)
            quantize_row(product, width, rows->codes + row * width, rows->row_scales + row);
    }
}
