// hopper_conv.cuh: convolutions on Hopper: bf16, by wgmma, from boxes of pixels that are loaded once and serve all taps.
//
// y^T = w a^T for tiles of positions: the outputs are the rows of the product, and 8 x LINES positions of a warpgroup its
// columns. A block has two warpgroups that multiply: of 64 outputs each for the same positions, or, for up to 64 outputs, of
// the same outputs for positions one below the other. For every 64 channels a box with all pixels that the positions see is
// copied to shared memory; a tap is the same box, begun at another pixel (hopper_images.cuh). The weights of one tap and 64
// channels are a stage of a ring of their own. A further warpgroup has a thread that starts all copies; with a norm, its other
// warps form the activations in the box, once for all taps.
//
// A convolution of stride 2 has one box for each of the parities of rows and columns that its taps meet (sources); a transposed
// one has a product for each of the parities of its results (phases).
#pragma once

#include <limits.h>

#include "gather.cuh"
#include "hopper_images.cuh"
#include "reduce.cuh"

#ifndef ETT_SHIM

namespace ett {
namespace conv {
namespace hopper_conv {

using namespace hopper_images;

inline constexpr int kMostPhases = 4, kMostTaps = 25;
inline constexpr int kMostBoxes = 3, kMostStages = 8;       // of the rings
inline constexpr int kPartOutputs = 64;                     // of a warpgroup
inline constexpr int kWeights = kPartOutputs * kPanelRowBytes;  // bytes of a tap's weights of 64 outputs and 64 channels
// A warpgroup stores its results, and receives what is added to them, through a buffer of its own.
__host__ __device__ constexpr int buffer_bytes(int lines) { return lines * kAcross * kPixelBytes; }
inline constexpr int kBars = 1024;  // bytes
// Bytes of the rings of boxes and of weights.
__host__ __device__ constexpr int ring_bytes(int lines) { return int(kMostSmem) - 1024 - kBars - 2 * buffer_bytes(lines); }
static_assert((3 * kMostBoxes + 2 * kMostStages + 2) * 8 <= kBars && ring_bytes(32) % 1024 == 0);

struct Tap {
    int shift;   // from the first pixel of the box, as a step of a descriptor
    int column;  // of its first channel in the weights
};
// A box for every 64 channels, and the taps that it serves.
struct Source {
    int map, at_y, at_x;  // of the first pixel, relative to the first position of the tile
    int first, end;       // taps
};
struct Phase {
    int first, end;  // sources
    int rows, cols;  // positions of an image
};

struct Maps {
    CUtensorMap x[kMostPhases], w[kMostPhases], y[kMostPhases], residual;
};

struct Product {
    Tap tap[kMostTaps + 1];       // the next one is read ahead, also after the last
    Source source[kMostPhases];
    Phase phase[kMostPhases];
    int phases, images, channels, outputs;
    int down, across, col_tiles;  // tiles of an image and of the outputs
    int lines, pitch;             // of a box
    bool stacked;                 // the warpgroups have the same outputs
    int boxes, stages;            // of the rings
    InputNorm<bf16> norm;         // of x, images of h x w pixels
    int h, w;
    const bf16* bias;             // may be null
    bool with_residual;
    // With a norm, null or [images, tiles of LINES x 8 positions, 2, outputs]: means and sums of squared differences of the rounded
    // results.
    float* partials;
};

__host__ __device__ constexpr int stage_bytes(bool stacked) { return stacked ? kWeights : 2 * kWeights; }

#ifdef ETT_SM90A

// A position in a ring whose number of slots is known at run time.
struct Walk {
    int slots, slot = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ explicit Walk(int n) : slots(n) {}
    __device__ __forceinline__ void next() {
        if (++slot == slots) slot = 0, parity ^= 1;
    }
};

// Where things lie in shared memory.
template <int LINES> struct Space {
    uint32_t boxes, stages, buffers, bars;
    int box;

    __device__ __forceinline__ Space(const Product& p, uint32_t smem)
        : boxes(smem), stages(smem + p.boxes * box_space(p.lines, p.pitch)), buffers(smem + ring_bytes(LINES)), bars(buffers + 2 * buffer_bytes(LINES)),
          box(box_space(p.lines, p.pitch)) {}
    __device__ __forceinline__ uint32_t box_full(int i) const { return bars + i * 8; }
    __device__ __forceinline__ uint32_t box_ready(int i) const { return bars + (kMostBoxes + i) * 8; }
    __device__ __forceinline__ uint32_t box_empty(int i) const { return bars + (2 * kMostBoxes + i) * 8; }
    __device__ __forceinline__ uint32_t full(int i) const { return bars + (3 * kMostBoxes + i) * 8; }
    __device__ __forceinline__ uint32_t empty(int i) const { return bars + (3 * kMostBoxes + kMostStages + i) * 8; }
    __device__ __forceinline__ uint32_t residual(int i) const { return bars + (3 * kMostBoxes + 2 * kMostStages + i) * 8; }
};

// A tile of results. Blocks that run at the same time have the same positions, as far as there are several tiles of outputs.
struct Place {
    int phase, image, row0, col0, output0, down, across;

