// fill.cu: y = value.
//
// y      N,C  any type  rows of any stride   out
//
// numerics: the value is rounded once (to bf16 by way of float32; to i32 and u8 towards zero).   work: N*C*size bytes.
#include <limits>

#include "walk.cuh"

namespace ett {
namespace {

// V is T, or float if T is bf16.
template <class T, class V, int N> struct FillOp {
    Matrix<T> y;
    V value;

    struct In {};
    __device__ In load(Place) const { return {}; }
    __device__ void finish(Place p, const In&) const {
        Vec<T, N> v;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if constexpr (std::is_same_v<T, V>)
                v.v[i] = value;
            else
                v.v[i] = from_float<T>(value);
        }
        store_vec(y.row(p.row) + p.at, v);
    }
};

// Converts as Rust's `as` does: rounds towards zero, saturates, 0 for NaN.
template <class T> T to_int(double v) {
    using Limits = std::numeric_limits<T>;
    if (v != v) return 0;
    return v >= Limits::max() ? Limits::max() : v <= Limits::min() ? Limits::min() : T(v);
}

template <class T, class V> int32_t fill(Check& check, const ett_fill_args* a, const ett_launch* l, V value) {
    const Views views{&a->y};
    return walk<kWide<T>>(check, "fill", l, extent(views), views, [&](auto n) { return FillOp<T, V, n>{matrix<T>(a->y), value}; });
}

bool sound(Check& check, const ett_fill_args* a) { return check.ok() && check.view("y", a->y); }

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(fill)

extern "C" int32_t ett_fill(const ett_fill_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("fill", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    switch (a->y.dtype) {
    case ETT_F64: return fill<double>(check, a, l, a->value);
    case ETT_F32: return fill<float>(check, a, l, float(a->value));
    case ETT_BF16: return fill<bf16>(check, a, l, float(a->value));
    case ETT_U8: return fill<uint8_t>(check, a, l, to_int<uint8_t>(a->value));
    default: return fill<int32_t>(check, a, l, to_int<int32_t>(a->value));
    }
}
