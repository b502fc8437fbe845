// Where the pixels of a patch lie in its image. Patches are numbered row by row over the image.
#pragma once

#include "pack.h"

namespace ssl_ib {

// Position of pixel (0, 0) of a patch, channel 0.
__device__ __forceinline__ int64_t patch_corner(const Images& images, int64_t b, int patch, int side) {
    const int columns = images.width / side;
    const int64_t top = patch / columns * side, left = patch % columns * side;
    return (b * images.channels * images.height + top) * images.width + left;
}

// From there to number k of the patch, counted (channel, row, column).
__device__ __forceinline__ int64_t pixel_offset(const Images& images, int k, int side) {
    const int row = k / side, column = k - row * side, channel = row / side;
    return (static_cast<int64_t>(channel) * images.height + row - channel * side) * images.width + column;
}

// n pixels, of any float type. The branch is the same for all threads of a launch.
template <int n>
__device__ __forceinline__ void load_pixels(const Images& images, int64_t at, float (&to)[n]) {
    if (images.dtype == Dtype::float32) {
        load_floats<n>(static_cast<const float*>(images.data) + at, to);
    } else if (images.dtype == Dtype::bfloat16) {
        load_floats<n>(static_cast<const bf16*>(images.data) + at, to);
    } else {
        load_floats<n>(static_cast<const fp16*>(images.data) + at, to);
    }
}

// Whether every run of n pixels within the rows of a patch can be read 16 bytes at a time, or in one piece if shorter.
inline bool runs_of(int n, const Images& images, int side) {
    return side % n == 0 && reinterpret_cast<uintptr_t>(images.data) % 16 == 0;
}

}  // namespace ssl_ib
