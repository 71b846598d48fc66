// count_up.cu: x[n] += 1: positions, lengths and step counts that a recorded step moves on by itself. If norm[1] > 0, the
// step is skipped, as by adamw, and the kernel changes nothing.
//
// x      N  i32  contiguous   updated; 2^31 - 1 becomes -2^31
// norm   2  f32  contiguous   in; may be absent
//
// work: 8*N bytes.
#include "launch.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256, kBlocks = 8;  // blocks per multiprocessor

__global__ void __launch_bounds__(kThreads) count_up_kernel(int32_t* x, int64_t n, const float* norm) {
    if (norm && norm[1] > 0.f) return;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads) x[i] = int32_t(uint32_t(x[i]) + 1u);
}

bool sound(Check& check, const ett_count_up_args* a) {
    return check.ok() && check.type("x", a->x, ETT_I32) && check.vector("x", a->x, ETT_I32, numel(a->x)) &&
           (!present(a->norm) || check.vector("norm", a->norm, ETT_F32, 2));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(count_up)

extern "C" int32_t ett_count_up(const ett_count_up_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("count_up", a, l);
    if (!sound(check, a)) return check.status();
    const char* kernel = check.choose(l, {{"plain", true}});
    if (!check.ok()) return check.status();
    const int64_t n = numel(a->x);
    if (n == 0) return ett_done("");
    const unsigned blocks = unsigned(std::min(ceil_div(n, kThreads), int64_t(multiprocessors()) * kBlocks));
    const int32_t status =
        launch("count_up", count_up_kernel, dim3(blocks), dim3(kThreads), 0, l, data<int32_t>(a->x), n, data<const float>(a->norm));
    return status == ETT_OK ? ett_done(kernel) : status;
}
