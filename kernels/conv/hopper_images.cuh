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

// Scale and shift of 8 channels of an image: of the norm, and halved for silu_of_twice.
struct PieceNorm {
    float scale[8], shift[8];

    // Of channels c .. c + 8, which belong to the image.
    __device__ __forceinline__ void take(const InputNorm<bf16>& norm, int image, int c) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int64_t at = int64_t(image) * norm.groups + (c + e) / norm.width;
            scale[e] = 0.5f * norm.rstd[at] * to_float(norm.gamma[c + e]);
            shift[e] = 0.5f * to_float(norm.beta[c + e]) - norm.mean[at] * scale[e];
        }
    }
    __device__ __forceinline__ void apply(Vec<bf16, 8>& piece) const {
        float v[8];
        unpack(v, piece);
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = silu_of_twice<bf16>(fmaf(v[e], scale[e], shift[e]));
        piece = pack<bf16>(v);
    }
};

// Replaces a box of pixels, whose first is (y, x) of an image of h x w, by their activations; pixels outside of the image
// stay 0. THREADS threads, a warpgroup or other warps: thread t has piece t % 8, whose channels `norm` is for, of every
// (THREADS / 8)th pixel.
template <int THREADS = kWarpgroup>
__device__ __forceinline__ void activate_box(unsigned char* box, int lines, int across, int y, int x, int h, int w, const PieceNorm& norm,
                                             int thread = int(threadIdx.x) % kWarpgroup) {
    constexpr int kAtOnce = THREADS / 8, kTogether = 4;
    const int piece = thread % 8, pixels = lines * across;
    const bool whole = y >= 0 && x >= 0 && y + lines <= h && x + across <= w;
    for (int first = thread / 8; first < pixels; first += kAtOnce * kTogether) {
        Vec<bf16, 8> v[kTogether];
        unsigned valid = 0;
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int q = first + i * kAtOnce;
            bool inside = q < pixels;
            if (!whole) {
                const int line = q / across;
                inside &= unsigned(y + line) < unsigned(h) && unsigned(x + q - line * across) < unsigned(w);
            }
            valid |= unsigned(inside) << i;
            if (inside) v[i] = *reinterpret_cast<const Vec<bf16, 8>*>(box + q * kPixelBytes + (piece ^ q % 8) * 16);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int q = first + i * kAtOnce;
            if (!(valid >> i & 1)) continue;
            norm.apply(v[i]);
            *reinterpret_cast<Vec<bf16, 8>*>(box + q * kPixelBytes + (piece ^ q % 8) * 16) = v[i];
        }
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

// Whether such maps can describe the images: pixels of whole 16-byte pieces.
inline bool mappable(const ett_view& v) { return v.dtype == ETT_BF16 && wide(v) && v.dims[3] % 8 == 0; }

}  // namespace hopper_images
}  // namespace conv
}  // namespace ett
#endif  // ETT_SHIM
