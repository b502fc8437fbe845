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
int64_t forward_workspace(const Logits& logits, bool with_mean, bool with_average);
int64_t gradient_workspace(int num_owned, int num_streamed, int width);

// What a logsumexp leaves out; null where nothing is. Pairs of equal groups, and one column of every row.
struct LeftOut {
    const int *self, *owned_group, *streamed_group;  // [R], [R], [S]
};

// lse [R] over the streamed rows and, unless null, mean [R, d]: the streamed rows' mean by the softmax.
void lse_forward(const Logits& logits, const LeftOut& left_out, float* lse, float* mean, float* workspace,
                 Stream stream);

// One side of a gradient: of the logsumexps over this side's rows the gradients and values, and what they leave out.
struct LseSide {
    const float *grad, *lse;  // null where only the other side has logsumexps
    const int *self, *group;  // self is not null where grad is not and anything is left out
};

// gradient[i] = sum_j (owned.grad[i] exp(l_ij - owned.lse[i]) + streamed.grad[j] exp(l_ij - streamed.lse[j]))
// streamed[j] / temperature, [R, d] of dtype. The first term is missing where owned.self[i] == j, the second where
// streamed.self[j] == first + i, both where the groups are equal. Grads may have been multiplied by *raised_by (null:
// they are not).
void lse_gradient(const Logits& logits, const LseSide& owned, const LseSide& streamed, int first,
                  const float* raised_by, void* gradient, float* workspace, Stream stream);

// gradient [N, d] = grad[n] mean[n] / temperature, and 0 where lse[n] is minus infinity.
void lse_gradient_from_mean(Dtype dtype, int num_rows, int width, const float* grad, const float* lse,
                            const float* mean, float temperature, void* gradient, Stream stream);

// Owned t, streamed c: lse [R], mean [R, d] and expected [R]: the mean of log_prior [S] (zeros where that is null).
void posterior_forward(const Logits& logits, const float* log_prior, float* lse, float* mean, float* expected,
                       float* workspace, Stream stream);

// Owned c, streamed t: marginal [R], the sum over t's rows of their probabilities, given their lse [S].
// Workspace: gradient_workspace(R, S, 1).
void posterior_marginal(const Logits& logits, const float* lse, float* marginal, float* workspace, Stream stream);

// The gradient of the logits is p (a.c + e u + w + h l - r); through the values comes p v. Null: zeros. a and v are
// [N, s] of dtype, aligned as the operands; lse, r, h, e [N]; u, w [K].
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
