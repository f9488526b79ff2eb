/* Cosines and sines with the same bits on every CPU: computed in double, rounded once at the end. */

#include "kernels.h"

/* pi / 2 as a sum of two parts; n * PART_1 is exact for every n here (Cody and Waite 1980, ch. 8). */
static const double PART_1 = 1.5707963267341256, PART_2 = 6.0771005065061922e-11;
static const double TWO_BY_PI = 0.63661977236758138;

/* Taylor series, accurate to 1e-17 for |r| <= pi / 4. */
static double sine(double r) {
    double s = r * r, sum = -1.0 / 1307674368000;
    sum = sum * s + 1.0 / 6227020800;
    sum = sum * s - 1.0 / 39916800;
    sum = sum * s + 1.0 / 362880;
    sum = sum * s - 1.0 / 5040;
    sum = sum * s + 1.0 / 120;
    sum = sum * s - 1.0 / 6;
    return r + r * s * sum;
}

static double cosine(double r) {
    double s = r * r, sum = 1.0 / 20922789888000;
    sum = sum * s - 1.0 / 87178291200;
    sum = sum * s + 1.0 / 479001600;
    sum = sum * s - 1.0 / 3628800;
    sum = sum * s + 1.0 / 40320;
    sum = sum * s - 1.0 / 720;
    sum = sum * s + 1.0 / 24;
    sum = sum * s - 1.0 / 2;
    return 1 + s * sum;
}

void turn(const float *angles, ptrdiff_t count, float *cosines, float *sines) {
    for (ptrdiff_t i = 0; i < count; i++) {
        double x = angles[i], n = (double)(int)(x * TWO_BY_PI + (x < 0 ? -0.5 : 0.5));
        double r = x - n * PART_1 - n * PART_2, s = sine(r), c = cosine(r);
        int quarter = (int)n & 3;
        cosines[i] = (float)(quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s);
        sines[i] = (float)(quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c);
    }
}
