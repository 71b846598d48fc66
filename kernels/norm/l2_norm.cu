// l2_norm.cu: y = x / norm with norm = max(|x|, eps) for each row, and its gradient: dx = (dy - y (y . dy)) / norm, or
// dy / norm where the norm was raised to eps.
//
// x       N,D  act         rows of any stride   in
// dy      N,D  act or f32  rows of any stride   in
// y       N,D  act         rows of any stride   out
// norm    N    f32         contiguous           out; in for the backward
// dx      N,D  act         rows of any stride   out        \ exactly one
// dx_acc  N,D  f32         rows of any stride   added to   / of them is present
//
// numerics: float32, one rounding per output; each lane of a row's warp sums its elements, then the warp sums its
// lanes, so that the bits depend on D only.
// work: 3 FLOP an element forward, 5 backward; each operand is moved once (dx_acc: twice).
// limits: "wide" requires rows of whole pieces of 4 elements, at most 256 pieces; "plain" accepts any.
#include <math.h>

#include "matrix.cuh"
#include "reduce.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kWarp;  // per block at a time: one warp per row
constexpr int kBlocks = 32;              // per multiprocessor: several times the resident ones
constexpr int kPiece = 4;                // elements: 16 bytes of the widest type

template <class T> struct Forward {
    Matrix<const T> x;
    Matrix<T> y;
    float* norm;
    int64_t n, d;
    float eps;
};

// D is the type of dy.
template <class T, class D> struct Backward {
    Matrix<const D> dy;
    Matrix<const T> x;
    const float* norm;
    Matrix<T> dx;
    Matrix<float> dx_acc;
    int64_t n, d;
    float eps;
};

// The lane, and the rows of its warp.
__device__ __forceinline__ int lane() { return int(threadIdx.x) % kWarp; }
__device__ __forceinline__ int64_t first_row() { return int64_t(blockIdx.x) * kRows + threadIdx.x / kWarp; }
__device__ __forceinline__ int64_t row_step() { return int64_t(gridDim.x) * kRows; }

// PIECES: pieces of a row per lane.
template <class T, int PIECES> __global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward<T> a) {
    for (int64_t row = first_row(); row < a.n; row += row_step()) {
        float x[PIECES][kPiece] = {};
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int at = (p * kWarp + lane()) * kPiece;
            if (at < a.d) load(x[p], a.x.row(row) + at);
        }
        float squares = 0.f;
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
#pragma unroll
            for (int j = 0; j < kPiece; ++j) squares += x[p][j] * x[p][j];
        const float norm = fmaxf(sqrtf(warp_sum(squares)), a.eps);
        if (lane() == 0) a.norm[row] = norm;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int at = (p * kWarp + lane()) * kPiece;
#pragma unroll
            for (int j = 0; j < kPiece; ++j) x[p][j] /= norm;
            if (at < a.d) store_global(a.y.row(row) + at, x[p]);
        }
    }
}

template <class T> __global__ void __launch_bounds__(kThreads) forward_plain_kernel(const __grid_constant__ Forward<T> a) {
    for (int64_t row = first_row(); row < a.n; row += row_step()) {
        const T* x = a.x.row(row);
        float squares = 0.f;
        for (int64_t i = lane(); i < a.d; i += kWarp) squares += to_float(x[i]) * to_float(x[i]);
        const float norm = fmaxf(sqrtf(warp_sum(squares)), a.eps);
        if (lane() == 0) a.norm[row] = norm;
        for (int64_t i = lane(); i < a.d; i += kWarp) a.y.row(row)[i] = from_float<T>(to_float(x[i]) / norm);
    }
}

template <class T, class D, int PIECES>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ Backward<T, D> a) {
    for (int64_t row = first_row(); row < a.n; row += row_step()) {
        float y[PIECES][kPiece] = {}, d[PIECES][kPiece] = {}, before[PIECES][kPiece] = {};
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int at = (p * kWarp + lane()) * kPiece;
            if (at >= a.d) continue;
            load(y[p], a.x.row(row) + at);
            load(d[p], a.dy.row(row) + at);
            if (a.dx_acc.ptr) load(before[p], a.dx_acc.row(row) + at);
        }
        const float norm = a.norm[row], inverse = 1.f / norm;
        float along = 0.f;
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
#pragma unroll
            for (int j = 0; j < kPiece; ++j) {
                y[p][j] *= inverse;
                along += y[p][j] * d[p][j];
            }
        along = warp_sum(along);
        if (norm <= a.eps) along = 0.f;
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const int at = (p * kWarp + lane()) * kPiece;
#pragma unroll
            for (int j = 0; j < kPiece; ++j) d[p][j] = (d[p][j] - y[p][j] * along) * inverse + before[p][j];
            if (at >= a.d) continue;
            if (a.dx_acc.ptr)
                store_global(a.dx_acc.row(row) + at, d[p]);
            else
                store_global(a.dx.row(row) + at, d[p]);
        }
    }
}

