/* The kernels as operators of onnxruntime, domain "embedport", on its CPU provider and its threads.

   A graph has each operator as a function of onnxruntime's own ones too (exporters/onnx/), which
   it takes where this library is not registered. */

#include <stdlib.h>

#include "kernels.h"
#include "ort.h"

enum { ROWS_A_TASK = 8, MAX_VALUES = 17 };

/* An operator: its values' types in order, of which the first `required` must be there. */
struct operator {
    OrtCustomOp ort;
    const char *name;
    ElementType inputs[MAX_VALUES], outputs[MAX_VALUES];
    size_t input_count, required_inputs, output_count, required_outputs;
};

/* A node of a session. */
struct node {
    OrtApi api;
    OrtAllocator *allocator;
    float epsilon, scale;
    int64_t heads, kv_heads, bf16;
};

struct tensor {
    void *data; /* NULL where the value is absent */
    size_t rank;
    int64_t shape[4];
    ptrdiff_t count;
};

#define TRY(call)                      \
    do {                               \
        OrtStatus *status = (call);    \
        if (status) return status;     \
    } while (0)

static OrtStatus *refuse(const struct node *node, const char *message) {
    return create_status(node->api)(INVALID_ARGUMENT, message);
}

static OrtStatus *read(const struct node *node, OrtKernelContext *context, size_t index,
                       struct tensor *tensor) {
    size_t count;
    const OrtValue *value = NULL;
    OrtTensorTypeAndShapeInfo *info;
    *tensor = (struct tensor){.shape = {1, 1, 1, 1}};
    TRY(count_inputs(node->api)(context, &count));
    if (index >= count) return NULL;
    TRY(get_input(node->api)(context, index, &value));
    if (!value) return NULL;
    TRY(get_data(node->api)(value, &tensor->data));
    TRY(get_shape(node->api)(value, &info));
    OrtStatus *status = get_rank(node->api)(info, &tensor->rank);
    if (!status && tensor->rank <= 4)
        status = get_dimensions(node->api)(info, tensor->shape, tensor->rank);
    release_shape(node->api)(info);
    if (status) return status;
    if (tensor->rank > 4) return refuse(node, "a value has more than four dimensions");
    tensor->count = 1;
    for (size_t i = 0; i < tensor->rank; i++) tensor->count *= tensor->shape[i];
    return NULL;
}

static OrtStatus *write(const struct node *node, OrtKernelContext *context, size_t index,
                        const int64_t *shape, size_t rank, void *data) {
    size_t count;
    OrtValue *value = NULL;
    *(void **)data = NULL;
    TRY(count_outputs(node->api)(context, &count));
    if (index >= count) return NULL;
    TRY(get_output(node->api)(context, index, shape, rank, &value));
    return value ? get_data(node->api)(value, data) : NULL;
}

/* Tasks in any order on onnxruntime's threads. */
static OrtStatus *run_tasks(const struct node *node, OrtKernelContext *context,
                            void (*run)(void *, size_t), size_t count, void *data) {
    /* As many batches as tasks: a thread takes the next one when it is done with one. */
    return count ? parallel_for(node->api)(context, run, count, count, data) : NULL;
}

struct share {
    const struct rows *rows;
    void (*work)(const struct rows *, ptrdiff_t, ptrdiff_t);
};

static void run_share(void *data, size_t task) {
    const struct share *share = data;
    ptrdiff_t first = (ptrdiff_t)task * ROWS_A_TASK, last = first + ROWS_A_TASK;
    share->work(share->rows, first, last < share->rows->count ? last : share->rows->count);
}

static OrtStatus *run_rows(const struct node *node, OrtKernelContext *context,
                           const struct rows *rows,
                           void (*work)(const struct rows *, ptrdiff_t, ptrdiff_t)) {
    struct share share = {rows, work};
    size_t tasks = (size_t)(rows->count + ROWS_A_TASK - 1) / ROWS_A_TASK;
    return run_tasks(node, context, run_share, tasks, &share);
}

/* [batch, size, width] of `x` become rows, and codes and scales for them outputs. */
static OrtStatus *write_codes(const struct node *node, OrtKernelContext *context, size_t index,
                              const struct tensor *x, struct rows *rows) {
    int64_t scales[3] = {x->shape[0], x->shape[1], 1};
    if (x->rank != 3) return refuse(node, "rows should be [batch, size, width]");
    rows->width = x->shape[2];
    rows->count = x->shape[0] * x->shape[1];
    TRY(write(node, context, index, x->shape, 3, &rows->codes));
    TRY(write(node, context, index + 1, scales, 3, &rows->row_scales));
    return rows->codes && !rows->row_scales ? refuse(node, "codes need their scales") : NULL;
}

