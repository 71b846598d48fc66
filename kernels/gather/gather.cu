// gather.cu: rows of a table by index, y[n] = table[idx[n]], and the gradient of the table, dtable[idx[n]] += dy[n].
//
// table   R,C  act  rows of any stride   in
// idx     N    i32  contiguous           in; negative: a row of zeros, no gradient; R or more: a fault, then the same
// y       N,C  act  rows of any stride   out
// dy      N,C  act  rows of any stride   in
// dtable  R,C  f32  rows of any stride   added to
//
// numerics: the forward copies. The gradient is summed in float32 in the order of n, whatever the order of the threads:
// a first kernel counts how often each row of the table is indexed and finds the first n that does; the warps of that n
// then scan the following indices in order until they have found all the others, and add their rows of dy.
// work: forward 2*N*C*size bytes; backward N*C*size + 8*U*C bytes for U different rows. The scan reads 4 bytes for each
// index between the first and the last n of a row; rows that are indexed only once need no scan.
// workspace: backward 8 bytes per row of the table.
#include "reduce.cuh"
#include "walk.cuh"

namespace ett {
namespace {

template <class T, int N> struct GatherFwd {
    Matrix<const T> table;
    const int32_t* idx;
    Matrix<T> y;
    int64_t rows;
    Fault fault;

    using In = Vec<T, N>;
    __device__ In load(Place p) const {
        const int32_t i = idx[p.row];
        if (i >= 0 && i < rows) return load_vec<N>(table.row(i) + p.at);
        if (i >= rows && p.at == 0) report_index(fault, p.row, i, rows);
        return In{};
    }
    __device__ void finish(Place p, const In& in) const { store_vec(y.row(p.row) + p.at, in); }
};

constexpr int kThreads = 256;
constexpr int kBlocks = 32;   // per multiprocessor: several times the resident ones
constexpr int kWindow = 4;    // indices that a lane loads at once in the scan
constexpr int kTogether = 4;  // rows in flight

template <class T> struct GatherBwd {
    Matrix<const T> dy;
    const int32_t* idx;
    Matrix<float> dtable;
    int64_t n, rows, cols;
    int32_t* count;  // R: how often a row is indexed
    int32_t* first;  // R: N - n for the first n that indexes it
    Fault fault;
};

// Computes count and first; neither depends on the order of the threads.
template <class T> __global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ GatherBwd<T> a) {
    for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < a.n; n += int64_t(gridDim.x) * kThreads) {
        const int32_t i = a.idx[n];
        if (i >= a.rows) report_index(a.fault, n, i, a.rows);
        if (i < 0 || i >= a.rows) continue;
        atomicAdd(&a.count[i], 1);
        atomicMax(&a.first[i], int32_t(a.n - n));
    }
}

// Pieces per lane: two of 4 elements, or one of a single element if rows are not aligned.
template <int PIECE> inline constexpr int kPieces = PIECE == 1 ? 1 : 2;

// Loads the lane's columns of row n of dy.
template <class T, int PIECE>
__device__ __forceinline__ void fetch(const GatherBwd<T>& a, int64_t n, int64_t col, Vec<T, PIECE> (&out)[kPieces<PIECE>]) {
#pragma unroll
    for (int p = 0; p < kPieces<PIECE>; ++p) {
        const int64_t at = col + p * kWarp * PIECE;
        if (at < a.cols) out[p] = load_vec<PIECE>(a.dy.row(n) + at);
    }
}
template <class T, int PIECE>
__device__ __forceinline__ void add(float (&sum)[kPieces<PIECE>][PIECE], const Vec<T, PIECE> (&row)[kPieces<PIECE>]) {
#pragma unroll
    for (int p = 0; p < kPieces<PIECE>; ++p) {
        float v[PIECE];
        unpack(v, row[p]);
#pragma unroll
        for (int j = 0; j < PIECE; ++j) sum[p][j] += v[j];
    }
}

