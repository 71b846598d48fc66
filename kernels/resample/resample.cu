// resample.cu: upsampling and pooling by two.
//   upsample2x_fwd   y[b, i, j] = x[b, i/2, j/2]
//   upsample2x_bwd   dx[b, i, j] = (dy[b, 2i, 2j] + dy[b, 2i, 2j+1]) + (dy[b, 2i+1, 2j] + dy[b, 2i+1, 2j+1])
//   max_pool2x2_fwd  y[b, i, j] = max(x[b, 2i..2i+2, 2j..2j+2]); an odd last line or column is dropped
//   max_pool2x2_bwd  dx = dy at the maximum, 0 elsewhere; ties go to the first in row-major order, among NaNs the last
//   wins
//
// upsample2x   coarse x, dx  B,H,W,C    fine y, dy     B,2H,2W,C   act  pixels of any stride  in, out
// max_pool2x2  fine x, dx    B,H,W,C    coarse y, dy   B,H/2,W/2,C act  pixels of any stride  in, out
//
// numerics: sums of four in float32, one rounding; the other kernels copy. Bitwise repeatable.
// work: 5/4 of the fine image's bytes, 9/4 in max_pool2x2_bwd.
// limits: "wide" requires pixels of whole 16-byte pieces; "plain" accepts any. Fewer than 2^31 lines of fewer than 2^31
// elements each.
#include "walk.cuh"

namespace ett {
namespace {

// A coarse image has h lines of w pixels with c channels, a fine image fine_h lines of fine_w pixels.
struct Lines {
    unsigned h, w, c, fine_h, fine_w;
};

// A coarse pixel, the first of its four fine pixels, and a channel.
struct Window {
    int64_t coarse, fine;
    unsigned i, j, at;  // line and column of the coarse pixel; the channel
    int64_t line;       // pixels from one fine line to the next
};

// The window of element `p.at` of line `p.row`, where lines are counted over all images.
__device__ __forceinline__ Window window(const Lines& s, Place p) {
    const unsigned at = unsigned(p.at), j = at / s.c;
    const unsigned row = unsigned(p.row), image = row / s.h, i = row - image * s.h;
    return {p.row * s.w + j, (int64_t(image) * s.fine_h + 2 * i) * s.fine_w + 2 * j, i, j, at - j * s.c, int64_t(s.fine_w)};
}

// The four fine pieces of a window: two of one line, two of the next.
template <class T, int N> struct Four {
    Vec<T, N> v[4];
};
template <int N, class T> __device__ __forceinline__ Four<T, N> load_four(const Matrix<const T>& m, const Window& w) {
    Four<T, N> f;
#pragma unroll
    for (int k = 0; k < 4; ++k) f.v[k] = load_vec<N>(m.row(w.fine + (k / 2) * w.line + k % 2) + w.at);
    return f;
}

template <class T, int N> struct UpsampleFwd {
    Matrix<const T> x;
    Matrix<T> y;
    Lines s;

    using In = Vec<T, N>;
    __device__ In load(Place p) const {
        const Window w = window(s, p);
        return load_vec<N>(x.row(w.coarse) + w.at);
    }
    __device__ void finish(Place p, const In& in) const {
        const Window w = window(s, p);
#pragma unroll
        for (int k = 0; k < 4; ++k) store_vec(y.row(w.fine + (k / 2) * w.line + k % 2) + w.at, in);
    }
};

template <class T, int N> struct UpsampleBwd {
    Matrix<const T> dy;
    Matrix<T> dx;
    Lines s;

    using In = Four<T, N>;
    __device__ In load(Place p) const { return load_four<N>(dy, window(s, p)); }
    __device__ void finish(Place p, const In& in) const {
        const Window w = window(s, p);
        float f[4][N], sum[N];
#pragma unroll
        for (int k = 0; k < 4; ++k) unpack(f[k], in.v[k]);
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = (f[0][j] + f[1][j]) + (f[2][j] + f[3][j]);
        store_global(dx.row(w.coarse) + w.at, sum);
    }
};

// True if b replaces a as the maximum: of equal values the first stays; NaN replaces everything.
__device__ __forceinline__ bool beats(float b, float a) { return b > a || b != b; }

// The index of the largest of four.
__device__ __forceinline__ int largest(const float (&v)[4]) {
    const int upper = beats(v[1], v[0]) ? 1 : 0, lower = beats(v[3], v[2]) ? 3 : 2;
    return beats(lower == 3 ? v[3] : v[2], upper == 1 ? v[1] : v[0]) ? lower : upper;
}

template <class T, int N> struct PoolFwd {
    Matrix<const T> x;
    Matrix<T> y;
    Lines s;

    using In = Four<T, N>;
    __device__ In load(Place p) const { return load_four<N>(x, window(s, p)); }
    __device__ void finish(Place p, const In& in) const {
        const Window w = window(s, p);
        float f[4][N], most[N];
#pragma unroll
        for (int k = 0; k < 4; ++k) unpack(f[k], in.v[k]);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float v[4] = {f[0][j], f[1][j], f[2][j], f[3][j]};
            const int k = largest(v);
            most[j] = k == 0 ? v[0] : k == 1 ? v[1] : k == 2 ? v[2] : v[3];
        }
        store_global(y.row(w.coarse) + w.at, most);
    }
};

// Also processes the incomplete windows at the bottom and on the right, which have no coarse pixel.
template <class T, int N> struct PoolBwd {
    Matrix<const T> dy, x;
    Matrix<T> dx;
    Lines s;  // h and w include incomplete windows

    struct In {
        Vec<T, N> dy;
        Four<T, N> x;
    };
    // The coarse pixel, or -1 if the window is incomplete.
    __device__ __forceinline__ int64_t coarse(Place p, const Window& w) const {
        if (w.i >= s.fine_h / 2 || w.j >= s.fine_w / 2) return -1;
        return (int64_t(unsigned(p.row) / s.h) * (s.fine_h / 2) + w.i) * (s.fine_w / 2) + w.j;
    }
    __device__ In load(Place p) const {
        const Window w = window(s, p);
        In in{};
        const int64_t at = coarse(p, w);
        if (at >= 0) {
            in.dy = load_vec<N>(dy.row(at) + w.at);
            in.x = load_four<N>(x, w);
        }
        return in;
    }
    __device__ void finish(Place p, const In& in) const {
        const Window w = window(s, p);
        const bool whole = coarse(p, w) >= 0;
        float f[4][N], g[N];
        unpack(g, in.dy);
        int to[N];
#pragma unroll
        for (int k = 0; k < 4; ++k) unpack(f[k], in.x.v[k]);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float v[4] = {f[0][j], f[1][j], f[2][j], f[3][j]};
            to[j] = whole ? largest(v) : -1;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (2 * w.i + k / 2 >= s.fine_h || 2 * w.j + k % 2 >= s.fine_w) continue;
            float d[N];
#pragma unroll
            for (int j = 0; j < N; ++j) d[j] = to[j] == k ? g[j] : 0.f;
            store_global(dx.row(w.fine + (k / 2) * w.line + k % 2) + w.at, d);
        }
    }
};

