// put_rows.cu: rows of a table are replaced by index, y[idx[n]] = x[n]: the keys and values of new positions go to their
// rows of a cache.
//
// x     N,C  any type   rows of any stride   in
// idx   N    i32        contiguous           in       no row twice; negative: nothing is stored; R or more: a fault, then the same
// y     R,C  that of x  rows of any stride   updated  rows without an index keep their values
//
// numerics: copies of elements of 1, 2, 4 or 8 bytes. Bitwise repeatable, if no row has two indices.
// work: 2*N*C*size + 4*N bytes.
#include "walk.cuh"

namespace ett {
namespace {

template <class T, int N> struct PutRows {
    Matrix<const T> x;
    const int32_t* idx;
    Matrix<T> y;
    int64_t rows;
    Fault fault;

    struct In {
        Vec<T, N> v;
        int32_t to;
    };
    __device__ In load(Place p) const { return In{load_vec<N>(x.row(p.row) + p.at), idx[p.row]}; }
    __device__ void finish(Place p, const In& in) const {
        if (in.to >= 0 && in.to < rows) store_vec(y.row(in.to) + p.at, in.v);
        if (in.to >= rows && p.at == 0) report_index(fault, p.row, in.to, rows);
    }
};

bool sound(Check& check, const ett_put_rows_args* a) {
    return check.ok() && check.view("x", a->x) && check.vector("idx", a->idx, ETT_I32, rows(a->x)) &&
           check.type("y", a->y, a->x.dtype) && check.matrix("y", a->y, a->x.dtype, rows(a->y), cols(a->x));
}

// Calls f with a value of an integer type of this size: what the bytes mean does not matter to a copy.
template <class F> int32_t with_size(int64_t bytes, F f) {
    switch (bytes) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
    }
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(put_rows)

extern "C" int32_t ett_put_rows(const ett_put_rows_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("put_rows", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const Extent e{rows(a->x), cols(a->x)};
    return with_size(dtype_size(a->x.dtype), [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "put_rows", l, e, {&a->x, &a->y}, [&](auto n) {
            return PutRows<T, n>{matrix<const T>(a->x), data<const int32_t>(a->idx), matrix<T>(a->y), rows(a->y), fault_of(l)};
        });
    });
}
