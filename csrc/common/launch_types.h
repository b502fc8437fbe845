// What the declaration of a launcher needs, in a header that any compiler reads: no torch, no CUDA.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace ssl_ib {

// cudaStream_t, spelt without CUDA's headers. The emulator ignores it: its launches have ended when they return.
using Stream = CUstream_st*;

enum class Dtype : int { float32, bfloat16, float16 };

// Which tokens of each image are kept: contiguous [batch, kept] of int32 or int64.
struct Keep {
    const void* data;
    bool is_int64;
    int batch, kept;
};

// For each token of each image, [batch, tokens], the first and the last entry of `keep` that names it: INT_MAX and -1
// where none does.
struct Entries {
    int *first, *last;
};

// Contiguous [batch, channels, height, width].
struct Images {
    const void* data;
    Dtype dtype;
    int batch, channels, height, width;
};

// What an embedding of patches is made of, besides its weight [width, depth]. Parameters are float32; bias may be null.
struct Embedding {
    Images images;
    Keep keep;
    int side, num_patches, num_prefix, width, depth;
    const float *bias, *pos, *prefix;
};

}  // namespace ssl_ib
