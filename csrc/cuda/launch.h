// The launchers of the gather family, for the bindings. Tensors are contiguous; counts are below 2^31; offsets are
// 64 bits wide inside. An index out of range gives numbers without a meaning, never an access out of bounds.
//
// Shapes: B images, C channels, H x W pixels, p patch side, L tokens or patches, K kept, P prefix tokens, D width,
// G reconstructions.
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

// weight [D, C, p, p] -> out [B, P+K, D], both of dtype, to which pixels are converted first.
void patch_embed_gather(Dtype dtype, const Embedding& embedding, const void* weight, void* out, Stream stream);

// Fills entries, both [B, L].
void find_entries(Keep keep, Entries entries, int num_tokens, Stream stream);

// grad [B, P+K, D] -> dpos [L, D].
void sum_positions(Dtype dtype, const void* grad, Keep keep, Entries entries, float* dpos, void* scratch,
                   int num_patches, int num_prefix, int width, Stream stream);

// Bytes of scratch that it needs.
int64_t sum_positions_scratch(Keep keep, int num_patches, int width);

// The kept patches of `count` images from image `begin` on -> out [count * K, C*p*p].
void gather_pixels(Dtype dtype, Images images, Keep keep, int side, int begin, int count, void* out, Stream stream);

// dpixels [count * K, C*p*p] -> dimages [count, C, H, W] in the images' dtype, those from `begin` on.
void spread_pixels(Dtype dtype, const void* dpixels, Images images, Keep keep, Entries entries, int side, int begin,
                   int count, void* dimages, Stream stream);

// pred [G, L, p*p*C], mask [G, L], G = B * per_image -> out [2]: sums of the patches' mean squared errors over the
// hidden patches and over the visible ones. A patch has at most 18432 numbers.
void masked_patch_mse(Dtype dtype, const void* pred, Images images, const bool* mask, bool norm_pix, int side,
                      int per_image, float* out, void* scratch, Stream stream);

// Bytes of scratch that it needs.
int64_t masked_patch_mse_scratch();

// dpred = (pred - target) * scale [2], the first for hidden patches.
void masked_patch_mse_backward(Dtype dtype, const float* scale, const void* pred, Images images, const bool* mask,
                               bool norm_pix, int side, int per_image, void* dpred, Stream stream);

}  // namespace ssl_ib
