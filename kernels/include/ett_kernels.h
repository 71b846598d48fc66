/* ett_kernels.h: the C interface of the kernels.
 *
 * One argument struct and one launcher per kernel, in the order of the table in src/backend/contract.rs. A
 * test of the crate compares the two: names, fields, order and types are the same. The CUDA files implement
 * the launchers, common/status.c and common/kernels.c the functions that need no CUDA. Valid C99 and C++17.
 * kernels/INTERFACE.md lists what changed from version to version.
 *
 * Launching
 * - A launcher checks its arguments, enqueues its work on the stream and returns a status. It allocates no
 *   memory, does not wait and prints nothing.
 * - ETT_BAD_ARGUMENT and ETT_UNSUPPORTED mean that no output is written; after ETT_CUDA_ERROR outputs are
 *   unspecified. ett_last_status says why, in a sentence.
 * - The argument structs are read before the launcher returns and may live on the caller's stack. The memory
 *   behind the views, the workspace and the fault slot must stay valid until the work is done. Work on one
 *   stream runs in the order of the calls, so the next call on that stream may use the same workspace; calls
 *   on two streams need two.
 * - The calling thread's current device must be the one that the stream and all memory belong to, in its
 *   primary context, which is the one that the CUDA runtime, PyTorch and cudarc use.
 * - Launchers may be called from any number of threads at once. ett_last_status and ett_last_kernel are the
 *   calling thread's.
 * - Every call may be captured into a graph and replayed, also the first call of a kernel (which loads its
 *   code; capture it in the modes "thread local" or "relaxed"). A replay reads the memory behind the views
 *   again; dimensions, numbers and addresses are those of the capture.
 * - A kernel with several implementations chooses one by shapes, alignment and device; ett_launch.force
 *   overrides that, ett_implementations lists their names. A name of no implementation is ETT_BAD_ARGUMENT, one
 *   that does not support the call ETT_UNSUPPORTED; a call that has nothing to compute may ignore it.
 *
 * Workspaces
 * - ett_<kernel>_workspace returns the bytes of scratch memory that a call needs besides its arguments: 0 for
 *   none, -1 if the arguments are outside the contract (the launcher then says why). It suffices for every
 *   implementation that the current device can run, forced or chosen. Without a GPU it answers for an H100.
 * - It reads the argument struct, but not the memory behind its views, so it can be asked before there is any:
 *   give the present views the address ETT_PLACEHOLDER. The answer then holds for memory whose rows begin at
 *   multiples of 16 bytes, the largest alignment that any kernel makes use of.
 *
 * Memory
 * - Views must be aligned to their elements, the workspace to 256 bytes. Everything else is a matter of speed:
 *   the fast implementations need all rows to begin at multiples of 16 bytes and to consist of whole pieces of
 *   16 bytes; others are several times slower.
 * - No argument that is written, "out" or "add", shares a byte with any other argument of the same call, nor
 *   with the workspace. Slices of different columns or rows of one tensor share none. "may be x": this argument
 *   may be x itself, with the same strides. Arguments that are only read may overlap and may be one buffer. The
 *   caller ensures this, and that memory belongs to the device: launchers do not check it.
 *
 * Empty problems
 * - A dimension of 0 is ETT_OK unless a comment asks for more ("K at least 1"). Outputs that are not empty
 *   then get what the formula says of nothing: sums are 0, a product over an empty inner dimension is its bias
 *   or 0, the loss of no rows is 0, "add" adds nothing. Statistics over nothing are the exception: those of rows
 *   without columns or pixels without channels are not written, those of groups and channels without pixels
 *   (group_norm, batch_norm, y_mean and y_rstd of conv2d_fwd) are NaN.
 * - A view whose ptr is null is absent, whatever its dimensions. An empty tensor that has to be present needs
 *   some address; ETT_PLACEHOLDER will do.
 *
 * Values
 * - NaN and infinity go through the arithmetic of the formula. Where a kernel does something else with them,
 *   its comment says so (nearest, the ibq kernels, sample, sum_squares, adamw, batch_norm_running, lecam_update,
 *   l2_norm). Derivatives of ReLU and of the hinge are 0 at NaN.
 * - Logarithms are natural.
 * - Kernels are deterministic: the same call with the same input, at addresses of the same alignment, gives the
 *   same bits, on every GPU of the same compute capability and number of multiprocessors, with the same build of
 *   the library. Results of other GPUs differ by rounding: sums are divided among the multiprocessors, and
 *   implementations differ.
 *
 * Letters: B batch, T tokens of a sequence, N rows of a flat batch, C channels, O output channels, H heads
 * (or height), W width, D head or code dimension, K codes, M visual tokens, V vocabulary, F MLP width, S
 * sequences, G groups, P pixels (or patches).
 *
 * Comments of the fields: "in" is only read, "out" is overwritten and never read, "add" is read and added
 * to, or updated in place; "?" marks an argument that may be absent. Then, separated by semicolons:
 * - the shape. [N, C]: rows of any stride, in any number of dimensions: [B, T, C] is B*T rows; [C]: a vector,
 *   elements without gaps in any shape, so that [1] is also a scalar of rank 0; [B, H, W, C]: these dimensions;
 *   [..]: rows as [N, C], in the same shape as the others of the call that say so. A letter is the same number
 *   all over a call, and a number that no argument states is told by a shape: group_norm has as many groups as
 *   mean has columns. Other names are the call's own numbers;
 * - the element type: "act" is the activation type of the run, "acc" its accumulator type, in which all sums
 *   are formed: (act, acc) is (bf16, f32) or (f32, f32); the CPU's oracle also has (f64, f64). All arguments of
 *   type act have the same one: weights kept in f32 beside bf16 activations have to be converted (ett_cast);
 * - what else holds, if anything. "with x": present exactly if x is; "unless x": exactly if x is not; "only
 *   with x": absent if x is; "values below R": indices, which are reported as faults if they are not; negative
 *   ones too, unless the comment gives them a meaning; "may be x": see above. Of a number, "if x": it is ignored
 *   unless x is present.
 * Booleans are int32_t: 0 is false, anything else true. Sizes are int64_t; a kernel that counts something in fewer
 * bits refuses more, with ETT_BAD_ARGUMENT or ETT_UNSUPPORTED and the limit: most allow 2^31 rows, the losses of
 * logits 2^30, sample 2^21 logits a row, convolutions sides below 2^15 of w. */
#ifndef ETT_KERNELS_H
#define ETT_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Marks what a shared library exports; all else is hidden. */
#ifndef ETT_API
#ifdef __GNUC__
#define ETT_API __attribute__((visibility("default")))
#else
#define ETT_API
#endif
#endif

/* Incremented when a struct or the meaning of a field changes. */
#define ETT_ABI_VERSION 9
/* The version of the library that this header belongs to: that of the crate. */
#define ETT_VERSION "0.1.0"

/* The interface version that the library was built with; compare it with ETT_ABI_VERSION. */
ETT_API int32_t ett_abi_version(void);

/* ETT_VERSION of the header that the library was built with. */
ETT_API const char* ett_version(void);

/* What the library was compiled for: compute capabilities, separated by spaces, such as "80 90a"; every GPU from
   8.0 on can run it, since PTX of 8.0 is included. "shim": for the CPU. "" if it contains no kernels. */
ETT_API const char* ett_targets(void);

/* The implementations of a kernel in this version, such as "hopper hopper_split sweep" for "ibq_rows", the names
   that ett_launch.force accepts; null for a name of no kernel. The last one supports every shape that the kernel
   does. They are told of the whole library, not of what was linked from it. */
ETT_API const char* ett_implementations(const char* kernel);

/* ---- status -------------------------------------------------------------------------------------------- */

/* What a launcher returns. */
typedef enum ett_status_code {
    ETT_OK = 0,            /* the work is enqueued */
    ETT_BAD_ARGUMENT = 1,  /* an argument is outside the contract; no output is written */
    ETT_UNSUPPORTED = 2,   /* within the contract, but not implemented here; no output is written */
    ETT_CUDA_ERROR = 3     /* a CUDA runtime call failed; its code is in ett_status.cuda_error */
} ett_status_code;

/* The name of a code in lower case with spaces; "unknown status" for any other number. Never null. */
ETT_API const char* ett_status_name(int32_t code);

/* Why a launcher did not return ETT_OK. Strings are UTF-8, truncated to fit and always null-terminated; ""
   before any failure. They read as one sentence: "<op>: argument `<arg>` is <got>, wanted <want>". */
typedef struct ett_status {
    int32_t code;        /* ett_status_code */
    int32_t cuda_error;  /* cudaError_t; 0 unless code is ETT_CUDA_ERROR */
    char op[32];         /* the kernel, or one that it calls, without the prefix ett_ */
    char arg[32];        /* the argument: the name of its field */
    char got[96];        /* its value or shape; the name of the error for ETT_CUDA_ERROR */
    char want[96];       /* what the kernel accepts; the text of the error for ETT_CUDA_ERROR */
} ett_status;

/* Copies the status of the calling thread's last failed launch. A successful launch does not change it; code
   is ETT_OK if no launch has failed. */
ETT_API void ett_last_status(ett_status* status);

/* ---- views --------------------------------------------------------------------------------------------- */

/* An address of nothing that is not null, aligned for every kernel: for the views of a workspace query before there
   is memory, and for empty tensors. Never dereferenced. */
#define ETT_PLACEHOLDER ((void*)256)

