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
inline constexpr int kMostBoxes = 4, kMostStages = 8;       // of the rings
inline constexpr int kPartOutputs = 64;                     // of a warpgroup
inline constexpr int kWeights = kPartOutputs * kPanelRowBytes;  // bytes of a tap's weights of 64 outputs and 64 channels
// Results are stored, and what is added to them is loaded, 8 lines at a time: each warpgroup has two such buffers.
inline constexpr int kStepLines = 8, kBuffer = kStepLines * kAcross * kPixelBytes, kBuffers = 2 * 2 * kBuffer;
inline constexpr int kBars = 1024;  // bytes
inline constexpr int kRings = int(kMostSmem) - 1024 - kBars - kBuffers;  // whose end is aligned as panels are
static_assert((3 * kMostBoxes + 2 * kMostStages + 4) * 8 <= kBars && kRings % 1024 == 0);

struct Tap {
    int shift;   // bytes from the first pixel of the box
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
    CUtensorMap x[kMostPhases], w[kMostPhases], y[kMostPhases], extra;
};

struct Product {
    Tap tap[kMostTaps];
    Source source[kMostPhases];
    Phase phase[kMostPhases];
    int phases, images, channels, outputs;
    int down, across, col_tiles;  // tiles of an image and of the outputs
    int lines, pitch;             // of a box
    bool stacked;                 // the warpgroups have the same outputs
    int boxes, stages;            // of the rings
    InputNorm<bf16> norm;         // of x, images of h x w pixels; or, with THROUGH, of the input through whose gradient the results pass
    int h, w;
    const bf16* bias;             // may be null
    bool with_extra;              // a residual, or the input of that norm
    // Null, or [images, tiles of LINES x 8 positions, 2, outputs]: means and sums of squared differences of the rounded results; with
    // THROUGH, sums of g and of g * xhat (channels.cuh).
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
struct Space {
    uint32_t boxes, stages, buffers, bars;
    int box;

