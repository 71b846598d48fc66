// hopper_images.cuh: tiles of images for convolutions on Hopper: how they are copied, and how they are normalised in shared
// memory.
//
// A box of pixels is copied as a panel: a row of 128 bytes (64 channels) per pixel, line by line, in the 128-byte swizzle
// (hopper.cuh). Pixels outside of the image are 0. An operand of 8 pixels of each of several lines is a panel whose groups of
// 8 rows lie a line of the box apart, and that begins at any pixel: so one box serves all taps of a kernel.
#pragma once

#include "../common/hopper.cuh"
#include "norm.cuh"

#ifndef ETT_SHIM

namespace ett {
namespace conv {
namespace hopper_images {

using namespace hopper;

inline constexpr int kAcross = 8;                     // positions of a line of a tile
inline constexpr int kChannels = kPanelCols;          // of a box
inline constexpr int kPixelBytes = kPanelRowBytes;    // of a pixel in a box

// Bytes of a box in shared memory.
__host__ __device__ constexpr int box_bytes(int lines, int across) { return lines * across * kPixelBytes; }
// The same, rounded up so that another box may follow.
__host__ __device__ constexpr int box_space(int lines, int across) { return (box_bytes(lines, across) + 1023) / 1024 * 1024; }

#ifdef ETT_SM90A

// Scale and shift of N channels of an image: of the norm, and halved for silu_of_twice.
template <int N> struct PieceNorm {
    float scale[N], shift[N];

    // Of channels c .. c + N of the image.
    __device__ __forceinline__ void take(const InputNorm<bf16>& norm, int image, int c) {
        int group = c / norm.width, left = (group + 1) * norm.width - c;
        const float *mean = norm.mean + int64_t(image) * norm.groups, *rstd = norm.rstd + int64_t(image) * norm.groups;
        float means[N], rstds[N], gammas[N], betas[N];
#pragma unroll
        for (int e = 0; e < N; ++e) {
            means[e] = mean[group], rstds[e] = rstd[group];
            gammas[e] = to_float(norm.gamma[c + e]), betas[e] = to_float(norm.beta[c + e]);
            if (--left == 0) ++group, left = norm.width;
        }
#pragma unroll
        for (int e = 0; e < N; ++e) {
            scale[e] = 0.5f * rstds[e] * gammas[e];
            shift[e] = 0.5f * betas[e] - means[e] * scale[e];
        }
    }
    __device__ __forceinline__ void apply(uint32_t (&piece)[N / 2]) const {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float low = silu_of_twice<bf16>(fmaf(bits_to_float(piece[i] << 16), scale[2 * i], shift[2 * i]));
            const float high = silu_of_twice<bf16>(fmaf(bits_to_float(piece[i] & 0xffff0000u), scale[2 * i + 1], shift[2 * i + 1]));
            piece[i] = pack_bf16x2(low, high);
        }
    }
};

// The address of piece `piece` of pixel q of a box.
__device__ __forceinline__ uint32_t piece_at(uint32_t box, int q, int piece) { return box + q * kPixelBytes + (piece ^ (q & 7)) * 16; }

// Replaces a box of pixels, whose first is (y, x) of an image of h x w, by their activations; pixels outside of the image
// stay 0. Of THREADS threads, `thread` has piece thread % 8, whose channels `norm` is for, of every (THREADS / 8)-th pixel.
template <int THREADS>
__device__ __forceinline__ void activate_box(uint32_t box, int lines, int across, int y, int x, int h, int w, const PieceNorm<8>& norm, int thread) {
    constexpr int kAtOnce = THREADS / 8, kTogether = 5;
    const int piece = thread % 8, pixels = lines * across, down = kAtOnce / across, right = kAtOnce - down * across;
    int line = thread / 8 / across, column = thread / 8 - line * across;
    // Without branches, and loads first, so that the latencies of several pixels overlap.
#pragma unroll 1
    for (int first = thread / 8; first < pixels; first += kAtOnce * kTogether) {
        uint32_t v[kTogether][4], at[kTogether];
        bool inside[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int q = first + i * kAtOnce;
            inside[i] = (q < pixels) & (unsigned(y + line) < unsigned(h)) & (unsigned(x + column) < unsigned(w));
            at[i] = piece_at(box, q < pixels ? q : first, piece);
            load_shared(v[i], at[i]);
            line += down, column += right;
            if (column >= across) column -= across, ++line;
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) norm.apply(v[i]);
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
            if (inside[i]) store_shared(at[i], v[i]);
    }
}

#endif  // ETT_SM90A

// ---- host ------------------------------------------------------------------------------------------------

// Describes boxes of lines x across pixels and 64 channels of images v [B, H, W, C], of which only the pixels (first_y + i *
// step, first_x + j * step) count. Coordinates: channel, j, i, image. H > first_y, W > first_x.
inline int32_t make_image_map(const char* op, CUtensorMap* map, const ett_view& v, int64_t step, int64_t first_y, int64_t first_x, int lines, int across) {
    const int64_t h = v.dims[1], w = v.dims[2], pixel = round_up(stride(v), 8) * 2;
    const bf16* const p = data<const bf16>(v) + (first_y * w + first_x) * stride(v);
    return make_map(op, map, ETT_BF16, p,
                    {4,
                     {uint64_t(v.dims[3]), uint64_t(ceil_div(w - first_x, step)), uint64_t(ceil_div(h - first_y, step)), uint64_t(v.dims[0])},
                     {uint64_t(step * pixel), uint64_t(step * w * pixel), uint64_t(h * w * pixel)},
                     {uint32_t(kChannels), uint32_t(across), uint32_t(lines), 1}},
                    true);
}

// Whether such maps can describe the images: pixels of whole 16-byte pieces, and distances of images below 2^40 bytes.
inline bool mappable(const ett_view& v) {
    return v.dtype == ETT_BF16 && wide(v) && v.dims[3] % 8 == 0 && v.dims[1] * v.dims[2] < (int64_t(1) << 38) / std::max<int64_t>(stride(v), 1);
}

}  // namespace hopper_images
}  // namespace conv
}  // namespace ett
#endif  // ETT_SHIM
