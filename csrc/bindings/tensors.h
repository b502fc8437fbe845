// What every binding does around a launcher: devices, dtypes, streams.
//
// Callers have checked shapes and values. What is checked here would otherwise be read as garbage: devices and dtypes.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/utils/pybind.h>

#include <initializer_list>
#include <limits>
#include <optional>

#ifndef SSL_IB_EMULATED
#include <c10/cuda/CUDAStream.h>
#endif

#include "../common/launch_types.h"

namespace ssl_ib {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

#ifdef SSL_IB_EMULATED
constexpr auto kDeviceType = c10::DeviceType::CPU;
#else
constexpr auto kDeviceType = c10::DeviceType::CUDA;
#endif

// The device of the tensors; throws unless they share one of the right kind. Undefined tensors are absent ones.
inline c10::Device shared_device(std::initializer_list<Tensor> tensors) {
    const c10::Device device = tensors.begin()->device();
    for (const Tensor& tensor : tensors) {
        TORCH_CHECK(!tensor.defined() || (tensor.device() == device && device.type() == kDeviceType),
                    "expected tensors on one ", kDeviceType, " device, got ", tensor.device(), " and ", device);
    }
    return device;
}

// Makes the tensors' device the current one for as long as it lives.
class OnDevice {
  public:
    OnDevice(std::initializer_list<Tensor> tensors) : device_(shared_device(tensors)), guard_(device_) {}

    // The stream that torch runs this device's work on.
    Stream stream() const {
#ifdef SSL_IB_EMULATED
        return nullptr;
#else
        return c10::cuda::getCurrentCUDAStream(device_.index()).stream();
#endif
    }

  private:
    c10::Device device_;
    c10::DeviceGuard guard_;
};

inline Dtype dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case at::kFloat: return Dtype::float32;
        case at::kBFloat16: return Dtype::bfloat16;
        case at::kHalf: return Dtype::float16;
        default: TORCH_CHECK(false, "expected float32, bfloat16 or float16, got ", tensor.scalar_type());
    }
}

// A count that a kernel holds in 32 bits.
inline int to_int(int64_t count) {
    TORCH_CHECK(count <= std::numeric_limits<int>::max(), "expected fewer than 2^31, got ", count);
    return static_cast<int>(count);
}

// Null for what is absent or not wanted.
inline void* pointer_or_null(const Tensor& tensor) {
    return tensor.defined() && tensor.numel() ? tensor.data_ptr() : nullptr;
}

inline float* float_pointer(const Tensor& tensor) { return static_cast<float*>(pointer_or_null(tensor)); }

// Float32 and contiguous, as kernels read parameters; undefined where there is none.
inline Tensor as_float(const OptionalTensor& tensor) {
    return tensor ? tensor->to(at::kFloat).contiguous() : Tensor();
}

}  // namespace ssl_ib
