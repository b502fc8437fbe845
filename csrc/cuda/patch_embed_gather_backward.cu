// The gradients of the patch embedding, but for the matrix products, which are the binding's: the gradient of the
// positions, the pixels of kept patches as a matrix, and the way back from such a matrix to the images.
//
// Shapes: B images, C channels, H x W pixels, p patch side, L patches, K kept, D width, P prefix tokens, S slices of
// the batch.

#include <algorithm>

#include "../common/inverse.h"
#include "../common/pixels.h"
#include "launch.h"
#include "sum_slices.h"

namespace ssl_ib {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // images whose loads a thread has under way

__global__ void __launch_bounds__(kThreads) find_entries_of_image(Keep keep, Entries entries, int num_tokens) {
    const int64_t b = blockIdx.x, at = b * num_tokens;
    invert(keep, b, num_tokens, 0, num_tokens, entries.first + at, entries.last + at);
}

// A thread has n columns of one patch and a slice of the batch: dpos_slices [S, L, D]. The order of its sum is that of
// the images, then of keep.
template <typename T, int n>
__global__ void __launch_bounds__(kThreads, 2)
    sum_positions_of_slice(const T* __restrict__ grad, Keep keep, Entries entries, float* __restrict__ dpos_slices,
                           int num_patches, int num_prefix, int width, int images_per_slice) {
    const int d = (blockIdx.x * blockDim.x + threadIdx.x) * n, patch = blockIdx.y;
    if (d >= width) return;
    const int64_t begin = static_cast<int64_t>(blockIdx.z) * images_per_slice;
    const int64_t end = min(static_cast<int64_t>(keep.batch), begin + images_per_slice);
    const auto row_of = [&](int64_t b, int k) {
        return grad + (b * (num_prefix + keep.kept) + num_prefix + k) * width + d;
    };
    float sum[n] = {};
    for (int64_t chunk = begin; chunk < end; chunk += kInFlight) {
        Pack<T, n> held[kInFlight] = {};
        int first[kInFlight], last[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            const int64_t b = chunk + i;
            first[i] = last[i] = -1;
            if (b >= end) continue;
            last[i] = entries.last[b * num_patches + patch];
            if (last[i] < 0) continue;
            first[i] = entries.first[b * num_patches + patch];
            held[i] = load<Pack<T, n>>(row_of(b, first[i]));
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
#pragma unroll
            for (int j = 0; j < n; ++j) sum[j] += to_float(held[i].values[j]);
            for (int k = first[i] + 1; k <= last[i]; ++k) {
                if (kept_token(keep, chunk + i, k, num_patches) != patch) continue;
                const auto repeated = load<Pack<T, n>>(row_of(chunk + i, k));
#pragma unroll
                for (int j = 0; j < n; ++j) sum[j] += to_float(repeated.values[j]);
            }
        }
    }
    store_floats<n>(dpos_slices + (static_cast<int64_t>(blockIdx.z) * num_patches + patch) * width + d, sum);
}

// The kept patches of some images, from image `begin` on: out [images * K, C*p*p]. A thread has n neighbours of a row.
template <typename T, int n>
__global__ void __launch_bounds__(kThreads)
    gather_runs(Images images, Keep keep, int side, int num_patches, int begin, unsigned num_runs,
                T* __restrict__ out) {
    const int depth = images.channels * side * side, runs = depth / n;
    const unsigned i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= num_runs) return;
    const unsigned row = i / runs;
    const int64_t b = begin + static_cast<int>(row / keep.kept);
    const int k = static_cast<int>(i % runs) * n;
    const int patch = kept_token(keep, b, static_cast<int>(row % keep.kept), num_patches);
    float pixels[n] = {};
    if (patch >= 0) {
        load_pixels<n>(images, patch_corner(images, b, patch, side) + pixel_offset(images, k, side), pixels);
    }
    store_floats<n>(out + static_cast<int64_t>(row) * depth + k, pixels);
}

