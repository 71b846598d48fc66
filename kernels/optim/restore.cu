// restore.cu: y = x if norm[1] > 0, else nothing: restores the values from before a step that is skipped.
//
// x     n  f32 or bf16   contiguous   in
// norm  2  f32           contiguous   in
// y     n  type of x     contiguous   updated
//
// numerics: bits are copied.   work: one read and one write per element if the step is skipped, else 8 bytes per block.
#include "launch.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 8;  // per multiprocessor

// PIECE is 1 if x or y is not aligned.
template <class T, int PIECE> __global__ void __launch_bounds__(kThreads) restore_kernel(const T* x, const float* norm, T* y, int64_t n) {
    if (!(norm[1] > 0.f)) return;
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads, pieces = n / PIECE;
    for (int64_t i = first; i < pieces; i += step) store_vec<PIECE>(y + i * PIECE, load_vec<PIECE>(x + i * PIECE));
    if (first < n % PIECE) y[pieces * PIECE + first] = x[pieces * PIECE + first];
}

bool sound(Check& check, const ett_restore_args* a) {
    return check.ok() && check.act("x", a->x) && check.vector("x", a->x, a->x.dtype, numel(a->x)) &&
           check.vector("norm", a->norm, ETT_F32, 2) && check.vector("y", a->y, a->x.dtype, numel(a->x));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(restore)

extern "C" int32_t ett_restore(const ett_restore_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("restore", a, l);
    if (!sound(check, a)) return check.status();
    const int64_t n = numel(a->x);
    const bool aligned = reinterpret_cast<uintptr_t>(a->x.ptr) % 16 == 0 && reinterpret_cast<uintptr_t>(a->y.ptr) % 16 == 0;
    const char* kernel = check.choose(l, {{"wide", aligned}, {"plain", true}});
    if (!check.ok()) return check.status();
    if (n == 0) return ett_done("");
    const bool pieces = strcmp(kernel, "wide") == 0;
    const int32_t status = with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        constexpr int kPiece = 16 / int(sizeof(T));
        const int64_t blocks = std::min(ceil_div(n, int64_t(kThreads) * (pieces ? kPiece : 1)), int64_t(multiprocessors()) * kBlocks);
        return launch("restore", pieces ? restore_kernel<T, kPiece> : restore_kernel<T, 1>, dim3(unsigned(blocks)), dim3(kThreads), 0, l,
                      data<const T>(a->x), data<const float>(a->norm), data<T>(a->y), n);
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}
