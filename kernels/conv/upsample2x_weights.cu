// upsample2x_weights.cu: weights of a 3x3 convolution after upsampling by two, for the image before the upsampling.
//
//   fwd   v[c,t,s,o] = sum_{i in I(t), j in I(s)} w[o,i,j,c],   I = {2}, {1, 2}, {0, 1}, {0}
//   bwd   dw[o,i,j,c] += sum_{t: i in I(t), s: j in I(s)} dv[c,t,s,o]
//
// w   O,3,3,C  act  rows of any stride  in
// v   C,4,4,O  act  rows of any stride  out
// dv  C,4,4,O  f32  rows of any stride  in
// dw  O,3,3,C  f32  rows of any stride  added to
//
// Of the nine pixels that the kernel meets in the upsampled image, several are copies of the same pixel; in each of the
// four phases of the output, four different ones are left. The transposed convolution of stride 2 and padding 1 by v
// (conv2d_bwd_data) multiplies these: 16 products where the upsampled image would need 36.
//
// numerics: sums in f32, in ascending order of i and j, or of t and s; one rounding of v. Bitwise repeatable.
// work: fwd 9*O*C + 16*O*C elements of act, bwd 36*O*C + 18*O*C of f32.   limits: none beyond memory.
#include "matrix.cuh"
#include "types.cuh"

namespace ett {
namespace {

constexpr int kSide = 32, kRows = 8, kThreads = kSide * kRows;  // sides of a tile of outputs and channels, rows at once
constexpr int kTaps = 3, kMost = 4;                             // taps of w and of v, along a side

// I(t) is [first(t), end(t)).
__device__ __forceinline__ int first(int t) { return t == 0 ? 2 : t == 1 ? 1 : 0; }
__device__ __forceinline__ int end(int t) { return t < 2 ? 3 : 4 - t; }

// Blocks take the tiles of channels one after the other, then those of outputs.
struct Tile {
    int64_t o, c;
    int lane, row;

