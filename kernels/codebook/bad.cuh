// bad.cuh: the number of tokens without a finite score.
#pragma once

#include "launch.cuh"
#include "reduce.cuh"

namespace ett {
namespace codebook {

inline constexpr int kBadThreads = 1024;

// bad[0] += the number of rows whose best score is not finite; one block, so that the order of the sum is fixed.
__global__ void __launch_bounds__(kBadThreads) static count_bad_kernel(const float* best, int64_t rows, float* bad) {
    __shared__ float smem[kBadThreads / kWarp];
    float count[1] = {0.f};
    for (int64_t row = threadIdx.x; row < rows; row += kBadThreads) count[0] += fabsf(best[row]) <= 3.402823466e38f ? 0.f : 1.f;
    block_sum<1, kBadThreads>(count, smem);
    if (threadIdx.x == 0) bad[0] += count[0];
}

inline int32_t launch_count_bad(const char* op, const float* best, int64_t rows, float* bad, const ett_launch* l) {
    return launch(op, count_bad_kernel, dim3(1), dim3(kBadThreads), 0, l, best, rows, bad);
}

}  // namespace codebook
}  // namespace ett
