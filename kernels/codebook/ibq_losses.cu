// ibq_losses.cu: quantized vectors and losses of the IBQ quantizer, from the codes and statistics of its sweeps.
//
//   zq_m = e_{idx_m},  quant = (1 + beta_commit + beta_code) * inv_count / D * sum_m |zq_m - z_m|^2
//   sample = inv_count * sum_m (log(1 + rest_q_m) - xbar_m)
//   avg = -sum_k a_k log(a_k + eps),  a_k = inv_count * col_k,  c_k = d avg / d a_k = -(log(a_k + eps) + a_k / (a_k + eps))
//
// z          M,D  act  rows of any stride   in
// e          K,D  act  rows of any stride   in
// idx        M    i32  contiguous           in    outside [0, K): a fault; then zq is 0 and quant ignores the token
// rest_q     M    f32  contiguous           in    of ibq_rows;   rest_q, xbar, col, c, sample and avg: all or none
// xbar       M    f32  contiguous           in    of ibq_rows
// col        K    f32  contiguous           in    of ibq_cols, summed over ranks
// inv_count  1    f32                       in    one over the tokens of all ranks
// zq         M,D  act  rows of any stride   out
// c          K    f32  contiguous           out
// quant      1    f32                       out
// sample     1    f32                       out
// avg        1    f32                       out
//
// numerics: f32; zq is a copy. Each loss is summed over blocks of tokens or codes, then over the blocks, in a fixed
// order; bitwise repeatable.
// workspace: 4 bytes per 32 tokens, 4 bytes per 4096 tokens and per 4096 codes.
// work: (3*M*D*size + 8*M + 8*K) bytes.
// papers: IBQ (2412.02692).
#include "codes.cuh"
#include "pieces.cuh"

namespace ett {
namespace codebook {
namespace {

constexpr char kOp[] = "ibq_losses";
constexpr int kThreads = 256, kEach = 16, kBlock = kThreads * kEach;  // kBlock: tokens or codes per block

// parts[block] = the block's part of the sample entropy.
__global__ void __launch_bounds__(kThreads) sample_kernel(const float* rest_q, const float* xbar, int64_t tokens, float* parts) {
    __shared__ float smem[kThreads / kWarp];
    float sum[1] = {0.f};
#pragma unroll 4
    for (int i = 0; i < kEach; ++i) {
        const int64_t m = int64_t(blockIdx.x) * kBlock + i * kThreads + threadIdx.x;
        if (m < tokens) sum[0] += log1pf(rest_q[m]) - xbar[m];
    }
    block_sum<1, kThreads>(sum, smem);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum[0];
}

// Computes c, and parts[block] = the block's part of -avg.
__global__ void __launch_bounds__(kThreads) average_kernel(const float* col, const float* inv_count, float eps, int64_t codes, float* c, float* parts) {
    __shared__ float smem[kThreads / kWarp];
    const float inv = *inv_count;
    float sum[1] = {0.f};
#pragma unroll 4
    for (int i = 0; i < kEach; ++i) {
        const int64_t k = int64_t(blockIdx.x) * kBlock + i * kThreads + threadIdx.x;
        if (k >= codes) break;
        const float a = col[k] * inv, log = logf(a + eps);
        c[k] = -(log + a / (a + eps));
        sum[0] += a * log;
    }
    block_sum<1, kThreads>(sum, smem);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum[0];
}

struct Space {
    Pieces pieces;
    float* squares;
    float* sample;
    float* average;

    Space(const ett_ibq_losses_args& a, void* start)
        : pieces(start),
          squares(pieces.take<float>(look_up_blocks(rows(a.z)))),
          sample(pieces.take<float>(ceil_div(rows(a.z), kBlock))),
          average(pieces.take<float>(ceil_div(rows(a.e), kBlock))) {}
};

bool sound(Check& check, const ett_ibq_losses_args* a) {
    if (!check.ok() || !check_codes(check, *a)) return false;
    const int64_t m = rows(a->z), k = rows(a->e);
    check.matrix("zq", a->zq, a->z.dtype, m, cols(a->z));
    check.vector("quant", a->quant, ETT_F32, 1);
    check.all_or_none({{"rest_q", &a->rest_q}, {"xbar", &a->xbar}, {"col", &a->col}, {"c", &a->c}, {"sample", &a->sample}, {"avg", &a->avg}});
    if (present(a->rest_q)) {
        check.vector("rest_q", a->rest_q, ETT_F32, m);
        check.vector("xbar", a->xbar, ETT_F32, m);
        check.vector("col", a->col, ETT_F32, k);
        check.vector("c", a->c, ETT_F32, k);
        check.vector("sample", a->sample, ETT_F32, 1);
        check.vector("avg", a->avg, ETT_F32, 1);
    }
    return check.ok();
}

template <class T> int32_t run(const ett_ibq_losses_args& a, const ett_launch* l, const char* name) {
    const Space s(a, l->workspace);
    const Codes<T> codes = codes_of<T>(a, l);
    const float* const inv = data<const float>(a.inv_count);
    const int64_t sample_blocks = ceil_div(codes.tokens, kBlock), average_blocks = ceil_div(codes.codes, kBlock);
    int32_t status = launch_look_up(kOp, codes, a.z, a.e, a.zq, s.squares, l);
    const Total quant = {s.squares, look_up_blocks(codes.tokens), inv, float((1.0 + a.beta_commit + a.beta_code) / double(codes.dim)), data<float>(a.quant)};
    if (!present(a.rest_q)) {
        if (status == ETT_OK) status = launch(kOp, total_kernel<1>, dim3(1), dim3(kTotalThreads), 0, l, Totals<1>{{quant}});
        return status == ETT_OK ? ett_done(name) : status;
    }
    if (status == ETT_OK && codes.tokens > 0)
        status = launch(kOp, sample_kernel, dim3(unsigned(sample_blocks)), dim3(kThreads), 0, l, data<const float>(a.rest_q),
                        data<const float>(a.xbar), codes.tokens, s.sample);
    if (status == ETT_OK)
        status = launch(kOp, average_kernel, dim3(unsigned(average_blocks)), dim3(kThreads), 0, l, data<const float>(a.col), inv, float(a.eps),
                        codes.codes, data<float>(a.c), s.average);
    const Totals<3> all = {{quant,
                            {s.sample, sample_blocks, inv, 1.f, data<float>(a.sample)},
                            {s.average, average_blocks, nullptr, -1.f, data<float>(a.avg)}}};
    if (status == ETT_OK) status = launch(kOp, total_kernel<3>, dim3(3), dim3(kTotalThreads), 0, l, all);
    return status == ETT_OK ? ett_done(name) : status;
}

}  // namespace
}  // namespace codebook
}  // namespace ett

extern "C" int64_t ett_ibq_losses_workspace(const ett_ibq_losses_args* a) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a);
    return sound(check, a) ? Space(*a, nullptr).pieces.bytes() : -1;
}

extern "C" int32_t ett_ibq_losses(const ett_ibq_losses_args* a, const ett_launch* l) {
    using namespace ett;
    using namespace ett::codebook;
    Check check(kOp, a, l);
    if (!sound(check, a)) return check.status();
    check.workspace(l, Space(*a, nullptr).pieces.bytes());
    const char* kernel = check.choose(l, {{"rows", true}});
    if (!check.ok()) return check.status();
    return with_act(a->z.dtype, [&](auto t) { return run<decltype(t)>(*a, l, kernel); });
}
