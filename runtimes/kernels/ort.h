/* The part of onnxruntime's C API that the kernels use.

   Names, order and types are from onnxruntime_c_api.h. A function keeps its index in OrtApi, and a member
   its offset in OrtCustomOp, in every later version. So only these are declared here. */

#pragma once
#include <stddef.h>
#include <stdint.h>

/* onnxruntime provides the API table of any version up to its own. */
enum { API_VERSION = 18 };

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef const void *const *OrtApi;

typedef struct {
    OrtApi (*get_api)(uint32_t version);
    const char *(*get_version)(void);
} OrtApiBase;

typedef struct OrtAllocator {
    uint32_t version;
    void *(*alloc)(struct OrtAllocator *self, size_t size);
    void (*free)(struct OrtAllocator *self, void *memory);
} OrtAllocator;

typedef enum { FLOAT = 1, UINT8 = 2, INT32 = 6, INT64 = 7, BOOL = 9 } ElementType;
typedef enum { REQUIRED = 0, OPTIONAL = 1 } Characteristic;
enum { INVALID_ARGUMENT = 2, RUNTIME_EXCEPTION = 6, NOT_IMPLEMENTED = 9 };

typedef struct OrtCustomOp {
    uint32_t version;
    void *create_kernel_v1;
    const char *(*get_name)(const struct OrtCustomOp *);
    const char *(*get_provider)(const struct OrtCustomOp *);
    ElementType (*get_input_type)(const struct OrtCustomOp *, size_t);
    size_t (*get_input_count)(const struct OrtCustomOp *);
    ElementType (*get_output_type)(const struct OrtCustomOp *, size_t);
    size_t (*get_output_count)(const struct OrtCustomOp *);
    void *compute_v1;
    void (*destroy_kernel)(void *kernel);
    Characteristic (*get_input_characteristic)(const struct OrtCustomOp *, size_t);
    Characteristic (*get_output_characteristic)(const struct OrtCustomOp *, size_t);
    int (*get_input_memory)(const struct OrtCustomOp *, size_t);
    void *variadic[4];
    OrtStatus *(*create_kernel)(const struct OrtCustomOp *, OrtApi, const OrtKernelInfo *, void **);
    OrtStatus *(*compute)(void *kernel, OrtKernelContext *);
    void *infer_shapes;
    int (*get_start_version)(const struct OrtCustomOp *);
    int (*get_end_version)(const struct OrtCustomOp *);
    void *in_place[4];
} OrtCustomOp;

/* Functions by their index in OrtApi. */
#define CALL(api, place, ...) ((OrtStatus * (*)(__VA_ARGS__))(api)[place])
#define create_status(api) CALL(api, 0, int, const char *)
#define create_domain(api) CALL(api, 26, const char *, OrtCustomOpDomain **)
#define add_op(api) CALL(api, 27, OrtCustomOpDomain *, const OrtCustomOp *)
#define add_domain(api) CALL(api, 28, OrtSessionOptions *, OrtCustomOpDomain *)
#define get_data(api) CALL(api, 51, const OrtValue *, void **)
#define get_rank(api) CALL(api, 61, const OrtTensorTypeAndShapeInfo *, size_t *)
#define get_dimensions(api) CALL(api, 62, const OrtTensorTypeAndShapeInfo *, int64_t *, size_t)
#define get_shape(api) CALL(api, 65, const OrtValue *, OrtTensorTypeAndShapeInfo **)
#define read_float(api) CALL(api, 85, const OrtKernelInfo *, const char *, float *)
#define read_int(api) CALL(api, 86, const OrtKernelInfo *, const char *, int64_t *)
#define count_inputs(api) CALL(api, 88, const OrtKernelContext *, size_t *)
#define count_outputs(api) CALL(api, 89, const OrtKernelContext *, size_t *)
#define get_input(api) CALL(api, 90, const OrtKernelContext *, size_t, const OrtValue **)
#define get_output(api) \
    CALL(api, 91, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define release_status(api) ((void (*)(OrtStatus *))(api)[93])
#define release_shape(api) ((void (*)(OrtTensorTypeAndShapeInfo *))(api)[99])
#define release_allocator(api) ((void (*)(OrtAllocator *))(api)[132])
#define parallel_for(api) \
    CALL(api, 274, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)
#define get_allocator(api) CALL(api, 278, const OrtKernelInfo *, int, OrtAllocator **)
