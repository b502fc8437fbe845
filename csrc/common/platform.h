// CUDA, or its emulation on a CPU: every .cu file includes this header and compiles for both.
//
// Under nvcc it brings CUDA's headers and the few names below. Under a plain C++20 compiler with SSL_IB_EMULATED
// defined, emulated_cuda.h gives CUDA's names a meaning on the CPU, so that the same kernels, launchers and bindings
// run in tests on CPU tensors; emulator.h says how, and what it cannot show. Kernels live in namespace ssl_ib and use,
// of our own:
//   SSL_IB_SHARED(float, tile, [16][33]);      static shared memory (for a scalar: an empty third argument)
//   SSL_IB_DYNAMIC_SHARED(float, tiles);       the launch's dynamic shared memory, 128-byte aligned
//   launch(kernel<T>, grid, block, shared_bytes, stream, arguments...);
//   to_float(x), from_float<T>(x)              T: float, bf16, fp16
//   load<uint4>(pointer), store(pointer, vector)   vectors; the emulator checks their alignment
//   dispatch(dtype, [&](auto example) { using T = decltype(example); ... });
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "launch_types.h"

#ifdef SSL_IB_EMULATED
#include "emulated_cuda.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SSL_IB_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define SSL_IB_DYNAMIC_SHARED(type, name)                                     \
    extern __shared__ __align__(128) unsigned char ssl_ib_dynamic_shared[]; \
    type* const name = reinterpret_cast<type*>(ssl_ib_dynamic_shared)

namespace ssl_ib {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(fp16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) {
        return __float2bfloat16_rn(x);
    } else if constexpr (std::is_same_v<T, fp16>) {
        return __float2half_rn(x);
    } else {
        return x;
    }
}

// A vector of 4, 8 or 16 bytes of global memory; the pointer is a multiple of its size.
template <typename Vector>
__device__ __forceinline__ Vector load(const void* from) {
    return *static_cast<const Vector*>(from);
}

template <typename Vector>
__device__ __forceinline__ void store(void* to, Vector vector) {
    *static_cast<Vector*>(to) = vector;
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

// Starts a kernel; throws std::runtime_error where CUDA refuses the launch.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            std::type_identity_t<Parameters>... arguments) {
    // Above 48 KB a kernel has to ask.
    if (shared_bytes > 48 * 1024) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
              "shared memory");
    }
    kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
    check(cudaGetLastError(), "launch");
}

}  // namespace ssl_ib
#endif

namespace ssl_ib {

// Calls f with a value of the type that dtype stands for.
template <typename F>
void dispatch(Dtype dtype, F&& f) {
    switch (dtype) {
        case Dtype::float32: return f(float{});
        case Dtype::bfloat16: return f(bf16{});
        case Dtype::float16: return f(fp16{});
    }
}

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, std::type_identity_t<Integer> b) {
    return (a + b - 1) / b;
}

}  // namespace ssl_ib
