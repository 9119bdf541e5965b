// Box averages of a tile at a chain of factors, and loads and stores of frames in image or token layout.
// video_pyramid.cpp and multi_horizon_loss.cpp use all of it; fan_out.cpp uses the chain of levels and the split rows.
#pragma once

#include <limits>

#include "common.h"

namespace mfwm::cpu {

// A rectangle of C in rows of `pitch` elements. If `is_split`, every whole block of 2 * Lanes<float>::count elements of
// a row holds its even elements first, then its odd ones. In that order bf16 is loaded and stored, and neighbours are
// averaged, without a shuffle.
template <class C>
struct Tile {
  C* data = nullptr;
  int64_t pitch = 0, rows = 0, columns = 0;
  bool is_split = false;
  MFWM_INLINE C* row(int64_t y) const { return data + y * pitch; }
  // True if the rows can be treated as one long row.
  MFWM_INLINE bool is_dense() const {
    return pitch == columns && (!is_split || columns % (2 * Lanes<float>::count) == 0);
  }
  // A dense tile as one long row.
  MFWM_INLINE Tile joined() const { return {data, rows * columns, 1, rows * columns, is_split}; }
};

template <class C>
MFWM_INLINE Tile<const C> read_only(const Tile<C>& tile) {
  return {tile.data, tile.pitch, tile.rows, tile.columns, tile.is_split};
}

// Split a row of C or bf16, and interleave it again; `from` and `to` may be the same row.
template <class C, class S>
MFWM_INLINE void split_row(const S* from, C* to, int64_t count) {
  using L = Lanes<C>;
  int64_t x = 0;
  for (; x + 2 * L::count <= count; x += 2 * L::count) {
    const auto split = L::load_split(from + x);
    L::store(split.even, to + x);
    L::store(split.odd, to + x + L::count);
  }
  for (; x < count; ++x) to[x] = widen(from[x]);
}
template <class C>
MFWM_INLINE void interleave_row(const C* from, C* to, int64_t count) {
  using L = Lanes<C>;
  int64_t x = 0;
  for (; x + 2 * L::count <= count; x += 2 * L::count)
    L::store_split({L::load(from + x), L::load(from + x + L::count)}, to + x);
  for (; x < count; ++x) to[x] = from[x];
}

// Whether outputs of so many bytes exceed the caches, so that non-temporal stores pay: an ordinary store first reads the
// cache line that it overwrites.
inline bool exceed_caches(int64_t bytes) { return bytes > int64_t(16) << 20; }

// Store a block of a tile that load_split loaded, which leaves no NaN that needs special rounding.
MFWM_INLINE void store_split(const Lanes<float>::Split& split, bfloat16* to, bool non_temporal) {
  using L = Lanes<float>;
  non_temporal ? L::template stream_split<false>(split, to) : L::template store_split<false>(split, to);
}

// Frames [b, t, c, y, x], stored as images or as tokens of patch x patch pixels, whose features are in (row, column,
// channel) order.
struct Frames {
  Array array;
  int64_t patch = 0;  // 0: images
  static constexpr int64_t block = 2 * Lanes<float>::count;  // pixels that a split tile loads and stores together
  int64_t channels = 1, height = 1, width = 1;

  bool is_plain_image() const { return patch == 0 && array.stride[4] == 1; }
  bool is_plain_tokens() const { return patch > 0 && array.stride[3] == 1; }
  int64_t image_offset(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x) const {
    const int64_t* s = array.stride;
    return b * s[0] + t * s[1] + c * s[2] + y * s[3] + x * s[4];
  }

