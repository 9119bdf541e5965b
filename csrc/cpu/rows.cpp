// The load and store functions for rows that common.h declares: rows of any dtype and stride, converted to and from the
// compute precision. Every CPU kernel calls them, directly or through pyramid.h.
#include "convert.h"

namespace mfwm::cpu {
namespace {

struct Identity {
  template <class C>
  MFWM_INLINE C operator()(C value) const {
    return value;
  }
};

template <class C>
struct Scaling {
  C scale, shift;
  MFWM_INLINE C operator()(C value) const { return value * scale + shift; }
};

template <class C, class S, class Map>
MFWM_INLINE void load_as(C* __restrict to, const S* __restrict from, int64_t stride, int64_t count, const Map& map) {
  // Loops with a constant stride vectorise, so contiguous rows (1) and RGB pixels (3) have loops of their own.
  if (stride == 1)
    for (int64_t k = 0; k < count; ++k) to[k] = map(static_cast<C>(widen(from[k])));
  else if (stride == 3)
    for (int64_t k = 0; k < count; ++k) to[k] = map(static_cast<C>(widen(from[3 * k])));
  else
    for (int64_t k = 0; k < count; ++k) to[k] = map(static_cast<C>(widen(from[stride * k])));
}

template <class C, class S>
MFWM_INLINE void store_as(const C* __restrict from, S* __restrict to, int64_t stride, int64_t count) {
  if (stride == 1)
    for (int64_t k = 0; k < count; ++k) narrow(from[k], to[k]);
  else if (stride == 3)
    for (int64_t k = 0; k < count; ++k) narrow(from[k], to[3 * k]);
  else
    for (int64_t k = 0; k < count; ++k) narrow(from[k], to[stride * k]);
}

template <class C, class Map>
MFWM_INLINE void load(C* to, const void* from, DType dtype, const Rows& where, const Map& map) {
  const Rows rows = where.joined();
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    const auto* at = static_cast<const decltype(zero)*>(from) + rows.offset;
    for (int64_t r = 0; r < rows.rows; ++r)
      load_as(to + r * rows.count, at + r * rows.row_stride, rows.stride, rows.count, map);
  });
}

template <class C>
MFWM_INLINE void store(const C* from, void* to, DType dtype, const Rows& where) {
  const Rows rows = where.joined();
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    if constexpr (!std::is_same_v<S, uint8_t>) {
      S* at = static_cast<S*>(to) + rows.offset;
      for (int64_t r = 0; r < rows.rows; ++r)
        store_as(from + r * rows.count, at + r * rows.row_stride, rows.stride, rows.count);
    }
  });
}

}  // namespace

MFWM_SIMD void load_row(float* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  load(to, from, dtype, Rows{offset, 0, stride, 1, count}, Identity{});
}
MFWM_SIMD void load_row(double* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  load(to, from, dtype, Rows{offset, 0, stride, 1, count}, Identity{});
}
MFWM_SIMD void store_row(const float* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  store(from, to, dtype, Rows{offset, 0, stride, 1, count});
}
MFWM_SIMD void store_row(const double* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  store(from, to, dtype, Rows{offset, 0, stride, 1, count});
}
MFWM_SIMD void load_rows(float* to, const void* from, DType dtype, const Rows& rows, float scale, float shift) {
  load(to, from, dtype, rows, Scaling<float>{scale, shift});
}
MFWM_SIMD void load_rows(double* to, const void* from, DType dtype, const Rows& rows, double scale, double shift) {
  load(to, from, dtype, rows, Scaling<double>{scale, shift});
}
MFWM_SIMD void store_rows(const float* from, void* to, DType dtype, const Rows& rows) {
  store(from, to, dtype, rows);
}
MFWM_SIMD void store_rows(const double* from, void* to, DType dtype, const Rows& rows) {
  store(from, to, dtype, rows);
}

}  // namespace mfwm::cpu
