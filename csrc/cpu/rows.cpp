// Rows of any dtype and stride, to and from the precision that is computed in.
//
// bf16 and fp16 are converted with integer operations, which every SIMD level vectorises: _Float16 calls a library
// function per element at the baseline.
#include "common.h"

namespace mfwm::cpu {
namespace {

struct float16 {
  uint16_t bits;
};

using cpu::narrow;
using cpu::widen;

MFWM_INLINE float widen(uint8_t value) { return static_cast<float>(value); }
MFWM_INLINE float widen(float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // Exponent 15 -> 127, and once more for inf and NaN; a subnormal is its integer times 2^-24.
  const uint32_t rebiased = (magnitude << 13) + 0x38000000u + (magnitude >= 0x7c00u ? 0x38000000u : 0u);
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return as_float(sign | (magnitude < 0x0400u ? subnormal : rebiased));
}

MFWM_INLINE void narrow(double value, float& to) { to = static_cast<float>(value); }
MFWM_INLINE void narrow(float value, double& to) { to = value; }
MFWM_INLINE void narrow(float value, float16& to) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
  // Adding 0.5 lines the last bit of a subnormal fp16 up with the last bit of the sum.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude >= 0x47800000u ? special : finite));
}
MFWM_INLINE void narrow(double value, bfloat16& to) { narrow(static_cast<float>(value), to); }
MFWM_INLINE void narrow(double value, float16& to) { narrow(static_cast<float>(value), to); }

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
  // The strides of contiguous rows and of RGB pixels are constants, so that these loops are vectorised.
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

template <class Body>
MFWM_INLINE void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::uint8: return body(uint8_t{});
    case DType::float32: return body(float{});
    case DType::bfloat16: return body(bfloat16{});
    case DType::float16: return body(float16{});
    default: return body(double{});
  }
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

// Lanes<C> reads and writes S.
template <class C, class S>
constexpr bool has_lanes = std::is_same_v<C, float> && (std::is_same_v<S, float> || std::is_same_v<S, bfloat16>);

template <class C>
MFWM_INLINE void load_planes_as(C* to, int64_t plane, int64_t pitch, const void* from, DType dtype, const Rows& rows) {
  using L = Lanes<C>;
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    for (int64_t r = 0; r < rows.rows; ++r) {
      const S* at = static_cast<const S*>(from) + rows.offset + r * rows.row_stride;
      C* out = to + r * pitch;
      int64_t k = 0;
      if constexpr (has_lanes<C, S>)
        for (; rows.stride == 3 && k + L::count <= rows.count; k += L::count) {
          const S* triples = at + 3 * k;
          const auto planes =
              L::split_triples(L::load(triples), L::load(triples + L::count), L::load(triples + 2 * L::count));
          L::store(planes.first, out + k);
          L::store(planes.second, out + plane + k);
          L::store(planes.third, out + 2 * plane + k);
        }
      for (; k < rows.count; ++k)
        for (int64_t c = 0; c < rows.stride; ++c) out[c * plane + k] = static_cast<C>(widen(at[k * rows.stride + c]));
    }
  });
}

template <class C>
MFWM_INLINE void store_planes_as(const C* from, int64_t plane, int64_t pitch, void* to, DType dtype, const Rows& rows) {
  using L = Lanes<C>;
  with_type(dtype, [&](auto zero) __attribute__((always_inline)) {
    using S = decltype(zero);
    if constexpr (!std::is_same_v<S, uint8_t>)
      for (int64_t r = 0; r < rows.rows; ++r) {
        S* at = static_cast<S*>(to) + rows.offset + r * rows.row_stride;
        const C* in = from + r * pitch;
        int64_t k = 0;
        if constexpr (has_lanes<C, S>)
          for (; rows.stride == 3 && k + L::count <= rows.count; k += L::count) {
            const auto triples =
                L::join_triples({L::load(in + k), L::load(in + plane + k), L::load(in + 2 * plane + k)});
            L::store(triples.first, at + 3 * k);
            L::store(triples.second, at + 3 * k + L::count);
            L::store(triples.third, at + 3 * k + 2 * L::count);
          }
        for (; k < rows.count; ++k)
          for (int64_t c = 0; c < rows.stride; ++c) narrow(in[c * plane + k], at[k * rows.stride + c]);
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

MFWM_SIMD void load_planes(float* to, int64_t plane, int64_t pitch, const void* from, DType dtype, const Rows& rows) {
  load_planes_as(to, plane, pitch, from, dtype, rows);
}
MFWM_SIMD void load_planes(double* to, int64_t plane, int64_t pitch, const void* from, DType dtype, const Rows& rows) {
  load_planes_as(to, plane, pitch, from, dtype, rows);
}
MFWM_SIMD void store_planes(const float* from, int64_t plane, int64_t pitch, void* to, DType dtype, const Rows& rows) {
  store_planes_as(from, plane, pitch, to, dtype, rows);
}
MFWM_SIMD void store_planes(const double* from, int64_t plane, int64_t pitch, void* to, DType dtype, const Rows& rows) {
  store_planes_as(from, plane, pitch, to, dtype, rows);
}

}  // namespace mfwm::cpu
