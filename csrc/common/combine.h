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

// What a forward answers: lse [R]; mean [R, d], average [R] and positive [2, R] may be null.
struct Answers {
    float *lse, *mean, *average, *positive;
};

// From the answers of all splits, one after another, the whole.
static __global__ void __launch_bounds__(kThreads)
    combine_forward(int splits, int rows, int width, const Answers parts, const Answers answers) {
    const int64_t row = row_of_warp();
    if (row >= rows) return;
    const auto part = [&](int split) { return parts.lse[int64_t{split} * rows + row]; };
    float top = -INFINITY, sum = 0.0f;
    for (int s = 0; s < splits; ++s) top = fmaxf(top, part(s));
    for (int s = 0; s < splits; ++s) sum += __expf(part(s) - pivot(top));
    const float whole = sum == 0.0f ? -INFINITY : top + logf(sum);
    const auto combine = [&](const float* numbers, int64_t size, int64_t at) {
        float answer = 0.0f;
        for (int s = 0; s < splits; ++s) answer = fmaf(__expf(part(s) - pivot(whole)), numbers[s * size + at], answer);
        return answer;
    };
    if (lane() == 0) {
        answers.lse[row] = whole;
        if (answers.average) answers.average[row] = combine(parts.average, rows, row);
        for (int64_t at = row; answers.positive && at < 2 * rows; at += rows) {
            float total = 0.0f;
            for (int s = 0; s < splits; ++s) total += parts.positive[int64_t{s} * 2 * rows + at];
            answers.positive[at] = total;
        }
    }
    if (!answers.mean) return;
    for (int column = lane(); column < width; column += 32) {
        const int64_t at = row * width + column;
        answers.mean[at] = combine(parts.mean, int64_t{rows} * width, at);
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

// Bytes that the parts of a forward may take, and those of a gradient, beside which a kept mean may lie.
constexpr int64_t kForwardRoom = 32 << 20, kGradientRoom = 16 << 20;

// For blocks of which about two fit a multiprocessor; width is that of the output (1 where there is a number a row).
inline int splits_of(int num_owned, int num_streamed, int width, int64_t room) {
    const int64_t blocks = int64_t{ceil_div(num_owned, kOwnedRows)} * ceil_div(width, 256);
    const int64_t most = room / (4 * int64_t{num_owned} * width);
    return splits_for(blocks, ceil_div(num_streamed, 64), 2 * present_device().multiprocessors, most);
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
void launch_forward(ForwardProblem problem, const Answers& answers, float* workspace, Stream stream) {
    const int rows = problem.owned[0].rows, splits = problem.splits;
    if (splits == 1) {
        problem.lse = answers.lse, problem.mean = answers.mean;
        problem.average = answers.average, problem.positive = answers.positive;
        return launch_sweep<Kind, T>(problem, stream);
    }
    // The mean's parts first: they are stored in pairs, and an odd number of anything would put them off.
    problem.mean = workspace;
    problem.lse = problem.mean + (answers.mean ? int64_t{splits} * rows * problem.width : 0);
    problem.average = problem.lse + int64_t{splits} * rows;
    float* const positive = problem.average + (answers.average ? int64_t{splits} * rows : 0);
    problem.positive = answers.positive ? positive : nullptr;
    launch_sweep<Kind, T>(problem, stream);
    launch(combine_forward, grid_of_rows(rows), kThreads, 0, stream, splits, rows, problem.width,
           Answers{problem.lse, problem.mean, problem.average, problem.positive}, answers);
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