/* A CUDA stream; the same type as cudaStream_t and CUstream. Null is the default stream. */
struct CUstream_st;
typedef struct CUstream_st* ett_stream;

/* Element types. */
typedef enum ett_dtype {
    ETT_F64 = 0,
    ETT_F32 = 1,
    ETT_BF16 = 2,
    ETT_I32 = 3,
    ETT_U8 = 4
} ett_dtype;

/* A tensor argument with dimensions dims[0..rank], row-major. The last dimension is contiguous; the others
   together count rows, which begin ld elements apart. With more than one row, ld is at least the last
   dimension: a view may be a slice of the columns of a wider tensor. A vector is one row. Dimensions from rank
   on are 1. If ptr is null, the argument is absent and the other fields are ignored. */
typedef struct ett_view {
    void* ptr;
    int32_t dtype;    /* ett_dtype */
    int32_t rank;     /* 0 to 4 */
    int64_t dims[4];
    int64_t ld;
} ett_view;

/* ---- launches ------------------------------------------------------------------------------------------ */

/* A fault is an error in the data that a kernel reads, such as an index out of bounds. A launcher cannot
   return it, so the kernel writes the first fault to ett_launch.fault and treats the element as absent: gathered
   rows and gradients are 0 there, losses leave it out, rows addressed by it keep what they held. Where a kernel
   does something else, its comment says so (attention, pick, vq_bwd). */
typedef enum ett_fault_kind {
    ETT_FAULT_NONE = 0,
    ETT_FAULT_INDEX = 1    /* an index, target or offset outside its range */
} ett_fault_kind;

/* In device memory, 8-byte aligned, zeroed by the caller. */
typedef struct ett_fault {
    int32_t kind;          /* ett_fault_kind; later faults do not overwrite the first. Of several in one launch, any
                              one is kept */
    int32_t launch;        /* ett_launch.number of the launch that found it */
    int64_t where;         /* the element of the indices, which are always without gaps, counted from their start;
                              of the offsets of attention, the number of the sequence */
    int64_t value;         /* the value found */
    int64_t limit;         /* valid values are 0 <= value < limit; offsets also have to ascend */
} ett_fault;

/* How a kernel is launched: everything but its arguments. */
typedef struct ett_launch {
    ett_stream stream;        /* where the work is enqueued; null: the default stream */
    void* workspace;          /* device memory, 256-byte aligned; its contents are unspecified before and after */
    int64_t workspace_bytes;  /* at least what ett_<kernel>_workspace returns */
    ett_fault* fault;         /* in device memory; null: faults are not reported */
    int32_t number;           /* identifies the launch in a fault */
    const char* force;        /* the implementation to use, by name; null: the kernel chooses */
} ett_launch;

/* The implementation that the calling thread's last successful launch used; "" before the first launch and
   after a call that had nothing to compute. A string literal. */
ETT_API const char* ett_last_kernel(void);

/* ---- enumerations -------------------------------------------------------------------------------------- */

/* Element-wise functions. */
typedef enum ett_unary_kind {
    ETT_UNARY_SILU = 0,       /* x * sigmoid(x) */
    ETT_UNARY_GELU = 1,       /* x * Phi(x), exact */
    ETT_UNARY_RELU = 2,       /* max(x, 0); derivative 0 at 0 */
    ETT_UNARY_LEAKY_RELU = 3, /* x if x > 0, else slope * x */
    ETT_UNARY_GELU_TANH = 4   /* x * sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3) */
} ett_unary_kind;

/* A function with its parameter. */
typedef struct ett_unary {
    int32_t kind;  /* ett_unary_kind */
    double slope;  /* of ETT_UNARY_LEAKY_RELU; ignored by the others */
} ett_unary;

/* How a code is scored against a token; the largest score is the best. */
typedef enum ett_metric {
    ETT_METRIC_DOT = 0,  /* z . e */
    ETT_METRIC_L2 = 1    /* -|z - e|^2 */
} ett_metric;

/* The layout of the step state, a vector of ETT_STATE_LEN elements of type acc in device memory. It holds the
   values that change from step to step, so that a captured graph replays with those of the new step. It
   begins with ETT_STATE_GROUPS rows; row g belongs to parameter group g. A kernel that needs a single value
   gets a view [1] of its element. */
enum {
    ETT_STATE_GROUPS = 16,     /* rows */
    ETT_STATE_STRIDE = 2,      /* elements of a row */
    ETT_STATE_RATE = 0,        /* in a row: learning rate */
    ETT_STATE_CLIP = 1,        /* in a row: largest gradient norm; 0: no clipping */
    ETT_STATE_WEIGHT = 32,     /* the first loss weight; a loss's weight is the gradient that its backward receives */
    ETT_STATE_LOSSES = 16,     /* elements for loss weights */
    ETT_STATE_INV_TOKENS = 48, /* 1 / supervised text tokens of the whole batch */
    ETT_STATE_INV_CODES = 49,  /* 1 / supervised codes of the whole batch */
    ETT_STATE_INV_PICTURES = 50, /* 1 / pictures of the whole batch */
    ETT_STATE_INV_ELEMENTS = 51, /* 1 / elements (pixels times channels) of these pictures */
    ETT_STATE_INV_PATCHES = 52, /* 1 / patch logits that the discriminator computes for these pictures */
    ETT_STATE_INV_VISUAL = 53, /* 1 / visual tokens of one part of the batch, over all ranks */
    ETT_STATE_LEN = 54
};

/* ---- products ------------------------------------------------------------------------------------------ */

/* y = op(a) op(b) + bias, where op transposes if ta or tb is set; op(a) is [N, C], op(b) is [C, O]. A linear
   layer with weights [O, C] is ta = false, tb = true. */
typedef struct ett_matmul_args {
    ett_view a;             // in   [N, C], or [C, N] if ta; act
    ett_view b;             // in   [C, O], or [O, C] if tb; act
    int32_t ta;             //      transpose a
    int32_t tb;             //      transpose b
    ett_view bias;          // in?  [O]; act
    ett_view y;             // out  [N, O]; act
} ett_matmul_args;
ETT_API int64_t ett_matmul_workspace(const ett_matmul_args* args);
ETT_API int32_t ett_matmul(const ett_matmul_args* args, const ett_launch* launch);

/* A linear layer fused with the tanh form of GELU: pre = x w^T + bias, y = gelu(pre). Whether GELU is applied
   before or after pre is rounded to act depends on the implementation. */
typedef struct ett_linear_gelu_args {
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [O, C]; act
    ett_view bias;          // in?  [O]; act
    ett_view pre;           // out  [N, O]; act
    ett_view y;             // out  [N, O]; act
} ett_linear_gelu_args;
ETT_API int64_t ett_linear_gelu_workspace(const ett_linear_gelu_args* args);
ETT_API int32_t ett_linear_gelu(const ett_linear_gelu_args* args, const ett_launch* launch);

/* y += op(a) op(b) in the accumulator type: weight gradients. */
typedef struct ett_matmul_acc_args {
    ett_view a;             // in   [N, C], or [C, N] if ta; act
    ett_view b;             // in   [C, O], or [O, C] if tb; act
    int32_t ta;             //      transpose a
    int32_t tb;             //      transpose b
    ett_view y;             // add  [N, O]; acc
} ett_matmul_acc_args;
ETT_API int64_t ett_matmul_acc_workspace(const ett_matmul_acc_args* args);
ETT_API int32_t ett_matmul_acc(const ett_matmul_acc_args* args, const ett_launch* launch);

/* y[c] += sum_n x[n, c]: bias gradients. */
typedef struct ett_col_sum_args {
    ett_view x;             // in   [N, C]; act
    ett_view y;             // add  [C]; acc
} ett_col_sum_args;
ETT_API int64_t ett_col_sum_workspace(const ett_col_sum_args* args);
ETT_API int32_t ett_col_sum(const ett_col_sum_args* args, const ett_launch* launch);

/* ---- convolution --------------------------------------------------------------------------------------- */

/* Two-dimensional convolution; the size of y determines the padding at the bottom and on the right.
   y[b,i,j,o] = bias[o] + residual[b,i,j,o] + sum_{u,v,c} a[b, i*stride + u - pad_top, j*stride + v - pad_left, c]
   w[o,u,v,c], where a is x, or with statistics SiLU((x - mean) * rstd * gamma + beta) rounded to act; a is 0 outside
   of the image. y is rounded once; y_mean and y_rstd are the statistics of a GroupNorm of the rounded y over J
   groups. */
typedef struct ett_conv2d_fwd_args {
    ett_view x;             // in   [B, H, W, C]; act
    ett_view mean;          // in?  [B, G]; acc; without gaps; G divides C
    ett_view rstd;          // in?  [B, G]; acc; without gaps; with mean
    ett_view gamma;         // in?  [C]; act; with mean
    ett_view beta;          // in?  [C]; act; with mean
    ett_view w;             // in   [O, kh, kw, C]; act
    ett_view bias;          // in?  [O]; act
    ett_view residual;      // in?  [B, H', W', O]; act
    ett_view y;             // out  [B, H', W', O]; act
    ett_view y_mean;        // out? [B, J]; acc; without gaps; J divides O
    ett_view y_rstd;        // out? [B, J]; acc; without gaps; with y_mean
    double eps;             //      added to the variance of y; if y_mean
    int64_t stride;         //      step between outputs; at least 1; below 268435456
    int64_t pad_top;        //      zero rows above; below 268435456
    int64_t pad_left;       //      zero columns to the left; below 268435456
} ett_conv2d_fwd_args;
ETT_API int64_t ett_conv2d_fwd_workspace(const ett_conv2d_fwd_args* args);
ETT_API int32_t ett_conv2d_fwd(const ett_conv2d_fwd_args* args, const ett_launch* launch);

