// hopper.cuh: what the kernels for Hopper (sm_90a) are built from: barriers in shared memory, bulk and tensor copies
// (TMA), products of warpgroups (wgmma), the distribution of registers, and tensor maps on the host.
//
// A kernel for Hopper compiles its body only where ETT_SM90A is defined; for other targets it is empty and is not
// launched (is_hopper). The shim has none of this, so its kernels stand between #ifndef ETT_SHIM and #endif.
//
// Terms: a warpgroup is four warps whose first has a number divisible by 4. A panel is a tile of rows of 128 bytes (64
// bf16) in the 128-byte swizzle: the 16-byte piece c of row r is stored at r * 128 + (c ^ r % 8) * 16. Panels begin at
// multiples of 1024 bytes. An operand whose inner dimension is the one summed over is K-major, otherwise MN-major.
// sources: PTX ISA 9.0, sections on mbarrier, cp.async.bulk, wgmma and setmaxnreg.
#pragma once

#include "launch.cuh"

#ifndef ETT_SHIM
#include <cuda.h>

#include <algorithm>
#include <iterator>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ETT_SM90A
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "compile for sm_90a, not sm_90: the kernels for Hopper would be empty"
#endif

namespace ett {
namespace hopper {

inline constexpr int kWarpgroup = 128;      // threads
inline constexpr int kPanelCols = 64;       // bf16 elements in a row of a panel
inline constexpr int kPanelRowBytes = 128;
inline constexpr int64_t kMostSmem = 232448;  // bytes of shared memory that a block may have

// ---- barriers --------------------------------------------------------------------------------------------

// A barrier (mbarrier, 8 bytes) completes a phase when `count` arrivals and all expected bytes have come. Waiting for
// parity p returns if the phase of that parity has completed; before the first completion, parity 1 counts as completed.
__device__ __forceinline__ void bar_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Makes initialised barriers visible to the copies; a block barrier has to follow.
__device__ __forceinline__ void bar_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives and expects `bytes` more bytes in this phase.
__device__ __forceinline__ void bar_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bar_arrive(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
__device__ __forceinline__ void bar_wait(uint32_t bar, uint32_t parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "WAIT:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\n"
                 "bra WAIT;\n"
                 "DONE:\n"
                 "}" ::"r"(bar), "r"(parity) : "memory");
}

// The position of a thread in a ring of STAGES slots, and the parity of the phase that it waits for next.
template <int STAGES> struct Ring {
    uint32_t slot = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// Synchronises `threads` threads that use the same number, 1 to 15.
__device__ __forceinline__ void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// The same; whether `vote` holds for any of them.
__device__ __forceinline__ bool named_barrier_or(int number, int threads, bool vote) {
    int any;
    asm volatile(
        "{\n.reg .pred p, q;\n"
        "setp.ne.b32 p, %1, 0;\n"
        "bar.red.or.pred q, %2, %3, p;\n"
        "selp.b32 %0, 1, 0, q;\n}"
        : "=r"(any)
        : "r"(int(vote)), "r"(number), "r"(threads)
        : "memory");
    return any != 0;
}

// ---- copies ----------------------------------------------------------------------------------------------

// Starts the copy of a box of a tensor to shared memory; its bytes arrive at `bar`. Elements outside the tensor become 0
// and count as bytes too. Coordinates begin with the inner dimension.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap* map, uint32_t bar, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
// Starts the copy of `bytes` contiguous bytes (a multiple of 16, both addresses too) to shared memory.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
// The same to the blocks of the cluster whose bits are set in `blocks`, at the same addresses and barriers of each.
__device__ __forceinline__ void tma_load_to(uint16_t blocks, uint32_t to, const CUtensorMap* map, uint32_t bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "h"(blocks) : "memory");
}
// Starts the copy of a box from shared memory to a tensor, without what lies outside of it, for which rows of the tensor
// have to be whole pieces of 16 bytes.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(map), "r"(from), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t from, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(from), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
// Closes the group of the thread's stores; waits until all but the last N groups have been read from shared memory, or
// (`stores_done`) written.
__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void stores_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void stores_done() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
// Makes ordinary writes to shared memory visible to later copies and products; a barrier has to follow.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// Loads or stores 16 or 8 bytes of shared memory. Loads stay in the order in which they are written, so that several are under
// way before the first is used.
__device__ __forceinline__ void load_shared(uint32_t (&v)[4], uint32_t from) {
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, const uint32_t (&v)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
}
__device__ __forceinline__ void load_shared(uint32_t (&v)[2], uint32_t from) {
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, const uint32_t (&v)[2]) {
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(to), "r"(v[0]), "r"(v[1]) : "memory");
}
// Stores 4 bytes to shared memory.
__device__ __forceinline__ void store_shared(uint32_t to, uint32_t v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(v) : "memory"); }

