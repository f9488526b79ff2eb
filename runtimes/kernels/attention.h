/* Causal grouped-query attention, including the norms and the rotary embedding of queries and keys.

   Keys are stored in panels of 64, transposed: [head_dim, 64]. So a tile of six queries by as many keys as the
   registers hold is a sum of outer products. Values are stored as [64, head_dim], and the same tile computes
   their weighted sum. Scores are computed for 48 queries by 256 keys at a time, which stay in the cache; the
   softmax is updated online from block to block (arXiv:1805.02867).

   Blocks begin at fixed positions, and each query has its own sums, taken input by input. So its result has
   the same bits in any batch, after any prefix, and with any instruction set. */

#pragma once
#include "kernels.h"
#include "vectors.h"

enum { PANEL = 64, QUERIES = 48, KEYS = 256, AHEAD = 4 };

/* C = A B, or C += A B if `more`: A [rows, depth], B [depth, 16 * vectors], C [rows, 16 * vectors]. */
INLINE void multiply_tile(int rows, int vectors, int more, ptrdiff_t depth, const float *a,
                          ptrdiff_t a_row, const float *b, ptrdiff_t b_row, float *c,
                          ptrdiff_t c_row) {
    vec sums[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sums[i][j] = more ? load(c + i * c_row + LANES * j) : set(0);
    for (ptrdiff_t k = 0; k < depth; k++) {
        vec right[TILE_VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) right[j] = load(b + k * b_row + LANES * j);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vec left = set(a[i * a_row + k]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) sums[i][j] = fma_add(left, right[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) store(c + i * c_row + LANES * j, sums[i][j]);
}

/* multiply_tile() with constant rows and vectors, so that its tile stays in registers. */
INLINE void multiply_some(int rows, int vectors, int more, ptrdiff_t depth, const float *a,
                          ptrdiff_t a_row, const float *b, ptrdiff_t b_row, float *c,
                          ptrdiff_t c_row) {
#define WITH(r, v)                                                                        \
    case 4 * (r) + (v):                                                                   \
        if (v <= TILE_VECTORS) multiply_tile(r, v, more, depth, a, a_row, b, b_row, c, c_row); \
        break;
#define ROWS(r) WITH(r, 1) WITH(r, 2) WITH(r, 3) WITH(r, 4)
    switch (4 * rows + vectors) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
#undef ROWS
#undef WITH
}

/* As multiply_tile(), for up to 4 vectors. */
TARGET static void multiply(int rows, int vectors, int more, ptrdiff_t depth, const float *a,
                            ptrdiff_t a_row, const float *b, ptrdiff_t b_row, float *c,
                            ptrdiff_t c_row) {
    for (int j = 0; j < vectors; j += TILE_VECTORS) {
        int count = vectors - j < TILE_VECTORS ? vectors - j : TILE_VECTORS;
        const float *right = b + LANES * j;
        float *to = c + LANES * j;
        if (more) multiply_some(rows, count, 1, depth, a, a_row, right, b_row, to, c_row);
        else multiply_some(rows, count, 0, depth, a, a_row, right, b_row, to, c_row);
    }
}

/* RMSNorm of a head, then its rotary embedding (arXiv:2104.09864, pairs half a head apart), times a factor.
   `whole`: a half-head is a multiple of LANES, so no partial vector is loaded. */
INLINE void norm_rotate_head(const struct attention *a, const float *x, const float *gains,
                             ptrdiff_t position, float factor, float *out, int whole) {
    ptrdiff_t half = a->head_dim / 2;
    const float *cosines = a->cosines + position * half, *sines = a->sines + position * half;
    vec squares = set(0);
    for (ptrdiff_t i = 0; i < 2 * half; i += LANES) {
        vec value = load_part(x + i, whole ? LANES : 2 * half - i);
        squares = fma_add(value, value, squares);
    }
    vec scale = set(factor * norm_factor(squares, 2 * half, a->eps));
    for (ptrdiff_t i = 0; i < half; i += LANES) {
        ptrdiff_t left = whole ? LANES : half - i;
        vec front = times(load_part(x + i, left), scale);
        vec back = times(load_part(x + half + i, left), scale);
        front = times(front, load_part(gains + i, left));
        back = times(back, load_part(gains + half + i, left));
        vec c = load_part(cosines + i, left), s = load_part(sines + i, left);
        store_part(out + i, left, fma_subtract(front, c, times(back, s)));
        store_part(out + half + i, left, fma_add(back, c, times(front, s)));
    }
}

/* The same, for any head. */
TARGET static void norm_rotate(const struct attention *a, const float *x, const float *gains,
                               ptrdiff_t position, float factor, float *out) {
    if (a->head_dim % (2 * LANES)) norm_rotate_head(a, x, gains, position, factor, out, 0);
    else norm_rotate_head(a, x, gains, position, factor, out, 1);
}

/* Copy `count` floats, a multiple of LANES, times a factor. */
INLINE void copy_scaled(const float *from, float factor, float *to, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES) store(to + i, times(load(from + i), set(factor)));
}

static void prepare(struct attention *a) {
    a->shared_panels = a->past / PANEL;
    a->own_panels = ceiling(a->past + a->size, PANEL) - a->shared_panels;
}

static size_t panel_tasks(const struct attention *a) {
    return (size_t)(a->kv_heads * (a->shared_panels + a->batch * a->own_panels));
}

static size_t scratch_floats(const struct attention *a) {
    return panel_tasks(a) * 2 * (size_t)(PANEL * a->head_dim);
}

/* The keys of panel number `panel`, which begins at position PANEL * `panel`. The next panels follow it. */
static inline float *find_keys(const struct attention *a, ptrdiff_t row, ptrdiff_t head,
                               ptrdiff_t panel) {
    ptrdiff_t shared = a->shared_panels, before;
    if (panel < shared) before = head * shared + panel;
    else
        before = a->kv_heads * shared + (row * a->kv_heads + head) * a->own_panels + panel - shared;
    return a->scratch + before * PANEL * a->head_dim;
}

/* The same for values, which are stored after all keys. */
static inline float *find_values(const struct attention *a, ptrdiff_t row, ptrdiff_t head,
                                 ptrdiff_t panel) {
    return find_keys(a, row, head, panel) + scratch_floats(a) / 2;
}

TARGET static void fill_panel(const struct attention *a, size_t task) {
    ptrdiff_t shared = a->kv_heads * a->shared_panels, row = 0, head, panel;
    int is_shared = (ptrdiff_t)task < shared;
    if (is_shared) {
        head = (ptrdiff_t)task / a->shared_panels;
        panel = (ptrdiff_t)task % a->shared_panels;
    } else {
        ptrdiff_t own = (ptrdiff_t)task - shared;
        row = own / a->own_panels / a->kv_heads;
        head = own / a->own_panels % a->kv_heads;
        panel = a->shared_panels + own % a->own_panels;
    }
    ptrdiff_t first = panel * PANEL, dim = a->head_dim;
    ptrdiff_t count = is_shared ? PANEL : minimum(PANEL, a->last[row] + 1 - first);
    float *keys = find_keys(a, row, head, panel), *values = find_values(a, row, head, panel);
    float rotated[LANES * MAX_HEAD_DIM], scaled[LANES * MAX_HEAD_DIM];
    for (ptrdiff_t group = 0; group < count; group += LANES) {
        for (ptrdiff_t i = 0; i < LANES; i++) {
            ptrdiff_t position = first + group + i, token = position - a->past;
            float *key = rotated + i * dim, *value = scaled + i * dim;
            if (group + i >= count) { /* after the last token */
                clear(key, dim);
                clear(value, dim);
            } else if (token < 0) {
                ptrdiff_t place = (head * a->past + position) * dim;
                copy_scaled(a->past_k + place, 1, key, dim);
                copy_scaled(a->past_v + place, 1, value, dim);
            } else {
                ptrdiff_t index = row * a->size + token;
                ptrdiff_t place = (index * a->kv_heads + head) * dim;
                if (group + i + AHEAD < count) {
                    prefetch(a->k + place + AHEAD * a->kv_heads * dim, dim);
                    prefetch(a->v + place + AHEAD * a->kv_heads * dim, dim);
                }
                norm_rotate(a, a->k + place, a->k_gains, position, 1.0f, key);
                copy_scaled(a->v + place, a->v_scales[index * a->v_scales_step], value, dim);
            }
        }
        for (ptrdiff_t j = 0; j < dim; j += LANES)
            transpose(rotated + j, dim, keys + j * PANEL + group, PANEL);
        for (ptrdiff_t i = 0; i < LANES; i++)
            for (ptrdiff_t j = 0; j < dim; j += LANES)
                store(values + (group + i) * dim + j, load(scaled + i * dim + j));
    }
}

static void keep_states(const struct attention *a, size_t head) {
    ptrdiff_t dim = a->head_dim;
    for (ptrdiff_t token = 0; token < a->kept; token++) {
        const float *keys = find_keys(a, 0, (ptrdiff_t)head, token / PANEL);
        const float *values = find_values(a, 0, (ptrdiff_t)head, token / PANEL);
        ptrdiff_t place = ((ptrdiff_t)head * a->kept + token) * dim;
        ptrdiff_t in = token % PANEL;
        for (ptrdiff_t i = 0; i < dim; i++) {
            a->kept_k[place + i] = keys[i * PANEL + in];
            a->kept_v[place + i] = values[in * dim + i];
        }
    }
}

static size_t query_tasks(const struct attention *a) {
    return (size_t)(a->batch * a->heads * ceiling(a->size, QUERIES));
}

/* A query's online softmax: the maximum score and the sum of weights so far. */
struct softmax {
    float most, sum;
};

/* Turn a query's scores for `width` keys, a multiple of LANES, into weights; it attends to the first `seen`. */
INLINE void weigh(float *scores, ptrdiff_t width, ptrdiff_t seen, struct softmax *softmax,
                  float *attended, ptrdiff_t dim) {
    if (seen <= 0) {
        clear(scores, width);
        return;
    }
    ptrdiff_t whole = seen / LANES * LANES, rest = seen - whole, i;
    vec most = set(-__builtin_inff());
    for (i = 0; i < whole; i += LANES) most = larger(most, load(scores + i));
    if (rest) most = larger(most, keep_first(load(scores + whole), rest, most));
    float before = softmax->most, now = maximum(most);
    now = before > now ? before : now;
    vec shift = set(now), weights = set(0);
    for (i = 0; i < whole; i += LANES) {
        vec weight = exponential(subtract(load(scores + i), shift));
        weights = add(weights, weight);
        store(scores + i, weight);
    }
    if (rest) {
        vec weight = exponential(subtract(load(scores + i), shift));
        weight = keep_first(weight, rest, set(0));
        weights = add(weights, weight);
        store(scores + i, weight);
        i += LANES;
    }
    clear(scores + i, width - i);
    softmax->most = now;
    if (now > before && softmax->sum > 0) {
        float factor = first_lane(exponential(set(before - now)));
        softmax->sum *= factor;
        for (i = 0; i < dim; i += LANES)
            store(attended + i, times(load(attended + i), set(factor)));
    }
    softmax->sum += sum(weights);
}

/* One task's queries: QUERIES consecutive ones of a row and a head, fewer at the row's end. */
struct block {
    ptrdiff_t row, head, kv_head;
    ptrdiff_t first;  /* the first query's token in the row */
    ptrdiff_t inside; /* queries, padding included */
    ptrdiff_t count;  /* queries that are real tokens; padding attends to nothing */
    ptrdiff_t start;  /* the first query's position, the past included */
    float queries[QUERIES * MAX_HEAD_DIM], attended[QUERIES * MAX_HEAD_DIM];
    float scores[QUERIES * KEYS];
    struct softmax softmax[QUERIES];
};

INLINE void find_block(const struct attention *a, size_t task, struct block *b) {
    /* The last queries attend to most keys: they come first, so that threads finish together. */
    ptrdiff_t blocks = ceiling(a->size, QUERIES), rows = a->batch * a->heads;
    b->first = (blocks - 1 - (ptrdiff_t)task / rows) * QUERIES;
    b->row = (ptrdiff_t)task % rows / a->heads;
    b->head = (ptrdiff_t)task % a->heads;
    b->kv_head = b->head * a->kv_heads / a->heads;
    b->inside = minimum(QUERIES, a->size - b->first);
    b->count = minimum(b->inside, a->last[b->row] + 1 - a->past - b->first);
    b->start = a->past + b->first;
}

/* 1. Norm, rotate and scale the queries; nothing is attended to yet. */
INLINE void prepare_queries(const struct attention *a, struct block *b) {
    for (ptrdiff_t i = 0; i < b->count; i++) {
        ptrdiff_t token = b->row * a->size + b->first + i;
        const float *q = a->q + (token * a->heads + b->head) * a->head_dim;
        if (i + AHEAD < b->count) prefetch(q + AHEAD * a->heads * a->head_dim, a->head_dim);
        norm_rotate(a, q, a->q_gains, b->start + i, a->scale, b->queries + i * a->head_dim);
        clear(b->attended + i * a->head_dim, a->head_dim);
        b->softmax[i] = (struct softmax){-__builtin_inff(), 0};
    }
}

/* 2. The queries' scores for the keys from `key` on, KEYS at most, as far as one of a tile attends to them. */
INLINE void score_keys(const struct attention *a, struct block *b, ptrdiff_t key) {
    ptrdiff_t dim = a->head_dim, end = minimum(key + KEYS, b->start + b->count);
    for (ptrdiff_t panel = key; panel < end; panel += PANEL) {
        const float *keys = find_keys(a, b->row, b->kv_head, panel / PANEL);
        for (ptrdiff_t i = 0; i < b->count; i += TILE_ROWS) {
            ptrdiff_t tile = minimum(TILE_ROWS, b->count - i);
            ptrdiff_t width = minimum(PANEL, b->start + i + tile - panel);
            if (width > 0)
                multiply((int)tile, (int)ceiling(width, LANES), 0, dim, b->queries + i * dim, dim,
                         keys, PANEL, b->scores + i * KEYS + panel - key, KEYS);
        }
    }
}

/* 3. Turn a tile's scores into weights; each query attends up to its own position. */
INLINE void weigh_tile(const struct attention *a, struct block *b, ptrdiff_t key, ptrdiff_t i,
                       ptrdiff_t tile, ptrdiff_t width) {
    ptrdiff_t whole = LANES * ceiling(width, LANES);
    for (ptrdiff_t j = i; j < i + tile; j++)
        weigh(b->scores + j * KEYS, whole, minimum(width, b->start + j + 1 - key), b->softmax + j,
              b->attended + j * a->head_dim, a->head_dim);
}

/* 4. Add a tile's weighted values. The prefix's values and the row's own are stored apart. */
INLINE void add_values(const struct attention *a, struct block *b, ptrdiff_t key, ptrdiff_t i,
                       ptrdiff_t tile, ptrdiff_t width) {
    ptrdiff_t dim = a->head_dim, shared = minimum(width, a->shared_panels * PANEL - key), end;
    for (ptrdiff_t from = 0; from < width; from = end) {
        const float *values = find_values(a, b->row, b->kv_head, (key + from) / PANEL);
        end = from < shared ? shared : width;
        for (ptrdiff_t j = 0; j < dim; j += 4 * LANES)
            multiply((int)tile, (int)minimum(4, (dim - j) / LANES), 1, end - from,
                     b->scores + i * KEYS + from, KEYS, values + j, dim,
                     b->attended + i * dim + j, dim);
    }
}

/* 5. Divide by the sums of weights; padding tokens get zeros. */
INLINE void write_block(const struct attention *a, const struct block *b) {
    ptrdiff_t dim = a->head_dim, step = a->heads * dim;
    float *out = a->attended + ((b->row * a->size + b->first) * a->heads + b->head) * dim;
    for (ptrdiff_t i = 0; i < b->inside; i++) {
        vec factor = set(i < b->count ? 1 / b->softmax[i].sum : 0);
        for (ptrdiff_t j = 0; j < dim; j += LANES) {
            vec x = i < b->count ? load(b->attended + i * dim + j) : factor;
            store(out + i * step + j, times(x, factor));
        }
    }
}

TARGET static void attend(const struct attention *a, size_t task) {
    struct block b;
    find_block(a, task, &b);
    prepare_queries(a, &b);
    for (ptrdiff_t key = 0; b.count > 0 && key < b.start + b.count; key += KEYS) {
        score_keys(a, &b, key);
        for (ptrdiff_t i = 0; i < b.count; i += TILE_ROWS) {
            ptrdiff_t tile = minimum(TILE_ROWS, b.count - i);
            ptrdiff_t width = minimum(KEYS, b.start + i + tile - key);
            if (width <= 0) continue;
            weigh_tile(a, &b, key, i, tile, width);
            add_values(a, &b, key, i, tile, width);
        }
    }
    write_block(a, &b);
}
