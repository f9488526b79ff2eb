/* Functions of vectors of sixteen floats, shared by all instruction sets.

   Include one of avx512.h, avx2.h and neon.h first: these functions use its operations. All three round
   alike, fuse a product with a sum only where the code says so, and add a vector's lanes in the same order.
   So every instruction set gives the same bits. */

#pragma once

enum { LANES = 16 };

/* e^x = 2^n e^r with |r| <= ln(2) / 2, and the Taylor series of e^r up to r^7 / 7!. x is clamped to -87 .. 88,
   the range of float32. */
INLINE vec exponential(vec x) {
    /* The second operand is returned if either is NaN, so NaN stays NaN. */
    x = smaller(set(88.0f), larger(set(-87.0f), x));
    vec n = nearest(times(x, set(1.44269504f)));
    vec r = fma_negated(n, set(0.693359375f), x);
    r = fma_negated(n, set(-2.12194440e-4f), r);
    vec sum = set(1.0f / 5040);
    sum = fma_add(sum, r, set(1.0f / 720));
    sum = fma_add(sum, r, set(1.0f / 120));
    sum = fma_add(sum, r, set(1.0f / 24));
    sum = fma_add(sum, r, set(1.0f / 6));
    sum = fma_add(sum, r, set(0.5f));
    sum = fma_add(sum, r, set(1.0f));
    sum = fma_add(sum, r, set(1.0f));
    return times(sum, power_of_two(n));
}

/* 1 / sqrt(mean of squares + eps), RMSNorm's factor (arXiv:1910.07467). */
INLINE float norm_factor(vec squares, ptrdiff_t count, float eps) {
    return 1 / square_root(sum(squares) / (float)count + eps);
}

/* The largest magnitude so far, and whether there was a NaN: larger() does not propagate it. */
struct largest {
    vec value;
    nans found;
};

INLINE struct largest none(void) { return (struct largest){set(0), no_nans()}; }

INLINE void enlarge(struct largest *largest, vec x) {
    largest->value = larger(largest->value, absolute(x));
    largest->found = find_nans(largest->found, x);
}

/* NaN if there was one; 1e-20 if all values are zero. */
INLINE float magnitude(struct largest largest) {
    float value = maximum(largest.value);
    return any_nan(largest.found) ? __builtin_nanf("") : value > 1e-20f ? value : 1e-20f;
}

INLINE void clear(float *to, ptrdiff_t count) {
    for (ptrdiff_t i = 0; i < count; i += LANES) store(to + i, set(0));
}

static inline ptrdiff_t minimum(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t ceiling(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