// The first multiple of 1024 bytes in the dynamic shared memory, of which a kernel asks for 1024 bytes more.
__device__ __forceinline__ unsigned char* panel_smem(unsigned char* smem) { return smem + ((1024 - (smem_address(smem) & 1023)) & 1023); }

// ---- clusters --------------------------------------------------------------------------------------------

// `__global__ void ETT_CLUSTER(n) __launch_bounds__(...) kernel(...)`: n neighbouring blocks form a cluster; the grid is a
// multiple of n. A block must not exit while another can still write to its shared memory or arrive at its barriers.
#ifdef ETT_SM90A
#define ETT_CLUSTER(n) __cluster_dims__(n, 1, 1)
#else
#define ETT_CLUSTER(n)
#endif
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// Synchronises all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at the barrier that block `rank` of the cluster has at this address. (With the scope .cluster the arrival
// would contain a memory barrier of the whole GPU; there are no writes of this thread that it has to order.)
__device__ __forceinline__ void bar_arrive_at(int rank, uint32_t bar) {
    asm volatile("{\n"
                 ".reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
                 "}" ::"r"(bar), "r"(rank) : "memory");
}

// ---- registers -------------------------------------------------------------------------------------------

// Every warp of a warpgroup gives registers back or takes more, down or up to N a thread (a multiple of 8). The kernel
// has __launch_bounds__(threads, 1).
template <int N> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- products --------------------------------------------------------------------------------------------

// An IEEE half, for products; other arithmetic is done in float.
struct f16 {
    uint16_t bits;
};
// Two floats as halves, rounded to nearest; `low` is in the lower half of the register. And back.
__device__ __forceinline__ uint32_t pack_f16x2(float low, float high) {
    uint32_t two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}
__device__ __forceinline__ void unpack_f16x2(float (&v)[2], uint32_t two) {
    asm("{.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;}" : "=f"(v[0]), "=f"(v[1]) : "r"(two));
}

// The lower half of an operand's descriptor is its address and (MN-major) the distance of panels; adding `step(bytes)`
// moves it. The upper half is the distance of groups of 8 rows, and the swizzle.
//
// K-major: rows are m or n, columns are summed over: 16 columns further is step(32), the next panel after four times
// that. MN-major: rows are summed over, a panel has 64 of m or n: 16 rows further is step(2048); `panel`: bytes from one
// panel of m or n to the next.
inline constexpr uint32_t kDescHigh = 1024 / 16 | 1u << 30;
// The same for groups of 8 rows at any distance: of pixels, a line of a tile that is wider than 8. A panel of such an operand
// may begin at any row, as the swizzle depends on addresses alone.
__device__ __forceinline__ constexpr uint32_t desc_high(uint32_t rows8) { return rows8 / 16 | 1u << 30; }
__device__ __forceinline__ constexpr uint32_t step(uint32_t bytes) { return bytes / 16; }
// In a cluster the upper bits of an address number the block; a descriptor has no place for them.
__device__ __forceinline__ uint32_t k_major(uint32_t address) { return (address & 0x3ffff) / 16 | 1u << 16; }
__device__ __forceinline__ uint32_t mn_major(uint32_t address, uint32_t panel) { return (address & 0x3ffff) / 16 | panel / 16 << 16; }
__device__ __forceinline__ uint64_t descriptor(uint32_t low, uint32_t high = kDescHigh) {
    uint64_t d;
    asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(low), "r"(high));
    return d;
}

// `products_begin` precedes the products that read registers written before (accumulators or fragments of a);
// `products_end` closes a group; `products_wait` waits for all but the last N groups.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving accumulators across this point.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The place of accumulator i of m64nN in its tile: d[4j + 2i + c] is (row(i), 8j + col(c)).
__device__ __forceinline__ int acc_row(int i) { return int(threadIdx.x) / 32 % 4 * 16 + int(threadIdx.x) % 32 / 4 + 8 * i; }
__device__ __forceinline__ int acc_col(int c) { return 2 * (int(threadIdx.x) % 4) + c; }

#define ETT_D0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define ETT_D32 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define ETT_D64 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define ETT_D96 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define ETT_D32_HALF "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define ETT_D64_HALF "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define ETT_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ETT_F16(d, i) ETT_F4(d, i), ETT_F4(d, i + 4), ETT_F4(d, i + 8), ETT_F4(d, i + 12)
#define ETT_F32(d, i) ETT_F16(d, i), ETT_F16(d, i + 16)
#define ETT_F64(d, i) ETT_F32(d, i), ETT_F32(d, i + 32)

