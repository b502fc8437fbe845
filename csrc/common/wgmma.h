// Hopper's tensor-core instructions: products of a warpgroup (four warps) whose right operand stays in shared memory.
//
// They exist where code is compiled for sm_90a; in the emulator, where emulate_warpgroups says so. Operands in shared
// memory are panels as tile.h lays them: rows of 64 numbers (128 bytes) one after another, the first at a multiple of
// 1024 bytes, chunks of 16 bytes turned by the row's number: PTX's "128B swizzling mode", in which 8 rows make an atom.
//   SSL_IB_IF_WARPGROUPS { ... } else { ... }
//   SSL_IB_SWIZZLED_SHARED(name)                   the launch's dynamic shared memory, 1024-byte aligned
//   panel_at(address)                              a descriptor of the panel, or of a part of it, that begins there
//   wgmma_rows<T, kColumns>(d, a, b)               d [64, kColumns] += a [64, 16] b [kColumns, 16]^T, both panels
//   wgmma_values<T>(d, a, b)                       d [64, 64] += a [64, 16] b [16, 64]; a in registers, b a panel
//   warpgroup_begin(), warpgroup_end()             around products: what lies between runs asynchronously, and neither
//                                                  d nor a may be touched there
//   hold(d), hold(a)                               before warpgroup_begin and after warpgroup_end, so that the compiler
//                                                  moves nothing that computes or uses them in between
//   show_to_tensor_cores()                         after writing shared memory, before the barrier
// Of d and a a warp holds 16 rows, in the places of mma_16816's d and a; 8 columns of d after 8.
#pragma once

#include "mma.h"

#ifdef SSL_IB_EMULATED

#define SSL_IB_IF_WARPGROUPS if (::ssl_ib::emulate_warpgroups)
#define SSL_IB_SWIZZLED_SHARED(name) SSL_IB_DYNAMIC_SHARED(unsigned char, name)

namespace ssl_ib {

inline bool emulate_warpgroups = false;

struct WarpgroupProduct {
    float* d;
    int columns;
    const uint32_t* a;  // null where a lies in shared memory
    uint64_t a_panel, b_panel;
    bool b_is_rows;  // of b^T
    float (*number)(uint32_t word, int which);
};

// What each thread of a block has begun.
inline std::vector<WarpgroupProduct> begun[emulator::kMaxThreads];

inline uint64_t panel_at(const void* address) {
    const auto offset = static_cast<const unsigned char*>(address) - emulator::machine.shared;
    // Start address, stride of 8 rows (both in 16 bytes), 128B swizzling mode.
    return static_cast<uint64_t>(offset & 0x3FFFF) >> 4 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The 16-bit number in a panel: `along` counts within 128 bytes, `across` the rows of 128 bytes. The swizzle is one of
// address bits: 4 to 6 are turned by 7 to 9.
inline uint32_t number_in_panel(uint64_t panel, int across, int along) {
    const uint64_t start = (panel & 0x3FFF) << 4, stride = (panel >> 32 & 0x3FFF) << 4;
    if (panel >> 62 != 1) emulator::fail("a panel that is not swizzled by 128 bytes");
    const uint64_t at = start + across / 8 * stride + across % 8 * 128 + 2 * along;
    uint16_t bits;
    std::memcpy(&bits, emulator::machine.shared + (at ^ (at >> 7 & 7) << 4), 2);
    return bits;
}

inline void multiply(const emulator::Contributions& lanes, size_t index, int warp) {
    const auto product = [&](int lane) -> const WarpgroupProduct& {
        return (*static_cast<const std::vector<WarpgroupProduct>*>(lanes[lane]))[index];
    };
    const WarpgroupProduct& first = product(0);
    float left[16][16], right[16][64];
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            // Each lane has two numbers of rows lane / 4 and 8 below, in k's first half and in its second.
            const int lane = row % 8 * 4 + k % 8 / 2, word = row / 8 + k / 8 * 2;
            left[row][k] = first.a ? first.number(product(lane).a[word], k % 2)
                                   : first.number(number_in_panel(first.a_panel, warp * 16 + row, k), 0);
        }
    }
    for (int k = 0; k < 16; ++k) {
        for (int column = 0; column < first.columns; ++column) {
            const uint32_t bits = first.b_is_rows ? number_in_panel(first.b_panel, column, k)
                                                  : number_in_panel(first.b_panel, k, column);
            right[k][column] = first.number(bits, 0);
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < first.columns / 2; ++i) {
            const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) product(lane).d[i] += left[row][k] * right[k][column];
        }
    }
}

inline void warpgroup_begin() { begun[emulator::machine.current->rank].clear(); }

inline void warpgroup_end(emulator::Place place = emulator::Place::current()) {
    const auto run = [](const emulator::Contributions& lanes) {
        const auto* const first = static_cast<const std::vector<WarpgroupProduct>*>(lanes[0]);
        for (void* lane : lanes) {
            if (!lane || static_cast<const std::vector<WarpgroupProduct>*>(lane)->size() != first->size()) {
                emulator::fail("wgmma needs all lanes of its warp");
            }
        }
        for (size_t i = 0; i < first->size(); ++i) multiply(lanes, i, static_cast<int>((first - begun) / 32 % 4));
    };
    emulator::warp_operation(~0u, begun[emulator::machine.current->rank], run, place);
}

