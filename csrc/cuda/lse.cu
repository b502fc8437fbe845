// Logsumexps of rows @ cols^T / temperature and the positives of InfoNCE, without an N x M tensor, and their gradients.
//
// Row n has the logits l[n, m] of all columns but self[n]; its positives P(n) are those of them with its label. Answered
// are lse[n] = log sum_m exp l[n, m], without the positives where `drop` says so, and positive[n], the sum of l[n, m]
// over P(n). The gradient of the logits is
//   dl[n, m] = grad[n] exp(l[n, m] - lse[n]) + pull[n] [m in P(n)].
//
// Shapes: R owned rows, S streamed rows, d width.
#include "../common/combine.h"

namespace ssl_ib {

template <bool kMean, bool kMasked>
struct LseForward {
    template <typename T, int kWidth>
    using Kind = Forward<T, kWidth, kMean, kMasked, false>;
};

struct LseGradientProblem : GradientProblem {
    LseSide of_owned;
    int first;
    bool drop;
};

// vectors: the streamed side's grad, lse, and with masks its pull, self, and the two words of its labels.
template <typename T, int kWidthOfPiece, bool kBothSides, bool kMasked>
struct LseGradient {
    using Element = T;
    using Problem = LseGradientProblem;
    static constexpr int kWidth = kWidthOfPiece;
    // Both sides' numbers beside a full width's sums leave registers for half the scores.
    static constexpr int kColumns = Planes<T>::count > 1 || (kBothSides && kWidth == 256) ? 32 : 64;
    static constexpr int kOwned = 1, kStreamed = 1, kScores = 1, kValues = 1, kVectors = kMasked ? 6 : 2;

    const Problem& problem;
    int first_row, own_piece;
    float grad[2], lse[2], pull[2];
    int self[2];
    Label label[2];

    __device__ __forceinline__ LseGradient(const Problem& problem, int first_row, int own_piece)
        : problem(problem), first_row(first_row), own_piece(own_piece) {
        const int rows = problem.owned[0].rows;
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            const int row = first_row + row_of(slot);
            if constexpr (kBothSides) {
                grad[slot] = of_row(problem.of_owned.grad, row, rows);
                lse[slot] = of_row(problem.of_owned.lse, row, rows);
                pull[slot] = of_row(problem.of_owned.pull, row, rows);
                self[slot] = of_row(problem.of_owned.self, row, rows, -1);
            }
            if constexpr (kMasked) label[slot] = label_at(problem.of_owned.label, row, rows);
        }
    }

    // What the logsumexp and the positives of one side's row give a pair.
    __device__ __forceinline__ float weight(float logit, float grad, float lse, float pull, bool itself, bool same) {
        if (itself) return 0.0f;
        const float softmax = same && problem.drop ? 0.0f : grad * probability(logit - lse);
        return same ? softmax + pull : softmax;
    }

    __device__ __forceinline__ void weigh(float (&scores)[1][kColumns / 8][4], Output<LseGradient>&,
                                          const uint32_t* words, int first_column) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            const Pair grads = pair_at(words, n), lses = pair_at(words + kColumns, n);
            const Pair pulls = kMasked ? pair_at(words + 2 * kColumns, n) : Pair{};
            const Pair selves = kMasked ? pair_at(words + 3 * kColumns, n) : Pair{};
            const Pair lows = kMasked ? pair_at(words + 4 * kColumns, n) : Pair{};
            const Pair highs = kMasked ? pair_at(words + 5 * kColumns, n) : Pair{};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = i / 2, row = first_row + row_of(slot), column = first_column + column_of(n) + i % 2;
                const float logit = scores[0][n][i] * problem.scale;
                if constexpr (kMasked) {
                    const bool there = column < problem.streamed[0].rows;
                    const bool same = there && label[slot] == Label{lows.index(i % 2), highs.index(i % 2)};
                    scores[0][n][i] = weight(logit, grads.number(i % 2), lses.number(i % 2), pulls.number(i % 2),
                                             problem.first + row == selves.index(i % 2), same);
                    if constexpr (kBothSides) {
                        scores[0][n][i] +=
                            weight(logit, grad[slot], lse[slot], pull[slot], column == self[slot], same);
                    }
                } else {
                    scores[0][n][i] = grads.number(i % 2) * probability(logit - lses.number(i % 2));
                }
            }
        }
    }

    __device__ __forceinline__ void finish(const Output<LseGradient>& out) {
        store_gradient<LseGradient>(problem, first_row, own_piece, out);
    }
};