// d += a b, or d = a b if not `add`: a 64 x 16, b 16 x N, d as N / 2 of D floats a thread, from number FIRST on. Both operands in
// shared memory, TA and TB: MN-major. T: bf16, or f16 for N = 64.
#define ETT_MMA_SS_OF(type, n, list, p, pa, pb, pta, ptb, ...)                                                                       \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " p ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" list "}, " pa ", " pb ", p, 1, 1, " pta ", " ptb ";}" \
                 : __VA_ARGS__ : "l"(a), "l"(b), "r"(int(add)), "n"(int(TA)), "n"(int(TB)))
#define ETT_MMA_SS(...) ETT_MMA_SS_OF("bf16", __VA_ARGS__)
template <int N, bool TA, bool TB, class T = bf16, int FIRST = 0, int D>
__device__ __forceinline__ void mma(float (&d)[D], uint32_t a_low, uint32_t b_low, bool add, uint32_t b_high = kDescHigh) {
    static_assert((N == 64 || N == 96 || N == 128 || N == 160 || N == 192 || N == 256) && D >= FIRST + N / 2);
    const uint64_t a = descriptor(a_low), b = descriptor(b_low, b_high);
    if constexpr (std::is_same_v<T, f16>) {
        static_assert(N == 64);
        ETT_MMA_SS_OF("f16", "64", ETT_D0, "%34", "%32", "%33", "%35", "%36", ETT_F32(d, FIRST));
        return;
    }
    if constexpr (N == 64) ETT_MMA_SS("64", ETT_D0, "%34", "%32", "%33", "%35", "%36", ETT_F32(d, FIRST));
    if constexpr (N == 96) ETT_MMA_SS("96", ETT_D0 "," ETT_D32_HALF, "%50", "%48", "%49", "%51", "%52", ETT_F32(d, FIRST), ETT_F16(d, FIRST + 32));
    if constexpr (N == 128) ETT_MMA_SS("128", ETT_D0 "," ETT_D32, "%66", "%64", "%65", "%67", "%68", ETT_F64(d, FIRST));
    if constexpr (N == 160)
        ETT_MMA_SS("160", ETT_D0 "," ETT_D32 "," ETT_D64_HALF, "%82", "%80", "%81", "%83", "%84", ETT_F64(d, FIRST), ETT_F16(d, FIRST + 64));
    if constexpr (N == 192) ETT_MMA_SS("192", ETT_D0 "," ETT_D32 "," ETT_D64, "%98", "%96", "%97", "%99", "%100", ETT_F64(d, FIRST), ETT_F32(d, FIRST + 64));
    if constexpr (N == 256)
        ETT_MMA_SS("256", ETT_D0 "," ETT_D32 "," ETT_D64 "," ETT_D96, "%130", "%128", "%129", "%131", "%132", ETT_F64(d, FIRST), ETT_F64(d, FIRST + 64));
}
// The same with a in registers: a[0] holds (r, c..c+1), a[1] (r+8, c..), a[2] (r, c+8..), a[3] (r+8, c+8..) for the r
// and c of acc_row(0) and acc_col(0): neighbouring accumulators, rounded in pairs, are the fragments of their columns.
#define ETT_MMA_RS_OF(type, n, list, p, pa, pb, ptb, ...)                                                                        \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " p ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" list "}, {" pa "}, " pb ", p, 1, 1, " ptb ";}"   \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(TB)))
#define ETT_MMA_RS(...) ETT_MMA_RS_OF("bf16", __VA_ARGS__)
template <int N, bool TB, class T = bf16> __device__ __forceinline__ void mma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b_low, bool add) {
    static_assert(N == 64 || N == 128 || N == 192 || N == 256);
    const uint64_t b = descriptor(b_low);
    if constexpr (std::is_same_v<T, f16>) {
        static_assert(N == 64);
        ETT_MMA_RS_OF("f16", "64", ETT_D0, "%37", "%32,%33,%34,%35", "%36", "%38", ETT_F32(d, 0));
        return;
    }
    if constexpr (N == 64) ETT_MMA_RS("64", ETT_D0, "%37", "%32,%33,%34,%35", "%36", "%38", ETT_F32(d, 0));
    if constexpr (N == 128) ETT_MMA_RS("128", ETT_D0 "," ETT_D32, "%69", "%64,%65,%66,%67", "%68", "%70", ETT_F64(d, 0));
    if constexpr (N == 192)
        ETT_MMA_RS("192", ETT_D0 "," ETT_D32 "," ETT_D64, "%101", "%96,%97,%98,%99", "%100", "%102", ETT_F64(d, 0), ETT_F32(d, 64));
    if constexpr (N == 256)
        ETT_MMA_RS("256", ETT_D0 "," ETT_D32 "," ETT_D64 "," ETT_D96, "%133", "%128,%129,%130,%131", "%132", "%134", ETT_F64(d, 0), ETT_F64(d, 64));
}
#undef ETT_MMA_SS
#undef ETT_MMA_SS_OF
#undef ETT_MMA_RS
#undef ETT_MMA_RS_OF
#undef ETT_D0
#undef ETT_D32
#undef ETT_D64
#undef ETT_D96
#undef ETT_D32_HALF
#undef ETT_D64_HALF
#undef ETT_F4
#undef ETT_F16
#undef ETT_F32
#undef ETT_F64

