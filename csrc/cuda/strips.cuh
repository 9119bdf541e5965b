// Strips: a few rows, columns and channels of a frame in the registers of one thread, whose loads, stores and sums all
// have compile-time places. multi_horizon_loss_strips.cu and video_pyramid_strips.cu use them.
//
// A box is 8 x 8 pixels. The lanes of a warp that share a box hold a strip each, so that box sums are taken inside a
// lane as far as its strip reaches, and among those lanes by shuffles beyond. A level is log2 of a factor, 0 to 3: at
// level l a strip is rows >> l by columns >> l pixels, or one pixel that several lanes share. They all compute it, and
// the first of them, the owner, sums and stores.
#pragma once

#include <initializer_list>

#include "frames.cuh"

namespace mfwm::cuda {

constexpr int box = 8, levels = 4;

__host__ __device__ constexpr int at_least_1(int size) { return size > 1 ? size : 1; }

// The largest power of 2 that divides `size`, 16 / `bytes` at most: elements of one load or store.
__host__ __device__ constexpr int vector_of(int size, int bytes) {
  int vector = 1;
  while (size % (2 * vector) == 0 && 2 * vector * bytes <= 16) vector *= 2;
  return vector;
}

// How the values of a strip lie in memory.
enum class Runs {
  rows,    // the pixels of a row follow each other, with all channels of a pixel side by side
  pixels,  // the strip has a part of the channels of each pixel
  tokens,  // like rows; at level 0 the rows follow each other too: the strip is a token
};

template <int rows_, int columns_, int channels_, Runs runs_>
struct Strip {
  static constexpr int rows = rows_, columns = columns_, channels = channels_;
  static constexpr Runs runs = runs_;
  // Whether a strip has all channels of a frame.
  static constexpr bool whole = runs != Runs::pixels && channels > 1;
  // The lanes of a box: lane = (y * lanes_x + x) * boxes + box in the warp.
  static constexpr int lanes_x = box / columns, lanes_y = box / rows, boxes = 32 / (lanes_x * lanes_y);

  static constexpr __host__ __device__ int rows_at(int level) { return at_least_1(rows >> level); }
  static constexpr __host__ __device__ int columns_at(int level) { return at_least_1(columns >> level); }
  static constexpr __host__ __device__ int count(int level) { return rows_at(level) * columns_at(level) * channels; }
  // Contiguous elements at a level.
  static constexpr __host__ __device__ int run(int level) {
    return runs == Runs::pixels                   ? channels
           : runs == Runs::tokens && level == 0 ? count(0)
                                                  : columns_at(level) * channels;
  }
};

using ImageStrip = Strip<4, 8, 1, Runs::rows>;     // one channel of images, or of tokens of a channel
using PatchStrip = Strip<2, 8, 3, Runs::rows>;     // tokens of 3 channels and of 8 pixels a side or a multiple
using TokenStrip = Strip<4, 4, 3, Runs::tokens>;   // tokens of 3 channels and 4 pixels a side
using ChannelStrip = Strip<2, 2, 8, Runs::pixels>; // a multiple of 8 channels, side by side: tokens, features

// Divides by a number that is known when the kernel is launched, for dividends below 2^31.
struct Divisor {
  unsigned divisor, multiplier;  // multiplier = 2^(31 + shift) / divisor, rounded up
  int shift;

  __device__ __forceinline__ unsigned quotient(unsigned value) const {
    return __umulhi(2 * value, multiplier) >> shift;
  }
};

inline Divisor divisor_of(int64_t divisor) {
  int shift = 0;
  while (int64_t(1) << shift < divisor) ++shift;
  const uint64_t power = uint64_t(1) << (31 + shift);
  return {static_cast<unsigned>(divisor), static_cast<unsigned>((power + divisor - 1) / divisor), shift};
}

// How the strips of a frame are dealt out to tiles of a warp's strips. Boxes that differ in channels alone follow each
// other where memory has the channels side by side, otherwise those of a plane do.
struct Tiling {
  Divisor inner, boxes_x;  // inner: groups of channels, or boxes of a plane
  int boxes, height, width;
};

template <class S>
Tiling tiling_of(int64_t channels, int64_t height, int64_t width) {
  const int64_t groups = channels / S::channels, across = (width + box - 1) / box, down = (height + box - 1) / box;
  return {divisor_of(S::runs == Runs::pixels ? groups : across * down), divisor_of(across),
          static_cast<int>(groups * across * down), static_cast<int>(height), static_cast<int>(width)};
}

template <class S>
int64_t tiles_of(const Tiling& tiling) {
  return (tiling.boxes + S::boxes - 1) / S::boxes;
}

// A lane's strip.
template <class S>
struct StripPlace {
  int channel, y, x;  // the first
  bool exists;

