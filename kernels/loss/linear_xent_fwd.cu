// linear_xent_fwd.cu: cross-entropy of a linear layer; its logits exist only one tile at a time, in registers.
//
//   lse_n = log sum_v exp(x_n . w_v),   loss = scale * sum_n (lse_n - x_n . w[target_n]),   over n with target_n >= 0
//
// x       N,C  act  rows of any stride   in
// w       V,C  act  rows of any stride   in
// target  N    i32  contiguous           in    negative: not supervised
// scale   1    f32                       in
// lse     N    f32  contiguous           out   0 in unsupervised rows
// loss    1    f32                       out   0 if no row is supervised
//
// Steps: the supervised rows are found and packed; blocks sweep parts of the vocabulary and keep the running maximum
// and sum of exponentials of each row; the parts are combined; the losses are summed.
// numerics: products, exponentials and sums in f32; bitwise repeatable, on any device. A target of V or more is a fault
// and counts as -1.
// workspace: a copy of x, and at most 2 KB per row.
// work: 2*n*C*V FLOP for n supervised rows; (n*C + V*C) * size bytes.
// papers: Cut Your Losses (2411.09009).
#include "linear_xent.cuh"

namespace ett {
namespace xent {
namespace {

// The largest number of parts of the vocabulary: enough to occupy all multiprocessors with few tiles of rows.
constexpr int64_t kMostParts = 128;

// The maximum of some logits, and the sum of exp(logit - maximum). (-infinity, 0) if there are none, or none above
// -infinity.
struct Part {
    float max, sum;
};

template <class T> __device__ __forceinline__ float below(float x, float max) { return max == -INFINITY ? 0.f : exponential<T>(x - max); }

template <class T> __device__ __forceinline__ Part join(const Part& a, const Part& b) {
    const float max = fmaxf(a.max, b.max);
    // fmaxf ignores NaN; a NaN logit is carried by the sum.
    return Part{max, a.sum * (a.max == max ? 1.f : below<T>(a.max, max)) + b.sum * (b.max == max ? 1.f : below<T>(b.max, max))};
}

template <class T> struct Forward {
    gemm::Matrix<T> x, w;
    Rows rows;
    float2* parts;      // rows, parts * warps side by side
    float* hit;         // rows: the logit of the target
    int64_t part_cols;  // logits per part: whole tiles
    int64_t part_count;
};

template <class Tile> constexpr int parts_bytes() { return Tile::kSmem + Tile::kThreads * Tile::kAccRows * int(sizeof(Part)); }

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) parts_kernel(const __grid_constant__ Forward<typename Tile::Type> a) {
    using T = typename Tile::Type;
    constexpr int kSide = Tile::kCols / Tile::kWarpCols;
    ETT_DYNAMIC_SMEM(smem);
    const int count = *a.rows.count, row_tiles = (count + Tile::kRows - 1) / Tile::kRows;
    gemm::Matrix<T> x = a.x;
    x.rows = count;
    // Consecutive items have the same part of w, so that concurrent blocks share it in the L2.
    for (int64_t item = blockIdx.x; item < row_tiles * a.part_count; item += gridDim.x) {
        const int64_t part = item / row_tiles, begin = part * a.part_cols, end = min(a.w.rows, begin + a.part_cols);
        const int row0 = int(item - part * row_tiles) * Tile::kRows;
        // The thread's own running values for its rows. In registers they would need 16 too many.
        Part* const smem_of = reinterpret_cast<Part*>(smem + Tile::kSmem) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) smem_of[i * Tile::kThreads] = Part{-INFINITY, 0.f};
#pragma unroll 1
        for (int64_t col0 = begin; col0 < end; col0 += Tile::kCols) {
            gemm::Acc<Tile> acc;
            acc.clear();
            gemm::tile_product(acc, x, a.w, row0, col0, smem);
            const int cols = int(min(int64_t(Tile::kCols), end - col0));
#pragma unroll
            for (int i = 0; i < Tile::kAccRows; ++i) {
                const int row = row0 + Tile::row(i), target = row < count ? a.rows.target[row] - int(col0) : -1;
                if (target >= 0 && target < cols) {
#pragma unroll
                    for (int j = 0; j < Tile::kAccCols; ++j)
                        if (Tile::col(j) == target) a.hit[row] = acc.at(i, j);
                }
                const Part old = smem_of[i * Tile::kThreads];
                float most = old.max;
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j)
                    if (Tile::col(j) < cols) most = fmaxf(most, acc.at(i, j));
                const float shift = most == -INFINITY ? 0.f : most;
                float sum = old.sum * exponential<T>(old.max - shift);
#pragma unroll
                for (int j = 0; j < Tile::kAccCols; ++j) sum += Tile::col(j) < cols ? exponential<T>(acc.at(i, j) - shift) : 0.f;
                smem_of[i * Tile::kThreads] = Part{most, sum};
            }
        }
#pragma unroll
        for (int i = 0; i < Tile::kAccRows; ++i) {
            Part of = smem_of[i * Tile::kThreads];
            // Four lanes share a row of the warp's tile.
#pragma unroll
            for (int by = 1; by <= 2; by *= 2)
                of = join<T>(of, Part{__shfl_xor_sync(kAllLanes, of.max, by), __shfl_xor_sync(kAllLanes, of.sum, by)});
            const int64_t row = row0 + Tile::row(i);
            if (row < count && Tile::lane() % 4 == 0)
                a.parts[(row * a.part_count + part) * kSide + Tile::warp_col() / Tile::kWarpCols] = make_float2(of.max, of.sum);
        }
    }
}

constexpr int kJoinThreads = 256;

