// shim.cpp: fibers, barriers and warp operations of the shim.
#include "cuda_runtime.h"

#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <mutex>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define ETT_SWITCH_START(save, bottom, size) __sanitizer_start_switch_fiber(save, bottom, size)
#define ETT_SWITCH_FINISH(save, bottom, size) __sanitizer_finish_switch_fiber(save, bottom, size)
#else
#define ETT_SWITCH_START(save, bottom, size) (void)0
#define ETT_SWITCH_FINISH(save, bottom, size) (void)0
#endif

namespace shim {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t kStack = 256 * 1024;

struct Copy {
    char* dst;
    const void* src;
    int bytes, valid;
};

struct Fiber {
    ucontext_t context;
    void* fake_stack = nullptr;
    char* stack = nullptr;
    uint3 index{};
    int number = 0;
    bool done = true;
    std::vector<std::vector<Copy>> groups;  // of cp.async; the last one is not committed yet
};

struct Warp {
    const char* what = nullptr;
    int arrived = 0;
    unsigned generation = 0;
    Slot slots[2][32];
};

std::mutex one_launch;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_size;
Fiber* current;
int threads, alive, arrived;
unsigned generation;
bool progress;
const std::function<void()>* body;
const char* op_name;
unsigned char* smem_block;

[[noreturn]] void die(const char* why, const char* what) {
    fprintf(stderr, "shim: %s: %s (%s), block %u,%u,%u thread %u,%u,%u\n", op_name, why, what, block_index.x, block_index.y, block_index.z,
            thread_index.x, thread_index.y, thread_index.z);
    abort();
}

void to_scheduler(bool last) {
    Fiber* f = current;
    ETT_SWITCH_START(last ? nullptr : &f->fake_stack, scheduler_stack, scheduler_stack_size);
    swapcontext(&f->context, &scheduler);
    ETT_SWITCH_FINISH(f->fake_stack, nullptr, nullptr);
    (void)last;
}

void fiber_main() {
    ETT_SWITCH_FINISH(nullptr, &scheduler_stack, &scheduler_stack_size);
    (*body)();
    if (!current->groups.empty())
        for (auto& g : current->groups)
            if (!g.empty()) die("a thread returned without waiting for its copies", "cp.async");
    current->done = true;
    alive -= 1;
    progress = true;
    to_scheduler(true);
}

void resume(Fiber& f) {
    current = &f;
    thread_index = f.index;
    ETT_SWITCH_START(&scheduler_fake_stack, f.stack, kStack);
    swapcontext(&scheduler, &f.context);
    ETT_SWITCH_FINISH(scheduler_fake_stack, nullptr, nullptr);
}

void start(Fiber& f, int number) {
    if (!f.stack) {
        void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) die("no memory for a stack", "mmap");
        f.stack = static_cast<char*>(p);
    }
    f.number = number;
    const unsigned n = unsigned(number);
    f.index = {n % block_size.x, n / block_size.x % block_size.y, n / (block_size.x * block_size.y)};
    f.done = false;
    f.groups.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
}

void run_block(bool reverse) {
    arrived = 0;
    alive = threads;
    for (auto& w : warps) {
        w.arrived = 0;
        w.what = nullptr;
    }
    for (int i = 0; i < threads; ++i) start(fibers[i], i);
    while (alive > 0) {
        progress = false;
        for (int i = 0; i < threads; ++i) {
            Fiber& f = fibers[reverse ? threads - 1 - i : i];
            if (!f.done) resume(f);
        }
        if (!progress) die("deadlock: all threads wait", arrived ? "__syncthreads" : "warp operation");
    }
}

void perform(const std::vector<Copy>& group) {
    for (const Copy& c : group) {
        memcpy(c.dst, c.src, size_t(c.valid));
        memset(c.dst + c.valid, 0, size_t(c.bytes - c.valid));
    }
}

}  // namespace

int most_smem() {
    const char* kib = getenv("ETT_SHIM_SMEM");
    return (kib ? atoi(kib) : 227) * 1024;
}

