/* What the operators compute; register.c hands it to onnxruntime. */

#pragma once
#include <stddef.h>
#include <stdint.h>

/* Tokens, [count, width] each. Outputs that nobody reads are NULL. */
struct rows {
    ptrdiff_t count, width;
    const float *value, *scales;   /* add_norm: NULL adds nothing; scales [count], NULL: 1 */
    const float *residual, *gains; /* add_norm: gains [width] */
    const float *up;               /* swiglu */
    float eps;
    float *total;                  /* add_norm: residual + value * scales */
    float *result, *row_scales;    /* row_scales [count]: of the codes */
    uint8_t *codes;
};

/* Rows of swiglu() and heads of attention lie on the stack. */
enum { MAX_WIDTH = 1 << 16, MAX_HEAD_DIM = 256 };

struct attention {
    ptrdiff_t batch, size, heads, kv_heads, head_dim;
    const float *q, *k, *v;         /* [batch, size, heads or kv_heads, head_dim] */
    const float *v_scales;          /* [batch, size], or one for all */
    ptrdiff_t v_scales_step;        /* 1, or 0 where it is one */
    const float *q_gains, *k_gains; /* [head_dim] */
    const float *cosines, *sines;   /* [past + size, head_dim / 2] */
    const int32_t *last;            /* [batch]: the position of a row's last real token */
    float eps, scale;
    ptrdiff_t past;                 /* tokens before every row */
    const float *past_k, *past_v;   /* [kv_heads, past, head_dim] */
    float *attended;                /* [batch, size, heads, head_dim] */
    ptrdiff_t kept;                 /* tokens of the first row whose states are given back */
    float *kept_k, *kept_v;         /* [kv_heads, kept, head_dim] */
    float *scratch;                 /* scratch_floats() */
    /* Derived by prepare(). */
    ptrdiff_t padded_dim;    /* head_dim in whole vectors */
    ptrdiff_t shared_panels; /* of the past, used by all rows */
    ptrdiff_t own_panels;    /* of each row */
};

/* Tokens by a matrix of weights in groups. */
struct product {
    ptrdiff_t count, depth, outputs; /* tokens, inputs, outputs */
    ptrdiff_t bits, group, groups;   /* 4 or 8; inputs of a group; groups of an output */
    const float *x;                  /* [count, depth] */
    const uint8_t *codes;            /* [outputs, groups, group * bits / 8] */
    const float *scales;             /* [outputs, groups] */
    const uint8_t *zero_points;      /* [outputs, ceil(groups * bits / 8)]; NULL: the middle */
    float *out;                      /* [count, outputs] */
    uint8_t *scratch;                /* tile_bytes() */
};

enum { MAX_GROUP = 256 };

/* The kernels of one instruction set. */
struct kernels {
    /* Rows [first, last): RMSNorm(total), and its codes. */
    void (*add_norm)(const struct rows *rows, ptrdiff_t first, ptrdiff_t last);
    /* Rows [first, last): silu(value * scales) * up, and its codes. */
    void (*swiglu)(const struct rows *rows, ptrdiff_t first, ptrdiff_t last);
    /* Rows [first, last): the codes of `value`. */
    void (*quantize)(const struct rows *rows, ptrdiff_t first, ptrdiff_t last);

    /* Fill the derived members; afterwards `scratch_floats` are needed. */
    void (*prepare)(struct attention *a);
    size_t (*scratch_floats)(const struct attention *a);
    /* First all of [0, panel_tasks), then all of [0, query_tasks), each set in any order. */
    size_t (*panel_tasks)(const struct attention *a);
    void (*fill_panel)(const struct attention *a, size_t task);
    size_t (*query_tasks)(const struct attention *a);
    void (*attend)(const struct attention *a, size_t task);
    /* Keys and values of the first row's `kept` tokens, head by head; after the panels. */
    void (*keep_states)(const struct attention *a, size_t head);

    size_t (*tile_bytes)(const struct product *p);
    /* First all of [0, tile_count), then all of [0, panel_count), each set in any order. */
    size_t (*tile_count)(const struct product *p);
    void (*round_tile)(const struct product *p, size_t task);
    size_t (*panel_count)(const struct product *p);
    void (*multiply_panel)(const struct product *p, size_t task);
};

/* Cosines and sines of `count` angles, up to 2^20 in magnitude. */
void turn(const float *angles, ptrdiff_t count, float *cosines, float *sines);

extern const struct kernels avx512_kernels, avx2_kernels, neon_kernels;

/* What a file of an instruction set defines. */
#define KERNELS                                                                                  \
    {                                                                                            \
        .add_norm = add_norm, .swiglu = swiglu, .quantize = quantize, .prepare = prepare,        \
        .scratch_floats = scratch_floats, .panel_tasks = panel_tasks, .fill_panel = fill_panel,  \
        .query_tasks = query_tasks, .attend = attend, .keep_states = keep_states,                \
        .tile_bytes = tile_bytes, .tile_count = tile_count, .round_tile = round_tile,            \
        .panel_count = panel_count, .multiply_panel = multiply_panel,                            \
    }
