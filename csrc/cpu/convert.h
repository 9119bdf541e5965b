// Convert one element of any dtype to the compute precision (widen) and back (narrow), for rows.cpp and planes.cpp.
//
// bf16 and fp16 are converted with integer operations, which the compiler vectorises at every SIMD level; _Float16
// would call a library function per element at the baseline.
#pragma once

#include "common.h"

namespace mfwm::cpu {

struct float16 {
  uint16_t bits;
};

MFWM_INLINE float widen(float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // Rebias the exponent from 15 to 127, twice for inf and NaN. A subnormal is its integer magnitude times 2^-24.
  const uint32_t rebiased = (magnitude << 13) + 0x38000000u + (magnitude >= 0x7c00u ? 0x38000000u : 0u);
  const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return as_float(sign | (magnitude < 0x0400u ? subnormal : rebiased));
}

MFWM_INLINE void narrow(double value, float& to) { to = static_cast<float>(value); }
MFWM_INLINE void narrow(float value, double& to) { to = value; }
MFWM_INLINE void narrow(float value, float16& to) {
  const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns the last bit of a subnormal fp16 with the last bit of the sum, so the addition rounds correctly.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude >= 0x47800000u ? special : finite));
}
MFWM_INLINE void narrow(double value, bfloat16& to) { narrow(static_cast<float>(value), to); }
MFWM_INLINE void narrow(double value, float16& to) { narrow(static_cast<float>(value), to); }

// Call body(S{}), where S is the element type.
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

}  // namespace mfwm::cpu