  __device__ StripPlace(const Tiling& tiling, int tile) {
    const int lane = threadIdx.x % 32, sub = lane / S::boxes, number = tile * S::boxes + lane % S::boxes;
    // Lanes without a strip load another one: they must not run past the end, and take part in all shuffles.
    const unsigned index = min(number, tiling.boxes - 1), outer = S::whole ? 0 : tiling.inner.quotient(index);
    const unsigned inner = index - outer * tiling.inner.divisor;
    const unsigned group = S::runs == Runs::pixels ? inner : outer, at = S::runs == Runs::pixels ? outer : inner;
    const int box_y = tiling.boxes_x.quotient(at), box_x = at - box_y * tiling.boxes_x.divisor;
    channel = group * S::channels;
    y = box_y * box + sub / S::lanes_x * S::rows;
    x = box_x * box + sub % S::lanes_x * S::columns;
    exists = number < tiling.boxes && y < tiling.height && x < tiling.width;
    y = min(y, tiling.height - S::rows);
    x = min(x, tiling.width - S::columns);
  }
  __device__ __forceinline__ bool owns(int level) const {
    return exists && ((y | x) & ((1 << level) - 1)) == 0;
  }
  // Of the strip at a level, from the start of a frame. serves_frames ensures that 32 bits suffice.
  __device__ __forceinline__ unsigned offset(const Frames& frames, int level) const {
    const int row = y >> level, column = x >> level;
    return (S::whole ? 0 : channel * static_cast<int>(frames.channel)) + row * static_cast<int>(frames.row) +
           column * static_cast<int>(frames.column) + (row >> frames.shift) * static_cast<int>(frames.row_jump) +
           (column >> frames.shift) * static_cast<int>(frames.column_jump);
  }
};

// The start of frame t of clip b. serves_frames ensures that 32 bits suffice for the steps.
__device__ __forceinline__ uint64_t start_of(const Frames& frames, unsigned b, unsigned t) {
  return static_cast<uint64_t>(b) * static_cast<unsigned>(frames.batch) +
         static_cast<uint64_t>(t) * static_cast<unsigned>(frames.time);
}

// A strip at a level as it lies in memory. Loads are issued when it is loaded, and waited for when it is converted.
template <class S, int level, class T>
struct Raw {
  static constexpr int size = S::run(level), vector = vector_of(size, sizeof(T)), vectors = S::count(level) / vector;
  Vector<T, vector> values[vectors];

  template <class Access>
  static __device__ __forceinline__ void for_vectors(int row_step, int column_step, const Access& access) {
    constexpr int by_row = S::columns_at(level) * S::channels;
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int run = k * vector / size * size, row = run / by_row, column = run % by_row / S::channels;
      access(k, row * row_step + column * column_step + (k * vector - run));
    }
  }
  __device__ __forceinline__ void load(const T* from, const Frames& frames) {
    for_vectors(static_cast<int>(frames.row), static_cast<int>(frames.column),
                [&](int k, int offset) { values[k].load(from + offset); });
  }
  __device__ __forceinline__ float operator[](int k) const { return values[k / vector][k % vector]; }
  __device__ __forceinline__ void convert(float (&to)[S::count(level)]) const {
#pragma unroll
    for (int k = 0; k < S::count(level); ++k) to[k] = (*this)[k];
  }
};

template <class S, int level, class T>
__device__ __forceinline__ void store_strip(const float (&from)[S::count(level)], T* to, const Frames& frames) {
  using Memory = Raw<S, level, T>;
  Memory::for_vectors(static_cast<int>(frames.row), static_cast<int>(frames.column), [&](int k, int offset) {
    store_vector<T, Memory::vector>(from + k * Memory::vector, to + offset);
  });
}

// Without it the compiler moves the conversions from several dtypes and layouts behind their branches, which takes more
// instructions.
__device__ __forceinline__ void keep_here([[maybe_unused]] float& value) {
#ifdef __CUDACC__
  asm volatile("" : "+f"(value));
#endif
}

// A strip of video as it lies in memory. The channels are planes, or lie side by side.
template <class S, class T, bool side_by_side>
struct RawVideo {
  static constexpr int by_row = S::columns * S::channels;
  static constexpr int size = !side_by_side ? S::columns : S::runs == Runs::pixels ? S::channels : by_row;
  static constexpr int vector = vector_of(size, sizeof(T)), vectors = S::count(0) / vector;
  Vector<T, vector> values[vectors];

