// The launchers of the gather family, for the bindings. Tensors are contiguous; counts are below 2^31; offsets are
// 64 bits wide inside. An index out of range names no token.
//
// Shapes: B images, L tokens, K kept, P prefix tokens, D width.
#pragma once

#include <cstddef>

#include "../common/launch_types.h"

namespace ssl_ib {

// x [B, L, D] -> out [B, K, D].
void token_gather(Dtype dtype, const void* x, Keep keep, void* out, int num_tokens, int width, Stream stream);

// grad [B, K, D] -> out [B, L, D]: the sum over the k that name a token.
void token_gather_backward(Dtype dtype, const void* grad, Keep keep, void* out, int num_tokens, int width,
                           Stream stream);

// latents [B, P+K, D], mask_token [D] and pos [P+L, D] or null, both float32 -> out [B, P+L, D].
void token_scatter(Dtype dtype, const void* latents, Keep keep, const float* mask_token, const float* pos, void* out,
                   int num_tokens, int num_prefix, int width, Stream stream);

// grad [B, P+L, D] -> dlatents [B, P+K, D], and in float32 dmask_token [D] and dpos [P+L, D]; null: not wanted.
void token_scatter_backward(Dtype dtype, const void* grad, Keep keep, void* dlatents, float* dmask_token, float* dpos,
                            void* scratch, int num_tokens, int num_prefix, int width, Stream stream);

// Bytes of scratch that it needs.
int64_t token_scatter_backward_scratch(Keep keep, int num_tokens, int num_prefix, int width, bool want_mask_token,
                                       bool want_pos);

}  // namespace ssl_ib
