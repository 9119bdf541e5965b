// Frames in image or token layout, and patches of them in the registers of a warp: loads, stores and averages, for
// every layout and at run time. strips.cuh has them for the layouts that it serves.
#pragma once

#include <algorithm>

#include "common.cuh"

namespace mfwm::cuda {

// A cell is 8 x 8 pixels of a channel. Four lanes of a warp share it, two rows each:
//
//   level   factor   a lane holds    lanes with the same values
//   0       1        2 rows of 8     1
//   1       2        4               1
//   2       4        2               2
//   3       8        1               4
//
// Averages stay inside a lane or add values of the lanes with the other rows. Lanes with the same values do the same
// work; only the first of them, the owner, sums losses and stores.

constexpr int cell = 8, lane_pixels = 16;

__host__ __device__ __forceinline__ int elements_at(int level) { return level == 0 ? lane_pixels : cell >> level; }

// Call body(k) for the `count` elements of a level, with few branches and with k a compile-time constant.
template <class Body>
__device__ __forceinline__ void for_elements(int count, const Body& body) {
  body(0);
  if (count > 1) body(1);
  if (count > 2) body(2), body(3);
  if (count > 4) {
#pragma unroll
    for (int k = 4; k < lane_pixels; ++k) body(k);
  }
}

// A lane's part of a frame at a level: its first row and column, and a bit for each element inside the frame.
struct Region {
  int level, y, x;
  unsigned exists;
};

// Frames [b, t, c, y, x], stored as images or as tokens whose features are in (row, column, channel) order.
struct Frames {
  void* data;
  DType dtype;
  int patch, shift;  // patch 0: images; shift = log2(patch) if patch is a power of 2, 31 for images, else -1
  bool vectors;      // a lane's part of a row is contiguous and aligned for vector loads
  int64_t batch, time, channel, row, column;
  int64_t row_jump, column_jump;  // what the steps from the last row or column of a token to the next have in addition

  __device__ int token_of(int place) const { return shift >= 0 ? place >> shift : place / patch; }
  __device__ int64_t row_offset(int y) const { return y * row + token_of(y) * row_jump; }
  __device__ int64_t column_offset(int x) const { return x * column + token_of(x) * column_jump; }
  __device__ int64_t offset(int64_t b, int64_t t, int c, int y, int x) const {
    return b * batch + t * time + c * channel + row_offset(y) + column_offset(x);
  }
  // From a mean to its log-scale, in the predictions of a distribution.
  __device__ int64_t log_scale_offset(int channels) const { return patch ? patch * row : channels * channel; }
};

inline Frames frames_of(const Array& array, int64_t patch, int64_t channels, int64_t width, int level) {
  const int64_t* s = array.stride;
  const int shift = patch > 1 ? -1 : 31;
  Frames frames{array.data, array.dtype, static_cast<int>(patch), shift, false, s[0], s[1], s[2], s[3], s[4], 0, 0};
  if (patch == 1) {
    // Tokens of one pixel are images with the channels side by side.
    frames.patch = 0;
    frames.channel = s[3];
    frames.row = width * s[2];
    frames.column = s[2];
    return frames;
  }
  if (patch) {
    for (int bits = 0; bits < 31; ++bits)
      if (patch == int64_t(1) << bits) frames.shift = bits;
    frames.channel = s[3];
    frames.column = channels * s[3];
    frames.row = patch * frames.column;
    frames.column_jump = s[2] - patch * frames.column;
    frames.row_jump = width / patch * s[2] - patch * frames.row;
    return frames;
  }
  const int64_t bytes = bytes_of(array.dtype);
  const int64_t vector_bytes = std::min<int64_t>(16, (cell >> std::min(level, 3)) * bytes);
  frames.vectors = s[4] == 1 && reinterpret_cast<uintptr_t>(array.data) % vector_bytes == 0;
  for (int axis = 0; axis < 4; ++axis)
    frames.vectors = frames.vectors && (array.size[axis] == 1 || s[axis] * bytes % vector_bytes == 0);
  return frames;
}

// Average a lane's values at level `from` to the coarser level `to`, one level at a time.
__device__ __forceinline__ void average(float (&v)[lane_pixels], int from, int to) {
  if (from < 1 && to >= 1) {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = 0.25f * (v[2 * k] + v[2 * k + 1] + v[cell + 2 * k] + v[cell + 2 * k + 1]);
  }
  if (from < 2 && to >= 2) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float pair = v[2 * k] + v[2 * k + 1];
      v[k] = 0.25f * (pair + __shfl_xor_sync(~0u, pair, 8));
    }
  }
  if (from < 3 && to >= 3) {
    const float pair = v[0] + v[1];
    v[0] = 0.25f * (pair + __shfl_xor_sync(~0u, pair, 16));
  }
}

