// Copies of the kept tokens, and the way back for their gradients.
//
// Shapes: B images, L tokens, K kept, D width.

#include "../common/inverse.h"
#include "../common/pack.h"
#include "launch.h"

namespace ssl_ib {
namespace {

constexpr int kThreads = 256;
constexpr int kInFlight = 4;  // loads a thread has under way before its first store
constexpr int kTile = 32;     // tokens of one block in the backward

// Copies a row, or writes zeros where `from` is null. Thread `lane` of `lanes` takes every lanes-th unit.
template <typename Unit>
__device__ __forceinline__ void copy_row(const Unit* from, Unit* to, int units, int lane, int lanes) {
    for (int first = lane; first < units; first += lanes * kInFlight) {
        Unit held[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int i = first + j * lanes;
            held[j] = from && i < units ? load<Unit>(from + i) : Unit{};
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const int i = first + j * lanes;
            if (i < units) store(to + i, held[j]);
        }
    }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const Unit* __restrict__ x, Keep keep, Unit* __restrict__ out, int num_tokens, int units, int log2) {
    const unsigned row = blockIdx.x * (kThreads >> log2) + (threadIdx.x >> log2);
    if (row >= static_cast<unsigned>(keep.batch) * keep.kept) return;
    const int64_t b = row / keep.kept;
    const int token = kept_token(keep, b, static_cast<int>(row % keep.kept), num_tokens);
    const Unit* const from = token < 0 ? nullptr : x + (b * num_tokens + token) * units;
    copy_row(from, out + static_cast<int64_t>(row) * units, units, threadIdx.x & ((1 << log2) - 1), 1 << log2);
}

// Tokens that several k name: summed in the order of k, so that the result is the same every time.
template <typename T, int n>
__device__ void sum_rows(const T* grad, const Keep& keep, int64_t b, int token, int num_tokens, int first, int last,
                         T* to, int width, int lane, int lanes) {
    for (int i = lane * n; i < width; i += lanes * n) {
        float sum[n] = {};
        for (int k = first; k <= last; ++k) {
            if (kept_token(keep, b, k, num_tokens) != token) continue;
            float more[n];
            load_floats<n>(grad + (b * keep.kept + k) * width + i, more);
#pragma unroll
            for (int j = 0; j < n; ++j) sum[j] += more[j];
        }
        store_floats<n>(to + i, sum);
    }
}

// One pass over the output: each token looks up which k it came from.
template <typename T, int n>
__global__ void __launch_bounds__(kThreads)
    spread_rows(const T* __restrict__ grad, Keep keep, T* __restrict__ out, int num_tokens, int width, int log2) {
    SSL_IB_SHARED(int, first, [kTile]);
    SSL_IB_SHARED(int, last, [kTile]);
    const int tiles = ceil_div(num_tokens, kTile);
    const int64_t b = blockIdx.x / tiles;
    const int begin = static_cast<int>(blockIdx.x % tiles) * kTile, count = min(kTile, num_tokens - begin);
    invert(keep, b, num_tokens, begin, count, first, last);
    __syncthreads();
    const int lane = threadIdx.x & ((1 << log2) - 1), lanes = 1 << log2;
    for (int i = threadIdx.x >> log2; i < count; i += kThreads >> log2) {
        T* const to = out + (b * num_tokens + begin + i) * width;
        if (first[i] < last[i]) {
            sum_rows<T, n>(grad, keep, b, begin + i, num_tokens, first[i], last[i], to, width, lane, lanes);
        } else {
            const T* const from = last[i] < 0 ? nullptr : grad + (b * keep.kept + last[i]) * width;
            copy_row(reinterpret_cast<const Pack<T, n>*>(from), reinterpret_cast<Pack<T, n>*>(to), width / n, lane,
                     lanes);
        }
    }
}

template <typename Unit>
void launch_gather(const void* x, Keep keep, void* out, int num_tokens, int64_t row_bytes, Stream stream) {
    const int units = static_cast<int>(row_bytes / sizeof(Unit)), log2 = lanes_log2(units);
    launch(gather_rows<Unit>, ceil_div(keep.batch * keep.kept, kThreads >> log2), kThreads, 0, stream,
           static_cast<const Unit*>(x), keep, static_cast<Unit*>(out), num_tokens, units, log2);
}

template <typename T, int n>
void launch_spread(const void* grad, Keep keep, void* out, int num_tokens, int width, Stream stream) {
    launch(spread_rows<T, n>, keep.batch * ceil_div(num_tokens, kTile), kThreads, 0, stream,
           static_cast<const T*>(grad), keep, static_cast<T*>(out), num_tokens, width, lanes_log2(width / n));
}

}  // namespace

void token_gather(Dtype dtype, const void* x, Keep keep, void* out, int num_tokens, int width, Stream stream) {
    const int64_t row_bytes = static_cast<int64_t>(width) * (dtype == Dtype::float32 ? 4 : 2);
    if (all_aligned(row_bytes, x, out)) {
        launch_gather<uint4>(x, keep, out, num_tokens, row_bytes, stream);
    } else if (dtype == Dtype::float32) {
        launch_gather<uint32_t>(x, keep, out, num_tokens, row_bytes, stream);
    } else {
        launch_gather<uint16_t>(x, keep, out, num_tokens, row_bytes, stream);
    }
}

void token_gather_backward(Dtype dtype, const void* grad, Keep keep, void* out, int num_tokens, int width,
                           Stream stream) {
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        if (all_aligned(width * sizeof(T), grad, out)) {
            launch_spread<T, kWidest<T>>(grad, keep, out, num_tokens, width, stream);
        } else {
            launch_spread<T, 1>(grad, keep, out, num_tokens, width, stream);
        }
    });
}

}  // namespace ssl_ib
