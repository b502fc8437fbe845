// The launchers of the softmax family: lse.cu and posterior.cu. Plain pointers into device memory; nothing here waits.
//
// Every kernel owns one operand's rows and streams the other's past; which is which is the caller's to say.
// Shapes: R owned rows, S streamed rows, d width, s stride: d rounded up to a multiple of 8.
#pragma once

#include "../common/launch_types.h"

namespace ssl_ib {

// The logits owned @ streamed^T / temperature.
struct Logits {
    Dtype dtype;
    const void *owned, *streamed;  // [R, s], [S, s] of dtype, 16-byte aligned, zeros past d; R, S, d >= 1
    int num_owned, num_streamed;
    int width, stride;
    float temperature;
};

// The floats that a launcher needs as room for the parts of its splits; 0 where it needs none (and takes null).
int64_t forward_workspace(const Logits& logits, bool with_mean, bool with_average, bool with_positives);
int64_t gradient_workspace(int num_owned, int num_streamed, int width);

// Raises *bound, the bits of a float that is not negative, to the greatest squared length of rows [N, s] of dtype.
void longest_rows(Dtype dtype, const void* rows, int num_rows, int stride, unsigned* bound, Stream stream);

// What rows do not see, and what is of their own; null where nothing is. One column of every row; pairs of one label,
// which are left out of the logsumexp if they are to be dropped.
struct LeftOut {
    const int* self;                      // [R]
    Labels owned_label, streamed_label;  // [R], [S]
    bool drop;
};

// lse [R] over the streamed rows and, unless null, mean [R, d]: the streamed rows' mean by the softmax; and positive
// [2, R]: the sums of the positives' logits, and their numbers. bound [2]: of `longest_rows` for owned and streamed
// rows, or null: where it is small enough no maximum is taken.
void lse_forward(const Logits& logits, const LeftOut& left_out, const unsigned* bound, float* lse, float* mean,
                 float* positive, float* workspace, Stream stream);

// One side of a gradient: of the logsumexps over this side's rows the gradients and values, the gradient of each of
// their positives' logits, and what they do not see.
struct LseSide {
    const float *grad, *lse, *pull;  // null where only the other side has answers; pull: also where none is wanted
    const int* self;                 // not null where grad is not and any side has masks
    Labels label;
};

// gradient[i] = sum_j (dl of owned i and streamed j + dl of streamed j and owned i) streamed[j] / temperature, [R, d] of
// dtype, where row n of a side has dl[n, m] = grad[n] exp(l[n, m] - lse[n]) + pull[n] [m of the label of n]. It is 0
// where owned.self[i] == j, or streamed.self[j] == first + i; its first term is, with drop, also where the labels are
// one. Grads and pulls may have been multiplied by *raised_by (null: they are not).
void lse_gradient(const Logits& logits, const LseSide& owned, const LseSide& streamed, int first, bool drop,
                  const float* raised_by, void* gradient, float* workspace, Stream stream);

// gradient [R, d] of dtype of the owned rows by their own answers, whose mean [R, d] is known.
void lse_gradient_from_mean(const Logits& logits, const LseSide& owned, const Labels& streamed_label,
                            const float* mean, void* gradient, Stream stream);

// Owned t, streamed c: lse [R], mean [R, d] and expected [R]: the mean of log_prior [S] (zeros where that is null).
// bound: as of `lse_forward`.
void posterior_forward(const Logits& logits, const float* log_prior, const unsigned* bound, float* lse, float* mean,
                       float* expected, float* workspace, Stream stream);

// Owned c, streamed t: marginal [R], the sum over t's rows of their probabilities, given their lse [S].
// Workspace: gradient_workspace(R, S, 1).
void posterior_marginal(const Logits& logits, const float* lse, float* marginal, float* workspace, Stream stream);

// The letters of the gradient that stands at the top of posterior.cu. a and v are [N, s] of dtype, aligned as the
// operands; lse, r, h, e [N]; u, w [K].
struct PosteriorTerms {
    const float *lse, *r, *h, *e, *u, *w;
    const void *a, *v;
    // What r, h, e, w and a have been multiplied by, or null for 1; in float16 v by this over kHalfValueRaise.
    const float* raised_by;
};

// In float16 the probabilities that weigh v are multiplied by this: those of thousands of prototypes would be lost.
constexpr float kHalfValueRaise = 1024.0f;

// Owned t, streamed c, or the other way round: gradient [R, d] of dtype.
void posterior_gradient_t(const Logits& logits, const PosteriorTerms& terms, void* gradient, float* workspace,
                          Stream stream);
void posterior_gradient_c(const Logits& logits, const PosteriorTerms& terms, void* gradient, float* workspace,
                          Stream stream);

}  // namespace ssl_ib
