// Box averages of a tile at a chain of factors, and frames in image or token layout: shared by video_pyramid and
// multi_horizon_loss.
#pragma once

#include <limits>

#include "common.h"

namespace mfwm::cpu {

// A rectangle of C in rows of `pitch` elements. `in_pairs`: of every whole 2 * Lanes<float>::count elements of a row those at
// even places come first, as bf16 is read and written, and as pairs are averaged, without a shuffle.
template <class C>
struct Tile {
  C* data = nullptr;
  int64_t pitch = 0, rows = 0, columns = 0;
  bool in_pairs = false;
  MFWM_INLINE C* row(int64_t y) const { return data + y * pitch; }
  // Its rows make one long row.
  MFWM_INLINE bool is_dense() const {
    return pitch == columns && (!in_pairs || columns % (2 * Lanes<float>::count) == 0);
  }
  // Of a dense tile: one long row.
  MFWM_INLINE Tile joined() const { return {data, rows * columns, 1, rows * columns, in_pairs}; }
};

template <class C>
MFWM_INLINE Tile<const C> read_only(const Tile<C>& tile) {
  return {tile.data, tile.pitch, tile.rows, tile.columns, tile.in_pairs};
}

// A row of C or bf16 into pairs and back; the two may be the same.
template <class C, class S>
MFWM_INLINE void into_pairs(const S* from, C* to, int64_t count) {
  using L = Lanes<C>;
  int64_t x = 0;
  for (; x + 2 * L::count <= count; x += 2 * L::count) {
    const auto pairs = L::load_pairs(from + x);
    L::store(pairs.even, to + x);
    L::store(pairs.odd, to + x + L::count);
  }
  for (; x < count; ++x) to[x] = widen(from[x]);
}
template <class C>
MFWM_INLINE void from_pairs(const C* from, C* to, int64_t count) {
  using L = Lanes<C>;
  int64_t x = 0;
  for (; x + 2 * L::count <= count; x += 2 * L::count)
    L::store_pairs({L::load(from + x), L::load(from + x + L::count)}, to + x);
  for (; x < count; ++x) to[x] = from[x];
}

// Frames [b, t, c, y, x], stored as images or cut into tokens of patch x patch pixels with features in
// (row, column, channel) order.
struct Frames {
  Array array;
  int64_t patch = 0;  // 0: images
  int64_t channels = 1, height = 1, width = 1;

  bool is_plain_image() const { return patch == 0 && array.stride[4] == 1; }
  bool is_plain_tokens() const { return patch > 0 && array.stride[3] == 1; }
  int64_t image_offset(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x) const {
    const int64_t* s = array.stride;
    return b * s[0] + t * s[1] + c * s[2] + y * s[3] + x * s[4];
  }

