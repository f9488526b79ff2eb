/* Register the kernels as onnxruntime operators (domain "embedport") on its CPU provider and its threads.

   A graph also defines each operator as a function of onnxruntime's own operators (exporters/graph/).
   onnxruntime uses the function if this library is not registered. */

#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "ort.h"

enum { ROWS_A_TASK = 8, MAX_VALUES = 17 };
/* Limits of attributes: products of sizes that are checked against a tensor's do not overflow. */
enum { MAX_HEADS = 1 << 16, MAX_SIZE = 1 << 28 };

/* An operator: the types of its inputs and outputs; the first `required_...` ones are not optional. */
struct operator {
    OrtCustomOp ort;
    const struct kernels *kernels;
    const char *name;
    ElementType inputs[MAX_VALUES], outputs[MAX_VALUES];
    size_t input_count, required_inputs, output_count, required_outputs;
};

/* A node of a session's graph, with its attributes. */
struct node {
    OrtApi api;
    OrtAllocator *allocator;
    const struct kernels *kernels;
    float epsilon, scale;
    int64_t heads, kv_heads;
    int64_t depth, outputs, bits, group;
};

struct tensor {
    void *data; /* NULL if the value is absent */
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

/* Run tasks in any order on onnxruntime's threads. */
static OrtStatus *run_tasks(const struct node *node, OrtKernelContext *context,
                            void (*run)(void *, size_t), size_t count, void *data) {
    /* With as many batches as tasks, a thread takes the next task when it has finished one. */
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

/* Describe `x` [batch, size, width] as rows, and allocate the outputs for their codes and scales. */
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
    return run_rows(node, context, &rows, node->kernels->add_norm);
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
    return run_rows(node, context, &rows, node->kernels->swiglu);
}

/* AddNorm without codes, and without a product's scales; also Norm, without a value to add. */
static OrtStatus *compute_plain_norm(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor residual, value, gains;
    struct rows rows = {.eps = node->epsilon};
    TRY(read(node, context, 0, &residual));
    TRY(read(node, context, 1, &gains));
    TRY(read(node, context, 2, &value));
    if (residual.rank < 1 || gains.count < 1 || gains.count != residual.shape[residual.rank - 1] ||
        (value.data && value.count != residual.count))
        return refuse(node, "AddNorm: shapes do not go together");
    rows.width = gains.count;
    rows.count = residual.count / rows.width;
    rows.residual = residual.data, rows.value = value.data, rows.gains = gains.data;
    TRY(write(node, context, 0, residual.shape, residual.rank, &rows.result));
    TRY(write(node, context, 1, residual.shape, residual.rank, &rows.total));
    return run_rows(node, context, &rows, node->kernels->add_norm);
}

static OrtStatus *compute_plain_swiglu(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor gate, up;
    struct rows rows = {0};
    TRY(read(node, context, 0, &gate));
    TRY(read(node, context, 1, &up));
    if (gate.rank != 3 || up.count != gate.count)
        return refuse(node, "Swiglu: shapes do not go together");
    rows.width = gate.shape[2];
    rows.count = gate.shape[0] * gate.shape[1];
    rows.value = gate.data, rows.up = up.data;
    TRY(write(node, context, 0, gate.shape, 3, &rows.result));
    return run_rows(node, context, &rows, node->kernels->swiglu);
}

static OrtStatus *compute_turn(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor angles;
    float *cosines, *sines;
    TRY(read(node, context, 0, &angles));
    TRY(write(node, context, 0, angles.shape, angles.rank, &cosines));
    TRY(write(node, context, 1, angles.shape, angles.rank, &sines));
    turn(angles.data, angles.count, cosines, sines);
    return NULL;
}

static OrtStatus *compute_quantize(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor value;
    struct rows rows = {0};
    TRY(read(node, context, 0, &value));
    TRY(write_codes(node, context, 0, &value, &rows));
    rows.value = value.data;
    return run_rows(node, context, &rows, node->kernels->quantize);
}

/* One step of attention. */
struct pass {
    const struct attention *attention;
    void (*work)(const struct attention *, size_t);
};

static void run_pass(void *data, size_t task) {
    const struct pass *pass = data;
    pass->work(pass->attention, task);
}

static OrtStatus *run_tasks_of(const struct node *node, OrtKernelContext *context,
                               const struct attention *a,
                               void (*work)(const struct attention *, size_t), size_t count) {
    struct pass pass = {a, work};
    return run_tasks(node, context, run_pass, count, &pass);
}

static OrtStatus *compute_attention(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    /* As KernelInputs in exporters/graph/ort_attention.py; onnxruntime's operators alone read some of them. */
    enum { Q, K, V, V_SCALES, Q_GAINS, K_GAINS, COSINES, SINES, SMALL, SHORT, POSITION_IDS, LAST, TOTAL, LENGTHS,
           STATES, INDICES, KEPT };
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
        .past = in[STATES].count ? in[STATES].shape[2] : 0,
        .kept = in[KEPT].count ? *(const int64_t *)in[KEPT].data : 0,
    };
    ptrdiff_t tokens = a.batch * a.size, states = a.kv_heads * a.head_dim;
    ptrdiff_t angles = (a.past + a.size) * (a.head_dim / 2);
    if (in[Q].rank != 3 || a.heads < 1 || a.heads > MAX_HEADS || a.kv_heads < 1 ||
        a.heads % a.kv_heads || a.head_dim % 16 ||
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
    const struct kernels *kernels = node->kernels;
    kernels->prepare(&a);
    size_t needed = kernels->scratch_floats(&a) * sizeof(float);
    a.scratch = node->allocator->alloc(node->allocator, needed);
    if (!a.scratch)
        return create_status(node->api)(RUNTIME_EXCEPTION, "RotaryAttention: memory is full");
    OrtStatus *status =
        run_tasks_of(node, context, &a, kernels->fill_panel, kernels->panel_tasks(&a));
    if (!status)
        status = run_tasks_of(node, context, &a, kernels->attend, kernels->query_tasks(&a));
    if (!status && a.kept_k && a.kept_v)
        status = run_tasks_of(node, context, &a, kernels->keep_states, (size_t)a.kv_heads);
    node->allocator->free(node->allocator, a.scratch);
    return status;
}

/* One step of a product. */
struct step {
    const struct product *product;
    void (*work)(const struct product *, size_t);
};

static void run_step(void *data, size_t task) {
    const struct step *step = data;
    step->work(step->product, task);
}

static OrtStatus *compute_product(void *kernel, OrtKernelContext *context) {
    const struct node *node = kernel;
    struct tensor x, codes, scales, zero_points;
    TRY(read(node, context, 0, &x));
    TRY(read(node, context, 1, &codes));
    TRY(read(node, context, 2, &scales));
    TRY(read(node, context, 3, &zero_points));
    struct product p = {
        .depth = node->depth,
        .outputs = node->outputs,
        .bits = node->bits,
        .group = node->group,
        .x = x.data,
        .codes = codes.data,
        .scales = scales.data,
        .zero_points = zero_points.data,
    };
    if ((p.bits != 4 && p.bits != 8) || p.group < 32 || p.group > MAX_GROUP || p.group % 32 ||
        p.depth < 1 || p.depth > MAX_SIZE || p.outputs < 1 || p.outputs > MAX_SIZE || x.rank < 1 ||
        x.shape[x.rank - 1] != p.depth)
        return refuse(node, "MatMulGroups: shapes do not go together");
    p.groups = (p.depth + p.group - 1) / p.group;
    p.count = x.count / p.depth;
    if (codes.count != p.outputs * p.groups * p.group * p.bits / 8 ||
        scales.count != p.outputs * p.groups ||
        (zero_points.data && (p.bits == 8 || zero_points.count != p.outputs * ((p.groups + 1) / 2))))
        return refuse(node, "MatMulGroups: weights are not of the shape that they should have");
    int64_t shape[4];
    memcpy(shape, x.shape, sizeof shape);
    shape[x.rank - 1] = p.outputs;
    TRY(write(node, context, 0, shape, x.rank, &p.out));
    if (!p.count) return NULL;
    const struct kernels *kernels = node->kernels;
    p.scratch = node->allocator->alloc(node->allocator, kernels->tile_bytes(&p));
    if (!p.scratch)
        return create_status(node->api)(RUNTIME_EXCEPTION, "MatMulGroups: memory is full");
    struct step round = {&p, kernels->round_tile}, multiply = {&p, kernels->multiply_panel};
    OrtStatus *status = run_tasks(node, context, run_step, kernels->tile_count(&p), &round);
    if (!status)
        status = run_tasks(node, context, run_step, kernels->panel_count(&p), &multiply);
    node->allocator->free(node->allocator, p.scratch);
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

/* An attribute that the operator does not have is zero. */
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
    read_int_attribute(api, info, "K", &node->depth);
    read_int_attribute(api, info, "N", &node->outputs);
    read_int_attribute(api, info, "bits", &node->bits);
    read_int_attribute(api, info, "block_size", &node->group);
    node->kernels = operator_of(op)->kernels;
    *kernel = node;
    return NULL;
}

#define OPERATOR(compute_function, name_)                                                 \
    .ort = {                                                                              \
        .version = API_VERSION, .get_name = get_name, .get_provider = get_provider,       \
        .get_input_type = get_input_type, .get_input_count = get_input_count,             \
        .get_output_type = get_output_type, .get_output_count = get_output_count,         \
        .destroy_kernel = destroy_kernel,                                                 \
        .get_input_characteristic = get_input_characteristic,                             \
        .get_output_characteristic = get_output_characteristic,                           \
        .get_input_memory = get_input_memory, .create_kernel = create_kernel,             \
        .compute = compute_function, .get_start_version = get_version,                    \
        .get_end_version = get_version,                                                   \
    },                                                                                    \
    .name = name_

static const struct operator OPERATORS[] = {
    {OPERATOR(compute_add_norm, "AddNormQuantize"), .inputs = {FLOAT, FLOAT, FLOAT, FLOAT},
     .outputs = {FLOAT, FLOAT, UINT8, FLOAT}, .input_count = 4, .required_inputs = 4,
     .output_count = 4, .required_outputs = 1},
    {OPERATOR(compute_swiglu, "SwigluQuantize"), .inputs = {FLOAT, FLOAT, FLOAT},
     .outputs = {FLOAT, UINT8, FLOAT}, .input_count = 3, .required_inputs = 3, .output_count = 3,
     .required_outputs = 0},
    {OPERATOR(compute_plain_norm, "Norm"), .inputs = {FLOAT, FLOAT}, .outputs = {FLOAT},
     .input_count = 2, .required_inputs = 2, .output_count = 1, .required_outputs = 1},
    {OPERATOR(compute_plain_norm, "AddNorm"), .inputs = {FLOAT, FLOAT, FLOAT},
     .outputs = {FLOAT, FLOAT}, .input_count = 3, .required_inputs = 3, .output_count = 2,
     .required_outputs = 2},
    {OPERATOR(compute_plain_swiglu, "Swiglu"), .inputs = {FLOAT, FLOAT}, .outputs = {FLOAT},
     .input_count = 2, .required_inputs = 2, .output_count = 1, .required_outputs = 1},
    {OPERATOR(compute_turn, "CosSin"), .inputs = {FLOAT}, .outputs = {FLOAT, FLOAT},
     .input_count = 1, .required_inputs = 1, .output_count = 2, .required_outputs = 2},
    {OPERATOR(compute_quantize, "QuantizeRows"), .inputs = {FLOAT}, .outputs = {UINT8, FLOAT},
     .input_count = 1, .required_inputs = 1, .output_count = 2, .required_outputs = 2},
    {OPERATOR(compute_attention, "RotaryAttention"),
     .inputs = {FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, BOOL, BOOL, INT64, INT32,
                INT32, INT32, FLOAT, INT64, INT64},
     .outputs = {FLOAT, FLOAT, FLOAT}, .input_count = 17, .required_inputs = 13, .output_count = 3,
     .required_outputs = 1},
    {OPERATOR(compute_product, "MatMulGroups"), .inputs = {FLOAT, UINT8, FLOAT, UINT8},
     .outputs = {FLOAT}, .input_count = 4, .required_inputs = 4, .output_count = 1,
     .required_outputs = 1},
    {OPERATOR(compute_product, "MatMulSymmetricGroups"), .inputs = {FLOAT, UINT8, FLOAT},
     .outputs = {FLOAT}, .input_count = 3, .required_inputs = 3, .output_count = 1,
     .required_outputs = 1},
};

enum { OPERATOR_COUNT = sizeof OPERATORS / sizeof *OPERATORS };

/* An instruction set, and whether this CPU supports it. */
struct set {
    const char *name;
    int here;
    struct kernels kernels;
};

enum { SETS = 2 };

/* The instruction sets that this library was compiled for, best first. */
static void list_sets(struct set sets[SETS]) {
    memset(sets, 0, SETS * sizeof *sets);
#ifdef __x86_64__
    sets[0] = (struct set){"avx512", 0, avx512_kernels};
    sets[0].here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!__builtin_cpu_supports("avx512vnni")) {
        sets[0].kernels.tile_bytes = avx2_kernels.tile_bytes;
        sets[0].kernels.tile_count = avx2_kernels.tile_count;
        sets[0].kernels.round_tile = avx2_kernels.round_tile;
        sets[0].kernels.panel_count = avx2_kernels.panel_count;
        sets[0].kernels.multiply_panel = avx2_kernels.multiply_panel;
    }
    sets[1] = (struct set){"avx2", 0, avx2_kernels};
    sets[1].here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    sets[0] = (struct set){"neon", 1, neon_kernels};
#endif
}

