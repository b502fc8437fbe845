// Squared error of reconstructed patches against the pixels of their images, which are read in place and once for all
// the reconstructions of an image.
//
// Shapes: B images, C channels, H x W pixels, p patch side, L patches, E = p*p*C numbers of a patch, G reconstructions.

#include <algorithm>

#include "../common/pixels.h"
#include "launch.h"

namespace ssl_ib {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxBlocks = 4096;
constexpr int kMaxPatchSize = 18 * 1024;  // with a run for each pixel, what shared memory holds
constexpr unsigned kAll = ~0u;

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
    return x;
}

// A run of n pixels of a patch: from where in its image, counted from its corner, to where among the numbers of the
// patch, which are ordered (row, column, channel). The same for all patches, so a block works it out once.
struct Run {
    int from, to;
};

template <int n>
__device__ void find_runs(const Images& images, int side, Run* runs) {
    const int of_channel = side * side;
    for (int i = threadIdx.x; i < images.channels * of_channel / n; i += blockDim.x) {
        const int k = i * n, channel = k / of_channel;
        runs[i] = {static_cast<int>(pixel_offset(images, k, side)),
                   (k - channel * of_channel) * images.channels + channel};
    }
    __syncthreads();
}

// Puts the pixels of one patch where its warp finds them.
template <int n>
__device__ void stage_patch(const Images& images, int64_t corner, const Run* runs, int num_runs, float* target) {
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < num_runs; i += 32) {
        const Run run = runs[i];
        float pixels[n];
        load_pixels<n>(images, corner + run.from, pixels);
#pragma unroll
        for (int j = 0; j < n; ++j) target[run.to + j * images.channels] = pixels[j];
    }
    __syncwarp();
}

// A warp at a time takes a patch of an image and compares it with all the reconstructions of it. Forward: leaves the
// block's sums over hidden and over visible patches in sums [blocks, 2]. Backward: writes dpred.
template <typename T, int n, int m, bool backward>
__global__ void __launch_bounds__(kMaxWarps * 32, 3)
    compare(const T* __restrict__ pred, Images images, const bool* __restrict__ mask, bool norm_pix, int side,
            int num_patches, int per_image, float2* __restrict__ sums, const float* __restrict__ scale,
            T* __restrict__ dpred) {
    SSL_IB_DYNAMIC_SHARED(float, targets);
    const int size = side * side * images.channels;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    float* const target = targets + warp * size;
    Run* const runs = reinterpret_cast<Run*>(targets + warps * size);
    find_runs<m>(images, side, runs);
    float hidden = 0.0f, visible = 0.0f;
    const unsigned count = static_cast<unsigned>(images.batch) * num_patches;
    for (unsigned q = blockIdx.x * warps + warp; q < count; q += gridDim.x * warps) {
        const int64_t b = q / num_patches;
        const int patch = static_cast<int>(q % num_patches);
        stage_patch<m>(images, patch_corner(images, b, patch, side), runs, size / m, target);
        float mean = 0.0f, inverse_deviation = 1.0f;
        if (norm_pix) {
            for (int i = lane; i < size; i += 32) mean += target[i];
            mean = sum_of_warp(mean) / size;
            float squares = 0.0f;
            for (int i = lane; i < size; i += 32) squares += (target[i] - mean) * (target[i] - mean);
            inverse_deviation = 1.0f / sqrtf(sum_of_warp(squares) / (size - 1) + 1e-6f);
        }
        for (int64_t g = b * per_image; g < (b + 1) * per_image; ++g) {
            const int64_t row = g * num_patches + patch;
            const bool is_hidden = mask[row];
            const float factor = backward ? scale[is_hidden ? 0 : 1] : 0.0f;
            float error = 0.0f;
#pragma unroll 4
            for (int i = lane * n; i < size; i += 32 * n) {
                float values[n], pixels[n];
                load_floats<n>(pred + row * size + i, values);
                load_floats<n>(target + i, pixels);
#pragma unroll
                for (int j = 0; j < n; ++j) {
                    values[j] -= (pixels[j] - mean) * inverse_deviation;
                    error += values[j] * values[j];
                    values[j] *= factor;
                }
                if constexpr (backward) store_floats<n>(dpred + row * size + i, values);
            }
            if constexpr (!backward) (is_hidden ? hidden : visible) += sum_of_warp(error) / size;
        }
        __syncwarp();
    }
    if constexpr (!backward) {
        SSL_IB_SHARED(float2, of_warps, [kMaxWarps]);
        if (lane == 0) of_warps[warp] = make_float2(hidden, visible);
        __syncthreads();
        if (threadIdx.x > 0) return;
        float2 sum = of_warps[0];
        for (int w = 1; w < warps; ++w) sum = make_float2(sum.x + of_warps[w].x, sum.y + of_warps[w].y);
        sums[blockIdx.x] = sum;
    }
}

