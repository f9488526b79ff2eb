/* Causal grouped-query attention with the norms and the rotary embedding of queries and keys.

   Keys lie in panels of 64, transposed: [head_dim, 64]; so a tile of six queries by 64 keys is made
   of outer products that stay in registers. Values lie as they come, [64, head_dim], and the same
   tile serves for the weighted sum. Scores of 48 queries with 256 keys at a time are in the cache;
   the softmax goes on from block to block (arXiv:1805.02867). Blocks begin at fixed positions, and
   each query is summed for itself: its result is the same to the bit in any batch, and behind any
   past. */

#include "kernels.h"
#include "vectors.h"

enum { PANEL = 64, QUERIES = 48, KEYS = 256, TILE = 6, AHEAD = 4 };

/* C [rows, 16 * vectors] = or += A [rows, depth] B [depth, 16 * vectors]. */
INLINE void multiply_tile(int rows, int vectors, int add, ptrdiff_t depth, const float *a,
                          ptrdiff_t a_row, const float *b, ptrdiff_t b_row, float *c,
                          ptrdiff_t c_row) {
    __m512 sums[TILE][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            sums[i][j] = add ? _mm512_loadu_ps(c + i * c_row + LANES * j) : _mm512_setzero_ps();
    for (ptrdiff_t k = 0; k < depth; k++) {
        __m512 right[4];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) right[j] = _mm512_loadu_ps(b + k * b_row + LANES * j);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            __m512 left = _mm512_set1_ps(a[i * a_row + k]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                sums[i][j] = _mm512_fmadd_ps(left, right[j], sums[i][j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++)
            _mm512_storeu_ps(c + i * c_row + LANES * j, sums[i][j]);
}

/* The tile in registers for each number of rows and vectors. */
AVX512 static void multiply(int rows, int vectors, int add, ptrdiff_t depth, const float *a,
                     ptrdiff_t a_row, const float *b, ptrdiff_t b_row, float *c, ptrdiff_t c_row) {
#define WITH(r, v)                                                             \
    case 4 * (r) + (v):                                                        \
        if (add) multiply_tile(r, v, 1, depth, a, a_row, b, b_row, c, c_row);  \
        else multiply_tile(r, v, 0, depth, a, a_row, b, b_row, c, c_row);      \
        break;
#define ROWS(r) WITH(r, 1) WITH(r, 2) WITH(r, 3) WITH(r, 4)
    switch (4 * rows + vectors) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) }
#undef ROWS
#undef WITH
}

static inline ptrdiff_t minimum(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t ceiling(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }

/* RMSNorm of a head and its rotary embedding (arXiv:2104.09864, halves apart), times a factor.
   `whole`: halves are whole vectors, and masks are not needed. */
INLINE void norm_rotate_head(const struct attention *a, const float *x, const float *gains,
                             ptrdiff_t position, float factor, float *out, int whole) {
    ptrdiff_t half = a->head_dim / 2;
    const float *cosines = a->cosines + position * half, *sines = a->sines + position * half;
    __m512 squares = _mm512_setzero_ps();
    for (ptrdiff_t i = 0; i < 2 * half; i += LANES) {
        __mmask16 mask = whole ? 0xffff : lanes(2 * half, i);
        __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    __m512 scale = _mm512_set1_ps(factor * norm_factor(squares, 2 * half, a->eps));
    for (ptrdiff_t i = 0; i < half; i += LANES) {
        __mmask16 mask = whole ? 0xffff : lanes(half, i);
        __m512 first = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
        __m512 second = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + half + i), scale);
        first = _mm512_mul_ps(first, _mm512_maskz_loadu_ps(mask, gains + i));
        second = _mm512_mul_ps(second, _mm512_maskz_loadu_ps(mask, gains + half + i));
        __m512 c = _mm512_maskz_loadu_ps(mask, cosines + i);
        __m512 s = _mm512_maskz_loadu_ps(mask, sines + i);
        __m512 turned = _mm512_fmsub_ps(first, c, _mm512_mul_ps(second, s));
        _mm512_mask_storeu_ps(out + i, mask, turned);
        turned = _mm512_fmadd_ps(second, c, _mm512_mul_ps(first, s));
        _mm512_mask_storeu_ps(out + half + i, mask, turned);
    }
}

AVX512 static void norm_rotate(const struct attention *a, const float *x, const float *gains,
                               ptrdiff_t position, float factor, float *out) {
    if (a->head_dim % (2 * LANES)) norm_rotate_head(a, x, gains, position, factor, out, 0);
    else norm_rotate_head(a, x, gains, position, factor, out, 1);
}

void prepare(struct attention *a) {
    a->padded_dim = LANES * ceiling(a->head_dim, LANES);
    a->shared_panels = a->past / PANEL;
    a->own_panels = ceiling(a->past + a->size, PANEL) - a->shared_panels;
}

size_t panel_tasks(const struct attention *a) {
    return (size_t)(a->kv_heads * (a->shared_panels + a->batch * a->own_panels));
}

size_t scratch_floats(const struct attention *a) {
    return panel_tasks(a) * 2 * (size_t)(PANEL * a->padded_dim);
}

/* Where the panel of keys is that begins at position PANEL * `panel`; behind it come those after. */
static inline float *find_keys(const struct attention *a, ptrdiff_t row, ptrdiff_t head,
                               ptrdiff_t panel) {
    ptrdiff_t shared = a->shared_panels, before;
    if (panel < shared) before = head * shared + panel;
    else
        before = a->kv_heads * shared + (row * a->kv_heads + head) * a->own_panels + panel - shared;
    return a->scratch + before * PANEL * a->padded_dim;
}

/* The same of values, which lie behind all keys. */
static inline float *find_values(const struct attention *a, ptrdiff_t row, ptrdiff_t head,
                                 ptrdiff_t panel) {
    return find_keys(a, row, head, panel) + scratch_floats(a) / 2;
}

AVX512 void fill_panel(const struct attention *a, size_t task) {
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
    ptrdiff_t first = panel * PANEL, dim = a->head_dim, padded = a->padded_dim;
    ptrdiff_t count = is_shared ? PANEL : minimum(PANEL, a->last[row] + 1 - first);
    float *keys = find_keys(a, row, head, panel), *values = find_values(a, row, head, panel);
    float normed[LANES * MAX_HEAD_DIM];
    for (ptrdiff_t group = 0; group < count; group += LANES) {
        for (ptrdiff_t i = 0; i < LANES; i++) {
            ptrdiff_t position = first + group + i, token = position - a->past;
            float *key = normed + i * padded, *value = values + (group + i) * padded;
            const float *from = NULL;
            __m512 scale = _mm512_set1_ps(1.0f);
            for (ptrdiff_t j = dim / LANES * LANES; j < padded; j += LANES)
                _mm512_storeu_ps(key + j, _mm512_setzero_ps());
            if (group + i >= count) { /* behind the last token */
                for (ptrdiff_t j = 0; j < dim; j += LANES)
                    _mm512_storeu_ps(key + j, _mm512_setzero_ps());
                continue;
            }
            if (token < 0) {
                const float *state = a->past_k + (head * a->past + position) * dim;
                for (ptrdiff_t j = 0; j < dim; j += LANES) {
                    __mmask16 mask = lanes(dim, j);
                    _mm512_mask_storeu_ps(key + j, mask, _mm512_maskz_loadu_ps(mask, state + j));
                }
                from = a->past_v + (head * a->past + position) * dim;
            } else {
                ptrdiff_t index = row * a->size + token;
                ptrdiff_t place = (index * a->kv_heads + head) * dim;
                if (group + i + AHEAD < count) {
                    prefetch(a->k + place + AHEAD * a->kv_heads * dim, dim);
                    prefetch(a->v + place + AHEAD * a->kv_heads * dim, dim);
                }
                norm_rotate(a, a->k + place, a->k_gains, position, 1.0f, key);
                from = a->v + place;
                scale = _mm512_set1_ps(a->v_scales[index * a->v_scales_step]);
            }
            for (ptrdiff_t j = 0; j < padded; j += LANES) {
                __m512 x = _mm512_maskz_loadu_ps(lanes(dim, j), from + j);
                _mm512_storeu_ps(value + j, _mm512_mul_ps(x, scale));
            }
        }
        for (ptrdiff_t j = 0; j < padded; j += LANES)
            transpose(normed + j, padded, keys + j * PANEL + group, PANEL);
    }
}

void keep_states(const struct attention *a, size_t head) {
    ptrdiff_t dim = a->head_dim, padded = a->padded_dim;
    for (ptrdiff_t token = 0; token < a->kept; token++) {
        const float *keys = find_keys(a, 0, (ptrdiff_t)head, token / PANEL);
        const float *values = find_values(a, 0, (ptrdiff_t)head, token / PANEL);
        ptrdiff_t place = ((ptrdiff_t)head * a->kept + token) * dim;
        for (ptrdiff_t i = 0; i < dim; i++) {
            a->kept_k[place + i] = keys[i * PANEL + token % PANEL];
            a->kept_v[place + i] = values[token % PANEL * padded + i];
        }
    }
}

size_t query_tasks(const struct attention *a) {
    return (size_t)(a->batch * a->heads * ceiling(a->size, QUERIES));
}

/* A query's softmax so far. */
struct softmax {
    float most, sum;
};

/* Scores of a query with `width` keys, of which it sees `seen`, become their weights. */
INLINE void weigh(float *scores, ptrdiff_t width, ptrdiff_t seen, struct softmax *softmax,
                  float *attended, ptrdiff_t dim) {
    if (seen <= 0) {
        for (ptrdiff_t i = 0; i < width; i += LANES)
            _mm512_storeu_ps(scores + i, _mm512_setzero_ps());
        return;
    }
    ptrdiff_t whole = seen / LANES * LANES, i;
    __mmask16 rest = lanes(seen, whole);
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    for (i = 0; i < whole; i += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
    if (rest) most = _mm512_max_ps(most, _mm512_mask_loadu_ps(most, rest, scores + whole));
    float before = softmax->most, now = _mm512_reduce_max_ps(most);
    now = before > now ? before : now;
    __m512 shift = _mm512_set1_ps(now), sum = _mm512_setzero_ps();
    for (i = 0; i < whole; i += LANES) {
        __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), shift));
        sum = _mm512_add_ps(sum, weight);
        _mm512_storeu_ps(scores + i, weight);
    }
    if (rest) {
        __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), shift));
        weight = _mm512_maskz_mov_ps(rest, weight);
        sum = _mm512_add_ps(sum, weight);
        _mm512_storeu_ps(scores + i, weight);
        i += LANES;
    }
    for (; i < width; i += LANES) _mm512_storeu_ps(scores + i, _mm512_setzero_ps());
    softmax->most = now;
    if (now > before && softmax->sum > 0) {
        float factor = _mm512_cvtss_f32(exponential(_mm512_set1_ps(before - now)));
        softmax->sum *= factor;
        for (i = 0; i < dim; i += LANES)
            _mm512_storeu_ps(attended + i, _mm512_mul_ps(_mm512_loadu_ps(attended + i),
                                                         _mm512_set1_ps(factor)));
    }
    softmax->sum += _mm512_reduce_add_ps(sum);
}

