// CUDA's names on the CPU, on top of emulator.h: what platform.h brings where there is no nvcc.
#pragma once

#include <algorithm>
#include <cmath>

#include "emulator.h"
#include "launch_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::ssl_ib::emulator::machine.current->index)
#define blockIdx (::ssl_ib::emulator::machine.block_index)
#define blockDim (::ssl_ib::emulator::machine.block)
#define gridDim (::ssl_ib::emulator::machine.grid)

#define SSL_IB_SHARED(type, name, ...)                                                            \
    static char name##_key;                                                                       \
    typedef type name##_type __VA_ARGS__;                                                         \
    name##_type& name =                                                                           \
        *static_cast<name##_type*>(::ssl_ib::emulator::static_shared(&name##_key, sizeof(name##_type)))
#define SSL_IB_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::ssl_ib::emulator::machine.shared)

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace ssl_ib {

using std::max;
using std::min;

// ---- Numbers ----

using fp16 = _Float16;

struct bf16 {
    uint16_t bits;
};

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __expf(float x) { return std::exp(x); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline float to_float(fp16 x) { return static_cast<float>(x); }

// Rounds to the nearest, ties to even.
template <typename T>
T from_float(float x) {
    if constexpr (std::is_same_v<T, bf16>) {
        const unsigned bits = __float_as_uint(x);
        if (std::isnan(x)) return {0x7FFF};
        return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
    } else {
        return static_cast<T>(x);
    }
}

// ---- Memory ----

inline void check_alignment(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
        emulator::fail("a vector of " + std::to_string(bytes) + " bytes that is not aligned to them");
    }
}

template <typename Vector>
Vector load(const void* from) {
    check_alignment(from, sizeof(Vector));
    return *static_cast<const Vector*>(from);
}

template <typename Vector>
void store(void* to, const Vector& vector) {
    check_alignment(to, sizeof(Vector));
    *static_cast<Vector*>(to) = vector;
}

// On integers only: their result does not depend on the order.
inline int atomicMax(int* at, int value) { return std::exchange(*at, max(*at, value)); }
inline unsigned atomicMax(unsigned* at, unsigned value) { return std::exchange(*at, max(*at, value)); }
inline int atomicMin(int* at, int value) { return std::exchange(*at, min(*at, value)); }

// ---- Threads ----

inline void __syncthreads(emulator::Place place = emulator::Place::current()) { emulator::barrier(place); }

// The value of lane `source`; unset memory where that lane takes no part.
template <typename T>
T shuffle(unsigned mask, T value, unsigned source, emulator::Place place) {
    static_assert(std::is_trivially_copyable_v<T>);
    struct Shuffle {
        T value, received;
        unsigned source;
    } mine{value, value, source};
    emulator::warp_operation(
        mask, mine,
        [](const emulator::Contributions& lanes) {
            for (void* lane : lanes) {
                if (!lane) continue;
                Shuffle& to = *static_cast<Shuffle*>(lane);
                if (const void* from = lanes[to.source]) {
                    to.received = static_cast<const Shuffle*>(from)->value;
                } else {
                    std::memset(&to.received, emulator::kUnset >> 8, sizeof(T));
                }
            }
        },
        place);
    return mine.received;
}

// A bit for each lane of the mask whose predicate holds.
inline unsigned __ballot_sync(unsigned mask, bool predicate, emulator::Place place = emulator::Place::current()) {
    struct Vote {
        bool predicate;
        unsigned answer;
    } mine{predicate, 0};
    emulator::warp_operation(
        mask, mine,
        [](const emulator::Contributions& lanes) {
            unsigned answer = 0;
            for (int i = 0; i < 32; ++i) {
                if (lanes[i] && static_cast<const Vote*>(lanes[i])->predicate) answer |= 1u << i;
            }
            for (void* lane : lanes) {
                if (lane) static_cast<Vote*>(lane)->answer = answer;
            }
        },
        place);
    return mine.answer;
}

inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }

inline unsigned lane_id() { return emulator::machine.current->rank % 32; }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  emulator::Place place = emulator::Place::current()) {
    const unsigned source = lane_id() ^ bits;
    return shuffle(mask, value, source > (lane_id() | (width - 1)) ? lane_id() : source, place);
}

// Runs the kernel to its end; throws std::runtime_error for what emulator.h lists.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            std::type_identity_t<Parameters>... arguments) {
    emulator::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace ssl_ib