  // Locate `count` pixels of row y from column x on. Calls run(first, rows) for each piece, where `rows` holds the
  // pixels from x + first on. Adjacent whole tokens are one piece.
  template <class Run>
  MFWM_INLINE void token_runs(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t count,
                              const Run& run) const {
    const int64_t* s = array.stride;
    const int64_t frame = b * s[0] + t * s[1] + (y / patch) * (width / patch) * s[2];
    for (int64_t done = 0; done < count;) {
      const int64_t token = (x + done) / patch, column = (x + done) % patch, left = count - done;
      const int64_t feature = ((y % patch) * patch + column) * channels + c;
      const int64_t tokens = column == 0 && left >= patch ? left / patch : 1;
      const int64_t length = std::min(patch - column, left);
      run(done, Rows{frame + token * s[2] + feature * s[3], s[2], channels * s[3], tokens, length});
      done += tokens * length;
    }
  }
  // Load or store the rectangle of one channel whose first pixel is y, x. `to` and `from` hold its rows without gaps.
  template <class C>
  void load(C* to, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t rows, int64_t columns, C scale = 1,
            C shift = 0) const {
    if (patch == 0)
      return load_rows(to, array.data, array.dtype, image_rows(b, t, c, y, x, rows, columns), scale, shift);
    for (int64_t r = 0; r < rows; ++r)
      token_runs(b, t, c, y + r, x, columns, [&](int64_t first, const Rows& run) {
        load_rows(to + r * columns + first, array.data, array.dtype, run, scale, shift);
      });
  }
  template <class C>
  void store(const C* from, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t rows,
             int64_t columns) const {
    if (patch == 0) return store_rows(from, array.data, array.dtype, image_rows(b, t, c, y, x, rows, columns));
    for (int64_t r = 0; r < rows; ++r)
      token_runs(b, t, c, y + r, x, columns, [&](int64_t first, const Rows& run) {
        store_rows(from + r * columns + first, array.data, array.dtype, run);
      });
  }
  // Load or store all channels of a rectangle; their planes are `plane` elements apart.
  template <class C>
  void load_channels(C* to, int64_t plane, int64_t b, int64_t t, int64_t y, int64_t x, int64_t rows,
                     int64_t columns) const {
    if (is_plain_tokens()) return load_planes(to, plane, array.data, array.dtype, pixels(b, t, y, x, rows, columns));
    for (int64_t c = 0; c < channels; ++c) load(to + c * plane, b, t, c, y, x, rows, columns);
  }
  template <class C>
  void store_channels(const C* from, int64_t plane, int64_t b, int64_t t, int64_t y, int64_t x, int64_t rows,
                      int64_t columns) const {
    if (is_plain_tokens()) return store_planes(from, plane, array.data, array.dtype, pixels(b, t, y, x, rows, columns));
    for (int64_t c = 0; c < channels; ++c) store(from + c * plane, b, t, c, y, x, rows, columns);
  }
  // Load a rectangle of one channel into a split tile, and prefetch the rectangle below. Every NaN becomes the quiet
  // NaN, whose lower 16 bits are zero (see Split in lanes.h). If the array loads_directly, also(r, k, split) is called
  // with the pixels of each whole block, which begins at column k of row r.
  template <class C, class Also>
  MFWM_INLINE void load_split(const Tile<C>& to, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, C scale,
                              C shift, const Also& also) const {
    using L = Lanes<C>;
    const auto load_directly = [&](auto zero) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<C, float>) {
        // Copies, because the compiler must assume that the stores below change what a reference refers to.
        const int64_t columns = to.columns, next = to_next(to.rows, to.columns);
        for (int64_t r = 0; r < to.rows; ++r) {
          const auto* from = static_cast<const decltype(zero)*>(array.data) + image_offset(b, t, c, y + r, x);
          C* row = to.row(r);
          int64_t k = 0;
          for (; k + 2 * L::count <= columns; k += 2 * L::count) {
            auto split = L::load_split(from + k);
            split = {split.even * scale + shift, split.odd * scale + shift};
            L::store(split.even, row + k);
            L::store(split.odd, row + k + L::count);
            also(r, k, split);
            __builtin_prefetch(from + next + k, 0, 2);
          }
          for (; k < columns; ++k) row[k] = widen(from[k]) * scale + shift;
        }
      }
    };
    if (loads_directly<C>()) return array.dtype == DType::uint8 ? load_directly(uint8_t{}) : load_directly(bfloat16{});
    load(to.data, b, t, c, y, x, to.rows, to.columns, scale, shift);
    for (int64_t r = 0; r < to.rows; ++r) {
      C* row = to.row(r);
      for (int64_t k = 0; k < to.columns; ++k)
        row[k] = row[k] == row[k] ? row[k] : std::numeric_limits<C>::quiet_NaN();
      split_row(row, row, to.columns);
    }
    prefetch_next(b, t, c, y, x, to.rows, to.columns);
  }
  template <class C>
  MFWM_INLINE void load_split(const Tile<C>& to, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, C scale,
                              C shift) const {
    load_split(to, b, t, c, y, x, scale, shift, [](int64_t, int64_t, const typename Lanes<C>::Split&) {});
  }
  template <class C>
  bool loads_directly() const {
    const bool fits = array.dtype == DType::uint8 || array.dtype == DType::bfloat16;
    return std::is_same_v<C, float> && is_plain_image() && fits;
  }
  // Store a tile of one channel into a plain image: as C, or from a split tile as bf16. `non_temporal`: with stores that
  // bypass the caches; every row must then be aligned to 16 bytes.
  template <class C>
  MFWM_INLINE void store_tile(const Tile<C>& from, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x,
                              bool non_temporal) const {
    using L = Lanes<C>;
    // The rows of an image as wide as the tile are one long row.
    const Tile<C> tile = from.is_dense() && array.stride[3] == from.columns ? from.joined() : from;
    const int64_t offset = image_offset(b, t, c, y, x), step = 2 * L::count;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const C* row = tile.row(r);
      int64_t k = 0;
      if constexpr (std::is_same_v<C, float>)
        if (tile.is_split) {
          auto* to = static_cast<bfloat16*>(array.data) + offset + r * array.stride[3];
          for (; k + step <= tile.columns; k += step)
            store_split({L::load(row + k), L::load(row + k + L::count)}, to + k, non_temporal);
          for (; k < tile.columns; ++k) narrow(row[k], to[k]);
          continue;
        }
      C* to = static_cast<C*>(array.data) + offset + r * array.stride[3];
      for (; k + L::count <= tile.columns; k += L::count)
        non_temporal ? L::stream(L::load(row + k), to + k) : L::store(L::load(row + k), to + k);
      for (; k < tile.columns; ++k) to[k] = row[k];
    }
  }
  // True if every row of a plain image begins at a multiple of 16 bytes.
  bool has_aligned_rows() const {
    const int64_t bytes = size_of(array.dtype), *s = array.stride;
    return reinterpret_cast<uintptr_t>(array.data) % 16 == 0 && (s[0] | s[1] | s[2] | s[3]) * bytes % 16 == 0;
  }

  // How far the tile after one of this shape is from it: to its right, or below if the tile is as wide as the frame.
  MFWM_INLINE int64_t to_next(int64_t rows, int64_t columns) const {
    return columns < width ? columns : rows * array.stride[3];
  }
  // Prefetch the tile after this one of a plain image. Inlined, because GCC drops calls to functions that only
  // prefetch.
  MFWM_INLINE void prefetch_next(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t rows,
                                 int64_t columns) const {
    if (!is_plain_image()) return;
    const int64_t bytes = size_of(array.dtype);
    const int64_t offset = image_offset(b, t, c, y, x) + to_next(rows, columns);
    const char* first = static_cast<const char*>(array.data) + offset * bytes;
    // Rows that follow each other are one long row.
    const bool is_dense = array.stride[3] == columns;
    for (int64_t r = 0; r < (is_dense ? 1 : rows); ++r)
      for (int64_t k = 0; k < (is_dense ? rows : 1) * columns * bytes; k += 64)
        __builtin_prefetch(first + r * array.stride[3] * bytes + k, 0, 2);
  }

 private:
  TokenPixels pixels(int64_t b, int64_t t, int64_t y, int64_t x, int64_t rows, int64_t columns) const {
    const int64_t* s = array.stride;
    return {b * s[0] + t * s[1], s[2], width / patch, patch, channels, y, x, rows, columns};
  }
  Rows image_rows(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t rows, int64_t columns) const {
    return {image_offset(b, t, c, y, x), array.stride[3], array.stride[4], rows, columns};
  }
};

