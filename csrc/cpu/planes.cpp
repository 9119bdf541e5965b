// Pixels of tokens, whose channels lie side by side, to planes of the precision that is computed in, and back.
#include "convert.h"

namespace mfwm::cpu {
namespace {

// Lanes<C> reads and writes S.
template <class C, class S>
constexpr bool has_lanes = std::is_same_v<C, float> && (std::is_same_v<S, float> || std::is_same_v<S, bfloat16>);

// Neighbours in a row of pixels, at most eight of them, and the same in `rows` rows of their tokens.
struct Neighbours {
  int64_t first;      // the first one's element of a plane
  int64_t offset;     // in memory, of their first row
  const int64_t* at;  // pixel k of that row lies at offset + at[k]
  int64_t count, rows;
};

// run(neighbours) for all of them, in the order in which they lie in memory.
template <class Run>
MFWM_INLINE void runs(const TokenPixels& pixels, const Run& run) {
  constexpr int64_t most = 256;
  int64_t at[most];
  for (int64_t first = 0; first < pixels.columns; first += most) {
    const int64_t count = std::min(most, pixels.columns - first);
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

// Fours of pixels, from the first on, lie side by side.
MFWM_INLINE bool in_fours(const TokenPixels& pixels) { return pixels.patch % 4 == 0 && pixels.x % 4 == 0; }

// Eight pixels to a vector per channel: `pixel(j)` is where pixel j lies.
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
  const int64_t channels = pixels.channels, below = pixels.rows / pixels.patch * pixels.across * pixels.token_stride;
  const bool threes = channels == 3 && in_fours(pixels), fours = channels % 4 == 0;
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    runs(pixels, [&](const Neighbours& near) __attribute__((always_inline)) {
      const S* row = static_cast<const S*>(from) + near.offset;
      C* out = to + near.first;
      const int64_t* at = near.at;
      for (int64_t r = 0; r < near.rows; ++r, row += pixels.patch * channels, out += pixels.columns) {
        if constexpr (has_lanes<C, S>)
          if (near.count == 8 && (threes || fours)) {
            for (int j = 0; below > 0 && j < 8; j += channels < 16 ? 4 : 1)
              __builtin_prefetch(row + at[j] + below, 0, 2);
            if (fours) {
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
  const bool threes = channels == 3 && in_fours(pixels), fours = channels % 4 == 0;
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    if constexpr (!std::is_same_v<S, uint8_t>)
      runs(pixels, [&](const Neighbours& near) __attribute__((always_inline)) {
        S* row = static_cast<S*>(to) + near.offset;
        const C* in = from + near.first;
        const int64_t* at = near.at;
        for (int64_t r = 0; r < near.rows; ++r, row += pixels.patch * channels, in += pixels.columns) {
          if constexpr (has_lanes<C, S>)
            if (near.count == 8 && (threes || fours)) {
              if (fours) {
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
