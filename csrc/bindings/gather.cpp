// Python's entrance to the gather family: checks, outputs, launchers. The raw interface: tensors in, new tensors out.
//
// Shapes: B images, C channels, H x W pixels, p patch side, L tokens or patches, K kept, P prefix tokens, D width,
// G reconstructions.

#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../cuda/launch.h"
#include "tensors.h"

namespace ssl_ib {
namespace {

// `indices` has to outlive the launch.
Keep keep_of(const Tensor& indices) {
    TORCH_CHECK(indices.scalar_type() == at::kInt || indices.scalar_type() == at::kLong,
                "expected keep as int32 or int64, got ", indices.scalar_type());
    TORCH_CHECK(indices.is_contiguous());
    to_int(indices.numel());
    return {indices.const_data_ptr(), indices.scalar_type() == at::kLong, to_int(indices.size(0)),
            to_int(indices.size(1))};
}

Images images_of(const Tensor& images) {
    to_int(images[0].numel());
    return {images.const_data_ptr(), dtype_of(images),      to_int(images.size(0)), to_int(images.size(1)),
            to_int(images.size(2)),  to_int(images.size(3))};
}

Tensor token_gather_(const Tensor& x_, const Tensor& keep_) {
    const OnDevice device{x_, keep_};
    const Tensor x = x_.contiguous(), keep = keep_.contiguous();
    const Tensor out = at::empty({keep.size(0), keep.size(1), x.size(2)}, x.options());
    if (out.numel() == 0) return out;
    token_gather(dtype_of(x), x.const_data_ptr(), keep_of(keep), out.mutable_data_ptr(), to_int(x.size(1)),
                 to_int(x.size(2)), device.stream());
    return out;
}

Tensor token_gather_backward_(const Tensor& grad_, const Tensor& keep_, int64_t num_tokens) {
    const OnDevice device{grad_, keep_};
    const Tensor grad = grad_.contiguous(), keep = keep_.contiguous();
    const Tensor out = at::empty({grad.size(0), num_tokens, grad.size(2)}, grad.options());
    if (out.numel() == 0) return out;
    token_gather_backward(dtype_of(grad), grad.const_data_ptr(), keep_of(keep), out.mutable_data_ptr(),
                          to_int(num_tokens), to_int(grad.size(2)), device.stream());
    return out;
}

Tensor token_scatter_(const Tensor& latents_, const Tensor& keep_, const Tensor& mask_token_, int64_t num_tokens,
                      const OptionalTensor& pos_, int64_t num_prefix) {
    const OnDevice device{latents_, keep_, mask_token_, pos_.value_or(Tensor())};
    const Tensor latents = latents_.contiguous(), keep = keep_.contiguous();
    const Tensor mask_token = as_float(mask_token_), pos = as_float(pos_);
    const int64_t batch = latents.size(0), width = latents.size(2);
    const Tensor out = at::empty({batch, num_prefix + num_tokens, width}, latents.options());
    if (out.numel() == 0) return out;
    to_int(batch * (num_prefix + num_tokens));
    token_scatter(dtype_of(latents), latents.const_data_ptr(), keep_of(keep), float_pointer(mask_token),
                  float_pointer(pos), out.mutable_data_ptr(), to_int(num_tokens), to_int(num_prefix), to_int(width),
                  device.stream());
    return out;
}

std::tuple<Tensor, Tensor, Tensor> token_scatter_backward_(const Tensor& grad_, const Tensor& keep_, int64_t num_prefix,
                                                           bool want_latents, bool want_mask_token, bool want_pos) {
    const OnDevice device{grad_, keep_};
    const Tensor grad = grad_.contiguous(), keep = keep_.contiguous();
    const int64_t batch = grad.size(0), rows = grad.size(1), width = grad.size(2), num_tokens = rows - num_prefix;
    const auto floats = grad.options().dtype(at::kFloat);
    const Tensor dlatents = want_latents ? at::empty({batch, num_prefix + keep.size(1), width}, grad.options())
                                         : at::empty({0}, grad.options());
    if (grad.numel() == 0) {
        return {dlatents, at::zeros({want_mask_token ? width : 0}, floats),
                want_pos ? at::zeros({rows, width}, floats) : at::zeros({0}, floats)};
    }
    const Tensor dmask_token = at::empty({want_mask_token ? width : 0}, floats);
    const Tensor dpos = want_pos ? at::empty({rows, width}, floats) : at::empty({0}, floats);
    to_int(batch * rows);
    const Keep kept = keep_of(keep);
    const int64_t bytes = token_scatter_backward_scratch(kept, to_int(num_tokens), to_int(num_prefix), to_int(width),
                                                         want_mask_token, want_pos);
    const Tensor scratch = at::empty({bytes}, grad.options().dtype(at::kByte));
    token_scatter_backward(dtype_of(grad), grad.const_data_ptr(), kept, pointer_or_null(dlatents),
                           float_pointer(dmask_token), float_pointer(dpos), scratch.mutable_data_ptr(),
                           to_int(num_tokens), to_int(num_prefix), to_int(width), device.stream());
    return {dlatents, dmask_token, dpos};
}
// One patch's numbers: C*p*p.
int64_t depth_of(const Tensor& weight) { return weight.size(1) * weight.size(2) * weight.size(3); }

Tensor patch_embed_gather_(const Tensor& images_, const Tensor& keep_, const Tensor& weight_,
                           const OptionalTensor& bias_, const Tensor& pos_, const OptionalTensor& prefix_) {
    const OnDevice device{weight_, images_, keep_, bias_.value_or(Tensor()), pos_, prefix_.value_or(Tensor())};
    const Tensor images = images_.contiguous(), keep = keep_.contiguous(), weight = weight_.contiguous();
    const Tensor bias = as_float(bias_), pos = as_float(pos_), prefix = as_float(prefix_);
    const int64_t num_prefix = prefix.defined() ? prefix.size(0) : 0, width = weight.size(0);
    const Tensor out = at::empty({images.size(0), num_prefix + keep.size(1), width}, weight.options());
    if (out.numel() == 0) return out;
    to_int(out.size(0) * out.size(1));
    const Embedding embedding{images_of(images), keep_of(keep), to_int(weight.size(2)), to_int(pos.size(0)),
                              to_int(num_prefix), to_int(width), to_int(depth_of(weight)), float_pointer(bias),
                              float_pointer(pos), float_pointer(prefix)};
    patch_embed_gather(dtype_of(weight), embedding, weight.const_data_ptr(), out.mutable_data_ptr(), device.stream());
    return out;
}

// The gradients of weight and images are matrix products over the pixels of kept patches, or their like: of so many
// images at a time that such a matrix has at most 16 MB, and that the images' pixels are counted in 32 bits.
constexpr int64_t kChunkBytes = 16 << 20;
constexpr int64_t kChunkPixels = int64_t{1} << 31;

std::tuple<Tensor, Tensor, Tensor> patch_embed_gather_backward_(const Tensor& grad_, const Tensor& images_,
                                                                const Tensor& keep_, const Tensor& weight_,
                                                                int64_t num_prefix, bool want_images, bool want_weight,
                                                                bool want_pos) {
    const OnDevice device{weight_, grad_, images_, keep_};
    const Tensor grad = grad_.contiguous(), images = images_.contiguous(), keep = keep_.contiguous();
    const Tensor weight = weight_.contiguous();
    const int64_t batch = grad.size(0), kept = keep.size(1), width = weight.size(0), depth = depth_of(weight);
    const int side = to_int(weight.size(2));
    const int num_patches = to_int(images.size(2) / side * (images.size(3) / side));
    const auto floats = grad.options().dtype(at::kFloat), ints = grad.options().dtype(at::kInt);
    const Tensor dweight = want_weight ? at::zeros(weight.sizes(), floats) : at::empty({0}, floats);
    if (batch * kept * width * depth == 0 || num_patches == 0) {
        return {want_images ? at::zeros_like(images) : at::empty({0}, images.options()), dweight,
                want_pos ? at::zeros({num_patches, width}, floats) : at::empty({0}, floats)};
    }
    const Tensor dimages = want_images ? at::empty(images.sizes(), images.options()) : at::empty({0}, images.options());
    const Tensor dpos = want_pos ? at::empty({num_patches, width}, floats) : at::empty({0}, floats);
    const Dtype dtype = dtype_of(weight);
    const Keep keep_indices = keep_of(keep);
    to_int(batch * num_patches);
    const Tensor entries_of_tokens = at::empty({want_images || want_pos ? 2 * batch * num_patches : 0}, ints);
    int* const first = entries_of_tokens.mutable_data_ptr<int>();
    const Entries entries{first, first + batch * num_patches};
    if (want_images || want_pos) find_entries(keep_indices, entries, num_patches, device.stream());
    if (want_pos) {
        const int64_t bytes = sum_positions_scratch(keep_indices, num_patches, to_int(width));
        const Tensor scratch = at::empty({bytes}, grad.options().dtype(at::kByte));
        sum_positions(dtype_of(grad), grad.const_data_ptr(), keep_indices, entries, dpos.mutable_data_ptr<float>(),
                      scratch.mutable_data_ptr(), num_patches, to_int(num_prefix), to_int(width), device.stream());
    }
    if (!want_images && !want_weight) return {dimages, dweight, dpos};
    const Tensor matrix = weight.view({width, depth});
    const int64_t bytes_per_image = kept * depth * weight.element_size();
    const int64_t images_per_chunk =
        std::max<int64_t>(std::min(kChunkBytes / bytes_per_image, kChunkPixels / images[0].numel()), 1);
    for (int64_t begin = 0; begin < batch; begin += images_per_chunk) {
        const int64_t count = std::min(images_per_chunk, batch - begin), rows = count * kept;
        const Tensor tokens = grad.narrow(0, begin, count).narrow(1, num_prefix, kept).to(weight.scalar_type());
        const Tensor dtokens = tokens.reshape({rows, width});
        if (want_weight) {
            const Tensor pixels = at::empty({rows, depth}, weight.options());
            gather_pixels(dtype, images_of(images), keep_indices, side, to_int(begin), to_int(count),
                          pixels.mutable_data_ptr(), device.stream());
            dweight.view({width, depth}).add_(at::mm(dtokens.t(), pixels));
        }
        if (want_images) {
            const Tensor dpixels = at::mm(dtokens, matrix);
            spread_pixels(dtype, dpixels.const_data_ptr(), images_of(images), keep_indices, entries, side,
                          to_int(begin), to_int(count), dimages.narrow(0, begin, count).mutable_data_ptr(),
                          device.stream());
        }
    }
    return {dimages, dweight, dpos};
}

int side_of(const Tensor& pred, const Tensor& images) {
    return static_cast<int>(std::lround(std::sqrt(pred.size(2) / images.size(1))));
}

Tensor masked_patch_mse_(const Tensor& pred_, const Tensor& images_, const Tensor& mask_, bool norm_pix) {
    const OnDevice device{pred_, images_, mask_};
    const Tensor pred = pred_.contiguous(), images = images_.contiguous(), mask = mask_.contiguous();
    const auto floats = pred.options().dtype(at::kFloat);
    if (pred.numel() == 0) return at::zeros({2}, floats);
    to_int(pred.size(0) * pred.size(1));
    const Tensor out = at::empty({2}, floats);
    const Tensor scratch = at::empty({masked_patch_mse_scratch()}, pred.options().dtype(at::kByte));
    masked_patch_mse(dtype_of(pred), pred.const_data_ptr(), images_of(images), mask.const_data_ptr<bool>(), norm_pix,
                     side_of(pred, images), to_int(pred.size(0) / images.size(0)), out.mutable_data_ptr<float>(),
                     scratch.mutable_data_ptr(), device.stream());
    return out;
}

Tensor masked_patch_mse_backward_(const Tensor& scale_, const Tensor& pred_, const Tensor& images_, const Tensor& mask_,
                                  bool norm_pix) {
    const OnDevice device{pred_, scale_, images_, mask_};
    const Tensor scale = scale_.contiguous(), pred = pred_.contiguous(), images = images_.contiguous();
    const Tensor mask = mask_.contiguous(), dpred = at::empty(pred.sizes(), pred.options());
    if (pred.numel() == 0) return dpred;
    to_int(pred.size(0) * pred.size(1));
    masked_patch_mse_backward(dtype_of(pred), scale.const_data_ptr<float>(), pred.const_data_ptr(), images_of(images),
                              mask.const_data_ptr<bool>(), norm_pix, side_of(pred, images),
                              to_int(pred.size(0) / images.size(0)), dpred.mutable_data_ptr(), device.stream());
    return dpred;
}

}  // namespace

void register_gather(pybind11::module_& m) {
    using pybind11::arg;
    m.def("token_gather", &token_gather_, arg("x"), arg("keep"));
    m.def("token_gather_backward", &token_gather_backward_, arg("grad"), arg("keep"), arg("num_tokens"));
    m.def("token_scatter", &token_scatter_, arg("latents"), arg("keep"), arg("mask_token"), arg("num_tokens"),
          arg("pos"), arg("num_prefix"));
    m.def("token_scatter_backward", &token_scatter_backward_, arg("grad"), arg("keep"), arg("num_prefix"),
          arg("want_latents"), arg("want_mask_token"), arg("want_pos"));
    m.def("patch_embed_gather", &patch_embed_gather_, arg("images"), arg("keep"), arg("weight"), arg("bias"),
          arg("pos"), arg("prefix"));
    m.def("patch_embed_gather_backward", &patch_embed_gather_backward_, arg("grad"), arg("images"), arg("keep"),
          arg("weight"), arg("num_prefix"), arg("want_images"), arg("want_weight"), arg("want_pos"));
    m.def("masked_patch_mse", &masked_patch_mse_, arg("pred"), arg("images"), arg("mask"), arg("norm_pix"));
    m.def("masked_patch_mse_backward", &masked_patch_mse_backward_, arg("scale"), arg("pred"), arg("images"),
          arg("mask"), arg("norm_pix"));
}

}  // namespace ssl_ib