// Stores four 8x8 matrices of 16-bit elements, the fragments of an accumulator rounded in pairs; lane l gives the
// address of row l % 8 of matrix l / 8. `trans`: of their transposes.
__device__ __forceinline__ void stmatrix_x4(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- host ------------------------------------------------------------------------------------------------

// Whether the current device runs code for sm_90a, and this was compiled for it.
inline bool is_hopper() {
    constexpr int kArchs[] = {__CUDA_ARCH_LIST__};
    if (std::find(std::begin(kArchs), std::end(kArchs), 900) == std::end(kArchs)) return false;
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        (void)cudaGetLastError();
        return false;
    }
    return major == 9 && minor == 0;
}

// Whether a workspace query counts the kernels for Hopper: also without a device, since plans are then made for an H100.
inline bool plan_hopper() {
    int devices = 0;
    const bool none = cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0;
    if (none) (void)cudaGetLastError();
    return none || is_hopper();
}

// A tensor of up to 5 dimensions and the box of it that one copy moves; sizes begin with the inner dimension. `strides`:
// bytes between neighbours in dimension 1, 2, ..., multiples of 16, as is the address.
struct Box {
    int rank;
    uint64_t dims[5], strides[4];
    uint32_t box[5];
};

// Describes boxes of bf16 (or f32) for tma_load and tma_store. `swizzled`: as panels; the box is then at most 128 bytes
// wide.
inline int32_t make_map(const char* op, CUtensorMap* map, int32_t dtype, const void* p, const Box& b, bool swizzled) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {
        void* f = nullptr;
        cudaDriverEntryPointQueryResult found;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found) != cudaSuccess) (void)cudaGetLastError();
        return reinterpret_cast<Encode>(f);
    }();
    if (!encode) return ett_fail(ETT_CUDA_ERROR, 0, op, "launch", "a driver without cuTensorMapEncodeTiled", "a driver of CUDA 12 or newer");
    const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
    memset(map, 0, sizeof *map);
    const CUresult r = encode(map, dtype == ETT_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, cuuint32_t(b.rank),
                              const_cast<void*>(p), reinterpret_cast<const cuuint64_t*>(b.dims), reinterpret_cast<const cuuint64_t*>(b.strides),
                              b.box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return r == CUDA_SUCCESS ? ETT_OK : ett_fail(ETT_CUDA_ERROR, int32_t(r), op, "launch", "a tensor map that the driver refuses", "a valid tensor map");
}

// A matrix [rows, cols] of bf16 whose rows begin `ld` elements apart, copied as panels of `box_rows` rows.
inline int32_t make_panel_map(const char* op, CUtensorMap* map, const void* p, int64_t rows, int64_t cols, int64_t ld, uint32_t box_rows) {
    return make_map(op, map, ETT_BF16, p, {2, {uint64_t(cols), uint64_t(rows)}, {uint64_t(ld) * 2}, {uint32_t(kPanelCols), box_rows}}, true);
}
// The same as `panels` panels side by side per copy, at most 32 KB; cols is a multiple of 64. Coordinates: 0, row, panel.
inline int32_t make_panels_map(const char* op, CUtensorMap* map, const void* p, int64_t rows, int64_t cols, int64_t ld, uint32_t box_rows, uint32_t panels) {
    return make_map(op, map, ETT_BF16, p,
                    {3, {uint64_t(kPanelCols), uint64_t(rows), uint64_t(cols / kPanelCols)}, {uint64_t(ld) * 2, uint64_t(kPanelRowBytes)},
                     {uint32_t(kPanelCols), box_rows, panels}},
                    true);
}

}  // namespace hopper
}  // namespace ett
#endif  // ETT_SHIM