    __device__ __forceinline__ Place(const Product& p, int item, int tile_lines) {
        const int col_tile = item % p.col_tiles;
        item /= p.col_tiles;
        phase = item % p.phases;
        item /= p.phases;
        across = item % p.across;
        item /= p.across;
        down = item % p.down;
        image = item / p.down;
        row0 = down * tile_lines;
        col0 = across * kAcross;
        output0 = col_tile * kPartOutputs * (p.stacked ? 1 : 2);
    }
    __device__ __forceinline__ bool empty(const Product& p) const { return row0 >= p.phase[phase].rows || col0 >= p.phase[phase].cols; }
};

// The part of a tile that a warpgroup has.
template <int LINES> struct Part {
    int number, output0, row0, lines, columns;  // lines may be negative
    uint32_t buffer, residual;                  // residual: its barrier

    __device__ __forceinline__ Part(const Product& p, const Space<LINES>& at, const Place& place, int n)
        : number(n), output0(place.output0 + (p.stacked ? 0 : n * kPartOutputs)), row0(place.row0 + (p.stacked ? n * LINES : 0)),
          lines(min(p.phase[place.phase].rows - row0, LINES)), columns(min(p.phase[place.phase].cols - place.col0, kAcross)),
          buffer(at.buffers + n * buffer_bytes(LINES)), residual(at.residual(n)) {}
    __device__ __forceinline__ bool is_any(const Product& p) const { return lines > 0 && output0 < p.outputs; }
};

// Starts the load of the residual.
template <int LINES> __device__ __forceinline__ void start_residual(const Maps& maps, const Part<LINES>& part, const Place& place) {
    if (threadIdx.x % kWarpgroup == 0) {
        stores_read<0>();
        bar_expect(part.residual, buffer_bytes(LINES));
        tma_load(part.buffer, &maps.residual, part.residual, part.output0, place.col0, part.row0, place.image);
    }
    __syncwarp();
}

// acc = the products of the warpgroup's outputs and positions.
template <int LINES, bool NORM>
__device__ __forceinline__ void multiply(float (&acc)[LINES * kAcross / 2], const Maps& maps, const Product& p, const Space<LINES>& at, const Place& place,
                                         const Part<LINES>& part, Walk& box, Walk& stage) {
    const Phase& phase = p.phase[place.phase];
    const bool leads = threadIdx.x % 32 == 0;
    const uint32_t b_high = desc_high(uint32_t(p.pitch) * kPixelBytes);
    // Descriptors of the operands in the first slots of the rings.
    const uint32_t first_a = k_major(at.stages + (p.stacked ? 0 : part.number * kWeights)), step_a = step(stage_bytes(p.stacked));
    const uint32_t first_b = k_major(at.boxes + (p.stacked ? part.number * LINES * p.pitch * kPixelBytes : 0)), step_b = step(at.box);
    // With several boxes, the stores of the last tile have long been read by then.
    const int residual_at = p.channels > kChannels ? kChannels : 0;
    uint32_t old_box = 0, old_stage = 0;  // barriers
    bool add = false;
#pragma unroll 1
    for (int c = 0; c < p.channels; c += kChannels) {
        if (p.with_residual && c == residual_at) start_residual<LINES>(maps, part, place);
#pragma unroll 1
        for (int s = phase.first; s < phase.end; ++s) {
            const uint32_t pixels = first_b + box.slot * step_b;
            int t = p.source[s].first, shift = p.tap[t].shift;
            const int end = p.source[s].end;
            bar_wait(NORM ? at.box_ready(box.slot) : at.box_full(box.slot), box.parity);
#pragma unroll 1
            for (; t < end; ++t) {
                const uint32_t low_a = first_a + stage.slot * step_a, low_b = pixels + shift;
                bar_wait(at.full(stage.slot), stage.parity);
                products_begin();
#pragma unroll
                for (int k = 0; k < kChannels / 16; ++k)
                    mma<LINES * kAcross, false, false>(acc, low_a + k * step(32), low_b + k * step(32), add || k > 0, b_high);
                products_end();
                shift = p.tap[t + 1].shift;
                const uint32_t now = at.empty(stage.slot);
                stage.next();
                products_wait<1>();
                if (leads && add) bar_arrive(old_stage);
                if (leads && old_box != 0) bar_arrive(old_box);
                old_box = 0;
                old_stage = now;
                add = true;
            }
            old_box = at.box_empty(box.slot);
            box.next();
        }
    }
    products_wait<0>();
    pin(acc);
    if (leads) {
        bar_arrive(old_stage);
        bar_arrive(old_box);
    }
}

// Adds bias and residual, and stores the results; with SUMS the sums too.
template <int LINES, bool SUMS>
__device__ __forceinline__ void finish(const float (&acc)[LINES * kAcross / 2], const Maps& maps, const Product& p, const Place& place, const Part<LINES>& part,
                                       uint32_t& parity) {
    const int thread = int(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32, barrier = 1 + part.number;
    float bias[2];
    int output[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        output[i] = part.output0 + acc_row(i);
        bias[i] = p.bias && output[i] < p.outputs ? to_float(p.bias[output[i]]) : 0.f;
    }
    if (p.with_residual) {
        bar_wait(part.residual, parity);
        parity ^= 1;
    } else {
        // The stores of the last tile have been read.
        if (thread == 0) stores_read<0>();
        __syncwarp();  // warps arrive at barriers as a whole
        named_barrier(barrier, kWarpgroup);
    }
    // Of the differences from the first result, and of their squares.
    float pivot[2] = {}, sums[2] = {}, products[2] = {};
    bool inside[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) inside[c] = acc_col(c) < part.columns;
    // Two lines, of 8 positions each, and 16 outputs of a warp.
    const uint32_t first = part.buffer + (lane / 16 * 8 + lane % 8) * kPixelBytes + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
    auto results = [&](auto with_residual) {
        constexpr bool RESIDUAL = decltype(with_residual)::value;
#pragma unroll
        for (int j = 0; j < LINES; j += 2) {
            const uint32_t spot = first + j * kAcross * kPixelBytes;
            uint32_t residual[4], out[4];
            if constexpr (RESIDUAL) ldmatrix_x4_trans(residual, spot);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const int i = m % 2, line = j + m / 2;
                float v[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    v[c] = acc[line * 4 + i * 2 + c] + bias[i];
                    if constexpr (RESIDUAL) v[c] += bits_to_float(c == 0 ? residual[m] << 16 : residual[m] & 0xffff0000u);
                }
                out[m] = pack_bf16x2(v[0], v[1]);
                if constexpr (SUMS) {
                    const float r[2] = {bits_to_float(out[m] << 16), bits_to_float(out[m] & 0xffff0000u)};
                    if (line == 0) pivot[i] = __shfl_sync(kAllLanes, r[0], lane / 4 * 4);
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float d = (line < part.lines) & inside[c] ? r[c] - pivot[i] : 0.f;
                        sums[i] += d;
                        products[i] = fmaf(d, d, products[i]);
                    }
                }
            }
            stmatrix_x4_trans(spot, out[0], out[1], out[2], out[3]);
        }
    };
    if (p.with_residual)
        results(std::true_type{});
    else
        results(std::false_type{});
    proxy_fence();
    named_barrier(barrier, kWarpgroup);
    if (thread == 0) {
        if (part.is_any(p)) tma_store(&maps.y[place.phase], part.buffer, part.output0, place.col0, part.row0, place.image);
        stores_commit();
    }
    __syncwarp();
    if (!SUMS || !p.partials) return;
    const float n = float(max(part.lines, 0) * part.columns);
    const int tile = part.row0 / LINES * p.across + place.across, tiles = (p.phase[place.phase].rows + LINES - 1) / LINES * p.across;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int d = 1; d <= 2; d *= 2) {
            sums[i] += __shfl_xor_sync(kAllLanes, sums[i], d);
            products[i] += __shfl_xor_sync(kAllLanes, products[i], d);
        }
        if (lane % 4 != 0 || output[i] >= p.outputs || part.lines <= 0) continue;
        float* const to = p.partials + (int64_t(place.image) * tiles + tile) * 2 * p.outputs + output[i];
        const float d = sums[i] / n, squares = products[i] - sums[i] * d;
        to[0] = pivot[i] + d;
        to[p.outputs] = squares < 0.f ? 0.f : squares;  // NaN stays
    }
}