static OrtStatus *compute_add_norm(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor residual, value, scales, gains;
    struct rows rows = {.eps = node->epsilon};
    TRY(read(node, context, 0, &residual));
    TRY(read(node, context, 1, &value));
    TRY(read(node, context, 2, &scales));
    TRY(read(node, context, 3, &gains));
    TRY(write_codes(node, context, 2, &residual, &rows));
    if (value.count != residual.count || scales.count != rows.count || gains.count != rows.width)
        return refuse(node, "AddNormQuantize: shapes do not go together");
    rows.residual = residual.data, rows.value = value.data;
    rows.scales = scales.data, rows.gains = gains.data;
    TRY(write(node, context, 0, residual.shape, 3, &rows.total));
    TRY(write(node, context, 1, residual.shape, 3, &rows.result));
    return run_rows(node, context, &rows, add_norm);
}

static OrtStatus *compute_swiglu(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor gate, scales, up;
    struct rows rows = {0};
    TRY(read(node, context, 0, &gate));
    TRY(read(node, context, 1, &scales));
    TRY(read(node, context, 2, &up));
    TRY(write_codes(node, context, 1, &gate, &rows));
    if (up.count != gate.count || scales.count != rows.count || rows.width > MAX_WIDTH)
        return refuse(node, "SwigluQuantize: shapes do not go together, or rows are too wide");
    rows.value = gate.data, rows.scales = scales.data, rows.up = up.data;
    TRY(write(node, context, 0, gate.shape, 3, &rows.result));
    return run_rows(node, context, &rows, swiglu);
}

static OrtStatus *compute_quantize(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor value;
    struct rows rows = {0};
    TRY(read(node, context, 0, &value));
    TRY(write_codes(node, context, 0, &value, &rows));
    rows.value = value.data;
    return run_rows(node, context, &rows, quantize);
}

static void run_fill(void *data, size_t task) { fill_panel(data, task); }
static void run_attend(void *data, size_t task) { attend(data, task); }
static void run_keep(void *data, size_t task) { keep_states(data, task); }

static OrtStatus *compute_attention(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    enum { Q, K, V, V_SCALES, Q_GAINS, K_GAINS, COSINES, SINES, LAST = 11,
           STATES = 14, INDICES, KEPT };
    struct tensor in[MAX_VALUES];
    for (size_t i = 0; i < MAX_VALUES; i++) TRY(read(node, context, i, in + i));
    struct attention a = {
        .batch = in[Q].shape[0],
        .size = in[Q].shape[1],
        .heads = node->heads,
        .kv_heads = node->kv_heads,
        .head_dim = in[Q_GAINS].count,
        .q = in[Q].data,
        .k = in[K].data,
        .v = in[V].data,
        .v_scales = in[V_SCALES].data,
        .v_scales_step = in[V_SCALES].count > 1,
        .q_gains = in[Q_GAINS].data,
        .k_gains = in[K_GAINS].data,
        .cosines = in[COSINES].data,
        .sines = in[SINES].data,
        .last = in[LAST].data,
        .eps = node->epsilon,
        .scale = node->scale,
        .bf16 = node->bf16 && __builtin_cpu_supports("avx512bf16"),
        .past = in[STATES].count ? in[STATES].shape[2] : 0,
        .kept = in[KEPT].data ? *(const int64_t *)in[KEPT].data : 0,
    };
    ptrdiff_t tokens = a.batch * a.size, states = a.kv_heads * a.head_dim;
    ptrdiff_t angles = (a.past + a.size) * (a.head_dim / 2);
    if (a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads || a.head_dim % 2 ||
        a.head_dim > MAX_HEAD_DIM || in[Q].count != tokens * a.heads * a.head_dim ||
        in[K].count != tokens * states || in[V].count != tokens * states ||
        (in[V_SCALES].count != 1 && in[V_SCALES].count != tokens) ||
        in[K_GAINS].count != a.head_dim || in[LAST].count != a.batch ||
        in[COSINES].count != angles || in[SINES].count != angles ||
        (a.past && (in[STATES].shape[1] * in[STATES].shape[3] != states || in[INDICES].count != 2)))
        return refuse(node, "RotaryAttention: shapes do not go together");
    for (ptrdiff_t i = 0; i < a.batch; i++)
        if (a.last[i] < a.past || a.last[i] >= a.past + a.size)
            return refuse(node, "RotaryAttention: a row's last token is not in it");
    if (a.kept < 0 || (a.kept && (!a.batch || a.kept > a.last[0] + 1)))
        return refuse(node, "RotaryAttention: the first row has fewer tokens than are to be kept");
    if (a.past) {
        const int64_t *indices = in[INDICES].data, count = in[STATES].shape[0];
        if (indices[0] < 0 || indices[0] >= count || indices[1] < 0 || indices[1] >= count)
            return refuse(node, "RotaryAttention: the past has no such layer");
        a.past_k = (const float *)in[STATES].data + indices[0] * states * a.past;
        a.past_v = (const float *)in[STATES].data + indices[1] * states * a.past;
    }
    int64_t shape[4] = {1, a.kv_heads, a.kept, a.head_dim};
    TRY(write(node, context, 0, in[Q].shape, 3, &a.attended));
    TRY(write(node, context, 1, shape, 4, &a.kept_k));
    TRY(write(node, context, 2, shape, 4, &a.kept_v));
    if (!tokens) return NULL;
    prepare(&a);
    a.scratch = node->allocator->alloc(node->allocator, scratch_floats(&a) * sizeof(float));
    if (!a.scratch)
        return create_status(node->api)(RUNTIME_EXCEPTION, "RotaryAttention: memory is full");
    OrtStatus *status = run_tasks(node, context, run_fill, panel_tasks(&a), &a);
    if (!status) status = run_tasks(node, context, run_attend, query_tasks(&a), &a);
    if (!status && a.kept_k && a.kept_v)
        status = run_tasks(node, context, run_keep, (size_t)a.kv_heads, &a);
    node->allocator->free(node->allocator, a.scratch);
    return status;
}

