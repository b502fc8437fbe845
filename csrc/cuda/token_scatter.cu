// A decoder's input out of kept tokens, mask tokens and positions, and the way back.
//
// Shapes: B images, L tokens, K kept, P prefix tokens, D width, S slices of the batch.

#include "../common/inverse.h"
#include "../common/pack.h"
#include "launch.h"
#include "sum_slices.h"

namespace ssl_ib {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;     // rows of the output of one block in the forward
constexpr int kGroup = 4;     // rows that one thread goes through in the backward
constexpr int kInFlight = 4;  // images whose loads a thread has under way

// One pass over the output. Prefix rows count as tokens before the first. Neighbouring blocks write the same rows of one
// image after another: those that run at a time read few positions, which stay in the first cache.
template <typename T, int n>
__global__ void __launch_bounds__(kThreads)
    assemble_rows(const T* __restrict__ latents, Keep keep, const float* __restrict__ mask_token,
                  const float* __restrict__ pos, T* __restrict__ out, int num_tokens, int num_prefix, int width,
                  int log2) {
    SSL_IB_SHARED(int, source, [kTile]);
    const int rows = num_prefix + num_tokens;
    const int64_t b = blockIdx.x % keep.batch;
    const int begin = static_cast<int>(blockIdx.x / keep.batch) * kTile, count = min(kTile, rows - begin);
    invert(keep, b, num_tokens, begin - num_prefix, count, nullptr, source);
    __syncthreads();
    const T* const image = latents + b * (num_prefix + keep.kept) * width;
    const int lane = threadIdx.x & ((1 << log2) - 1), lanes = 1 << log2;
    for (int i = threadIdx.x >> log2; i < count; i += kThreads >> log2) {
        const int row = begin + i, from = row < num_prefix ? row : source[i] < 0 ? -1 : num_prefix + source[i];
        T* const to = out + (b * rows + row) * width;
#pragma unroll 2
        for (int d = lane * n; d < width; d += lanes * n) {
            float token[n], position[n] = {};
            if (from < 0) {
                load_floats<n>(mask_token + d, token);
            } else {
                load_floats<n>(image + static_cast<int64_t>(from) * width + d, token);
            }
            if (pos) load_floats<n>(pos + static_cast<int64_t>(row) * width + d, position);
#pragma unroll
            for (int j = 0; j < n; ++j) token[j] += position[j];
            store_floats<n>(to + d, token);
        }
    }
}

// Which k each token of the batch came from, source [B, L], -1 for none. Entries of keep that a later one overrides
// reached no output: their rows of dlatents (null: not wanted) become 0 here.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_sources(Keep keep, int* __restrict__ source, T* __restrict__ dlatents, int num_tokens, int num_prefix,
                 int width) {
    const int64_t b = blockIdx.x;
    int* const mine = source + b * num_tokens;
    invert(keep, b, num_tokens, 0, num_tokens, nullptr, mine);
    __syncthreads();
    if (!dlatents) return;
    for (int k = threadIdx.x; k < keep.kept; k += kThreads) {
        const int token = kept_token(keep, b, k, num_tokens);
        if (token >= 0 && mine[token] == k) continue;
        T* const row = dlatents + (b * (num_prefix + keep.kept) + num_prefix + k) * width;
        for (int d = 0; d < width; ++d) row[d] = from_float<T>(0.0f);
    }
}

// One pass over grad. A thread has n columns, a group of rows and a slice of the batch. It copies what belongs to the
// latents, and leaves its sums over the slice: dpos_slices [S, P+L, D], dmask_slices [S, groups, D]. Null: not wanted.
template <typename T, int n>
__global__ void __launch_bounds__(kThreads, 2)
    disassemble_rows(const T* __restrict__ grad, const int* __restrict__ source, T* __restrict__ dlatents,
                     float* __restrict__ dpos_slices, float* __restrict__ dmask_slices, int batch, int kept,
                     int num_tokens, int num_prefix, int width, int images_per_slice) {
    const int d = (blockIdx.x * blockDim.x + threadIdx.x) * n;
    const int group = blockIdx.y, slice = blockIdx.z, rows = num_prefix + num_tokens;
    if (d >= width) return;
    const int64_t begin = static_cast<int64_t>(slice) * images_per_slice;
    const int64_t end = min(static_cast<int64_t>(batch), begin + images_per_slice);
    float hidden[n] = {};
    for (int row = group * kGroup; row < min(rows, (group + 1) * kGroup); ++row) {
        float sum[n] = {};
        for (int64_t first = begin; first < end; first += kInFlight) {
            Pack<T, n> held[kInFlight] = {};
            int to[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                const int64_t b = first + i;
                to[i] = -1;
                if (b >= end) continue;
                held[i] = load<Pack<T, n>>(grad + (b * rows + row) * width + d);
                const int k = row < num_prefix ? 0 : source[b * num_tokens + row - num_prefix];
                if (k >= 0) to[i] = row < num_prefix ? row : num_prefix + k;
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if (to[i] >= 0 && dlatents) {
                    store(dlatents + ((first + i) * (num_prefix + kept) + to[i]) * width + d, held[i]);
                }
#pragma unroll
                for (int j = 0; j < n; ++j) {
                    const float value = to_float(held[i].values[j]);
                    sum[j] += value;
                    if (to[i] < 0) hidden[j] += value;
                }
            }
        }
        if (dpos_slices) store_floats<n>(dpos_slices + (static_cast<int64_t>(slice) * rows + row) * width + d, sum);
    }
    if (dmask_slices) {
        store_floats<n>(dmask_slices + (static_cast<int64_t>(slice) * gridDim.y + group) * width + d, hidden);
    }
}