  // run(first, rows): the pixels of row y from column x, `count` of them, lie at `rows`, in pieces that start with pixel
  // x + first. Whole tokens make one piece.
  template <class Run>
  MFWM_INLINE void token_runs(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t count, const Run& run) const {
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
  // The rectangle of one channel whose first pixel is y, x. `to` and `from` hold its rows one after the other.
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
  void store(const C* from, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t rows, int64_t columns) const {
    if (patch == 0) return store_rows(from, array.data, array.dtype, image_rows(b, t, c, y, x, rows, columns));
    for (int64_t r = 0; r < rows; ++r)
      token_runs(b, t, c, y + r, x, columns, [&](int64_t first, const Rows& run) {
        store_rows(from + r * columns + first, array.data, array.dtype, run);
      });
  }
  // All channels of a rectangle, `plane` elements apart.
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
  // A rectangle of one channel in pairs, no NaN with a one among its lower 16 bits; asks for the rectangle below.
  template <class C>
  MFWM_INLINE void load_in_pairs(const Tile<C>& to, int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, C scale,
                                 C shift) const {
    using L = Lanes<C>;
    if constexpr (std::is_same_v<C, float>)
      if (array.dtype == DType::uint8 && is_plain_image()) {
        for (int64_t r = 0; r < to.rows; ++r) {
          const uint8_t* from = static_cast<const uint8_t*>(array.data) + image_offset(b, t, c, y + r, x);
          C* row = to.row(r);
          int64_t k = 0;
          for (; k + 2 * L::count <= to.columns; k += 2 * L::count) {
            const auto pairs = L::load_pairs(from + k);
            L::store(pairs.even * scale + shift, row + k);
            L::store(pairs.odd * scale + shift, row + k + L::count);
            __builtin_prefetch(from + to.rows * array.stride[3] + k, 0, 2);
          }
          for (; k < to.columns; ++k) row[k] = static_cast<C>(from[k]) * scale + shift;
        }
        return;
      }
    load(to.data, b, t, c, y, x, to.rows, to.columns, scale, shift);
    for (int64_t r = 0; r < to.rows; ++r) {
      C* row = to.row(r);
      for (int64_t k = 0; k < to.columns; ++k)
        row[k] = row[k] == row[k] ? row[k] : std::numeric_limits<C>::quiet_NaN();
      into_pairs(row, row, to.columns);
    }
    prefetch(b, t, c, y + to.rows, x, to.rows, to.columns);
  }
  // Asks for a rectangle of a plain image, taken to be dense, that is read soon. Inlined: a call of a function that only
  // asks for memory is left out by the compiler.
  MFWM_INLINE void prefetch(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, int64_t rows, int64_t columns) const {
    if (!is_plain_image()) return;
    const int64_t bytes = size_of(array.dtype);
    const char* first = static_cast<const char*>(array.data) + image_offset(b, t, c, y, x) * bytes;
    for (int64_t k = 0; k < rows * columns * bytes; k += 64) __builtin_prefetch(first + k, 0, 2);
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

// to = averages of 2 x 2 elements, both in pairs or neither. S is C or bf16.
template <bool in_pairs, class C, class S>
MFWM_INLINE void average_pairs(const S* __restrict above, const S* __restrict below, C* __restrict to, int64_t count) {
  using L = Lanes<C>;
  const auto averages = [&](int64_t x) __attribute__((always_inline)) -> typename L::type {
    const S *upper = above + 2 * x, *lower = below + 2 * x;
    if constexpr (std::is_same_v<S, bfloat16>) {
      const auto a = L::load_pairs(upper), b = L::load_pairs(lower);
      return ((a.even + b.even) + (a.odd + b.odd)) * C(0.25);
    } else {
      // The rows are added first: pairs within a row cost shuffles.
      const auto left = L::load(upper) + L::load(lower), right = L::load(upper + L::count) + L::load(lower + L::count);
      if constexpr (in_pairs) return (left + right) * C(0.25);
      return L::pair_sums(left, right) * C(0.25);
    }
  };
  int64_t x = 0;
  if constexpr (in_pairs)
    for (; x + 2 * L::count <= count; x += 2 * L::count) {
      const auto left = averages(x), right = averages(x + L::count);
      L::store(L::template every_other<0>(left, right), to + x);
      L::store(L::template every_other<1>(left, right), to + x + L::count);
    }
  for (; x + L::count <= count; x += L::count) L::store(averages(x), to + x);
  const auto column = [&](int64_t k) __attribute__((always_inline)) { return widen(above[k]) + widen(below[k]); };
  for (; x < count; ++x) to[x] = (column(2 * x) + column(2 * x + 1)) * C(0.25);
}

// to = box average of `from` over ratio x ratio elements, in pairs where `from` is; `scratch` holds two rows of `from`.
template <class C, class S>
MFWM_INLINE void average(const Tile<const S>& from, const Tile<C>& to, int64_t ratio, C* scratch) {
  const C scale = C(1) / static_cast<C>(ratio * ratio);
  for (int64_t y = 0; y < to.rows; ++y) {
    C* __restrict out = to.row(y);
    if (ratio == 2) {
      if (from.in_pairs)
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
    if (from.in_pairs) from_pairs(scratch, scratch, from.columns);
    sum_runs<C>(sums, other, from.columns, ratio, scale, out);
    if (from.in_pairs) into_pairs(to.row(y), to.row(y), to.columns);
  }
}

// to = scale * box average over 2 x 2 bytes + shift, in pairs: their sums are, as words of two. With `fetch`, asks for the
// bytes that many rows below.
template <class C>
MFWM_INLINE void average_bytes(const Tile<const uint8_t>& from, const Tile<C>& to, C scale, C shift, bool fetch) {
  using L = Lanes<C>;
  const C quarter = scale * C(0.25);
  for (int64_t y = 0; y < to.rows; ++y) {
    const uint8_t *upper = from.row(2 * y), *lower = from.row(2 * y + 1);
    for (int64_t x = 0; fetch && x < from.columns; x += 64) {
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
      const auto sums = L::load_pairs(upper + 2 * x) + L::load_pairs(lower + 2 * x);
      L::store((sums.even + sums.odd) * quarter + shift, row + x);
    }
    for (; x < to.columns; ++x)
      row[x] = static_cast<C>(upper[2 * x] + upper[2 * x + 1] + lower[2 * x] + lower[2 * x + 1]) * quarter + shift;
  }
}

// to += weight * from, each element of `from` repeated over ratio x ratio; `scratch` holds one row of `to`.
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

// How frames are cut into tiles of about so many pixels: a tile's rows and columns are multiples of every factor. It is as
// wide as the frame where it can be: its rows then make one long row, and none ends within a cache line, which would be
// written twice past the caches. `chunks` groups of tile rows make a frame; they depend on the shapes alone. As few of
// them as keep the threads busy: what is asked for in advance is the next tile of the chunk.
struct Tiling {
  int64_t rows, columns, height, width, chunks, chunk_rows;

  Tiling(int64_t height_, int64_t width_, const std::vector<int64_t>& factors, int64_t frames, int64_t wanted_pixels)
      : height(height_), width(width_) {
    const int64_t wanted_units = 128;
    int64_t step = 1;
    for (int64_t factor : factors) step = std::lcm(step, factor);
    const int64_t most_columns = std::max(step, 2 * wanted_pixels / step / step * step);
    const int64_t across = (width + most_columns - 1) / most_columns;
    columns = (width / step + across - 1) / across * step;
    rows = std::min(height, std::max(step, wanted_pixels / columns / step * step));
    const int64_t tile_rows = (height + rows - 1) / rows;
    const int64_t wanted = (wanted_units + frames - 1) / std::max<int64_t>(frames, 1);
    const int64_t tiles_in_chunk = tile_rows / std::clamp<int64_t>(wanted, 1, tile_rows);
    chunk_rows = tiles_in_chunk * rows;
    chunks = (height + chunk_rows - 1) / chunk_rows;
  }
};

// The pixels of a tile. 32 KiB of one channel: the tile, its pyramid and its predictions stay in the second-level cache;
// fewer would stay in the first, but the beginnings and ends of so many loops cost more than that saves. With several
// channels at once so many that `planes` of the frame, and the `copies` of all channels at each factor, stay there.
template <class C>
int64_t wanted_pixels(const std::vector<int64_t>& factors, int64_t channels, int64_t copies, int64_t planes) {
  const int64_t most = (int64_t(32) << 10) / sizeof(C);
  if (channels == 1) return most;
  double elements = static_cast<double>(planes);  // for a pixel
  for (int64_t factor : factors) elements += static_cast<double>(channels * copies) / static_cast<double>(factor * factor);
  return std::min(most, static_cast<int64_t>((256 << 10) / (static_cast<double>(sizeof(C)) * elements)));
}

}  // namespace mfwm::cpu
