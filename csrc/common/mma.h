// Tensor-core instructions of sm_80 and later: products of a warp, the loads that feed them, asynchronous copies.
//
// The emulated face states what PTX says of each instruction, lane by lane (PTX ISA, "Matrix Fragments for mma.m16n8k16
// with floating point type", "Warp-level matrix load instruction: ldmatrix"); it knows nothing of the loaders above it.
//   mma_16816<T>(d, a, b)            d [16, 8] += a [16, 16] b [16, 8]; T: bf16 or fp16, sums in float32
//   ldmatrix_x4(words, row)          four matrices of 8 rows of 16 bytes; lane i points at row i % 8 of matrix i / 8
//   ldmatrix_x4_trans(words, row)    the same, each matrix transposed
//   copy_async<bytes>(to, from, valid), commit_copies(), wait_for_copies<pending>()
//   pack2<T>(low, high)              two floats rounded into one word; half_of<T>(word, which) takes one out
#pragma once

#include <cstring>

#include "platform.h"

namespace ssl_ib {

#ifdef SSL_IB_EMULATED

// One of the two numbers in a word, the low one first.
template <typename T>
float half_of(uint32_t word, int which) {
    T number;
    std::memcpy(&number, reinterpret_cast<const char*>(&word) + 2 * which, 2);
    return to_float(number);
}

template <typename T>
uint32_t pack2(float low, float high) {
    const T numbers[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t word;
    std::memcpy(&word, numbers, 4);
    return word;
}

template <typename T>
void mma_16816(float* d, const uint32_t* a, const uint32_t* b, emulator::Place place = emulator::Place::current()) {
    struct Fragments {
        float* d;
        const uint32_t *a, *b;
    } mine{d, a, b};
    const auto multiply = [](const emulator::Contributions& lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            if (!lanes[lane]) emulator::fail("mma needs all lanes of its warp");
            const Fragments& of = *static_cast<const Fragments*>(lanes[lane]);
            const int group = lane >> 2, member = lane % 4;
            for (int i = 0; i < 8; ++i) {
                const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
                const int column = member * 2 + (i & 1) + (i < 4 ? 0 : 8);
                left[row][column] = half_of<T>(of.a[i / 2], i % 2);
            }
            for (int i = 0; i < 4; ++i) {
                const int row = member * 2 + (i & 1) + (i < 2 ? 0 : 8);
                right[row][group] = half_of<T>(of.b[i / 2], i % 2);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            const Fragments& of = *static_cast<const Fragments*>(lanes[lane]);
            for (int i = 0; i < 4; ++i) {
                const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = (lane % 4) * 2 + (i & 1);
                for (int k = 0; k < 16; ++k) of.d[i] += left[row][k] * right[k][column];
            }
        }
    };
    emulator::warp_operation(~0u, mine, multiply, place);
}

template <bool kTransposed>
void ldmatrix(uint32_t* words, const void* row, emulator::Place place) {
    struct Pointers {
        uint32_t* words;
        const void* row;
    } mine{words, row};
    check_alignment(row, 16);
    const auto read = [](const emulator::Contributions& lanes) {
        uint16_t matrices[4][8][8];
        for (int lane = 0; lane < 32; ++lane) {
            if (!lanes[lane]) emulator::fail("ldmatrix needs all lanes of its warp");
            std::memcpy(matrices[lane / 8][lane % 8], static_cast<const Pointers*>(lanes[lane])->row, 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int m = 0; m < 4; ++m) {
                const int major = lane / 4, minor = 2 * (lane % 4);
                const uint32_t low = kTransposed ? matrices[m][minor][major] : matrices[m][major][minor];
                const uint32_t high = kTransposed ? matrices[m][minor + 1][major] : matrices[m][major][minor + 1];
                static_cast<const Pointers*>(lanes[lane])->words[m] = low | high << 16;
            }
        }
    };
    emulator::warp_operation(~0u, mine, read, place);
}

inline void ldmatrix_x4(uint32_t* words, const void* row, emulator::Place place = emulator::Place::current()) {
    ldmatrix<false>(words, row, place);
}

inline void ldmatrix_x4_trans(uint32_t* words, const void* row, emulator::Place place = emulator::Place::current()) {
    ldmatrix<true>(words, row, place);
}

template <int kBytes>
void copy_async(void* to, const void* from, bool valid) {
    emulator::copy_async(to, from, kBytes, valid ? kBytes : 0);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int kPending>
void wait_for_copies() {
    emulator::wait_for_copies(kPending);
}

#else

template <typename T>
__device__ __forceinline__ float half_of(uint32_t word, int which) {
    const auto bits = static_cast<unsigned short>(which ? word >> 16 : word & 0xFFFF);
    if constexpr (std::is_same_v<T, bf16>) {
        return to_float(__ushort_as_bfloat16(bits));
    } else {
        return to_float(__ushort_as_half(bits));
    }
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
    uint32_t word;
    if constexpr (std::is_same_v<T, bf16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    }
    return word;
}

template <typename T>
__device__ __forceinline__ void mma_16816(float* d, const uint32_t* a, const uint32_t* b) {
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        static_assert(std::is_same_v<T, fp16>);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t* words, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row)));
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t* words, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row)));
}

// Zeros where not valid: then `from` is not read.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    if constexpr (kBytes == 16) {
        // Past L1, which a tile that many blocks read would only flush.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(valid ? 16 : 0)
                     : "memory");
    } else {
        static_assert(kBytes == 4 || kBytes == 8);
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                     "r"(valid ? kBytes : 0)
                     : "memory");
    }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

// Two floats rounded into one word, with what the rounding left of them in their place.
template <typename T>
__device__ __forceinline__ uint32_t take_plane(float& low, float& high) {
    const uint32_t word = pack2<T>(low, high);
    low -= half_of<T>(word, 0);
    high -= half_of<T>(word, 1);
    return word;
}

}  // namespace ssl_ib
