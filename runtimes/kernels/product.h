/* Products with weights of 4 and 8 bits in groups, whose activations are rounded to 8 bits.

   A token's inputs are rounded group by group, round(127 x / max|x|), as onnxruntime's MatMulNBits does at
   accuracy level 4. Integer products of a group are exact; groups are added in fp32 in their order, with one
   rounding each. So every instruction set gives the same bits, for a token alone and in any batch.

   Weights stay as the file has them. A task unpacks those of 32 outputs and up to 512 inputs into a panel
   that the cache holds, signed and without their zero points, and multiplies all tokens by it. The panel is
   [inputs / 4, 32 outputs, 4 inputs]: four products a lane, as instructions add them. 4-bit weights come
   eight inputs in four bytes, the first four of these in lower halves being inputs 0, 2, 4, 6: activations
   lie in that order too. */

#pragma once
#include <string.h>

#include "kernels.h"
#include "vectors.h"

enum { OUTPUTS = 32, INPUTS = 512, SMALLEST_GROUP = 16 };

/* Rounded activations of a row, whole groups. */
static ptrdiff_t padded_depth(const struct product *p) { return p->groups * p->group; }

static size_t rounded_bytes(const struct product *p) {
    return (size_t)(p->count * (padded_depth(p) + p->groups * (ptrdiff_t)sizeof(float)));
}

static size_t panel_count(const struct product *p) {
    return (size_t)ceiling(p->outputs, OUTPUTS);
}

INLINE int zero_of(const struct product *p) {
    return p->bits == 4 ? ZERO_BY_4_BITS : ZERO_BY_8_BITS;
}

static inline float *row_scales_of(const struct product *p) {
    return (float *)(p->scratch + p->count * padded_depth(p));
}

/* Inputs 0 to 7 become 0, 2, 4, 6, 1, 3, 5, 7. */
static inline uint64_t evens_first(uint64_t codes) {
    uint64_t even = codes & 0x00ff00ff00ff00ffu, odd = codes >> 8 & 0x00ff00ff00ff00ffu;
    even = (even | even >> 8) & 0x0000ffff0000ffffu;
    odd = (odd | odd >> 8) & 0x0000ffff0000ffffu;
    return ((even | even >> 16) & 0xffffffffu) | (odd | odd >> 16) << 32;
}

/* Rows [from, to) of activations: their codes and scales. */
TARGET static void round_groups(const struct product *p, ptrdiff_t from, ptrdiff_t to) {
    ptrdiff_t padded = padded_depth(p), zero = zero_of(p);
    for (ptrdiff_t row = from; row < to; row++) {
        uint8_t *codes = p->scratch + row * padded;
        float *scales = row_scales_of(p) + row * p->groups;
        for (ptrdiff_t group = 0; group < p->groups; group++, codes += p->group) {
            const float *x = p->x + row * p->depth + group * p->group;
            ptrdiff_t count = minimum(p->group, p->depth - group * p->group);
            struct largest largest = none();
            for (ptrdiff_t i = 0; i < count; i += LANES) enlarge(&largest, load_part(x + i, count - i));
            float most = magnitude(largest);
            vec factor = set(127.0f / most);
            for (ptrdiff_t i = 0; i < p->group; i += LANES) {
                vec value = times(load_part(x + i, count - i), factor);
                store_codes(codes + i, LANES, value, (int)zero);
            }
            scales[group] = most * (1 / 127.0f);
            if (p->bits == 4)
                for (ptrdiff_t i = 0; i < p->group; i += 8) {
                    uint64_t eight;
                    memcpy(&eight, codes + i, sizeof eight);
                    eight = evens_first(eight);
                    memcpy(codes + i, &eight, sizeof eight);
                }
        }
    }
}

/* Weights of OUTPUTS outputs and one group after another. */
struct panel {
    int8_t weights[INPUTS * OUTPUTS];
    int32_t start[INPUTS / SMALLEST_GROUP * OUTPUTS];
    float scales[INPUTS / SMALLEST_GROUP * OUTPUTS];
};

/* A weight's zero point, [outputs, groups] packed like the weights. */
static inline int zero_point(const struct product *p, ptrdiff_t output, ptrdiff_t group) {
    if (!p->zero_points) return 1 << (p->bits - 1);
    const uint8_t *row = p->zero_points + output * ceiling(p->groups * p->bits, 8);
    return p->bits == 8 ? row[group] : row[group / 2] >> (group % 2 ? 4 : 0) & 15;
}

/* 16 four-byte words of each of 16 outputs, of which `count` and `words` are there. */
INLINE void turn_words(const uint8_t *from, ptrdiff_t row, ptrdiff_t count, ptrdiff_t words,
                       uint8_t *to) {
    float part[16 * 16];
    if (count >= 16 && words >= 16 && row % 4 == 0) {
        transpose((const float *)from, row / 4, (float *)to, 16);
        return;
    }
    memset(part, 0, sizeof part);
    for (ptrdiff_t i = 0; i < minimum(count, 16); i++)
        memcpy(part + 16 * i, from + i * row, (size_t)(4 * minimum(words, 16)));
    transpose(part, 16, (float *)to, 16);
}