static const struct operator *operator_of(const OrtCustomOp *op) {
    return (const struct operator *)op;
}

static const char *get_name(const OrtCustomOp *op) { return operator_of(op)->name; }
static size_t get_input_count(const OrtCustomOp *op) { return operator_of(op)->input_count; }
static size_t get_output_count(const OrtCustomOp *op) { return operator_of(op)->output_count; }
static ElementType get_input_type(const OrtCustomOp *op, size_t i) {
    return operator_of(op)->inputs[i];
}
static ElementType get_output_type(const OrtCustomOp *op, size_t i) {
    return operator_of(op)->outputs[i];
}
static Characteristic get_input_characteristic(const OrtCustomOp *op, size_t i) {
    return i < operator_of(op)->required_inputs ? REQUIRED : OPTIONAL;
}
static Characteristic get_output_characteristic(const OrtCustomOp *op, size_t i) {
    return i < operator_of(op)->required_outputs ? REQUIRED : OPTIONAL;
}
/* The same for all operators. */
static const char *get_provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static int get_input_memory(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int get_version(const OrtCustomOp *op) { return (void)op, 1; }

static void destroy_kernel(void *kernel) {
    struct node *node = kernel;
    release_allocator(node->api)(node->allocator);
    free(node);
}

/* An attribute that the operator does not have keeps its zero. */
static void read_int_attribute(OrtApi api, const OrtKernelInfo *info, const char *name,
                               int64_t *value) {
    OrtStatus *status = read_int(api)(info, name, value);
    if (status) release_status(api)(status), *value = 0;
}

static void read_float_attribute(OrtApi api, const OrtKernelInfo *info, const char *name,
                                 float *value) {
    OrtStatus *status = read_float(api)(info, name, value);
    if (status) release_status(api)(status), *value = 0;
}

static OrtStatus *create_kernel(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info,
                                void **kernel) {
    struct node *node = calloc(1, sizeof *node);
    (void)op;
    if (!node) return create_status(api)(RUNTIME_EXCEPTION, "memory is full");
    node->api = api;
    OrtStatus *status = get_allocator(api)(info, 0, &node->allocator);
    if (status) {
        free(node);
        return status;
    }
    read_float_attribute(api, info, "epsilon", &node->epsilon);
    read_float_attribute(api, info, "scale", &node->scale);
    read_int_attribute(api, info, "num_heads", &node->heads);
    read_int_attribute(api, info, "kv_num_heads", &node->kv_heads);
    read_int_attribute(api, info, "bf16", &node->bf16);
    *kernel = node;
    return NULL;
}

#define OPERATOR(compute_function)                                                        \
    {                                                                                     \
        .version = API_VERSION, .get_name = get_name, .get_provider = get_provider,       \
        .get_input_type = get_input_type, .get_input_count = get_input_count,             \
        .get_output_type = get_output_type, .get_output_count = get_output_count,         \
        .destroy_kernel = destroy_kernel,                                                 \
        .get_input_characteristic = get_input_characteristic,                             \
        .get_output_characteristic = get_output_characteristic,                           \
        .get_input_memory = get_input_memory, .create_kernel = create_kernel,             \
        .compute = compute_function, .get_start_version = get_version,                    \
        .get_end_version = get_version,                                                   \
    }

static const struct operator OPERATORS[] = {
    {OPERATOR(compute_add_norm), "AddNormQuantize", {FLOAT, FLOAT, FLOAT, FLOAT},
     {FLOAT, FLOAT, UINT8, FLOAT}, 4, 4, 4, 1},
    {OPERATOR(compute_swiglu), "SwigluQuantize", {FLOAT, FLOAT, FLOAT}, {FLOAT, UINT8, FLOAT}, 3, 3,
     3, 0},
    {OPERATOR(compute_quantize), "QuantizeRows", {FLOAT}, {UINT8, FLOAT}, 1, 1, 2, 2},
    {OPERATOR(compute_attention), "RotaryAttention",
     {FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, BOOL, BOOL, INT64, INT32, INT32,
      INT32, FLOAT, INT64, INT64},
     {FLOAT, FLOAT, FLOAT}, 17, 13, 3, 1},
};

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base) {
    OrtApi api = base->get_api(API_VERSION);
    OrtCustomOpDomain *domain;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        return create_status(api)(NOT_IMPLEMENTED, "the CPU has no AVX-512");
    TRY(create_domain(api)("embedport", &domain));
    for (size_t i = 0; i < sizeof OPERATORS / sizeof *OPERATORS; i++)
        TRY(add_op(api)(domain, &OPERATORS[i].ort));
    return add_domain(api)(options, domain);
}
