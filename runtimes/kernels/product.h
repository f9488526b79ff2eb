/* Products with grouped weights of 4 and 8 bits; activations are rounded to 8 bits.

   A token's inputs are rounded group by group, round(127 x / max|x|), as in onnxruntime's MatMulNBits at
   accuracy level 4. Integer products within a group are exact. Groups are added in fp32 in their order, with
   one rounding each. So every instruction set gives the same bits, for a token alone and in any batch.

   A tile is the rounded activations of GROUP_ROWS tokens: [inputs / 4, tokens, 4 inputs]. Weights in memory
   stay as in the file. A task unpacks the weights of 32 outputs and up to 512 inputs into a panel, as signed
   values with their zero points subtracted; where UNSIGNED_NIBBLES is set, 4-bit weights stay as they are, and
   zero point x sum of the activations is subtracted from each sum. The panel fits into the cache, and all
   tiles are multiplied by it. Its layout is [inputs / 4, 32 outputs, 4 inputs]: one instruction adds four
   products per lane. Four bytes of 4-bit weights hold eight inputs, with inputs 0, 2, 4, 6 in their lower
   halves: activations are stored in that order too. */

#pragma once
#include <string.h>

#include "kernels.h"
#include "vectors.h"

enum { OUTPUTS = 32, INPUTS = 512, SMALLEST_GROUP = 32 };

static size_t tile_count(const struct product *p) { return (size_t)ceiling(p->count, GROUP_ROWS); }

static size_t panel_count(const struct product *p) { return (size_t)ceiling(p->outputs, OUTPUTS); }

/* The codes of all tiles, then their scales, then the sums of their codes, [groups, tokens] each. */
static size_t tile_bytes(const struct product *p) {
    return tile_count(p) * (size_t)(p->groups * GROUP_ROWS) *
           ((size_t)p->group + 2 * sizeof(float));
}

static inline uint8_t *codes_of(const struct product *p, ptrdiff_t tile, ptrdiff_t group) {
    return p->scratch + (tile * p->groups + group) * p->group * GROUP_ROWS;
}

static inline float *scales_of(const struct product *p, ptrdiff_t tile, ptrdiff_t group) {
    float *scales = (float *)codes_of(p, (ptrdiff_t)tile_count(p), 0);
    return scales + (tile * p->groups + group) * GROUP_ROWS;
}

static inline float *sums_of(const struct product *p, ptrdiff_t tile, ptrdiff_t group) {
    return scales_of(p, (ptrdiff_t)tile_count(p) + tile, group);
}

static inline int keeps_codes(const struct product *p) { return UNSIGNED_NIBBLES && p->bits == 4; }

INLINE int zero_of(const struct product *p) {
    return p->bits == 4 ? ZERO_BY_4_BITS : ZERO_BY_8_BITS;
}

/* Reorder eight inputs to 0, 2, 4, 6, 1, 3, 5, 7. */
static inline uint64_t evens_first(uint64_t codes) {
    uint64_t even = codes & 0x00ff00ff00ff00ffu, odd = codes >> 8 & 0x00ff00ff00ff00ffu;
    even = (even | even >> 8) & 0x0000ffff0000ffffu;
    odd = (odd | odd >> 8) & 0x0000ffff0000ffffu;
    return ((even | even >> 16) & 0xffffffffu) | (odd | odd >> 16) << 32;
}

/* Round a group of a token: writes its codes in the weights' order, returns its scale. */
INLINE float round_group(const struct product *p, const float *x, ptrdiff_t count, uint8_t *codes) {
    struct largest largest = none();
    for (ptrdiff_t i = 0; i < count; i += LANES) enlarge(&largest, load_part(x + i, count - i));
    float most = magnitude(largest);
    vec factor = set(127.0f / most);
    for (ptrdiff_t i = 0; i < p->group; i += LANES)
        store_codes(codes + i, LANES, times(load_part(x + i, count - i), factor), zero_of(p));
    if (p->bits == 4)
        for (ptrdiff_t i = 0; i < p->group; i += 8) {
            uint64_t eight;
            memcpy(&eight, codes + i, sizeof eight);
            eight = evens_first(eight);
            memcpy(codes + i, &eight, sizeof eight);
        }
    return most * (1 / 127.0f);
}

INLINE float sum_codes(const uint8_t *codes, ptrdiff_t count) {
    int32_t sum = 0;
    for (ptrdiff_t i = 0; i < count; i++) sum += (int8_t)codes[i];
    return (float)sum;
}