    __device__ __forceinline__ Space(const Product& p, uint32_t smem)
        : boxes(smem), stages(smem + p.boxes * box_space(p.lines, p.pitch)), buffers(smem + kRings), bars(smem + kRings + kBuffers), box(box_space(p.lines, p.pitch)) {}
    __device__ __forceinline__ uint32_t box_full(int i) const { return bars + i * 8; }
    __device__ __forceinline__ uint32_t box_ready(int i) const { return bars + (kMostBoxes + i) * 8; }
    __device__ __forceinline__ uint32_t box_empty(int i) const { return bars + (2 * kMostBoxes + i) * 8; }
    __device__ __forceinline__ uint32_t full(int i) const { return bars + (3 * kMostBoxes + i) * 8; }
    __device__ __forceinline__ uint32_t empty(int i) const { return bars + (3 * kMostBoxes + kMostStages + i) * 8; }
    __device__ __forceinline__ uint32_t extra(int i) const { return bars + (3 * kMostBoxes + 2 * kMostStages + i) * 8; }
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

// acc = the products of the warpgroup's outputs and positions.
template <int N, bool NORM>
__device__ __forceinline__ void multiply(float (&acc)[N / 2], const Product& p, const Space& at, const Phase& phase, Walk& box, Walk& stage, int part) {
    constexpr int kLines = N / kAcross;
    const bool leads = threadIdx.x % 32 == 0;
    const uint32_t b_high = desc_high(uint32_t(p.pitch) * kPixelBytes), a_part = p.stacked ? 0 : part * kWeights;
    const uint32_t b_part = p.stacked ? uint32_t(part * kLines * p.pitch * kPixelBytes) : 0;
    int old_box = -1, old_stage = -1;
    bool add = false;
#pragma unroll 1
    for (int c = 0; c < p.channels; c += kChannels) {
#pragma unroll 1
        for (int s = phase.first; s < phase.end; ++s) {
            bar_wait(NORM ? at.box_ready(box.slot) : at.box_full(box.slot), box.parity);
            const uint32_t pixels = at.boxes + box.slot * at.box + b_part;
            const int end = p.source[s].end;
#pragma unroll 1
            for (int t = p.source[s].first; t < end; ++t) {
                const uint32_t low_a = k_major(at.stages + stage.slot * stage_bytes(p.stacked) + a_part), low_b = k_major(pixels + p.tap[t].shift);
                bar_wait(at.full(stage.slot), stage.parity);
                products_begin();
#pragma unroll
                for (int k = 0; k < kChannels / 16; ++k) mma<N, false, false>(acc, low_a + k * step(32), low_b + k * step(32), add || k > 0, b_high);
                products_end();
                products_wait<1>();
                if (old_stage >= 0 && leads) bar_arrive(at.empty(old_stage));
                if (old_box >= 0 && leads) bar_arrive(at.box_empty(old_box));
                old_box = -1;
                old_stage = stage.slot;
                add = true;
                stage.next();
            }
            old_box = box.slot;
            box.next();
        }
    }
    products_wait<0>();
    pin(acc);
    if (leads) {
        bar_arrive(at.empty(old_stage));
        bar_arrive(at.box_empty(old_box));
    }
}

// Adds bias and residual, or passes the gradient through SiLU; stores the results and the sums.
template <int N, bool THROUGH>
__device__ __forceinline__ void finish(const float (&acc)[N / 2], const Maps& maps, const Product& p, const Space& at, const Place& place, uint32_t& parity, int part) {
    constexpr int kLines = N / kAcross, kSteps = kLines / kStepLines;
    const int thread = int(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
    const Phase& phase = p.phase[place.phase];
    const int part_row = place.row0 + (p.stacked ? part * kLines : 0), output0 = place.output0 + (p.stacked ? 0 : part * kPartOutputs);
    const int lines = min(phase.rows - part_row, kLines), columns = min(phase.cols - place.col0, kAcross);
    const uint32_t buffers = at.buffers + part * 2 * kBuffer;
    const bool with_sums = THROUGH || p.partials;
    float bias[2], norm[2][4];  // mean, rstd, gamma, beta
    int output[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        output[i] = output0 + acc_row(i);
        const bool is = output[i] < p.outputs;
        bias[i] = p.bias && is ? to_float(p.bias[output[i]]) : 0.f;
        if constexpr (THROUGH) {
            const int64_t of = int64_t(place.image) * p.norm.groups + output[i] / p.norm.width;
            norm[i][0] = is ? p.norm.mean[of] : 0.f;
            norm[i][1] = is ? p.norm.rstd[of] : 0.f;
            norm[i][2] = is ? to_float(p.norm.gamma[output[i]]) : 0.f;
            norm[i][3] = is ? to_float(p.norm.beta[output[i]]) : 0.f;
        }
    }
    // With THROUGH the sums of g and of g * xhat; else of the differences from the first result, and of their squares.
    float pivot[2] = {}, sums[2] = {}, products[2] = {};
    bool inside[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) inside[c] = acc_col(c) < columns;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        const uint32_t buffer = buffers + s % 2 * kBuffer;
        if (p.with_extra) {
            bar_wait(at.extra(part * 2 + s % 2), parity >> s % 2 & 1);
            parity ^= 1u << s % 2;
        } else if (s != 1) {
            // The stores from this buffer have been read.
            if (s > 0 && thread == 0) stores_read<1>();
            named_barrier(1 + part, kWarpgroup);
        }
        // Two lines, of 8 positions each, and 16 outputs of a warp.
        uint32_t spot = buffer + (lane / 16 * 8 + lane % 8) * kPixelBytes + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
        for (int j = 0; j < kStepLines; j += 2, spot += 2 * kAcross * kPixelBytes) {
            uint32_t extra[4] = {}, out[4];
            if (p.with_extra) ldmatrix_x4_trans(extra, spot);
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const int i = m % 2, line = s * kStepLines + j + m / 2;
                float v[2];
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const bool counts = line < lines && inside[c];
                    const float more = bits_to_float(c == 0 ? extra[m] << 16 : extra[m] & 0xffff0000u);
                    v[c] = acc[line * 4 + i * 2 + c] + bias[i];
                    if constexpr (THROUGH) {
                        const float xhat = (more - norm[i][0]) * norm[i][1];
                        v[c] = counts ? v[c] * silu_slope<bf16>(fmaf(xhat, norm[i][2], norm[i][3])) : 0.f;
                        sums[i] += v[c];
                        products[i] = fmaf(v[c], xhat, products[i]);
                    } else {
                        v[c] += more;
                    }
                }
                out[m] = pack_bf16x2(v[0], v[1]);
                if (!THROUGH && with_sums) {
                    const float r[2] = {bits_to_float(out[m] << 16), bits_to_float(out[m] & 0xffff0000u)};
                    if (line == 0) pivot[i] = __shfl_sync(kAllLanes, r[0], lane / 4 * 4);
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const float d = line < lines && inside[c] ? r[c] - pivot[i] : 0.f;
                        sums[i] += d;
                        products[i] = fmaf(d, d, products[i]);
                    }
                }
            }
            stmatrix_x4_trans(spot, out[0], out[1], out[2], out[3]);
        }
        proxy_fence();
        named_barrier(1 + part, kWarpgroup);
        if (thread == 0) {
            if (lines > s * kStepLines && output0 < p.outputs)
                tma_store(&maps.y[place.phase], buffer, output0, place.col0, part_row + s * kStepLines, place.image);
            stores_commit();
            if (p.with_extra && s + 2 < kSteps) {
                stores_read<0>();
                const uint32_t bar = at.extra(part * 2 + s % 2);
                bar_expect(bar, kBuffer);
                tma_load(buffer, &maps.extra, bar, output0, place.col0, part_row + (s + 2) * kStepLines, place.image);
            }
        }
    }
    if (!with_sums) return;
    const float n = float(max(lines, 0) * columns);
    const int tile = (p.stacked ? place.down * 2 + part : place.down) * p.across + place.across;
    const int tiles = (phase.rows + kLines - 1) / kLines * p.across;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int d = 1; d <= 2; d *= 2) {
            sums[i] += __shfl_xor_sync(kAllLanes, sums[i], d);
            products[i] += __shfl_xor_sync(kAllLanes, products[i], d);
        }
        if (lane % 4 != 0 || output[i] >= p.outputs || lines <= 0) continue;
        float* const to = p.partials + (int64_t(place.image) * tiles + tile) * 2 * p.outputs + output[i];
        const float d = sums[i] / n;
        to[0] = THROUGH ? sums[i] : pivot[i] + d;
        to[p.outputs] = THROUGH ? products[i] : fmaxf(products[i] - sums[i] * d, 0.f);
    }
}

