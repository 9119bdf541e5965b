// load_planes and store_planes of common.h: copy pixels between tokens, where a pixel's channels are adjacent, and one
// plane per channel in the compute precision. video_pyramid and multi_horizon_loss call them through pyramid.h.
#include "convert.h"

namespace mfwm::cpu {
namespace {

// Whether Lanes<C> can load and store S.
template <class C, class S>
constexpr bool has_lanes = std::is_same_v<C, float> && (std::is_same_v<S, float> || std::is_same_v<S, bfloat16>);

// A block of pixels to copy together: `count` <= 8 neighbours in each of `rows` rows of the same tokens.
struct Neighbours {
  int64_t first;      // plane element of the first pixel
  int64_t offset;     // offset in the tensor of the first row of pixels
  const int64_t* at;  // pixel k of that row is at offset + at[k]
  int64_t count, rows;
};

// Call run(neighbours) for every such block of the rectangle, in memory order.
template <class Run>
MFWM_INLINE void runs(const TokenPixels& pixels, const Run& run) {
  constexpr int64_t max_columns = 256;
  int64_t at[max_columns];
  for (int64_t first = 0; first < pixels.columns; first += max_columns) {
    const int64_t count = std::min(max_columns, pixels.columns - first);
    for (int64_t k = 0; k < count; ++k) at[k] = pixels.column_at(first + k);
    for (int64_t top = 0, bottom; top < pixels.rows; top = bottom) {
      bottom = std::min(pixels.rows, ((pixels.y + top) / pixels.patch + 1) * pixels.patch - pixels.y);
      const int64_t offset = pixels.row_at(top);
      for (int64_t k = 0; k < count; k += 8) {
        const int64_t element = top * pixels.columns + first + k;
        run(Neighbours{element, offset, at + k, std::min<int64_t>(8, count - k), bottom - top});
      }
    }
  }
}

// True if every group of four pixels, counted from the first, is contiguous in a token.
MFWM_INLINE bool has_contiguous_quads(const TokenPixels& pixels) { return pixels.patch % 4 == 0 && pixels.x % 4 == 0; }

// Transpose eight pixels into one vector per channel and back; `pixel(j)` points to pixel j.
template <class C, class S, class Pixel>
MFWM_INLINE void load_eight(C* to, int64_t plane, int64_t channels, const Pixel& pixel) {
  using L = Lanes<C>;
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    typename L::type rows[8];
    for (int j = 0; j < 8; ++j) rows[j] = L::load(pixel(j) + c);
    L::transpose_halves(rows), L::transpose_halves(rows + 4);
    for (int j = 0; j < 4; ++j) {
      L::store(L::lower_halves(rows[j], rows[j + 4]), to + (c + j) * plane);
      L::store(L::upper_halves(rows[j], rows[j + 4]), to + (c + j + 4) * plane);
    }
  }
  if (c < channels) {
    typename L::type rows[4];
    for (int j = 0; j < 4; ++j) rows[j] = L::load_halves(pixel(j) + c, pixel(j + 4) + c);
    L::transpose_halves(rows);
    for (int j = 0; j < 4; ++j) L::store(rows[j], to + (c + j) * plane);
  }
}

template <class C, class S, class Pixel>
MFWM_INLINE void store_eight(const C* from, int64_t plane, int64_t channels, const Pixel& pixel) {
  using L = Lanes<C>;
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    typename L::type rows[8];
    for (int j = 0; j < 8; ++j) rows[j] = L::load(from + (c + j) * plane);
    L::transpose_halves(rows), L::transpose_halves(rows + 4);
    for (int j = 0; j < 4; ++j) {
      L::store(L::lower_halves(rows[j], rows[j + 4]), pixel(j) + c);
      L::store(L::upper_halves(rows[j], rows[j + 4]), pixel(j + 4) + c);
    }
  }
  if (c < channels) {
    typename L::type rows[4];
    for (int j = 0; j < 4; ++j) rows[j] = L::load(from + (c + j) * plane);
    L::transpose_halves(rows);
    for (int j = 0; j < 4; ++j) L::store_halves(rows[j], pixel(j) + c, pixel(j + 4) + c);
  }
}