// lse and loss of each supervised row, one warp per row.
template <class T>
__global__ void __launch_bounds__(kJoinThreads)
join_kernel(const Rows rows, const float2* parts, int64_t width, const float* hit, float* lse, float* losses) {
    const int lane = int(threadIdx.x) % kWarp, count = *rows.count;
    for (int64_t row = int64_t(blockIdx.x) * (kJoinThreads / kWarp) + threadIdx.x / kWarp; row < count;
         row += int64_t(gridDim.x) * (kJoinThreads / kWarp)) {
        Part all{-INFINITY, 0.f};
        for (int64_t i = lane; i < width; i += kWarp) {
            const float2 part = parts[row * width + i];
            all = join<T>(all, Part{part.x, part.y});
        }
#pragma unroll
        for (int by = kWarp / 2; by > 0; by /= 2)
            all = join<T>(all, Part{__shfl_xor_sync(kAllLanes, all.max, by), __shfl_xor_sync(kAllLanes, all.sum, by)});
        if (lane == 0) {
            // With no logit above -infinity the probabilities are 0 / 0.
            const float value = all.max == -INFINITY ? NAN : all.max + logf(all.sum);
            lse[rows.at[row]] = value;
            losses[row] = value - hit[row];
        }
    }
}

// loss = scale * sum of the losses, with one block. With no supervised row the loss is 0, whatever the scale.
__global__ void __launch_bounds__(kJoinThreads) sum_kernel(const Rows rows, const float* losses, const float* scale, float* loss) {
    __shared__ float smem[kJoinThreads / kWarp];
    const int count = *rows.count;
    float sum[1] = {};
    for (int i = int(threadIdx.x); i < count; i += kJoinThreads) sum[0] += losses[i];
    block_sum<1, kJoinThreads>(sum, smem);
    if (threadIdx.x == 0) *loss = count > 0 ? *scale * sum[0] : 0.f;
}

// Logits per part of the vocabulary: the fewest whole tiles that give at most kMostParts parts.
int64_t choose_linear_xent_part(int64_t v, int64_t tile) { return std::max<int64_t>(1, ceil_div(ceil_div(v, tile), kMostParts)) * tile; }

// The layout of the workspace.
template <class T> struct Space {
    using Tile = Logits<T>;
    Pieces pieces;
    Packed<T> packed;
    int64_t part_cols, part_count, width;  // width: entries of `parts` per row
    float2* parts;
    float* hit;
    float* losses;

    Space(const ett_linear_xent_fwd_args& a, void* start)
        : pieces(start),
          packed(pieces, rows(a.x), cols(a.x)),
          part_cols(choose_linear_xent_part(rows(a.w), Tile::kCols)),
          part_count(ceil_div(rows(a.w), part_cols)),
          width(part_count * (Tile::kCols / Tile::kWarpCols)),
          parts(pieces.take<float2>(packed.n * width)),
          hit(pieces.take<float>(packed.n)),
          losses(pieces.take<float>(packed.n)) {}
};

constexpr char kOp[] = "linear_xent_fwd";

template <class T> int32_t run(const ett_linear_xent_fwd_args& a, const ett_launch* l, const char* name) {
    using Tile = Logits<T>;
    const Space<T> s(a, l->workspace);
    int32_t status = pack(kOp, a, s.packed, nullptr, data<float>(a.lse), l);
    if (status != ETT_OK) return status;
    const int64_t items = ceil_div(s.packed.n, Tile::kRows) * s.part_count;
    if (items > 0) {
        const Forward<T> f{s.packed.matrix(), gemm::matrix<T>(a.w), s.packed.rows, s.parts, s.hit, s.part_cols, s.part_count};
        status = launch(kOp, parts_kernel<Tile>, blocks_for(items, 2), dim3(Tile::kThreads), parts_bytes<Tile>(), l, f);
        if (status != ETT_OK) return status;
        status = launch(kOp, join_kernel<T>, blocks_for(ceil_div(s.packed.n, kJoinThreads / kWarp), 8), dim3(kJoinThreads), 0, l, s.packed.rows,
                        s.parts, s.width, s.hit, data<float>(a.lse), s.losses);
        if (status != ETT_OK) return status;
    }
    status = launch(kOp, sum_kernel, dim3(1), dim3(kJoinThreads), 0, l, s.packed.rows, s.losses, data<const float>(a.scale), data<float>(a.loss));
    return status == ETT_OK ? ett_done(name) : status;
}

bool sound(Check& check, const ett_linear_xent_fwd_args* a) {
    return check.ok() && check_shapes(check, *a) && check.vector("loss", a->loss, ETT_F32, 1);
}

int64_t workspace_bytes(const ett_linear_xent_fwd_args& a) {
    return with_act(a.x.dtype, [&](auto t) { return Space<decltype(t)>(a, nullptr).pieces.bytes(); });
}

}  // namespace
}  // namespace xent
}  // namespace ett

extern "C" int64_t ett_linear_xent_fwd_workspace(const ett_linear_xent_fwd_args* a) {
    using namespace ett;
    using namespace ett::xent;
    Check check(kOp, a);
    return sound(check, a) ? workspace_bytes(*a) : -1;
}

extern "C" int32_t ett_linear_xent_fwd(const ett_linear_xent_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::xent;
    Check check(kOp, a, l);
    if (!sound(check, a) || !check.workspace(l, workspace_bytes(*a))) return check.status();
    const char* kernel = check.choose(l, {{"sweep", true}});
    if (!check.ok()) return check.status();
    return with_act(a->x.dtype, [&](auto t) { return run<decltype(t)>(*a, l, kernel); });
}