AVX512 void attend(const struct attention *a, size_t task) {
    /* The last queries see most: they come first, so that threads end together. */
    ptrdiff_t blocks = ceiling(a->size, QUERIES), rows = a->batch * a->heads;
    ptrdiff_t first = (blocks - 1 - (ptrdiff_t)task / rows) * QUERIES;
    ptrdiff_t row = (ptrdiff_t)task % rows / a->heads, head = (ptrdiff_t)task % a->heads;
    ptrdiff_t dim = a->head_dim, padded = a->padded_dim, kv_head = head * a->kv_heads / a->heads;
    ptrdiff_t inside = minimum(QUERIES, a->size - first);
    /* Padding attends to nothing. */
    ptrdiff_t count = minimum(inside, a->last[row] + 1 - a->past - first);
    float queries[QUERIES * MAX_HEAD_DIM], attended[QUERIES * MAX_HEAD_DIM];
    float scores[QUERIES * KEYS];
    struct softmax softmax[QUERIES];
    float *out = a->attended + ((row * a->size + first) * a->heads + head) * dim;
    for (ptrdiff_t i = 0; i < count; i++) {
        const float *q = a->q + ((row * a->size + first + i) * a->heads + head) * dim;
        if (i + AHEAD < count) prefetch(q + AHEAD * a->heads * dim, dim);
        for (ptrdiff_t j = dim / LANES * LANES; j < padded; j += LANES)
            _mm512_storeu_ps(queries + i * padded + j, _mm512_setzero_ps());
        norm_rotate(a, q, a->q_gains, a->past + first + i, a->scale, queries + i * padded);
        for (ptrdiff_t j = 0; j < padded; j += LANES)
            _mm512_storeu_ps(attended + i * padded + j, _mm512_setzero_ps());
        softmax[i] = (struct softmax){-__builtin_inff(), 0};
    }
    ptrdiff_t start = a->past + first; /* the first query's position */
    for (ptrdiff_t key = 0; count > 0 && key < start + count; key += KEYS) {
        for (ptrdiff_t panel = key; panel < minimum(key + KEYS, start + count); panel += PANEL) {
            const float *keys = find_keys(a, row, kv_head, panel / PANEL);
            for (ptrdiff_t i = 0; i < count; i += TILE) {
                ptrdiff_t tile = minimum(TILE, count - i);
                ptrdiff_t width = minimum(PANEL, start + i + tile - panel);
                if (width > 0)
                    multiply((int)tile, (int)ceiling(width, LANES), 0, padded,
                             queries + i * padded, padded, keys, PANEL,
                             scores + i * KEYS + panel - key, KEYS);
            }
        }
        for (ptrdiff_t i = 0; i < count; i += TILE) {
            ptrdiff_t tile = minimum(TILE, count - i);
            ptrdiff_t width = minimum(KEYS, start + i + tile - key);
            if (width <= 0) continue;
            for (ptrdiff_t j = i; j < i + tile; j++)
                weigh(scores + j * KEYS, width, minimum(width, start + j + 1 - key), softmax + j,
                      attended + j * padded, padded);
            /* Shared values and the row's own lie apart. */
            ptrdiff_t shared = minimum(width, a->shared_panels * PANEL - key), end;
            for (ptrdiff_t from = 0; from < width; from = end) {
                const float *values = find_values(a, row, kv_head, (key + from) / PANEL);
                end = from < shared ? shared : width;
                for (ptrdiff_t j = 0; j < padded; j += 4 * LANES)
                    multiply((int)tile, (int)minimum(4, (padded - j) / LANES), 1, end - from,
                             scores + i * KEYS + from, KEYS, values + j, padded,
                             attended + i * padded + j, padded);
            }
        }
    }
    for (ptrdiff_t i = 0; i < inside; i++) {
        __m512 factor = _mm512_set1_ps(i < count ? 1 / softmax[i].sum : 0);
        for (ptrdiff_t j = 0; j < dim; j += LANES) {
            __m512 x = i < count ? _mm512_loadu_ps(attended + i * padded + j) : factor;
            _mm512_mask_storeu_ps(out + i * a->heads * dim + j, lanes(dim, j),
                                  _mm512_mul_ps(x, factor));
        }
    }
}