/* Round the activations of a tile; tokens beyond the last get a scale of zero. */
PRODUCT static void round_tile(const struct product *p, size_t tile) {
    for (ptrdiff_t group = 0; group < p->groups; group++) {
        uint8_t *to = codes_of(p, (ptrdiff_t)tile, group), codes[MAX_GROUP] = {0};
        float *scales = scales_of(p, (ptrdiff_t)tile, group);
        float *sums = sums_of(p, (ptrdiff_t)tile, group);
        for (ptrdiff_t i = 0; i < GROUP_ROWS; i++) {
            ptrdiff_t token = (ptrdiff_t)tile * GROUP_ROWS + i, input = group * p->group;
            scales[i] = 0;
            if (token < p->count)
                scales[i] = round_group(p, p->x + token * p->depth + input,
                                        minimum(p->group, p->depth - input), codes);
            sums[i] = keeps_codes(p) ? sum_codes(codes, p->group) : 0;
            for (ptrdiff_t k = 0; k < p->group; k += 4)
                memcpy(to + k * GROUP_ROWS + 4 * i, codes + k, 4);
        }
    }
}

/* Unpacked weights of OUTPUTS outputs, group after group. */
struct panel {
    int8_t weights[INPUTS * OUTPUTS];
    int32_t start[INPUTS / SMALLEST_GROUP * OUTPUTS];
    float scales[INPUTS / SMALLEST_GROUP * OUTPUTS];
    float zeros[INPUTS / SMALLEST_GROUP * OUTPUTS];
};

static inline struct weight_group weights_of(const struct product *p, const struct panel *panel,
                                             ptrdiff_t group) {
    ptrdiff_t first = group * OUTPUTS;
    return (struct weight_group){panel->weights + first * p->group, panel->start + first,
                                 panel->scales + first, panel->zeros + first};
}

/* A group's zero point. */
static inline int zero_point(const struct product *p, ptrdiff_t output, ptrdiff_t group) {
    if (!p->zero_points) return 1 << (p->bits - 1);
    return p->zero_points[output * ceiling(p->groups, 2) + group / 2] >> (group % 2 ? 4 : 0) & 15;
}

/* Transpose 16 outputs by 16 four-byte words, of which `count` outputs and `words` words exist. */
INLINE void turn_words(const uint8_t *from, ptrdiff_t row, ptrdiff_t count, ptrdiff_t words,
                       uint8_t *to) {
    float part[16 * 16];
    if (count >= 16 && words >= 16) {
        transpose((const float *)from, row / 4, (float *)to, 16);
        return;
    }
    memset(part, 0, sizeof part);
    for (ptrdiff_t i = 0; i < minimum(count, 16); i++)
        memcpy(part + 16 * i, from + i * row, (size_t)(4 * minimum(words, 16)));
    transpose(part, 16, (float *)to, 16);
}

/* Unpack the codes of 16 outputs, of which `count` exist; `zeros` is [groups, 16 outputs, 4]. */
INLINE void unpack_codes(const struct product *p, const uint8_t *codes, ptrdiff_t count,
                         ptrdiff_t groups, const uint8_t *zeros, int8_t *weights) {
    ptrdiff_t row = p->groups * p->group * p->bits / 8, group_words = p->group * p->bits / 32;
    ptrdiff_t words = groups * group_words;
    for (ptrdiff_t word = 0; word < words; word += 16) {
        uint8_t turned[16 * 64];
        turn_words(codes + 4 * word, row, count, words - word, turned);
        for (ptrdiff_t i = 0; i < minimum(16, words - word); i++) {
            const uint8_t *bytes = turned + 64 * i, *zero = zeros + (word + i) / group_words * 64;
            int8_t *to = weights + (p->bits == 4 ? 2 : 1) * (word + i) * 128;
            if (p->bits == 4)
                for (ptrdiff_t j = 0; j < 64; j++) {
                    to[j] = (int8_t)((bytes[j] & 15) - zero[j]);
                    to[j + 128] = (int8_t)((bytes[j] >> 4) - zero[j]);
                }
            else
                for (ptrdiff_t j = 0; j < 64; j++) to[j] = (int8_t)(bytes[j] - zero[j]);
        }
    }
}

/* The activations' zero point adds a constant to each sum: start the sums with its negative. Without a
   zero point multiply_group() starts them with zero, and does not read `start`. */