// Checks that the two views have rank 4, the same type, and that `coarse` has half the height and width of `fine`;
// `even`: the height and width of `fine` must be even.
bool halves(Check& check, const char* fine_name, const ett_view& fine, const char* coarse_name, const ett_view& coarse, bool even) {
    if (!check.ok() || !check.act(fine_name, fine) || !check.image(fine_name, fine)) return false;
    if (even && !check.require(fine.dims[1] % 2 == 0 && fine.dims[2] % 2 == 0, fine_name, "of an odd height or width", "an even height and width"))
        return false;
    if (!check.type(coarse_name, coarse, fine.dtype) || !check.image(coarse_name, coarse)) return false;
    const int64_t *f = fine.dims, *c = coarse.dims;
    const bool fit = c[0] == f[0] && c[1] == f[1] / 2 && c[2] == f[2] / 2 && c[3] == f[3];
    char got[96], want[96];
    snprintf(got, sizeof got, "[%lld, %lld, %lld, %lld]", (long long)c[0], (long long)c[1], (long long)c[2], (long long)c[3]);
    snprintf(want, sizeof want, "[%lld, %lld, %lld, %lld]", (long long)f[0], (long long)(f[1] / 2), (long long)(f[2] / 2), (long long)f[3]);
    check.require(fit, coarse_name, got, want);
    const int64_t most = int64_t(1) << 31;
    return check.require((f[2] + 1) * f[3] < most && f[0] * (f[1] + 1) < most, fine_name, "of 2^31 elements a line, or as many lines",
                         "less than 2^31 of both");
}

