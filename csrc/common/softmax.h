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

// Where lengths bound the logits, in powers of two, by this, no maximum need be subtracted: sums of 2^40 weights, and
// weights that are small beside them, are inside float32. Unit vectors stay within it where 2 / temperature < 87.
constexpr float kSafe = 64.0f;

// Whether the greatest squared lengths of owned and streamed rows, times the logits' scale in powers of two, do.
__host__ __device__ inline bool is_bounded(float owned, float streamed, float scale) {
    return sqrtf(owned) * sqrtf(streamed) * scale <= kSafe;
}

// The share that a part of a row's columns has in the whole: both logsumexps may be minus infinity.
__device__ __forceinline__ float share(float lse_of_part, float lse) { return __expf(lse_of_part - pivot(lse)); }

// A column's probability, exp(logit - lse). No logit lies above its own logsumexp: one that does (by more than
// rounding) belongs to a row with nothing left, or lies past the end of a ragged tile, and has none. NaN stays NaN.
__device__ __forceinline__ float probability(float logit_less_lse) {
    return logit_less_lse > 1.0f ? 0.0f : __expf(logit_less_lse);
}

// ---- What is left out ----

// A label of 64 bits. Where none are given rows have kNoRowLabel and columns zeros, so that no pair has one label.
struct Label {
    int low, high;
    __device__ __forceinline__ bool operator==(const Label& other) const {
        return low == other.low && high == other.high;
    }
};
constexpr int kNoRowLabel = 1;

__device__ __forceinline__ Label label_at(const Labels& labels, int i, int count) {
    return labels.low && i < count ? Label{labels.low[i], labels.high[i]} : Label{kNoRowLabel, 0};
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

// In how many parts, up to `most`, to cut a loop over `tiles` that `blocks` blocks go through, `slots` of them at a time:
// the fewest whose time is within a tenth of the best. Time is counted in tiles: waves of blocks times the tiles of each
// and two more for its beginning and end.
__host__ __device__ inline int splits_for(int64_t blocks, int64_t tiles, int64_t slots, int64_t most) {
    const auto time = [&](int64_t splits) {
        return (blocks * splits + slots - 1) / slots * ((tiles + splits - 1) / splits + 2);
    };
    const int64_t last = max(int64_t{1}, min(most, min(tiles, int64_t{128})));
    int64_t best = time(1);
    for (int64_t splits = 2; splits <= last; ++splits) best = min(best, time(splits));
    int64_t splits = 1;
    while (10 * time(splits) > 11 * best) ++splits;
    return static_cast<int>(splits);
}

}  // namespace ssl_ib
