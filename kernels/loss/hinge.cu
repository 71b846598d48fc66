// hinge.cu: loss += factor * scale * sum relu(1 + side * x), where side is -1 for real logits and 1 for fake ones, and
// its gradient dx = g * factor * scale * side where 1 + side * x > 0, else 0.
//
// x                any shape  act  rows of any stride   in
// scale, g, loss   1          f32                       in, in, added to
// dx               any shape  act  rows of any stride   out
//
// numerics: float32; the loss propagates NaN. Each thread sums its pieces in order, a block its threads, a last block
// the blocks. Bitwise repeatable.
// work: 2 FLOP an element; n*size bytes forward, 2 backward.   workspace: forward 4 bytes per block.
// papers: Geometric GAN (1705.02894).
#include "sums.cuh"

namespace ett {
namespace {

template <class T, int N> struct Hinge {
    Matrix<const T> x;
    float side;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ float term(const In& in) const {
        float v[N], sum = 0.f;
        unpack(v, in);
#pragma unroll
        for (int j = 0; j < N; ++j) sum += relu(1.f + side * v[j]);
        return sum;
    }
};

template <class T, int N> struct Slope {
    Matrix<const T> x;
    const float *scale, *g;
    Matrix<T> dx;
    float side, factor;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ void finish(Place p, const In& in) const {
        const float slope = *g * (*scale * factor) * side;
        float v[N];
        unpack(v, in);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = 1.f + side * v[j] > 0.f ? slope : 0.f;
        put(dx, p, v);
    }
};

bool sound(Check& check, const ett_hinge_fwd_args* a) {
    return check.ok() && check.act("x", a->x) && check.vector("scale", a->scale, ETT_F32, 1) && check.vector("loss", a->loss, ETT_F32, 1);
}

bool sound(Check& check, const ett_hinge_bwd_args* a) {
    return check.ok() && check.act("x", a->x) && check.vector("scale", a->scale, ETT_F32, 1) && check.vector("g", a->g, ETT_F32, 1) &&
           check.matrix("dx", a->dx, a->x.dtype, rows(a->x), cols(a->x));
}

float side(int32_t real) { return real ? -1.f : 1.f; }

}  // namespace
}  // namespace ett

extern "C" int64_t ett_hinge_fwd_workspace(const ett_hinge_fwd_args* a) {
    using namespace ett;
    Check check("hinge_fwd", a);
    return sound(check, a) ? sum_bytes(a->x) : -1;
}

extern "C" int32_t ett_hinge_fwd(const ett_hinge_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("hinge_fwd", a, l);
    if (!sound(check, a) || !check.workspace(l, sum_bytes(a->x))) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const Views views{&a->x};
    const AddLoss<1> add{data<float>(a->loss), data<const float>(a->scale), float(a->factor)};
    return with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        return sum_loss<kWide<T>>(check, "hinge_fwd", l, extent(views), views, add,
                                  [&](auto n) { return Hinge<T, n>{matrix<const T>(a->x), side(a->real)}; });
    });
}

ETT_NO_WORKSPACE(hinge_bwd)

extern "C" int32_t ett_hinge_bwd(const ett_hinge_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("hinge_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const Views views{&a->x, &a->dx};
    return with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "hinge_bwd", l, extent(views), views, [&](auto n) {
            return Slope<T, n>{matrix<const T>(a->x), data<const float>(a->scale), data<const float>(a->g), matrix<T>(a->dx), side(a->real),
                               float(a->factor)};
        });
    });
}