template <bool kBothSides, bool kMasked>
struct LseGradientOf {
    template <typename T, int kWidth>
    using Kind = LseGradient<T, kWidth, kBothSides, kMasked>;
};

// Rows that a warp of `gradient_from_mean` goes through the labels for at once, and numbers of a row that it sums.
constexpr int kRowsOfWarp = 4, kNumbersOfWarp = 256;

// The gradient to rows whose mean column is known, with what their positives add. The labels of all columns are gone
// through, and only positives are read.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    gradient_from_mean(int rows, int width, LseSide side, const float* mean, float scale, Matrix columns,
                       Labels column_label, T* gradient) {
    const int first_row = row_of_warp() * kRowsOfWarp, piece = blockIdx.y * kNumbersOfWarp;
    float sums[kRowsOfWarp][kNumbersOfWarp / 32] = {};
    for (int first = 0; side.pull && first < columns.rows; first += 32) {
        const int column = first + lane();
        const Label label = label_at(column_label, column, columns.rows);
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) {
            const int row = first_row + r;
            const bool hit = row < rows && column < columns.rows && label_at(side.label, row, rows) == label &&
                             of_row(side.self, row, rows, -1) != column;
            for (unsigned hits = __ballot_sync(~0u, hit); hits; hits &= hits - 1) {
                const T* const positive =
                    static_cast<const T*>(columns.data) + int64_t{first + __ffs(hits) - 1} * columns.stride;
#pragma unroll
                for (int i = 0; i < kNumbersOfWarp / 32; ++i) {
                    const int at = piece + 32 * i + lane();
                    if (at < width) sums[r][i] += to_float(positive[at]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
        const int row = first_row + r;
        if (row >= rows) return;
        const float pull = of_row(side.pull, row, rows), grad = side.lse[row] == -INFINITY ? 0.0f : side.grad[row];
#pragma unroll
        for (int i = 0; i < kNumbersOfWarp / 32; ++i) {
            const int64_t number = piece + 32 * i + lane(), at = int64_t{row} * width + number;
            if (number >= width) continue;
            // A factor of 0 is no product with what may be infinite.
            const float softmax = grad == 0.0f ? 0.0f : grad * mean[at];
            gradient[at] = from_float<T>((pull == 0.0f ? softmax : softmax + pull * sums[r][i]) * scale);
        }
    }
}

// Raises bound[0] to the greatest squared length of the rows, as the bits of a float, which are ordered as the numbers.
template <typename T>
__global__ void __launch_bounds__(kThreads) longest_row(Matrix matrix, unsigned* bound) {
    float greatest = 0.0f;
    for (int row = row_of_warp(); row < matrix.rows; row += gridDim.x * kRowsPerBlock) {
        const T* const numbers = static_cast<const T*>(matrix.data) + int64_t{row} * matrix.stride;
        float sum = 0.0f;
        for (int i = lane(); i < matrix.stride; i += 32) sum += to_float(numbers[i]) * to_float(numbers[i]);
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
        // A length that is no number is not bounded.
        greatest = sum <= greatest ? greatest : sum == sum ? sum : INFINITY;
    }
    if (lane() == 0) atomicMax(bound, __float_as_uint(greatest));
}

int64_t forward_workspace(const Logits& logits, bool with_mean, bool with_average, bool with_positives) {
    const int width = with_mean ? logits.width : 1;
    const int splits = splits_of(logits.num_owned, logits.num_streamed, width, kForwardRoom);
    const int64_t numbers = 1 + (with_average ? 1 : 0) + (with_mean ? width : 0) + (with_positives ? 2 : 0);
    return splits == 1 ? 0 : splits * numbers * logits.num_owned;
}

int64_t gradient_workspace(int num_owned, int num_streamed, int width) {
    const int splits = splits_of(num_owned, num_streamed, width, kGradientRoom);
    return splits == 1 ? 0 : int64_t{splits} * num_owned * width;
}

void longest_rows(Dtype dtype, const void* rows, int num_rows, int stride, unsigned* bound, Stream stream) {
    dispatch(dtype, [&](auto example) {
        // Blocks enough for any GPU, each of which raises the bound a few times only.
        launch(longest_row<decltype(example)>, min(ceil_div(num_rows, kRowsPerBlock), 1024), kThreads, 0, stream,
               Matrix{rows, num_rows, stride}, bound);
    });
}

void lse_forward(const Logits& logits, const LeftOut& left_out, const unsigned* bound, float* lse, float* mean,
                 float* positive, float* workspace, Stream stream) {
    const int splits = splits_of(logits.num_owned, logits.num_streamed, mean ? logits.width : 1, kForwardRoom);
    ForwardProblem problem{sweep_of(logits, splits), left_out.self, left_out.owned_label, left_out.drop, bound};
    problem.vectors[0] = left_out.streamed_label.low, problem.vectors[1] = left_out.streamed_label.high;
    dispatch(logits.dtype, [&](auto example) {
        using T = decltype(example);
        const bool masked = left_out.self || left_out.owned_label.low;
        const auto start = [&](auto kind) {
            launch_forward<decltype(kind)::template Kind, T>(problem, {lse, mean, nullptr, positive}, workspace,
                                                             stream);
        };
        if (mean) {
            masked ? start(LseForward<true, true>{}) : start(LseForward<true, false>{});
        } else {
            masked ? start(LseForward<false, true>{}) : start(LseForward<false, false>{});
        }
    });
}

void lse_gradient(const Logits& logits, const LseSide& owned, const LseSide& streamed, int first, bool drop,
                  const float* raised_by, void* gradient, float* workspace, Stream stream) {
    const int splits = splits_of(logits.num_owned, logits.num_streamed, logits.width, kGradientRoom);
    LseGradientProblem problem{{sweep_of(logits, splits)}, owned, first, drop};
    problem.vectors[0] = streamed.grad, problem.vectors[1] = streamed.lse, problem.vectors[2] = streamed.pull;
    problem.vectors[3] = streamed.self;
    problem.vectors[4] = streamed.label.low, problem.vectors[5] = streamed.label.high;
    problem.factor = problem.scale;
    problem.raised_by = raised_by;
    dispatch(logits.dtype, [&](auto example) {
        using T = decltype(example);
        const auto start = [&](auto kind) {
            launch_gradient<decltype(kind)::template Kind>(problem, static_cast<T*>(gradient), workspace, stream);
        };
        const bool masked = owned.label.low || streamed.self;
        if (owned.grad) {
            // Rows in the place of columns leave themselves out, so the kernel without masks is not worth having.
            start(LseGradientOf<true, true>{});
        } else {
            masked ? start(LseGradientOf<false, true>{}) : start(LseGradientOf<false, false>{});
        }
    });
}

void lse_gradient_from_mean(const Logits& logits, const LseSide& owned, const Labels& streamed_label,
                            const float* mean, void* gradient, Stream stream) {
    const dim3 grid(ceil_div(logits.num_owned, kRowsPerBlock * kRowsOfWarp), ceil_div(logits.width, kNumbersOfWarp));
    dispatch(logits.dtype, [&](auto example) {
        using T = decltype(example);
        launch(gradient_from_mean<T>, grid, kThreads, 0, stream, logits.num_owned, logits.width, owned, mean,
               1.0f / logits.temperature, Matrix{logits.streamed, logits.num_streamed, logits.stride}, streamed_label,
               static_cast<T*>(gradient));
    });
}

}  // namespace ssl_ib