#endif  // ETT_SM90A

inline constexpr int kThreads = 3 * kWarpgroup, kNormThreads = kWarpgroup - 32;

#ifdef ETT_SM90A

// Starts the copies of boxes, in the order in which they are multiplied.
struct Boxes {
    Walk walk;
    int item, c = 0, source;
    Place place;
    bool more;

    __device__ __forceinline__ Boxes(const Product& p, int items, int tile_lines) : walk(p.boxes), item(int(blockIdx.x)), place(p, 0, tile_lines) {
        enter(p, items, tile_lines);
    }
    // Goes to the first box of `item`, or of the next one that has results.
    __device__ __forceinline__ void enter(const Product& p, int items, int tile_lines) {
        for (more = false; item < items; item += int(gridDim.x)) {
            place = Place(p, item, tile_lines);
            if (place.empty(p)) continue;
            more = true;
            source = p.phase[place.phase].first;
            return;
        }
    }
    template <class S> __device__ __forceinline__ void start(const Maps& maps, const Product& p, const S& at, int items, int tile_lines) {
        if (!more) return;
        const Source& from = p.source[source];
        const uint32_t bar = at.box_full(walk.slot);
        bar_wait(at.box_empty(walk.slot), walk.parity ^ 1);
        bar_expect(bar, box_bytes(p.lines, p.pitch));
        tma_load(at.boxes + walk.slot * at.box, &maps.x[from.map], bar, c, place.col0 + from.at_x, place.row0 + from.at_y, place.image);
        walk.next();
        if (++source < p.phase[place.phase].end) return;
        source = p.phase[place.phase].first;
        c += kChannels;
        if (c < p.channels) return;
        c = 0;
        item += int(gridDim.x);
        enter(p, items, tile_lines);
    }
};

