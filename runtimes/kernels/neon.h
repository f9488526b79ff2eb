/* Sixteen floats in four registers: 64-bit ARM, where every CPU has NEON. */

#pragma once
#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

#define TARGET
#define INLINE static inline __attribute__((always_inline))
#define PRODUCT TARGET
#define INLINE_PRODUCT INLINE

typedef float32x4x4_t vec;
typedef uint32x4_t nans;

/* Apply an operation to each register. */
#define EACH(operation) \
    ((vec){{operation(0), operation(1), operation(2), operation(3)}})

INLINE vec load(const float *from) {
#define OPERATION(i) vld1q_f32(from + 4 * (i))
    return EACH(OPERATION);
#undef OPERATION
}
INLINE void store(float *to, vec x) {
    for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, x.val[i]);
}
INLINE vec load_part(const float *from, ptrdiff_t count) {
    if (count >= 16) return load(from);
    float all[16] = {0};
    for (ptrdiff_t i = 0; i < count; i++) all[i] = from[i];
    return load(all);
}
INLINE void store_part(float *to, ptrdiff_t count, vec x) {
    if (count >= 16) {
        store(to, x);
        return;
    }
    float all[16];
    store(all, x);
    for (ptrdiff_t i = 0; i < count; i++) to[i] = all[i];
}
INLINE vec keep_first(vec x, ptrdiff_t count, vec others) {
    float kept[16], all[16];
    store(kept, x);
    store(all, others);
    for (ptrdiff_t i = 0; i < count && i < 16; i++) all[i] = kept[i];
    return load(all);
}
INLINE vec set(float x) {
#define OPERATION(i) vdupq_n_f32(x)
    return EACH(OPERATION);
#undef OPERATION
}
#define BINARY(name, instruction)                               \
    INLINE vec name(vec a, vec b) {                             \
        vec all;                                                \
        for (int i = 0; i < 4; i++) all.val[i] = instruction(a.val[i], b.val[i]); \
        return all;                                             \
    }
BINARY(add, vaddq_f32)
BINARY(subtract, vsubq_f32)
BINARY(times, vmulq_f32)
BINARY(divide, vdivq_f32)
/* NaN if either is NaN. */
BINARY(smaller, vminq_f32)
BINARY(larger, vmaxq_f32)
#undef BINARY
INLINE vec fma_add(vec a, vec b, vec c) {
#define OPERATION(i) vfmaq_f32(c.val[i], a.val[i], b.val[i])
    return EACH(OPERATION);
#undef OPERATION
}
INLINE vec fma_negated(vec a, vec b, vec c) {
#define OPERATION(i) vfmsq_f32(c.val[i], a.val[i], b.val[i])
    return EACH(OPERATION);
#undef OPERATION
}
INLINE vec fma_subtract(vec a, vec b, vec c) {
#define OPERATION(i) vfmaq_f32(vnegq_f32(c.val[i]), a.val[i], b.val[i])
    return EACH(OPERATION);
#undef OPERATION
}
INLINE vec absolute(vec x) {
#define OPERATION(i) vabsq_f32(x.val[i])
    return EACH(OPERATION);
#undef OPERATION
}
INLINE vec nearest(vec x) {
#define OPERATION(i) vrndnq_f32(x.val[i])
    return EACH(OPERATION);
#undef OPERATION
}
INLINE vec power_of_two(vec n) {
#define OPERATION(i) \
    vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.val[i]), vdupq_n_s32(127)), 23))
    return EACH(OPERATION);
#undef OPERATION
}
INLINE float square_root(float x) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }
INLINE float first_lane(vec x) { return vgetq_lane_f32(x.val[0], 0); }

/* Add lanes i and i + 8, then i + 4, i + 2, i + 1: the same order in every instruction set. */
INLINE float sum(vec x) {
    float32x4_t four =
        vaddq_f32(vaddq_f32(x.val[0], x.val[2]), vaddq_f32(x.val[1], x.val[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float maximum(vec x) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.val[0], x.val[1]), vmaxq_f32(x.val[2], x.val[3])));
}

INLINE nans no_nans(void) { return vdupq_n_u32(0); }
INLINE nans find_nans(nans found, vec x) {
    for (int i = 0; i < 4; i++)
        found = vorrq_u32(found, vmvnq_u32(vceqq_f32(x.val[i], x.val[i])));
    return found;
}
INLINE int any_nan(nans found) { return vmaxvq_u32(found) != 0; }