// How the backward is cut, and where its scratch lies.
struct Plan {
    int groups, slices;
    int64_t source_bytes, dpos_bytes, dmask_bytes;

    Plan(int batch, int num_tokens, int num_prefix, int width, bool want_mask_token, bool want_pos) {
        const int64_t rows = num_prefix + num_tokens;
        groups = ceil_div(static_cast<int>(rows), kGroup);
        slices = count_slices(batch, groups * int64_t{width} / 8, rows * width);
        const auto bytes = [](int64_t count) { return ceil_div<int64_t>(count * 4, 256) * 256; };
        source_bytes = bytes(int64_t{batch} * num_tokens);
        dpos_bytes = want_pos && slices > 1 ? bytes(slices * rows * width) : 0;
        dmask_bytes = want_mask_token ? bytes(int64_t{slices} * groups * width) : 0;
    }
};

template <typename T, int n>
void launch_disassemble(const void* grad, Keep keep, const int* source, void* dlatents, float* dpos_slices,
                        float* dmask_slices, int num_tokens, int num_prefix, int width, const Plan& plan,
                        Stream stream) {
    const int packs = width / n, threads = std::min(kThreads, ceil_div(packs, 32) * 32);
    launch(disassemble_rows<T, n>, dim3(ceil_div(packs, threads), plan.groups, plan.slices), threads, 0, stream,
           static_cast<const T*>(grad), source, static_cast<T*>(dlatents), dpos_slices, dmask_slices, keep.batch,
           keep.kept, num_tokens, num_prefix, width, ceil_div(keep.batch, plan.slices));
}

}  // namespace

void token_scatter(Dtype dtype, const void* latents, Keep keep, const float* mask_token, const float* pos, void* out,
                   int num_tokens, int num_prefix, int width, Stream stream) {
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        const int blocks = keep.batch * ceil_div(num_prefix + num_tokens, kTile);
        const auto run = [&](auto kernel, int n) {
            launch(kernel, blocks, kThreads, 0, stream, static_cast<const T*>(latents), keep, mask_token, pos,
                   static_cast<T*>(out), num_tokens, num_prefix, width, lanes_log2(width / n));
        };
        if (all_aligned(width * sizeof(T), latents, mask_token, pos, out)) {
            run(assemble_rows<T, kWidest<T>>, kWidest<T>);
        } else {
            run(assemble_rows<T, 1>, 1);
        }
    });
}

int64_t token_scatter_backward_scratch(Keep keep, int num_tokens, int num_prefix, int width, bool want_mask_token,
                                       bool want_pos) {
    const Plan plan(keep.batch, num_tokens, num_prefix, width, want_mask_token, want_pos);
    return plan.source_bytes + plan.dpos_bytes + plan.dmask_bytes;
}

void token_scatter_backward(Dtype dtype, const void* grad, Keep keep, void* dlatents, float* dmask_token, float* dpos,
                            void* scratch, int num_tokens, int num_prefix, int width, Stream stream) {
    const Plan plan(keep.batch, num_tokens, num_prefix, width, dmask_token, dpos);
    int* const source = static_cast<int*>(scratch);
    char* const sums = static_cast<char*>(scratch) + plan.source_bytes;
    float* const dpos_slices = plan.dpos_bytes ? reinterpret_cast<float*>(sums) : dpos;
    float* const dmask_slices = dmask_token ? reinterpret_cast<float*>(sums + plan.dpos_bytes) : nullptr;
    dispatch(dtype, [&](auto example) {
        using T = decltype(example);
        launch(find_sources<T>, keep.batch, kThreads, 0, stream, keep, source, static_cast<T*>(dlatents), num_tokens,
               num_prefix, width);
        const auto run = all_aligned(width * sizeof(T), grad, dlatents, dpos) ? launch_disassemble<T, kWidest<T>>
                                                                              : launch_disassemble<T, 1>;
        run(grad, keep, source, dlatents, dpos_slices, dmask_slices, num_tokens, num_prefix, width, plan, stream);
    });
    if (plan.dpos_bytes) {
        launch_sum_slices(dpos_slices, dpos, plan.slices, int64_t{num_prefix + num_tokens} * width, stream);
    }
    if (dmask_token) launch_sum_slices(dmask_slices, dmask_token, plan.slices * plan.groups, width, stream);
}

}  // namespace ssl_ib
