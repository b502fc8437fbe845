// Sums over the batch without atomics: each slice of the batch leaves its own sums, which are added in a fixed order.
#pragma once

#include <algorithm>

#include "../common/platform.h"

namespace ssl_ib {

// Into how many slices a sum over the batch is cut: enough for the threads to fill a large GPU, few enough for the
// slices' sums to stay within 32 MB (one slice may exceed it: it needs no copy, being the result).
inline int count_slices(int batch, int64_t threads_per_slice, int64_t floats_per_slice) {
    const int64_t enough = ceil_div<int64_t>(1 << 17, std::max<int64_t>(threads_per_slice, 1));
    const int64_t fitting = (int64_t{8} << 20) / std::max<int64_t>(floats_per_slice, 1);
    return static_cast<int>(std::clamp<int64_t>(std::min(enough, fitting), 1, std::max(batch, 1)));
}

// slices [S, count] -> out [count]. A warp reads 32 neighbouring columns; 32 warps share the slices.
static __global__ void __launch_bounds__(1024)
    sum_slices(const float* __restrict__ slices, float* __restrict__ out, int num_slices, int64_t count) {
    SSL_IB_SHARED(float, partial, [32][33]);
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < count) {
#pragma unroll 4
        for (int s = threadIdx.y; s < num_slices; s += 32) sum += slices[s * count + column];
    }
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = partial[threadIdx.x][threadIdx.y];
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (threadIdx.x == 0 && static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y < count) {
        out[static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y] = sum;
    }
}

inline void launch_sum_slices(const float* slices, float* out, int num_slices, int64_t count, Stream stream) {
    launch(sum_slices, static_cast<unsigned>(ceil_div<int64_t>(count, 32)), dim3(32, 32), 0, stream, slices, out,
           num_slices, count);
}

}  // namespace ssl_ib
