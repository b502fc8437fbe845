// Embeds the kept patches straight from their images: a matrix product whose left operand is never written down.
//
// Rows of the product are the tokens of the output, [B, P+K]; a prefix token is a row without pixels. Columns are the
// width D, and the depth of the sums is C*p*p, counted (channel, row, column) as in the weight.
//
// Shapes: B images, C channels, H x W pixels, p patch side, L patches, K kept, D width, P prefix tokens.

#include "../common/inverse.h"
#include "../common/mma.h"
#include "../common/pixels.h"
#include "launch.h"

namespace ssl_ib {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 128;  // of a block's tile of the product

// The pixels of a row of the product, and what is added to it.
struct Row {
    int64_t corner;       // of its patch, or -1: no pixels
    const float* addend;  // its position, or for a prefix token all of it; null past the last row
};

__device__ Row find_row(const Embedding& e, int64_t row) {
    const int tokens = e.num_prefix + e.keep.kept;
    const int64_t b = row / tokens;
    if (b >= e.keep.batch) return {-1, nullptr};
    const int64_t k = row - b * tokens - e.num_prefix;
    if (k < 0) return {-1, e.prefix + (k + e.num_prefix) * e.width};
    const int patch = kept_token(e.keep, b, static_cast<int>(k), e.num_patches);
    if (patch < 0) return {-1, e.pos};
    return {patch_corner(e.images, b, patch, e.side), e.pos + static_cast<int64_t>(patch) * e.width};
}

// ---- On tensor cores ----

constexpr int kDepth = 32;          // of the sums, at a time
constexpr int kStages = 3;          // of tiles on their way
constexpr int kPitch = kDepth + 8;  // of a row in shared memory: eight rows of ldmatrix fall into different banks

// The pixels that one thread carries from its images into a tile [128, 32], in runs of neighbours.
template <typename T, typename Pixel, int run>
struct PixelTile {
    static constexpr int kPiece = run < kWidest<Pixel> ? run : kWidest<Pixel>;
    static constexpr int kPieces = run / kPiece, kGroups = kDepth / run, kStep = kThreads / kGroups;
    static constexpr int kPasses = kRows / kStep;
    Pack<Pixel, kPiece> held[kPasses][kPieces];

    __device__ __forceinline__ void load_from(const Embedding& e, const Row* rows, int depth_begin) {
        const int k = depth_begin + threadIdx.x % kGroups * run;
        const int64_t offset = pixel_offset(e.images, k, e.side);
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            const int64_t corner = rows[threadIdx.x / kGroups + i * kStep].corner;
            const Pixel* const from = static_cast<const Pixel*>(e.images.data) + corner + offset;
#pragma unroll
            for (int j = 0; j < kPieces; ++j) {
                held[i][j] = corner >= 0 && k < e.depth ? load<Pack<Pixel, kPiece>>(from + j * kPiece)
                                                        : Pack<Pixel, kPiece>{};
            }
        }
    }

    __device__ __forceinline__ void store_to(T* tile) const {
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            float pixels[run];
#pragma unroll
            for (int j = 0; j < run; ++j) pixels[j] = to_float(held[i][j / kPiece].values[j % kPiece]);
            const int row = threadIdx.x / kGroups + i * kStep;
            store_floats<run>(tile + row * kPitch + threadIdx.x % kGroups * run, pixels);
        }
    }
};

// Starts the copy of a tile [columns, 32] of the weight.
template <int columns, int piece, typename T>
__device__ __forceinline__ void copy_weight(const T* weight, const Embedding& e, int column_begin, int depth_begin,
                                            T* tile) {
    constexpr int pieces = kDepth / piece;
#pragma unroll
    for (int i = threadIdx.x; i < columns * pieces; i += kThreads) {
        const int column = column_begin + i / pieces, k = depth_begin + i % pieces * piece;
        copy_async<piece * sizeof(T)>(tile + i / pieces * kPitch + i % pieces * piece,
                                      weight + static_cast<int64_t>(column) * e.depth + k,
                                      column < e.width && k < e.depth);
    }
}

