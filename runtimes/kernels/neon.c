#ifdef __aarch64__

#include "neon.h"
/* Behind the operations that they are made of. */
#include "attention.h"
#include "product.h"
#include "rows.h"

const struct kernels neon_kernels = KERNELS;

#endif
