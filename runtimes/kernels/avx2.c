#ifdef __x86_64__

#include "avx2.h"
/* Behind the operations that they are made of. */
#include "attention.h"
#include "product.h"
#include "rows.h"

const struct kernels avx2_kernels = KERNELS;

#endif
