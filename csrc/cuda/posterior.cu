// Softmax over prototypes seen as attention whose keys are its values: its statistics, and their gradients.
//
// With the logits l[n, k] = t[n] . c[k] / temperature, the gradient of any loss of these answers is
//
//     dl[n, k] = p[n, k] (a[n] . c[k] + e[n] u[k] + w[k] + h[n] l[n, k] - r[n])
//     dt[n]    = sum_k dl[n, k] c[k] / temperature
//     dc[k]    = sum_n dl[n, k] t[n] / temperature + p[n, k] v[n]
//
// where every letter is null if its term is absent, and
//
//     a [N, d]  the gradient of the mean prototype, to go through p; null where p is a constant in the mean
//     v [N, d]  the same gradient, to go through the prototypes that the mean is of
//     e [N]     the gradient of the expected log prior
//     u [K]     the log prior itself
//     w [K]     the gradient of the marginal
//     h [N]     minus the gradient of the entropy
//     r [N]     the mean under p[n] of the four terms before it, minus the gradient of the logsumexp
//
// Shapes: N rows of t, K prototypes c, R owned rows, S streamed rows, d width.
#include "../common/combine.h"

namespace ssl_ib {

template <typename T, int kWidth>
using PosteriorForward = Forward<T, kWidth, true, false, true>;

struct MarginalProblem : Sweep {
    float* sums;  // [splits, K]
};

// Owned c, streamed t: sums over t's rows of their probabilities. vectors: t's lse.
template <typename T, int kWidthOfPiece>
struct Marginal {
    using Element = T;
    using Problem = MarginalProblem;
    static constexpr int kWidth = kWidthOfPiece, kColumns = Planes<T>::count == 1 ? 64 : 32;
    static constexpr int kOwned = 1, kStreamed = 1, kScores = 1, kValues = 0, kVectors = 1;

    const Problem& problem;
    int first_row;
    float sum[2] = {};

    __device__ __forceinline__ Marginal(const Problem& problem, int first_row, int)
        : problem(problem), first_row(first_row) {}

    __device__ __forceinline__ void weigh(float (&scores)[1][kColumns / 8][4], Output<Marginal>&,
                                          const uint32_t* words, int first_column) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            const Pair lses = pair_at(words, n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float share = probability(fmaf(scores[0][n][i], problem.scale, -lses.number(i % 2)));
                if (first_column + column_of(n) + i % 2 < problem.streamed[0].rows) sum[i / 2] += share;
            }
        }
    }

    __device__ __forceinline__ void finish(const Output<Marginal>&) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            const int row = first_row + row_of(slot), rows = problem.owned[0].rows;
            const float total = sum_of_row(sum[slot]);
            if (row < rows && lane() % 4 == 0) problem.sums[static_cast<int64_t>(blockIdx.y) * rows + row] = total;
        }
    }
};

struct PosteriorGradientProblem : GradientProblem {
    PosteriorTerms terms;
};

// Owned t (and a), streamed c. vectors: u, w.
template <typename T, int kWidthOfPiece, bool kA>
struct GradientOfT {
    using Element = T;
    using Problem = PosteriorGradientProblem;
    static constexpr int kWidth = kWidthOfPiece, kColumns = 32;
    static constexpr int kOwned = 1 + kA, kStreamed = 1, kScores = 1 + kA, kValues = 1, kVectors = 2;

    const Problem& problem;
    int first_row, own_piece;
    float lse[2], r[2], h[2], e[2];

    __device__ __forceinline__ GradientOfT(const Problem& problem, int first_row, int own_piece)
        : problem(problem), first_row(first_row), own_piece(own_piece) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            const int row = first_row + row_of(slot), rows = problem.owned[0].rows;
            lse[slot] = of_row(problem.terms.lse, row, rows), r[slot] = of_row(problem.terms.r, row, rows);
            h[slot] = of_row(problem.terms.h, row, rows), e[slot] = of_row(problem.terms.e, row, rows);
        }
    }

    __device__ __forceinline__ void weigh(float (&scores)[kScores][kColumns / 8][4], Output<GradientOfT>&,
                                          const uint32_t* words, int) {
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            const Pair u = pair_at(words, n), w = pair_at(words + kColumns, n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = i / 2;
                const float logit = scores[0][n][i] * problem.scale;
                float slope = fmaf(h[slot], logit, fmaf(e[slot], u.number(i % 2), w.number(i % 2))) - r[slot];
                if constexpr (kA) slope += scores[1][n][i];
                scores[0][n][i] = probability(logit - lse[slot]) * slope;
            }
        }
    }

    __device__ __forceinline__ void finish(const Output<GradientOfT>& out) {
        store_gradient<GradientOfT>(problem, first_row, own_piece, out);
    }
};

// Owned c, streamed t (then a, then v). vectors: lse, r, h, e.
template <typename T, int kWidthOfPiece, bool kA, bool kV>
struct GradientOfC {
    using Element = T;
    using Problem = PosteriorGradientProblem;
    static constexpr int kWidth = kWidthOfPiece, kColumns = 32;
    static constexpr int kOwned = 1, kStreamed = 1 + kA + kV, kScores = 1 + kA, kValues = 1 + kV, kVectors = 4;

    const Problem& problem;
    int first_row, own_piece;
    float u[2], w[2];