/* Gradient of conv2d_fwd for its input; with x, through SiLU and the GroupNorm and its statistics, plus skip. The
   gradient of the GroupNorm's output is rounded to act on the way. */
typedef struct ett_conv2d_bwd_data_args {
    ett_view dy;            // in   [B, H', W', O]; act
    ett_view w;             // in   [O, kh, kw, C]; act
    ett_view bias;          // in?  [C]; act; added to dx, which then is a transposed convolution of dy
    ett_view x;             // in?  [B, H, W, C]; act
    ett_view mean;          // in?  [B, G]; acc; without gaps; with x; G divides C
    ett_view rstd;          // in?  [B, G]; acc; without gaps; with x
    ett_view gamma;         // in?  [C]; act; with x
    ett_view beta;          // in?  [C]; act; with x
    ett_view skip;          // in?  [B, H, W, C]; act; only with x
    ett_view dx;            // out  [B, H, W, C]; act
    ett_view dgamma;        // add? [C]; acc; only with x
    ett_view dbeta;         // add? [C]; acc; only with x
    int64_t stride;         //      as in the forward; at least 1; below 268435456
    int64_t pad_top;        //      as in the forward; below 268435456
    int64_t pad_left;       //      as in the forward; below 268435456
} ett_conv2d_bwd_data_args;
ETT_API int64_t ett_conv2d_bwd_data_workspace(const ett_conv2d_bwd_data_args* args);
ETT_API int32_t ett_conv2d_bwd_data(const ett_conv2d_bwd_data_args* args, const ett_launch* launch);

/* Gradient of conv2d_fwd for weights and bias; with statistics, x is normalised again. */
typedef struct ett_conv2d_bwd_weight_args {
    ett_view x;             // in   [B, H, W, C]; act
    ett_view mean;          // in?  [B, G]; acc; without gaps; G divides C
    ett_view rstd;          // in?  [B, G]; acc; without gaps; with mean
    ett_view gamma;         // in?  [C]; act; with mean
    ett_view beta;          // in?  [C]; act; with mean
    ett_view dy;            // in   [B, H', W', O]; act
    ett_view dw;            // add  [O, kh, kw, C]; acc
    ett_view db;            // add? [O]; acc
    int64_t stride;         //      as in the forward; at least 1; below 268435456
    int64_t pad_top;        //      as in the forward; below 268435456
    int64_t pad_left;       //      as in the forward; below 268435456
} ett_conv2d_bwd_weight_args;
ETT_API int64_t ett_conv2d_bwd_weight_workspace(const ett_conv2d_bwd_weight_args* args);
ETT_API int32_t ett_conv2d_bwd_weight(const ett_conv2d_bwd_weight_args* args, const ett_launch* launch);

/* The weights of the transposed convolution of stride 2 and padding 1, conv2d_bwd_data, that equals upsample2x_fwd and
   then the 3x3 convolution of padding 1 by w: v[c,t,s,o] is the sum of w[o,i,j,c] over i in I(t) and j in I(s), with
   I(0) = {2}, I(1) = {1, 2}, I(2) = {0, 1} and I(3) = {0}. */
typedef struct ett_upsample2x_weights_fwd_args {
    ett_view w;             // in   [O, 3, 3, C]; act
    ett_view v;             // out  [C, 4, 4, O]; act
} ett_upsample2x_weights_fwd_args;
ETT_API int64_t ett_upsample2x_weights_fwd_workspace(const ett_upsample2x_weights_fwd_args* args);
ETT_API int32_t ett_upsample2x_weights_fwd(const ett_upsample2x_weights_fwd_args* args, const ett_launch* launch);

/* Gradient of upsample2x_weights_fwd: every element of dw gets the sum of four elements of dv. */
typedef struct ett_upsample2x_weights_bwd_args {
    ett_view dv;            // in   [C, 4, 4, O]; acc
    ett_view dw;            // add  [O, 3, 3, C]; acc
} ett_upsample2x_weights_bwd_args;
ETT_API int64_t ett_upsample2x_weights_bwd_workspace(const ett_upsample2x_weights_bwd_args* args);
ETT_API int32_t ett_upsample2x_weights_bwd(const ett_upsample2x_weights_bwd_args* args, const ett_launch* launch);

/* y[b, i, j, c] = x[b, i/2, j/2, c]: nearest-neighbour upsampling by two. */
typedef struct ett_upsample2x_fwd_args {
    ett_view x;             // in   [B, H, W, C]; act
    ett_view y;             // out  [B, 2H, 2W, C]; act
} ett_upsample2x_fwd_args;
ETT_API int64_t ett_upsample2x_fwd_workspace(const ett_upsample2x_fwd_args* args);
ETT_API int32_t ett_upsample2x_fwd(const ett_upsample2x_fwd_args* args, const ett_launch* launch);

/* Gradient of upsample2x_fwd: each element is the sum of four. */
typedef struct ett_upsample2x_bwd_args {
    ett_view dy;            // in   [B, 2H, 2W, C]; act
    ett_view dx;            // out  [B, H, W, C]; act
} ett_upsample2x_bwd_args;
ETT_API int64_t ett_upsample2x_bwd_workspace(const ett_upsample2x_bwd_args* args);
ETT_API int32_t ett_upsample2x_bwd(const ett_upsample2x_bwd_args* args, const ett_launch* launch);

/* 2x2 maximum, stride 2; an odd last row or column is dropped. */
typedef struct ett_max_pool2x2_fwd_args {
    ett_view x;             // in   [B, H, W, C]; act
    ett_view y;             // out  [B, H/2, W/2, C]; act
} ett_max_pool2x2_fwd_args;
ETT_API int64_t ett_max_pool2x2_fwd_workspace(const ett_max_pool2x2_fwd_args* args);
ETT_API int32_t ett_max_pool2x2_fwd(const ett_max_pool2x2_fwd_args* args, const ett_launch* launch);

/* Gradient of max_pool2x2_fwd; ties go to the first element in row-major order, dropped rows and columns get
   0. */
typedef struct ett_max_pool2x2_bwd_args {
    ett_view dy;            // in   [B, H/2, W/2, C]; act
    ett_view x;             // in   [B, H, W, C]; act
    ett_view dx;            // out  [B, H, W, C]; act
} ett_max_pool2x2_bwd_args;
ETT_API int64_t ett_max_pool2x2_bwd_workspace(const ett_max_pool2x2_bwd_args* args);
ETT_API int32_t ett_max_pool2x2_bwd(const ett_max_pool2x2_bwd_args* args, const ett_launch* launch);

/* ---- norms --------------------------------------------------------------------------------------------- */

/* GroupNorm over G groups of channels with an optional SiLU: y = f((x - mean) * rstd * w + b) with
   rstd = 1 / sqrt(var + eps), biased variance, f = SiLU or the identity. */
typedef struct ett_group_norm_fwd_args {
    ett_view x;             // in   [B, H, W, C]; act
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view y;             // out  [B, H, W, C]; act
    ett_view mean;          // out  [B, G]; acc; without gaps; G divides C
    ett_view rstd;          // out  [B, G]; acc; without gaps
    double eps;             //      added to the variance
    int32_t silu;           //      apply SiLU
} ett_group_norm_fwd_args;
ETT_API int64_t ett_group_norm_fwd_workspace(const ett_group_norm_fwd_args* args);
ETT_API int32_t ett_group_norm_fwd(const ett_group_norm_fwd_args* args, const ett_launch* launch);

/* Statistics of a GroupNorm, for kernels that normalise what they read. */
typedef struct ett_group_norm_stats_args {
    ett_view x;             // in   [B, H, W, C]; act
    ett_view mean;          // out  [B, G]; acc; without gaps; G divides C
    ett_view rstd;          // out  [B, G]; acc; without gaps
    double eps;             //      added to the variance
} ett_group_norm_stats_args;
ETT_API int64_t ett_group_norm_stats_workspace(const ett_group_norm_stats_args* args);
ETT_API int32_t ett_group_norm_stats(const ett_group_norm_stats_args* args, const ett_launch* launch);

/* Gradient of group_norm_fwd; the normalised values are recomputed from x. */
typedef struct ett_group_norm_bwd_args {
    ett_view dy;            // in   [B, H, W, C]; act
    ett_view x;             // in   [B, H, W, C]; act
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view mean;          // in   [B, G]; acc; without gaps; G divides C
    ett_view rstd;          // in   [B, G]; acc; without gaps
    ett_view dx;            // out  [B, H, W, C]; act
    ett_view dw;            // add? [C]; acc
    ett_view db;            // add? [C]; acc
    int32_t silu;           //      SiLU was applied
} ett_group_norm_bwd_args;
ETT_API int64_t ett_group_norm_bwd_workspace(const ett_group_norm_bwd_args* args);
ETT_API int32_t ett_group_norm_bwd(const ett_group_norm_bwd_args* args, const ett_launch* launch);

/* s = x + residual (or x), y = s * rstd * w with rstd = 1 / sqrt(mean(s^2) + eps). s is rounded to act before
   the statistics are computed, s * rstd before it is multiplied by w. */
