#ifdef __aarch64__

#include "neon.h"
/* These use the vector operations above, so they are included after them. */
#include "attention.h"
#include "product.h"
#include "rows.h"

const struct kernels neon_kernels = KERNELS;

#endif
