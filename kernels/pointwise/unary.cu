// unary.cu: y = f(x) and dx = dy * f'(x), where f is SiLU, GELU (exact or in its tanh form), ReLU or LeakyReLU.
//
// x, dy  N,C  act  rows of any stride   in
// y, dx  N,C  act  rows of any stride   out; may be an input itself
//
// numerics: float32, one rounding; bitwise repeatable.
// work: up to about 30 FLOP (GELU) an element; 2*N*C*size bytes forward, 3*N*C*size backward.
#include "activation.cuh"
#include "walk.cuh"

namespace ett {
namespace {

template <class F, int N> __device__ __forceinline__ void each(float (&v)[N], F f) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = f(v[i]);
}

template <class T, int N> struct UnaryFwd {
    Matrix<const T> x;
    Matrix<T> y;
    int32_t kind;
    float slope;

    using In = Vec<T, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ void finish(Place p, const In& in) const {
        float v[N];
        unpack(v, in);
        switch (kind) {
        case ETT_UNARY_SILU: each(v, [](float x) { return silu<T>(x); }); break;
        case ETT_UNARY_GELU: each(v, [](float x) { return gelu<T>(x); }); break;
        case ETT_UNARY_GELU_TANH: each(v, [](float x) { return gelu_tanh<T>(x); }); break;
        case ETT_UNARY_RELU: each(v, [](float x) { return relu(x); }); break;
        default: each(v, [s = slope](float x) { return leaky_relu(x, s); });
        }
        put(y, p, v);
    }
};

template <class T, int N> struct UnaryBwd {
    Matrix<const T> dy, x;
    Matrix<T> dx;
    int32_t kind;
    float slope;

    struct In {
        Vec<T, N> dy, x;
    };
    __device__ In load(Place p) const { return {piece<N>(dy, p), piece<N>(x, p)}; }
    __device__ void finish(Place p, const In& in) const {
        float v[N], d[N];
        unpack(v, in.x);
        unpack(d, in.dy);
        switch (kind) {
        case ETT_UNARY_SILU: each(v, [](float x) { return silu_slope<T>(x); }); break;
        case ETT_UNARY_GELU: each(v, [](float x) { return gelu_slope<T>(x); }); break;
        case ETT_UNARY_GELU_TANH: each(v, [](float x) { return gelu_tanh_slope<T>(x); }); break;
        default: each(v, [s = slope](float x) { return leaky_relu_slope(x, s); });
        }
#pragma unroll
        for (int i = 0; i < N; ++i) d[i] *= v[i];
        put(dx, p, d);
    }
};

bool check_function(Check& check, const ett_unary& f) {
    return check.range("f", f.kind, ETT_UNARY_SILU, ETT_UNARY_GELU_TANH);
}

bool sound(Check& check, const ett_unary_fwd_args* a) {
    return check.ok() && check.act("x", a->x) && check.matrix("y", a->y, a->x.dtype, rows(a->x), cols(a->x)) && check_function(check, a->f);
}

bool sound(Check& check, const ett_unary_bwd_args* a) {
    return check.ok() && check.act("dy", a->dy) && check.matrix("x", a->x, a->dy.dtype, rows(a->dy), cols(a->dy)) &&
           check.matrix("dx", a->dx, a->dy.dtype, rows(a->dy), cols(a->dy)) && check_function(check, a->f);
}

// The slope passed to the kernels: 0 for all functions but LeakyReLU.
float slope(const ett_unary& f) { return f.kind == ETT_UNARY_LEAKY_RELU ? float(f.slope) : 0.f; }

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(unary_fwd)
ETT_NO_WORKSPACE(unary_bwd)

extern "C" int32_t ett_unary_fwd(const ett_unary_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("unary_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Views views{&a->x, &a->y};
    return with_act(a->y.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "unary_fwd", l, extent(views), views, [&](auto n) {
            return UnaryFwd<T, n>{matrix<const T>(a->x), matrix<T>(a->y), a->f.kind, slope(a->f)};
        });
    });
}

extern "C" int32_t ett_unary_bwd(const ett_unary_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("unary_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->dx) == 0) return ett_done("");
    const Views views{&a->dy, &a->x, &a->dx};
    return with_act(a->dx.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "unary_bwd", l, extent(views), views, [&](auto n) {
            return UnaryBwd<T, n>{matrix<const T>(a->dy), matrix<const T>(a->x), matrix<T>(a->dx), a->f.kind, slope(a->f)};
        });
    });
}
