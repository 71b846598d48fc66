// vq.cu: quantized vectors, loss and gradients of the plain quantizer, which gives each token its nearest code.
//
//   zq_m = e_{idx_m},  quant = (beta_commit + beta_code) * inv_count / D * sum_m |zq_m - z_m|^2
//   dz_m = g_m + w beta_commit (z_m - e_{idx_m}),  de_{idx_m} += w beta_code (e_{idx_m} - z_m),  w = 2 g_quant inv_count / D
//
// z          M,D  act  rows of any stride   in
// e          K,D  act  rows of any stride   in
// idx        M    i32  contiguous           in    outside [0, K): a fault; then zq is 0, dz is g, and the token adds
// nothing inv_count  1    f32                       in    one over the tokens of all ranks
// zq         M,D  act  rows of any stride   out
// quant      1    f32                       out
// g          M,D  act  rows of any stride   in    gradient of zq, which passes straight to z
// g_quant    1    f32                       in    gradient of quant
// dz         M,D  act  rows of any stride   out
// de         K,D  f32  rows of any stride   added to; may be absent
//
// numerics: f32, one rounding of dz; zq is a copy. The loss is summed over blocks of 32 tokens, then over the blocks in
// a fixed order; a warp, or for a popular code a block, sums 256 columns of a row of de. Bitwise repeatable.
// workspace: vq_losses 4 bytes per 32 tokens.
// work: forward 3*M*D*size bytes; backward 4*M*D*size + (M*size + 8*U)*D bytes for U different codes, and a scan for
// equal codes that reads, for each token, up to 4096 indices of 4 bytes.
// papers: VQ-VAE (1711.00937).
#include "codes.cuh"
#include "pieces.cuh"

namespace ett {
namespace codebook {
namespace {

template <class T> struct Gradient {
    Codes<T> c;
    Matrix<const T> g;
    Matrix<T> dz;
    const float* g_quant;
    const float* inv_count;
    float factor;
};

// One warp per token, N elements at a time.
template <class T, int N> __global__ void __launch_bounds__(kCodeThreads) tokens_kernel(const __grid_constant__ Gradient<T> a) {
    const int lane = int(threadIdx.x) % kWarp;
    const int64_t m = int64_t(blockIdx.x) * kCodeWarps + threadIdx.x / kWarp;
    if (m >= a.c.tokens) return;
    const bool there = a.c.has_code(m);
    if (lane == 0) a.c.report(m);
    const float weight = there ? a.factor * *a.g_quant * *a.inv_count : 0.f;
    const T* const code = a.c.e.row(there ? a.c.idx[m] : 0);
    for (int64_t at = lane * N; at < a.c.dim; at += kWarp * N) {
        float e[N], z[N], g[N];
        load<N>(e, code + at);
        load<N>(z, a.c.z.row(m) + at);
        load<N>(g, a.g.row(m) + at);
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = there ? g[i] + weight * (z[i] - e[i]) : g[i];
        store_global(a.dz.row(m) + at, g);
    }
}

bool sound(Check& check, const ett_vq_losses_args* a) {
    return check.ok() && check_codes(check, *a) && check.matrix("zq", a->zq, a->z.dtype, rows(a->z), cols(a->z)) &&
           check.vector("quant", a->quant, ETT_F32, 1);
}

bool sound(Check& check, const ett_vq_bwd_args* a) {
    return check.ok() && check_codes(check, *a) && check.matrix("g", a->g, a->z.dtype, rows(a->z), cols(a->z)) &&
           check.vector("g_quant", a->g_quant, ETT_F32, 1) && check.matrix("dz", a->dz, a->z.dtype, rows(a->z), cols(a->z)) &&
           (!present(a->de) || check.matrix("de", a->de, ETT_F32, rows(a->e), cols(a->e)));
}

int64_t workspace_bytes(const ett_vq_losses_args& a) { return look_up_blocks(rows(a.z)) * int64_t(sizeof(float)); }

template <class T> int32_t run(const ett_vq_bwd_args& a, const ett_launch* l, const char* name) {
    const Codes<T> c = codes_of<T>(a, l);
    const float* const g_quant = data<const float>(a.g_quant);
    const float* const inv = data<const float>(a.inv_count);
    const double two = 2.0 / double(c.dim);
    const Gradient<T> z = {c, matrix<const T>(a.g), matrix<T>(a.dz), g_quant, inv, float(two * a.beta_commit)};
    const dim3 grid(unsigned(ceil_div(c.tokens, kCodeWarps)));
    int32_t status = launch("vq_bwd", strcmp(name, "wide") == 0 ? tokens_kernel<T, kWide<T>> : tokens_kernel<T, 1>, grid, dim3(kCodeThreads), 0, l, z);
    if (status == ETT_OK && present(a.de)) {
        const Scatter<T> e = {c, {nullptr, 0}, matrix<float>(a.de), nullptr, g_quant, inv, float(two * a.beta_code)};
        status = launch_scatter("vq_bwd", e, has_scatter_pieces(a.z) && has_scatter_pieces(a.e) && has_scatter_pieces(a.de), 0, c.tokens, l);
    }
    return status == ETT_OK ? ett_done(name) : status;
}

}  // namespace
}  // namespace codebook
}  // namespace ett

extern "C" int64_t ett_vq_losses_workspace(const ett_vq_losses_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check("vq_losses", a);
    return sound(check, a) ? workspace_bytes(*a) : -1;
}

extern "C" int32_t ett_vq_losses(const ett_vq_losses_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::codebook;
    Check check("vq_losses", a, l);
    if (!sound(check, a)) return check.status();
    check.workspace(l, workspace_bytes(*a));
    const char* kernel = check.choose(l, {{"rows", true}});
    if (!check.ok()) return check.status();
    float* const squares = static_cast<float*>(l->workspace);
    return with_act(a->z.dtype, [&](auto t) {
        using T = decltype(t);
        const Codes<T> c = codes_of<T>(*a, l);
        const Total quant = {squares, look_up_blocks(c.tokens), data<const float>(a->inv_count),
                             float((a->beta_commit + a->beta_code) / double(c.dim)), data<float>(a->quant)};
        int32_t status = launch_look_up("vq_losses", c, a->z, a->e, a->zq, squares, l);
        if (status == ETT_OK) status = launch("vq_losses", total_kernel<1>, dim3(1), dim3(kTotalThreads), 0, l, Totals<1>{{quant}});
        return status == ETT_OK ? ett_done(kernel) : status;
    });
}

extern "C" int64_t ett_vq_bwd_workspace(const ett_vq_bwd_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check("vq_bwd", a);
    return sound(check, a) ? 0 : -1;
}

extern "C" int32_t ett_vq_bwd(const ett_vq_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::codebook;
    Check check("vq_bwd", a, l);
    if (!sound(check, a)) return check.status();
    if (rows(a->z) == 0) return ett_done("");
    const bool wide_rows = wide(a->z) && wide(a->e) && wide(a->g) && wide(a->dz);
    const char* kernel = check.choose(l, {{"wide", wide_rows}, {"plain", true}});
    if (!check.ok()) return check.status();
    return with_act(a->z.dtype, [&](auto t) { return run<decltype(t)>(*a, l, kernel); });
}
