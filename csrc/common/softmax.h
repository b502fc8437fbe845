// The arithmetic of a softmax that is seen piece by piece, what is left out of it, and how its work is cut up.
#pragma once

#include "platform.h"

namespace ssl_ib {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---- Arithmetic ----

__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// What to subtract from logits whose maximum is `max`: minus infinity less itself would be NaN.
__device__ __forceinline__ float pivot(float max) { return max == -INFINITY ? 0.0f : max; }

// A row's logits so far, in units of log 2: their maximum, and the sum of 2^(x - max).
struct Online {
    float max = -INFINITY, sum = 0.0f;

    // Makes room for logits up to `top`; returns the factor for whatever else was summed against the old maximum.
    __device__ __forceinline__ float raise(float top) {
        const float old = max;
        max = fmaxf(old, top);
        const float factor = power_of_two(old - pivot(max));
        sum *= factor;
        return factor;
    }

    // The natural logarithm of the sum of exponentials; minus infinity of nothing.
    __device__ __forceinline__ float log_sum() const {
        return sum == 0.0f ? -INFINITY : (max + log2f(sum)) * kLn2;
    }
};

// The share that a part of a row's columns has in the whole: both logsumexps may be minus infinity.
__device__ __forceinline__ float share(float lse_of_part, float lse) { return __expf(lse_of_part - pivot(lse)); }

// A column's probability, exp(logit - lse). No logit lies above its own logsumexp: one that does (by more than
// rounding) belongs to a row with nothing left, or lies past the end of a ragged tile, and has none. NaN stays NaN.
__device__ __forceinline__ float probability(float logit_less_lse) {
    return logit_less_lse > 1.0f ? 0.0f : __expf(logit_less_lse);
}

// ---- What is left out ----

// Stand for groups that are not given: no row is in the group of a column.
constexpr int kNoRowGroup = 1, kNoColumnGroup = 0;

__device__ __forceinline__ bool left_out(int column, int self, int row_group, int column_group) {
    return column == self || row_group == column_group;
}

// ---- How the work is cut ----

struct Span {
    int begin, end;
};

// The tiles of one of `splits` parts: contiguous, together all of them, none longer than another by more than one.
__host__ __device__ inline Span part_of(int tiles, int split, int splits) {
    return {static_cast<int>(static_cast<int64_t>(tiles) * split / splits),
            static_cast<int>(static_cast<int64_t>(tiles) * (split + 1) / splits)};
}

// The order in which a block goes through the pieces of the embedding: its own is the last.
__host__ __device__ inline int piece_at(int step, int own, int pieces) {
    const int piece = own + 1 + step;
    return piece < pieces ? piece : piece - pieces;
}

// In how many parts to cut a loop over `tiles` so that `blocks` times as many blocks come to fill `slots`.
__host__ __device__ inline int splits_for(int64_t blocks, int64_t tiles, int slots) {
    return static_cast<int>(max(int64_t{1}, min(tiles, slots / blocks)));
}

}  // namespace ssl_ib
