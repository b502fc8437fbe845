// What the Kinds of the softmax family have in common: the forward's online softmax, and gradients as an output.
#pragma once

#include "sweep.h"

namespace ssl_ib {

// A number that goes with an owned row; `otherwise` past the last one and where nothing was given.
template <typename Number>
__device__ __forceinline__ Number of_row(const Number* numbers, int row, int rows, Number otherwise = 0) {
    return numbers && row < rows ? numbers[row] : otherwise;
}

// Two neighbouring columns of this thread's.
struct Pair {
    uint32_t words[2];
    __device__ __forceinline__ float number(int i) const { return __uint_as_float(words[i]); }
    __device__ __forceinline__ int index(int i) const { return static_cast<int>(words[i]); }
};
__device__ __forceinline__ Pair pair_at(const uint32_t* words, int n) {
    const uint2 both = *reinterpret_cast<const uint2*>(words + column_of(n));
    return {{both.x, both.y}};
}

// Two numbers into columns `column` (even) and the next of a row of `width`, as far as they are there.
template <typename T>
__device__ __forceinline__ void store_pair(T* row, int column, int width, float first, float second) {
    if (width % 2 == 0) {
        if (column >= width) return;
        if constexpr (std::is_same_v<T, float>) {
            store(row + column, make_float2(first, second));
        } else {
            store(row + column, pack2<T>(first, second));
        }
    } else {
        if (column < width) row[column] = from_float<T>(first);
        if (column + 1 < width) row[column + 1] = from_float<T>(second);
    }
}

// ---- Forward ----

// vectors: the two words of the columns' labels, or the numbers to average.
struct ForwardProblem : Sweep {
    const int* self;  // [N], or null
    Labels row_label;
    bool drop;              // whether pairs of one label are left out of the logsumexp
    const unsigned* bound;  // [2]: the bits of the greatest squared lengths on either side, or null
    // Of every split, one after another: lse [N], mean [N, d], average [N]; sums of the positives' logits and their
    // numbers [2, N].
    float *lse, *mean, *average, *positive;
};

// Row by row the logsumexp of the logits, the mean of the streamed rows by their softmax, and the mean of a number; with
// masks also what the positives add up to, the columns of a row's label but its own.
template <typename T, int kWidthOfPiece, bool kMean, bool kMasked, bool kAverage>
struct Forward {
    using Element = T;
    using Problem = ForwardProblem;
    static constexpr int kWidth = kWidthOfPiece, kColumns = Planes<T>::count == 1 ? 64 : 32;
    static constexpr int kOwned = 1, kStreamed = 1, kScores = 1, kValues = kMean;
    static constexpr int kVectors = kMasked ? 2 : kAverage;
    static_assert(!(kMasked && kAverage));

    const Problem& problem;
    int first_row, own_piece;
    Online online[2];
    float average[2] = {}, positive[2] = {}, count[2] = {};
    bool bounded;
    int self[2];
    Label label[2];