// One step of a chain: this factor is averaged from its parent, an earlier, finer level.
struct Level {
  int64_t factor;
  int parent;     // index of the parent; -1: the base
  int64_t ratio;  // factor / the parent's factor
};

// The chain of the distinct `factors`, multiples of `base`, in increasing order. The parent of a level is the coarsest
// level whose factor divides its own.
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

// to = scale * the sums over runs of `ratio` elements; overwrites `row` and `other`. While the ratio is even it adds
// neighbours, since the compiler vectorises that loop.
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

// to = averages of 2 x 2 elements; input and output are both split or neither is. S is C or bf16.
template <bool is_split, class C, class S>
MFWM_INLINE void average_pairs(const S* __restrict above, const S* __restrict below, C* __restrict to, int64_t count) {
  using L = Lanes<C>;
  const auto averages = [&](int64_t x) __attribute__((always_inline)) -> typename L::type {
    const S *upper = above + 2 * x, *lower = below + 2 * x;
    if constexpr (std::is_same_v<S, bfloat16>) {
      const auto a = L::load_split(upper), b = L::load_split(lower);
      return ((a.even + b.even) + (a.odd + b.odd)) * C(0.25);
    } else {
      // Add the two rows first, which halves the shuffles that adding neighbours within a row costs.
      const auto left = L::load(upper) + L::load(lower), right = L::load(upper + L::count) + L::load(lower + L::count);
      if constexpr (is_split) return (left + right) * C(0.25);
      return L::pair_sums(left, right) * C(0.25);
    }
  };
  int64_t x = 0;
  if constexpr (is_split)
    for (; x + 2 * L::count <= count; x += 2 * L::count) {
      const auto left = averages(x), right = averages(x + L::count);
      L::store(L::template every_other<0>(left, right), to + x);
      L::store(L::template every_other<1>(left, right), to + x + L::count);
    }
  for (; x + L::count <= count; x += L::count) L::store(averages(x), to + x);
  const auto column = [&](int64_t k) __attribute__((always_inline)) { return widen(above[k]) + widen(below[k]); };
  for (; x < count; ++x) to[x] = (column(2 * x) + column(2 * x + 1)) * C(0.25);
}

