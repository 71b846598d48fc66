// Quantizes a batch of tokens with the kernels of the IBQ quantizer (docs/quantizer.md) and compares every result with a
// plain loop on the CPU. Prints one line for each check. Exit status: 0 if all pass, 1 if one fails, 2 without a GPU.
#include <cuda_runtime_api.h>
#include <ett_kernels.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kTokens = 1000, kCodes = 4096, kDim = 64;
constexpr double kTemperature = 0.5, kEps = 1e-8, kBetaCommit = 0.25, kBetaCode = 1.0;

void cuda(cudaError_t e, const char* what) {
    if (e != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}

// n elements in device memory, zeroed. Kernels write to them, so copies from and to the host are explicit.
template <class T> class Device {
  public:
    explicit Device(int64_t n) : n_(n) {
        cuda(cudaMalloc(reinterpret_cast<void**>(&p_), size_t(n) * sizeof(T)), "cudaMalloc");
        cuda(cudaMemset(p_, 0, size_t(n) * sizeof(T)), "cudaMemset");
    }
    explicit Device(const std::vector<T>& host) : Device(int64_t(host.size())) {
        cuda(cudaMemcpy(p_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    ~Device() { cudaFree(p_); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    T* ptr() const { return p_; }
    // The default stream, on which this program launches, comes first: cudaMemcpy waits for it.
    std::vector<T> host() const {
        std::vector<T> v(static_cast<size_t>(n_));
        cuda(cudaMemcpy(v.data(), p_, v.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return v;
    }
    // All elements as a vector, or as rows of `cols`.
    ett_view view() const { return {p_, kType, 1, {n_, 1, 1, 1}, n_}; }
    ett_view rows(int64_t cols) const { return {p_, kType, 2, {n_ / cols, cols, 1, 1}, cols}; }

  private:
    static constexpr int32_t kType = std::is_same_v<T, float> ? ETT_F32 : ETT_I32;
    T* p_ = nullptr;
    int64_t n_;
};

// Launches a kernel with the workspace that it asks for, and returns the implementation that runs.
template <class Args>
std::string call(int64_t (*workspace)(const Args*), int32_t (*launcher)(const Args*, const ett_launch*), const Args& args) {
    const int64_t bytes = std::max<int64_t>(workspace(&args), 0);  // -1: the launcher says what is wrong
    void* memory = nullptr;
    if (bytes > 0) cuda(cudaMalloc(&memory, size_t(bytes)), "cudaMalloc");
    ett_launch launch = {};
    launch.workspace = memory;
    launch.workspace_bytes = bytes;
    const int32_t code = launcher(&args, &launch);
    cudaFree(memory);  // waits until the kernel no longer uses it; a real host keeps one workspace for all launches
    if (code != ETT_OK) {
        ett_status s;
        ett_last_status(&s);
        throw std::runtime_error(std::string(s.op) + ": argument `" + s.arg + "` is " + s.got + ", wanted " + s.want);
    }
    return ett_last_kernel();
}

int failed = 0;
void report(const char* what, const std::string& kernel, double error, double limit) {
    const bool ok = error <= limit;  // false for NaN
    failed += !ok;
    std::printf("%-6s %-44s error %.1e, at most %.1e%s%s\n", ok ? "ok" : "FAILED", what, error, limit, kernel.empty() ? "" : ", by ", kernel.c_str());
}
double relative(double got, double want) { return std::fabs(got - want) / std::max(1.0, std::fabs(want)); }

// What the kernels compute, given the best codes that they found.
struct Expected {
    std::vector<double> gap, score, rest_p, rest_q, xbar, col;  // gap: from the score of the code to the best score
    double quant = 0, sample = 0, avg = 0;
};
Expected on_cpu(const std::vector<float>& z, const std::vector<float>& e, const std::vector<int32_t>& idx) {
    Expected x;
    x.col.resize(kCodes);
    std::vector<double> s(kCodes), q(kCodes);
    for (int64_t m = 0; m < kTokens; ++m) {
        for (int64_t k = 0; k < kCodes; ++k) {
            s[k] = 0;
            for (int64_t d = 0; d < kDim; ++d) s[k] += double(z[m * kDim + d]) * e[k * kDim + d];
        }
        const int64_t t = std::clamp<int64_t>(idx[m], 0, kCodes - 1);
        double rest_p = 0, rest_q = 0, dot = 0;
        for (int64_t k = 0; k < kCodes; ++k) {
            const double l = (s[k] - s[t]) / kTemperature;
            q[k] = std::exp(l);
            dot += q[k] * l;
            if (k != t) rest_p += std::exp(s[k] - s[t]), rest_q += q[k];
        }
        for (int64_t k = 0; k < kCodes; ++k) x.col[k] += q[k] / (1 + rest_q);
        x.gap.push_back(idx[m] == t ? *std::max_element(s.begin(), s.end()) - s[t] : INFINITY);
        x.score.push_back(s[t]);
        x.rest_p.push_back(rest_p);
        x.rest_q.push_back(rest_q);
        x.xbar.push_back(dot / (1 + rest_q));
        x.sample += (std::log1p(rest_q) - dot / (1 + rest_q)) / kTokens;
        for (int64_t d = 0; d < kDim; ++d) {
            const double diff = double(e[t * kDim + d]) - z[m * kDim + d];
            x.quant += (1 + kBetaCommit + kBetaCode) * diff * diff / kDim / kTokens;
        }
    }
    for (double c : x.col) x.avg -= c / kTokens * std::log(c / kTokens + kEps);
    return x;
}
double worst(const std::vector<float>& got, const std::vector<double>& want) {
    double error = 0;
    for (size_t i = 0; i < want.size(); ++i) error = std::fmax(error, std::isnan(got[i]) ? INFINITY : relative(got[i], want[i]));
    return error;
}

void run() {
    std::mt19937 random(1);
    std::normal_distribution<float> normal(0.f, 0.5f);
    std::vector<float> z(kTokens * kDim), e(kCodes * kDim);
    for (float& v : z) v = normal(random);
    for (float& v : e) v = normal(random);

    const Device<float> z_on(z), e_on(e), inv_count(std::vector<float>{1.f / kTokens});
    const Device<float> score(kTokens), smax(kTokens), rest_p(kTokens), rest_q(kTokens), xbar(kTokens), bad(1);
    const Device<float> col(kCodes), c(kCodes), zq(kTokens * kDim), quant(1), sample(1), avg(1);
    const Device<int32_t> nearest(kTokens), idx(kTokens);

    // Members that are not named are zero: an absent tensor, a false flag.
    ett_nearest_args n = {};
    n.z = z_on.rows(kDim), n.e = e_on.rows(kDim), n.idx = nearest.view(), n.score = score.view(), n.metric = ETT_METRIC_DOT;
    const std::string nearest_by = call(ett_nearest_workspace, ett_nearest, n);

    ett_ibq_rows_args r = {};
    r.z = n.z, r.e = n.e, r.idx = idx.view(), r.smax = smax.view(), r.rest_p = rest_p.view(), r.rest_q = rest_q.view(), r.xbar = xbar.view();
    r.bad = bad.view(), r.temperature = kTemperature;
    const std::string rows_by = call(ett_ibq_rows_workspace, ett_ibq_rows, r);

    ett_ibq_cols_args k = {};
    k.z = n.z, k.e = n.e, k.idx = r.idx, k.smax = r.smax, k.rest_q = r.rest_q, k.col = col.view(), k.temperature = kTemperature;
    const std::string cols_by = call(ett_ibq_cols_workspace, ett_ibq_cols, k);

    ett_ibq_losses_args l = {};
    l.z = n.z, l.e = n.e, l.idx = r.idx, l.rest_q = r.rest_q, l.xbar = r.xbar, l.col = k.col, l.inv_count = inv_count.view();
    l.zq = zq.rows(kDim), l.c = c.view(), l.quant = quant.view(), l.sample = sample.view(), l.avg = avg.view();
    l.eps = kEps, l.beta_commit = kBetaCommit, l.beta_code = kBetaCode;
    const std::string losses_by = call(ett_ibq_losses_workspace, ett_ibq_losses, l);

    // On Hopper, products of f32 have an error below 2^-15 |z| |e| (nearest.cu); codes that are closer may be exchanged.
    const double product = kDim * 0.25 * 2 / 32768, loose = 1e-3;
    const Expected first = on_cpu(z, e, nearest.host()), x = on_cpu(z, e, idx.host());
    report("nearest: score of the code, below the best", nearest_by, *std::max_element(first.gap.begin(), first.gap.end()), 2 * product);
    report("nearest: score", nearest_by, worst(score.host(), first.score), product);
    report("ibq_rows: score of the code, below the best", rows_by, *std::max_element(x.gap.begin(), x.gap.end()), 2 * product);
    report("ibq_rows: smax", rows_by, worst(smax.host(), x.score), product);
    report("ibq_rows: rest_p", rows_by, worst(rest_p.host(), x.rest_p), loose);
    report("ibq_rows: rest_q", rows_by, worst(rest_q.host(), x.rest_q), loose);
    report("ibq_rows: xbar", rows_by, worst(xbar.host(), x.xbar), loose);
    report("ibq_rows: rows without a finite score", rows_by, bad.host()[0], 0);
    report("ibq_cols: col", cols_by, worst(col.host(), x.col), loose);
    report("ibq_losses: quant", losses_by, relative(quant.host()[0], x.quant), 1e-5);
    report("ibq_losses: sample", losses_by, relative(sample.host()[0], x.sample), loose);
    report("ibq_losses: avg", losses_by, relative(avg.host()[0], x.avg), loose);

    const std::vector<int32_t> codes = idx.host();
    const std::vector<float> quantized = zq.host();
    int64_t different = 0;
    for (int64_t m = 0; m < kTokens; ++m)
        different += std::memcmp(&quantized[m * kDim], &e[std::clamp<int64_t>(codes[m], 0, kCodes - 1) * kDim], kDim * sizeof(float)) != 0;
    report("ibq_losses: rows of zq that are not their code", losses_by, double(different), 0);

    // Kernels are deterministic.
    const std::vector<float> before = rest_q.host();
    call(ett_ibq_rows_workspace, ett_ibq_rows, r);
    const std::vector<float> after = rest_q.host();
    report("ibq_rows, repeated: different bits", rows_by, std::memcmp(before.data(), after.data(), before.size() * sizeof(float)) != 0, 0);
}

}  // namespace

int main() {
    if (ett_abi_version() != ETT_ABI_VERSION) {
        std::fprintf(stderr, "the library has interface %d, this program was compiled for %d: use the header of the library\n", ett_abi_version(),
                     ETT_ABI_VERSION);
        return 1;
    }
    int devices = 0;
    const cudaError_t e = cudaGetDeviceCount(&devices);
    if (e != cudaSuccess || devices == 0) {
        std::printf("no GPU (%s): this program needs one of compute capability 8.0 or newer, with its driver\n",
                    e == cudaSuccess ? "no device" : cudaGetErrorString(e));
        return 2;
    }
    try {
        run();
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    std::printf("%d checks failed\n", failed);
    return failed ? 1 : 0;
}