TARGET static void unpack(const struct product *p, ptrdiff_t output, ptrdiff_t first_group,
                          ptrdiff_t groups, struct panel *panel) {
    ptrdiff_t row = p->groups * p->group * p->bits / 8, words = p->group * p->bits / 32;
    ptrdiff_t steps = p->group / 4;
    static const float ones[1] = {1.0f};
    uint8_t one[4 * INPUTS];
    float unit[OUTPUTS], sums[OUTPUTS];
    int32_t nothing[OUTPUTS] = {0};
    memset(one, 1, sizeof one);
    for (ptrdiff_t i = 0; i < OUTPUTS; i++) unit[i] = 1;
    for (ptrdiff_t group = 0; group < groups; group++) {
        int8_t *weights = panel->weights + group * steps * OUTPUTS * 4;
        for (ptrdiff_t half = 0; half < OUTPUTS; half += 16) {
            ptrdiff_t count = p->outputs - output - half;
            const uint8_t *codes = p->codes + (output + half) * row +
                                   (first_group + group) * p->group * p->bits / 8;
            uint8_t zeros[64];
            for (ptrdiff_t i = 0; i < 16; i++) {
                int zero = i < count ? zero_point(p, output + half + i, first_group + group) : 0;
                memset(zeros + 4 * i, zero, 4);
                panel->scales[group * OUTPUTS + half + i] =
                    i < count
                        ? p->scales[(output + half + i) * p->groups + first_group + group]
                        : 0;
            }
            for (ptrdiff_t word = 0; word < words; word += 16) {
                uint8_t turned[16 * 64];
                turn_words(codes + 4 * word, row, count, words - word, turned);
                for (ptrdiff_t i = 0; i < minimum(16, words - word); i++) {
                    const uint8_t *bytes = turned + 64 * i;
                    int8_t *to = weights + (p->bits == 4 ? 2 : 1) * (word + i) * 128 + 4 * half;
                    if (p->bits == 4)
                        for (ptrdiff_t j = 0; j < 64; j++) {
                            to[j] = (int8_t)((bytes[j] & 15) - zeros[j]);
                            to[j + 128] = (int8_t)((bytes[j] >> 4) - zeros[j]);
                        }
                    else
                        for (ptrdiff_t j = 0; j < 64; j++) to[j] = (int8_t)(bytes[j] - zeros[j]);
                }
            }
        }
        /* What the zero point of activations adds to each sum is taken off where the sum begins. */
        memset(sums, 0, sizeof sums);
        multiply_group(1, (int)p->bits, steps, one, 0, weights, nothing, ones, 0, unit, sums);
        for (ptrdiff_t i = 0; i < OUTPUTS; i++)
            panel->start[group * OUTPUTS + i] = -zero_of(p) * (int32_t)sums[i];
    }
}

/* GROUP_ROWS tokens or fewer by a panel. */
INLINE void multiply_rows(int rows, int bits, const struct product *p, const struct panel *panel,
                          ptrdiff_t token, ptrdiff_t first_group, ptrdiff_t groups, float *c) {
    ptrdiff_t padded = padded_depth(p), steps = p->group / 4;
    const uint8_t *a = p->scratch + token * padded + first_group * p->group;
    const float *row_scales = row_scales_of(p) + token * p->groups + first_group;
    for (ptrdiff_t group = 0; group < groups; group++)
        multiply_group(rows, bits, steps, a + group * p->group, padded,
                       panel->weights + group * steps * OUTPUTS * 4,
                       panel->start + group * OUTPUTS, row_scales + group, p->groups,
                       panel->scales + group * OUTPUTS, c);
}

/* All tokens by the weights of OUTPUTS outputs. */
TARGET static void multiply_panel(const struct product *p, size_t task) {
    struct panel panel;
    ptrdiff_t output = (ptrdiff_t)task * OUTPUTS, at_once = INPUTS / p->group;
    ptrdiff_t width = minimum(OUTPUTS, p->outputs - output);
    for (ptrdiff_t group = 0; group < p->groups; group += at_once) {
        ptrdiff_t groups = minimum(at_once, p->groups - group);
        unpack(p, output, group, groups, &panel);
        for (ptrdiff_t token = 0; token < p->count; token += GROUP_ROWS) {
            float c[GROUP_ROWS * OUTPUTS];
            ptrdiff_t rows = minimum(GROUP_ROWS, p->count - token);
            for (ptrdiff_t i = 0; i < rows; i++) {
                const float *out = p->out + (token + i) * p->outputs + output;
                for (ptrdiff_t j = 0; j < OUTPUTS; j += LANES)
                    store(c + i * OUTPUTS + j, group ? load_part(out + j, width - j) : set(0));
            }
#define WITH(r, b)                                                              \
    case 16 * (r) + (b):                                                        \
        if (r <= GROUP_ROWS) multiply_rows(r, b, p, &panel, token, group, groups, c); \
        break;
#define ROWS(r) WITH(r, 4) WITH(r, 8)
            switch (16 * rows + p->bits) {
                ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
                ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
            }
#undef ROWS
#undef WITH
            for (ptrdiff_t i = 0; i < rows; i++) {
                float *out = p->out + (token + i) * p->outputs + output;
                for (ptrdiff_t j = 0; j < width; j += LANES)
                    store_part(out + j, width - j, load(c + i * OUTPUTS + j));
            }
        }
    }
}