// to = the box average of `from` over ratio x ratio elements, split if `from` is. `scratch` has room for two rows of
// `from`.
template <class C, class S>
MFWM_INLINE void average(const Tile<const S>& from, const Tile<C>& to, int64_t ratio, C* scratch) {
  const C scale = C(1) / static_cast<C>(ratio * ratio);
  for (int64_t y = 0; y < to.rows; ++y) {
    C* __restrict out = to.row(y);
    if (ratio == 2) {
      if (from.is_split)
        average_pairs<true>(from.row(2 * y), from.row(2 * y + 1), out, to.columns);
      else
        average_pairs<false>(from.row(2 * y), from.row(2 * y + 1), out, to.columns);
      continue;
    }
    C *__restrict sums = scratch, *__restrict other = scratch + padded<C>(from.columns);
    const S* __restrict first = from.row(y * ratio);
    for (int64_t x = 0; x < from.columns; ++x) sums[x] = widen(first[x]);
    for (int64_t dy = 1; dy < ratio; ++dy) {
      const S* __restrict next = from.row(y * ratio + dy);
      for (int64_t x = 0; x < from.columns; ++x) sums[x] += widen(next[x]);
    }
    if (from.is_split) interleave_row(scratch, scratch, from.columns);
    sum_runs<C>(sums, other, from.columns, ratio, scale, out);
    if (from.is_split) split_row(to.row(y), to.row(y), to.columns);
  }
}

