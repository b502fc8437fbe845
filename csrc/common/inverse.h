// From tokens back to the entries of `keep` that name them.
#pragma once

#include <climits>

#include "platform.h"

namespace ssl_ib {

// The token that entry k of image b names, or -1 where it lies outside [0, num_tokens).
__device__ __forceinline__ int kept_token(const Keep& keep, int64_t b, int k, int num_tokens) {
    const int64_t i = b * keep.kept + k;
    const int64_t token =
        keep.is_int64 ? static_cast<const int64_t*>(keep.data)[i] : static_cast<const int*>(keep.data)[i];
    return token >= 0 && token < num_tokens ? static_cast<int>(token) : -1;
}

// For each of the `count` tokens from `begin`, the first and the last k that names it: INT_MAX and -1 where none does.
// A token named twice has first < last, and those between are found by reading `keep` again. All threads of the block
// take part; first and last (either may be null) are complete after the next barrier. Integer atomics give the same
// result in any order.
__device__ inline void invert(const Keep& keep, int64_t b, int num_tokens, int begin, int count, int* first,
                              int* last) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        if (first) first[i] = INT_MAX;
        if (last) last[i] = -1;
    }
    __syncthreads();
    for (int k = threadIdx.x; k < keep.kept; k += blockDim.x) {
        const int i = kept_token(keep, b, k, num_tokens) - begin;
        if (i < 0 || i >= count) continue;
        if (first) atomicMin(&first[i], k);
        if (last) atomicMax(&last[i], k);
    }
}

}  // namespace ssl_ib