  // The place in memory order of value k.
  static constexpr __host__ __device__ int place(int k) {
    return side_by_side ? k : k % S::channels * S::rows * S::columns + k / S::channels;
  }
  __device__ __forceinline__ void load(const T* from, const Frames& video) {
    const int row_step = static_cast<int>(video.row), column_step = static_cast<int>(video.column);
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int first = i * vector;
      if constexpr (side_by_side) {
        const int column = S::runs == Runs::pixels ? first % by_row / S::channels : 0;
        const int inside = first % by_row - column * S::channels;
        values[i].load(from + (first / by_row * row_step + column * column_step + inside));
      } else {
        const int c = first / (S::rows * S::columns), row = first / S::columns % S::rows;
        values[i].load(from + (c * static_cast<int>(video.channel) + row * row_step + first % S::columns));
      }
    }
  }
  __device__ __forceinline__ void convert(float (&to)[S::count(0)]) const {
#pragma unroll
    for (int k = 0; k < S::count(0); ++k) {
      to[k] = values[place(k) / vector][place(k) % vector];
      keep_here(to[k]);
    }
  }
  // The sums of 2 x 2 pixels. Those of bytes are integers.
  __device__ __forceinline__ void sum(float (&to)[S::count(1)]) const {
#pragma unroll
    for (int k = 0; k < S::count(1); ++k) {
      const int c = k % S::channels, x = k / S::channels % S::columns_at(1), row = k / S::channels / S::columns_at(1);
      const int corner = (2 * row * S::columns + 2 * x) * S::channels + c;
      if constexpr (std::is_same_v<T, uint8_t>) {
        unsigned sum = 0;
        const auto add = [&](int at, unsigned bytes) {
          sum = __dp4a(static_cast<unsigned>(values[at / vector].memory.words[at % vector / 4]), bytes, sum);
        };
#pragma unroll
        for (int first = corner; first <= corner + by_row; first += by_row) {
          const int left = place(first), right = place(first + S::channels);
          const unsigned left_byte = 1u << 8 * (left % vector % 4), right_byte = 1u << 8 * (right % vector % 4);
          if (left / vector == right / vector && left % vector / 4 == right % vector / 4)
            add(left, left_byte | right_byte);
          else
            add(left, left_byte), add(right, right_byte);
        }
        to[k] = static_cast<float>(sum);
      } else {
        const auto value = [&](int k) { return values[place(k) / vector][place(k) % vector]; };
        to[k] = value(corner) + value(corner + S::channels) +
                (value(corner + by_row) + value(corner + by_row + S::channels));
      }
      keep_here(to[k]);
    }
  }
};

// Load the strip of a frame that starts at element `start`, in floating point at level 0, or its sums at level 1.
template <class S, int level, bool side_by_side, class T>
__device__ __forceinline__ void load_video_as(float (&to)[S::count(level)], const Frames& video, uint64_t start) {
  RawVideo<S, T, side_by_side> raw;
  raw.load(static_cast<const T*>(video.data) + start, video);
  if constexpr (level == 0) raw.convert(to);
  else raw.sum(to);
}

template <class S, int level, bool side_by_side>
__device__ __forceinline__ void load_video_in(float (&to)[S::count(level)], const Frames& video, uint64_t start) {
  switch (video.dtype) {
    case DType::uint8: return load_video_as<S, level, side_by_side, uint8_t>(to, video, start);
    case DType::float32: return load_video_as<S, level, side_by_side, float>(to, video, start);
    case DType::bfloat16: return load_video_as<S, level, side_by_side, __nv_bfloat16>(to, video, start);
    default: return load_video_as<S, level, side_by_side, __half>(to, video, start);
  }
}

template <class S, int level>
__device__ __forceinline__ void load_video_strip(float (&to)[S::count(level)], const Frames& video, uint64_t start) {
  if (S::channels > 1 && video.channel == 1) return load_video_in<S, level, true>(to, video, start);
  load_video_in<S, level, false>(to, video, start);
}

