// channel_affine.cu: y = (x - shift) / scale and dx = dy / scale, with a shift and a scale per channel.
//
// x, dy         N,C  act  rows of any stride   in
// shift, scale  C    act  contiguous           in
// y, dx         N,C  act  rows of any stride   out; may be x or dy themselves
//
// numerics: float32, one rounding; bitwise repeatable.   work: 2*N*C FLOP, 2*N*C*size bytes.
// Large inputs have C = 3, so in contiguous views a piece may span the end of a row.
#include "activation.cuh"
#include "walk.cuh"

namespace ett {
namespace {

// shift null: no shift.
template <class T, int N> struct Affine {
    Matrix<const T> x;
    const T* shift;
    const T* scale;
    Matrix<T> y;
    int64_t channels;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ void finish(Place p, const In& in) const {
        float v[N];
        unpack(v, in);
        int64_t c = p.at % channels;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (shift) v[i] -= to_float(shift[c]);
            v[i] = quotient<T>(v[i], to_float(scale[c]));
            c = c + 1 == channels ? 0 : c + 1;
        }
        put(y, p, v);
    }
};

int32_t affine(Check& check, const char* op, const ett_launch* l, const ett_view& x, const ett_view* shift, const ett_view& scale,
               const ett_view& y) {
    const Views views{&x, &y};
    return with_act(y.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, op, l, extent(views), views, [&](auto n) {
            return Affine<T, n>{matrix<const T>(x), shift ? data<const T>(*shift) : nullptr, data<const T>(scale), matrix<T>(y), cols(x)};
        });
    });
}

bool sound(Check& check, const ett_channel_affine_fwd_args* a) {
    return check.ok() && check.act("x", a->x) && check.vector("shift", a->shift, a->x.dtype, cols(a->x)) &&
           check.vector("scale", a->scale, a->x.dtype, cols(a->x)) && check.matrix("y", a->y, a->x.dtype, rows(a->x), cols(a->x));
}

bool sound(Check& check, const ett_channel_affine_bwd_args* a) {
    return check.ok() && check.act("dy", a->dy) && check.vector("scale", a->scale, a->dy.dtype, cols(a->dy)) &&
           check.matrix("dx", a->dx, a->dy.dtype, rows(a->dy), cols(a->dy));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(channel_affine_fwd)
ETT_NO_WORKSPACE(channel_affine_bwd)

extern "C" int32_t ett_channel_affine_fwd(const ett_channel_affine_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("channel_affine_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    return affine(check, "channel_affine_fwd", l, a->x, &a->shift, a->scale, a->y);
}

extern "C" int32_t ett_channel_affine_bwd(const ett_channel_affine_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("channel_affine_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->dx) == 0) return ett_done("");
    return affine(check, "channel_affine_bwd", l, a->dy, nullptr, a->scale, a->dx);
}