#endif  // ETT_SM90A

// LINES: of the positions of a warpgroup.
template <int LINES, bool NORM>
__global__ void __launch_bounds__(kThreads, 1) hopper_conv_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Product p) {
#ifdef ETT_SM90A
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    const Space<LINES> at(p, smem_address(smem));
    if (threadIdx.x == 0) {
        for (int i = 0; i < kMostBoxes; ++i) {
            bar_init(at.box_full(i), 1);
            bar_init(at.box_ready(i), kNormThreads / 32);
            bar_init(at.box_empty(i), 2 * kWarpgroup / 32);
        }
        for (int i = 0; i < kMostStages; ++i) {
            bar_init(at.full(i), 1);
            bar_init(at.empty(i), 2 * kWarpgroup / 32);
        }
        for (int i = 0; i < 2; ++i) bar_init(at.residual(i), 1);
        bar_init_done();
    }
    __syncthreads();

    const int tile_lines = LINES * (p.stacked ? 2 : 1), items = p.images * p.down * p.across * p.phases * p.col_tiles;
    const int group = __shfl_sync(kAllLanes, int(threadIdx.x) / kWarpgroup, 0), warp = int(threadIdx.x) % kWarpgroup / 32;
    if (group == 0) {
        give_registers<NORM ? 104 : 56>();
        if (threadIdx.x == 0) {
            Boxes boxes(p, items, tile_lines);
            for (int i = 0; i + 1 < p.boxes; ++i) boxes.start(maps, p, at, items, tile_lines);
            Walk stage(p.stages);
            for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
                const Place place(p, item, tile_lines);
                if (place.empty(p)) continue;
                const Phase& phase = p.phase[place.phase];
                for (int c = 0; c < p.channels; c += kChannels)
                    for (int s = phase.first; s < phase.end; ++s) {
                        // When as many taps have been started as there are stages, the box before this one has been multiplied, or
                        // soon will be: the next one takes its place.
                        const int first = p.source[s].first, end = p.source[s].end, turn = min(first + p.stages, end - 1);
                        for (int t = first; t < end; ++t, stage.next()) {
                            const uint32_t bar = at.full(stage.slot);
                            bar_wait(at.empty(stage.slot), stage.parity ^ 1);
                            bar_expect(bar, stage_bytes(p.stacked));
                            tma_load(at.stages + stage.slot * stage_bytes(p.stacked), &maps.w[place.phase], bar, p.tap[t].column + c, place.output0);
                            if (t == turn) boxes.start(maps, p, at, items, tile_lines);
                        }
                    }
            }
        } else if (NORM && warp > 0) {
            Walk box(p.boxes);
            const int thread = int(threadIdx.x) - 32;
            const Source& from = p.source[0];
            for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
                const Place place(p, item, tile_lines);
                if (place.empty(p)) continue;
                for (int c = 0; c < p.channels; c += kChannels, box.next()) {
                    PieceNorm<8> norm;
                    norm.take(p.norm, place.image, c + thread % 8 * 8);
                    bar_wait(at.box_full(box.slot), box.parity);
                    activate_box<kNormThreads>(at.boxes + box.slot * at.box, p.lines, p.pitch, place.row0 + from.at_y, place.col0 + from.at_x, p.h, p.w, norm,
                                               thread);
                    proxy_fence();
                    __syncwarp();
                    if (thread % 32 == 0) bar_arrive(at.box_ready(box.slot));
                }
            }
        }
        __syncwarp();
    } else {
        take_registers<NORM ? 200 : 224>();
        Walk box(p.boxes), stage(p.stages);
        uint32_t parity = 0;
        float acc[LINES * kAcross / 2];
#pragma unroll
        for (int i = 0; i < LINES * kAcross / 2; ++i) acc[i] = 0.f;
        for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
            const Place place(p, item, tile_lines);
            if (place.empty(p)) continue;
            const Part<LINES> part(p, at, place, group - 1);
            multiply<LINES, NORM>(acc, maps, p, at, place, part, box, stage);
            finish<LINES, NORM>(acc, maps, p, place, part, parity);
        }
        if (threadIdx.x % kWarpgroup == 0) stores_done<0>();
    }
