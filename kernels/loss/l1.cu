// l1.cu: loss += scale * sum |a - b|, and its gradient da = g * scale * sign(a - b), 0 where they are equal.
//
// a, b             any shape  act  rows of any stride   in
// scale, g, loss   1          f32                       in, in, added to
// da               any shape  act  rows of any stride   out
//
// numerics: float32; propagates NaN. Each thread sums its pieces in order, a block its threads, a last block the
// blocks. Bitwise repeatable.
// work: 3 FLOP an element; 2*n*size bytes forward, 3 backward.   workspace: forward 4 bytes per block.
#include "sums.cuh"

namespace ett {
namespace {

template <class T, int N> struct Distance {
    Matrix<const T> a, b;

    struct In {
        Vec<T, N> a, b;
    };
    __device__ In load(Place p) const { return {piece<N>(a, p), piece<N>(b, p)}; }
    __device__ float term(const In& in) const {
        float x[N], y[N], sum = 0.f;
        unpack(x, in.a);
        unpack(y, in.b);
#pragma unroll
        for (int j = 0; j < N; ++j) sum += fabsf(x[j] - y[j]);
        return sum;
    }
};

template <class T, int N> struct Sign {
    Matrix<const T> a, b;
    const float *scale, *g;
    Matrix<T> da;

    struct In {
        Vec<T, N> a, b;
    };
    __device__ In load(Place p) const { return {piece<N>(a, p), piece<N>(b, p)}; }
    __device__ void finish(Place p, const In& in) const {
        const float slope = *g * *scale;
        float x[N], y[N];
        unpack(x, in.a);
        unpack(y, in.b);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float d = x[j] - y[j];
            // If d is neither positive nor negative, it is 0 or NaN and passes through.
            x[j] = slope * (d > 0.f ? 1.f : d < 0.f ? -1.f : d);
        }
        put(da, p, x);
    }
};

bool sound(Check& check, const ett_l1_fwd_args* a) {
    return check.ok() && check.act("a", a->a) && check.matrix("b", a->b, a->a.dtype, rows(a->a), cols(a->a)) &&
           check.vector("scale", a->scale, ETT_F32, 1) && check.vector("loss", a->loss, ETT_F32, 1);
}

bool sound(Check& check, const ett_l1_bwd_args* a) {
    if (!check.ok() || !check.act("a", a->a)) return false;
    const int64_t n = rows(a->a), c = cols(a->a);
    return check.matrix("b", a->b, a->a.dtype, n, c) && check.vector("scale", a->scale, ETT_F32, 1) && check.vector("g", a->g, ETT_F32, 1) &&
           check.matrix("da", a->da, a->a.dtype, n, c);
}

}  // namespace
}  // namespace ett

extern "C" int64_t ett_l1_fwd_workspace(const ett_l1_fwd_args* a) {
    using namespace ett;
    Check check("l1_fwd", a);
    return sound(check, a) ? sum_bytes(a->a) : -1;
}

extern "C" int32_t ett_l1_fwd(const ett_l1_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("l1_fwd", a, l);
    if (!sound(check, a) || !check.workspace(l, sum_bytes(a->a))) return check.status();
    if (numel(a->a) == 0) return ett_done("");
    const Views views{&a->a, &a->b};
    const AddLoss<1> add{data<float>(a->loss), data<const float>(a->scale), 1.f};
    return with_act(a->a.dtype, [&](auto t) {
        using T = decltype(t);
        return sum_loss<kWide<T>>(check, "l1_fwd", l, extent(views), views, add,
                                  [&](auto n) { return Distance<T, n>{matrix<const T>(a->a), matrix<const T>(a->b)}; });
    });
}

ETT_NO_WORKSPACE(l1_bwd)

extern "C" int32_t ett_l1_bwd(const ett_l1_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("l1_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->a) == 0) return ett_done("");
    const Views views{&a->a, &a->b, &a->da};
    return with_act(a->a.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "l1_bwd", l, extent(views), views, [&](auto n) {
            return Sign<T, n>{matrix<const T>(a->a), matrix<const T>(a->b), data<const float>(a->scale), data<const float>(a->g), matrix<T>(a->da)};
        });
    });
}
