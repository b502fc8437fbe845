// Tiles of an operand in shared memory, and a block's products of them on the tensor cores: with wgmma where there is
// Hopper's, with mma elsewhere. Both leave their sums in the same places, and read tiles that lie the same.
//
// A block has four warps; warp w owns rows 16w .. 16w+15 of every product. Of the 8 columns of sums n, lane i has
// columns 2 (i % 4) and the next, of rows i / 4 (slot 0) and 8 below (slot 1).
//
// float32 operands become three bfloat16 planes whose sum they are, and a product of two of them the six products of
// planes that matter to float32: those left out are 2^-24 of it.
#pragma once

#include "wgmma.h"

namespace ssl_ib {

constexpr int kThreads = 128;
constexpr int kOwnedRows = 64;

// What the tensor cores see of an operand of type T.
template <typename T>
struct Planes {
    using Unit = T;
    static constexpr int count = 1;
};
template <>
struct Planes<float> {
    using Unit = bf16;
    static constexpr int count = 3;
};

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }

// The row of a tile that a slot of this thread's sums belongs to, and the first of its two columns.
__device__ __forceinline__ int row_of(int slot) { return threadIdx.x / 32 * 16 + lane() / 4 + 8 * slot; }
__device__ __forceinline__ int column_of(int n) { return 8 * n + lane() % 4 * 2; }

// Over the four lanes that share a row.
__device__ __forceinline__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// An operand in global memory: rows of `stride` numbers, a multiple of 8, 16-byte aligned.
struct Matrix {
    const void* data;
    int rows, stride;
};

// kRows x kWidth numbers in shared memory, in panels of 64 columns. A panel's rows lie one after another; a chunk of 8
// numbers has its place in the row turned by the row's number, so that 8 rows of one column of chunks lie in different
// banks.
template <typename T, int kRows, int kWidth>
struct Tile {
    using Unit = typename Planes<T>::Unit;
    static constexpr int kPanels = kWidth / 64;
    static constexpr int kBytes = Planes<T>::count * kRows * kWidth * 2;

    unsigned char* base;

    __device__ __forceinline__ unsigned char* row(int plane, int panel, int row) const {
        return base + ((plane * kPanels + panel) * kRows + row) * 128;
    }
    __device__ __forceinline__ unsigned char* chunk(int plane, int panel, int row, int index) const {
        return this->row(plane, panel, row) + ((index ^ row) % 8) * 16;
    }

    // The part of `from` that begins at (first_row, first_column); zeros past its ends. Asynchronous for 16-bit
    // numbers.
    __device__ __forceinline__ void fetch(const Matrix& from, int first_row, int first_column) const {
        for (int i = threadIdx.x; i < kRows * kPanels * 8; i += kThreads) {
            const int row = i / (kPanels * 8), panel = i / 8 % kPanels, index = i % 8;
            const int column = first_column + 64 * panel + 8 * index;
            const bool inside = first_row + row < from.rows && column < from.stride;
            const T* numbers = static_cast<const T*>(from.data);
            if (inside) numbers += static_cast<int64_t>(first_row + row) * from.stride + column;
            if constexpr (Planes<T>::count == 1) {
                copy_async<16>(chunk(0, panel, row, index), numbers, inside);
            } else {
                split(numbers, inside, panel, row, index);
            }
        }
    }

  private:
    __device__ __forceinline__ void split(const float* numbers, bool inside, int panel, int row, int index) const {
        float rest[8] = {};
        if (inside) {
            const float4 low = load<float4>(numbers), high = load<float4>(numbers + 4);
            rest[0] = low.x, rest[1] = low.y, rest[2] = low.z, rest[3] = low.w;
            rest[4] = high.x, rest[5] = high.y, rest[6] = high.z, rest[7] = high.w;
        }
#pragma unroll
        for (int plane = 0; plane < Planes<T>::count; ++plane) {
            uint32_t words[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) words[w] = take_plane<Unit>(rest[2 * w], rest[2 * w + 1]);
            store(chunk(plane, panel, row, index), make_uint4(words[0], words[1], words[2], words[3]));
        }
    }
};

