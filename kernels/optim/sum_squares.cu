// sum_squares.cu: out[0] += sum x^2 over the finite elements, out[1] += the number of non-finite elements.
//
// x    n  f32  contiguous   in
// out  2  f32  contiguous   added to
//
// numerics: float32. Each thread sums every kThreads-th piece of its block's part in four sums, a block its threads,
// a last block the blocks. The order depends only on n and the number of multiprocessors: bitwise repeatable.
// work: 2 FLOP and 4 bytes an element.   workspace: 8 bytes per block.
#include "launch.cuh"
#include "reduce.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 16;   // per multiprocessor: twice the resident ones
constexpr int kPiece = 4;     // elements of a 16-byte load
constexpr int kTogether = 4;  // loads of a thread in flight

// Blocks of the first kernel.
int64_t choose_sum_squares_blocks(int64_t n, int multiprocessors) {
    return std::min(ceil_div(n, int64_t(kThreads) * kPiece * kTogether), int64_t(multiprocessors) * kBlocks);
}

__device__ __forceinline__ void take(float v, float& squares, float& bad) {
    const bool finite = fabsf(v) <= 3.402823466e38f;
    squares += finite ? v * v : 0.f;
    bad += finite ? 0.f : 1.f;
}

// partials[b] = sum and count of block b. PIECE is 1 if x is not aligned.
template <int PIECE>
__global__ void __launch_bounds__(kThreads) sum_squares_kernel(const float* x, int64_t n, float2* partials) {
    __shared__ float smem[2 * kThreads / kWarp];
    float squares[PIECE] = {}, bad = 0.f;
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads, pieces = n / PIECE;
    for (int64_t i = first; i < pieces; i += kTogether * step) {
        float v[kTogether][PIECE] = {};
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
            if (i + k * step < pieces) load(v[k], x + (i + k * step) * PIECE);
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
#pragma unroll
            for (int j = 0; j < PIECE; ++j) take(v[k][j], squares[j], bad);
    }
    // The elements after the last whole piece.
    if (first < n % PIECE) take(x[pieces * PIECE + first], squares[0], bad);
    float sums[2] = {0.f, bad};
#pragma unroll
    for (int j = 0; j < PIECE; ++j) sums[0] += squares[j];
    block_sum<2, kThreads>(sums, smem);
    if (threadIdx.x == 0) partials[blockIdx.x] = make_float2(sums[0], sums[1]);
}

// Adds the sums of all blocks to out.
__global__ void __launch_bounds__(kThreads) sum_squares_total_kernel(const float2* partials, int blocks, float* out) {
    __shared__ float smem[2 * kThreads / kWarp];
    float sums[2] = {0.f, 0.f};
    for (int b = int(threadIdx.x); b < blocks; b += kThreads) {
        const float2 p = partials[b];
        sums[0] += p.x;
        sums[1] += p.y;
    }
    block_sum<2, kThreads>(sums, smem);
    if (threadIdx.x == 0) {
        out[0] += sums[0];
        out[1] += sums[1];
    }
}

bool sound(Check& check, const ett_sum_squares_args* a) {
    return check.ok() && check.act("x", a->x) && check.vector("x", a->x, ETT_F32, numel(a->x)) && check.vector("out", a->out, ETT_F32, 2);
}

}  // namespace
}  // namespace ett

extern "C" int64_t ett_sum_squares_workspace(const ett_sum_squares_args* a) {
    using namespace ett;
    Check check("sum_squares", a);
    if (!sound(check, a)) return -1;
    return choose_sum_squares_blocks(numel(a->x), multiprocessors()) * int64_t(sizeof(float2));
}

extern "C" int32_t ett_sum_squares(const ett_sum_squares_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("sum_squares", a, l);
    if (!sound(check, a)) return check.status();
    const int64_t n = numel(a->x);
    if (n == 0) return ett_done("");
    const int64_t blocks = choose_sum_squares_blocks(n, multiprocessors());
    check.workspace(l, blocks * int64_t(sizeof(float2)));
    const char* kernel = check.choose(l, {{"wide", reinterpret_cast<uintptr_t>(a->x.ptr) % 16 == 0}, {"plain", true}});
    if (!check.ok()) return check.status();
    float2* partials = static_cast<float2*>(l->workspace);
    auto* run = strcmp(kernel, "wide") == 0 ? sum_squares_kernel<kPiece> : sum_squares_kernel<1>;
    int32_t status = launch("sum_squares", run, dim3(unsigned(blocks)), dim3(kThreads), 0, l, data<const float>(a->x), n, partials);
    if (status == ETT_OK)
        status = launch("sum_squares", sum_squares_total_kernel, dim3(1), dim3(kThreads), 0, l, partials, int(blocks), data<float>(a->out));
    return status == ETT_OK ? ett_done(kernel) : status;
}