#endif
}

// ---- host ------------------------------------------------------------------------------------------------

// One phase of a request: the weights [outputs, taps, channels], rows `ld` elements apart, of its grid, and where its results
// lie: positions (i, j) write the pixels (first_y + i * out_step, first_x + j * out_step) of y.
struct Convolved {
    const Grid* grid;
    const bf16* w;
    int64_t ld;
    int first_y, first_x;
};

struct Request {
    ett_view x, y;
    Convolved part[kMostPhases];
    int parts;
    int64_t out_step;
    InputNorm<bf16> norm;  // of x
    const bf16* bias;
    ett_view residual;     // may be absent
    float* partials;
};

inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// The shape of the product, without addresses: which taps lie in which box.
inline bool shape_product(Product& p, const Grid* const* grids, int phases) {
    memset(&p, 0, sizeof p);
    int taps = 0, sources = 0, most_y = 0, most_x = 0;
    struct Place {
        int y, x;
    } place[kMostTaps];
    p.phases = phases;
    for (int f = 0; f < phases; ++f) {
        const Grid& g = *grids[f];
        if (g.step > 2 || int64_t(g.taps_y) * g.taps_x > kMostTaps) return false;
        p.phase[f] = {sources, sources, g.rows, g.cols};
        for (int ry = 0; ry < g.step; ++ry)
            for (int rx = 0; rx < g.step; ++rx) {
                const int first = taps;
                int at_y = INT_MAX, at_x = INT_MAX;
                for (int u = 0; u < g.taps_y; ++u)
                    for (int v = 0; v < g.taps_x; ++v) {
                        const int y = floor_div(g.at_y + u, g.step), x = floor_div(g.at_x + v, g.step);
                        if (g.at_y + u - y * g.step != ry || g.at_x + v - x * g.step != rx) continue;
                        if (taps == kMostTaps) return false;
                        place[taps] = {y, x};
                        p.tap[taps++].column = (u * g.taps_x + v) * g.c;
                        at_y = std::min(at_y, y), at_x = std::min(at_x, x);
                    }
                if (taps == first) continue;
                if (sources == kMostPhases) return false;
                p.source[sources++] = {ry * 2 + rx, at_y, at_x, first, taps};
                for (int t = first; t < taps; ++t) most_y = std::max(most_y, place[t].y - at_y), most_x = std::max(most_x, place[t].x - at_x);
            }
        p.phase[f].end = sources;
        if (p.phase[f].first == sources) return false;
    }
    p.lines = most_y, p.pitch = kAcross + most_x;
    for (int s = 0; s < sources; ++s)
        for (int t = p.source[s].first; t < p.source[s].end; ++t)
            p.tap[t].shift = ((place[t].y - p.source[s].at_y) * p.pitch + place[t].x - p.source[s].at_x) * (kPixelBytes / 16);
    return true;
}