template <class C>
MFWM_INLINE void load(C* to, int64_t plane, const void* from, DType dtype, const TokenPixels& pixels) {
  using L = Lanes<C>;
  const int64_t channels = pixels.channels;
  const int64_t next_rectangle = pixels.rows / pixels.patch * pixels.across * pixels.token_stride;
  const bool rgb_quads = channels == 3 && has_contiguous_quads(pixels), channel_quads = channels % 4 == 0;
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    runs(pixels, [&](const Neighbours& near) __attribute__((always_inline)) {
      const S* row = static_cast<const S*>(from) + near.offset;
      C* out = to + near.first;
      const int64_t* at = near.at;
      for (int64_t r = 0; r < near.rows; ++r, row += pixels.patch * channels, out += pixels.columns) {
        if constexpr (has_lanes<C, S>)
          if (near.count == 8 && (rgb_quads || channel_quads)) {
            for (int j = 0; next_rectangle > 0 && j < 8; j += channels < 16 ? 4 : 1)
              __builtin_prefetch(row + at[j] + next_rectangle, 0, 2);
            if (channel_quads) {
              load_eight<C, S>(out, plane, channels, [&](int j) { return row + at[j]; });
              continue;
            }
            const S *a = row + at[0], *b = row + at[4];
            const auto planes = L::split_triples(L::load(a), L::load_halves(a + 8, b), L::load(b + 4));
            L::store(planes.first, out);
            L::store(planes.second, out + plane);
            L::store(planes.third, out + 2 * plane);
            continue;
          }
        for (int64_t k = 0; k < near.count; ++k)
          for (int64_t c = 0; c < channels; ++c) out[c * plane + k] = static_cast<C>(widen(row[at[k] + c]));
      }
    });
  });
}

template <class C>
MFWM_INLINE void store(const C* from, int64_t plane, void* to, DType dtype, const TokenPixels& pixels) {
  using L = Lanes<C>;
  const int64_t channels = pixels.channels;
  const bool rgb_quads = channels == 3 && has_contiguous_quads(pixels), channel_quads = channels % 4 == 0;
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    if constexpr (!std::is_same_v<S, uint8_t>)
      runs(pixels, [&](const Neighbours& near) __attribute__((always_inline)) {
        S* row = static_cast<S*>(to) + near.offset;
        const C* in = from + near.first;
        const int64_t* at = near.at;
        for (int64_t r = 0; r < near.rows; ++r, row += pixels.patch * channels, in += pixels.columns) {
          if constexpr (has_lanes<C, S>)
            if (near.count == 8 && (rgb_quads || channel_quads)) {
              if (channel_quads) {
                store_eight<C, S>(in, plane, channels, [&](int j) { return row + at[j]; });
                continue;
              }
              const auto triples = L::join_triples({L::load(in), L::load(in + plane), L::load(in + 2 * plane)});
              S *a = row + at[0], *b = row + at[4];
              L::store(triples.first, a);
              L::store_halves(triples.second, a + 8, b);
              L::store(triples.third, b + 4);
              continue;
            }
          for (int64_t k = 0; k < near.count; ++k)
            for (int64_t c = 0; c < channels; ++c) narrow(in[c * plane + k], row[at[k] + c]);
        }
      });
  });
}

}  // namespace

MFWM_SIMD void load_planes(float* to, int64_t plane, const void* from, DType dtype, const TokenPixels& pixels) {
  load(to, plane, from, dtype, pixels);
}
MFWM_SIMD void load_planes(double* to, int64_t plane, const void* from, DType dtype, const TokenPixels& pixels) {
  load(to, plane, from, dtype, pixels);
}
MFWM_SIMD void store_planes(const float* from, int64_t plane, void* to, DType dtype, const TokenPixels& pixels) {
  store(from, plane, to, dtype, pixels);
}
MFWM_SIMD void store_planes(const double* from, int64_t plane, void* to, DType dtype, const TokenPixels& pixels) {
  store(from, plane, to, dtype, pixels);
}

}  // namespace mfwm::cpu
