// group_norm.cu: y = f(xhat * w + b) with xhat = (x - mean) * rstd, rstd = 1 / sqrt(var + eps), mean and biased variance
// of each image over its pixels and the C / G channels of a group, f = SiLU or the identity; and its gradient
//   g = dy * f'(xhat * w + b),   dx = rstd * (g * w - mean(g * w) - xhat * mean(g * w * xhat)),
//   dw += sum_{b,h,w} g * xhat,   db += sum_{b,h,w} g.
//
// x, dy       B,H,W,C  act  pixels of any stride   in
// w, b        C        act  contiguous             in
// y, dx       B,H,W,C  act  pixels of any stride   out
// mean, rstd  B,G      f32  contiguous             out; in for the backward
// dw, db      C        f32  contiguous             added to; may be absent
//
// numerics: float32, one rounding per output. Statistics are combined from means and sums of squared differences from
// them (Chan et al.), starting with four pixels, so that a mean of many standard deviations costs no accuracy beyond
// its own rounding; NaN if there are no pixels. Order of sums: each thread its pixels in order, a block its threads,
// one kernel the chunks of an image, another one the channels of a group. Bitwise repeatable.
// work: 8 FLOP an element forward, 16 backward; 3*n*size bytes forward (x is read twice), 5 backward.
// group_norm_stats computes mean and rstd alone, for convolutions that normalise what they read.
// workspace: forward 8*C bytes per chunk, with at most twelve chunks per multiprocessor (but at least one per image);
// backward 8*(C + G) bytes per image more.
// limits: any C, any G that divides C; "wide" requires pixels of whole 16-byte pieces, "plain" accepts any.
// papers: Group Normalization (1803.08494).
#include "channels.cuh"

namespace ett {
namespace {

bool shaped(Check& check, const ett_view& x, const ett_view& mean, const ett_view& rstd) {
    if (!check.ok() || !check.act("x", x) || !check.image("x", x)) return false;
    const int64_t b = x.dims[0], c = cols(x);
    if (!check.view("mean", mean)) return false;
    const int64_t g = cols(mean);
    check.matrix("mean", mean, ETT_F32, b, g);
    check.vector("mean", mean, ETT_F32, b * g);
    check.require(g > 0 && c % g == 0, "mean", "of a number of groups that does not divide the channels", "a number of groups that does");
    check.matrix("rstd", rstd, ETT_F32, b, g);
    check.vector("rstd", rstd, ETT_F32, b * g);
    return check.ok();
}

channels::Planes planes(const ett_view& x, const ett_view& mean) { return {x.dims[0], x.dims[1] * x.dims[2], cols(x), cols(mean)}; }

bool sound(Check& check, const ett_group_norm_fwd_args* a) {
    if (!check.ok() || !shaped(check, a->x, a->mean, a->rstd)) return false;
    const int64_t n = rows(a->x), c = cols(a->x);
    check.vector("w", a->w, a->x.dtype, c);
    check.vector("b", a->b, a->x.dtype, c);
    check.matrix("y", a->y, a->x.dtype, n, c);
    return check.require(channels::fits(planes(a->x, a->mean)), "x", "too many images", "less than 2^30 tiles of 32 channels");
}

bool sound(Check& check, const ett_group_norm_stats_args* a) {
    return check.ok() && shaped(check, a->x, a->mean, a->rstd) &&
           check.require(channels::fits(planes(a->x, a->mean)), "x", "too many images", "less than 2^30 tiles of 32 channels");
}

bool sound(Check& check, const ett_group_norm_bwd_args* a) {
    if (!check.ok() || !shaped(check, a->x, a->mean, a->rstd)) return false;
    const int64_t n = rows(a->x), c = cols(a->x);
    check.matrix("dy", a->dy, a->x.dtype, n, c);
    check.vector("w", a->w, a->x.dtype, c);
    check.vector("b", a->b, a->x.dtype, c);
    check.matrix("dx", a->dx, a->x.dtype, n, c);
    if (present(a->dw)) check.vector("dw", a->dw, ETT_F32, c);
    if (present(a->db)) check.vector("db", a->db, ETT_F32, c);
    return check.require(channels::fits(planes(a->x, a->mean)), "x", "too many images", "less than 2^30 tiles of 32 channels");
}

int64_t workspace(const ett_group_norm_fwd_args* a) { return channels::partials_bytes(planes(a->x, a->mean), a->x.dtype); }
int64_t workspace(const ett_group_norm_stats_args* a) { return channels::partials_bytes(planes(a->x, a->mean), a->x.dtype); }
int64_t workspace(const ett_group_norm_bwd_args* a) {
    return numel(a->x) == 0 ? 0 : channels::backward_bytes(planes(a->x, a->mean), a->x.dtype);
}

// Calls go with the activation as its argument.
template <class F> int32_t with_activation(bool silu, F go) { return silu ? go(channels::Silu{}) : go(channels::Leaky{1.f}); }

}  // namespace
}  // namespace ett