// Repeat a lane's values at level `from` over their elements at the finer level `to`.
__device__ __forceinline__ void repeat(float (&v)[lane_pixels], int from, int to) {
  if (from >= 3 && to < 3) v[1] = v[0];
  if (from >= 2 && to < 2) {
    v[3] = v[2] = v[1];
    v[1] = v[0];
  }
  if (from >= 1 && to < 1) {
#pragma unroll
    for (int k = cell - 1; k >= 0; --k) v[k] = v[cell + k] = v[k / 2];
  }
}

// Call run(k, offset) for `columns` elements of a row, from column x on.
template <class Run>
__device__ __forceinline__ void walk(const Frames& frames, int x, int columns, const Run& run) {
  int64_t offset = frames.column_offset(x);
  int inside = frames.patch ? x - frames.token_of(x) * frames.patch : 0;
#pragma unroll
  for (int k = 0; k < cell; ++k) {
    if (k >= columns) break;
    run(k, offset);
    offset += frames.column;
    if (++inside == frames.patch) {
      inside = 0;
      offset += frames.column_jump;
    }
  }
}

template <class T>
__device__ __forceinline__ void load_region(float (&v)[lane_pixels], const Frames& frames, int64_t start,
                                            const Region& region) {
  const int columns = cell >> region.level;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (row > 0 && region.level > 0) break;
    const unsigned exists = region.exists >> (cell * row), all = (1u << columns) - 1;
    const T* from = static_cast<const T*>(frames.data) + start + frames.row_offset(region.y + row);
    float* to = v + cell * row;
    if (frames.vectors && (exists & all) == all) {
      from += region.x;
      if (region.level == 0)
        load_vector<T, 8>(to, from);
      else if (region.level == 1)
        load_vector<T, 4>(to, from);
      else if (region.level == 2)
        load_vector<T, 2>(to, from);
      else
        load_vector<T, 1>(to, from);
    } else {
      walk(frames, region.x, columns, [&](int k, int64_t at) { to[k] = exists >> k & 1 ? to_float(from[at]) : 0.f; });
    }
  }
}

// In place of an element type: the dtype of the frames, known at run time.
struct AnyType {};

template <>
__device__ __forceinline__ void load_region<AnyType>(float (&v)[lane_pixels], const Frames& frames, int64_t start,
                                                     const Region& region) {
  switch (frames.dtype) {
    case DType::uint8: return load_region<uint8_t>(v, frames, start, region);
    case DType::float32: return load_region<float>(v, frames, start, region);
    case DType::bfloat16: return load_region<__nv_bfloat16>(v, frames, start, region);
    default: return load_region<__half>(v, frames, start, region);
  }
}

template <class T>
__device__ __forceinline__ void store_region(const float (&v)[lane_pixels], const Frames& frames, int64_t start,
                                             const Region& region) {
  const int columns = cell >> region.level;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (row > 0 && region.level > 0) break;
    const unsigned exists = region.exists >> (cell * row), all = (1u << columns) - 1;
    T* to = static_cast<T*>(frames.data) + start + frames.row_offset(region.y + row);
    const float* from = v + cell * row;
    if (frames.vectors && (exists & all) == all) {
      to += region.x;
      if (region.level == 0)
        store_vector<T, 8>(from, to);
      else if (region.level == 1)
        store_vector<T, 4>(from, to);
      else if (region.level == 2)
        store_vector<T, 2>(from, to);
      else
        store_vector<T, 1>(from, to);
    } else {
      walk(frames, region.x, columns, [&](int k, int64_t at) {
        if (exists >> k & 1) assign(to[at], from[k]);
      });
    }
  }
}

// The dtypes of gradients are float32 and bfloat16.
template <>
__device__ __forceinline__ void store_region<AnyType>(const float (&v)[lane_pixels], const Frames& frames,
                                                      int64_t start, const Region& region) {
  if (frames.dtype == DType::bfloat16) return store_region<__nv_bfloat16>(v, frames, start, region);
  store_region<float>(v, frames, start, region);
}

}  // namespace mfwm::cuda
