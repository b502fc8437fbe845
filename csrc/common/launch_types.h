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

// Labels of 64 bits of rows or columns: their low words [N] and their high words [N]. Null where there are none.
struct Labels {
    const int *low, *high;
};

}  // namespace ssl_ib