// Chooses tiles of `lines` lines per warpgroup; false if the rings do not fit into shared memory. A third box is worth less than
// the fourth stage of weights.
inline bool divide_product(Product& p, int lines) {
    p.stacked = p.outputs <= kPartOutputs;
    const int tile = lines * (p.stacked ? 2 : 1);
    int rows = 0, cols = 0;
    for (int f = 0; f < p.phases; ++f) rows = std::max(rows, p.phase[f].rows), cols = std::max(cols, p.phase[f].cols);
    p.down = int(ceil_div(rows, tile)), p.across = int(ceil_div(cols, kAcross));
    p.col_tiles = int(ceil_div(p.outputs, kPartOutputs * (p.stacked ? 1 : 2)));
    p.lines += tile;
    const int box = box_space(p.lines, p.pitch), stage = stage_bytes(p.stacked);
    if (p.lines > 256) return false;
    for (p.boxes = kMostBoxes; p.boxes >= 2; --p.boxes) {
        p.stages = std::min((ring_bytes(lines) - p.boxes * box) / stage, kMostStages);
        if (p.stages >= (p.boxes > 2 ? 4 : 2)) return true;
    }
    return false;
}
inline int64_t items_of(const Product& p) { return int64_t(p.images) * p.down * p.across * p.phases * p.col_tiles; }

