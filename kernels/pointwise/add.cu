// add.cu: y = a + b.
//
// a, b   N,C  act  rows of any stride   in
// y      N,C  act  rows of any stride   out; may be a or b themselves
//
// numerics: one rounding; bitwise repeatable.   work: N*C FLOP, 3*N*C*size bytes.
#include "launch.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256;

// Every thread moves N elements at a time; `pieces` of them make a row.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
add_kernel(const T* a, const T* b, T* y, int64_t total, int64_t pieces, int64_t lda, int64_t ldb, int64_t ldy) {
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < total; i += int64_t(gridDim.x) * kThreads) {
        const int64_t row = i / pieces, at = (i - row * pieces) * N;
        float u[N], v[N];
        load<N>(u, a + row * lda + at);
        load<N>(v, b + row * ldb + at);
#pragma unroll
        for (int j = 0; j < N; ++j) u[j] += v[j];
        store<N>(y + row * ldy + at, u);
    }
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(add)

extern "C" int32_t ett_add(const ett_add_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("add", a, l);
    if (!check.ok() || !check.act("y", a->y) || !check.matrix("a", a->a, a->y.dtype, rows(a->y), cols(a->y)) ||
        !check.matrix("b", a->b, a->y.dtype, rows(a->y), cols(a->y)))
        return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const bool vectors = wide(a->a) && wide(a->b) && wide(a->y);
    const char* names[] = {vectors ? "wide" : "plain", "plain", nullptr};
    const char* kernel = check.choose(l, names[0], names);
    if (!check.ok()) return check.status();
    return with_act(a->y.dtype, [&](auto t) {
        using T = decltype(t);
        auto go = [&](auto* k, int n) {
            const int64_t pieces = cols(a->y) / n, total = rows(a->y) * pieces;
            const dim3 grid(unsigned(std::min<int64_t>(ceil_div(total, kThreads), int64_t(multiprocessors()) * 16)));
            const int32_t status = launch("add", k, grid, dim3(kThreads), 0, l, data<const T>(a->a), data<const T>(a->b), data<T>(a->y), total,
                                          pieces, stride(a->a), stride(a->b), stride(a->y));
            return status == ETT_OK ? ett_done(kernel) : status;
        };
        return strcmp(kernel, "wide") == 0 ? go(add_kernel<T, kWide<T>>, kWide<T>) : go(add_kernel<T, 1>, 1);
    });
}
