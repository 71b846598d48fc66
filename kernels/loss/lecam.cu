// lecam.cu: the LeCAM regularisation. Its moving averages e of real and fake logits are updated to
//   out = decay * e + (1 - decay) * (mean(real), mean(fake)),   or to e itself where a mean is not finite.
// Its loss is loss += scale * (sum relu(real - e[1])^2 + sum relu(e[0] - fake)^2), with the gradient (e is a constant)
//   dreal = 2 * g * scale * relu(real - e[1]),   dfake = -2 * g * scale * relu(e[0] - fake).
//
// real, fake       any shapes      act  rows of any stride   in
// ema, out         2               f32  contiguous           in, out
// scale, g, loss   1               f32                       in, in, added to
// dreal, dfake     as real, fake   act  rows of any stride   out
//
// numerics: float32; propagates NaN. Each thread sums its pieces in order, a block its threads, a last block the
// blocks. Bitwise repeatable.
// work: 2 to 6 FLOP an element; for n logits in all n*size bytes forward, 2 backward.
// workspace: 4 bytes per block, none for the backward.   limits: the update needs at least one logit of each kind.
// papers: LeCAM (2104.03310).
#include "sums.cuh"

namespace ett {
namespace {

template <class T, int N> struct Sum {
    Matrix<const T> x;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ float term(const In& in) const {
        float v[N], sum = 0.f;
        unpack(v, in);
#pragma unroll
        for (int j = 0; j < N; ++j) sum += v[j];
        return sum;
    }
};

struct Averages {
    const float* ema;
    float* out;
    float counts[2], decay, rest;

    __device__ void finish(const float (&sums)[2]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float mean = sums[i] / counts[i];
            out[i] = fabsf(mean) <= 3.402823466e38f ? decay * ema[i] + rest * mean : ema[i];
        }
    }
};

// How far a logit exceeds the average `e` of the other kind; side is 1 for real logits, -1 for fake ones.
__device__ __forceinline__ float beyond(float x, float e, float side) { return relu(side > 0.f ? x - e : e - x); }

template <class T, int N> struct Squares {
    Matrix<const T> x;
    const float* e;
    float side;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ float term(const In& in) const {
        float v[N], sum = 0.f;
        unpack(v, in);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float d = beyond(v[j], *e, side);
            sum += d * d;
        }
        return sum;
    }
};

template <class T, int N> struct Slope {
    Matrix<const T> x;
    const float *e, *scale, *g;
    Matrix<T> dx;
    float side;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ void finish(Place p, const In& in) const {
        const float slope = side * (*g * *scale * 2.f);
        float v[N];
        unpack(v, in);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = slope * beyond(v[j], *e, side);
        put(dx, p, v);
    }
};

template <class A> bool logits(Check& check, const A* a) {
    return check.ok() && check.act("real", a->real) && check.type("fake", a->fake, a->real.dtype) && check.vector("ema", a->ema, ETT_F32, 2);
}

bool sound(Check& check, const ett_lecam_update_args* a) {
    return logits(check, a) && check.vector("out", a->out, ETT_F32, 2) &&
           check.require(numel(a->real) > 0, "real", "empty", "at least one element to average") &&
           check.require(numel(a->fake) > 0, "fake", "empty", "at least one element to average");
}

bool sound(Check& check, const ett_lecam_fwd_args* a) {
    return logits(check, a) && check.vector("scale", a->scale, ETT_F32, 1) && check.vector("loss", a->loss, ETT_F32, 1);
}

bool sound(Check& check, const ett_lecam_bwd_args* a) {
    return logits(check, a) && check.vector("scale", a->scale, ETT_F32, 1) && check.vector("g", a->g, ETT_F32, 1) &&
           check.matrix("dreal", a->dreal, a->real.dtype, rows(a->real), cols(a->real)) &&
           check.matrix("dfake", a->dfake, a->fake.dtype, rows(a->fake), cols(a->fake));
}

// The implementation for both matrices: "wide" if pieces of n cover both.
const char* choose_both(Check& check, const ett_launch* l, int n, Views real, Views fake) {
    const bool both = covers(extent(real), n, real) && covers(extent(fake), n, fake);
    return check.choose(l, {{"wide", both}, {"plain", true}});
}

