// CUDA's execution model on one CPU thread, for tests: plain C++20 in place of nvcc.
//
// The threads of a block are fibers. They run one at a time and change places only where they wait for each other: at
// __syncthreads and at the operations of a warp. Blocks run one after another. `set_order` chooses which runnable
// thread (and which block) comes next, so that a barrier that is missing shows as a wrong result in one order or
// another.
//
// What it reports, as a std::runtime_error from `launch`:
//   - barriers and warp operations that some of their threads never reach, or that they reach in different places of
//     the source (threads that have returned are not waited for, as on a GPU);
//   - writes up to 1 KB past the end of an allocation of shared memory;
//   - asynchronous copies that nobody waits for (they may land where other data lies by then);
//   - vectors at addresses that are not multiples of their size (through `load` and `store`);
//   - launches beyond the hardware's limits of grid, block and shared memory.
// What it shows as wrong numbers: shared memory is NaN before each block and past its end; asynchronous copies happen
// as late as they may (in reverse order: at once).
// What it cannot show: races that do not cross a switch (two threads that write one element between the same
// barriers), races between blocks, missing fences; reads and writes outside global memory; bank conflicts, registers,
// speed; the rounding of approximate functions (__expf is expf here). There is no TMA, no mbarrier, no atomics on
// floats.
#pragma once

#include "emulated_machine.h"
#include "emulated_memory.h"

namespace ssl_ib::emulator {

inline std::string waiting_threads() {
    std::map<std::string, unsigned> places;
    for (unsigned w = 0; w < machine.num_warps; ++w) {
        const Warp& warp = machine.warps[w];
        for (unsigned rest = warp.at_barrier | warp.at_operation; rest; rest &= rest - 1) {
            ++places[describe(machine.threads[w * kLanes + std::countr_zero(rest)]->place)];
        }
    }
    std::string answer;
    for (const auto& [place, count] : places) {
        answer += (answer.empty() ? "" : ", ") + std::to_string(count) + " at " + place;
    }
    return answer;
}

inline void run_block(size_t dynamic_bytes) {
    const dim3 block = machine.block;
    const unsigned count = block.x * block.y * block.z;
    machine.shared_end = 0;
    machine.allocations.clear();
    allocate_shared(nullptr, dynamic_bytes);
    machine.num_warps = (count + kLanes - 1) / kLanes;
    machine.num_live = count;
    machine.num_at_barrier = machine.runnable_warps = machine.last_warp = 0;
    for (unsigned w = 0; w < machine.num_warps; ++w) {
        const unsigned left = count - w * kLanes, lanes = left >= kLanes ? ~0u : (1u << left) - 1;
        machine.warps[w] = {lanes, 0, 0, 0};
        make_runnable(w, lanes);
    }
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = *machine.threads[i];
        thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
        thread.copies.clear();
        thread.copy_group = 0;
    }
    run_threads();
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
    if (machine.num_live) fail("threads wait for others that never come: " + waiting_threads());
    check_guards();
}

// Runs `kernel` in every thread of every block.
inline void run(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& kernel) {
    std::lock_guard lock(machine.launching);
    const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
    if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7FFFFFFF ||
        grid.y > 0xFFFF || grid.z > 0xFFFF) {
        fail("a launch that no GPU takes: grid or block is empty or too large");
    }
    while (machine.threads.size() < threads) add_thread();
    machine.grid = grid;
    machine.block = block;
    machine.kernel = &kernel;
    machine.error.clear();
    uint64_t stride = machine.order == Order::random ? 1 + next_random(1u << 30) : 1;
    while (std::gcd(stride, blocks) != 1) ++stride;
    try {
        for (uint64_t i = 0; i < blocks; ++i) {
            const uint64_t b = machine.order == Order::reverse ? blocks - 1 - i : i * stride % blocks;
            machine.block_index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
            run_block(dynamic_bytes);
        }
    } catch (...) {
        machine.threads.clear();  // their fibers are in the middle of the kernel
        throw;
    }
}

}  // namespace ssl_ib::emulator