// The product that is expected to take the least time: the results of a tile take about as long as the products of two lines.
inline bool plan_product(Product& best, const Grid* const* grids, int phases, int64_t images, int64_t outputs, int& lines) {
    Product shape;
    if (!shape_product(shape, grids, phases)) return false;
    shape.images = int(images), shape.outputs = int(outputs), shape.channels = grids[0]->c;
    double least = 0;
    bool any = false;
    for (const int n : {32, 16}) {
        Product p = shape;
        if (!divide_product(p, n) || items_of(p) >= int64_t(1) << 30) continue;
        const double time = double(ceil_div(items_of(p), multiprocessors())) * (n + 2);
        if (!any || time < least) any = true, least = time, best = p, lines = n;
    }
    return any;
}

// Lines of the tiles whose sums `partials` receives; 0: these kernels do not support the call.
inline int lines_of(const Grid* const* grids, int phases, int64_t images, int64_t outputs) {
    Product p;
    int lines = 0;
    const bool able = phases <= kMostPhases && grids[0]->c % kChannels == 0 && grids[0]->c > 0 && outputs % 8 == 0 && outputs >= 32 &&
                      plan_product(p, grids, phases, images, outputs, lines);
    return able ? lines : 0;
}

inline int32_t run(const char* op, const Request& r, const ett_launch* l) {
    const Grid* grids[kMostPhases];
    for (int f = 0; f < r.parts; ++f) grids[f] = r.part[f].grid;
    const Grid& g = *grids[0];
    Product p;
    int lines = 0;
    if (!plan_product(p, grids, r.parts, r.x.dims[0], cols(r.y), lines)) return ett_fail(ETT_CUDA_ERROR, 0, op, "launch", "a shape that was not planned", "a planned one");
    p.norm = r.norm, p.h = g.h, p.w = g.w, p.bias = r.bias, p.with_residual = present(r.residual), p.partials = r.partials;

    Maps maps;
    memset(&maps, 0, sizeof maps);
    int32_t status = ETT_OK;
    bool made[kMostPhases] = {};
    for (int s = 0; s < p.phase[p.phases - 1].end && status == ETT_OK; ++s) {
        const int map = p.source[s].map;
        if (made[map]) continue;
        made[map] = true;
        status = make_image_map(op, &maps.x[map], r.x, g.step, map / 2, map % 2, p.lines, p.pitch);
    }
    for (int f = 0; f < r.parts && status == ETT_OK; ++f) {
        const Convolved& part = r.part[f];
        status = make_panel_map(op, &maps.w[f], part.w, p.outputs, part.grid->depth(), part.ld, uint32_t(stage_bytes(p.stacked) / kPanelRowBytes));
        if (status == ETT_OK) status = make_image_map(op, &maps.y[f], r.y, r.out_step, part.first_y, part.first_x, lines, kAcross);
    }
    if (status == ETT_OK && p.with_residual) status = make_image_map(op, &maps.residual, r.residual, 1, 0, 0, lines, kAcross);
    if (status != ETT_OK) return status;

    const dim3 grid(unsigned(std::min<int64_t>(items_of(p), multiprocessors())));
    auto go = [&](auto kernel) { return launch(op, kernel, grid, dim3(kThreads), int(kMostSmem), l, maps, p); };
    auto with_lines = [&](auto n) {
        constexpr int kLines = decltype(n)::value;
        return r.norm.present() ? go(hopper_conv_kernel<kLines, true>) : go(hopper_conv_kernel<kLines, false>);
    };
    return lines == 32 ? with_lines(std::integral_constant<int, 32>{}) : with_lines(std::integral_constant<int, 16>{});
}

}  // namespace hopper_conv
}  // namespace conv
}  // namespace ett
#endif  // ETT_SHIM