// scores [64, kColumns] += owned @ streamed^T, over the first `panels` of them.
template <typename T, int kColumns, int kWidth>
__device__ __forceinline__ void add_scores(float (&scores)[kColumns / 8][4], Tile<T, kOwnedRows, kWidth> owned,
                                           Tile<T, kColumns, kWidth> streamed, int panels) {
    constexpr int kPlanes = Planes<T>::count;
    using Unit = typename Planes<T>::Unit;
    SSL_IB_IF_WARPGROUPS {
        hold(scores);
        warpgroup_begin();
#pragma unroll 1
        for (int panel = 0; panel < panels; ++panel) {
#pragma unroll
            for (int step = 0; step < 4; ++step) {
#pragma unroll
                for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
                    for (int q = 0; p + q < kPlanes; ++q) {
                        wgmma_rows<Unit, kColumns>(scores[0], panel_at(owned.row(p, panel, 0) + 32 * step),
                                                   panel_at(streamed.row(q, panel, 0) + 32 * step));
                    }
                }
            }
        }
        warpgroup_end();
        hold(scores);
    } else {
        const int row = threadIdx.x / 32 * 16 + lane() % 16;
        const int column = lane() / 16 * 8 + lane() % 8;
#pragma unroll 1
        for (int panel = 0; panel < panels; ++panel) {
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                uint32_t a[kPlanes][4];
#pragma unroll
                for (int p = 0; p < kPlanes; ++p) ldmatrix_x4(a[p], owned.chunk(p, panel, row, 2 * step + lane() / 16));
#pragma unroll
                for (int n = 0; n < kColumns / 16; ++n) {
#pragma unroll
                    for (int q = 0; q < kPlanes; ++q) {
                        uint32_t b[4];
                        ldmatrix_x4(b, streamed.chunk(q, panel, 16 * n + column, 2 * step + lane() / 8 % 2));
#pragma unroll
                        for (int p = 0; p + q < kPlanes; ++p) {
                            mma_16816<Unit>(scores[2 * n], a[p], b);
                            mma_16816<Unit>(scores[2 * n + 1], a[p], b + 2);
                        }
                    }
                }
            }
        }
    }
}

// out [64, kWidth] += weights [64, kColumns] @ values
template <typename T, int kColumns, int kWidth>
__device__ __forceinline__ void add_values(float (&out)[kWidth / 8][4], const float (&weights)[kColumns / 8][4],
                                           Tile<T, kColumns, kWidth> values) {
    constexpr int kPlanes = Planes<T>::count, kSteps = kColumns / 16;
    using Unit = typename Planes<T>::Unit;
    // Sums of two neighbouring 8 columns are, number by number, a left operand.
    uint32_t a[kSteps][kPlanes][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        float rest[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) rest[i] = weights[2 * step + i / 4][i % 4];
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
            for (int w = 0; w < 4; ++w) a[step][p][w] = take_plane<Unit>(rest[2 * w], rest[2 * w + 1]);
        }
    }
    SSL_IB_IF_WARPGROUPS {
        hold(a);
        hold(out);
        warpgroup_begin();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int panel = 0; panel < kWidth / 64; ++panel) {
#pragma unroll
                for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
                    for (int q = 0; p + q < kPlanes; ++q) {
                        wgmma_values<Unit>(out[8 * panel], a[step][p], panel_at(values.row(q, panel, 16 * step)));
                    }
                }
            }
        }
        warpgroup_end();
        hold(out);
    } else {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int row = 16 * step + lane() % 16;
#pragma unroll
            for (int n = 0; n < kWidth / 16; ++n) {
#pragma unroll
                for (int q = 0; q < kPlanes; ++q) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, values.chunk(q, n / 4, row, n % 4 * 2 + lane() / 16));
#pragma unroll
                    for (int p = 0; p + q < kPlanes; ++p) {
                        mma_16816<Unit>(out[2 * n], a[step][p], b);
                        mma_16816<Unit>(out[2 * n + 1], a[step][p], b + 2);
                    }
                }
            }
        }
    }
}

}  // namespace ssl_ib
