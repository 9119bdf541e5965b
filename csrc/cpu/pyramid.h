// Box averages of a tile at a chain of factors, and frames in image or token layout: shared by video_pyramid and
// multi_horizon_loss.
#pragma once

#include "common.h"

namespace mfwm::cpu {

// Frames [b, t, c, y, x], stored as images or cut into tokens of patch x patch pixels with features in
// (row, column, channel) order.
struct Frames {
  Array array;
  int64_t patch = 0;  // 0: images
  int64_t channels = 1, height = 1, width = 1;

  template <class C>
  bool is_plain_image() const {
    return patch == 0 && is_plain<C>(array, array.stride[4]);
  }
  int64_t image_offset(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x) const {
    const int64_t* s = array.stride;
    return b * s[0] + t * s[1] + c * s[2] + y * s[3] + x * s[4];
  }

  // run(offset, stride, first, count): pixels first .. first + count of row y from column x lie at offset + k * stride.
  template <class Run>
  MFWM_INLINE void runs(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t count, const Run& run) const {
    if (patch == 0) return run(image_offset(b, t, c, y, x), array.stride[4], int64_t(0), count);
    const int64_t* s = array.stride;
    const int64_t frame = b * s[0] + t * s[1] + (y / patch) * (width / patch) * s[2];
    for (int64_t done = 0; done < count;) {
      const int64_t token = (x + done) / patch, column = (x + done) % patch;
      const int64_t run_length = std::min(patch - column, count - done);
      const int64_t feature = ((y % patch) * patch + column) * channels + c;
      run(frame + token * s[2] + feature * s[3], channels * s[3], done, run_length);
      done += run_length;
    }
  }
  template <class C>
  MFWM_INLINE void load(C* to, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t count) const {
    runs(b, t, c, y, x, count, [&](int64_t offset, int64_t stride, int64_t first, int64_t length) {
      load_row(to + first, array.data, array.dtype, offset, stride, length);
    });
  }
  template <class C>
  MFWM_INLINE void store(const C* from, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t count) const {
    runs(b, t, c, y, x, count, [&](int64_t offset, int64_t stride, int64_t first, int64_t length) {
      store_row(from + first, array.data, array.dtype, offset, stride, length);
    });
  }
};

// A rectangle of C in rows of `pitch` elements.
template <class C>
struct Tile {
  C* data = nullptr;
  int64_t pitch = 0, rows = 0, columns = 0;
  MFWM_INLINE C* row(int64_t y) const { return data + y * pitch; }
};

// One step of a chain: this factor is averaged from an earlier, finer one.
struct Level {
  int64_t factor;
  int parent;     // index of that level, -1: the base
  int64_t ratio;  // factor / the parent's factor
};

// The distinct `factors`, each a multiple of `base`, in increasing order, each from the coarsest level it can be made of.
inline std::vector<Level> chain_of(int64_t base, std::vector<int64_t> factors) {
  std::sort(factors.begin(), factors.end());
  factors.erase(std::unique(factors.begin(), factors.end()), factors.end());
  std::vector<Level> chain;
  for (int64_t factor : factors) {
    Level level{factor, -1, factor / base};
    for (int k = 0; k < static_cast<int>(chain.size()); ++k)
      if (factor % chain[k].factor == 0) level = {factor, k, factor / chain[k].factor};
    chain.push_back(level);
  }
  return chain;
}

inline int index_of(const std::vector<Level>& chain, int64_t factor) {
  for (int k = 0; k < static_cast<int>(chain.size()); ++k)
    if (chain[k].factor == factor) return k;
  return -1;
}

// Sums over runs of `ratio` elements, in place. Pairs first: they are vectorised.
template <class C>
MFWM_INLINE void sum_runs(C* __restrict row, C* __restrict other, int64_t count, int64_t ratio, C scale, C* to) {
  while (ratio % 2 == 0) {
    ratio /= 2;
    count /= 2;
    for (int64_t x = 0; x < count; ++x) other[x] = row[2 * x] + row[2 * x + 1];
    std::swap(row, other);
  }
  for (int64_t x = 0; x < count / ratio; ++x) {
    C sum = 0;
    for (int64_t dx = 0; dx < ratio; ++dx) sum += row[x * ratio + dx];
    to[x] = sum * scale;
  }
}

// to = box average of `from` over ratio x ratio elements; `scratch` holds two rows of `from`.
template <class C>
MFWM_INLINE void average(const Tile<C>& from, const Tile<C>& to, int64_t ratio, C* scratch) {
  const C scale = C(1) / static_cast<C>(ratio * ratio);
  for (int64_t y = 0; y < to.rows; ++y) {
    C* __restrict out = to.row(y);
    if (ratio == 2) {
      const C *__restrict above = from.row(2 * y), *__restrict below = from.row(2 * y + 1);
      for (int64_t x = 0; x < to.columns; ++x)
        out[x] = ((above[2 * x] + above[2 * x + 1]) + (below[2 * x] + below[2 * x + 1])) * scale;
      continue;
    }
    C *__restrict sums = scratch, *__restrict other = scratch + padded<C>(from.columns);
    const C* __restrict first = from.row(y * ratio);
    for (int64_t x = 0; x < from.columns; ++x) sums[x] = first[x];
    for (int64_t dy = 1; dy < ratio; ++dy) {
      const C* __restrict next = from.row(y * ratio + dy);
      for (int64_t x = 0; x < from.columns; ++x) sums[x] += next[x];
    }
    sum_runs<C>(sums, other, from.columns, ratio, scale, out);
  }
}

// to += weight * from, each element of `from` repeated over ratio x ratio; `scratch` holds one row of `to`.
template <class C>
MFWM_INLINE void add_repeated(const Tile<C>& from, const Tile<C>& to, int64_t ratio, C weight, C* __restrict scratch) {
  for (int64_t y = 0; y < from.rows; ++y) {
    const C* __restrict row = from.row(y);
    if (ratio == 2)
      for (int64_t x = 0; x < from.columns; ++x) scratch[2 * x] = scratch[2 * x + 1] = row[x] * weight;
    else
      for (int64_t x = 0; x < from.columns; ++x)
        for (int64_t dx = 0; dx < ratio; ++dx) scratch[x * ratio + dx] = row[x] * weight;
    for (int64_t dy = 0; dy < ratio; ++dy) {
      C* __restrict out = to.row(y * ratio + dy);
      for (int64_t x = 0; x < to.columns; ++x) out[x] += scratch[x];
    }
  }
}

// How frames are cut into tiles: a tile's rows and columns are multiples of every factor, and a tile of a few thousand
// elements and its pyramid stay in the first-level cache. `chunks` groups of tile rows make a frame; they depend on the
// shapes alone.
struct Tiling {
  int64_t rows, columns, height, width, chunks, chunk_rows;

  Tiling(int64_t height_, int64_t width_, const std::vector<int64_t>& factors, int64_t frames)
      : height(height_), width(width_) {
    constexpr int64_t most_elements = 2048, wanted_elements = 1024, wanted_units = 256;
    int64_t step = 1;
    for (int64_t factor : factors) step = std::lcm(step, factor);
    columns = std::min(width, std::max(step, most_elements / step / step * step));
    rows = std::min(height, std::max(step, wanted_elements / columns / step * step));
    const int64_t tile_rows = (height + rows - 1) / rows;
    const int64_t wanted = (wanted_units + frames - 1) / std::max<int64_t>(frames, 1);
    const int64_t tiles_in_chunk = tile_rows / std::clamp<int64_t>(wanted, 1, tile_rows);
    chunk_rows = tiles_in_chunk * rows;
    chunks = (height + chunk_rows - 1) / chunk_rows;
  }
};

}  // namespace mfwm::cpu