template <typename T, int kColumns>
void wgmma_rows(float* d, uint64_t a, uint64_t b) {
    static_assert(kColumns == 32 || kColumns == 64);
    begun[emulator::machine.current->rank].push_back({d, kColumns, nullptr, a, b, true, half_of<T>});
}

template <typename T>
void wgmma_values(float* d, const uint32_t* a, uint64_t b) {
    begun[emulator::machine.current->rank].push_back({d, 64, a, 0, b, false, half_of<T>});
}

template <typename Registers>
void hold(Registers&) {}

inline void show_to_tensor_cores() {}

}  // namespace ssl_ib

#else

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define SSL_IB_IF_WARPGROUPS if constexpr (true)
#else
#define SSL_IB_IF_WARPGROUPS if constexpr (false)
#endif
#define SSL_IB_SWIZZLED_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace ssl_ib {

__device__ __forceinline__ uint64_t panel_at(const void* address) {
    // Start address, stride of 8 rows (both in 16 bytes), 128B swizzling mode.
    return static_cast<uint64_t>((shared_address(address) & 0x3FFFF) >> 4) | uint64_t{1024 >> 4} << 32 |
           uint64_t{1} << 62;
}

__device__ __forceinline__ void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void warpgroup_end() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

__device__ __forceinline__ void hold(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void hold(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

template <typename Registers, int n>
__device__ __forceinline__ void hold(Registers (&registers)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) hold(registers[i]);
}

__device__ __forceinline__ void show_to_tensor_cores() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#define SSL_IB_8_SUMS(d, i)                                                                                      \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define SSL_IB_16_PLACES "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define SSL_IB_32_PLACES \
    SSL_IB_16_PLACES ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
// Added to what d holds; the operands as they are. The last numbers say which of those in shared memory are transposed.
#define SSL_IB_WGMMA(columns, type, places, operands, transposed)                                                 \
    "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" \
        places "}, " operands ", p, 1, 1, " transposed "; }"

template <typename T, int kColumns>
__device__ __forceinline__ void wgmma_rows(float* d, uint64_t a, uint64_t b) {
    static_assert(kColumns == 32 || kColumns == 64);
    constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
    if constexpr (kColumns == 32 && kIsBf16) {
        asm volatile(SSL_IB_WGMMA("32", "bf16", SSL_IB_16_PLACES, "%16, %17", "0, 0")
                     : SSL_IB_8_SUMS(d, 0), SSL_IB_8_SUMS(d, 8)
                     : "l"(a), "l"(b));
    } else if constexpr (kColumns == 32) {
        asm volatile(SSL_IB_WGMMA("32", "f16", SSL_IB_16_PLACES, "%16, %17", "0, 0")
                     : SSL_IB_8_SUMS(d, 0), SSL_IB_8_SUMS(d, 8)
                     : "l"(a), "l"(b));
    } else if constexpr (kIsBf16) {
        asm volatile(SSL_IB_WGMMA("64", "bf16", SSL_IB_32_PLACES, "%32, %33", "0, 0")
                     : SSL_IB_8_SUMS(d, 0), SSL_IB_8_SUMS(d, 8), SSL_IB_8_SUMS(d, 16), SSL_IB_8_SUMS(d, 24)
                     : "l"(a), "l"(b));
    } else {
        asm volatile(SSL_IB_WGMMA("64", "f16", SSL_IB_32_PLACES, "%32, %33", "0, 0")
                     : SSL_IB_8_SUMS(d, 0), SSL_IB_8_SUMS(d, 8), SSL_IB_8_SUMS(d, 16), SSL_IB_8_SUMS(d, 24)
                     : "l"(a), "l"(b));
    }
}

template <typename T>
__device__ __forceinline__ void wgmma_values(float* d, const uint32_t* a, uint64_t b) {
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(SSL_IB_WGMMA("64", "bf16", SSL_IB_32_PLACES, "{%32,%33,%34,%35}, %36", "1")
                     : SSL_IB_8_SUMS(d, 0), SSL_IB_8_SUMS(d, 8), SSL_IB_8_SUMS(d, 16), SSL_IB_8_SUMS(d, 24)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile(SSL_IB_WGMMA("64", "f16", SSL_IB_32_PLACES, "{%32,%33,%34,%35}, %36", "1")
                     : SSL_IB_8_SUMS(d, 0), SSL_IB_8_SUMS(d, 8), SSL_IB_8_SUMS(d, 16), SSL_IB_8_SUMS(d, 24)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}

}  // namespace ssl_ib

#undef SSL_IB_8_SUMS
#undef SSL_IB_16_PLACES
#undef SSL_IB_32_PLACES
#undef SSL_IB_WGMMA

#endif