// Sums over both matrices, then applies `f`. `make(n, is_real)` returns the operation for pieces of n.
template <class T, class Finish, class Make>
int32_t sum_both(Check& check, const char* op, const ett_launch* l, const ett_view& real, const ett_view& fake, const Finish& f, Make make) {
    const char* kernel = choose_both(check, l, kWide<T>, {&real}, {&fake});
    if (!check.ok()) return check.status();
    const Extent r = extent({&real}), k = extent({&fake});
    float* partials = static_cast<float*>(l->workspace);
    auto go = [&](auto n) {
        const int64_t blocks[2] = {sum_blocks(r, n), sum_blocks(k, n)};
        int32_t status = launch_sum<n>(op, l, r, make(n, true), partials);
        if (status == ETT_OK) status = launch_sum<n>(op, l, k, make(n, false), partials + blocks[0]);
        return status == ETT_OK ? launch_finish<2>(op, l, partials, blocks, f) : status;
    };
    const int32_t status =
        strcmp(kernel, "wide") == 0 ? go(std::integral_constant<int, kWide<T>>{}) : go(std::integral_constant<int, 1>{});
    return status == ETT_OK ? ett_done(kernel) : status;
}

template <class A> int64_t workspace(const A* a) { return sum_bytes(a->real) + sum_bytes(a->fake); }

}  // namespace
}  // namespace ett

extern "C" int64_t ett_lecam_update_workspace(const ett_lecam_update_args* a) {
    using namespace ett;
    Check check("lecam_update", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_lecam_update(const ett_lecam_update_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("lecam_update", a, l);
    if (!sound(check, a) || !check.workspace(l, workspace(a))) return check.status();
    const Averages f{data<const float>(a->ema), data<float>(a->out), {float(numel(a->real)), float(numel(a->fake))}, float(a->decay), float(1.0 - a->decay)};
    return with_act(a->real.dtype, [&](auto t) {
        using T = decltype(t);
        return sum_both<T>(check, "lecam_update", l, a->real, a->fake, f,
                           [&](auto n, bool real) { return Sum<T, n>{matrix<const T>(real ? a->real : a->fake)}; });
    });
}

extern "C" int64_t ett_lecam_fwd_workspace(const ett_lecam_fwd_args* a) {
    using namespace ett;
    Check check("lecam_fwd", a);
    return sound(check, a) ? workspace(a) : -1;
}

extern "C" int32_t ett_lecam_fwd(const ett_lecam_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("lecam_fwd", a, l);
    if (!sound(check, a) || !check.workspace(l, workspace(a))) return check.status();
    if (numel(a->real) + numel(a->fake) == 0) return ett_done("");
    const AddLoss<2> f{data<float>(a->loss), data<const float>(a->scale), 1.f};
    const float* ema = data<const float>(a->ema);
    return with_act(a->real.dtype, [&](auto t) {
        using T = decltype(t);
        return sum_both<T>(check, "lecam_fwd", l, a->real, a->fake, f, [&](auto n, bool real) {
            return Squares<T, n>{matrix<const T>(real ? a->real : a->fake), real ? ema + 1 : ema, real ? 1.f : -1.f};
        });
    });
}

ETT_NO_WORKSPACE(lecam_bwd)

extern "C" int32_t ett_lecam_bwd(const ett_lecam_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("lecam_bwd", a, l);
    if (!sound(check, a)) return check.status();
    const float *ema = data<const float>(a->ema), *scale = data<const float>(a->scale), *g = data<const float>(a->g);
    const Views real{&a->real, &a->dreal}, fake{&a->fake, &a->dfake};
    return with_act(a->real.dtype, [&](auto t) {
        using T = decltype(t);
        const char* kernel = choose_both(check, l, kWide<T>, real, fake);
        if (!check.ok()) return check.status();
        if (numel(a->real) + numel(a->fake) == 0) return ett_done("");
        auto go = [&](auto n) {
            int32_t status = ETT_OK;
            if (numel(a->real) > 0)
                status = launch_walk<n>("lecam_bwd", l, kernel, extent(real),
                                        Slope<T, n>{matrix<const T>(a->real), ema + 1, scale, g, matrix<T>(a->dreal), 1.f});
            if (status == ETT_OK && numel(a->fake) > 0)
                status = launch_walk<n>("lecam_bwd", l, kernel, extent(fake),
                                        Slope<T, n>{matrix<const T>(a->fake), ema, scale, g, matrix<T>(a->dfake), -1.f});
            return status;
        };
        return strcmp(kernel, "wide") == 0 ? go(std::integral_constant<int, kWide<T>>{}) : go(std::integral_constant<int, 1>{});
    });
}