__global__ void __launch_bounds__(1024) sum_pairs(const float2* __restrict__ sums, int count, float* __restrict__ out) {
    SSL_IB_SHARED(float2, of_warps, [32]);
    float2 sum = make_float2(0.0f, 0.0f);
    for (int i = threadIdx.x; i < count; i += 1024) sum = make_float2(sum.x + sums[i].x, sum.y + sums[i].y);
    sum = make_float2(sum_of_warp(sum.x), sum_of_warp(sum.y));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const float hidden = sum_of_warp(of_warps[threadIdx.x].x), visible = sum_of_warp(of_warps[threadIdx.x].y);
    if (threadIdx.x == 0) {
        out[0] = hidden;
        out[1] = visible;
    }
}

int count_blocks(const Images& images, int num_patches, int warps) {
    return std::min(ceil_div(images.batch * num_patches, warps), kMaxBlocks);
}

int count_warps(int patch_bytes) { return std::clamp(48 * 1024 / patch_bytes, 1, kMaxWarps); }

template <bool backward>
void launch_compare(Dtype dtype, const void* pred, Images images, const bool* mask, bool norm_pix, int side,
                    int per_image, float2* sums, const float* scale, void* dpred, Stream stream) {
    const int size = side * side * images.channels;
    if (size > kMaxPatchSize) throw std::invalid_argument("masked_patch_mse: a patch has too many pixels");
    const int num_patches = images.height / side * (images.width / side), warps = count_warps(size * 4);
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        const auto run = [&](auto kernel, int pixels_of_run) {
            const size_t shared = size_t{4} * warps * size + sizeof(Run) * size / pixels_of_run;
            launch(kernel, count_blocks(images, num_patches, warps), warps * 32, shared, stream,
                   static_cast<const T*>(pred), images, mask, norm_pix, side, num_patches, per_image, sums, scale,
                   static_cast<T*>(dpred));
        };
        if (runs_of(4, images, side) && all_aligned(size * sizeof(T), pred, dpred)) {
            run(compare<T, kWidest<T>, 4, backward>, 4);
        } else {
            run(compare<T, 1, 1, backward>, 1);
        }
    });
}

}  // namespace

int64_t masked_patch_mse_scratch() { return kMaxBlocks * sizeof(float2); }

void masked_patch_mse(Dtype dtype, const void* pred, Images images, const bool* mask, bool norm_pix, int side,
                      int per_image, float* out, void* scratch, Stream stream) {
    float2* const sums = static_cast<float2*>(scratch);
    launch_compare<false>(dtype, pred, images, mask, norm_pix, side, per_image, sums, nullptr, nullptr, stream);
    const int num_patches = images.height / side * (images.width / side);
    const int warps = count_warps(side * side * images.channels * 4);
    launch(sum_pairs, 1, 1024, 0, stream, sums, count_blocks(images, num_patches, warps), out);
}

void masked_patch_mse_backward(Dtype dtype, const float* scale, const void* pred, Images images, const bool* mask,
                               bool norm_pix, int side, int per_image, void* dpred, Stream stream) {
    launch_compare<true>(dtype, pred, images, mask, norm_pix, side, per_image, nullptr, scale, dpred, stream);
}

}  // namespace ssl_ib