typedef struct ett_rms_norm_fwd_args {
    ett_view x;             // in   [N, C]; act
    ett_view residual;      // in?  [N, C]; act
    ett_view w;             // in   [C]; act
    ett_view sum;           // out? [N, C]; act; with residual; the sum
    ett_view y;             // out  [N, C]; act
    ett_view rstd;          // out  [N]; acc
    double eps;             //      added to the mean square
} ett_rms_norm_fwd_args;
ETT_API int64_t ett_rms_norm_fwd_workspace(const ett_rms_norm_fwd_args* args);
ETT_API int32_t ett_rms_norm_fwd(const ett_rms_norm_fwd_args* args, const ett_launch* launch);

/* Gradient of rms_norm_fwd for s: dx = d(norm)/ds . dy + dsum. It is the gradient of x and of residual. */
typedef struct ett_rms_norm_bwd_args {
    ett_view dy;            // in   [N, C]; act
    ett_view dsum;          // in?  [N, C]; act; gradient of sum from its other uses
    ett_view x;             // in   [N, C]; act; s of the forward
    ett_view w;             // in   [C]; act
    ett_view rstd;          // in   [N]; acc
    ett_view dx;            // out  [N, C]; act
    ett_view dw;            // add? [C]; acc
} ett_rms_norm_bwd_args;
ETT_API int64_t ett_rms_norm_bwd_workspace(const ett_rms_norm_bwd_args* args);
ETT_API int32_t ett_rms_norm_bwd(const ett_rms_norm_bwd_args* args, const ett_launch* launch);

/* LayerNorm over the last dimension: y = (x - mean) * rstd * w + b with rstd = 1 / sqrt(var + eps), biased
   variance. */
typedef struct ett_layer_norm_fwd_args {
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view y;             // out  [N, C]; act
    ett_view mean;          // out  [N]; acc
    ett_view rstd;          // out  [N]; acc
    double eps;             //      added to the variance
} ett_layer_norm_fwd_args;
ETT_API int64_t ett_layer_norm_fwd_workspace(const ett_layer_norm_fwd_args* args);
ETT_API int32_t ett_layer_norm_fwd(const ett_layer_norm_fwd_args* args, const ett_launch* launch);

/* Gradient of layer_norm_fwd. */
typedef struct ett_layer_norm_bwd_args {
    ett_view dy;            // in   [N, C]; act
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [C]; act
    ett_view mean;          // in   [N]; acc
    ett_view rstd;          // in   [N]; acc
    ett_view dx;            // out  [N, C]; act
    ett_view dw;            // add? [C]; acc
    ett_view db;            // add? [C]; acc
} ett_layer_norm_bwd_args;
ETT_API int64_t ett_layer_norm_bwd_workspace(const ett_layer_norm_bwd_args* args);
ETT_API int32_t ett_layer_norm_bwd(const ett_layer_norm_bwd_args* args, const ett_launch* launch);

/* BatchNorm with the statistics of this batch, then LeakyReLU (slope 1: none):
   y = leaky((x - mean) / sqrt(var + eps) * w + b), biased variance. */
typedef struct ett_batch_norm_fwd_args {
    ett_view x;             // in   [N, C]; act; rows are all pixels of the batch
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view y;             // out  [N, C]; act
    ett_view mean;          // out  [C]; acc
    ett_view var;           // out  [C]; acc; biased
    double eps;             //      added to the variance
    double slope;           //      slope below zero
} ett_batch_norm_fwd_args;
ETT_API int64_t ett_batch_norm_fwd_workspace(const ett_batch_norm_fwd_args* args);
ETT_API int32_t ett_batch_norm_fwd(const ett_batch_norm_fwd_args* args, const ett_launch* launch);

/* Gradient of batch_norm_fwd, including the gradient through the statistics. */
typedef struct ett_batch_norm_bwd_args {
    ett_view dy;            // in   [N, C]; act
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view mean;          // in   [C]; acc
    ett_view var;           // in   [C]; acc; biased
    ett_view dx;            // out  [N, C]; act
    ett_view dw;            // add? [C]; acc
    ett_view db;            // add? [C]; acc
    double eps;             //      as in the forward
    double slope;           //      as in the forward
} ett_batch_norm_bwd_args;
ETT_API int64_t ett_batch_norm_bwd_workspace(const ett_batch_norm_bwd_args* args);
ETT_API int32_t ett_batch_norm_bwd(const ett_batch_norm_bwd_args* args, const ett_launch* launch);

/* BatchNorm with given statistics, such as the running ones, then LeakyReLU (slope 1: none): y = leaky((x -
   mean) * rstd * w + b) with rstd = 1 / sqrt(var + eps). */
typedef struct ett_batch_norm_eval_fwd_args {
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view mean;          // in   [C]; acc
    ett_view var;           // in   [C]; acc
    ett_view y;             // out  [N, C]; act
    double eps;             //      added to the variance
    double slope;           //      slope below zero
} ett_batch_norm_eval_fwd_args;
ETT_API int64_t ett_batch_norm_eval_fwd_workspace(const ett_batch_norm_eval_fwd_args* args);
ETT_API int32_t ett_batch_norm_eval_fwd(const ett_batch_norm_eval_fwd_args* args, const ett_launch* launch);

/* Gradient of batch_norm_eval_fwd; the statistics are constants. */
typedef struct ett_batch_norm_eval_bwd_args {
    ett_view dy;            // in   [N, C]; act
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view mean;          // in   [C]; acc
    ett_view var;           // in   [C]; acc
    ett_view dx;            // out  [N, C]; act
    ett_view dw;            // add? [C]; acc
    ett_view db;            // add? [C]; acc
    double eps;             //      as in the forward
    double slope;           //      as in the forward
} ett_batch_norm_eval_bwd_args;
ETT_API int64_t ett_batch_norm_eval_bwd_workspace(const ett_batch_norm_eval_bwd_args* args);
ETT_API int32_t ett_batch_norm_eval_bwd(const ett_batch_norm_eval_bwd_args* args, const ett_launch* launch);

/* Statistics of R sets of equally many rows as those of all their rows: mean = sum_r means[r] / R,
   var = sum_r (vars[r] + (means[r] - mean)^2) / R. */
typedef struct ett_batch_norm_merge_args {
    ett_view means;         // in   [R, C]; acc
    ett_view vars;          // in   [R, C]; acc; biased
    ett_view mean;          // out  [C]; acc
    ett_view var;           // out  [C]; acc; biased
} ett_batch_norm_merge_args;
ETT_API int64_t ett_batch_norm_merge_workspace(const ett_batch_norm_merge_args* args);
ETT_API int32_t ett_batch_norm_merge(const ett_batch_norm_merge_args* args, const ett_launch* launch);

/* dx of batch_norm_bwd for some of the rows that the statistics were computed from, with sums over all of them:
   dx = rstd * w * (g - sum(g) / rows - xhat * sum(g * xhat) / rows), where xhat = (x - mean) * rstd and g is dy times
   the derivative of LeakyReLU at xhat * w + b. */
typedef struct ett_batch_norm_merged_bwd_args {
    ett_view dy;            // in   [N, C]; act
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [C]; act
    ett_view b;             // in   [C]; act
    ett_view mean;          // in   [C]; acc
    ett_view var;           // in   [C]; acc; biased
    ett_view sums;          // in   [2, C]; acc; without gaps; over all rows: db, then dw of batch_norm_eval_bwd
    ett_view dx;            // out  [N, C]; act
    int64_t rows;           //      number of all rows; at least 1
    double eps;             //      as in the forward
    double slope;           //      as in the forward
} ett_batch_norm_merged_bwd_args;
ETT_API int64_t ett_batch_norm_merged_bwd_workspace(const ett_batch_norm_merged_bwd_args* args);
ETT_API int32_t ett_batch_norm_merged_bwd(const ett_batch_norm_merged_bwd_args* args, const ett_launch* launch);

/* running = (1 - momentum) * running + momentum * batch, with the unbiased estimate of the variance.
   A channel whose batch statistics are not finite keeps its running ones. */
typedef struct ett_batch_norm_running_args {
    ett_view mean;          // in   [C]; acc
    ett_view var;           // in   [C]; acc; biased
    ett_view running_mean;  // add  [C]; acc; updated
    ett_view running_var;   // add  [C]; acc; updated
    int64_t rows;           //      rows that the statistics were computed from
    double momentum;        //      weight of the new value
} ett_batch_norm_running_args;
ETT_API int64_t ett_batch_norm_running_workspace(const ett_batch_norm_running_args* args);
ETT_API int32_t ett_batch_norm_running(const ett_batch_norm_running_args* args, const ett_launch* launch);

/* y = x / max(|x|, eps) row by row. The norm of a row with NaN is eps. */
typedef struct ett_l2_norm_fwd_args {
    ett_view x;             // in   [N, D]; act
    ett_view y;             // out  [N, D]; act
    ett_view norm;          // out  [N]; acc; max(|x|, eps)
    double eps;             //      lower bound of the norm
} ett_l2_norm_fwd_args;
ETT_API int64_t ett_l2_norm_fwd_workspace(const ett_l2_norm_fwd_args* args);
ETT_API int32_t ett_l2_norm_fwd(const ett_l2_norm_fwd_args* args, const ett_launch* launch);

/* Gradient of l2_norm_fwd: (dy - y (y . dy)) / norm, or dy / norm where the norm was raised to eps.
   Exactly one of dx and dx_acc is present. */