    __device__ __forceinline__ Forward(const Problem& problem, int first_row, int own_piece)
        : problem(problem),
          first_row(first_row),
          own_piece(own_piece),
          bounded(problem.bound && is_bounded(__uint_as_float(problem.bound[0]), __uint_as_float(problem.bound[1]),
                                              problem.scale * kLog2E)) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            if (bounded) online[slot].max = 0.0f;
            if constexpr (kMasked) {
                const int row = first_row + row_of(slot), rows = problem.owned[0].rows;
                self[slot] = of_row(problem.self, row, rows, -1);
                label[slot] = label_at(problem.row_label, row, rows);
            }
        }
    }

    __device__ __forceinline__ void weigh(float (&scores)[1][kColumns / 8][4], Output<Forward>& out,
                                          const uint32_t* words, int first_column) {
        // In units of log 2, so that a power of two is one instruction.
        const float scale = problem.scale * kLog2E;
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            const Pair lows = kMasked ? pair_at(words, n) : Pair{};
            const Pair highs = kMasked ? pair_at(words + kColumns, n) : Pair{};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = i / 2, column = first_column + column_of(n) + i % 2;
                bool out_of_it = column >= problem.streamed[0].rows;
                if constexpr (kMasked) {
                    out_of_it = out_of_it || column == self[slot];
                    if (!out_of_it && label[slot] == Label{lows.index(i % 2), highs.index(i % 2)}) {
                        positive[slot] += scores[0][n][i];
                        count[slot] += 1.0f;
                        out_of_it = problem.drop;
                    }
                }
                if (out_of_it) scores[0][n][i] = -INFINITY;
                top[slot] = fmaxf(top[slot], scores[0][n][i]);
            }
        }
        // The same for all threads.
        if (!bounded) {
            float factor[2];
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) {
                factor[slot] = online[slot].raise(max_of_row(top[slot]) * scale);
                average[slot] *= factor[slot];
            }
            if constexpr (kMean) {
                // The maximum soon settles.
                if (factor[0] != 1.0f || factor[1] != 1.0f) {
#pragma unroll
                    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) out.sums[n][i] *= factor[i / 2];
                    }
                }
            }
        }
        const float reference[2] = {pivot(online[0].max), pivot(online[1].max)};
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            const Pair numbers = kAverage ? pair_at(words, n) : Pair{};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = i / 2;
                const float weight = power_of_two(fmaf(scores[0][n][i], scale, -reference[slot]));
                online[slot].sum += weight;
                if constexpr (kAverage) average[slot] = fmaf(weight, numbers.number(i % 2), average[slot]);
                scores[0][n][i] = weight;
            }
        }
    }

    __device__ __forceinline__ void finish(const Output<Forward>& out) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            const int row = first_row + row_of(slot);
            online[slot].sum = sum_of_row(online[slot].sum);
            const float total = kAverage ? sum_of_row(average[slot]) : 0.0f;
            const float logits = kMasked ? sum_of_row(positive[slot]) : 0.0f;
            const float positives = kMasked ? sum_of_row(count[slot]) : 0.0f;
            if (row >= problem.owned[0].rows) continue;
            const float inverse = online[slot].sum == 0.0f ? 0.0f : 1.0f / online[slot].sum;
            const int64_t at = static_cast<int64_t>(blockIdx.y) * problem.owned[0].rows + row;
            if (lane() % 4 == 0 && (!kMean || own_piece == 0)) {
                problem.lse[at] = online[slot].log_sum();
                if constexpr (kAverage) problem.average[at] = total * inverse;
                if (kMasked && problem.positive) {
                    float* const sums = problem.positive + int64_t{blockIdx.y} * 2 * problem.owned[0].rows;
                    sums[row] = logits * problem.scale;
                    sums[row + problem.owned[0].rows] = positives;
                }
            }
            if constexpr (kMean) {
                float* const mean = problem.mean + at * problem.width;
#pragma unroll
                for (int n = 0; n < kWidth / 8; ++n) {
                    const float *const sums = out.sums[n] + 2 * slot;
                    store_pair(mean, own_piece * kWidth + column_of(n), problem.width, sums[0] * inverse,
                               sums[1] * inverse);
                }
            }
        }
    }
};

// ---- Gradients ----

struct GradientProblem : Sweep {
    void* gradient;          // [rows, d] of the operands' type, where there is one split
    float* partial;          // otherwise [splits, rows, d]
    float factor;            // of the whole gradient
    const float* raised_by;  // what the weights had been multiplied by, or null for 1
};

__device__ __forceinline__ float factor_of(float factor, const float* raised_by) {
    return raised_by ? factor / *raised_by : factor;
}

template <class Kind>
__device__ __forceinline__ void store_gradient(const GradientProblem& problem, int first_row, int own_piece,
                                               const Output<Kind>& out) {
    using T = typename Kind::Element;
    const float factor = problem.partial ? 1.0f : factor_of(problem.factor, problem.raised_by);
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
        const int row = first_row + row_of(slot);
        if (row >= problem.owned[0].rows) continue;
        const int64_t at = static_cast<int64_t>(row) * problem.width;
        const int64_t split = static_cast<int64_t>(blockIdx.y) * problem.owned[0].rows * problem.width;
#pragma unroll
        for (int n = 0; n < Kind::kWidth / 8; ++n) {
            const int column = own_piece * Kind::kWidth + column_of(n);
            const float first = out.sums[n][2 * slot] * factor, second = out.sums[n][2 * slot + 1] * factor;
            if (problem.partial) {
                store_pair(problem.partial + split + at, column, problem.width, first, second);
            } else {
                store_pair(static_cast<T*>(problem.gradient) + at, column, problem.width, first, second);
            }
        }
    }
}

}  // namespace ssl_ib