PRODUCT static void start_sums(const struct product *p, ptrdiff_t groups, struct panel *panel) {
    if (!zero_of(p)) return;
    uint8_t one[MAX_GROUP * GROUP_ROWS];
    float unit[OUTPUTS], sums[OUTPUTS];
    memset(one, 1, sizeof one);
    for (ptrdiff_t i = 0; i < OUTPUTS; i++) unit[i] = 1;
    memset(panel->start, 0, (size_t)(groups * OUTPUTS) * sizeof *panel->start);
    for (ptrdiff_t group = 0; group < groups; group++) {
        struct weight_group weights = weights_of(p, panel, group);
        weights.scales = unit;
        memset(sums, 0, sizeof sums);
        multiply_group((int)p->bits, 1, p->group / 4, &(struct row_group){one, unit, unit},
                       &weights, sums);
        for (ptrdiff_t i = 0; i < OUTPUTS; i++)
            panel->start[group * OUTPUTS + i] = -zero_of(p) * (int32_t)sums[i];
    }
}

PRODUCT static void unpack(const struct product *p, ptrdiff_t output, ptrdiff_t first_group,
                          ptrdiff_t groups, struct panel *panel) {
    ptrdiff_t row = p->groups * p->group * p->bits / 8;
    for (ptrdiff_t half = 0; half < OUTPUTS; half += 16) {
        uint8_t zeros[INPUTS / SMALLEST_GROUP * 64];
        ptrdiff_t first = output + half, count = minimum(16, p->outputs - first);
        for (ptrdiff_t group = 0; group < groups; group++)
            for (ptrdiff_t i = 0; i < 16; i++) {
                int zero = i < count ? zero_point(p, first + i, first_group + group) : 0;
                ptrdiff_t at = group * OUTPUTS + half + i;
                panel->scales[at] =
                    i < count ? p->scales[(first + i) * p->groups + first_group + group] : 0;
                panel->zeros[at] = (float)zero;
                memset(zeros + group * 64 + 4 * i, keeps_codes(p) ? 0 : zero, 4);
            }
        unpack_codes(p, p->codes + first * row + first_group * p->group * p->bits / 8, count,
                     groups, zeros, panel->weights + 4 * half);
    }
    start_sums(p, groups, panel);
}

/* Multiply a tile by a panel. */
INLINE_PRODUCT void multiply_tile_by(const struct product *p, int bits, int rows,
                                     const struct panel *panel, ptrdiff_t tile,
                                     ptrdiff_t first_group, ptrdiff_t groups, float *c) {
    for (ptrdiff_t group = 0; group < groups; group++) {
        ptrdiff_t at = first_group + group;
        struct row_group tokens = {codes_of(p, tile, at), scales_of(p, tile, at),
                                   sums_of(p, tile, at)};
        struct weight_group weights = weights_of(p, panel, group);
        multiply_group(bits, rows, p->group / 4, &tokens, &weights, c);
    }
}

/* Multiply all tokens by the weights of OUTPUTS outputs. */
PRODUCT static void multiply_panel(const struct product *p, size_t task) {
    struct panel panel;
    ptrdiff_t output = (ptrdiff_t)task * OUTPUTS, at_once = INPUTS / p->group;
    ptrdiff_t width = minimum(OUTPUTS, p->outputs - output);
    for (ptrdiff_t group = 0; group < p->groups; group += at_once) {
        ptrdiff_t groups = minimum(at_once, p->groups - group);
        unpack(p, output, group, groups, &panel);
        for (ptrdiff_t tile = 0; tile < (ptrdiff_t)tile_count(p); tile++) {
            float c[GROUP_ROWS * OUTPUTS] = {0};
            float *out = p->out + tile * GROUP_ROWS * p->outputs + output;
            ptrdiff_t rows = minimum(GROUP_ROWS, p->count - tile * GROUP_ROWS);
            if (group)
                for (ptrdiff_t i = 0; i < rows; i++)
                    for (ptrdiff_t j = 0; j < width; j += LANES)
                        store(c + i * OUTPUTS + j, load_part(out + i * p->outputs + j, width - j));
            if (p->bits == 4 && rows == 1) multiply_tile_by(p, 4, 1, &panel, tile, group, groups, c);
            else if (p->bits == 4) multiply_tile_by(p, 4, GROUP_ROWS, &panel, tile, group, groups, c);
            else if (rows == 1) multiply_tile_by(p, 8, 1, &panel, tile, group, groups, c);
            else multiply_tile_by(p, 8, GROUP_ROWS, &panel, tile, group, groups, c);
            for (ptrdiff_t i = 0; i < rows; i++)
                for (ptrdiff_t j = 0; j < width; j += LANES)
                    store_part(out + i * p->outputs + j, width - j, load(c + i * OUTPUTS + j));
        }
    }
}
