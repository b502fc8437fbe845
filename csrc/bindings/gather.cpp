// Python's entrance to the gather family: checks, outputs, launchers. The raw interface: tensors in, new tensors out.
//
// Shapes: B images, L tokens, K kept, P prefix tokens, D width.

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

}  // namespace

void register_gather(pybind11::module_& m) {
    using pybind11::arg;
    m.def("token_gather", &token_gather_, arg("x"), arg("keep"));
    m.def("token_gather_backward", &token_gather_backward_, arg("grad"), arg("keep"), arg("num_tokens"));
    m.def("token_scatter", &token_scatter_, arg("latents"), arg("keep"), arg("mask_token"), arg("num_tokens"),
          arg("pos"), arg("num_prefix"));
    m.def("token_scatter_backward", &token_scatter_backward_, arg("grad"), arg("keep"), arg("num_prefix"),
          arg("want_latents"), arg("want_mask_token"), arg("want_pos"));
}

}  // namespace ssl_ib
