// Small kernels, right and wrong, that show what the emulator does with them. Usage: program NAME ORDER.
//
// Prints the kernel's numbers, or the error that the launch threw.

#include <cstdio>
#include <map>

#include "platform.h"

namespace ssl_ib {
namespace {

constexpr int kCount = 64;
float numbers[kCount];

// Each thread reads what its mirror image wrote.
__global__ void mirror(float* out, bool with_barrier) {
    SSL_IB_SHARED(float, tile, [kCount]);
    tile[threadIdx.x] = threadIdx.x;
    if (with_barrier) __syncthreads();
    out[threadIdx.x] = tile[kCount - 1 - threadIdx.x];
}

// A running sum through shared memory; without the second barrier a fast thread overwrites what a slow one still reads.
__global__ void rotate(float* out, bool with_barrier) {
    SSL_IB_SHARED(float, tile, [kCount]);
    float sum = 0.0f;
    for (int round = 0; round < 4; ++round) {
        tile[threadIdx.x] = threadIdx.x + 100 * round;
        __syncthreads();
        sum += tile[(threadIdx.x + 1) % kCount] + tile[(threadIdx.x + kCount - 1) % kCount];
        if (with_barrier) __syncthreads();
    }
    out[threadIdx.x] = sum;
}

// Lanes pass numbers through shared memory; warps are no longer in step since Volta.
__global__ void pass_along(float* out, bool with_barrier) {
    SSL_IB_SHARED(float, tile, [kCount]);
    tile[threadIdx.x] = threadIdx.x;
    if (with_barrier) __ballot_sync(~0u, true);
    out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

// Warps take the same place for their own; each waits for itself alone.
__global__ void step_on_toes(float* out, bool apart) {
    SSL_IB_SHARED(float, tile, [kCount]);
    float* const mine = tile + (apart ? threadIdx.x / 32 * 32 : 0);
    mine[threadIdx.x % 32] = threadIdx.x;
    __ballot_sync(~0u, true);
    out[threadIdx.x] = mine[31 - threadIdx.x % 32];
}

__global__ void shuffles(float* out) {
    const int lane = threadIdx.x % 32;
    const int x = __shfl_xor_sync(~0u, lane, 5);
    const unsigned odd = __ballot_sync(~0u, lane % 2);
    // Two halves of a warp, each on its own.
    const unsigned half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
    const int neighbour = __shfl_xor_sync(half, lane, 1);
    const unsigned first = __ballot_sync(half, lane % 16 == 0);
    const bool right = x == (lane ^ 5) && odd == 0xAAAAAAAAu && neighbour == (lane ^ 1) && __ffs(first) == lane / 16 * 16 + 1;
    out[threadIdx.x] = right;
}

__global__ void shuffle_from_a_lane_that_left(float* out) {
    if (threadIdx.x == 1) return;
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}

__global__ void leave_early(float* out) {
    if (threadIdx.x % 2) return;
    __syncthreads();
    __ballot_sync(~0u, true);
    out[threadIdx.x] = 1.0f;
}

__global__ void wait_in_two_places(float* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}

__global__ void wait_for_ever(float* out) {
    if (threadIdx.x == 0) {
        __syncthreads();
    } else {
        __ballot_sync(~0u, true);
    }
    out[threadIdx.x] = 1.0f;
}

__global__ void shuffle_in_two_places(float* out) {
    if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
    } else {
        out[threadIdx.x] = __shfl_xor_sync(~0u, 2.0f, 1);
    }
}

__global__ void outside_the_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1.0f, 1); }

__global__ void read_unset(float* out) {
    SSL_IB_SHARED(bf16, of_block, );
    SSL_IB_DYNAMIC_SHARED(float, tile);
    out[threadIdx.x] = tile[threadIdx.x] != tile[threadIdx.x] && to_float(of_block) != to_float(of_block);
}

__global__ void overrun(float* out, int count) {
    SSL_IB_DYNAMIC_SHARED(float, tile);
    tile[threadIdx.x] = 1.0f;
    if (threadIdx.x == 0) tile[count] = 2.0f;
    out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void unaligned(float* out) { out[threadIdx.x] = load<float4>(out + threadIdx.x).x; }

// Four groups of copies, of which all but `pending` have landed when they are read.
__global__ void copies(float* out, const float* in, int pending) {
    SSL_IB_SHARED(float, tile, [kCount][4]);
    for (int group = 0; group < 4; ++group) {
        emulator::copy_async(&tile[threadIdx.x][group], in + threadIdx.x, 4, group == 3 ? 0 : 4);
        emulator::commit_copies();
    }
    emulator::wait_for_copies(pending);
    int landed = 0;
    for (int group = 0; group < 4; ++group) landed += tile[threadIdx.x][group] == (group == 3 ? 0.0f : in[threadIdx.x]);
    out[threadIdx.x] = landed;
    emulator::wait_for_copies(0);
}

__global__ void copy_and_leave(const float* in) {
    SSL_IB_SHARED(float, tile, [kCount]);
    emulator::copy_async(tile + threadIdx.x, in + threadIdx.x, 4, 4);
    emulator::commit_copies();
}

__global__ void coordinates(float* out) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int at = block * blockDim.x * blockDim.y * blockDim.z + thread;
    out[at] = at;
}

