// col_sum.cu: y[c] += sum_n x[n, c].
//
// x   N,C  act  rows of any stride   in
// y   C    f32  contiguous           added to
//
// numerics: sums in f32. A block sums a part of the rows: each of its warps sums every eighth row in ascending order,
// then the warps' sums are added in order. Of the sums of the parts, every 32nd is added in order, then these 32 sums, and
// then y. The parts depend only on the shape and the number of multiprocessors: bitwise repeatable.
// work: N*C additions; N*C*size + 8*C bytes.   floor: the bytes.   limits: none beyond memory.
#include "launch.cuh"
#include "reduce.cuh"

namespace ett {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Bytes in flight per thread: times 2048 threads of a multiprocessor, they hide the latency of memory.
constexpr int kInFlight = 64;
// Rows of V columns that are in flight.
template <class T, int V> inline constexpr int kAtOnce = V == 1 ? 4 : kInFlight / (V * int(sizeof(T)));
// A part has at least this many rows, a few for each thread.
constexpr int64_t kLeastRows = kWarps * 8;

// Every thread sums V neighbouring columns of the rows of its part, which begins at part * rows_per_part; a block has
// 32 * V columns. Writes partial[part, c], or adds to y if partial is null.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
col_sum_kernel(const T* x, int64_t n, int64_t c, int64_t ld, int64_t col_blocks, int64_t rows_per_part, float* partial, float* y) {
    __shared__ float smem_sum[kWarps][kWarp * V];
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    const int64_t part = blockIdx.x / col_blocks, col0 = (blockIdx.x - part * col_blocks) * (kWarp * V);
    const int64_t end = min(n, (part + 1) * rows_per_part), col = col0 + lane * V;
    float sum[V] = {};
    if (col < c) {
        const T* p = x + col;
        int64_t row = part * rows_per_part + warp;
        constexpr int kRows = kAtOnce<T, V>;
        for (; row + (kRows - 1) * kWarps < end; row += kRows * kWarps) {
            float v[kRows][V];
#pragma unroll
            for (int i = 0; i < kRows; ++i) load<V>(v[i], p + (row + i * kWarps) * ld);
#pragma unroll
            for (int i = 0; i < kRows; ++i)
#pragma unroll
                for (int j = 0; j < V; ++j) sum[j] += v[i][j];
        }
        for (; row < end; row += kWarps) {
            float v[V];
            load<V>(v, p + row * ld);
#pragma unroll
            for (int j = 0; j < V; ++j) sum[j] += v[j];
        }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) smem_sum[warp][j * kWarp + lane] = sum[j];
    __syncthreads();  // the warps' sums are visible
    for (int i = int(threadIdx.x); i < kWarp * V; i += kThreads) {
        const int64_t at = col0 + i % kWarp * V + i / kWarp;
        if (at >= c) continue;
        float s = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) s += smem_sum[w][i];
        if (partial)
            partial[part * c + at] = s;
        else
            y[at] += s;
    }
}

constexpr int kPartThreads = 1024, kPartWarps = kPartThreads / kWarp;

// y[c] += sum over the parts. A block adds 32 columns: each of its warps every 32nd part, then the warps' sums in order.
__global__ void __launch_bounds__(kPartThreads) col_sum_parts_kernel(const float* partial, int64_t parts, int64_t c, float* y) {
    __shared__ float smem_sum[kPartWarps][kWarp];
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
    const int64_t col = int64_t(blockIdx.x) * kWarp + lane;
    float s = 0.f;
    if (col < c)
#pragma unroll 8
        for (int64_t p = warp; p < parts; p += kPartWarps) s += partial[p * c + col];
    smem_sum[warp][lane] = s;
    __syncthreads();  // the warps' sums are visible
    if (warp != 0 || col >= c) return;
    s = 0.f;
#pragma unroll
    for (int w = 0; w < kPartWarps; ++w) s += smem_sum[w][lane];
    y[col] += s;
}

// The number of parts of the N rows: parts times blocks of `width` columns give every multiprocessor twice the eight
// blocks that are resident.
int64_t choose_col_sum_parts(int64_t n, int64_t c, int64_t width, int multiprocessors) {
    const int64_t wanted = ceil_div(int64_t(multiprocessors) * 16, ceil_div(c, width));
    return std::max<int64_t>(1, std::min(wanted, n / kLeastRows));
}

// Columns of a thread: whole pieces of 16 bytes, or fewer if a warp would then have more columns than there are.
int choose_col_sum_columns(const ett_view& x, bool vectors) {
    int columns = vectors ? int(16 / dtype_size(x.dtype)) : 1;
    while (columns > 2 && kWarp * columns / 2 >= cols(x)) columns /= 2;
    return columns;
}
int64_t width_of(const ett_view& x, bool vectors) { return kWarp * choose_col_sum_columns(x, vectors); }

bool sound(Check& check, const ett_col_sum_args* a) { return check.ok() && check.act("x", a->x) && check.vector("y", a->y, ETT_F32, cols(a->x)); }

int64_t bytes_of(const ett_view& x, bool vectors) {
    const int64_t parts = choose_col_sum_parts(rows(x), cols(x), width_of(x, vectors), multiprocessors());
    return parts > 1 ? parts * cols(x) * 4 : 0;
}

}  // namespace
}  // namespace ett

extern "C" int64_t ett_col_sum_workspace(const ett_col_sum_args* a) {
    using namespace ett;
    Check check("col_sum", a);
    if (!sound(check, a)) return -1;
    return numel(a->x) == 0 ? 0 : std::max(bytes_of(a->x, true), bytes_of(a->x, false));
}

extern "C" int32_t ett_col_sum(const ett_col_sum_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("col_sum", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->x) == 0) return ett_done("");
    const char* kernel = check.choose(l, {{"wide", wide(a->x)}, {"plain", true}});
    const bool vectors = strcmp(kernel, "wide") == 0;
    const int64_t n = rows(a->x), c = cols(a->x), width = width_of(a->x, vectors);
    if (!check.workspace(l, bytes_of(a->x, vectors))) return check.status();
    const int64_t parts = choose_col_sum_parts(n, c, width, multiprocessors()), blocks = ceil_div(c, width);
    float* const partial = parts > 1 ? static_cast<float*>(l->workspace) : nullptr;
    return with_act(a->x.dtype, [&](auto t) {
        using T = decltype(t);
        const int columns = choose_col_sum_columns(a->x, vectors);
        auto* const k = columns == 1   ? col_sum_kernel<T, 1>
                        : columns == 2 ? col_sum_kernel<T, 2>
                        : columns == 4 ? col_sum_kernel<T, 4>
                                       : col_sum_kernel<T, kWide<T>>;
        int32_t status = launch("col_sum", k, dim3(unsigned(blocks * parts)), dim3(kThreads), 0, l, data<const T>(a->x), n, c, stride(a->x),
                                blocks, ceil_div(n, parts), partial, data<float>(a->y));
        if (status == ETT_OK && parts > 1)
            status = launch("col_sum", col_sum_parts_kernel, dim3(unsigned(ceil_div(c, kWarp))), dim3(kPartThreads), 0, l, partial, parts, c,
                            data<float>(a->y));
        return status == ETT_OK ? ett_done(kernel) : status;
    });
}