// Starts the loads of what is added to the first two steps of a tile's results.
template <int N> __device__ __forceinline__ void start_extra(const Maps& maps, const Product& p, const Space& at, const Place& place, int part) {
    constexpr int kLines = N / kAcross;
    const int part_row = place.row0 + (p.stacked ? part * kLines : 0), output0 = place.output0 + (p.stacked ? 0 : part * kPartOutputs);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const uint32_t bar = at.extra(part * 2 + s);
        bar_expect(bar, kBuffer);
        tma_load(at.buffers + (part * 2 + s) * kBuffer, &maps.extra, bar, output0, place.col0, part_row + s * kStepLines, place.image);
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
    __device__ __forceinline__ void start(const Maps& maps, const Product& p, const Space& at, int items, int tile_lines) {
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

// N: positions of a warpgroup.
template <int N, bool NORM, bool THROUGH>
__global__ void __launch_bounds__(kThreads, 1) hopper_conv_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Product p) {
#ifdef ETT_SM90A
    constexpr int kLines = N / kAcross;
    ETT_DYNAMIC_SMEM(dynamic);
    unsigned char* const smem = panel_smem(dynamic);
    const Space at(p, smem_address(smem));
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
        for (int i = 0; i < 4; ++i) bar_init(at.extra(i), 1);
        bar_init_done();
    }
    __syncthreads();

    const int tile_lines = kLines * (p.stacked ? 2 : 1), items = p.images * p.down * p.across * p.phases * p.col_tiles;
    const int group = int(threadIdx.x) / kWarpgroup, warp = int(threadIdx.x) % kWarpgroup / 32;
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
                    PieceNorm norm;
                    norm.take(p.norm, place.image, c + thread % 8 * 8);
                    bar_wait(at.box_full(box.slot), box.parity);
                    activate_box<kNormThreads>(smem + box.slot * at.box, p.lines, p.pitch, place.row0 + from.at_y, place.col0 + from.at_x, p.h, p.w, norm,
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
        const int part = group - 1;
        Walk box(p.boxes), stage(p.stages);
        uint32_t parity = 0;
        float acc[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) acc[i] = 0.f;
        for (int item = int(blockIdx.x); item < items; item += int(gridDim.x)) {
            const Place place(p, item, tile_lines);
            if (place.empty(p)) continue;
            if (threadIdx.x % kWarpgroup == 0) {
                stores_read<0>();
                if (p.with_extra) start_extra<N>(maps, p, at, place, part);
            }
            multiply<N, NORM>(acc, p, at, p.phase[place.phase], box, stage, part);
            finish<N, THROUGH>(acc, maps, p, at, place, parity, part);
        }
        if (threadIdx.x % kWarpgroup == 0) stores_done<0>();
    }
#endif
}

