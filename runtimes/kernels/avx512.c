#ifdef __x86_64__

#include "avx512.h"
/* These use the vector operations above, so they are included after them. */
#include "attention.h"
#include "product.h"
#include "rows.h"

const struct kernels avx512_kernels = KERNELS;

#endif