// to = scale * the box average over 2 x 2 bytes + shift, split: summing bytes as 16-bit halves of words leaves the sums
// split. With `prefetch`, also prefetch the tile of bytes below.
template <class C>
MFWM_INLINE void average_bytes(const Tile<const uint8_t>& from, const Tile<C>& to, C scale, C shift, bool prefetch) {
  using L = Lanes<C>;
  const C quarter = scale * C(0.25);
  for (int64_t y = 0; y < to.rows; ++y) {
    const uint8_t *upper = from.row(2 * y), *lower = from.row(2 * y + 1);
    for (int64_t x = 0; prefetch && x < from.columns; x += 64) {
      __builtin_prefetch(upper + from.rows * from.pitch + x, 0, 2);
      __builtin_prefetch(lower + from.rows * from.pitch + x, 0, 2);
    }
    C* row = to.row(y);
    int64_t x = 0;
    for (; x + 2 * L::count <= to.columns; x += 2 * L::count) {
      const auto sums = L::sums_of_squares(upper + 2 * x, lower + 2 * x);
      L::store(sums.even * quarter + shift, row + x);
      L::store(sums.odd * quarter + shift, row + x + L::count);
    }
    for (; x + L::count <= to.columns; x += L::count) {
      const auto sums = L::load_split(upper + 2 * x) + L::load_split(lower + 2 * x);
      L::store((sums.even + sums.odd) * quarter + shift, row + x);
    }
    for (; x < to.columns; ++x)
      row[x] = static_cast<C>(upper[2 * x] + upper[2 * x + 1] + lower[2 * x] + lower[2 * x + 1]) * quarter + shift;
  }
}

// to += weight * from, with each element of `from` repeated over ratio x ratio. `scratch` has room for one row of `to`.
template <class C>
MFWM_INLINE void add_repeated(const Tile<const C>& from, const Tile<C>& to, int64_t ratio, C weight,
                              C* __restrict scratch) {
  using L = Lanes<C>;
  for (int64_t y = 0; y < from.rows; ++y) {
    const C* __restrict row = from.row(y);
    if (ratio == 1) {
      C* __restrict out = to.row(y);
      for (int64_t x = 0; x < to.columns; ++x) out[x] += row[x] * weight;
      continue;
    }
    if (ratio == 2) {
      C *upper = to.row(2 * y), *lower = to.row(2 * y + 1);
      const auto add = [](const typename L::type& term, C* out) __attribute__((always_inline)) {
        L::store(L::load(out) + term, out);
      };
      int64_t x = 0;
      for (; x + L::count <= from.columns; x += L::count) {
        const auto terms = L::load(row + x) * weight;
        const auto left = L::template doubled<0>(terms), right = L::template doubled<1>(terms);
        add(left, upper + 2 * x);
        add(right, upper + 2 * x + L::count);
        add(left, lower + 2 * x);
        add(right, lower + 2 * x + L::count);
      }
      for (; x < from.columns; ++x)
        for (C* out : {upper + 2 * x, lower + 2 * x}) out[0] += row[x] * weight, out[1] += row[x] * weight;
      continue;
    }
    for (int64_t x = 0; x < from.columns; ++x)
      for (int64_t dx = 0; dx < ratio; ++dx) scratch[x * ratio + dx] = row[x] * weight;
    for (int64_t dy = 0; dy < ratio; ++dy) {
      C* __restrict out = to.row(y * ratio + dy);
      for (int64_t x = 0; x < to.columns; ++x) out[x] += scratch[x];
    }
  }
}

// to = the box average of `from` over ratio x ratio rows, where a row holds the channels of one pixel: `from` has
// `width` pixels to a row of pixels. Both are split or neither is.
template <class C, class S>
MFWM_INLINE void average_pixels(const Tile<const S>& from, const Tile<C>& to, int64_t ratio, int64_t width) {
  const int64_t across = width / ratio;
  const C scale = C(1) / static_cast<C>(ratio * ratio);
  for (int64_t y = 0; y < to.rows; ++y) {
    const int64_t first = y / across * ratio * width + y % across * ratio;
    C* __restrict out = to.row(y);
    if (ratio == 2) {
      const S *__restrict a = from.row(first), *__restrict b = from.row(first + 1);
      const S *__restrict c = from.row(first + width), *__restrict d = from.row(first + width + 1);
      for (int64_t x = 0; x < to.columns; ++x)
        out[x] = ((widen(a[x]) + widen(b[x])) + (widen(c[x]) + widen(d[x]))) * scale;
      continue;
    }
    std::fill(out, out + to.columns, C(0));
    for (int64_t dy = 0; dy < ratio; ++dy)
      for (int64_t dx = 0; dx < ratio; ++dx) {
        const S* __restrict row = from.row(first + dy * width + dx);
        for (int64_t x = 0; x < to.columns; ++x) out[x] += widen(row[x]);
      }
    for (int64_t x = 0; x < to.columns; ++x) out[x] *= scale;
  }
}

