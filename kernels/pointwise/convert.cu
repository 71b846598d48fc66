// convert.cu: kernels with different element types for input and output: cast, y = x rounded to the type of y;
// accumulate, y += x; scale_bytes, y = x / 127.5 - 1, the bytes of pictures as values in [-1, 1].
//
// x      N,C  f32 or bf16; u8 (scale_bytes)  rows of any stride   in
// y      N,C  f32 or bf16                   rows of any stride   out, added to by accumulate
//
// numerics: float32, one rounding to the type of y; bitwise repeatable.
// work: N*C FLOP (accumulate), 2*N*C FLOP (scale_bytes); each element of x is read once, each element of y is written
// once (and read once by accumulate).
#include "walk.cuh"

namespace ett {
namespace {

template <class X, class Y, int N> struct AccumulateOp {
    Matrix<const X> x;
    Matrix<Y> y;

    struct In {
        Vec<X, N> x;
        Vec<Y, N> y;
    };
    __device__ In load(Place p) const { return {piece<N>(x, p), piece<N>(y, p)}; }
    __device__ void finish(Place p, const In& in) const {
        float u[N], v[N];
        unpack(u, in.x);
        unpack(v, in.y);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] += u[i];
        put(y, p, v);
    }
};

template <class X, class Y, int N> struct CastOp {
    Matrix<const X> x;
    Matrix<Y> y;

    using In = Vec<X, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ void finish(Place p, const In& in) const {
        float v[N];
        unpack(v, in);
        put(y, p, v);
    }
};

template <class Y, int N> struct ScaleBytesOp {
    Matrix<const uint8_t> x;
    Matrix<Y> y;

    using In = Vec<uint8_t, N>;
    __device__ In load(Place p) const { return piece<N>(x, p); }
    __device__ void finish(Place p, const In& in) const {
        float v[N];
        unpack(v, in);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = v[i] / 127.5f - 1.f;
        put(y, p, v);
    }
};

// Elements per piece, such that a piece of either type has at most 16 bytes.
template <class X, class Y> inline constexpr int kBoth = kWide<X> < kWide<Y> ? kWide<X> : kWide<Y>;

// Calls f with a value of the type of x and one of the type of y.
template <class F> int32_t with_types(const ett_view& x, const ett_view& y, F f) {
    return with_act(x.dtype, [&](auto u) { return with_act(y.dtype, [&](auto v) { return f(u, v); }); });
}

template <class A> bool sound(Check& check, const A* a) {
    return check.ok() && check.act("x", a->x) && check.act("y", a->y) && check.matrix("y", a->y, a->y.dtype, rows(a->x), cols(a->x));
}

bool sound(Check& check, const ett_scale_bytes_args* a) {
    return check.ok() && check.type("x", a->x, ETT_U8) && check.act("y", a->y) &&
           check.matrix("y", a->y, a->y.dtype, rows(a->x), cols(a->x));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(accumulate)
ETT_NO_WORKSPACE(cast)
ETT_NO_WORKSPACE(scale_bytes)

extern "C" int32_t ett_accumulate(const ett_accumulate_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("accumulate", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Views views{&a->x, &a->y};
    return with_types(a->x, a->y, [&](auto u, auto v) {
        using X = decltype(u);
        using Y = decltype(v);
        return walk<kBoth<X, Y>>(check, "accumulate", l, extent(views), views,
                                 [&](auto n) { return AccumulateOp<X, Y, n>{matrix<const X>(a->x), matrix<Y>(a->y)}; });
    });
}

extern "C" int32_t ett_cast(const ett_cast_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("cast", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Views views{&a->x, &a->y};
    return with_types(a->x, a->y, [&](auto u, auto v) {
        using X = decltype(u);
        using Y = decltype(v);
        return walk<kBoth<X, Y>>(check, "cast", l, extent(views), views,
                                 [&](auto n) { return CastOp<X, Y, n>{matrix<const X>(a->x), matrix<Y>(a->y)}; });
    });
}

extern "C" int32_t ett_scale_bytes(const ett_scale_bytes_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("scale_bytes", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Views views{&a->x, &a->y};
    return with_act(a->y.dtype, [&](auto t) {
        using Y = decltype(t);
        return walk<kWide<Y>>(check, "scale_bytes", l, extent(views), views,
                              [&](auto n) { return ScaleBytesOp<Y, n>{matrix<const uint8_t>(a->x), matrix<Y>(a->y)}; });
    });
}
