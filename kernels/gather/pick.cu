// pick.cu: integers of a table by index, y[n] = x[idx[n]]: gather for columns of i32, such as targets.
//
// x     R  i32  contiguous   in
// idx   N  i32  contiguous   in; negative: -1 is stored; R or more: a fault, then the same
// y     N  i32  contiguous   out
//
// numerics: copies.   work: 12*N bytes.
#include "walk.cuh"

namespace ett {
namespace {

template <int N> struct Pick {
    const int32_t* x;
    Matrix<const int32_t> idx;
    Matrix<int32_t> y;
    int64_t rows;
    Fault fault;

    using In = Vec<int32_t, N>;
    __device__ In load(Place p) const {
        In v = piece<N>(idx, p);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int32_t i = v.v[j];
            if (i >= rows) report_index(fault, p.at + j, i, rows);
            v.v[j] = i >= 0 && i < rows ? x[i] : -1;
        }
        return v;
    }
    __device__ void finish(Place p, const In& in) const { store_vec(y.row(p.row) + p.at, in); }
};

bool sound(Check& check, const ett_pick_args* a) {
    return check.ok() && check.type("x", a->x, ETT_I32) && check.vector("x", a->x, ETT_I32, numel(a->x)) &&
           check.type("idx", a->idx, ETT_I32) && check.vector("idx", a->idx, ETT_I32, numel(a->idx)) &&
           check.vector("y", a->y, ETT_I32, numel(a->idx));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(pick)

extern "C" int32_t ett_pick(const ett_pick_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("pick", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Views views{&a->idx, &a->y};
    return walk<kWide<int32_t>>(check, "pick", l, extent(views), views, [&](auto n) {
        return Pick<n>{data<const int32_t>(a->x), matrix<const int32_t>(a->idx), matrix<int32_t>(a->y), numel(a->x), fault_of(l)};
    });
}