extern "C" int64_t ett_group_norm_fwd_workspace(const ett_group_norm_fwd_args* a) {
    using namespace ett;
    Check check("group_norm_fwd", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_group_norm_fwd(const ett_group_norm_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("group_norm_fwd", a, l);
    if (!sound(check, a)) return check.status();
    check.workspace(l, workspace(a));
    const char* kernel;
    const bool is_wide = channels::choose_wide(check, l, {&a->x, &a->y}, &kernel);
    if (!check.ok()) return check.status();
    if (numel(a->mean) == 0) return ett_done("");
    const channels::Planes s = planes(a->x, a->mean);
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const int32_t status = channels::launch_statistics<T>("group_norm_fwd", is_wide, s, a->x, a->mean, a->rstd, false, a->eps, l->workspace, l);
        if (status != ETT_OK || s.p == 0 || s.c == 0) return status;
        const channels::Scale<T> scale{data<const T>(a->w), data<const T>(a->b), data<const float>(a->mean), data<const float>(a->rstd), 0.f, false};
        return with_activation(a->silu, [&](auto f) {
            return channels::launch_normalize<T>("group_norm_fwd", is_wide, s, a->x, a->y, scale, f, l);
        });
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

extern "C" int64_t ett_group_norm_stats_workspace(const ett_group_norm_stats_args* a) {
    using namespace ett;
    Check check("group_norm_stats", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_group_norm_stats(const ett_group_norm_stats_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("group_norm_stats", a, l);
    if (!sound(check, a)) return check.status();
    check.workspace(l, workspace(a));
    const char* kernel;
    const bool is_wide = channels::choose_wide(check, l, {&a->x}, &kernel);
    if (!check.ok()) return check.status();
    if (numel(a->mean) == 0) return ett_done("");
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        return channels::launch_statistics<decltype(t)>("group_norm_stats", is_wide, planes(a->x, a->mean), a->x, a->mean, a->rstd, false, a->eps,
                                                        l->workspace, l);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

extern "C" int64_t ett_group_norm_bwd_workspace(const ett_group_norm_bwd_args* a) {
    using namespace ett;
    Check check("group_norm_bwd", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_group_norm_bwd(const ett_group_norm_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("group_norm_bwd", a, l);
    if (!sound(check, a)) return check.status();
    check.workspace(l, workspace(a));
    const char* kernel;
    const bool is_wide = channels::choose_wide(check, l, {&a->x, &a->dy, &a->dx}, &kernel);
    if (!check.ok()) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const channels::Planes s = planes(a->x, a->mean);
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const channels::Scale<T> scale{data<const T>(a->w), data<const T>(a->b), data<const float>(a->mean), data<const float>(a->rstd), 0.f, false};
        return with_activation(a->silu, [&](auto f) {
            return channels::launch_backward<T>("group_norm_bwd", is_wide, s, a->dy, a->x, {}, a->dx, a->dw, a->db, scale, true, f, l->workspace, l);
        });
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}