void launch(const char* op, dim3 grid, dim3 block, size_t smem, const std::function<void()>& thread) {
    std::lock_guard<std::mutex> lock(one_launch);
    op_name = op;
    threads = int(block.x * block.y * block.z);
    if (threads % 32 != 0 || threads > 1024) die("the block is not 32 to 1024 threads in whole warps", "launch");
    if (grid.y > 65535 || grid.z > 65535 || grid.x == 0 || grid.y == 0 || grid.z == 0) die("invalid grid dimensions", "launch");
    if (smem > size_t(most_smem())) die("more shared memory than a block of this GPU may have", "launch");
    if (fibers.size() < size_t(threads)) fibers.resize(size_t(threads));
    warps.resize(size_t(threads / 32));
    block_size = block;
    grid_size = grid;
    body = &thread;
    const char* order = getenv("ETT_SHIM_ORDER");
    const bool reverse = order && strcmp(order, "reverse") == 0;
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned b = 0; b < blocks; ++b) {
        const unsigned n = reverse ? blocks - 1 - b : b;
        block_index = {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
        smem_block = smem ? static_cast<unsigned char*>(aligned_alloc(128, (smem + 127) / 128 * 128)) : nullptr;
        if (smem) memset(smem_block, 0xff, smem);
        run_block(reverse);
        free(smem_block);
    }
}

unsigned char* dynamic_smem() { return smem_block; }
int lane() { return current->number % 32; }

void block_barrier() {
    if (alive != threads) die("a thread waits at a barrier after another thread has returned", "__syncthreads");
    const unsigned mine = generation;
    progress = true;
    if (++arrived == threads) {
        arrived = 0;
        generation += 1;
        return;
    }
    while (generation == mine) to_scheduler(false);
}

const Slot* exchange(const char* what, unsigned mask, const void* in, size_t bytes) {
    if (mask != 0xffffffffu) die("the mask does not contain all lanes", what);
    Warp& w = warps[size_t(current->number / 32)];
    const unsigned mine = w.generation;
    Slot* slots = w.slots[mine & 1];
    if (bytes) memcpy(slots[lane()].bytes, in, bytes);
    if (w.arrived == 0) w.what = what;
    if (strcmp(w.what, what) != 0) die("lanes of one warp call different warp operations", what);
    progress = true;
    if (++w.arrived == 32) {
        w.arrived = 0;
        w.generation += 1;
        return slots;
    }
    while (w.generation == mine) to_scheduler(false);
    return slots;
}

void async_copy(char* dst, const void* src, int bytes, int valid) {
    if (reinterpret_cast<uintptr_t>(dst) % 16 || (valid && reinterpret_cast<uintptr_t>(src) % 16)) die("a misaligned copy", "cp.async");
    if (current->groups.empty()) current->groups.emplace_back();
    memset(dst, 0xff, size_t(bytes));
    current->groups.back().push_back({dst, src, bytes, valid});
}

void async_commit() {
    if (current->groups.empty()) current->groups.emplace_back();
    current->groups.emplace_back();
}

void async_wait(int pending) {
    auto& g = current->groups;
    // The last group is not committed and is never waited for.
    while (int(g.size()) - 1 > pending) {
        perform(g.front());
        g.erase(g.begin());
    }
}

void ldmatrix(uint32_t (&d)[4], const char* row, bool transposed) {
    if (reinterpret_cast<uintptr_t>(row) % 16) die("a misaligned row", "ldmatrix");
    unsigned char mine[16];
    memcpy(mine, row, 16);
    const Slot* all = exchange(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, mine, 16);
    const int g = lane() / 4, t = 2 * (lane() % 4);
    for (int m = 0; m < 4; ++m) {
        auto at = [&](int r, int c) {
            uint16_t v;
            memcpy(&v, all[m * 8 + r].bytes + 2 * c, 2);
            return uint32_t(v);
        };
        d[m] = transposed ? at(t, g) | at(t + 1, g) << 16 : at(g, t) | at(g, t + 1) << 16;
    }
}

void mma_bf16_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const Slot* all = exchange("mma", 0xffffffffu, mine, sizeof mine);
    auto half = [&](int from, int reg, int upper) {
        uint32_t v;
        memcpy(&v, all[from].bytes + 4 * reg, 4);
        v = upper ? v & 0xffff0000u : v << 16;
        float f;
        memcpy(&f, &v, 4);
        return f;
    };
    // Element (r, k) of a: register (r / 8) + 2 * (k / 8) of lane 4 * (r % 8) + (k % 8) / 2, half k % 2.
    auto at_a = [&](int r, int k) { return half(4 * (r % 8) + k % 8 / 2, r / 8 + 2 * (k / 8), k % 2); };
    auto at_b = [&](int k, int n) { return half(4 * n + k % 8 / 2, 4 + k / 8, k % 2); };
    const int g = lane() / 4, t = 2 * (lane() % 4);
    for (int i = 0; i < 4; ++i) {
        const int r = g + 8 * (i / 2), n = t + i % 2;
        float s = c[i];
        for (int k = 0; k < 16; ++k) s += at_a(r, k) * at_b(k, n);
        c[i] = s;
    }
}

}  // namespace shim