__global__ void order_of_blocks(float* out, int* next) {
    out[blockIdx.x] = *next;
    ++*next;
}

void run(const std::string& name) {
    static float in[kCount];
    for (int i = 0; i < kCount; ++i) in[i] = 1.0f + i;
    int next = 0;
    float* const out = numbers;
    const std::map<std::string, std::function<void()>> programs{
        {"mirror", [&] { launch(mirror, 1, kCount, 0, nullptr, out, true); }},
        {"mirror without barrier", [&] { launch(mirror, 1, kCount, 0, nullptr, out, false); }},
        {"rotate", [&] { launch(rotate, 1, kCount, 0, nullptr, out, true); }},
        {"rotate without barrier", [&] { launch(rotate, 1, kCount, 0, nullptr, out, false); }},
        {"pass_along", [&] { launch(pass_along, 1, kCount, 0, nullptr, out, true); }},
        {"pass_along without barrier", [&] { launch(pass_along, 1, kCount, 0, nullptr, out, false); }},
        {"step_on_toes", [&] { launch(step_on_toes, 1, kCount, 0, nullptr, out, true); }},
        {"step_on_toes in one place", [&] { launch(step_on_toes, 1, kCount, 0, nullptr, out, false); }},
        {"shuffles", [&] { launch(shuffles, 1, kCount, 0, nullptr, out); }},
        {"shuffle_from_a_lane_that_left", [&] { launch(shuffle_from_a_lane_that_left, 1, 32, 0, nullptr, out); }},
        {"leave_early", [&] { launch(leave_early, 1, kCount, 0, nullptr, out); }},
        {"wait_in_two_places", [&] { launch(wait_in_two_places, 1, kCount, 0, nullptr, out); }},
        {"wait_for_ever", [&] { launch(wait_for_ever, 1, kCount, 0, nullptr, out); }},
        {"shuffle_in_two_places", [&] { launch(shuffle_in_two_places, 1, kCount, 0, nullptr, out); }},
        {"outside_the_mask", [&] { launch(outside_the_mask, 1, kCount, 0, nullptr, out); }},
        {"read_unset", [&] { launch(read_unset, 1, kCount, 4 * kCount, nullptr, out); }},
        {"overrun", [&] { launch(overrun, 1, kCount, 4 * kCount, nullptr, out, kCount + 2); }},
        {"no overrun", [&] { launch(overrun, 1, kCount, 4 * kCount, nullptr, out, kCount - 1); }},
        {"unaligned", [&] { launch(unaligned, 1, 2, 0, nullptr, out); }},
        {"copies, 0 pending", [&] { launch(copies, 1, kCount, 0, nullptr, out, in, 0); }},
        {"copies, 3 pending", [&] { launch(copies, 1, kCount, 0, nullptr, out, in, 3); }},
        {"copy_and_leave", [&] { launch(copy_and_leave, 1, kCount, 0, nullptr, in); }},
        {"coordinates", [&] { launch(coordinates, dim3(2, 2, 2), dim3(2, 2, 2), 0, nullptr, out); }},
        {"order_of_blocks", [&] { launch(order_of_blocks, kCount, 1, 0, nullptr, out, &next); }},
        {"too many threads", [&] { launch(mirror, 1, 1056, 0, nullptr, out, true); }},
        {"no blocks", [&] { launch(mirror, 0, kCount, 0, nullptr, out, true); }},
        {"too much shared memory", [&] { launch(overrun, 1, kCount, 228 * 1024, nullptr, out, 0); }},
    };
    programs.at(name)();
}

}  // namespace
}  // namespace ssl_ib

int main(int, char** arguments) {
    using namespace ssl_ib;
    const std::map<std::string, emulator::Order> orders{{"forward", emulator::Order::forward},
                                                        {"reverse", emulator::Order::reverse},
                                                        {"random", emulator::Order::random}};
    emulator::set_order(orders.at(arguments[2]));
    try {
        run(arguments[1]);
        for (const float number : numbers) std::printf("%g ", number);
    } catch (const std::runtime_error& error) {
        std::printf("%s", error.what());
        // A launch that failed leaves nothing behind.
        run("shuffles");
        for (const float number : numbers) {
            if (number != 1.0f) std::printf(", and then a launch that had been right went wrong");
        }
    }
}
