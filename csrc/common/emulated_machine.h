// The emulated machine: a block's threads as fibers, how they take turns and wait for each other. emulator.h says what
// this amounts to.
#pragma once

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "the emulator jumps between stacks, which _FORTIFY_SOURCE takes for an attack: compile with -U_FORTIFY_SOURCE"
#endif

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace ssl_ib::emulator {

enum class Order { forward, reverse, random };
using Place = std::source_location;

constexpr unsigned kLanes = 32, kMaxThreads = 1024, kMaxWarps = kMaxThreads / kLanes;
constexpr size_t kMaxShared = 227 * 1024, kMaxAllocations = 32, kGuard = 1024, kStack = 256 * 1024;
// Memory that nobody has written: a NaN as bf16, as fp16 and, twice, as float; as an integer far out of any range.
constexpr uint16_t kUnset = 0xFFA5;

using Contributions = std::array<void*, kLanes>;

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, valid_bytes, group;
};

// A thread of a block: a fiber, which outlives the block and sleeps until the next.
struct Thread {
    jmp_buf context;
    void* stack;
    unsigned rank;
    uint3 index;
    Place place;                             // where it waits
    unsigned mask;                           // with which lanes, in a warp operation
    void* contribution;                      // what it brings to it
    void (*complete)(const Contributions&);  // what the operation does, once for all its lanes
    std::vector<Copy> copies;
    unsigned copy_group;

    explicit Thread(unsigned rank) : rank(rank) {
        stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) throw std::runtime_error("emulator: no memory for the stack of a thread");
    }
    ~Thread() { munmap(stack, kStack); }
    Thread(const Thread&) = delete;
    Thread& operator=(const Thread&) = delete;
};

// Lanes of a warp, as bits.
struct Warp {
    unsigned live, runnable, at_barrier, at_operation;
};

struct Allocation {
    const void* key;
    size_t begin, end;
};

struct Machine {
    std::mutex launching;  // launches of several CPU threads take turns
    Order order = Order::forward;
    uint64_t random = 1;

    std::vector<std::unique_ptr<Thread>> threads;
    jmp_buf scheduler;
    const std::function<void()>* kernel;
    Thread* current;
    std::string error;

    dim3 grid, block;
    uint3 block_index;
    unsigned num_warps, num_live, num_at_barrier, runnable_warps, last_warp;
    Warp warps[kMaxWarps];
    Place barrier_place;

    size_t shared_end;
    std::vector<Allocation> allocations;
    alignas(1024) unsigned char shared[kMaxShared + 2 * kGuard * kMaxAllocations];
};

inline Machine machine;

inline void set_order(Order order) {
    std::lock_guard lock(machine.launching);
    machine.order = order;
}

inline std::string describe(const Place& place) {
    const std::string path = place.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line());
}

inline bool same(const Place& a, const Place& b) {
    return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error("emulator: " + message); }

// ---- Taking turns ----

inline unsigned next_random(unsigned bound) {
    machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
    return static_cast<unsigned>((machine.random >> 33) % bound);
}

// The number of one of the set bits, by the order.
inline unsigned choose(unsigned bits) {
    if (machine.order == Order::forward) return std::countr_zero(bits);
    if (machine.order == Order::reverse) return 31 - std::countl_zero(bits);
    const unsigned turn = next_random(32);
    return (std::countr_zero(std::rotr(bits, turn)) + turn) % 32;
}

inline void make_runnable(unsigned w, unsigned lanes) {
    machine.warps[w].runnable |= lanes;
    if (machine.warps[w].runnable) machine.runnable_warps |= 1u << w;
}

// Makes a runnable thread the current one; null where there is none. Forward, the first warp goes as far as it can; in
// reverse each turn is another warp's, so that what warps do to each other between barriers shows.
inline Thread* next_thread() {
    machine.current = nullptr;
    if (machine.runnable_warps) {
        const unsigned below = machine.runnable_warps & ((1u << machine.last_warp) - 1);
        const unsigned w = choose(machine.order == Order::reverse && below ? below : machine.runnable_warps);
        const unsigned lane = choose(machine.warps[w].runnable);
        machine.last_warp = w;
        machine.warps[w].runnable &= ~(1u << lane);
        if (!machine.warps[w].runnable) machine.runnable_warps &= ~(1u << w);
        machine.current = machine.threads[w * kLanes + lane].get();
    }
    return machine.current;
}