// Eight warps, two along the rows and four along the columns, each with a tile of 64 x columns/4.
template <typename T, typename Pixel, int run, int columns>
__global__ void __launch_bounds__(kThreads)
    embed_on_tensor_cores(Embedding e, const T* __restrict__ weight, T* __restrict__ out) {
    constexpr int piece = run == 8 ? 8 : 4;  // numbers of the weight that one copy takes
    constexpr int across = columns / 32;     // tiles of mma along the columns of a warp
    SSL_IB_SHARED(Row, rows, [kRows]);
    SSL_IB_DYNAMIC_SHARED(T, tiles);
    T* const pixel_tiles = tiles;
    T* const weight_tiles = tiles + kStages * kRows * kPitch;
    const int column_tiles = ceil_div(e.width, columns);
    const int64_t row_begin = static_cast<int64_t>(blockIdx.x / column_tiles) * kRows;
    const int column_begin = static_cast<int>(blockIdx.x % column_tiles) * columns;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 4 * 64, warp_column = warp % 4 * (columns / 4);
    if (threadIdx.x < kRows) rows[threadIdx.x] = find_row(e, row_begin + threadIdx.x);
    __syncthreads();

    const int steps = ceil_div(e.depth, kDepth);
    PixelTile<T, Pixel, run> pixels;
    for (int step = 0; step < kStages - 1; ++step) {
        copy_weight<columns, piece>(weight, e, column_begin, step * kDepth, weight_tiles + step * columns * kPitch);
        commit_copies();
        pixels.load_from(e, rows, step * kDepth);
        pixels.store_to(pixel_tiles + step * kRows * kPitch);
    }
    float sums[4][across][4] = {};
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();
        // Into the stage that all warps left before this barrier. Past the depth, zeros.
        const int next = step + kStages - 1, into = next % kStages;
        copy_weight<columns, piece>(weight, e, column_begin, next * kDepth, weight_tiles + into * columns * kPitch);
        commit_copies();
        pixels.load_from(e, rows, next * kDepth);
        const T* const a_tile = pixel_tiles + step % kStages * kRows * kPitch;
        const T* const b_tile = weight_tiles + step % kStages * columns * kPitch;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t a[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                ldmatrix_x4(a[i], a_tile + (warp_row + i * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
            }
#pragma unroll
            for (int j = 0; j < across; j += 2) {
                uint32_t b[4];
                const int column = warp_column + j * 8 + lane / 16 * 8 + lane % 8;
                ldmatrix_x4(b, b_tile + column * kPitch + k + lane / 8 % 2 * 8);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    mma_16816<T>(sums[i][j], a[i], b);
                    mma_16816<T>(sums[i][j + 1], a[i], b + 2);
                }
            }
        }
        pixels.store_to(pixel_tiles + into * kRows * kPitch);
    }

    // Through shared memory, so that rows of the output are written whole.
    wait_for_copies<0>();
    __syncthreads();
    constexpr int pitch = columns + 8;
#pragma unroll
    for (int j = 0; j < across; ++j) {
        const int at = warp_column + j * 8 + lane % 4 * 2, column = column_begin + at;
        const bool inside[2] = {column < e.width, column + 1 < e.width};
        float bias[2];
        for (int h = 0; h < 2; ++h) bias[h] = e.bias && inside[h] ? e.bias[column + h] : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = warp_row + i * 8 + lane / 4;
            const Row& of = rows[row];
            float values[2];
            for (int h = 0; h < 2; ++h) {
                values[h] = sums[i / 2][j][i % 2 * 2 + h] + (of.corner >= 0 ? bias[h] : 0.0f);
                if (of.addend && inside[h]) values[h] += of.addend[column + h];
            }
            store(tiles + row * pitch + at, pack2<T>(values[0], values[1]));
        }
    }
    __syncthreads();
    const int64_t num_rows = static_cast<int64_t>(e.keep.batch) * (e.num_prefix + e.keep.kept);
    const bool whole = all_aligned(e.width * sizeof(T), out);
    for (int i = threadIdx.x; i < kRows * columns / 8; i += kThreads) {
        const int row = i / (columns / 8), at = i % (columns / 8) * 8;
        if (row_begin + row >= num_rows) break;
        T* const to = out + (row_begin + row) * e.width + column_begin + at;
        const T* const from = tiles + row * pitch + at;
        if (whole && column_begin + at < e.width) {
            store(to, load<uint4>(from));
        } else {
            for (int j = 0; j < 8 && column_begin + at + j < e.width; ++j) to[j] = from[j];
        }
    }
}

// ---- By multiply-adds, for float32 and for patches that fit no run of pixels ----

constexpr int kFmaDepth = 16;
constexpr int kFmaPitch = kRows + 4;

// A thread's part of a tile [depth 16, 128]: one depth, eight rows.
__device__ __forceinline__ void store_column(float* tile, const float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        tile[threadIdx.x % kFmaDepth * kFmaPitch + threadIdx.x / kFmaDepth + i * kThreads / kFmaDepth] = values[i];
    }
}