/* Store round(x) + zero, clamped to zero - 128 .. zero + 127. */
INLINE void store_codes(uint8_t *codes, ptrdiff_t count, vec x, int zero) {
    uint16x4_t words[4];
    for (int i = 0; i < 4; i++) {
        int32x4_t code = vqaddq_s32(vcvtnq_s32_f32(x.val[i]), vdupq_n_s32(zero));
        code = vmaxq_s32(code, vdupq_n_s32(zero - 128));
        code = vminq_s32(code, vdupq_n_s32(zero + 127));
        words[i] = vmovn_u32(vreinterpretq_u32_s32(code));
    }
    uint8x16_t bytes = vcombine_u8(vmovn_u16(vcombine_u16(words[0], words[1])),
                                   vmovn_u16(vcombine_u16(words[2], words[3])));
    if (count >= 16) {
        vst1q_u8(codes, bytes);
        return;
    }
    uint8_t all[16];
    vst1q_u8(all, bytes);
    for (ptrdiff_t i = 0; i < count; i++) codes[i] = all[i];
}

/* Heads of neighbouring tokens are too far apart for the hardware prefetcher. */
INLINE void prefetch(const float *from, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

/* Transpose [4, 4]. */
INLINE void transpose_four(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row) {
    float32x4x2_t upper = vtrnq_f32(vld1q_f32(from), vld1q_f32(from + from_row));
    float32x4x2_t lower = vtrnq_f32(vld1q_f32(from + 2 * from_row), vld1q_f32(from + 3 * from_row));
    for (int i = 0; i < 2; i++) {
        float32x4_t above = upper.val[i], below = lower.val[i];
        vst1q_f32(to + i * to_row, vcombine_f32(vget_low_f32(above), vget_low_f32(below)));
        vst1q_f32(to + (i + 2) * to_row, vcombine_f32(vget_high_f32(above), vget_high_f32(below)));
    }
}

/* Transpose [16, 16]. */
INLINE void transpose(const float *from, ptrdiff_t from_row, float *to, ptrdiff_t to_row) {
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 16; j += 4)
            transpose_four(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
}

/* Attention's tile: 6 queries by 16 keys, in 24 of 32 registers. */
enum { TILE_ROWS = 6, TILE_VECTORS = 1 };

/* Rounded activations are int8: NEON multiplies int8 by int8. */
enum { ZERO_BY_4_BITS = 0, ZERO_BY_8_BITS = 0, UNSIGNED_NIBBLES = 0, GROUP_ROWS = 4 };

/* sums += four products per lane, as sdot does, but with instructions that every CPU has. */
INLINE int32x4_t dot(int32x4_t sums, int8x16_t x, int8x16_t w) {
    int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(w)));
    int32x4_t high = vpaddlq_s16(vmull_high_s8(x, w));
    return vaddq_s32(sums, vpaddq_s32(low, high));
}

/* c += one group of inputs of `rows` tokens by 32 outputs: see product.h. */
INLINE void multiply_group(int bits, int rows, ptrdiff_t steps, const struct row_group *tokens,
                           const struct weight_group *weights, float *c) {
    (void)bits;
    for (int half = 0; half < 32; half += 16) {
        const int8_t *w = weights->weights + 4 * half;
        int32x4_t sums[GROUP_ROWS][4];
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < 4; j++) sums[i][j] = vdupq_n_s32(0);
        for (ptrdiff_t k = 0; k < steps; k++)
            for (int i = 0; i < rows; i++) {
                int32_t four;
                __builtin_memcpy(&four, tokens->codes + 4 * (GROUP_ROWS * k + i), sizeof four);
                int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
                for (int j = 0; j < 4; j++)
                    sums[i][j] = dot(sums[i][j], x, vld1q_s8(w + 128 * k + 16 * j));
            }
        for (int i = 0; i < rows; i++) {
            float32x4_t scale = vdupq_n_f32(tokens->scales[i]);
            for (int j = 0; j < 4; j++) {
                ptrdiff_t at = half + 4 * j;
                float32x4_t factor = vmulq_f32(scale, vld1q_f32(weights->scales + at));
                float *to = c + 32 * i + at;
                vst1q_f32(to, vfmaq_f32(vld1q_f32(to), vcvtq_f32_s32(sums[i][j]), factor));
            }
        }
    }
}