    __device__ __forceinline__ GradientOfC(const Problem& problem, int first_row, int own_piece)
        : problem(problem), first_row(first_row), own_piece(own_piece) {
#pragma unroll
        for (int slot = 0; slot < 2; ++slot) {
            const int row = first_row + row_of(slot), rows = problem.owned[0].rows;
            u[slot] = of_row(problem.terms.u, row, rows), w[slot] = of_row(problem.terms.w, row, rows);
        }
    }

    __device__ __forceinline__ void weigh(float (&arrays)[1 + (kA || kV)][kColumns / 8][4], Output<GradientOfC>&,
                                          const uint32_t* words, int) {
        constexpr float kRaise = std::is_same_v<T, fp16> ? kHalfValueRaise : 1.0f;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n) {
            const Pair lse = pair_at(words, n), r = pair_at(words + kColumns, n);
            const Pair h = pair_at(words + 2 * kColumns, n), e = pair_at(words + 3 * kColumns, n);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int slot = i / 2;
                const float logit = arrays[0][n][i] * problem.scale;
                float slope = fmaf(h.number(i % 2), logit, fmaf(e.number(i % 2), u[slot], w[slot])) - r.number(i % 2);
                if constexpr (kA) slope += arrays[1][n][i];
                const float share = probability(logit - lse.number(i % 2));
                arrays[0][n][i] = share * slope * problem.scale;
                if constexpr (kV) arrays[1][n][i] = share * kRaise;
            }
        }
    }

    __device__ __forceinline__ void finish(const Output<GradientOfC>& out) {
        store_gradient<GradientOfC>(problem, first_row, own_piece, out);
    }
};

template <bool kA>
struct OfT {
    template <typename T, int kWidth>
    using Kind = GradientOfT<T, kWidth, kA>;
};

template <bool kA, bool kV>
struct OfC {
    template <typename T, int kWidth>
    using Kind = GradientOfC<T, kWidth, kA, kV>;
};

void posterior_forward(const Logits& logits, const float* log_prior, const unsigned* bound, float* lse, float* mean, float* expected,
                       float* workspace, Stream stream) {
    const int splits = splits_of(logits.num_owned, logits.num_streamed, logits.width, kForwardRoom);
    ForwardProblem problem{sweep_of(logits, splits)};
    problem.vectors[0] = log_prior;
    problem.bound = bound;
    dispatch(logits.dtype, [&](auto example) {
        launch_forward<PosteriorForward, decltype(example)>(problem, {lse, mean, expected, nullptr}, workspace, stream);
    });
}

void posterior_marginal(const Logits& logits, const float* lse, float* marginal, float* workspace, Stream stream) {
    const int rows = logits.num_owned, splits = splits_of(rows, logits.num_streamed, 1, kGradientRoom);
    MarginalProblem problem{sweep_of(logits, splits), splits > 1 ? workspace : marginal};
    problem.vectors[0] = lse;
    dispatch(logits.dtype,
             [&](auto example) { launch_sweep<Marginal, decltype(example)>(problem, stream); });
    if (splits == 1) return;
    launch(combine_gradient<float>, grid_of_rows(rows), kThreads, 0, stream, splits, rows, 1, workspace, 1.0f, nullptr,
           marginal);
}

void posterior_gradient_t(const Logits& logits, const PosteriorTerms& terms, void* gradient, float* workspace,
                          Stream stream) {
    const int splits = splits_of(logits.num_owned, logits.num_streamed, logits.width, kGradientRoom);
    PosteriorGradientProblem problem{{sweep_of(logits, splits)}, terms};
    problem.owned[1] = {terms.a, logits.num_owned, logits.stride};
    problem.vectors[0] = terms.u, problem.vectors[1] = terms.w;
    problem.factor = problem.scale;
    problem.raised_by = terms.raised_by;
    dispatch(logits.dtype, [&](auto example) {
        using T = decltype(example);
        const auto start = [&](auto kind) {
            launch_gradient<decltype(kind)::template Kind>(problem, static_cast<T*>(gradient), workspace, stream);
        };
        terms.a ? start(OfT<true>{}) : start(OfT<false>{});
    });
}

void posterior_gradient_c(const Logits& logits, const PosteriorTerms& terms, void* gradient, float* workspace,
                          Stream stream) {
    const int splits = splits_of(logits.num_owned, logits.num_streamed, logits.width, kGradientRoom);
    PosteriorGradientProblem problem{{sweep_of(logits, splits)}, terms};
    problem.streamed[1] = {terms.a ? terms.a : terms.v, logits.num_streamed, logits.stride};
    problem.streamed[2] = {terms.v, terms.v ? logits.num_streamed : 0, logits.stride};
    problem.vectors[0] = terms.lse, problem.vectors[1] = terms.r;
    problem.vectors[2] = terms.h, problem.vectors[3] = terms.e;
    problem.factor = 1.0f;
    problem.raised_by = terms.raised_by;
    dispatch(logits.dtype, [&](auto example) {
        using T = decltype(example);
        const auto start = [&](auto kind) {
            launch_gradient<decltype(kind)::template Kind>(problem, static_cast<T*>(gradient), workspace, stream);
        };
        if (terms.a) {
            start(OfC<true, true>{});
        } else {
            terms.v ? start(OfC<false, true>{}) : start(OfC<false, false>{});
        }
    });
}

}  // namespace ssl_ib
