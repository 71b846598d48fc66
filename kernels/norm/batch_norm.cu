// batch_norm.cu: y = f(xhat * w + b) with xhat = (x - mean) * rstd, rstd = 1 / sqrt(var + eps) per channel, f =
// LeakyReLU; with the statistics of the batch (fwd, bwd) or with given ones (eval). The gradient:
//   g = dy * f'(xhat * w + b),   dx = rstd * (g * w - mean(g * w) - xhat * mean(g * w * xhat)), or rstd * g * w with
//   given statistics,   dw += sum_n g * xhat,   db += sum_n g.
// merged_bwd: dx with the sums over n replaced by given ones over all `rows`, of which x holds some.
// merge: mean = sum_r means_r / R, var = sum_r (vars_r + (means_r - mean)^2) / R, for R sets of equally many rows.
// running: running = (1 - momentum) * running + momentum * batch, where the batch's variance is multiplied by N / (N -
// 1). If the batch's value of a channel is not finite, the running value does not change.
//
// x, dy      N,C  act  rows of any stride   in
// w, b       C    act  contiguous           in
// y, dx      N,C  act  rows of any stride   out
// mean, var  C    f32  contiguous           out; in for the backward, eval and running; the variance is biased
// dw, db     C    f32  contiguous           added to; may be absent
// sums       2,C  f32  contiguous           in: of g, then of g * xhat
// means, vars  R,C  f32  rows of any stride  in
// running_mean, running_var  C  f32  contiguous  updated
//
// numerics and determinism: as in group_norm.cu; this is its case of one image with one channel per group.
// work: 8 FLOP an element forward, 16 backward; 3*N*C*size bytes forward (2 for eval), 5 backward (3 for merged_bwd,
// and for eval without dw and db).
// workspace: forward 8*C bytes per chunk, with at most twelve chunks per multiprocessor; backward 16*C bytes more; merged_bwd
// 8*C bytes.
// limits: slope 1 means no LeakyReLU; "wide" requires rows of whole 16-byte pieces, "plain" accepts any.
// papers: Batch Normalization (1502.03167).
#include "channels.cuh"