    __device__ __forceinline__ Tile(int64_t channels)
        : o(blockIdx.x / ((channels + kSide - 1) / kSide) * kSide),
          c(blockIdx.x % ((channels + kSide - 1) / kSide) * kSide),
          lane(int(threadIdx.x) % kSide),
          row(int(threadIdx.x) / kSide) {}
};

template <class T> __global__ void __launch_bounds__(kThreads) forward_kernel(Matrix<const T> w, int64_t outputs, int64_t channels, Matrix<T> v) {
    __shared__ float smem[kTaps * kTaps][kSide][kSide + 1];  // [tap][output][channel]
    const Tile at(channels);
#pragma unroll 1
    for (int tap = 0; tap < kTaps * kTaps; ++tap)
#pragma unroll
        for (int r = at.row; r < kSide; r += kRows)
            smem[tap][r][at.lane] = at.o + r < outputs && at.c + at.lane < channels ? to_float(w.row((at.o + r) * (kTaps * kTaps) + tap)[at.c + at.lane]) : 0.f;
    __syncthreads();  // the tile is visible
    if (at.o + at.lane >= outputs) return;
#pragma unroll 1
    for (int r = at.row; r < kSide && at.c + r < channels; r += kRows)
#pragma unroll 1
        for (int t = 0; t < kMost; ++t)
#pragma unroll 1
            for (int s = 0; s < kMost; ++s) {
                float sum = 0.f;
                for (int i = first(t); i < end(t); ++i)
                    for (int j = first(s); j < end(s); ++j) sum += smem[i * kTaps + j][at.lane][r];
                v.row(((at.c + r) * kMost + t) * kMost + s)[at.o + at.lane] = from_float<T>(sum);
            }
}

__global__ void __launch_bounds__(kThreads) backward_kernel(Matrix<const float> dv, int64_t outputs, int64_t channels, Matrix<float> dw) {
    __shared__ float smem[kSide][kSide + 1];  // [channel][output]
    const Tile at(channels);
#pragma unroll 1
    for (int tap = 0; tap < kTaps * kTaps; ++tap) {
        const int i = tap / kTaps, j = tap - i * kTaps;
#pragma unroll
        for (int r = at.row; r < kSide; r += kRows) {
            float sum = 0.f;
            if (at.c + r < channels && at.o + at.lane < outputs)
#pragma unroll
                for (int n = 0; n < 4; ++n) sum += dv.row(((at.c + r) * kMost + 2 - i + n / 2) * kMost + 2 - j + n % 2)[at.o + at.lane];
            smem[r][at.lane] = sum;
        }
        __syncthreads();  // the sums are visible
#pragma unroll
        for (int r = at.row; r < kSide; r += kRows)
            if (at.o + r < outputs && at.c + at.lane < channels) dw.row((at.o + r) * (kTaps * kTaps) + tap)[at.c + at.lane] += smem[at.lane][r];
        __syncthreads();  // the sums have been read and may be overwritten
    }
}

// `w` [O, 3, 3, C] of type `w_type` and `v` [C, 4, 4, O] of type `v_type`.
bool shapes(Check& check, const char* w_name, const ett_view& w, int32_t w_type, const char* v_name, const ett_view& v, int32_t v_type) {
    if (!check.type(w_name, w, w_type) || !check.image(w_name, w) || !check.type(v_name, v, v_type) || !check.image(v_name, v)) return false;
    const int64_t o = w.dims[0], c = w.dims[3];
    char got[96];
    snprintf(got, sizeof got, "%lldx%lld taps", (long long)w.dims[1], (long long)w.dims[2]);
    if (!check.require(w.dims[1] == kTaps && w.dims[2] == kTaps, w_name, got, "3x3 taps")) return false;
    snprintf(got, sizeof got, "[%lld, %lld, %lld, %lld]", (long long)v.dims[0], (long long)v.dims[1], (long long)v.dims[2], (long long)v.dims[3]);
    char want[96];
    snprintf(want, sizeof want, "[%lld, 4, 4, %lld]", (long long)c, (long long)o);
    if (!check.require(v.dims[0] == c && v.dims[1] == kMost && v.dims[2] == kMost && v.dims[3] == o, v_name, got, want)) return false;
    return check.require(ceil_div(o, kSide) * ceil_div(c, kSide) <= INT32_MAX, w_name, "2^31 tiles or more", "fewer");
}

bool sound(Check& check, const ett_upsample2x_weights_fwd_args* a) {
    return check.ok() && check.act("w", a->w) && shapes(check, "w", a->w, a->w.dtype, "v", a->v, a->w.dtype);
}
bool sound(Check& check, const ett_upsample2x_weights_bwd_args* a) {
    return check.ok() && check.view("dv", a->dv) && check.view("dw", a->dw) && shapes(check, "dw", a->dw, ETT_F32, "dv", a->dv, ETT_F32);
}

dim3 grid(const ett_view& w) { return dim3(unsigned(ceil_div(w.dims[0], kSide) * ceil_div(w.dims[3], kSide))); }

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(upsample2x_weights_fwd)
ETT_NO_WORKSPACE(upsample2x_weights_bwd)

extern "C" int32_t ett_upsample2x_weights_fwd(const ett_upsample2x_weights_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("upsample2x_weights_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->w) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"plain", true}});
    if (!check.ok()) return check.status();
    const int32_t status = with_act(a->w.dtype, [&](auto t) {
        using T = decltype(t);
        return launch("upsample2x_weights_fwd", forward_kernel<T>, grid(a->w), dim3(kThreads), 0, l, matrix<const T>(a->w), a->w.dims[0], a->w.dims[3],
                      matrix<T>(a->v));
    });
    return status == ETT_OK ? ett_done(kernel) : status;
}

extern "C" int32_t ett_upsample2x_weights_bwd(const ett_upsample2x_weights_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("upsample2x_weights_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->dw) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"plain", true}});
    if (!check.ok()) return check.status();
    const int32_t status = launch("upsample2x_weights_bwd", backward_kernel, grid(a->dw), dim3(kThreads), 0, l, matrix<const float>(a->dv),
                                  a->dw.dims[0], a->dw.dims[3], matrix<float>(a->dw));
    return status == ETT_OK ? ett_done(kernel) : status;
}