#ifdef _WIN32
#define EXPORTED __declspec(dllexport)
#else
#define EXPORTED __attribute__((visibility("default")))
#endif

/* The index of the set that the next call of RegisterCustomOps uses. */
static int chosen = -1;

/* Choose the instruction set for further sessions by its name; "" chooses the best that the CPU supports.
   Returns the chosen set's name, or NULL if the CPU does not support it. Not thread-safe. */
EXPORTED const char *choose_kernels(const char *name) {
    struct set sets[SETS];
    list_sets(sets);
    for (int i = 0; i < SETS; i++)
        if (sets[i].here && (!*name || !strcmp(sets[i].name, name))) {
            chosen = i;
            return sets[i].name;
        }
    return NULL;
}

EXPORTED OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    /* Sessions keep pointers to these, so they are filled only once. */
    static struct set sets[SETS];
    static struct operator operators[SETS][OPERATOR_COUNT];
    OrtApi api = base->get_api(API_VERSION);
    OrtCustomOpDomain *domain;
    if (chosen < 0 && !choose_kernels(""))
        return create_status(api)(NOT_IMPLEMENTED, "the CPU has neither AVX2 with FMA nor NEON");
    if (!sets[0].name) list_sets(sets);
    struct operator *all = operators[chosen];
    if (!all->kernels)
        for (size_t i = 0; i < OPERATOR_COUNT; i++) {
            all[i] = OPERATORS[i];
            all[i].kernels = &sets[chosen].kernels;
        }
    TRY(create_domain(api)("embedport", &domain));
    for (size_t i = 0; i < OPERATOR_COUNT; i++) TRY(add_op(api)(domain, &all[i].ort));
    return add_domain(api)(options, domain);
}