typedef struct ett_l2_norm_bwd_args {
    ett_view dy;            // in   [N, D]; act or acc
    ett_view x;             // in   [N, D]; act
    ett_view norm;          // in   [N]; acc
    ett_view dx;            // out? [N, D]; act
    ett_view dx_acc;        // add? [N, D]; acc; unless dx
    double eps;             //      as in the forward
} ett_l2_norm_bwd_args;
ETT_API int64_t ett_l2_norm_bwd_workspace(const ett_l2_norm_bwd_args* args);
ETT_API int32_t ett_l2_norm_bwd(const ett_l2_norm_bwd_args* args, const ett_launch* launch);

/* ---- pointwise ----------------------------------------------------------------------------------------- */

/* y = f(x). */
typedef struct ett_unary_fwd_args {
    ett_view x;             // in   [..]; act
    ett_view y;             // out  [..]; act
    ett_unary f;            //      the function
} ett_unary_fwd_args;
ETT_API int64_t ett_unary_fwd_workspace(const ett_unary_fwd_args* args);
ETT_API int32_t ett_unary_fwd(const ett_unary_fwd_args* args, const ett_launch* launch);

/* dx = dy * f'(x). */
typedef struct ett_unary_bwd_args {
    ett_view dy;            // in   [..]; act
    ett_view x;             // in   [..]; act
    ett_view dx;            // out  [..]; act
    ett_unary f;            //      the function
} ett_unary_bwd_args;
ETT_API int64_t ett_unary_bwd_workspace(const ett_unary_bwd_args* args);
ETT_API int32_t ett_unary_bwd(const ett_unary_bwd_args* args, const ett_launch* launch);

/* y = a + b. */
typedef struct ett_add_args {
    ett_view a;             // in   [..]; act
    ett_view b;             // in   [..]; act
    ett_view y;             // out  [..]; act
} ett_add_args;
ETT_API int64_t ett_add_workspace(const ett_add_args* args);
ETT_API int32_t ett_add(const ett_add_args* args, const ett_launch* launch);

/* y += x; the element types may differ. */
typedef struct ett_accumulate_args {
    ett_view x;             // in   [N, C]; any float
    ett_view y;             // add  [N, C]; any float
} ett_accumulate_args;
ETT_API int64_t ett_accumulate_workspace(const ett_accumulate_args* args);
ETT_API int32_t ett_accumulate(const ett_accumulate_args* args, const ett_launch* launch);

/* y = x, rounded to the type of y; both may be column slices. */
typedef struct ett_cast_args {
    ett_view x;             // in   [N, C]; any float
    ett_view y;             // out  [N, C]; any float
} ett_cast_args;
ETT_API int64_t ett_cast_workspace(const ett_cast_args* args);
ETT_API int32_t ett_cast(const ett_cast_args* args, const ett_launch* launch);

/* y = x / 127.5 - 1: the bytes of pictures, as values in [-1, 1]. */
typedef struct ett_scale_bytes_args {
    ett_view x;             // in   [..]; u8
    ett_view y;             // out  [..]; act
} ett_scale_bytes_args;
ETT_API int64_t ett_scale_bytes_workspace(const ett_scale_bytes_args* args);
ETT_API int32_t ett_scale_bytes(const ett_scale_bytes_args* args, const ett_launch* launch);

/* y = value. */
typedef struct ett_fill_args {
    ett_view y;             // out  [..]; any type
    double value;           //      the value
} ett_fill_args;
ETT_API int64_t ett_fill_workspace(const ett_fill_args* args);
ETT_API int32_t ett_fill(const ett_fill_args* args, const ett_launch* launch);

/* y = (x - shift) / scale, channel by channel. */
typedef struct ett_channel_affine_fwd_args {
    ett_view x;             // in   [N, C]; act
    ett_view shift;         // in   [C]; act
    ett_view scale;         // in   [C]; act
    ett_view y;             // out  [N, C]; act
} ett_channel_affine_fwd_args;
ETT_API int64_t ett_channel_affine_fwd_workspace(const ett_channel_affine_fwd_args* args);
ETT_API int32_t ett_channel_affine_fwd(const ett_channel_affine_fwd_args* args, const ett_launch* launch);

/* dx = dy / scale. */
typedef struct ett_channel_affine_bwd_args {
    ett_view dy;            // in   [N, C]; act
    ett_view scale;         // in   [C]; act
    ett_view dx;            // out  [N, C]; act
} ett_channel_affine_bwd_args;
ETT_API int64_t ett_channel_affine_bwd_workspace(const ett_channel_affine_bwd_args* args);
ETT_API int32_t ett_channel_affine_bwd(const ett_channel_affine_bwd_args* args, const ett_launch* launch);

/* y = silu(gate) * up. */
typedef struct ett_swiglu_fwd_args {
    ett_view gate_up;       // in   [N, 2F]; act; gate, then up
    ett_view y;             // out  [N, F]; act
} ett_swiglu_fwd_args;
ETT_API int64_t ett_swiglu_fwd_workspace(const ett_swiglu_fwd_args* args);
ETT_API int32_t ett_swiglu_fwd(const ett_swiglu_fwd_args* args, const ett_launch* launch);

/* Gradient of swiglu_fwd. */
typedef struct ett_swiglu_bwd_args {
    ett_view dy;            // in   [N, F]; act
    ett_view gate_up;       // in   [N, 2F]; act
    ett_view dgate_up;      // out  [N, 2F]; act; may be gate_up
} ett_swiglu_bwd_args;
ETT_API int64_t ett_swiglu_bwd_workspace(const ett_swiglu_bwd_args* args);
ETT_API int32_t ett_swiglu_bwd(const ett_swiglu_bwd_args* args, const ett_launch* launch);

/* Rotary embedding, half-split: in each of the first `heads` heads of D columns, dimensions d and d + D/2 are
   rotated by position * theta^(-2d/D); further columns are copied. The gradient is the inverse rotation. head_dim
   is at most 512. */
typedef struct ett_rope_args {
    ett_view x;             // in   [N, C]; act; C at least heads*head_dim
    ett_view position;      // in   [N]; i32
    ett_view y;             // out  [N, C]; act
    int64_t heads;          //      heads to rotate
    int64_t head_dim;       //      head dimension; even; at least 2
    double theta;           //      base of the angles, which are computed in float32 (float64 for the oracle)
    int32_t inverse;        //      rotate by the negative angles
} ett_rope_args;
ETT_API int64_t ett_rope_workspace(const ett_rope_args* args);
ETT_API int32_t ett_rope(const ett_rope_args* args, const ett_launch* launch);

/* ---- rows ---------------------------------------------------------------------------------------------- */

/* y[n] = table[idx[n]]; a negative index gives a row of zeros. */
typedef struct ett_gather_fwd_args {
    ett_view table;         // in   [R, C]; act
    ett_view idx;           // in   [N]; i32; values below R
    ett_view y;             // out  [N, C]; act
} ett_gather_fwd_args;
ETT_API int64_t ett_gather_fwd_workspace(const ett_gather_fwd_args* args);
ETT_API int32_t ett_gather_fwd(const ett_gather_fwd_args* args, const ett_launch* launch);

/* dtable[idx[n]] += dy[n], in the order of n; negative indices are skipped. */
typedef struct ett_gather_bwd_args {
    ett_view dy;            // in   [N, C]; act
    ett_view idx;           // in   [N]; i32; values below R
    ett_view dtable;        // add  [R, C]; acc
} ett_gather_bwd_args;
ETT_API int64_t ett_gather_bwd_workspace(const ett_gather_bwd_args* args);
ETT_API int32_t ett_gather_bwd(const ett_gather_bwd_args* args, const ett_launch* launch);

/* y[idx[n]] = x[n]; negative indices are skipped, and the other rows of y keep their values. No row has two indices. */
typedef struct ett_put_rows_args {
    ett_view x;             // in   [N, C]; any type
    ett_view idx;           // in   [N]; i32; values below R
    ett_view y;             // add  [R, C]; type of x
} ett_put_rows_args;
ETT_API int64_t ett_put_rows_workspace(const ett_put_rows_args* args);
ETT_API int32_t ett_put_rows(const ett_put_rows_args* args, const ett_launch* launch);

/* y[n] = x[idx[n]], integers instead of rows; a negative index gives -1, and so does a fault. */
typedef struct ett_pick_args {
    ett_view x;             // in   [R]; i32
    ett_view idx;           // in   [N]; i32; values below R
    ett_view y;             // out  [N]; i32
} ett_pick_args;
ETT_API int64_t ett_pick_workspace(const ett_pick_args* args);
ETT_API int32_t ett_pick(const ett_pick_args* args, const ett_launch* launch);

/* x[n] += 1, which wraps: positions, lengths and step counts that a recorded step moves on by itself. Nothing
   changes if norm[1] > 0. */
typedef struct ett_count_up_args {
    ett_view x;             // add  [N]; i32
    ett_view norm;          // in?  [2]; acc; as for adamw: a step that is skipped does not count
} ett_count_up_args;
ETT_API int64_t ett_count_up_workspace(const ett_count_up_args* args);
ETT_API int32_t ett_count_up(const ett_count_up_args* args, const ett_launch* launch);

/* y[n] = n * step: the offsets of sequences of equal length. */
typedef struct ett_arange_args {
    ett_view y;             // out  [N]; i32
    int64_t step;           //      difference between neighbours; the last value has to be below 2^31; at most
                            //      2147483647
} ett_arange_args;
ETT_API int64_t ett_arange_workspace(const ett_arange_args* args);
ETT_API int32_t ett_arange(const ett_arange_args* args, const ett_launch* launch);

/* ---- attention ----------------------------------------------------------------------------------------- */

