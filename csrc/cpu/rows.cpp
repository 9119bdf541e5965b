// Rows of any dtype and stride, to and from the precision that is computed in.
//
// bf16 and fp16 are converted with integer operations, which every SIMD level vectorises: _Float16 calls a library
// function per element at the baseline.
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "common.h"

namespace mfwm::cpu {
namespace {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

MFWM_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

MFWM_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

MFWM_INLINE float widen(uint8_t value) { return static_cast<float>(value); }
MFWM_INLINE float widen(float value) { return value; }
MFWM_INLINE double widen(double value) { return value; }
MFWM_INLINE float widen(bfloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }
MFWM_INLINE float widen(float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // Exponent 15 -> 127, and once more for inf and NaN; a subnormal is its integer times 2^-24.
  const uint32_t rebiased = (magnitude << 13) + 0x38000000u + (magnitude >= 0x7c00u ? 0x38000000u : 0u);
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return as_float(sign | (magnitude < 0x0400u ? subnormal : rebiased));
}

MFWM_INLINE void narrow(float value, float& to) { to = value; }
MFWM_INLINE void narrow(double value, float& to) { to = static_cast<float>(value); }
MFWM_INLINE void narrow(float value, double& to) { to = value; }
MFWM_INLINE void narrow(double value, double& to) { to = value; }
MFWM_INLINE void narrow(float value, bfloat16& to) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
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

template <class C, class S>
MFWM_INLINE void load_as(C* __restrict to, const S* __restrict from, int64_t stride, int64_t count) {
  // The strides of contiguous rows and of RGB pixels are constants, so that these loops are vectorised.
  if (stride == 1)
    for (int64_t k = 0; k < count; ++k) to[k] = static_cast<C>(widen(from[k]));
  else if (stride == 3)
    for (int64_t k = 0; k < count; ++k) to[k] = static_cast<C>(widen(from[3 * k]));
  else
    for (int64_t k = 0; k < count; ++k) to[k] = static_cast<C>(widen(from[stride * k]));
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

template <class C>
MFWM_INLINE void load(C* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  switch (dtype) {
    case DType::uint8: return load_as(to, static_cast<const uint8_t*>(from) + offset, stride, count);
    case DType::float32: return load_as(to, static_cast<const float*>(from) + offset, stride, count);
    case DType::bfloat16: return load_as(to, static_cast<const bfloat16*>(from) + offset, stride, count);
    case DType::float16: return load_as(to, static_cast<const float16*>(from) + offset, stride, count);
    default: return load_as(to, static_cast<const double*>(from) + offset, stride, count);
  }
}

template <class C>
MFWM_INLINE void store(const C* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  switch (dtype) {
    case DType::float32: return store_as(from, static_cast<float*>(to) + offset, stride, count);
    case DType::bfloat16: return store_as(from, static_cast<bfloat16*>(to) + offset, stride, count);
    case DType::float16: return store_as(from, static_cast<float16*>(to) + offset, stride, count);
    default: return store_as(from, static_cast<double*>(to) + offset, stride, count);
  }
}

}  // namespace

MFWM_SIMD void load_row(float* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  load(to, from, dtype, offset, stride, count);
}
MFWM_SIMD void load_row(double* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  load(to, from, dtype, offset, stride, count);
}
MFWM_SIMD void store_row(const float* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  store(from, to, dtype, offset, stride, count);
}
MFWM_SIMD void store_row(const double* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count) {
  store(from, to, dtype, offset, stride, count);
}

void stream_row(const float* from, float* to, int64_t count) {
  int64_t k = 0;
#ifdef __SSE2__
  for (; k < count && reinterpret_cast<uintptr_t>(to + k) % 16; ++k) to[k] = from[k];
  for (; k + 4 <= count; k += 4) _mm_stream_ps(to + k, _mm_loadu_ps(from + k));
#endif
  for (; k < count; ++k) to[k] = from[k];
}

void stream_row(const double* from, double* to, int64_t count) {
  int64_t k = 0;
#ifdef __SSE2__
  for (; k < count && reinterpret_cast<uintptr_t>(to + k) % 16; ++k) to[k] = from[k];
  for (; k + 2 <= count; k += 2) _mm_stream_pd(to + k, _mm_loadu_pd(from + k));
#endif
  for (; k < count; ++k) to[k] = from[k];
}

void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace mfwm::cpu
