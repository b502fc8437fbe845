// Python's entrance to the softmax family: operands made ready, outputs, launchers. The raw interface: tensors in, new
// tensors out.
//
// Shapes: N rows (t), M columns, K prototypes (c), d width.

#include <ATen/TensorOperators.h>
#include <ATen/ops/add.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/clamp_min.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/div.h>
#include <ATen/ops/exp2.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>

#include <tuple>
#include <utility>

#include "../cuda/launch_softmax.h"
#include "tensors.h"
#ifdef SSL_IB_EMULATED
#include "../common/wgmma.h"
#endif

namespace ssl_ib {
namespace {

using at::IntArrayRef;

// An operand as the kernels read it: contiguous, 16-byte aligned, and its rows filled up with zeros to a multiple of 8.
Tensor operand(const Tensor& x) {
    const int64_t missing = (8 - x.size(1) % 8) % 8;
    const Tensor whole = missing ? at::constant_pad_nd(x, {0, missing}) : x.contiguous();
    return reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % 16 ? whole.clone() : whole;
}

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// Numbers of columns. One that int32 cannot hold is out of range, and stays so.
Tensor as_int(const OptionalTensor& tensor) {
    if (!tensor) return Tensor();
    const bool is_long = tensor->scalar_type() == at::kLong;
    return (is_long ? tensor->clamp(-1, std::numeric_limits<int>::max()) : *tensor).to(at::kInt).contiguous();
}

// The low and the high words [2, N] of labels.
Tensor words_of(const OptionalTensor& labels) {
    return labels->to(at::kLong).contiguous().view(at::kInt).view({-1, 2}).t().contiguous();
}

// Both sides' labels, or neither: one side's alone say nothing.
std::pair<Tensor, Tensor> labels_of(const OptionalTensor& rows, const OptionalTensor& cols) {
    return rows && cols ? std::pair{words_of(rows), words_of(cols)} : std::pair<Tensor, Tensor>{};
}

Labels label_pointers(const Tensor& words) {
    if (!words.defined()) return {};
    return {words.const_data_ptr<int>(), words.const_data_ptr<int>() + words.size(1)};
}

const int* int_pointer(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr<int>() : nullptr; }

Tensor floats(const Tensor& like, IntArrayRef shape) { return at::empty(shape, like.options().dtype(at::kFloat)); }

Tensor float_zeros(const Tensor& like, IntArrayRef shape) {
    return at::zeros(shape, like.options().dtype(at::kFloat));
}

// The greatest squared lengths of both operands' rows, as the kernels measure them: int32 [2].
Tensor measured(const OnDevice& device, const Tensor& x, const Tensor& y) {
    const Tensor bound = at::zeros({2}, x.options().dtype(at::kInt));
    auto* const numbers = reinterpret_cast<unsigned*>(bound.mutable_data_ptr<int>());
    longest_rows(dtype_of(x), x.const_data_ptr(), to_int(x.size(0)), to_int(x.size(1)), numbers, device.stream());
    longest_rows(dtype_of(y), y.const_data_ptr(), to_int(y.size(0)), to_int(y.size(1)), numbers + 1, device.stream());
    return bound;
}

// Null where a maximum has to be taken: float16 cannot hold the weights of a mean of which none was.
const unsigned* bound_or_null(const Tensor& bound, const Tensor& operand, bool with_mean) {
    if (with_mean && operand.scalar_type() == at::kHalf) return nullptr;
    return reinterpret_cast<const unsigned*>(bound.const_data_ptr<int>());
}

float* room(const Tensor& workspace) { return workspace.numel() ? workspace.mutable_data_ptr<float>() : nullptr; }

// The logits of two operands, of which the first is owned; width is d.
Logits logits_of(const Tensor& owned, const Tensor& streamed, int64_t width, double temperature) {
    TORCH_CHECK(owned.scalar_type() == streamed.scalar_type(), "expected operands of one dtype, got ",
                owned.scalar_type(), " and ", streamed.scalar_type());
    return {dtype_of(owned),       owned.const_data_ptr(),   streamed.const_data_ptr(),
            to_int(owned.size(0)), to_int(streamed.size(0)), to_int(width),
            to_int(owned.size(1)), static_cast<float>(temperature)};
}

// What to multiply float16 weights of at most `bound` by: the power of two that takes them close to its largest number,
// so that what is 2^28 times smaller is still a normal one. 1 where the bound is infinite or not a number.
Tensor raise(const Tensor& bound) {
    return at::where(bound.isfinite(), at::exp2((14.0 - bound.log2()).floor().clamp(-60, 60)), 1.0);
}

Tensor raised(const Tensor& x, const Tensor& by) { return x.defined() ? x * by : x; }

// The same, rounded to float16 without a float32 tensor in between.
Tensor raised_operand(const Tensor& x, const Tensor& by) {
    if (!x.defined()) return x;
    Tensor answer = at::empty(x.sizes(), x.options().dtype(at::kHalf));
    return at::mul_out(answer, x, by);
}

Tensor largest(const Tensor& x, const Tensor& like) { return x.defined() ? x.abs().amax() : float_zeros(like, {}); }

// ---- Logsumexp ----

std::tuple<Tensor, Tensor, Tensor, Tensor> lse_(const Tensor& rows_, const Tensor& cols_, double temperature,
                                                const OptionalTensor& self_index, const OptionalTensor& row_label,
                                                const OptionalTensor& col_label, bool drop, bool with_mean) {
    const OnDevice device{rows_, cols_, or_undefined(self_index), or_undefined(row_label), or_undefined(col_label)};
    const int64_t num_rows = rows_.size(0), width = rows_.size(1);
    const bool labelled = row_label && col_label;
    const Tensor lse = floats(rows_, {num_rows});
    const Tensor mean = with_mean ? floats(rows_, {num_rows, width}) : floats(rows_, {0});
    if (num_rows == 0 || cols_.size(0) == 0) {
        const int64_t size = labelled ? num_rows : 0;
        return {lse.fill_(-INFINITY), mean.zero_(), float_zeros(rows_, {size}), float_zeros(rows_, {size})};
    }
    const Tensor rows = operand(rows_), cols = operand(cols_);
    const Tensor self = as_int(self_index);
    const auto [of_rows, of_cols] = labels_of(row_label, col_label);
    const Logits logits = logits_of(rows, cols, width, temperature);
    const Tensor workspace = floats(rows, {forward_workspace(logits, with_mean, false, labelled)});
    const Tensor bound = measured(device, rows, cols), positive = floats(rows, {2, labelled ? num_rows : 0});
    lse_forward(logits, {int_pointer(self), label_pointers(of_rows), label_pointers(of_cols), drop},
                bound_or_null(bound, rows, with_mean), lse.mutable_data_ptr<float>(),
                with_mean ? mean.mutable_data_ptr<float>() : nullptr, float_pointer(positive), room(workspace),
                device.stream());
    const Tensor count = positive.select(0, 1).clone();
    return {lse, mean, positive.select(0, 0) / count.clamp_min(1), count};
}

// One side of a gradient, and the tensors that keep its pointers alive.
struct Side {
    Tensor grad, lse, pull, self, label;
    operator LseSide() const {
        return {float_pointer(grad), float_pointer(lse), float_pointer(pull), int_pointer(self), label_pointers(label)};
    }
};

// The self index where anything is left out: no column where there is none of its own.
Tensor self_or_none(const OptionalTensor& self, const Tensor& like, int64_t count) {
    return self ? as_int(self) : at::full({count}, -1, like.options().dtype(at::kInt));
}

// The gradient to the owned rows [R, d] of `width` d, by both sides' answers.
Tensor gradient_of_lse(const OnDevice& device, const Tensor& owned, const Tensor& streamed, int64_t width,
                       double temperature, Side of_owned, Side of_streamed, int64_t first, bool drop) {
    Tensor by;
    if (owned.scalar_type() == at::kHalf) {
        // A pair's weight is at most what one row's gradient and pull are together, for both sides.
        const auto most = [&](const Side& side) { return largest(side.grad, owned) + largest(side.pull, owned); };
        by = raise(at::maximum(most(of_owned), most(of_streamed)));
        for (Side* side : {&of_owned, &of_streamed}) {
            side->grad = raised(side->grad, by), side->pull = raised(side->pull, by);
        }
    }
    const Logits logits = logits_of(owned, streamed, width, temperature);
    const Tensor gradient = at::empty({owned.size(0), width}, owned.options());
    const Tensor workspace =
        floats(owned, {gradient_workspace(logits.num_owned, logits.num_streamed, logits.width)});
    lse_gradient(logits, of_owned, of_streamed, to_int(first), drop, by.defined() ? float_pointer(by) : nullptr,
                 gradient.mutable_data_ptr(), room(workspace), device.stream());
    return gradient;
}

Tensor contiguous(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

std::tuple<Tensor, Tensor> lse_backward_(const Tensor& grad_, const Tensor& lse_, const OptionalTensor& pull_,
                                         const Tensor& mean_, const Tensor& rows_, const Tensor& cols_,
                                         double temperature, const OptionalTensor& self_index,
                                         const OptionalTensor& row_label, const OptionalTensor& col_label, bool drop,
                                         bool want_rows, bool want_cols) {
    const bool from_mean = mean_.numel() > 0, labelled = row_label && col_label;
    const OnDevice device{rows_,
                          cols_,
                          grad_,
                          lse_,
                          or_undefined(pull_),
                          from_mean ? mean_ : Tensor(),
                          or_undefined(self_index),
                          or_undefined(row_label),
                          or_undefined(col_label)};
    const int64_t num_rows = rows_.size(0), num_cols = cols_.size(0), width = rows_.size(1);
    Tensor drows = at::empty({0}, rows_.options()), dcols = drows;
    if (num_rows == 0 || num_cols == 0) {
        if (want_rows) drows = at::zeros({num_rows, width}, rows_.options());
        if (want_cols) dcols = at::zeros({num_cols, width}, cols_.options());
        return {drows, dcols};
    }
    const Tensor rows = operand(rows_), cols = operand(cols_);
    const auto [label_of_rows, label_of_cols] = labels_of(row_label, col_label);
    Side of_rows{grad_.contiguous(), lse_.contiguous(), labelled ? contiguous(pull_) : Tensor(), Tensor(),
                 label_of_rows};
    if (self_index || labelled) of_rows.self = self_or_none(self_index, rows, num_rows);
    if (want_rows && from_mean) {
        const Tensor mean = mean_.contiguous();
        drows = at::empty({num_rows, width}, rows_.options());
        lse_gradient_from_mean(logits_of(rows, cols, width, temperature), of_rows, label_pointers(label_of_cols),
                               float_pointer(mean), drows.mutable_data_ptr(), device.stream());
    }
    const Side of_cols{Tensor(), Tensor(), Tensor(), Tensor(), label_of_cols};
    if (want_rows && !from_mean) {
        drows = gradient_of_lse(device, rows, cols, width, temperature, of_rows, of_cols, 0, drop);
    }
    if (want_cols) dcols = gradient_of_lse(device, cols, rows, width, temperature, of_cols, of_rows, 0, drop);
    return {drows, dcols};
}

Tensor lse_backward_symmetric_(const Tensor& rows_, const Tensor& cols_, const Tensor& grad_rows,
                               const Tensor& lse_rows, const OptionalTensor& pull_rows, const Tensor& grad_cols,
                               const Tensor& lse_cols, const OptionalTensor& pull_cols, double temperature,
                               const OptionalTensor& self_rows, const OptionalTensor& self_cols,
                               const OptionalTensor& row_label, const OptionalTensor& col_label, bool drop,
                               int64_t first) {
    const OnDevice device{rows_,
                          cols_,
                          grad_rows,
                          lse_rows,
                          or_undefined(pull_rows),
                          grad_cols,
                          lse_cols,
                          or_undefined(pull_cols),
                          or_undefined(self_rows),
                          or_undefined(self_cols),
                          or_undefined(row_label),
                          or_undefined(col_label)};
    if (rows_.size(0) == 0 || cols_.size(0) == 0) return at::zeros(rows_.sizes(), rows_.options());
    const Tensor rows = operand(rows_), cols = operand(cols_);
    const bool labelled = row_label && col_label;
    const auto [label_of_rows, label_of_cols] = labels_of(row_label, col_label);
    const Side of_rows{grad_rows.contiguous(), lse_rows.contiguous(), labelled ? contiguous(pull_rows) : Tensor(),
                       as_int(self_rows), label_of_rows};
    const Side of_cols{grad_cols.contiguous(), lse_cols.contiguous(), labelled ? contiguous(pull_cols) : Tensor(),
                       self_or_none(self_cols, cols, cols.size(0)), label_of_cols};
    return gradient_of_lse(device, rows, cols, rows_.size(1), temperature, of_rows, of_cols, first, drop);
}

// ---- Posterior ----

std::tuple<Tensor, Tensor, Tensor, Tensor> posterior_(const Tensor& t_, const Tensor& c_, double temperature,
                                                      const OptionalTensor& log_prior_, bool want_marginal) {
    const OnDevice device{t_, c_, or_undefined(log_prior_)};
    const int64_t num_rows = t_.size(0), num_prototypes = c_.size(0), width = t_.size(1);
    const Tensor lse = floats(t_, {num_rows}), mean = floats(t_, {num_rows, width}), expected = floats(t_, {num_rows});
    if (num_rows == 0) return {lse, mean, expected, float_zeros(t_, {want_marginal ? num_prototypes : 0})};
    const Tensor t = operand(t_), c = operand(c_), log_prior = as_float(log_prior_);
    const Logits logits = logits_of(t, c, width, temperature);
    const Tensor workspace = floats(t, {forward_workspace(logits, true, true, false)});
    const Tensor bound = measured(device, t, c);
    posterior_forward(logits, float_pointer(log_prior), bound_or_null(bound, t, true), lse.mutable_data_ptr<float>(),
                      mean.mutable_data_ptr<float>(), expected.mutable_data_ptr<float>(), room(workspace),
                      device.stream());
    const Tensor marginal = floats(t, {want_marginal ? num_prototypes : 0});
    if (want_marginal) {
        const Logits transposed = logits_of(c, t, width, temperature);
        const Tensor parts = floats(t, {gradient_workspace(transposed.num_owned, transposed.num_streamed, 1)});
        posterior_marginal(transposed, lse.const_data_ptr<float>(), marginal.mutable_data_ptr<float>(), room(parts),
                           device.stream());
    }
    return {lse, mean, expected, marginal};
}

// A bound on the weights of both gradients of the posterior, in terms of the largest numbers that they are made of.
Tensor bound_of(const Tensor& t, const Tensor& c, double temperature, const Tensor& r, const Tensor& h,
                const Tensor& a, const Tensor& v, const Tensor& e, const Tensor& u, const Tensor& w) {
    const auto longest = [&](const Tensor& x) {
        return x.defined() ? at::linalg_vector_norm(x, 2, IntArrayRef{1}, false, at::kFloat).amax()
                           : float_zeros(t, {});
    };
    // Not less than 1, so that the numbers of `a` themselves are bounded as well.
    const Tensor prototype = longest(c).clamp_min(1.0);
    const Tensor slope = longest(a) * prototype + largest(e, t) * largest(u, t) + largest(w, t) +
                         largest(h, t) * longest(t) * prototype / temperature + largest(r, t);
    return at::maximum(slope * std::max(1.0, 1.0 / temperature), largest(v, t) / kHalfValueRaise);
}

// Gradients to t and c. A term that is absent is zero, and so is the product of e and u where one of them is.
std::tuple<Tensor, Tensor> posterior_backward_(const Tensor& t_, const Tensor& c_, double temperature,
                                               const Tensor& lse_, const OptionalTensor& r_,
                                               const OptionalTensor& h_, const OptionalTensor& a_,
                                               const OptionalTensor& v_, const OptionalTensor& e_,
                                               const OptionalTensor& u_, const OptionalTensor& w_, bool want_t,
                                               bool want_c) {
    const OnDevice device{t_,
                          c_,
                          lse_,
                          or_undefined(r_),
                          or_undefined(h_),
                          or_undefined(a_),
                          or_undefined(v_),
                          or_undefined(e_),
                          or_undefined(u_),
                          or_undefined(w_)};
    const int64_t num_rows = t_.size(0), width = t_.size(1);
    Tensor dt = at::empty({0}, t_.options()), dc = dt;
    if (num_rows == 0) {
        if (want_t) dt = at::zeros(t_.sizes(), t_.options());
        if (want_c) dc = at::zeros(c_.sizes(), c_.options());
        return {dt, dc};
    }
    const Tensor t = operand(t_), c = operand(c_), lse = as_float(lse_), u = as_float(u_);
    Tensor r = as_float(r_), h = as_float(h_), e = as_float(e_), w = as_float(w_);
    Tensor a = or_undefined(a_), v = or_undefined(v_), by;
    if (t.scalar_type() == at::kHalf) {
        by = raise(bound_of(t, c, temperature, r, h, a, v, e, u, w));
        r = raised(r, by), h = raised(h, by), e = raised(e, by), w = raised(w, by);
        a = raised_operand(a, by), v = raised_operand(v, by / kHalfValueRaise);
    }
    const auto to_operand = [&](const Tensor& x) { return x.defined() ? operand(x.to(t.scalar_type())) : x; };
    a = to_operand(a), v = to_operand(v);
    const PosteriorTerms terms{float_pointer(lse),
                               float_pointer(r),
                               float_pointer(h),
                               float_pointer(e),
                               float_pointer(u),
                               float_pointer(w),
                               a.defined() ? a.const_data_ptr() : nullptr,
                               v.defined() ? v.const_data_ptr() : nullptr,
                               by.defined() ? float_pointer(by) : nullptr};
    const auto gradient = [&](const Tensor& owned, const Tensor& streamed, auto launcher) {
        const Logits logits = logits_of(owned, streamed, width, temperature);
        const Tensor answer = at::empty({owned.size(0), width}, owned.options());
        const Tensor workspace =
            floats(owned, {gradient_workspace(logits.num_owned, logits.num_streamed, logits.width)});
        launcher(logits, terms, answer.mutable_data_ptr(), room(workspace), device.stream());
        return answer;
    };
    if (want_t) dt = gradient(t, c, posterior_gradient_t);
    if (want_c) dc = gradient(c, t, posterior_gradient_c);
    return {dt, dc};
}

}  // namespace

void register_softmax(pybind11::module_& m) {
    using pybind11::arg;
    m.def("lse", &lse_, arg("rows"), arg("cols"), arg("temperature"), arg("self_index"), arg("row_label"),
          arg("col_label"), arg("drop"), arg("with_mean"));
    m.def("lse_backward", &lse_backward_, arg("grad"), arg("lse"), arg("pull"), arg("mean"), arg("rows"), arg("cols"),
          arg("temperature"), arg("self_index"), arg("row_label"), arg("col_label"), arg("drop"), arg("want_rows"),
          arg("want_cols"));
    m.def("lse_backward_symmetric", &lse_backward_symmetric_, arg("rows"), arg("cols"), arg("grad_rows"),
          arg("lse_rows"), arg("pull_rows"), arg("grad_cols"), arg("lse_cols"), arg("pull_cols"), arg("temperature"),
          arg("self_rows"), arg("self_cols"), arg("row_label"), arg("col_label"), arg("drop"), arg("first"));
    m.def("posterior", &posterior_, arg("t"), arg("c"), arg("temperature"), arg("log_prior"), arg("want_marginal"));
    m.def("posterior_backward", &posterior_backward_, arg("t"), arg("c"), arg("temperature"), arg("lse"), arg("r"),
          arg("h"), arg("a"), arg("v"), arg("e"), arg("u"), arg("w"), arg("want_t"), arg("want_c"));
#ifdef SSL_IB_EMULATED
    m.def(
        "use_warpgroups", [](bool on) { emulate_warpgroups = on; }, arg("on"),
        "Whether the emulated GPU has Hopper's tensor-core instructions; false at first.");
#endif
}

}  // namespace ssl_ib
