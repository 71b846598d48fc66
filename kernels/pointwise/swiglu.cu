// swiglu.cu: y = silu(gate) * up and its gradient; gate and up are the left and right halves of one matrix.
//
// gate_up   N,2F  act  rows of any stride, gate first   in
// y         N,F   act  rows of any stride               out
// dy        N,F   act  rows of any stride               in
// dgate_up  N,2F  act  rows of any stride               out; may be gate_up itself
//
// numerics: float32, one rounding per output; bitwise repeatable.
// work: 3*N*F*size bytes and about 5 FLOP an output forward, 5*N*F*size bytes and 10 FLOP backward.
#include "activation.cuh"
#include "walk.cuh"

namespace ett {
namespace {

template <class T, int N> struct SwigluFwd {
    Matrix<const T> gate, up;
    Matrix<T> y;

    struct In {
        Vec<T, N> gate, up;
    };
    __device__ In load(Place p) const { return {piece<N>(gate, p), piece<N>(up, p)}; }
    __device__ void finish(Place p, const In& in) const {
        float g[N], u[N];
        unpack(g, in.gate);
        unpack(u, in.up);
#pragma unroll
        for (int i = 0; i < N; ++i) u[i] *= silu<T>(g[i]);
        put(y, p, u);
    }
};

template <class T, int N> struct SwigluBwd {
    Matrix<const T> dy, gate, up;
    Matrix<T> dgate, dup;

    struct In {
        Vec<T, N> dy, gate, up;
    };
    __device__ In load(Place p) const { return {piece<N>(dy, p), piece<N>(gate, p), piece<N>(up, p)}; }
    __device__ void finish(Place p, const In& in) const {
        float d[N], g[N], u[N];
        unpack(d, in.dy);
        unpack(g, in.gate);
        unpack(u, in.up);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float s = sigmoid<T>(g[i]), of_up = d[i] * g[i] * s;
            g[i] = d[i] * u[i] * s * (1.f + g[i] * (1.f - s));
            u[i] = of_up;
        }
        put(dgate, p, g);
        put(dup, p, u);
    }
};

// The right half of the columns.
ett_view right(const ett_view& v) {
    ett_view r = v;
    r.ptr = data<char>(v) + cols(v) / 2 * dtype_size(v.dtype);
    return r;
}

bool sound(Check& check, const ett_swiglu_fwd_args* a) {
    return check.ok() && check.act("y", a->y) && check.matrix("gate_up", a->gate_up, a->y.dtype, rows(a->y), 2 * cols(a->y));
}

bool sound(Check& check, const ett_swiglu_bwd_args* a) {
    return check.ok() && check.act("dy", a->dy) && check.matrix("gate_up", a->gate_up, a->dy.dtype, rows(a->dy), 2 * cols(a->dy)) &&
           check.matrix("dgate_up", a->dgate_up, a->dy.dtype, rows(a->dy), 2 * cols(a->dy));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(swiglu_fwd)
ETT_NO_WORKSPACE(swiglu_bwd)

extern "C" int32_t ett_swiglu_fwd(const ett_swiglu_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("swiglu_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const ett_view up = right(a->gate_up);
    return with_act(a->y.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "swiglu_fwd", l, Extent{rows(a->y), cols(a->y)}, {&a->gate_up, &up, &a->y}, [&](auto n) {
            return SwigluFwd<T, n>{matrix<const T>(a->gate_up), matrix<const T>(up), matrix<T>(a->y)};
        });
    });
}

extern "C" int32_t ett_swiglu_bwd(const ett_swiglu_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("swiglu_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->dy) == 0) return ett_done("");
    const ett_view up = right(a->gate_up), dup = right(a->dgate_up);
    return with_act(a->dy.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "swiglu_bwd", l, Extent{rows(a->dy), cols(a->dy)}, {&a->dy, &a->gate_up, &up, &a->dgate_up, &dup},
                              [&](auto n) {
                                  return SwigluBwd<T, n>{matrix<const T>(a->dy), matrix<const T>(a->gate_up), matrix<const T>(up),
                                                         matrix<T>(a->dgate_up), matrix<T>(dup)};
                              });
    });
}
