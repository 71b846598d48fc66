// hopper_split.cuh: the scores of f32 tokens and codes on Hopper, by products of halves ("hopper_split").
//
// A row is scaled by a power of two, so that its largest element is in [2^14, 2^15), and split into two f16 numbers,
// high + low, which hold 22 bits. A score is the sum of three of the four products of such halves, unscaled:
//   s = (sum_d z_high e_low + sum_d z_low e_high + sum_d z_high e_high) / (scale of z * scale of e)
// The omitted product is below 2^-22 |z| |e|. Sums are added in this order in every sweep, the large ones last, since
// tensor cores truncate; so a score has the same bits everywhere.
//
// As in hopper_scores.cuh, 128 rows of one operand (or of two) stay in a block: the high halves in registers, the low ones
// in shared memory. Tiles of 64 rows of the other operand stream through shared memory, as two halves.
#pragma once

#include "hopper_scores.cuh"

namespace ett {
namespace codebook {

#ifdef ETT_SHIM
inline bool split_fits(const ett_view&, const ett_view&) { return false; }
inline bool split_planned(const ett_view&, const ett_view&) { return false; }
#else

// Whether the scores of z and e are computed this way, in all sweeps alike; and whether a workspace query counts that.
inline bool split_shape(const ett_view& z, const ett_view& e) { return z.dtype == ETT_F32 && e.dtype == ETT_F32 && cols(z) > 0 && cols(z) <= 256; }
inline bool split_fits(const ett_view& z, const ett_view& e) { return split_shape(z, e) && is_hopper(); }
inline bool split_planned(const ett_view& z, const ett_view& e) { return split_shape(z, e) && plan_hopper(); }

// Columns of a half.
inline int64_t split_width(int64_t d) { return panels_of(d) * kPanelCols; }

// ---- packing ---------------------------------------------------------------------------------------------

// For each 64 rows: what undoes their scaling (0 past the last row), and, for codes of the backward, the weights c.
struct alignas(16) Unscale {
    float by[kSide];
    // volatile: loads the number again, instead of keeping all of a tile in registers, which are few.
    __device__ __forceinline__ float again(int row) const { return static_cast<const volatile float*>(by)[row]; }
};
struct alignas(16) CodeNumbers {
    Unscale unscale;
    float c[kSide];
};

struct SplitPack {
    gemm::Matrix<float> from;
    uint16_t* halves;      // rows, 2 * width: high, low
    bf16* parts;           // the same, as parts of bf16 that are not scaled; may be null
    const float* c;        // may be null
    Unscale* unscale;      // one of these two
    CodeNumbers* numbers;
    int64_t width, padded;
};

inline constexpr int kSplitThreads = 256;

// One warp per row, eight columns per lane.
__global__ void __launch_bounds__(kSplitThreads) static split_pack_kernel(const __grid_constant__ SplitPack a) {
    const int lane = int(threadIdx.x) % kWarp, at = lane * 8;
    const int64_t row = int64_t(blockIdx.x) * (kSplitThreads / kWarp) + int(threadIdx.x) / kWarp;
    if (row >= a.padded) return;
    const bool there = row < a.from.rows;
    float v[8] = {};
    if (there) {
        const float* const p = a.from.p + row * a.from.ld + at;
        if (a.from.vectors && at + 8 <= a.from.cols) {
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                float four[4];
                load<4>(four, p + i);
#pragma unroll
                for (int j = 0; j < 4; ++j) v[i + j] = four[j];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = at + i < a.from.cols ? p[i] : 0.f;
        }
    }
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[i]));  // ignores NaN
    // Positive numbers are in the order of their bits. The exponent of the scale is 14 - exponent, at most 123; rows with
    // infinite elements are not scaled.
    const uint32_t exponent = __reduce_max_sync(kAllLanes, float_to_bits(most)) >> 23;
    const uint32_t by = exponent == 255 ? 127u : min(268u - exponent, 250u);
    const float scale = bits_to_float(by << 23);
    if (lane == 0) {
        const float back = there ? bits_to_float((254u - by) << 23) : 0.f;
        if (a.numbers) {
            CodeNumbers& n = a.numbers[row / kSide];
            n.unscale.by[row % kSide] = back;
            n.c[row % kSide] = there && a.c ? a.c[row] : 0.f;
        } else {
            a.unscale[row / kSide].by[row % kSide] = back;
        }
    }
    if (!there || at >= a.width) return;
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float x[2] = {v[2 * i] * scale, v[2 * i + 1] * scale};
        float rest[2];
        high[i] = pack_f16x2(x[0], x[1]);
        unpack_f16x2(rest, high[i]);
#pragma unroll
        for (int h = 0; h < 2; ++h) rest[h] = fabsf(rest[h]) <= 65504.f ? x[h] - rest[h] : 0.f;
        low[i] = pack_f16x2(rest[0], rest[1]);
    }
    uint16_t* const to = a.halves + row * 2 * a.width + at;
    store_global_bytes(to, high);
    store_global_bytes(to + a.width, low);
    if (a.parts) pack_piece<2>(a.parts + row * 2 * a.width, a.width, at, v);
}