// From dpixels [images * K, C*p*p] to those images, dimages their part of the gradient: one pass over its pixels, which
// are 0 where no entry names their patch. A thread has n neighbours.
template <typename T, typename Pixel, int n>
__global__ void __launch_bounds__(kThreads)
    spread_runs(const T* __restrict__ dpixels, Images images, Keep keep, Entries entries, int side, int begin,
                unsigned num_runs, Pixel* __restrict__ dimages) {
    const unsigned i = blockIdx.x * kThreads + threadIdx.x;
    if (i >= num_runs) return;
    const int columns = images.width / side, num_patches = images.height / side * columns;
    const int depth = images.channels * side * side;
    const unsigned line = i / (images.width / n), plane = line / images.height;
    const int x = static_cast<int>(i % (images.width / n)) * n, y = static_cast<int>(line % images.height);
    const int channel = static_cast<int>(plane % images.channels), image = static_cast<int>(plane / images.channels);
    const int patch = y / side * columns + x / side, k = (channel * side + y % side) * side + x % side;
    const int64_t b = begin + image;
    const int first = entries.first[b * num_patches + patch], last = entries.last[b * num_patches + patch];
    float sum[n] = {};
    for (int entry = first; entry <= last; ++entry) {
        if (kept_token(keep, b, entry, num_patches) != patch) continue;
        float more[n];
        load_floats<n>(dpixels + (static_cast<int64_t>(image) * keep.kept + entry) * depth + k, more);
#pragma unroll
        for (int j = 0; j < n; ++j) sum[j] += more[j];
    }
    store_floats<n>(dimages + static_cast<int64_t>(i) * n, sum);
}

int count_dpos_slices(Keep keep, int num_patches, int width) {
    return count_slices(keep.batch, num_patches * int64_t{width} / 8, int64_t{num_patches} * width);
}

}  // namespace

void find_entries(Keep keep, Entries entries, int num_tokens, Stream stream) {
    launch(find_entries_of_image, keep.batch, kThreads, 0, stream, keep, entries, num_tokens);
}

int64_t sum_positions_scratch(Keep keep, int num_patches, int width) {
    const int slices = count_dpos_slices(keep, num_patches, width);
    return slices > 1 ? int64_t{slices} * num_patches * width * 4 : 0;
}

void sum_positions(Dtype dtype, const void* grad, Keep keep, Entries entries, float* dpos, void* scratch,
                   int num_patches, int num_prefix, int width, Stream stream) {
    const int slices = count_dpos_slices(keep, num_patches, width);
    float* const dpos_slices = slices > 1 ? static_cast<float*>(scratch) : dpos;
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        const auto run = [&](auto kernel, int n) {
            const int packs = width / n, threads = std::min(kThreads, ceil_div(packs, 32) * 32);
            launch(kernel, dim3(ceil_div(packs, threads), num_patches, slices), threads, 0, stream,
                   static_cast<const T*>(grad), keep, entries, dpos_slices, num_patches, num_prefix, width,
                   ceil_div(keep.batch, slices));
        };
        if (all_aligned(width * sizeof(T), grad, dpos)) {
            run(sum_positions_of_slice<T, kWidest<T>>, kWidest<T>);
        } else {
            run(sum_positions_of_slice<T, 1>, 1);
        }
    });
    if (slices > 1) launch_sum_slices(dpos_slices, dpos, slices, int64_t{num_patches} * width, stream);
}

void gather_pixels(Dtype dtype, Images images, Keep keep, int side, int begin, int count, void* out, Stream stream) {
    const int num_patches = images.height / side * (images.width / side), depth = images.channels * side * side;
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        const auto run = [&](auto kernel, int n) {
            const unsigned num_runs = static_cast<unsigned>(count) * keep.kept * (depth / n);
            launch(kernel, ceil_div(num_runs, kThreads), kThreads, 0, stream, images, keep, side, num_patches, begin,
                   num_runs, static_cast<T*>(out));
        };
        if (runs_of(8, images, side)) {
            run(gather_runs<T, 8>, 8);
        } else if (runs_of(2, images, side)) {
            run(gather_runs<T, 2>, 2);
        } else {
            run(gather_runs<T, 1>, 1);
        }
    });
}

void spread_pixels(Dtype dtype, const void* dpixels, Images images, Keep keep, Entries entries, int side, int begin,
                   int count, void* dimages, Stream stream) {
    const unsigned num_pixels = static_cast<unsigned>(count) * images.channels * images.height * images.width;
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        dispatch(images.dtype, [&](auto pixel) {
            using Pixel = decltype(pixel);
            const auto run = [&](auto kernel, int n) {
                launch(kernel, ceil_div(num_pixels / n, kThreads), kThreads, 0, stream,
                       static_cast<const T*>(dpixels), images, keep, entries, side, begin, num_pixels / n,
                       static_cast<Pixel*>(dimages));
            };
            if (side % 8 == 0 && all_aligned(0, dpixels, dimages)) {
                run(spread_runs<T, Pixel, 8>, 8);
            } else {
                run(spread_runs<T, Pixel, 1>, 1);
            }
        });
    });
}

}  // namespace ssl_ib