/* Softmax attention over a flat batch of sequences; query head h reads key/value head h /
   (heads/kv_heads). A causal mask aligns the ends of queries and keys: query i of T attends to keys up to
   i + Tk - T. Rows of k and v outside the sequences are not read. A query that sees no key has y = 0 and lse = 0.
   head_dim is at most 512, heads below 65536. Offsets that descend, leave their tensor or make a sequence longer
   than max_q or max_k are a fault: the sequence then has no keys, or (cu_q) its rows of y and lse are not written. */
typedef struct ett_attention_fwd_args {
    ett_view q;             // in   [N, heads*head_dim]; act
    ett_view k;             // in   [Nk, kv_heads*head_dim]; act
    ett_view v;             // in   [Nk, kv_heads*head_dim]; act
    ett_view cu_q;          // in   [S+1]; i32; values at most N; sequence offsets into N. Rows past the last offset
                            //      are padding: y and lse are 0 there
    ett_view cu_k;          // in   [S+1]; i32; sequence offsets into Nk
    ett_view len_k;         // in?  [S]; i32; keys of each sequence. Sequence s then has the rows [cu_k[s], cu_k[s] +
                            //      len_k[s]) of k and v, as in a cache with free rows after each sequence, and the
                            //      last offset of cu_k is ignored
    ett_view y;             // out  [N, heads*head_dim]; act
    ett_view lse;           // out  [N, heads]; acc; log-sum-exp of the scaled scores
    int64_t heads;          //      query heads
    int64_t kv_heads;       //      key/value heads; divides heads
    int64_t head_dim;       //      head dimension; at least 1
    int64_t max_q;          //      longest query sequence, or more
    int64_t max_k;          //      longest key sequence, or more; with len_k the most keys that a sequence may have, now
                            //      or when a recorded call is replayed
    double scale;           //      factor on the scores
    int32_t causal;         //      mask the future
} ett_attention_fwd_args;
ETT_API int64_t ett_attention_fwd_workspace(const ett_attention_fwd_args* args);
ETT_API int32_t ett_attention_fwd(const ett_attention_fwd_args* args, const ett_launch* launch);

/* Gradient of attention_fwd; probabilities are recomputed from lse. After a fault in the offsets, the rows of dq
   (cu_q) or of dk and dv (cu_k) that the sequence would own are not written. */
typedef struct ett_attention_bwd_args {
    ett_view dy;            // in   [N, heads*head_dim]; act
    ett_view q;             // in   [N, heads*head_dim]; act
    ett_view k;             // in   [Nk, kv_heads*head_dim]; act
    ett_view v;             // in   [Nk, kv_heads*head_dim]; act
    ett_view y;             // in   [N, heads*head_dim]; act; the forward's output
    ett_view lse;           // in   [N, heads]; acc
    ett_view cu_q;          // in   [S+1]; i32; values at most N; as in the forward
    ett_view cu_k;          // in   [S+1]; i32; as in the forward
    ett_view dq;            // out  [N, heads*head_dim]; act; 0 in padding rows
    ett_view dk;            // out  [Nk, kv_heads*head_dim]; act; 0 in padding rows
    ett_view dv;            // out  [Nk, kv_heads*head_dim]; act; 0 in padding rows
    int64_t heads;          //      as in the forward
    int64_t kv_heads;       //      as in the forward; divides heads
    int64_t head_dim;       //      as in the forward; at least 1
    int64_t max_q;          //      as in the forward
    int64_t max_k;          //      as in the forward
    double scale;           //      as in the forward
    int32_t causal;         //      as in the forward
} ett_attention_bwd_args;
ETT_API int64_t ett_attention_bwd_workspace(const ett_attention_bwd_args* args);
ETT_API int32_t ett_attention_bwd(const ett_attention_bwd_args* args, const ett_launch* launch);

/* ---- losses -------------------------------------------------------------------------------------------- */

/* Cross-entropy of a linear layer that never stores its logits: loss = scale * sum_n (lse_n - x_n .
   w[target_n]) over rows with target >= 0; rows with any negative target, such as -1 or -100, are ignored. Logits
   are computed one tile at a time. loss is overwritten here and in ibq_losses and vq_losses; the other losses are
   added, so that they can be summed over tensors. In all of them scale is read on the device. */
typedef struct ett_linear_xent_fwd_args {
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [V, C]; act
    ett_view target;        // in   [N]; i32; values below V; -1: not supervised
    ett_view scale;         // in   [1]; acc; one over the supervised rows of the whole batch
    ett_view lse;           // out  [N]; acc; log-sum-exp, 0 in unsupervised rows
    ett_view loss;          // out  [1]; acc
} ett_linear_xent_fwd_args;
ETT_API int64_t ett_linear_xent_fwd_workspace(const ett_linear_xent_fwd_args* args);
ETT_API int32_t ett_linear_xent_fwd(const ett_linear_xent_fwd_args* args, const ett_launch* launch);

/* Gradient of linear_xent_fwd; logits are recomputed tile by tile. */
typedef struct ett_linear_xent_bwd_args {
    ett_view x;             // in   [N, C]; act
    ett_view w;             // in   [V, C]; act
    ett_view target;        // in   [N]; i32; values below V
    ett_view scale;         // in   [1]; acc
    ett_view lse;           // in   [N]; acc
    ett_view g;             // in   [1]; acc; gradient of the loss
    ett_view dx;            // out  [N, C]; act; 0 in unsupervised rows
    ett_view dw;            // add? [V, C]; acc
} ett_linear_xent_bwd_args;
ETT_API int64_t ett_linear_xent_bwd_workspace(const ett_linear_xent_bwd_args* args);
ETT_API int32_t ett_linear_xent_bwd(const ett_linear_xent_bwd_args* args, const ett_launch* launch);

/* Cross-entropy of stored logits: loss += scale * sum_n weight_n (lse_n - logits[n, target_n]) over rows with
   target >= 0, where lse_n is the log-sum-exp of row n. */
typedef struct ett_xent_fwd_args {
    ett_view logits;        // in   [N, V]; act
    ett_view target;        // in   [N]; i32; values below V; negative: the row is ignored
    ett_view weight;        // in?  [N]; acc; weights of the rows, 1 if absent
    ett_view scale;         // in   [1]; acc; factor on the sum, such as one over the rows of the whole batch
    ett_view lse;           // out  [N]; acc; log-sum-exp, 0 in ignored rows
    ett_view loss;          // add  [1]; acc
} ett_xent_fwd_args;
ETT_API int64_t ett_xent_fwd_workspace(const ett_xent_fwd_args* args);
ETT_API int32_t ett_xent_fwd(const ett_xent_fwd_args* args, const ett_launch* launch);

/* Gradient of xent_fwd: dlogits = g * scale * weight_n * (softmax - onehot). */
typedef struct ett_xent_bwd_args {
    ett_view logits;        // in   [N, V]; act
    ett_view target;        // in   [N]; i32; values below V
    ett_view weight;        // in?  [N]; acc; as in the forward
    ett_view scale;         // in   [1]; acc; as in the forward
    ett_view lse;           // in   [N]; acc
    ett_view g;             // in   [1]; acc; gradient of the loss
    ett_view dlogits;       // out  [N, V]; act; may be logits; 0 in ignored rows
} ett_xent_bwd_args;
ETT_API int64_t ett_xent_bwd_workspace(const ett_xent_bwd_args* args);
ETT_API int32_t ett_xent_bwd(const ett_xent_bwd_args* args, const ett_launch* launch);

/* loss += scale * sum |a - b|. */
typedef struct ett_l1_fwd_args {
    ett_view a;             // in   [..]; act
    ett_view b;             // in   [..]; act
    ett_view scale;         // in   [1]; acc; factor on the sum, such as one over the elements of the whole batch
    ett_view loss;          // add  [1]; acc
} ett_l1_fwd_args;
ETT_API int64_t ett_l1_fwd_workspace(const ett_l1_fwd_args* args);
ETT_API int32_t ett_l1_fwd(const ett_l1_fwd_args* args, const ett_launch* launch);

/* da = g * scale * sign(a - b), 0 where equal. */
typedef struct ett_l1_bwd_args {
    ett_view a;             // in   [..]; act
    ett_view b;             // in   [..]; act
    ett_view scale;         // in   [1]; acc; as in the forward
    ett_view g;             // in   [1]; acc
    ett_view da;            // out  [..]; act
} ett_l1_bwd_args;
ETT_API int64_t ett_l1_bwd_workspace(const ett_l1_bwd_args* args);
ETT_API int32_t ett_l1_bwd(const ett_l1_bwd_args* args, const ett_launch* launch);

/* One layer of LPIPS: loss += factor * scale * sum_p sum_c w[c] (n0 - n1)^2 over pixels p, with n = f /
   (sqrt(sum_c f^2) + eps). */
typedef struct ett_lpips_fwd_args {
    ett_view f0;            // in   [P, C]; act; features of the reference
    ett_view f1;            // in   [P, C]; act; features of the reconstruction
    ett_view w;             // in   [C]; act
    ett_view scale;         // in   [1]; acc; factor on the sum, such as one over the pictures of the whole batch
    ett_view loss;          // add  [1]; acc
    double eps;             //      added to the norm
    double factor;          //      constant factor on the sum, such as one over the pixels of a picture
} ett_lpips_fwd_args;
ETT_API int64_t ett_lpips_fwd_workspace(const ett_lpips_fwd_args* args);
ETT_API int32_t ett_lpips_fwd(const ett_lpips_fwd_args* args, const ett_launch* launch);