inline int32_t launch_split_pack(const char* op, const SplitPack& p, const ett_launch* l) {
    return launch(op, split_pack_kernel, dim3(unsigned(ceil_div(p.padded, kSplitThreads / kWarp))), dim3(kSplitThreads), 0, l, p);
}
// Rows [first, first + count) of a view.
inline gemm::Matrix<float> rows_of(const ett_view& v, int64_t first, int64_t count) {
    gemm::Matrix<float> m = gemm::matrix<float>(v);
    m.p += first * m.ld;
    m.rows = count;
    return m;
}

// The high halves of packed rows, as a matrix of 16-bit elements.
inline gemm::Matrix<bf16> high_of(const uint16_t* halves, int64_t rows, int64_t width) {
    return {reinterpret_cast<const bf16*>(halves), rows, width, 2 * width, true};
}

// ---- copies ----------------------------------------------------------------------------------------------

// Describes rows of two halves (or parts) of `width` columns, of which a copy moves at most 32 KB of one half.
inline int32_t make_split_map(const char* op, CUtensorMap* map, const void* p, int64_t rows, int64_t width, int tile_rows) {
    const uint32_t panels = std::min(uint32_t(width / kPanelCols), uint32_t(256 / tile_rows));
    return make_panels_map(op, map, p, rows, 2 * width, 2 * width, uint32_t(tile_rows), panels);
}
// Starts the copy of ROWS rows of one half; PANELS * ROWS * 128 bytes arrive at `bar`.
template <int PANELS, int ROWS> __device__ __forceinline__ void load_half(uint32_t to, const CUtensorMap* map, uint32_t bar, int row, bool low) {
    constexpr int kCopy = PANELS < 256 / ROWS ? PANELS : 256 / ROWS;
#pragma unroll
    for (int p = 0; p < PANELS; p += kCopy) tma_load(to + p * ROWS * kPanelRowBytes, map, bar, 0, row, (low ? PANELS : 0) + p);
}

// Shared memory of a block: the low halves of OPERANDS resident operands; a ring of halves of tiles; a ring of NUMBERS
// and the index of each tile; barriers: full and empty of each slot, ready of the resident ones.
template <int PANELS, int OPERANDS, class NUMBERS> struct SplitSmem {
    static constexpr int kResident = PANELS * kSweepRows * kPanelRowBytes, kHalf = PANELS * kSide * kPanelRowBytes;
    static constexpr int kSlots = OPERANDS == 1 ? 4 : 3;
    // The numbers come with the second half of a tile, and are read after the tile's slots were given back: until a thread
    // gives back the next tile's first slot, at most kSlots / 2 more tiles have come.
    static constexpr int kNumbers = kSlots / 2 + 1;
    static constexpr int kSlotsAt = OPERANDS * kResident, kNumbersAt = kSlotsAt + kSlots * kHalf;
    static constexpr int kBarsAt = kNumbersAt + kNumbers * int(sizeof(NUMBERS)), kTilesAt = kBarsAt + (2 * kSlots + 1) * 8;
    static constexpr size_t kBytes = 1024 + kTilesAt + kNumbers * 4 + 8;
    static_assert(kBytes <= size_t(kMostSmem), "shared memory of a block");

    unsigned char* smem;
    __device__ __forceinline__ uint32_t at(int offset) const { return smem_address(smem) + offset; }
    __device__ __forceinline__ uint32_t low(int operand) const { return at(operand * kResident); }
    __device__ __forceinline__ uint32_t slot(uint32_t s) const { return at(kSlotsAt) + s * kHalf; }
    __device__ __forceinline__ NUMBERS& numbers(int n) const { return reinterpret_cast<NUMBERS*>(smem + kNumbersAt)[n]; }
    __device__ __forceinline__ volatile int& tile(int n) const { return reinterpret_cast<volatile int*>(smem + kTilesAt)[n]; }
    __device__ __forceinline__ uint32_t full(uint32_t s) const { return at(kBarsAt) + 8 * s; }
    __device__ __forceinline__ uint32_t empty(uint32_t s) const { return full(kSlots + s); }
    __device__ __forceinline__ uint32_t ready() const { return full(2 * kSlots); }

    // The whole block calls this; a block barrier has to follow.
    __device__ __forceinline__ void init() const {
        if (threadIdx.x != 0) return;
        for (int s = 0; s < kSlots; ++s) {
            bar_init(full(s), 1);
            bar_init(empty(s), kConsumers / kWarp);
        }
        bar_init(ready(), 1);
        bar_init_done();
    }
};