// ---- host ------------------------------------------------------------------------------------------------

// One phase of a request: the weights [outputs, taps, channels], rows `ld` elements apart, of its grid, and where its results
// lie: positions (i, j) write the pixels (first_y + i * out_step, first_x + j * out_step) of y.
struct Part {
    const Grid* grid;
    const bf16* w;
    int64_t ld;
    int first_y, first_x;
};

struct Request {
    ett_view x, y;
    Part part[kMostPhases];
    int parts;
    int64_t out_step;
    InputNorm<bf16> norm;  // of x, or of `extra` if the results pass `through` its gradient
    const bf16* bias;
    ett_view extra;        // may be absent
    bool through;
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
            p.tap[t].shift = ((place[t].y - p.source[s].at_y) * p.pitch + place[t].x - p.source[s].at_x) * kPixelBytes;
    return true;
}

// Chooses tiles of `lines` lines per warpgroup; false if the rings do not fit into shared memory.
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
        p.stages = std::min((kRings - p.boxes * box) / stage, kMostStages);
        if (p.stages >= (p.boxes > 2 ? 4 : 2)) return true;
    }
    return false;
}
inline int64_t items_of(const Product& p) { return int64_t(p.images) * p.down * p.across * p.phases * p.col_tiles; }

// The product that is expected to take the least time.
inline bool plan_product(Product& best, const Grid* const* grids, int phases, int64_t images, int64_t outputs, int& lines) {
    Product shape;
    if (!shape_product(shape, grids, phases)) return false;
    shape.images = int(images), shape.outputs = int(outputs), shape.channels = grids[0]->c;
    double least = 0;
    bool any = false;
    for (const int n : {32, 16}) {
        Product p = shape;
        if (!divide_product(p, n) || items_of(p) >= int64_t(1) << 31) continue;
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
    p.norm = r.norm, p.h = g.h, p.w = g.w, p.bias = r.bias, p.with_extra = present(r.extra), p.partials = r.partials;

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
        const Part& part = r.part[f];
        status = make_panel_map(op, &maps.w[f], part.w, p.outputs, part.grid->depth(), part.ld, uint32_t(stage_bytes(p.stacked) / kPanelRowBytes));
        if (status == ETT_OK) status = make_image_map(op, &maps.y[f], r.y, r.out_step, part.first_y, part.first_x, kStepLines, kAcross);
    }
    if (status == ETT_OK && p.with_extra) status = make_image_map(op, &maps.extra, r.extra, 1, 0, 0, kStepLines, kAcross);
    if (status != ETT_OK) return status;

    const bool normed = r.norm.present() && !r.through;
    const dim3 grid(unsigned(std::min<int64_t>(items_of(p), multiprocessors())));
    auto go = [&](auto kernel) { return launch(op, kernel, grid, dim3(kThreads), int(kMostSmem), l, maps, p); };
    auto with_lines = [&](auto n) {
        constexpr int N = decltype(n)::value;
        return r.through ? go(hopper_conv_kernel<N, false, true>) : normed ? go(hopper_conv_kernel<N, true, false>) : go(hopper_conv_kernel<N, false, false>);
    };
    return lines == 32 ? with_lines(std::integral_constant<int, 256>{}) : with_lines(std::integral_constant<int, 128>{});
}

}  // namespace hopper_conv
}  // namespace conv
}  // namespace ett
#endif  // ETT_SHIM
