// arange.cu: y[n] = n * step: the offsets of sequences of equal length.
//
// y   N  i32  contiguous   out
//
// numerics: exact.   work: 4*N bytes.   limits: the last value is below 2^31.
#include "walk.cuh"

namespace ett {
namespace {

template <int N> struct Arange {
    Matrix<int32_t> y;
    int64_t step;

    struct In {};
    __device__ In load(Place) const { return {}; }
    __device__ void finish(Place p, const In&) const {
        Vec<int32_t, N> v;
#pragma unroll
        for (int j = 0; j < N; ++j) v.v[j] = int32_t((p.at + j) * step);
        store_vec(y.row(p.row) + p.at, v);
    }
};

bool sound(Check& check, const ett_arange_args* a) {
    return check.ok() && check.type("y", a->y, ETT_I32) && check.vector("y", a->y, ETT_I32, numel(a->y)) &&
           check.range("step", a->step, 0, INT32_MAX / std::max<int64_t>(numel(a->y) - 1, 1));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(arange)

extern "C" int32_t ett_arange(const ett_arange_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("arange", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Views views{&a->y};
    return walk<kWide<int32_t>>(check, "arange", l, extent(views), views, [&](auto n) { return Arange<n>{matrix<int32_t>(a->y), a->step}; });
}
