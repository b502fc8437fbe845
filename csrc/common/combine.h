// Starting a sweep; and what its splits found, put together in their order.
//
// Shapes: R owned rows, d width.
#pragma once

#include "../cuda/launch_softmax.h"
#include "kinds.h"

namespace ssl_ib {

constexpr int kRowsPerBlock = kThreads / 32;  // of the kernels here: one warp a row

__device__ __forceinline__ int row_of_warp() { return blockIdx.x * kRowsPerBlock + threadIdx.x / 32; }
inline dim3 grid_of_rows(int rows) { return dim3(ceil_div(rows, kRowsPerBlock)); }

// From part_lse [splits, R], part_mean [splits, R, d] and part_average [splits, R] the whole; mean and average may be
// null.
static __global__ void __launch_bounds__(kThreads)
    combine_forward(int splits, int rows, int width, const float* part_lse, const float* part_mean,
                    const float* part_average, float* lse, float* mean, float* average) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    const auto part = [&](int split) { return part_lse[int64_t{split} * rows + row]; };
    float top = -INFINITY, sum = 0.0f;
    for (int s = 0; s < splits; ++s) top = fmaxf(top, part(s));
    for (int s = 0; s < splits; ++s) sum += __expf(part(s) - pivot(top));
    const float whole = sum == 0.0f ? -INFINITY : top + logf(sum);
    const auto combine = [&](const float* parts, int64_t size, int64_t at) {
        float answer = 0.0f;
        for (int s = 0; s < splits; ++s) answer = fmaf(__expf(part(s) - pivot(whole)), parts[s * size + at], answer);
        return answer;
    };
    if (lane() == 0) {
        lse[row] = whole;
        if (average) average[row] = combine(part_average, rows, row);
    }
    if (!mean) return;
    for (int column = lane(); column < width; column += 32) {
        const int64_t at = row * width + column;
        mean[at] = combine(part_mean, int64_t{rows} * width, at);
    }
}

// The sum of partial [splits, R, d] times `factor`, in the operands' type.
template <typename T>
__global__ void __launch_bounds__(kThreads) combine_gradient(int splits, int rows, int width, const float* partial,
                                                             float factor, const float* raised_by, T* gradient) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    for (int column = lane(); column < width; column += 32) {
        const int64_t at = row * width + column;
        float sum = 0.0f;
        for (int s = 0; s < splits; ++s) sum += partial[int64_t{s} * rows * width + at];
        gradient[at] = from_float<T>(sum * factor_of(factor, raised_by));
    }
}

// For blocks of which about two fit a multiprocessor; width is that of the output (1 where there is a number a row).
inline int splits_of(int num_owned, int num_streamed, int width) {
    const int64_t blocks = int64_t{ceil_div(num_owned, kOwnedRows)} * ceil_div(width, 256);
    return splits_for(blocks, ceil_div(num_streamed, 64), 2 * present_device().multiprocessors);
}

inline Sweep sweep_of(const Logits& logits, int splits) {
    Sweep sweep{};
    sweep.owned[0] = {logits.owned, logits.num_owned, logits.stride};
    sweep.streamed[0] = {logits.streamed, logits.num_streamed, logits.stride};
    sweep.width = logits.width;
    sweep.scale = 1.0f / logits.temperature;
    sweep.splits = splits;
    return sweep;
}

// A forward sweep, into `workspace` first where there are several splits.
template <template <typename, int> class Kind, typename T>
void launch_forward(ForwardProblem problem, float* lse, float* mean, float* average, float* workspace, Stream stream) {
    const int rows = problem.owned[0].rows, splits = problem.splits;
    if (splits == 1) {
        problem.lse = lse, problem.mean = mean, problem.average = average;
        return launch_sweep<Kind, T>(problem, stream);
    }
    // The mean's parts first: they are stored in pairs, and an odd number of anything would put them off.
    problem.mean = workspace;
    problem.lse = problem.mean + (mean ? int64_t{splits} * rows * problem.width : 0);
    problem.average = problem.lse + int64_t{splits} * rows;
    launch_sweep<Kind, T>(problem, stream);
    launch(combine_forward, grid_of_rows(rows), kThreads, 0, stream, splits, rows, problem.width, problem.lse,
           problem.mean, problem.average, lse, mean, average);
}

// A sweep for a gradient, the same way.
template <template <typename, int> class Kind, typename T, class Problem>
void launch_gradient(Problem problem, T* gradient, float* workspace, Stream stream) {
    const int rows = problem.owned[0].rows;
    problem.gradient = gradient;
    problem.partial = problem.splits > 1 ? workspace : nullptr;
    launch_sweep<Kind, T>(problem, stream);
    if (problem.splits == 1) return;
    launch(combine_gradient<T>, grid_of_rows(rows), kThreads, 0, stream, problem.splits, rows, problem.width, workspace,
           problem.factor, problem.raised_by, gradient);
}

}  // namespace ssl_ib