// Lets others run; returns when it is this thread's turn again.
[[gnu::noinline]] inline void give_way(Thread& self) {
    Thread* const next = next_thread();
    if (next != &self && _setjmp(self.context) == 0) _longjmp(next ? next->context : machine.scheduler, 1);
}

// ---- Waiting for each other ----

inline void open_barrier_if_all_came() {
    if (machine.num_at_barrier == 0 || machine.num_at_barrier < machine.num_live) return;
    machine.num_at_barrier = 0;
    for (unsigned w = 0; w < machine.num_warps; ++w) make_runnable(w, std::exchange(machine.warps[w].at_barrier, 0));
}

inline void barrier(Place place) {
    Thread& self = *machine.current;
    if (machine.num_at_barrier == 0) machine.barrier_place = place;
    if (!same(machine.barrier_place, place)) {
        fail("threads of a block wait at " + describe(machine.barrier_place) + " and at " + describe(place));
    }
    self.place = place;
    machine.warps[self.rank / kLanes].at_barrier |= 1u << (self.rank % kLanes);
    ++machine.num_at_barrier;
    open_barrier_if_all_came();
    give_way(self);
}

inline void complete_if_all_came(unsigned w, unsigned mask) {
    Warp& warp = machine.warps[w];
    const unsigned expected = mask & warp.live;
    if (expected == 0 || (warp.at_operation & expected) != expected) return;
    Contributions contributions{};
    const Thread& first = *machine.threads[w * kLanes + std::countr_zero(expected)];
    for (unsigned rest = expected; rest; rest &= rest - 1) {
        const unsigned lane = std::countr_zero(rest);
        const Thread& thread = *machine.threads[w * kLanes + lane];
        if (thread.mask != mask) return;
        if (!same(thread.place, first.place)) {
            fail("lanes of a warp wait at " + describe(first.place) + " and at " + describe(thread.place));
        }
        contributions[lane] = thread.contribution;
    }
    first.complete(contributions);
    warp.at_operation &= ~expected;
    make_runnable(w, expected);
}

// Every lane of `mask` brings a contribution; the last to come runs `complete` on all of them (null for lanes that
// take no part), which may change them; then each lane goes on.
template <typename T>
void warp_operation(unsigned mask, T& contribution, void (*complete)(const Contributions&), Place place) {
    Thread& self = *machine.current;
    const unsigned w = self.rank / kLanes, lane = self.rank % kLanes;
    if (!(mask >> lane & 1)) fail("a lane that its mask leaves out, at " + describe(place));
    self.place = place;
    self.mask = mask;
    self.contribution = &contribution;
    self.complete = complete;
    machine.warps[w].at_operation |= 1u << lane;
    complete_if_all_came(w, mask);
    give_way(self);
}

// ---- A thread's life ----

// The kernel has returned: others may have been waiting for this thread alone.
inline void retire(Thread& self) {
    if (!self.copies.empty()) fail("a thread returns while asynchronous copies of its are under way");
    const unsigned w = self.rank / kLanes;
    machine.warps[w].live &= ~(1u << (self.rank % kLanes));
    --machine.num_live;
    open_barrier_if_all_came();
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (!(machine.warps[w].at_operation >> lane & 1)) continue;
        complete_if_all_came(w, machine.threads[w * kLanes + lane]->mask);
    }
}

inline void live() {
    Thread& self = *machine.current;
    machine.runnable_warps = 0;
    for (;;) {
        give_way(self);
        try {
            (*machine.kernel)();
            retire(self);
        } catch (const std::exception& error) {
            const uint3 b = machine.block_index, t = self.index;
            const auto coordinates = [](uint3 i) {
                return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
            };
            machine.error = error.what() + (" [block " + coordinates(b) + ", thread " + coordinates(t) + "]");
            machine.runnable_warps = 0;
        }
    }
}

inline void add_thread() {
    Thread& thread = *machine.threads.emplace_back(std::make_unique<Thread>(machine.threads.size()));
    ucontext_t fiber;
    getcontext(&fiber);
    fiber.uc_stack.ss_sp = thread.stack;
    fiber.uc_stack.ss_size = kStack;
    fiber.uc_link = nullptr;
    makecontext(&fiber, live, 0);
    machine.current = &thread;
    if (_setjmp(machine.scheduler) == 0) setcontext(&fiber);
}

[[gnu::noinline]] inline void run_threads() {
    Thread* const first = next_thread();
    if (_setjmp(machine.scheduler) == 0) _longjmp(first->context, 1);
}

}  // namespace ssl_ib::emulator