// The copying thread's side of the ring.
template <int PANELS, class S> struct SplitCopies {
    const S& smem;
    Ring<S::kSlots> ring;
    int numbers = 0;

    // Copies the 64 rows from `row` on, the low half first if `low_first`; load(n, bar) starts the copy of their numbers, `bytes` in all.
    template <class Load> __device__ __forceinline__ void tile(const CUtensorMap* map, int row, bool low_first, int bytes, Load load) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t bar = smem.full(ring.slot);
            bar_wait(smem.empty(ring.slot), ring.parity ^ 1);
            if (i == 1) smem.tile(numbers) = row / kSide;
            bar_expect(bar, S::kHalf + (i == 1 ? bytes : 0));
            load_half<PANELS, kSide>(smem.slot(ring.slot), map, bar, row, low_first == (i == 0));
            if (i == 1) load(numbers, bar);
            ring.next();
        }
        numbers = numbers + 1 == S::kNumbers ? 0 : numbers + 1;
    }
};

// ---- products --------------------------------------------------------------------------------------------

// The scores of a tile of 64 rows b and 64 resident rows a, whose high halves are in registers. CODES: a are codes.
// `first` begins with the half of the tile that is copied first (the low one, or the high one if CODES), `second` adds what
// needs the other one.
__device__ __forceinline__ uint32_t tile_step(int k) { return step(k % 4 * 32 + k / 4 * kSide * kPanelRowBytes); }
__device__ __forceinline__ uint32_t resident_step(int k) { return step(k % 4 * 32 + k / 4 * kSweepRows * kPanelRowBytes); }
template <int PANELS, bool CODES> __device__ __forceinline__ void first(float (&d)[32], const uint32_t (&high)[PANELS * 4][4], uint32_t low, uint32_t b) {
#pragma unroll
    for (int k = 0; k < PANELS * 4; ++k) {
        if constexpr (CODES)
            mma<kSide, false, false, f16>(d, k_major(low) + resident_step(k), k_major(b) + tile_step(k), k > 0);
        else
            mma<kSide, false, f16>(d, high[k], k_major(b) + tile_step(k), k > 0);
    }
}
template <int PANELS, bool CODES>
__device__ __forceinline__ void second(float (&d)[32], const uint32_t (&high)[PANELS * 4][4], uint32_t low, uint32_t b_first, uint32_t b_second) {
#pragma unroll
    for (int k = 0; k < PANELS * 4; ++k) {
        if constexpr (CODES)
            mma<kSide, false, f16>(d, high[k], k_major(b_second) + tile_step(k), true);
        else
            mma<kSide, false, false, f16>(d, k_major(low) + resident_step(k), k_major(b_second) + tile_step(k), true);
    }
    const uint32_t b_high = CODES ? b_first : b_second;
#pragma unroll
    for (int k = 0; k < PANELS * 4; ++k) mma<kSide, false, f16>(d, high[k], k_major(b_high) + tile_step(k), true);
}

// Scores from products of scaled rows: `a` of the thread's two resident rows, `b` of the tile's rows.
__device__ __forceinline__ void unscale_columns(float (&to)[kSide / 2], const float (&d)[kSide / 2], const float (&a)[2], const Unscale& b) {
#pragma unroll
    for (int j = 0; j < kSide / 8; ++j) {
        float by[2];
        load<2>(by, b.by + 8 * j + acc_col(0));
#pragma unroll
        for (int n = 0; n < 4; ++n) to[4 * j + n] = d[4 * j + n] * by[n % 2] * a[n / 2];  // in this order: registers are few
    }
    __syncwarp();  // what follows is not begun before, for the same reason
}

// A sweep with one resident operand and two sets of accumulators: while a warpgroup processes the scores of one tile, the
// products of the next are under way. `tiles` (even) were copied, and one more; take(d, n, numbers) gets the scores of tile n,
// still scaled.
template <int PANELS, bool CODES, class S, class Take>
__device__ __forceinline__ void split_sweep(const S& smem, const uint32_t (&high)[PANELS * 4][4], int group, int tiles, Take take) {
    const uint32_t low = smem.low(0) + group * 64 * kPanelRowBytes;
    float acc[2][kSide / 2];
    Ring<S::kSlots> next, done;
    int numbers = 0;
    auto issue = [&](int i) {
        const uint32_t b = smem.slot(next.slot);
        bar_wait(smem.full(next.slot), next.parity);
        products_begin();
        first<PANELS, CODES>(acc[i], high, low, b);
        products_end();
        next.next();
        bar_wait(smem.full(next.slot), next.parity);
        products_begin();
        second<PANELS, CODES>(acc[i], high, low, b, smem.slot(next.slot));
        products_end();
        next.next();
    };
    auto finish = [&](int i) {
        products_wait<0>();
        pin(acc[i]);
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (threadIdx.x % kWarp == 0) bar_arrive(smem.empty(done.slot));
            done.next();
        }
    };
    bar_wait(smem.ready(), 0);
    issue(0);
#pragma unroll 1
    for (int n = 0; n < tiles; n += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            finish(i);
            issue(1 - i);
            take(acc[i], n + i, smem.numbers(numbers));
            numbers = numbers + 1 == S::kNumbers ? 0 : numbers + 1;
        }
    }
    finish(0);
}
#endif  // ETT_SHIM

}  // namespace codebook
}  // namespace ett
