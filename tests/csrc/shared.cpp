// What test_shared.py calls: the building blocks of the softmax kernels one by one, in C's calling convention.
#include "softmax.h"
#include "tile.h"

namespace ssl_ib {

// One warp multiplies fragments as they are: a [32][4], b [32][2], d [32][4].
template <typename T>
void multiply_fragments(const uint32_t* a, const uint32_t* b, float* d) {
    mma_16816<T>(d + 4 * lane(), a + 4 * lane(), b + 2 * lane());
}

// words [32][4] of the four matrices at from [32][8]
void load_matrices(const uint16_t* from, uint32_t* words, bool transposed) {
    SSL_IB_SHARED(uint4, rows, [32]);
    std::memcpy(&rows[lane()], from + 8 * lane(), 16);
    __syncthreads();
    if (transposed) {
        ldmatrix_x4_trans(words + 4 * lane(), &rows[lane()]);
    } else {
        ldmatrix_x4(words + 4 * lane(), &rows[lane()]);
    }
}

// Copies 4 times 16 bytes a thread in two groups and shows them after waiting for the first group alone, then for both.
void copy_in_groups(const uint4* from, uint4* early, uint4* late) {
    SSL_IB_SHARED(uint4, room, [32][4]);
    for (int i = 0; i < 4; ++i) {
        copy_async<16>(&room[lane()][i], from + 4 * lane() + i, i != 3);
        if (i == 1) commit_copies();
    }
    commit_copies();
    wait_for_copies<1>();
    for (int i = 0; i < 4; ++i) early[4 * lane() + i] = room[lane()][i];
    wait_for_copies<0>();
    for (int i = 0; i < 4; ++i) late[4 * lane() + i] = room[lane()][i];
}

// A warpgroup multiplies panels and fragments as they are, `at` bytes from the panels' beginnings: scores [128][columns
// / 2] of left [64 rows of 128 bytes] with right [64 rows], and sums [128][32] of fragments [128][4] with right.
template <typename T, int kColumns>
void multiply_panels(const unsigned char* left, const unsigned char* right, int at, const uint32_t* fragments,
                     float* scores, float* sums, float* early) {
    SSL_IB_SWIZZLED_SHARED(shared);
    if (threadIdx.x == 0) {
        std::memcpy(shared, left, 64 * 128);
        std::memcpy(shared + 64 * 128, right, 64 * 128);
    }
    __syncthreads();
    const int thread = threadIdx.x;
    warpgroup_begin();
    wgmma_rows<T, kColumns>(scores + thread * kColumns / 2, panel_at(shared + at), panel_at(shared + 64 * 128 + at));
    wgmma_values<T>(sums + 32 * thread, fragments + 4 * thread, panel_at(shared + 64 * 128 + 64 * at));
    early[thread] = sums[32 * thread];
    warpgroup_end();
}

constexpr int kWidth = 128, kStreamed = 32;

// Of ragged matrices: scores [64, 32] = owned @ streamed^T over the first panels, out [64, 128] = weights @ streamed.
template <typename T>
void multiply_tiles(Matrix owned, Matrix streamed, int panels, const float* weights, float* scores, float* out) {
    SSL_IB_DYNAMIC_SHARED(unsigned char, shared);
    const Tile<T, kOwnedRows, kWidth> a{shared};
    const Tile<T, kStreamed, kWidth> b{shared + a.kBytes};
    a.fetch(owned, 0, 0);
    b.fetch(streamed, 0, 0);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    float s[kStreamed / 8][4] = {}, w[kStreamed / 8][4], o[kWidth / 8][4] = {};
    add_scores(s, a, b, panels);
    const auto each = [](int width, auto&& visit) {
        for (int n = 0; n < width / 8; ++n) {
            for (int i = 0; i < 4; ++i) visit(n, i, row_of(i / 2) * width + column_of(n) + i % 2);
        }
    };
    each(kStreamed, [&](int n, int i, int at) { scores[at] = s[n][i], w[n][i] = weights[at]; });
    add_values(o, w, b);
    each(kWidth, [&](int n, int i, int at) { out[at] = o[n][i]; });
}

void chunk_offsets(int* offsets) {
    const Tile<float, kStreamed, kWidth> tile{nullptr};
    for (int plane = 0; plane < 3; ++plane) {
        for (int panel = 0; panel < kWidth / 64; ++panel) {
            for (int row = 0; row < kStreamed; ++row) {
                for (int index = 0; index < 8; ++index) {
                    *offsets++ = static_cast<int>(tile.chunk(plane, panel, row, index) - tile.base);
                }
            }
        }
    }
}

}  // namespace ssl_ib