/* Gradient of lpips_fwd for f1; 0 in pixels whose features are all 0. */
typedef struct ett_lpips_bwd_args {
    ett_view f0;            // in   [P, C]; act
    ett_view f1;            // in   [P, C]; act
    ett_view w;             // in   [C]; act
    ett_view scale;         // in   [1]; acc; as in the forward
    ett_view g;             // in   [1]; acc
    ett_view df1;           // out  [P, C]; act
    double eps;             //      as in the forward
    double factor;          //      as in the forward
} ett_lpips_bwd_args;
ETT_API int64_t ett_lpips_bwd_workspace(const ett_lpips_bwd_args* args);
ETT_API int32_t ett_lpips_bwd(const ett_lpips_bwd_args* args, const ett_launch* launch);

/* Generator's adversarial loss: loss += scale * sum_b softplus(-mean_p x[b, p]). */
typedef struct ett_gan_generator_fwd_args {
    ett_view x;             // in   [B, P]; act; P at least 1; patch logits of each image
    ett_view scale;         // in   [1]; acc; factor on the sum, such as one over the pictures of the whole batch
    ett_view loss;          // add  [1]; acc
} ett_gan_generator_fwd_args;
ETT_API int64_t ett_gan_generator_fwd_workspace(const ett_gan_generator_fwd_args* args);
ETT_API int32_t ett_gan_generator_fwd(const ett_gan_generator_fwd_args* args, const ett_launch* launch);

/* Gradient of gan_generator_fwd. */
typedef struct ett_gan_generator_bwd_args {
    ett_view x;             // in   [B, P]; act; P at least 1
    ett_view scale;         // in   [1]; acc; as in the forward
    ett_view g;             // in   [1]; acc
    ett_view dx;            // out  [B, P]; act
} ett_gan_generator_bwd_args;
ETT_API int64_t ett_gan_generator_bwd_workspace(const ett_gan_generator_bwd_args* args);
ETT_API int32_t ett_gan_generator_bwd(const ett_gan_generator_bwd_args* args, const ett_launch* launch);

/* Hinge loss: loss += factor * scale * sum relu(1 - x) for real logits, relu(1 + x) for fake ones. */
typedef struct ett_hinge_fwd_args {
    ett_view x;             // in   [..]; act
    ett_view scale;         // in   [1]; acc; factor on the sum, such as one over the patch logits of the whole batch
    ett_view loss;          // add  [1]; acc
    int32_t real;           //      1: the logits of real pictures, 0: of fake ones
    double factor;          //      constant factor on the sum
} ett_hinge_fwd_args;
ETT_API int64_t ett_hinge_fwd_workspace(const ett_hinge_fwd_args* args);
ETT_API int32_t ett_hinge_fwd(const ett_hinge_fwd_args* args, const ett_launch* launch);

/* Gradient of hinge_fwd; 0 at the kink. */
typedef struct ett_hinge_bwd_args {
    ett_view x;             // in   [..]; act
    ett_view scale;         // in   [1]; acc; as in the forward
    ett_view g;             // in   [1]; acc
    ett_view dx;            // out  [..]; act
    int32_t real;           //      as in the forward
    double factor;          //      as in the forward
} ett_hinge_bwd_args;
ETT_API int64_t ett_hinge_bwd_workspace(const ett_hinge_bwd_args* args);
ETT_API int32_t ett_hinge_bwd(const ett_hinge_bwd_args* args, const ett_launch* launch);

/* Updated LeCAM averages: out = decay * ema + (1 - decay) * (mean(real), mean(fake)). A mean
   that is not finite leaves its average unchanged. */
typedef struct ett_lecam_update_args {
    ett_view real;          // in   [R, P]; act; R at least 1; P at least 1; any shape
    ett_view fake;          // in   [F, Q]; act; F at least 1; Q at least 1; any shape
    ett_view ema;           // in   [2]; acc; averages of the real and the fake logits
    ett_view out;           // out  [2]; acc
    double decay;           //      weight of the old value
} ett_lecam_update_args;
ETT_API int64_t ett_lecam_update_workspace(const ett_lecam_update_args* args);
ETT_API int32_t ett_lecam_update(const ett_lecam_update_args* args, const ett_launch* launch);

/* LeCAM regularizer: loss += scale * (sum relu(real - ema[1])^2 + sum relu(ema[0] - fake)^2). */
typedef struct ett_lecam_fwd_args {
    ett_view real;          // in   [R, P]; act; any shape
    ett_view fake;          // in   [F, Q]; act; any shape
    ett_view ema;           // in   [2]; acc; averages that include this batch
    ett_view scale;         // in   [1]; acc; factor on the sums: one over the patch logits of the whole batch
    ett_view loss;          // add  [1]; acc
} ett_lecam_fwd_args;
ETT_API int64_t ett_lecam_fwd_workspace(const ett_lecam_fwd_args* args);
ETT_API int32_t ett_lecam_fwd(const ett_lecam_fwd_args* args, const ett_launch* launch);

/* Gradient of lecam_fwd; the averages are constants. */
typedef struct ett_lecam_bwd_args {
    ett_view real;          // in   [R, P]; act; any shape
    ett_view fake;          // in   [F, Q]; act; any shape
    ett_view ema;           // in   [2]; acc
    ett_view scale;         // in   [1]; acc; as in the forward
    ett_view g;             // in   [1]; acc
    ett_view dreal;         // out  [R, P]; act
    ett_view dfake;         // out  [F, Q]; act
} ett_lecam_bwd_args;
ETT_API int64_t ett_lecam_bwd_workspace(const ett_lecam_bwd_args* args);
ETT_API int32_t ett_lecam_bwd(const ett_lecam_bwd_args* args, const ett_launch* launch);

/* Samples an index from each row of logits, the same one on every device (docs/sampling.md). If `without` is
   present, the logits are without + guidance * (logits - without). They are divided by temperature; a
   temperature of 0 takes the largest. top_k keeps the k largest, the first of equal ones; top_p keeps the
   largest of these that together reach this probability. The random number depends on seed, number and
   position; the kernel increments position, so that a decoding loop needs no value from the host. A row that
   contains NaN, or whose largest logit is not finite, gives -1. */
typedef struct ett_sample_args {
    ett_view logits;        // in   [B, V]; act
    ett_view without;       // in?  [B, V]; act; logits without the prompt
    ett_view number;        // in   [B]; i32; numbers of the sequences
    ett_view position;      // add  [B]; i32; samples already drawn for each sequence; updated
    ett_view idx;           // out  [B]; i32
    double temperature;     //      divides the logits; 0: take the largest; finite; at least 0
    int64_t top_k;          //      number of candidates; 0: all
    double top_p;           //      total probability of the candidates; above 0; at most 1
    double guidance;        //      factor on logits - without; finite; if without
    uint64_t seed;          //      seed of the random numbers
} ett_sample_args;
ETT_API int64_t ett_sample_workspace(const ett_sample_args* args);
ETT_API int32_t ett_sample(const ett_sample_args* args, const ett_launch* launch);

/* ---- quantizer (docs/quantizer.md) --------------------------------------------------------------------- */

/* The best code of each token. Ties go to the smallest index; NaN ranks below all numbers; a row of NaN gives
   0 and the score -infinity. The score is z.e, for ETT_METRIC_L2 z.e - |e|^2 / 2; on Hopper
   that of f32 has an error below 2^-15 |z| |e|. M and K are below 2^31, D is any number. */
typedef struct ett_nearest_args {
    ett_view z;             // in   [M, D]; act
    ett_view e;             // in   [K, D]; act; K at least 1
    ett_view idx;           // out  [M]; i32
    ett_view score;         // out? [M]; acc; score of the best code
    ett_view bad;           // add? [1]; acc; count of rows without a finite score
    int32_t metric;         //      ett_metric: how codes are scored
} ett_nearest_args;
ETT_API int64_t ett_nearest_workspace(const ett_nearest_args* args);
ETT_API int32_t ett_nearest(const ett_nearest_args* args, const ett_launch* launch);

/* Row statistics of S = z E^T, in one sweep over the codes. With t the best code and x_j = (S_j - S_t) /
   temperature: rest_p = sum_{j != t} exp(S_j - S_t), rest_q = sum_{j != t} exp(x_j), xbar = sum_j q_j x_j.
   Without entropies rest_q and xbar are absent and temperature is ignored. A code with a NaN score has weight 0; a row
   whose best score is not finite has no weights and counts in bad; without any score above -infinity it gets idx 0 and
   smax -infinity. M and K are below 2^31, D is from 1 to 512, here and in ibq_cols and ibq_bwd. idx may differ from that
   of nearest where two scores are the same within rounding, which is not the same in both. */
typedef struct ett_ibq_rows_args {
    ett_view z;             // in   [M, D]; act
    ett_view e;             // in   [K, D]; act; K at least 1
    ett_view idx;           // out  [M]; i32; as nearest with the dot product
    ett_view smax;          // out  [M]; acc; score of the best code
    ett_view rest_p;        // out  [M]; acc
    ett_view rest_q;        // out? [M]; acc
    ett_view xbar;          // out? [M]; acc; with rest_q
    ett_view bad;           // add  [1]; acc; count of rows without a finite score
    double temperature;     //      T of the entropies; above 0; if rest_q
} ett_ibq_rows_args;
ETT_API int64_t ett_ibq_rows_workspace(const ett_ibq_rows_args* args);
ETT_API int32_t ett_ibq_rows(const ett_ibq_rows_args* args, const ett_launch* launch);

