// rope.cu: rotary embedding, half-split. In each of the first H heads of a row, dimensions d and d + D/2 are rotated by
// the angle position * theta^(-2d/D); further columns are copied.
//
// x         N, >= H*D  act  rows of any stride   in
// position  N          i32  contiguous           in
// y         N, >= H*D  act  rows of any stride   out; may be x itself
//
// numerics: frequencies are computed in double on the host and rounded to float32; an angle is the float32 product of
// position and frequency. Its sine and cosine have float32 accuracy for angles of any size, since the argument is
// reduced in double. The rotation is float32, one rounding per output; bitwise repeatable.
// work: 6 FLOP a pair, D/2 sines and cosines a row; 2*N*cols*size + 4*N bytes.   limits: D even, at most 512.
#include <math.h>

#include "matrix.cuh"
#include "reduce.cuh"

namespace ett {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kThreads / kWarp;  // per block at a time: a warp rotates a row, all heads by the same angles
constexpr int kBlocks = 16;              // per multiprocessor
constexpr int kHalf = 256;               // maximum of D/2

template <class T> struct Rope {
    Matrix<const T> x;
    const int32_t* position;
    Matrix<T> y;
    int64_t n, cols;
    int32_t heads, half;  // half: D/2
    float sign;           // factor on the sines: -1 for the inverse rotation
    float frequency[kHalf];
};

// Sine and cosine of an angle in radians.
__device__ __forceinline__ void sine_cosine(float angle, float& sine, float& cosine) {
    // The angle in half turns, less the nearest multiple of a quarter turn: the rest is at most an eighth of a turn.
    const double turns = double(angle) * 0.31830988618379067154, quarters = rint(2. * turns);
    const float rest = float(turns - 0.5 * quarters), s = sinpif(rest), c = cospif(rest);
    const long long quadrant = (long long)(quarters);
    sine = quadrant & 1 ? c : s;
    cosine = quadrant & 1 ? s : c;
    if (quadrant & 2) sine = -sine;
    if ((quadrant + 1) & 2) cosine = -cosine;
}

template <class T, int N> __global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ Rope<T> a) {
    __shared__ float smem_frequency[kHalf];
    alignas(16) __shared__ float smem_cos[kRows][kHalf], smem_sin[kRows][kHalf];
#pragma unroll 1
    for (int k = int(threadIdx.x); k < a.half; k += kThreads) smem_frequency[k] = a.frequency[k];
    __syncthreads();  // the frequencies are visible

    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    float *cosines = smem_cos[warp], *sines = smem_sin[warp];
    const unsigned pieces = unsigned(a.half / N), pairs = unsigned(a.heads) * pieces;
    for (int64_t row = int64_t(blockIdx.x) * kRows + warp; row < a.n; row += int64_t(gridDim.x) * kRows) {
        const float position = float(a.position[row]);
        for (int k = lane; k < a.half; k += kWarp) {
            float s, c;
            sine_cosine(position * smem_frequency[k], s, c);
            cosines[k] = c;
            sines[k] = a.sign * s;
        }
        __syncwarp();  // the row's angles are visible
        const T* x = a.x.row(row);
        T* y = a.y.row(row);
        for (unsigned i = unsigned(lane); i < pairs; i += kWarp) {
            const unsigned head = i / pieces, k = (i - head * pieces) * N;
            const int64_t at = int64_t(head) * 2 * a.half + k;
            float u[N], v[N], c[N], s[N];
            load(u, x + at);
            load(v, x + at + a.half);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                c[j] = cosines[k + j];
                s[j] = sines[k + j];
            }
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float turned = u[j] * c[j] - v[j] * s[j];
                v[j] = v[j] * c[j] + u[j] * s[j];
                u[j] = turned;
            }
            store_global(y + at, u);
            store_global(y + at + a.half, v);
        }
        for (int64_t at = int64_t(a.heads) * 2 * a.half + lane * N; at < a.cols; at += kWarp * N)
            store_vec(y + at, load_vec<N>(x + at));
        __syncwarp();  // the angles are no longer read
    }
}

bool sound(Check& check, const ett_rope_args* a) {
    if (!check.ok() || !check.act("x", a->x) || !check.matrix("y", a->y, a->x.dtype, rows(a->x), cols(a->x)) ||
        !check.vector("position", a->position, ETT_I32, rows(a->x)) || !check.range("head_dim", a->head_dim, 2, INT32_MAX))
        return false;
    check.require(a->head_dim % 2 == 0, "head_dim", "odd", "even");
    check.range("heads", a->heads, 0, cols(a->x) / a->head_dim);
    if (a->head_dim > 2 * kHalf) check.fail(ETT_UNSUPPORTED, "head_dim", "more than 512", "at most 512");
    return check.ok();
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(rope)

extern "C" int32_t ett_rope(const ett_rope_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("rope", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const int n = a->x.dtype == ETT_BF16 ? kWide<bf16> : kWide<float>;
    const char* kernel = check.choose(l, {{"wide", wide(a->x) && wide(a->y) && a->head_dim / 2 % n == 0}, {"plain", true}});
    if (!check.ok()) return check.status();
    return with_act(a->y.dtype, [&](auto t) {
        using T = decltype(t);
        Rope<T> r{matrix<const T>(a->x), data<const int32_t>(a->position), matrix<T>(a->y), rows(a->x), cols(a->x), int32_t(a->heads),
                  int32_t(a->head_dim / 2), a->inverse ? -1.f : 1.f, {}};
        for (int k = 0; k < r.half; ++k) r.frequency[k] = float(pow(a->theta, -2. * k / double(a->head_dim)));
        const dim3 grid(unsigned(std::min(ceil_div(r.n, kRows), int64_t(multiprocessors()) * kBlocks)));
        auto* run = strcmp(kernel, "wide") == 0 ? rope_kernel<T, kWide<T>> : rope_kernel<T, 1>;
        const int32_t status = launch("rope", run, grid, dim3(kThreads), 0, l, r);
        return status == ETT_OK ? ett_done(kernel) : status;
    });
}