template <class T, class D> __global__ void __launch_bounds__(kThreads) backward_plain_kernel(const __grid_constant__ Backward<T, D> a) {
    for (int64_t row = first_row(); row < a.n; row += row_step()) {
        const T* x = a.x.row(row);
        const D* dy = a.dy.row(row);
        const float norm = a.norm[row], inverse = 1.f / norm;
        float along = 0.f;
        for (int64_t i = lane(); i < a.d; i += kWarp) along += to_float(x[i]) * inverse * to_float(dy[i]);
        along = warp_sum(along);
        if (norm <= a.eps) along = 0.f;
        for (int64_t i = lane(); i < a.d; i += kWarp) {
            const float d = (to_float(dy[i]) - to_float(x[i]) * inverse * along) * inverse;
            if (a.dx_acc.ptr)
                a.dx_acc.row(row)[i] += d;
            else
                a.dx.row(row)[i] = from_float<T>(d);
        }
    }
}

// Pieces per lane for rows of d elements: 2 or 8; 0 if the rows are too wide.
int choose_l2_norm_pieces(int64_t d) { return d <= 2 * kWarp * kPiece ? 2 : d <= 8 * kWarp * kPiece ? 8 : 0; }

// True if rows consist of whole, aligned pieces.
bool has_pieces(const ett_view& v) { return wide(v, kPiece * dtype_size(v.dtype)); }

dim3 grid_of(int64_t n) { return dim3(unsigned(std::min(ceil_div(n, kRows), int64_t(multiprocessors()) * kBlocks))); }

bool sound(Check& check, const ett_l2_norm_fwd_args* a) {
    return check.ok() && check.act("x", a->x) && check.matrix("y", a->y, a->x.dtype, rows(a->x), cols(a->x)) &&
           check.vector("norm", a->norm, ETT_F32, rows(a->x));
}

bool sound(Check& check, const ett_l2_norm_bwd_args* a) {
    if (!check.ok() || !check.act("x", a->x) || !check.act("dy", a->dy)) return false;
    const int64_t n = rows(a->x), d = cols(a->x);
    check.matrix("dy", a->dy, a->dy.dtype == ETT_F32 ? ETT_F32 : a->x.dtype, n, d);
    check.vector("norm", a->norm, ETT_F32, n);
    check.require(present(a->dx) || present(a->dx_acc), "dx", "absent", "present, or `dx_acc`");
    check.require(!present(a->dx) || !present(a->dx_acc), "dx_acc", "present", "absent as `dx` is present");
    if (present(a->dx)) check.matrix("dx", a->dx, a->x.dtype, n, d);
    if (present(a->dx_acc)) check.matrix("dx_acc", a->dx_acc, ETT_F32, n, d);
    return check.ok();
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(l2_norm_fwd)
ETT_NO_WORKSPACE(l2_norm_bwd)

extern "C" int32_t ett_l2_norm_fwd(const ett_l2_norm_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("l2_norm_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const int pieces = choose_l2_norm_pieces(cols(a->x));
    const char* kernel = check.choose(l, {{"wide", pieces && has_pieces(a->x) && has_pieces(a->y)}, {"plain", true}});
    if (!check.ok()) return check.status();
    const bool is_wide = strcmp(kernel, "wide") == 0;
    return with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const Forward<T> k{matrix<const T>(a->x), matrix<T>(a->y), data<float>(a->norm), rows(a->x), cols(a->x), float(a->eps)};
        auto* run = !is_wide ? forward_plain_kernel<T> : pieces == 2 ? forward_kernel<T, 2> : forward_kernel<T, 8>;
        const int32_t status = launch("l2_norm_fwd", run, grid_of(k.n), dim3(kThreads), 0, l, k);
        return status == ETT_OK ? ett_done(kernel) : status;
    });
}

extern "C" int32_t ett_l2_norm_bwd(const ett_l2_norm_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("l2_norm_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const int64_t n = rows(a->x), d = cols(a->x);
    const int pieces = choose_l2_norm_pieces(d);
    const bool vectors = pieces && has_pieces(a->dy) && has_pieces(a->x) && has_pieces(a->dx) && has_pieces(a->dx_acc);
    const char* kernel = check.choose(l, {{"wide", vectors}, {"plain", true}});
    if (!check.ok()) return check.status();
    const bool is_wide = strcmp(kernel, "wide") == 0;
    auto go = [&](auto t, auto g) {
        using T = decltype(t);
        using D = decltype(g);
        const Backward<T, D> k{matrix<const D>(a->dy), matrix<const T>(a->x), data<const float>(a->norm), matrix<T>(a->dx),
                               matrix<float>(a->dx_acc), n, d, float(a->eps)};
        auto* run = !is_wide ? backward_plain_kernel<T, D> : pieces == 2 ? backward_kernel<T, D, 2> : backward_kernel<T, D, 8>;
        const int32_t status = launch("l2_norm_bwd", run, grid_of(n), dim3(kThreads), 0, l, k);
        return status == ETT_OK ? ett_done(kernel) : status;
    };
    if (a->x.dtype == ETT_F32) return go(float{}, float{});
    return a->dy.dtype == ETT_F32 ? go(bf16{}, float{}) : go(bf16{}, bf16{});
}