// One warp per n and tile of columns.
template <class T, int PIECE> __global__ void __launch_bounds__(kThreads) gather_bwd_kernel(const __grid_constant__ GatherBwd<T> a) {
    constexpr int kTile = kWarp * PIECE * kPieces<PIECE>;
    const int lane = int(threadIdx.x) % kWarp;
    const int64_t tiles = (a.cols + kTile - 1) / kTile, warps = int64_t(gridDim.x) * (kThreads / kWarp);
    for (int64_t w = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; w < a.n * tiles; w += warps) {
        const int64_t n = w / tiles, col = (w - n * tiles) * kTile + lane * PIECE;
        const int32_t i = a.idx[n];
        if (i < 0 || i >= a.rows || a.first[i] != int32_t(a.n - n)) continue;

        float sum[kPieces<PIECE>][PIECE] = {};
        Vec<T, PIECE> row[kTogether][kPieces<PIECE>] = {};
        fetch(a, n, col, row[0]);
#pragma unroll
        for (int p = 0; p < kPieces<PIECE>; ++p)
            if (col + p * kWarp * PIECE < a.cols) load(sum[p], a.dtable.row(i) + col + p * kWarp * PIECE);
        int left = a.count[i] - 1;
        add<T, PIECE>(sum, row[0]);

        for (int64_t from = n + 1; left > 0; from += kWindow * kWarp) {
            unsigned same[kWindow];
            int32_t index[kWindow];
#pragma unroll
            for (int k = 0; k < kWindow; ++k) {
                const int64_t at = from + k * kWarp + lane;
                index[k] = at < a.n ? a.idx[at] : -1;
            }
#pragma unroll
            for (int k = 0; k < kWindow; ++k) same[k] = __ballot_sync(kAllLanes, index[k] == i);
#pragma unroll
            for (int k = 0; k < kWindow; ++k) {
                left -= __popc(same[k]);
                while (same[k]) {
                    bool there[kTogether];
#pragma unroll
                    for (int r = 0; r < kTogether; ++r) {
                        there[r] = same[k] != 0;
                        if (there[r]) fetch(a, from + k * kWarp + __ffs(int(same[k])) - 1, col, row[r]);
                        same[k] &= same[k] - 1;
                    }
#pragma unroll
                    for (int r = 0; r < kTogether; ++r)
                        if (there[r]) add<T, PIECE>(sum, row[r]);
                }
            }
        }
#pragma unroll
        for (int p = 0; p < kPieces<PIECE>; ++p)
            if (col + p * kWarp * PIECE < a.cols) store_global(a.dtable.row(i) + col + p * kWarp * PIECE, sum[p]);
    }
}

bool sound(Check& check, const ett_gather_fwd_args* a) {
    return check.ok() && check.act("table", a->table) && check.vector("idx", a->idx, ETT_I32, numel(a->idx)) &&
           check.matrix("y", a->y, a->table.dtype, numel(a->idx), cols(a->table));
}

bool sound(Check& check, const ett_gather_bwd_args* a) {
    if (!check.ok() || !check.act("dy", a->dy)) return false;
    check.vector("idx", a->idx, ETT_I32, rows(a->dy));
    if (check.type("dtable", a->dtable, ETT_F32)) check.matrix("dtable", a->dtable, ETT_F32, rows(a->dtable), cols(a->dy));
    check.range("idx", rows(a->dy), 0, INT32_MAX);
    return check.ok();
}

bool has_pieces(const ett_view& v) { return wide(v, 4 * dtype_size(v.dtype)); }

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(gather_fwd)

extern "C" int32_t ett_gather_fwd(const ett_gather_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("gather_fwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->y) == 0) return ett_done("");
    const Extent e{rows(a->y), cols(a->y)};
    return with_act(a->y.dtype, [&](auto t) {
        using T = decltype(t);
        return walk<kWide<T>>(check, "gather_fwd", l, e, {&a->table, &a->y}, [&](auto n) {
            return GatherFwd<T, n>{matrix<const T>(a->table), data<const int32_t>(a->idx), matrix<T>(a->y), rows(a->table), fault_of(l)};
        });
    });
}

extern "C" int64_t ett_gather_bwd_workspace(const ett_gather_bwd_args* a) {
    using namespace ett;
    Check check("gather_bwd", a);
    if (!sound(check, a)) return -1;
    return numel(a->dy) == 0 ? 0 : 2 * rows(a->dtable) * int64_t(sizeof(int32_t));
}

extern "C" int32_t ett_gather_bwd(const ett_gather_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("gather_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (numel(a->dy) == 0) return ett_done("");
    const int64_t bytes = ett_gather_bwd_workspace(a);
    check.workspace(l, bytes);
    const char* kernel = check.choose(l, {{"wide", has_pieces(a->dy) && has_pieces(a->dtable)}, {"plain", true}});
    if (!check.ok()) return check.status();
    return with_act(a->dy.dtype, [&](auto t) {
        using T = decltype(t);
        int32_t* count = static_cast<int32_t*>(l->workspace);
        const GatherBwd<T> k{matrix<const T>(a->dy), data<const int32_t>(a->idx), matrix<float>(a->dtable), rows(a->dy), rows(a->dtable),
                             cols(a->dy), count, count + rows(a->dtable), fault_of(l)};
        const bool is_wide = strcmp(kernel, "wide") == 0;
        const int64_t most = int64_t(multiprocessors()) * kBlocks, tiles = ceil_div(k.cols, is_wide ? kWarp * 8 : kWarp);
        const dim3 counters(unsigned(std::min(ceil_div(k.n, kThreads), most))), grid(unsigned(std::min(ceil_div(k.n * tiles, kThreads / kWarp), most)));
        int32_t status = bytes ? zero("gather_bwd", count, size_t(bytes), l) : ETT_OK;
        if (status == ETT_OK) status = launch("gather_bwd", count_kernel<T>, counters, dim3(kThreads), 0, l, k);
        if (status == ETT_OK)
            status = launch("gather_bwd", is_wide ? gather_bwd_kernel<T, 4> : gather_bwd_kernel<T, 1>, grid, dim3(kThreads), 0, l, k);
        return status == ETT_OK ? ett_done(kernel) : status;
    });
}