namespace ett {
namespace {

constexpr int kChannelThreads = 256;  // of merge and running, with a channel each

channels::Planes planes(const ett_view& x) { return {1, rows(x), cols(x), cols(x)}; }

// Checks the arguments that all these kernels share.
bool shaped(Check& check, const ett_view& x, const ett_view& w, const ett_view& b, const ett_view& mean, const ett_view& var) {
    if (!check.ok() || !check.act("x", x)) return false;
    const int64_t c = cols(x);
    check.vector("w", w, x.dtype, c);
    check.vector("b", b, x.dtype, c);
    check.vector("mean", mean, ETT_F32, c);
    return check.vector("var", var, ETT_F32, c);
}

template <class A> bool sound_forward(Check& check, const A* a) {
    return check.ok() && shaped(check, a->x, a->w, a->b, a->mean, a->var) && check.matrix("y", a->y, a->x.dtype, rows(a->x), cols(a->x));
}

// The arguments that all backward kernels share.
template <class A> bool sound_dx(Check& check, const A* a) {
    if (!check.ok() || !shaped(check, a->x, a->w, a->b, a->mean, a->var)) return false;
    check.matrix("dy", a->dy, a->x.dtype, rows(a->x), cols(a->x));
    return check.matrix("dx", a->dx, a->x.dtype, rows(a->x), cols(a->x));
}

template <class A> bool sound_backward(Check& check, const A* a) {
    if (!sound_dx(check, a)) return false;
    const int64_t c = cols(a->x);
    if (present(a->dw)) check.vector("dw", a->dw, ETT_F32, c);
    if (present(a->db)) check.vector("db", a->db, ETT_F32, c);
    return check.ok();
}

template <class T, class A> channels::Scale<T> scale_of(const A* a) {
    return {data<const T>(a->w), data<const T>(a->b), data<const float>(a->mean), data<const float>(a->var), float(a->eps), true};
}

// fwd and eval_fwd; `own`: compute the statistics of the batch first.
template <class A> int32_t forward(const char* op, const A* a, const ett_launch* l, bool own) {
    Check check(op, a, l);
    if (!sound_forward(check, a)) return check.status();
    if (own) check.workspace(l, channels::partials_bytes(planes(a->x), a->x.dtype));
    const char* kernel;
    const bool is_wide = channels::choose_wide(check, l, {&a->x, &a->y}, &kernel);
    if (!check.ok()) return check.status();
    const channels::Planes s = planes(a->x);
    if (s.c == 0 || (s.p == 0 && !own)) return ett_done("");
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        int32_t status = ETT_OK;
        if (own) status = channels::launch_statistics<T>(op, is_wide, s, a->x, a->mean, a->var, true, a->eps, l->workspace, l);
        if (status != ETT_OK || s.p == 0) return status;
        return channels::launch_normalize<T>(op, is_wide, s, a->x, a->y, scale_of<T>(a), channels::Leaky{float(a->slope)}, l);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

// bwd and eval_bwd; `through`: the statistics are those of the batch, so the gradient passes through them.
template <class A> int64_t backward_workspace(const A* a) {
    return numel(a->x) == 0 ? 0 : channels::backward_bytes(planes(a->x), a->x.dtype);
}
template <class A> int32_t backward(const char* op, const A* a, const ett_launch* l, bool through) {
    Check check(op, a, l);
    if (!sound_backward(check, a)) return check.status();
    check.workspace(l, backward_workspace(a));
    const char* kernel;
    const bool is_wide = channels::choose_wide(check, l, {&a->x, &a->dy, &a->dx}, &kernel);
    if (!check.ok()) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        return channels::launch_backward<T>(op, is_wide, planes(a->x), a->dy, a->x, {}, a->dx, a->dw, a->db, scale_of<T>(a), through,
                                            channels::Leaky{float(a->slope)}, l->workspace, l);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

bool sound(Check& check, const ett_batch_norm_merged_bwd_args* a) {
    if (!sound_dx(check, a)) return false;
    check.matrix("sums", a->sums, ETT_F32, 2, cols(a->x));
    check.require(contiguous(a->sums), "sums", "strided", "contiguous");
    return check.range("rows", a->rows, 1, INT64_MAX);
}

// The means of both sums.
int64_t workspace(const ett_batch_norm_merged_bwd_args* a) { return numel(a->x) == 0 ? 0 : 2 * cols(a->x) * int64_t(sizeof(float)); }

struct Merge {
    Matrix<const float> means, vars;
    float *mean, *var;
    int64_t sets, c;
};

__global__ void __launch_bounds__(kChannelThreads) merge_kernel(const __grid_constant__ Merge a) {
    const int64_t at = int64_t(blockIdx.x) * kChannelThreads + threadIdx.x;
    if (at >= a.c) return;
    float sum = 0.f, spread = 0.f;
    for (int64_t r = 0; r < a.sets; ++r) sum += a.means.row(r)[at];
    const float mean = sum / float(a.sets);
    for (int64_t r = 0; r < a.sets; ++r) {
        const float d = a.means.row(r)[at] - mean;
        spread += a.vars.row(r)[at] + d * d;
    }
    a.mean[at] = mean;
    a.var[at] = spread / float(a.sets);
}

bool sound(Check& check, const ett_batch_norm_merge_args* a) {
    if (!check.ok() || !check.act("means", a->means)) return false;
    const int64_t n = rows(a->means), c = cols(a->means);
    check.matrix("means", a->means, ETT_F32, n, c);
    check.matrix("vars", a->vars, ETT_F32, n, c);
    check.vector("mean", a->mean, ETT_F32, c);
    return check.vector("var", a->var, ETT_F32, c);
}

struct Running {
    const float* batch[2];
    float* running[2];
    float factor[2];  // of the batch's values
    float keep;
    int64_t c;
};

__global__ void __launch_bounds__(kChannelThreads) running_kernel(const __grid_constant__ Running a) {
    const int64_t at = int64_t(blockIdx.x) * kChannelThreads + threadIdx.x;
    if (at >= a.c) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float v = a.batch[i][at];
        if (fabsf(v) <= 3.402823466e38f) a.running[i][at] = a.keep * a.running[i][at] + a.factor[i] * v;
    }
}

bool sound(Check& check, const ett_batch_norm_running_args* a) {
    if (!check.ok() || !check.act("mean", a->mean)) return false;
    const int64_t c = numel(a->mean);
    check.vector("mean", a->mean, ETT_F32, c);
    check.vector("var", a->var, ETT_F32, c);
    check.vector("running_mean", a->running_mean, ETT_F32, c);
    return check.vector("running_var", a->running_var, ETT_F32, c);
}

}  // namespace
}  // namespace ett

extern "C" int64_t ett_batch_norm_fwd_workspace(const ett_batch_norm_fwd_args* a) {
    using namespace ett;
    Check check("batch_norm_fwd", a);
    return sound_forward(check, a) ? channels::partials_bytes(planes(a->x), a->x.dtype) : -1;
}

extern "C" int32_t ett_batch_norm_fwd(const ett_batch_norm_fwd_args* a, const ett_launch* l) {
    return ett::forward("batch_norm_fwd", a, l, true);
}

extern "C" int64_t ett_batch_norm_bwd_workspace(const ett_batch_norm_bwd_args* a) {
    using namespace ett;
    Check check("batch_norm_bwd", a);
    return sound_backward(check, a) ? backward_workspace(a) : -1;
}

extern "C" int32_t ett_batch_norm_bwd(const ett_batch_norm_bwd_args* a, const ett_launch* l) {
    return ett::backward("batch_norm_bwd", a, l, true);
}

extern "C" int64_t ett_batch_norm_eval_fwd_workspace(const ett_batch_norm_eval_fwd_args* a) {
    using namespace ett;
    Check check("batch_norm_eval_fwd", a);
    return sound_forward(check, a) ? 0 : -1;
}

extern "C" int32_t ett_batch_norm_eval_fwd(const ett_batch_norm_eval_fwd_args* a, const ett_launch* l) {
    return ett::forward("batch_norm_eval_fwd", a, l, false);
}

extern "C" int64_t ett_batch_norm_eval_bwd_workspace(const ett_batch_norm_eval_bwd_args* a) {
    using namespace ett;
    Check check("batch_norm_eval_bwd", a);
    return sound_backward(check, a) ? backward_workspace(a) : -1;
}

extern "C" int32_t ett_batch_norm_eval_bwd(const ett_batch_norm_eval_bwd_args* a, const ett_launch* l) {
    return ett::backward("batch_norm_eval_bwd", a, l, false);
}

ETT_NO_WORKSPACE(batch_norm_merge)

extern "C" int32_t ett_batch_norm_merge(const ett_batch_norm_merge_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("batch_norm_merge", a, l);
    if (!sound(check, a)) return check.status();
    const char* kernel = check.choose(l, {{"plain", true}});
    if (!check.ok()) return check.status();
    const int64_t c = cols(a->means);
    if (c == 0) return ett_done("");
    const Merge k{matrix<const float>(a->means), matrix<const float>(a->vars), data<float>(a->mean), data<float>(a->var), rows(a->means), c};
    const int32_t status =
        launch("batch_norm_merge", merge_kernel, dim3(unsigned(ceil_div(c, kChannelThreads))), dim3(kChannelThreads), 0, l, k);
    return status == ETT_OK ? ett_done(kernel) : status;
}

extern "C" int64_t ett_batch_norm_merged_bwd_workspace(const ett_batch_norm_merged_bwd_args* a) {
    using namespace ett;
    Check check("batch_norm_merged_bwd", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_batch_norm_merged_bwd(const ett_batch_norm_merged_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    constexpr const char* op = "batch_norm_merged_bwd";
    Check check(op, a, l);
    if (!sound(check, a)) return check.status();
    check.workspace(l, workspace(a));
    const char* kernel;
    const bool is_wide = channels::choose_wide(check, l, {&a->x, &a->dy, &a->dx}, &kernel);
    if (!check.ok()) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const channels::Planes some = planes(a->x), all{1, a->rows, some.c, some.g};
        float* const means = static_cast<float*>(l->workspace);
        const channels::Means<T> k{data<const float>(a->sums), data<const T>(a->w), means, nullptr, nullptr, all};
        const int32_t status = channels::launch_means<T>(op, k, l);
        if (status != ETT_OK) return status;
        return channels::launch_dx<T>(op, is_wide, some, a->dy, a->x, {}, a->dx, scale_of<T>(a), means, channels::Leaky{float(a->slope)}, l);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

ETT_NO_WORKSPACE(batch_norm_running)

extern "C" int32_t ett_batch_norm_running(const ett_batch_norm_running_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("batch_norm_running", a, l);
    if (!sound(check, a)) return check.status();
    const char* kernel = check.choose(l, {{"plain", true}});
    if (!check.ok()) return check.status();
    const int64_t c = numel(a->mean);
    if (c == 0) return ett_done("");
    // A single row has no unbiased estimate; its variance is 0 in any case.
    const double unbiased = double(a->rows) / double(std::max<int64_t>(a->rows - 1, 1));
    const Running k{{data<const float>(a->mean), data<const float>(a->var)},
                    {data<float>(a->running_mean), data<float>(a->running_var)},
                    {float(a->momentum), float(a->momentum * unbiased)},
                    float(1.0 - a->momentum),
                    c};
    const int32_t status =
        launch("batch_norm_running", running_kernel, dim3(unsigned(ceil_div(c, kChannelThreads))), dim3(kChannelThreads), 0, l, k);
    return status == ETT_OK ? ett_done(kernel) : status;
}