/* Column sums sum_i q_ij, not divided by the count, so that those of several ranks can be added. idx, smax and rest_q
   are those of ibq_rows for the same views z and e, by the same implementation on the same device: the scores are
   computed again, and the best one must come out as smax, bit for bit. */
typedef struct ett_ibq_cols_args {
    ett_view z;             // in   [M, D]; act
    ett_view e;             // in   [K, D]; act; K at least 1
    ett_view idx;           // in   [M]; i32
    ett_view smax;          // in   [M]; acc
    ett_view rest_q;        // in   [M]; acc
    ett_view col;           // out  [K]; acc
    double temperature;     //      T of the entropies; above 0
} ett_ibq_cols_args;
ETT_API int64_t ett_ibq_cols_workspace(const ett_ibq_cols_args* args);
ETT_API int32_t ett_ibq_cols(const ett_ibq_cols_args* args, const ett_launch* launch);

/* Values: zq = E[idx], quant = (1 + beta_commit + beta_code) * inv_count/D * sum (zq - z)^2, sample =
   inv_count * sum_i H_i, avg = -sum_j a_j log(a_j + eps) with a = col * inv_count, and c_j = -(log(a_j + eps)
   + a_j / (a_j + eps)), the derivative of avg. Without entropies rest_q, xbar, col, c, sample and avg are all
   absent. A wrong idx is a fault: zq is 0 and quant leaves the token out; sample does not need it. */
typedef struct ett_ibq_losses_args {
    ett_view z;             // in   [M, D]; act
    ett_view e;             // in   [K, D]; act; K at least 1
    ett_view idx;           // in   [M]; i32; values below K
    ett_view rest_q;        // in?  [M]; acc
    ett_view xbar;          // in?  [M]; acc; with rest_q
    ett_view col;           // in?  [K]; acc; with rest_q; summed over ranks
    ett_view inv_count;     // in   [1]; acc; one over the tokens of all ranks
    ett_view zq;            // out  [M, D]; act
    ett_view c;             // out? [K]; acc; with rest_q
    ett_view quant;         // out  [1]; acc
    ett_view sample;        // out? [1]; acc; with rest_q
    ett_view avg;           // out? [1]; acc; with rest_q
    double eps;             //      added inside the logarithm
    double beta_commit;     //      weight of the commitment term
    double beta_code;       //      weight of the codebook term
} ett_ibq_losses_args;
ETT_API int64_t ett_ibq_losses_workspace(const ett_ibq_losses_args* args);
ETT_API int32_t ett_ibq_losses(const ett_ibq_losses_args* args, const ett_launch* launch);

/* The whole backward of the IBQ quantizer: soft path, hard scatter, both entropies and the direct terms of
   the quantization loss, with the best code kept out of every cancelling sum (docs/quantizer.md). Without
   entropies rest_q, xbar, c, g_sample and g_avg are all absent. idx, smax, rest_p, rest_q and xbar are those of
   ibq_rows, as for ibq_cols. de is the gradient of the whole codebook, of both entropies and of the hard assignment;
   a wrong idx is a fault: dz is 0 there, and the token adds nothing to de. */
typedef struct ett_ibq_bwd_args {
    ett_view z;             // in   [M, D]; act
    ett_view e;             // in   [K, D]; act; K at least 1
    ett_view idx;           // in   [M]; i32; values below K
    ett_view smax;          // in   [M]; acc
    ett_view rest_p;        // in   [M]; acc
    ett_view rest_q;        // in?  [M]; acc
    ett_view xbar;          // in?  [M]; acc; with rest_q
    ett_view c;             // in?  [K]; acc; with rest_q
    ett_view inv_count;     // in   [1]; acc; one over the tokens of all ranks
    ett_view g;             // in   [M, D]; act; gradient that reached zq from the decoder and the projector
    ett_view g_quant;       // in   [1]; acc; gradient of quant
    ett_view g_sample;      // in?  [1]; acc; with rest_q; gradient of sample
    ett_view g_avg;         // in?  [1]; acc; with rest_q; gradient of avg
    ett_view dz;            // out  [M, D]; act
    ett_view de;            // add? [K, D]; acc
    double temperature;     //      T of the entropies; above 0; if rest_q
    double beta_commit;     //      weight of the commitment term
    double beta_code;       //      weight of the codebook term
} ett_ibq_bwd_args;
ETT_API int64_t ett_ibq_bwd_workspace(const ett_ibq_bwd_args* args);
ETT_API int32_t ett_ibq_bwd(const ett_ibq_bwd_args* args, const ett_launch* launch);

/* The plain VQ baseline: zq = E[idx], quant = (beta_commit + beta_code) * inv_count/D * sum (zq - z)^2. D is from 1
   to 2^20. A wrong idx is a fault: zq is 0 there, and quant leaves the token out. */
typedef struct ett_vq_losses_args {
    ett_view z;             // in   [M, D]; act
    ett_view e;             // in   [K, D]; act; K at least 1
    ett_view idx;           // in   [M]; i32; values below K
    ett_view inv_count;     // in   [1]; acc; one over the tokens of all ranks
    ett_view zq;            // out  [M, D]; act
    ett_view quant;         // out  [1]; acc
    double beta_commit;     //      weight of the commitment term
    double beta_code;       //      weight of the codebook term
} ett_vq_losses_args;
ETT_API int64_t ett_vq_losses_workspace(const ett_vq_losses_args* args);
ETT_API int32_t ett_vq_losses(const ett_vq_losses_args* args, const ett_launch* launch);

/* Gradient of vq_losses: g passes straight through to z; the commitment term goes to z, the codebook term to
   e. A wrong idx is a fault: dz is g there, and the token adds nothing to de. */
typedef struct ett_vq_bwd_args {
    ett_view z;             // in   [M, D]; act
    ett_view e;             // in   [K, D]; act; K at least 1
    ett_view idx;           // in   [M]; i32; values below K
    ett_view inv_count;     // in   [1]; acc; one over the tokens of all ranks
    ett_view g;             // in   [M, D]; act
    ett_view g_quant;       // in   [1]; acc
    ett_view dz;            // out  [M, D]; act
    ett_view de;            // add? [K, D]; acc
    double beta_commit;     //      weight of the commitment term
    double beta_code;       //      weight of the codebook term
} ett_vq_bwd_args;
ETT_API int64_t ett_vq_bwd_workspace(const ett_vq_bwd_args* args);
ETT_API int32_t ett_vq_bwd(const ett_vq_bwd_args* args, const ett_launch* launch);

/* ---- optimizer ----------------------------------------------------------------------------------------- */

/* out[0] += the sum of x^2 over finite elements, out[1] += the number of non-finite elements. */
typedef struct ett_sum_squares_args {
    ett_view x;             // in   [n]; acc
    ett_view out;           // add  [2]; acc
} ett_sum_squares_args;
ETT_API int64_t ett_sum_squares_workspace(const ett_sum_squares_args* args);
ETT_API int32_t ett_sum_squares(const ett_sum_squares_args* args, const ett_launch* launch);

/* One AdamW step on a flat range, all in the accumulator type. rate and clip come from row `group` of the step
   state, and bias = 1 / (1 - beta^t) with t = steps + 1:
     g = grad * (clip > 0 ? min(1, clip / (sqrt(norm[0]) + 1e-6)) : 1)
     m = beta1 * m + (1 - beta1) * g,   v = beta2 * v + (1 - beta2) * g^2
     master = master * (1 - rate * weight_decay) - rate * (m * bias1) / (sqrt(v * bias2) + eps)
     ema = ema_decay * ema + (1 - ema_decay) * master,   shadow = master rounded
   If norm[1] > 0, the gradient is not finite and the kernel changes nothing. */
typedef struct ett_adamw_args {
    ett_view master;        // add  [n]; acc; updated
    ett_view grad;          // in   [n]; acc
    ett_view m;             // add  [n]; acc; first moment; updated
    ett_view v;             // add  [n]; acc; second moment; updated
    ett_view ema;           // add? [n]; acc; updated
    ett_view shadow;        // out? [n]; act
    ett_view state;         // in   [ETT_STATE_LEN]; acc; the step state
    ett_view steps;         // in   [1]; i32; number of updates so far
    ett_view norm;          // in   [2]; acc; from sum_squares over everything this optimizer trains
    int64_t group;          //      row of the step state that holds this group's rate and clip; below
                            //      ETT_STATE_GROUPS
    double beta1;           //      decay of the first moment
    double beta2;           //      decay of the second moment
    double eps;             //      added to the root of the second moment
    double weight_decay;    //      decoupled weight decay
    double ema_decay;       //      decay of the moving average of the weights
} ett_adamw_args;
ETT_API int64_t ett_adamw_workspace(const ett_adamw_args* args);
ETT_API int32_t ett_adamw(const ett_adamw_args* args, const ett_launch* launch);

/* y = x if norm[1] > 0: restores the values from before a step that is skipped. */
typedef struct ett_restore_args {
    ett_view x;             // in   [n]; act or acc; the values before the step
    ett_view norm;          // in   [2]; acc; as for adamw
    ett_view y;             // add  [n]; type of x
} ett_restore_args;
ETT_API int64_t ett_restore_workspace(const ett_restore_args* args);
ETT_API int32_t ett_restore(const ett_restore_args* args, const ett_launch* launch);

#ifdef __cplusplus
}
#endif

#endif
