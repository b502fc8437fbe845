// The loop that all kernels of the softmax family share: logits, weights made of them, sums of rows by these weights.
//
// One operand is owned: a block keeps 64 of its rows, and of the width of its output a piece of at most 256 numbers.
// The other is streamed past in tiles. For every pair of them the block computes scores, owned @ streamed^T; turns them
// into weights; and adds weights @ streamed to its output. A wider embedding is gone through in pieces, the block's own
// one last, so that it is at hand for the output. Where there are few blocks, each tile of rows goes to `splits` of
// them, which share the streamed tiles.
//
// What the weights are is the kernel's Kind: a class that lives in registers, one object a thread.
//   Element, kWidth, kColumns              operand type; numbers of a piece; rows of a streamed tile
//   kOwned, kStreamed                      matrices on either side, of the same rows each
//   kScores                                score products: owned 0 x streamed 0; the second with the further matrix
//   kValues                                value products: weights 0 x streamed 0; weights 1 x the last streamed
//   kVectors                               words that go with each streamed row
//   Problem                                a Sweep, and what else the Kind wants to know
//   Kind(problem, first_row, own_piece)
//   void weigh(float (&)[kArrays][kColumns / 8][4], Output&, words, first_column)      scores become weights
//   void finish(Output&)
#pragma once

#include "softmax.h"
#include "tile.h"

namespace ssl_ib {

struct Sweep {
    Matrix owned[2], streamed[3];
    const void* vectors[6];  // 32-bit words, [streamed rows]; null for zeros
    int width;               // of the outputs; the operands' stride is this, rounded up
    float scale;             // 1 / temperature
    int splits;
};

template <class Kind>
struct Layout {
    using Owned = Tile<typename Kind::Element, kOwnedRows, Kind::kWidth>;
    using Streamed = Tile<typename Kind::Element, Kind::kColumns, Kind::kWidth>;
    // 16-bit operands arrive asynchronously, one stage ahead; planes pass through registers, so nothing would overlap.
    static constexpr int kStages = Planes<typename Kind::Element>::count == 1 ? 2 : 1;
    static constexpr int kOwnedBytes = Kind::kOwned * Owned::kBytes;
    static constexpr int kStreamedBytes = Kind::kStreamed * Streamed::kBytes;
    // In full atoms of 1024 bytes, so that every tile begins at one.
    static constexpr int kVectorBytes = ceil_div(Kind::kVectors * Kind::kColumns * 4, 1024) * 1024;
    static constexpr int kArrays = Kind::kScores > Kind::kValues ? Kind::kScores : Kind::kValues;

