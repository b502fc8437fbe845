// Logsumexps of rows @ cols^T / temperature that no N x M tensor is made for, forward and backward.
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
};

// vectors: the streamed side's grad, lse, self, group.
template <typename T, int kWidthOfPiece, bool kBothSides, bool kMasked>
struct LseGradient {
    using Element = T;
    using Problem = LseGradientProblem;
    static constexpr int kWidth = kWidthOfPiece;
    // Both sides' numbers beside a full width's sums leave registers for half the scores.
    static constexpr int kColumns = Planes<T>::count > 1 || (kBothSides && kWidth == 256) ? 32 : 64;
    static constexpr int kOwned = 1, kStreamed = 1, kScores = 1, kValues = 1, kVectors = kMasked ? 4 : 2;

    const Problem& problem;
    int first_row, own_piece;
    float grad[2], lse[2];
    int self[2], group[2];

    __device__ __forceinline__ LseGradient(const Problem& problem, int first_row, int own_piece)
        : problem(problem), first_row(first_row), own_piece(own_piece) {
        const int rows = problem.owned[0].rows;
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            const int row = first_row + row_of(slot);
            if constexpr (kBothSides) {
                grad[slot] = of_row(problem.of_owned.grad, row, rows);
                lse[slot] = of_row(problem.of_owned.lse, row, rows);
            }
            if constexpr (kMasked) {
                self[slot] = of_row(problem.of_owned.self, row, rows, -1);
                group[slot] = of_row(problem.of_owned.group, row, rows, kNoRowGroup);
            }
        }
    }

    __device__ __forceinline__ void weigh(float (&scores)[1][kColumns / 8][4], Output<LseGradient>&,
                                          const uint32_t* words, int first_column) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            const Pair grads = pair_at(words, n), lses = pair_at(words + kColumns, n);
            const Pair selves = kMasked ? pair_at(words + 2 * kColumns, n) : Pair{};
            const Pair groups = kMasked ? pair_at(words + 3 * kColumns, n) : Pair{};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = i / 2, row = first_row + row_of(slot), column = first_column + column_of(n) + i % 2;
                const float score = scores[0][n][i];
                float weight = grads.number(i % 2) *
                               probability(fmaf(score, problem.scale, -lses.number(i % 2)));
                if constexpr (kMasked) {
                    if (left_out(problem.first + row, selves.index(i % 2), group[slot], groups.index(i % 2))) {
                        weight = 0.0f;
                    }
                }
                if constexpr (kBothSides) {
                    float other = grad[slot] * probability(fmaf(score, problem.scale, -lse[slot]));
                    if constexpr (kMasked) {
                        if (left_out(column, self[slot], group[slot], groups.index(i % 2))) other = 0.0f;
                    }
                    weight += other;
                }
                scores[0][n][i] = weight;
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

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gradient_from_mean(int rows, int width, const float* grad, const float* lse, const float* mean, float scale,
                       T* gradient) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    const bool empty = lse[row] == -INFINITY;
    const float factor = grad[row] * scale;
    for (int column = lane(); column < width; column += 32) {
        const int64_t at = row * width + column;
        gradient[at] = from_float<T>(empty ? 0.0f : factor * mean[at]);
    }
}

int64_t forward_workspace(const Logits& logits, bool with_mean, bool with_average) {
    const int width = with_mean ? logits.width : 1;
    const int splits = splits_of(logits.num_owned, logits.num_streamed, width);
    const int64_t numbers = 1 + (with_average ? 1 : 0) + (with_mean ? width : 0);
    return splits == 1 ? 0 : splits * numbers * logits.num_owned;
}

int64_t gradient_workspace(int num_owned, int num_streamed, int width) {
    const int splits = splits_of(num_owned, num_streamed, width);
    return splits == 1 ? 0 : int64_t{splits} * num_owned * width;
}

void lse_forward(const Logits& logits, const LeftOut& left_out, float* lse, float* mean, float* workspace,
                 Stream stream) {
    const int splits = splits_of(logits.num_owned, logits.num_streamed, mean ? logits.width : 1);
    ForwardProblem problem{sweep_of(logits, splits), left_out.self, left_out.owned_group};
    problem.vectors[0] = left_out.streamed_group;
    dispatch(logits.dtype, [&](auto example) {
        using T = decltype(example);
        const bool masked = left_out.self || left_out.owned_group;
        const auto start = [&](auto kind) {
            launch_forward<decltype(kind)::template Kind, T>(problem, lse, mean, nullptr, workspace, stream);
        };
        if (mean) {
            masked ? start(LseForward<true, true>{}) : start(LseForward<true, false>{});
        } else {
            masked ? start(LseForward<false, true>{}) : start(LseForward<false, false>{});
        }
    });
}

void lse_gradient(const Logits& logits, const LseSide& owned, const LseSide& streamed, int first,
                  const float* raised_by, void* gradient, float* workspace, Stream stream) {
    const int splits = splits_of(logits.num_owned, logits.num_streamed, logits.width);
    LseGradientProblem problem{{sweep_of(logits, splits)}, owned, first};
    problem.vectors[0] = streamed.grad, problem.vectors[1] = streamed.lse;
    problem.vectors[2] = streamed.self, problem.vectors[3] = streamed.group;
    problem.factor = problem.scale;
    problem.raised_by = raised_by;
    dispatch(logits.dtype, [&](auto example) {
        using T = decltype(example);
        const auto start = [&](auto kind) {
            launch_gradient<decltype(kind)::template Kind>(problem, static_cast<T*>(gradient), workspace, stream);
        };
        const bool masked = owned.self || owned.group || streamed.self;
        if (owned.grad) {
            // Rows in the place of columns leave themselves out, so the kernel without masks is not worth having.
            start(LseGradientOf<true, true>{});
        } else {
            masked ? start(LseGradientOf<false, true>{}) : start(LseGradientOf<false, false>{});
        }
    });
}

void lse_gradient_from_mean(Dtype dtype, int num_rows, int width, const float* grad, const float* lse,
                            const float* mean, float temperature, void* gradient, Stream stream) {
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        launch(gradient_from_mean<T>, grid_of_rows(num_rows), kThreads, 0, stream, num_rows, width, grad, lse, mean,
               1.0f / temperature, static_cast<T*>(gradient));
    });
}

}  // namespace ssl_ib