// The sums of 2 x 2 values at the level before. All lanes of a warp call it together.
template <class S, int level>
__device__ __forceinline__ void sum_boxes(const float (&from)[S::count(level - 1)], float (&to)[S::count(level)]) {
  constexpr bool in_row = S::columns_at(level - 1) > 1, in_column = S::rows_at(level - 1) > 1;
  // The lanes that hold the other half: their distance doubles with each level that is summed by shuffles.
  constexpr int other_x = in_row ? 0 : S::boxes * (1 << level >> 1) / S::columns;
  constexpr int other_y = in_column ? 0 : S::boxes * S::lanes_x * (1 << level >> 1) / S::rows;
  constexpr int by_row = S::columns_at(level - 1) * S::channels;
#pragma unroll
  for (int k = 0; k < S::count(level); ++k) {
    const int c = k % S::channels, x = k / S::channels % S::columns_at(level);
    const int row = k / S::channels / S::columns_at(level);
    const float* corner = from + (in_column ? 2 : 1) * row * by_row + (in_row ? 2 : 1) * x * S::channels + c;
    float sum = corner[0];
    if (in_row) sum += corner[S::channels];
    if (in_column) sum += in_row ? corner[by_row] + corner[by_row + S::channels] : corner[by_row];
    if (!in_row) sum += __shfl_xor_sync(~0u, sum, other_x);
    if (!in_column) sum += __shfl_xor_sync(~0u, sum, other_y);
    to[k] = sum;
  }
}

// The index at the next level of value k.
template <class S, int level>
constexpr __host__ __device__ int coarser(int k) {
  const int c = k % S::channels, pixel = k / S::channels;
  const int x = pixel % S::columns_at(level), row = pixel / S::columns_at(level);
  const int coarse_x = S::columns_at(level) > 1 ? x / 2 : x, coarse_row = S::rows_at(level) > 1 ? row / 2 : row;
  return (coarse_row * S::columns_at(level + 1) + coarse_x) * S::channels + c;
}

constexpr __host__ __device__ float inverse_area(int level) { return 1.f / static_cast<float>(1 << 2 * level); }

// ---- Host code: which strips serve which tensors

inline bool is_multiple(const Array& array, std::initializer_list<int64_t> steps, int vector) {
  if (reinterpret_cast<uintptr_t>(array.data) % (vector * bytes_of(array.dtype))) return false;
  return std::all_of(steps.begin(), steps.end(), [&](int64_t step) { return step % vector == 0; });
}

// The steps along an axis, 0 if it has but one place.
inline int64_t step_of(const Array& array, int axis) { return array.size[axis] > 1 ? array.stride[axis] : 0; }

// Whether 32 bits suffice for every element of a frame, and for the steps from clip to clip and from frame to frame.
inline bool is_small(const Array& array) {
  constexpr int64_t limit = int64_t(1) << 31;
  int64_t last = 0;
  for (int axis = 2; axis < array.rank; ++axis) last += (array.size[axis] - 1) * array.stride[axis];
  return last < limit && step_of(array, 0) < limit && step_of(array, 1) < limit;
}

template <class S>
bool serves_video(const Array& array, const Frames& video) {
  const int64_t channels = array.size[2], bytes = bytes_of(array.dtype);
  if (array.size[3] % S::rows || array.size[4] % S::columns || !is_small(array)) return false;
  if (S::runs != Runs::pixels ? S::channels > 1 && channels != S::channels : channels % S::channels) return false;
  const int64_t batch = step_of(array, 0), time = step_of(array, 1), row = step_of(array, 3);
  if (S::channels > 1 && video.channel == 1 && (S::runs == Runs::pixels || video.column == S::channels)) {
    const bool whole = S::whole;
    return is_multiple(array, {batch, time, row, whole ? 0 : video.column},
                       vector_of(whole ? S::columns * S::channels : S::channels, bytes));
  }
  return video.column == 1 && (S::channels == 1 || video.channel != 1) &&
         is_multiple(array, {batch, time, row, step_of(array, 2)}, vector_of(S::columns, bytes));
}

// A tensor of frames of `channels` channels at a level, of any layout.
template <class S>
bool serves_frames(const Array& array, const Frames& frames, int64_t channels, int level) {
  if (!is_small(array) || (frames.patch && frames.shift < 0)) return false;
  const int64_t side = int64_t(frames.patch) << level;
  if (frames.patch && (side < S::columns || side < S::rows)) return false;
  if (S::channels > 1 && frames.channel != 1) return false;
  if (S::runs != Runs::pixels && frames.column != S::channels) return false;
  if (S::runs == Runs::tokens && level == 0 && frames.row != S::columns * S::channels) return false;
  const int64_t channel = S::channels == 1 && channels > 1 ? frames.channel : 0;
  const int64_t column = S::runs == Runs::pixels ? frames.column : 0;
  const int64_t row = S::runs == Runs::tokens && level == 0 ? 0 : frames.row;
  const int64_t token_row = frames.patch * frames.row + frames.row_jump;
  const int64_t token_column = frames.patch * frames.column + frames.column_jump;
  return is_multiple(array, {step_of(array, 0), step_of(array, 1), channel, column, row, token_row, token_column},
                     vector_of(S::run(level), bytes_of(array.dtype)));
}

}  // namespace mfwm::cuda