    // With several pieces the owned rows come anew with every stage.
    __host__ __device__ static constexpr int stage_bytes(int pieces) {
        return kStreamedBytes + (pieces > 1 ? kOwnedBytes : 0) + kVectorBytes;
    }
    __host__ __device__ static constexpr int bytes(int pieces) {
        return (pieces > 1 ? 0 : kOwnedBytes) + kStages * stage_bytes(pieces);
    }
};

// The sums of a thread; nothing for a Kind without value products.
template <class Kind>
struct Output {
    float sums[Kind::kValues ? Kind::kWidth / 8 : 1][4] = {};
};

// The compiler would rather spill a little than lose a resident block. Planes leave shared memory for few blocks, so
// with them it shall make room for one. 0: as it sees fit.
template <class Kind>
constexpr int kResidentBlocks = Planes<typename Kind::Element>::count > 1 ? 1 : 0;

template <class Kind>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<Kind>) sweep(const typename Kind::Problem problem) {
    using Layout = ssl_ib::Layout<Kind>;
    using Owned = typename Layout::Owned;
    using Streamed = typename Layout::Streamed;
    constexpr int kColumns = Kind::kColumns, kWidth = Kind::kWidth;
    SSL_IB_SWIZZLED_SHARED(shared);

    const int stride = problem.owned[0].stride, pieces = ceil_div(stride, kWidth);
    const int own = Kind::kValues ? blockIdx.z : pieces - 1;
    const int first_row = blockIdx.x * kOwnedRows;
    const Span tiles = part_of(ceil_div(problem.streamed[0].rows, kColumns), blockIdx.y, problem.splits);
    const int steps = (tiles.end - tiles.begin) * pieces;
    unsigned char* const stages = shared + (pieces > 1 ? 0 : Layout::kOwnedBytes);

    const auto stage = [&](int step) { return stages + step % Layout::kStages * Layout::stage_bytes(pieces); };
    const auto owned = [&](int step, int i) {
        return Owned{(pieces > 1 ? stage(step) + Layout::kStreamedBytes : shared) + i * Owned::kBytes};
    };
    const auto streamed = [&](int step, int i) { return Streamed{stage(step) + i * Streamed::kBytes}; };
    const auto words = [&](int step) {
        return reinterpret_cast<uint32_t*>(stage(step) + Layout::stage_bytes(pieces) - Layout::kVectorBytes);
    };

    const auto fetch = [&](int step) {
        const int row = (tiles.begin + step / pieces) * kColumns;
        const int column = piece_at(step % pieces, own, pieces) * kWidth;
        if (pieces > 1 || step == 0) {
#pragma unroll
            for (int i = 0; i < Kind::kOwned; ++i) owned(step, i).fetch(problem.owned[i], first_row, column);
        }
#pragma unroll
        for (int i = 0; i < Kind::kStreamed; ++i) streamed(step, i).fetch(problem.streamed[i], row, column);
#pragma unroll
        for (int v = 0; v < Kind::kVectors; ++v) {
            const int i = threadIdx.x;
            const uint32_t* from = static_cast<const uint32_t*>(problem.vectors[v]);
            const bool inside = from && row + i < problem.streamed[0].rows;
            if (i < kColumns) copy_async<4>(words(step) + v * kColumns + i, inside ? from + row + i : from, inside);
        }
        commit_copies();
    };

    Kind kind(problem, first_row, own);
    Output<Kind> out;
    float scores[Layout::kArrays][kColumns / 8][4];
    if (Layout::kStages > 1 && steps > 0) fetch(0);
    for (int step = 0; step < steps; ++step) {
        if constexpr (Layout::kStages > 1) {
            wait_for_copies<0>();
            show_to_tensor_cores();
            __syncthreads();
            if (step + 1 < steps) fetch(step + 1);
        } else {
            __syncthreads();
            fetch(step);
            wait_for_copies<0>();
            show_to_tensor_cores();
            __syncthreads();
        }
        const int order = step % pieces;
        if (order == 0) {
#pragma unroll
            for (int i = 0; i < Layout::kArrays * kColumns / 2; ++i) {
                scores[i / (kColumns / 2)][i / 4 % (kColumns / 8)][i % 4] = 0.0f;
            }
        }
        const int panels = ceil_div(min(kWidth, stride - piece_at(order, own, pieces) * kWidth), 64);
        add_scores(scores[0], owned(step, 0), streamed(step, 0), panels);
        if constexpr (Kind::kScores > 1) {
            constexpr bool kOwnsTwo = Kind::kOwned > 1;
            add_scores(scores[1], owned(step, kOwnsTwo), streamed(step, !kOwnsTwo), panels);
        }
        if (order + 1 < pieces) continue;
        kind.weigh(scores, out, words(step), (tiles.begin + step / pieces) * kColumns);
        if constexpr (Kind::kValues > 0) add_values(out.sums, scores[0], streamed(step, 0));
        if constexpr (Kind::kValues > 1) add_values(out.sums, scores[1], streamed(step, Kind::kStreamed - 1));
    }
    kind.finish(out);
}

// What limits a launch on the present device.
struct Device {
    int multiprocessors, shared_bytes;
};

inline Device present_device() {
#ifdef SSL_IB_EMULATED
    return {2, static_cast<int>(emulator::kMaxShared)};
#else
    int id, multiprocessors, shared_bytes;
    check(cudaGetDevice(&id), "device");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id), "device");
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id), "device");
    return {multiprocessors, shared_bytes};
#endif
}

// Starts Kind<T, width> for the narrowest width that holds the embedding, or else the widest that the device has shared
// memory for.
template <template <typename, int> class Kind, typename T, int kWidth = 64>
void launch_sweep(const typename Kind<T, kWidth>::Problem& problem, Stream stream) {
    // Shared memory of the largest device; and the registers that the planes of several matrices leave for sums.
    constexpr int kMostShared = 227 * 1024;
    constexpr bool kManyPlanes = Planes<T>::count > 1 && Kind<T, kWidth>::kOwned + Kind<T, kWidth>::kStreamed > 2;
    constexpr int kWidest = kManyPlanes ? 128 : 256;
    const int stride = problem.owned[0].stride;
    if constexpr (kWidth < kWidest) {
        using Wider = Layout<Kind<T, 2 * kWidth>>;
        if constexpr (Wider::bytes(1) <= kMostShared) {
            if (stride > kWidth && Wider::bytes(ceil_div(stride, 2 * kWidth)) <= present_device().shared_bytes) {
                return launch_sweep<Kind, T, 2 * kWidth>(problem, stream);
            }
        }
    }
    using Chosen = Kind<T, kWidth>;
    const int pieces = ceil_div(stride, kWidth);
    const dim3 grid(ceil_div(problem.owned[0].rows, kOwnedRows), problem.splits, Chosen::kValues ? pieces : 1);
    launch(sweep<Chosen>, grid, kThreads, Layout<Chosen>::bytes(pieces), stream, problem);
}

}  // namespace ssl_ib