using namespace ssl_ib;

extern "C" {

void set_reverse(int reverse) {
    emulator::set_order(reverse ? emulator::Order::reverse : emulator::Order::forward);
}

void mma(int is_half, const uint32_t* a, const uint32_t* b, float* d) {
    launch(is_half ? multiply_fragments<fp16> : multiply_fragments<bf16>, 1, 32, 0, nullptr, a, b, d);
}

void use_warpgroups(int on) { emulate_warpgroups = on; }

void panels(int is_half, int columns, const unsigned char* left, const unsigned char* right, int at,
            const uint32_t* fragments, float* scores, float* sums, float* early) {
    const auto kernel = columns == 32 ? (is_half ? multiply_panels<fp16, 32> : multiply_panels<bf16, 32>)
                                      : (is_half ? multiply_panels<fp16, 64> : multiply_panels<bf16, 64>);
    launch(kernel, 1, kThreads, 2 * 64 * 128, nullptr, left, right, at, fragments, scores, sums, early);
}

void load(const uint16_t* from, uint32_t* words, int transposed) {
    launch(load_matrices, 1, 32, 0, nullptr, from, words, transposed != 0);
}

void copy(const void* from, void* early, void* late) {
    launch(copy_in_groups, 1, 32, 0, nullptr, static_cast<const uint4*>(from), static_cast<uint4*>(early),
           static_cast<uint4*>(late));
}

void tiles(int dtype, const void* owned, int num_owned, const void* streamed, int num_streamed, int stride, int panels,
           const float* weights, float* scores, float* out) {
    dispatch(static_cast<Dtype>(dtype), [&](auto example) {
        using T = decltype(example);
        constexpr int kBytes = Tile<T, kOwnedRows, kWidth>::kBytes + Tile<T, kStreamed, kWidth>::kBytes;
        launch(multiply_tiles<T>, 1, kThreads, kBytes, nullptr, Matrix{owned, num_owned, stride},
               Matrix{streamed, num_streamed, stride}, panels, weights, scores, out);
    });
}

void offsets(int* into) { chunk_offsets(into); }

// The three planes of n numbers (n even), each after the other.
void planes(const float* numbers, int n, float* into) {
    for (int i = 0; i < n; i += 2) {
        float rest[2] = {numbers[i], numbers[i + 1]};
        for (int plane = 0; plane < 3; ++plane) {
            const uint32_t word = take_plane<bf16>(rest[0], rest[1]);
            for (int j = 0; j < 2; ++j) into[plane * n + i + j] = half_of<bf16>(word, j);
        }
    }
}

// The logsumexp of n logits, `step` of them at a time, and the mean of `values` by their softmax.
void online(const float* logits, const float* values, int n, int step, float* lse, float* mean) {
    Online row;
    float total = 0.0f;
    for (int first = 0; first < n; first += step) {
        const int last = min(first + step, n);
        float top = -INFINITY;
        for (int i = first; i < last; ++i) top = fmaxf(top, logits[i] * kLog2E);
        total *= row.raise(top);
        for (int i = first; i < last; ++i) {
            const float weight = power_of_two(logits[i] * kLog2E - pivot(row.max));
            row.sum += weight;
            total += weight * values[i];
        }
    }
    *lse = row.log_sum();
    *mean = row.sum == 0.0f ? 0.0f : total / row.sum;
}

float probability_of(float logit, float lse) { return probability(logit - lse); }

int are_of_one_label(int low, int high, int other_low, int other_high) {
    return Label{low, high} == Label{other_low, other_high};
}

// The label of row i of `count`, whose words these are, beside a column without one.
int is_of_no_label(const int* low, const int* high, int i, int count) {
    return label_at({low, high}, i, count) == Label{0, 0};
}

void part(int tiles, int split, int splits, int* begin_and_end) {
    const Span span = part_of(tiles, split, splits);
    begin_and_end[0] = span.begin, begin_and_end[1] = span.end;
}

int piece(int step, int own, int pieces) { return piece_at(step, own, pieces); }

int splits(long blocks, long tiles, long slots, long most) { return splits_for(blocks, tiles, slots, most); }

bool bounded(float owned, float streamed, float inverse_temperature) {
    return is_bounded(owned, streamed, inverse_temperature * kLog2E);
}
}
