// Rows of numbers in packs of one memory access, and of how many threads a row is the work.
#pragma once

#include "platform.h"

namespace ssl_ib {

// n numbers that one instruction loads or stores.
template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
    T values[n];
};

// The widest access there is: 16 bytes.
template <typename T>
constexpr int kWidest = 16 / sizeof(T);

template <int n, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&to)[n]) {
    // Parameters in float32 beside a stream of half the size take two accesses.
    constexpr int width = n < kWidest<T> ? n : kWidest<T>;
#pragma unroll
    for (int i = 0; i < n; i += width) {
        const auto pack = load<Pack<T, width>>(from + i);
#pragma unroll
        for (int j = 0; j < width; ++j) to[i + j] = to_float(pack.values[j]);
    }
}

template <int n, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&from)[n]) {
    constexpr int width = n < kWidest<T> ? n : kWidest<T>;
#pragma unroll
    for (int i = 0; i < n; i += width) {
        Pack<T, width> pack;
#pragma unroll
        for (int j = 0; j < width; ++j) pack.values[j] = from_float<T>(from[i + j]);
        store(to + i, pack);
    }
}

// Whether rows of `row_bytes` bytes at these addresses can be read 16 bytes at a time.
template <typename... Pointers>
__host__ __device__ bool all_aligned(int64_t row_bytes, Pointers... pointers) {
    return row_bytes % 16 == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Neighbouring threads that share a row of `units` accesses: a power of two up to a warp, as its logarithm, so that
// short rows leave no lanes idle.
inline int lanes_log2(int64_t units) {
    int log2 = 0;
    while (log2 < 5 && (int64_t{1} << log2) < units) ++log2;
    return log2;
}

}  // namespace ssl_ib
