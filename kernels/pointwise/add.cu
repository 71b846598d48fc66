// add.cu: y = a + b.
//
// a, b   N,C  act  rows of any stride   in
// y      N,C  act  rows of any stride   out; may be a or b themselves
//
// numerics: one rounding; bitwise repeatable.   work: N*C FLOP, 3*N*C*size bytes.
#include "walk.cuh"

namespace ett {
namespace {

template <class T, int N> struct AddOp {
    Matrix<const T> a, b;
    Matrix<T> y;

    struct In {
        Vec<T, N> a, b;
    };
    __device__ In load(Place p) const { return {piece<N>(a, p), piece<N>(b, p)}; }
    __device__ void finish(Place p, const In& in) const {
        float u[N], v[N];
        unpack(u, in.a);
        unpack(v, in.b);
#pragma unroll
        for (int i = 0; i < N; ++i) u[i] += v[i];
        put(y, p, u);
    }
};

bool sound(Check& check, const ett_add_args* a) {
    return check.ok() && check.act("y", a->y) && check.matrix("a", a->a, a->y.dtype, rows(a->y), cols(a->y)) &&
           check.matrix("b", a->b, a->y.dtype, rows(a->y), cols(a->y));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(add)

extern "C" int32_t ett_add(const ett_add_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("add", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Views views{&a->a, &a->b, &a->y};
    return with_act(a->y.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "add", l, extent(views), views, [&](auto n) {
            return AddOp<T, n>{matrix<const T>(a->a), matrix<const T>(a->b), matrix<T>(a->y)};
        });
    });
}
