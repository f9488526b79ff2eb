/* The kernels behind the operators; register.c registers them with onnxruntime. */

#pragma once
#include <stddef.h>
#include <stdint.h>

/* Arguments of the row kernels: tokens, [count, width] unless noted. Unused outputs are NULL. */
struct rows {
    ptrdiff_t count, width;
    const float *value, *scales;   /* add_norm: NULL adds nothing; scales [count], NULL is 1 */
    const float *residual, *gains; /* add_norm: gains [width] */
    const float *up;               /* swiglu */
    float eps;
    float *total;                  /* add_norm: residual + value * scales */
    float *result, *row_scales;    /* row_scales [count]: the codes' scales */
    uint8_t *codes;
};

/* Limits: rows of swiglu() and heads of attention are on the stack. */
enum { MAX_WIDTH = 1 << 16, MAX_HEAD_DIM = 256 };

struct attention {
    ptrdiff_t batch, size, heads, kv_heads;
    ptrdiff_t head_dim;             /* a multiple of 16 */
    const float *q, *k, *v;         /* [batch, size, heads or kv_heads, head_dim] */
    const float *v_scales;          /* [batch, size], or one for all tokens */
    ptrdiff_t v_scales_step;        /* 1, or 0 for one scale for all */
    const float *q_gains, *k_gains; /* [head_dim] */
    const float *cosines, *sines;   /* [past + size, head_dim / 2] */
    const int32_t *last;            /* [batch]: the position of a row's last real token */
    float eps, scale;
    ptrdiff_t past;                 /* tokens of the prefix before every row */
    const float *past_k, *past_v;   /* [kv_heads, past, head_dim] */
    float *attended;                /* [batch, size, heads, head_dim] */
    ptrdiff_t kept;                 /* tokens of the first row; their keys and values are outputs */
    float *kept_k, *kept_v;         /* [kv_heads, kept, head_dim] */
    float *scratch;                 /* scratch_floats() */
    /* Derived by prepare(). */
    ptrdiff_t shared_panels; /* panels of the prefix, used by all rows */
    ptrdiff_t own_panels;    /* panels of each row */
};

/* Tokens times a matrix with grouped weights. */
struct product {
    ptrdiff_t count, depth, outputs; /* tokens, inputs, outputs */
    ptrdiff_t bits, group, groups;   /* 4 or 8; inputs per group; groups per output */
    const float *x;                  /* [count, depth] */
    const uint8_t *codes;            /* [outputs, groups, group * bits / 8] */
    const float *scales;             /* [outputs, groups] */
    const uint8_t *zero_points;      /* of 4 bits: [outputs, ceil(groups / 2)]; NULL is the middle */
    float *out;                      /* [count, outputs] */
    uint8_t *scratch;                /* tile_bytes() */
};

/* Groups of weights have 32, 64 or 128 inputs: GROUP_SIZES in quantize/formats.py. */
enum { MAX_GROUP = 128 };

/* A group of rounded inputs, of GROUP_ROWS tokens. */
struct row_group {
    const uint8_t *codes; /* [inputs / 4, GROUP_ROWS, 4] */
    const float *scales;  /* [GROUP_ROWS] */
    const float *sums;    /* [GROUP_ROWS]: of the codes; for UNSIGNED_NIBBLES */
};

/* A group of unpacked weights, of 32 outputs. */
struct weight_group {
    const int8_t *weights; /* [inputs / 4, 32, 4] */
    const int32_t *start;  /* [32]: of the sums; for activations with a zero point */
    const float *scales;   /* [32] */
    const float *zeros;    /* [32]: zero points; for UNSIGNED_NIBBLES */
};

/* The kernels of one instruction set. */
struct kernels {
    /* Rows [first, last): RMSNorm(total), and its codes. */
    void (*add_norm)(const struct rows *rows, ptrdiff_t first, ptrdiff_t last);
    /* Rows [first, last): silu(value * scales) * up, and its codes. */
    void (*swiglu)(const struct rows *rows, ptrdiff_t first, ptrdiff_t last);
    /* Rows [first, last): the codes of `value`. */
    void (*quantize)(const struct rows *rows, ptrdiff_t first, ptrdiff_t last);

    /* Fill the derived members. Then allocate scratch_floats() floats of scratch. */
    void (*prepare)(struct attention *a);
    size_t (*scratch_floats)(const struct attention *a);
    /* Run all of [0, panel_tasks), then all of [0, query_tasks), in any order within each. */
    size_t (*panel_tasks)(const struct attention *a);
    void (*fill_panel)(const struct attention *a, size_t task);
    size_t (*query_tasks)(const struct attention *a);
    void (*attend)(const struct attention *a, size_t task);
    /* Write keys and values of the first row's `kept` tokens, one head per call, after the panels. */
    void (*keep_states)(const struct attention *a, size_t head);

    size_t (*tile_bytes)(const struct product *p);
    /* Run all of [0, tile_count), then all of [0, panel_count), in any order within each. */
    size_t (*tile_count)(const struct product *p);
    void (*round_tile)(const struct product *p, size_t task);
    size_t (*panel_count)(const struct product *p);
    void (*multiply_panel)(const struct product *p, size_t task);
};

/* Cosines and sines of `count` angles, up to 2^20 in magnitude. */
void turn(const float *angles, ptrdiff_t count, float *cosines, float *sines);

extern const struct kernels avx512_kernels, avx2_kernels, neon_kernels;

/* The kernels that an instruction set's file defines. */
#define KERNELS                                                                                  \
    {                                                                                            \
        .add_norm = add_norm, .swiglu = swiglu, .quantize = quantize, .prepare = prepare,        \
        .scratch_floats = scratch_floats, .panel_tasks = panel_tasks, .fill_panel = fill_panel,  \
        .query_tasks = query_tasks, .attend = attend, .keep_states = keep_states,                \
        .tile_bytes = tile_bytes, .tile_count = tile_count, .round_tile = round_tile,            \
        .panel_count = panel_count, .multiply_panel = multiply_panel,                            \
    }