// Launches the operation over `h` lines of `w` windows per image.
template <class Make>
int32_t resample(Check& check, const char* op, const ett_launch* l, const ett_view& fine, int64_t h, int64_t w, Views views, Make make) {
    const bool pieces = std::all_of(views.begin(), views.end(), [](const ett_view* v) { return wide(*v); });
    const char* kernel = check.choose(l, {{"wide", pieces}, {"plain", true}});
    if (!check.ok()) return check.status();
    const int64_t b = fine.dims[0], c = fine.dims[3];
    if (b * h * w * c == 0) return ett_done("");
    const Lines s{unsigned(h), unsigned(w), unsigned(c), unsigned(fine.dims[1]), unsigned(fine.dims[2])};
    const Extent e{b * h, w * c};
    return with_act(fine.dtype, [&](auto t) {
        using T = decltype(t);
        if (strcmp(kernel, "wide") == 0) {
            constexpr int N = kWide<T>;
            return launch_walk<N>(op, l, kernel, e, make(t, std::integral_constant<int, N>{}, s));
        }
        return launch_walk<1>(op, l, kernel, e, make(t, std::integral_constant<int, 1>{}, s));
    });
}

bool sound(Check& check, const ett_upsample2x_fwd_args* a) { return check.ok() && halves(check, "y", a->y, "x", a->x, true); }
bool sound(Check& check, const ett_upsample2x_bwd_args* a) { return check.ok() && halves(check, "dy", a->dy, "dx", a->dx, true); }
bool sound(Check& check, const ett_max_pool2x2_fwd_args* a) { return check.ok() && halves(check, "x", a->x, "y", a->y, false); }
bool sound(Check& check, const ett_max_pool2x2_bwd_args* a) {
    return check.ok() && halves(check, "x", a->x, "dy", a->dy, false) && check.image("dx", a->dx) &&
           check.matrix("dx", a->dx, a->x.dtype, rows(a->x), cols(a->x));
}

}  // namespace
}  // namespace ett

ETT_NO_WORKSPACE(upsample2x_fwd)
ETT_NO_WORKSPACE(upsample2x_bwd)
ETT_NO_WORKSPACE(max_pool2x2_fwd)
ETT_NO_WORKSPACE(max_pool2x2_bwd)

extern "C" int32_t ett_upsample2x_fwd(const ett_upsample2x_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("upsample2x_fwd", a, l);
    if (!sound(check, a)) return check.status();
    return resample(check, "upsample2x_fwd", l, a->y, a->x.dims[1], a->x.dims[2], {&a->x, &a->y}, [&](auto t, auto n, const Lines& s) {
        using T = decltype(t);
        return UpsampleFwd<T, n>{matrix<const T>(a->x), matrix<T>(a->y), s};
    });
}

extern "C" int32_t ett_upsample2x_bwd(const ett_upsample2x_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("upsample2x_bwd", a, l);
    if (!sound(check, a)) return check.status();
    return resample(check, "upsample2x_bwd", l, a->dy, a->dx.dims[1], a->dx.dims[2], {&a->dy, &a->dx}, [&](auto t, auto n, const Lines& s) {
        using T = decltype(t);
        return UpsampleBwd<T, n>{matrix<const T>(a->dy), matrix<T>(a->dx), s};
    });
}

extern "C" int32_t ett_max_pool2x2_fwd(const ett_max_pool2x2_fwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("max_pool2x2_fwd", a, l);
    if (!sound(check, a)) return check.status();
    return resample(check, "max_pool2x2_fwd", l, a->x, a->y.dims[1], a->y.dims[2], {&a->x, &a->y}, [&](auto t, auto n, const Lines& s) {
        using T = decltype(t);
        return PoolFwd<T, n>{matrix<const T>(a->x), matrix<T>(a->y), s};
    });
}

extern "C" int32_t ett_max_pool2x2_bwd(const ett_max_pool2x2_bwd_args* a, const ett_launch* l) {
    using namespace ett;
    Check check("max_pool2x2_bwd", a, l);
    if (!sound(check, a)) return check.status();
    const int64_t h = ceil_div(a->x.dims[1], 2), w = ceil_div(a->x.dims[2], 2);
    return resample(check, "max_pool2x2_bwd", l, a->x, h, w, {&a->dy, &a->x, &a->dx}, [&](auto t, auto n, const Lines& s) {
        using T = decltype(t);
        return PoolBwd<T, n>{matrix<const T>(a->dy), matrix<const T>(a->x), matrix<T>(a->dx), s};
    });
}