// The reverse: to += weight * from, with each row of `from` repeated over ratio x ratio rows of `to`.
template <class C>
MFWM_INLINE void add_repeated_pixels(const Tile<const C>& from, const Tile<C>& to, int64_t ratio, C weight,
                                     int64_t width) {
  const int64_t across = width / ratio;
  for (int64_t y = 0; y < to.rows; ++y) {
    const C* __restrict row = from.row(y / width / ratio * across + y % width / ratio);
    C* __restrict out = to.row(y);
    for (int64_t x = 0; x < to.columns; ++x) out[x] += row[x] * weight;
  }
}

// Cuts frames into tiles of about `target_pixels` pixels, whose rows and columns are multiples of the two steps. A tile
// is as wide as the frame if possible: its rows then form one long row, and no row ends inside a cache line, which
// non-temporal stores would write twice. A frame has `chunks` groups of tile rows, the units of work; their number
// depends on shapes only. There are only as many as keep the threads busy, because prefetching reaches no further than
// the next tile of the same chunk.
struct Tiling {
  int64_t rows, columns, height, width, chunks, chunk_rows;

  Tiling(int64_t height_, int64_t width_, int64_t row_step, int64_t column_step, int64_t frames, int64_t target_pixels)
      : height(height_), width(width_) {
    const int64_t target_units = 128;
    const int64_t max_columns = std::max(column_step, 2 * target_pixels / row_step / column_step * column_step);
    const int64_t across = (width + max_columns - 1) / max_columns, steps = (width + column_step - 1) / column_step;
    columns = (steps + across - 1) / across * column_step;
    rows = std::min(height, std::max(row_step, target_pixels / columns / row_step * row_step));
    const int64_t tile_rows = (height + rows - 1) / rows;
    const int64_t target_chunks = (target_units + frames - 1) / std::max<int64_t>(frames, 1);
    const int64_t tiles_in_chunk = tile_rows / std::clamp<int64_t>(target_chunks, 1, tile_rows);
    chunk_rows = tiles_in_chunk * rows;
    chunks = (height + chunk_rows - 1) / chunk_rows;
  }
};

// The smallest multiple of every factor.
inline int64_t common_multiple(const std::vector<int64_t>& factors) {
  int64_t multiple = 1;
  for (int64_t factor : factors) multiple = std::lcm(multiple, factor);
  return multiple;
}

// The number of pixels of a tile. For one channel, 32 KiB: the tile, its pyramid and its predictions then stay in the
// L2 cache. Smaller tiles would stay in L1, but the prologues and epilogues of so many loops cost more than that saves.
// For several channels at once, as many as keep `planes` planes of the frame and `copies` copies of all channels at
// each factor in L2.
template <class C>
int64_t target_pixels(const std::vector<int64_t>& factors, int64_t channels, int64_t copies, int64_t planes) {
  const int64_t max_pixels = (int64_t(32) << 10) / sizeof(C);
  if (channels == 1) return max_pixels;
  double elements = static_cast<double>(planes);  // per pixel
  for (int64_t factor : factors)
    elements += static_cast<double>(channels * copies) / static_cast<double>(factor * factor);
  return std::min(max_pixels, static_cast<int64_t>((256 << 10) / (static_cast<double>(sizeof(C)) * elements)));
}

}  // namespace mfwm::cpu