// Tiles of 128 x 128, of which a thread has 8 x 8: rows 4y.., 64+4y.. and columns 4x.., 64+4x...
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    embed_by_fma(Embedding e, const T* __restrict__ weight, T* __restrict__ out) {
    SSL_IB_SHARED(Row, rows, [kRows]);
    SSL_IB_SHARED(float, pixel_tile, [kFmaDepth * kFmaPitch]);
    SSL_IB_SHARED(float, weight_tile, [kFmaDepth * kFmaPitch]);
    const int column_tiles = ceil_div(e.width, kRows);
    const int64_t row_begin = static_cast<int64_t>(blockIdx.x / column_tiles) * kRows;
    const int column_begin = static_cast<int>(blockIdx.x % column_tiles) * kRows;
    if (threadIdx.x < kRows) rows[threadIdx.x] = find_row(e, row_begin + threadIdx.x);
    __syncthreads();

    const int x = threadIdx.x % 16, y = threadIdx.x / 16;
    float sums[8][8] = {};
    for (int begin = 0; begin < e.depth; begin += kFmaDepth) {
        const int k = begin + threadIdx.x % kFmaDepth;
        const int64_t offset = pixel_offset(e.images, k, e.side);
        float pixels[8] = {}, weights[8] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int at = threadIdx.x / kFmaDepth + i * kThreads / kFmaDepth, column = column_begin + at;
            float pixel[1];
            if (k < e.depth && rows[at].corner >= 0) {
                load_pixels<1>(e.images, rows[at].corner + offset, pixel);
                pixels[i] = to_float(from_float<T>(pixel[0]));
            }
            if (k < e.depth && column < e.width) {
                weights[i] = to_float(weight[static_cast<int64_t>(column) * e.depth + k]);
            }
        }
        __syncthreads();
        store_column(pixel_tile, pixels);
        store_column(weight_tile, weights);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < kFmaDepth; ++d) {
            float a[8], b[8];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float4 left = load<float4>(pixel_tile + d * kFmaPitch + h * 64 + y * 4);
                const float4 right = load<float4>(weight_tile + d * kFmaPitch + h * 64 + x * 4);
                a[h * 4] = left.x, a[h * 4 + 1] = left.y, a[h * 4 + 2] = left.z, a[h * 4 + 3] = left.w;
                b[h * 4] = right.x, b[h * 4 + 1] = right.y, b[h * 4 + 2] = right.z, b[h * 4 + 3] = right.w;
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int j = 0; j < 8; ++j) sums[i][j] += a[i] * b[j];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int at = i / 4 * 64 + y * 4 + i % 4;
        const Row& of = rows[at];
        if (!of.addend) continue;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int column = column_begin + j / 4 * 64 + x * 4 + j % 4;
            if (column >= e.width) continue;
            const float bias = e.bias && of.corner >= 0 ? e.bias[column] : 0.0f;
            out[(row_begin + at) * e.width + column] = from_float<T>(sums[i][j] + bias + of.addend[column]);
        }
    }
}

template <typename T, typename Pixel, int run, int columns>
void launch_tensor_cores(const Embedding& e, const void* weight, void* out, unsigned row_tiles, Stream stream) {
    constexpr int numbers = kStages * (kRows + columns) * kPitch;
    static_assert(kRows * (columns + 8) <= numbers, "the output goes where the tiles were");
    launch(embed_on_tensor_cores<T, Pixel, run, columns>, row_tiles * ceil_div(e.width, columns), kThreads,
           numbers * sizeof(T), stream, e, static_cast<const T*>(weight), static_cast<T*>(out));
}

template <typename T, typename Pixel>
void choose_tile(const Embedding& e, const void* weight, void* out, unsigned row_tiles, Stream stream) {
    // The wider tile reads the pixels half as often, where its columns are not mostly empty.
    const bool wide = e.width % 256 == 0 || e.width % 256 > 128;
    if (e.side % 8 != 0) {
        launch_tensor_cores<T, Pixel, 2, 128>(e, weight, out, row_tiles, stream);
    } else if (wide) {
        launch_tensor_cores<T, Pixel, 8, 256>(e, weight, out, row_tiles, stream);
    } else {
        launch_tensor_cores<T, Pixel, 8, 128>(e, weight, out, row_tiles, stream);
    }
}

}  // namespace

void patch_embed_gather(Dtype dtype, const Embedding& e, const void* weight, void* out, Stream stream) {
    const int64_t num_rows = int64_t{e.keep.batch} * (e.num_prefix + e.keep.kept);
    const auto row_tiles = static_cast<unsigned>(ceil_div<int64_t>(num_rows, kRows));
    const bool runs = e.side % 2 == 0 && all_aligned(0, e.images.data, weight);
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        if constexpr (!std::is_same_v<T, float>) {
            if (runs && e.images.dtype == dtype) return choose_tile<T, T>(e, weight, out, row_tiles, stream);
            if (runs && e.images.dtype == Dtype::float32) {
                return choose_tile<T, float>(e, weight, out, row_tiles, stream);
            }
        }
        launch(embed_by_fma<T>, row_tiles * ceil_div(e.width, kRows), kThreads, 0, stream, e,
               static_cast<const T*>(weight), static_cast<T*>(out));
    });
}

}  // namespace ssl_ib
