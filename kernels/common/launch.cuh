// launch.cuh: the host side of every launcher: check the arguments, choose an implementation, launch, return a status.
#pragma once

#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>

#include "status.h"
#include "types.cuh"

namespace ett {

// Sizes of a view. They may be computed before Check::view has accepted it, so the products wrap without overflowing.
inline int64_t product(int64_t a, int64_t b) { return int64_t(uint64_t(a) * uint64_t(b)); }
inline int64_t rows(const ett_view& v) {
    int64_t n = 1;
    for (int i = 0; i < std::min(v.rank, 4) - 1; ++i) n = product(n, v.dims[i]);
    return n;
}
inline int64_t cols(const ett_view& v) { return v.rank >= 1 && v.rank <= 4 ? v.dims[v.rank - 1] : 1; }
inline int64_t numel(const ett_view& v) { return product(rows(v), cols(v)); }
inline bool present(const ett_view& v) { return v.ptr != nullptr; }
// Elements from one row to the next; a view of one row has no stride of its own.
inline int64_t stride(const ett_view& v) { return rows(v) > 1 ? v.ld : cols(v); }
// True if rows follow each other without gaps, so that the view is one vector.
inline bool contiguous(const ett_view& v) { return stride(v) == cols(v); }
template <class T> T* data(const ett_view& v) { return static_cast<T*>(v.ptr); }

inline int64_t dtype_size(int32_t dtype) {
    switch (dtype) {
    case ETT_F64: return 8;
    case ETT_BF16: return 2;
    case ETT_U8: return 1;
    default: return 4;
    }
}
inline const char* dtype_name(int32_t dtype) {
    switch (dtype) {
    case ETT_F64: return "f64";
    case ETT_F32: return "f32";
    case ETT_BF16: return "bf16";
    case ETT_I32: return "i32";
    case ETT_U8: return "u8";
    default: return "of an unknown type";
    }
}
inline bool is_float(int32_t dtype) { return dtype == ETT_F32 || dtype == ETT_BF16; }

// True if all rows begin at multiples of `bytes` and consist of whole pieces of that size: the condition for vector
// loads. True for absent views.
inline bool wide(const ett_view& v, int64_t bytes = 16) {
    const int64_t size = dtype_size(v.dtype);
    return !present(v) || (reinterpret_cast<uintptr_t>(v.ptr) % bytes == 0 && stride(v) * size % bytes == 0 && cols(v) * size % bytes == 0);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// An implementation of a kernel, and whether it supports the current call. Every kernel has one that supports all calls.
struct Implementation {
    const char* name;
    bool able;
};

// Checks the arguments of a call and keeps the first error. Use: checks, then `if (!check.ok()) return
// check.status();`.
class Check {
  public:
    Check(const char* op, const void* args, const ett_launch* launch) : op_(op) {
        if (!args) fail(ETT_BAD_ARGUMENT, "args", "null", "the address of an argument struct");
        if (!launch) fail(ETT_BAD_ARGUMENT, "launch", "null", "the address of an ett_launch");
    }
    // For ett_<kernel>_workspace, which has no launch.
    Check(const char* op, const void* args) : op_(op), silent_(true) {
        if (!args) fail(ETT_BAD_ARGUMENT, "args", "null", "the address of an argument struct");
    }

    bool ok() const { return status_ == ETT_OK; }
    int32_t status() const { return status_; }

    void fail(int32_t code, const char* arg, const char* got, const char* want) {
        if (!ok()) return;
        status_ = code;
        if (!silent_) ett_fail(code, 0, op_, arg, got, want);
    }

    // The view is present, has a valid shape and is aligned to its elements. All other checks of a view do this first.
    bool view(const char* arg, const ett_view& v) {
        if (!ok()) return false;
        char got[96];
        if (!v.ptr) return wrong(arg, "null", "the address of a tensor");
        if (v.rank < 0 || v.rank > 4) {
            snprintf(got, sizeof got, "of rank %d", v.rank);
            return wrong(arg, got, "of rank 0 to 4");
        }
        if (v.dtype < ETT_F64 || v.dtype > ETT_U8) {
            snprintf(got, sizeof got, "of element type %d", v.dtype);
            return wrong(arg, got, "one of ett_dtype");
        }
        int64_t n = 1, bytes;
        for (int i = 0; i < v.rank; ++i) {
            if (v.dims[i] < 0) return wrong(arg, shape(v).text, "no negative dimension");
            // Dimensions of 0 are left out, so that no partial product overflows either.
            if (v.dims[i] > 0 && __builtin_mul_overflow(n, v.dims[i], &n)) return wrong(arg, shape(v).text, "fewer than 2^63 elements");
        }
        if (rows(v) > 1 && v.ld < cols(v)) {
            snprintf(got, sizeof got, "a view with row stride %lld", (long long)v.ld);
            char want[96];
            snprintf(want, sizeof want, "a stride of at least %lld", (long long)cols(v));
            return wrong(arg, got, want);
        }
        const int64_t size = dtype_size(v.dtype);
        if (__builtin_mul_overflow(rows(v), stride(v), &bytes) || __builtin_mul_overflow(bytes, size, &bytes)) {
            snprintf(got, sizeof got, "%lld rows that begin %lld elements apart", (long long)rows(v), (long long)stride(v));
            return wrong(arg, got, "fewer than 2^63 bytes");
        }
        if (reinterpret_cast<uintptr_t>(v.ptr) % size != 0) {
            snprintf(got, sizeof got, "at an address that is not a multiple of %lld", (long long)size);
            return wrong(arg, got, "aligned to its elements");
        }
        return true;
    }

    // The view has element type `dtype`.
    bool type(const char* arg, const ett_view& v, int32_t dtype) {
        if (!view(arg, v)) return false;
        return v.dtype == dtype || wrong(arg, dtype_name(v.dtype), dtype_name(dtype));
    }

    // The view has an activation type, f32 or bf16 (only the CPU computes in f64).
    bool act(const char* arg, const ett_view& v) {
        if (!view(arg, v)) return false;
        if (v.dtype == ETT_F64) {
            fail(ETT_UNSUPPORTED, arg, "f64", "f32 or bf16");
            return false;
        }
        return is_float(v.dtype) || wrong(arg, dtype_name(v.dtype), "f32 or bf16");
    }

    // The view has element type `dtype` and n rows of c columns; its leading dimensions may be any that give n rows.
    bool matrix(const char* arg, const ett_view& v, int32_t dtype, int64_t n, int64_t c) {
        if (!type(arg, v, dtype)) return false;
        if (rows(v) == n && cols(v) == c) return true;
        char want[96];
        snprintf(want, sizeof want, "%lld rows of %lld", (long long)n, (long long)c);
        return wrong(arg, shape(v).text, want);
    }

    // The view has rank 4: images [B, H, W, C].
    bool image(const char* arg, const ett_view& v) { return ok() && (v.rank == 4 || wrong(arg, shape(v).text, "of rank 4")); }

    // The view is contiguous and has n elements of type `dtype`, in any shape.
    bool vector(const char* arg, const ett_view& v, int32_t dtype, int64_t n) {
        if (!type(arg, v, dtype)) return false;
        char want[96];
        if (numel(v) != n) {
            snprintf(want, sizeof want, "%lld elements", (long long)n);
            return wrong(arg, shape(v).text, want);
        }
        if (!contiguous(v)) {
            snprintf(want, sizeof want, "%lld contiguous elements", (long long)n);
            char got[96];
            snprintf(got, sizeof got, "rows of %lld that begin %lld apart", (long long)cols(v), (long long)v.ld);
            return wrong(arg, got, want);
        }
        return true;
    }

    // An optional argument.
    struct Named {
        const char* name;
        const ett_view* view;
    };
    // The arguments are all present or all absent.
    bool all_or_none(std::initializer_list<Named> args) {
        const Named& first = *args.begin();
        const char* words[] = {"absent", "present"};
        for (const Named& a : args) {
            if (!ok() || present(*a.view) == present(*first.view)) continue;
            char want[96];
            snprintf(want, sizeof want, "%s, as %s is", words[present(*first.view)], first.name);
            wrong(a.name, words[present(*a.view)], want);
        }
        return ok();
    }

    // `right` holds.
    bool require(bool right, const char* arg, const char* got, const char* want) { return ok() && (right || wrong(arg, got, want)); }

    // v is in [least, most].
    bool range(const char* arg, int64_t v, int64_t least, int64_t most) {
        if (!ok() || (v >= least && v <= most)) return ok();
        char got[96], want[96];
        snprintf(got, sizeof got, "%lld", (long long)v);
        snprintf(want, sizeof want, "from %lld to %lld", (long long)least, (long long)most);
        return wrong(arg, got, want);
    }

    // All rows begin at multiples of `bytes` and consist of whole pieces of that size.
    bool aligned(const char* arg, const ett_view& v, int64_t bytes) {
        if (!ok() || wide(v, bytes)) return ok();
        char want[96];
        snprintf(want, sizeof want, "rows that begin at multiples of %lld bytes and consist of whole pieces of that size", (long long)bytes);
        return wrong(arg, "misaligned", want);
    }

    // The launch's workspace is aligned and holds at least `bytes`.
    bool workspace(const ett_launch* l, int64_t bytes) {
        if (!ok() || bytes == 0) return ok();
        char got[96], want[96];
        snprintf(want, sizeof want, "%lld bytes at an address that is a multiple of 256", (long long)bytes);
        if (!l->workspace) return wrong("launch.workspace", "null", want);
        if (l->workspace_bytes >= bytes && reinterpret_cast<uintptr_t>(l->workspace) % 256 == 0) return true;
        snprintf(got, sizeof got, "%lld bytes at an address that is %lld modulo 256", (long long)l->workspace_bytes,
                 (long long)(reinterpret_cast<uintptr_t>(l->workspace) % 256));
        return wrong("launch.workspace", got, want);
    }

    // The implementation that `l` forces, or else the first of `all` that supports this call; `all` begins with the best.
    const char* choose(const ett_launch* l, std::initializer_list<Implementation> all) {
        return choose(l, std::find_if(all.begin(), all.end(), [](const Implementation& i) { return i.able; })->name, all);
    }
    // The same with another default, `best`, than the first that supports the call.
    const char* choose(const ett_launch* l, const char* best, std::initializer_list<Implementation> all) {
        if (!ok() || !l->force || !*l->force) return best;
        const Implementation* const named =
            std::find_if(all.begin(), all.end(), [&](const Implementation& i) { return strcmp(i.name, l->force) == 0; });
        const bool known = named != all.end();
        if (known && named->able) return named->name;
        char got[96], names[64] = "", want[96];
        int count = 0;
        for (const Implementation& i : all) {
            if (known && !i.able) continue;
            const size_t at = strlen(names);
            snprintf(names + at, sizeof names - at, "%s%s", count++ ? ", " : "", i.name);
        }
        snprintf(got, sizeof got, known ? "`%.40s`, which cannot do this call" : "`%.40s`, the name of no implementation", l->force);
        snprintf(want, sizeof want, "%s%s", count > 1 ? "one of " : "", names);
        fail(known ? ETT_UNSUPPORTED : ETT_BAD_ARGUMENT, "launch.force", got, want);
        return best;
    }

  private:
    struct Text {
        char text[96];
    };
    static Text shape(const ett_view& v) {
        Text t;
        int at = snprintf(t.text, sizeof t.text, "[");
        for (int i = 0; i < v.rank && at < 80; ++i) at += snprintf(t.text + at, sizeof t.text - at, "%s%lld", i ? ", " : "", (long long)v.dims[i]);
        snprintf(t.text + at, sizeof t.text - at, "]");
        return t;
    }
    bool wrong(const char* arg, const char* got, const char* want) {
        fail(ETT_BAD_ARGUMENT, arg, got, want);
        return false;
    }

    const char* op_;
    int32_t status_ = ETT_OK;
    bool silent_ = false;
};

// Enqueues `kernel`; returns ETT_OK, or records the error and returns its code. Without an attribute, CUDA limits
// static and dynamic shared memory together to 48 KB. The static part is not known here but is at most 16 KB, so the
// attribute is set for more than 32 KB of dynamic shared memory.
template <class... P, class... A>
int32_t launch(const char* op, void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, const ett_launch* l, const A&... args) {
#ifdef ETT_SHIM
    shim::launch(op, grid, block, smem, [&] { kernel(P(args)...); });
    (void)l;
    return ETT_OK;
#else
    cudaError_t e = cudaSuccess;
    if (smem > 32 * 1024)
        e = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
    if (e == cudaSuccess) {
        cudaLaunchConfig_t config = {};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = smem;
        config.stream = reinterpret_cast<cudaStream_t>(l->stream);
        e = cudaLaunchKernelEx(&config, kernel, P(args)...);
    }
    if (e == cudaSuccess) return ETT_OK;
    (void)cudaGetLastError();  // clear the error, so that the next call does not report it again
    return ett_fail(ETT_CUDA_ERROR, int32_t(e), op, "launch", cudaGetErrorName(e), cudaGetErrorString(e));
#endif
}

// Sets `bytes` bytes to zero on the launch's stream.
inline int32_t zero(const char* op, void* p, size_t bytes, const ett_launch* l) {
    const cudaError_t e = cudaMemsetAsync(p, 0, bytes, reinterpret_cast<cudaStream_t>(l->stream));
    if (e == cudaSuccess) return ETT_OK;
    (void)cudaGetLastError();
    return ett_fail(ETT_CUDA_ERROR, int32_t(e), op, "launch", cudaGetErrorName(e), cudaGetErrorString(e));
}

// An H100's number of multiprocessors and largest shared memory of a block. Workspace queries assume them on a machine
// without a GPU, so that a run can be planned there.
constexpr int kPlannedMultiprocessors = 132, kPlannedSmem = 227 << 10;

// Multiprocessors of the current device.
inline int multiprocessors() {
    int device = 0, n = 1;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return kPlannedMultiprocessors;
    }
    return n;
}

// Calls f with a value of the C++ type of an activation type: float or bf16.
template <class F> auto with_act(int32_t dtype, F f) { return dtype == ETT_BF16 ? f(bf16{}) : f(float{}); }

// The fault slot of a launch as a kernel argument.
struct Fault {
    ett_fault* slot;
    int32_t launch;
};
inline Fault fault_of(const ett_launch* l) { return Fault{l->fault, l->number}; }

// Reports an index outside [0, limit); only the first report is kept.
__device__ __forceinline__ void report_index(const Fault& f, int64_t where, int64_t value, int64_t limit) {
    if (f.slot && atomicCAS(&f.slot->kind, int(ETT_FAULT_NONE), int(ETT_FAULT_INDEX)) == int(ETT_FAULT_NONE)) {
        f.slot->launch = f.launch;
        f.slot->where = where;
        f.slot->value = value;
        f.slot->limit = limit;
    }
}

}  // namespace ett

// The block's dynamic shared memory, 128-byte aligned: `ETT_DYNAMIC_SMEM(smem);` declares `smem` as unsigned char*.
#ifdef ETT_SHIM
#define ETT_DYNAMIC_SMEM(name) unsigned char* const name = shim::dynamic_smem()
#else
#define ETT_DYNAMIC_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// ett_<op>_workspace of a kernel without a workspace: 0, or -1 if `ett::sound`, the check of its launcher, fails.
#define ETT_NO_WORKSPACE(op)                                               \
    extern "C" int64_t ett_##op##_workspace(const ett_##op##_args* args) { \
        ett::Check check(#op, args);                                       \
        return ett::sound(check, args) ? 0 : -1;                           \
    }
