// Half a cache line of elements as one value, and bf16 as elements of it.
//
// Loops over single elements are left to the compiler wherever it vectorises them well. Lanes are for loops over pairs,
// of which it makes long shuffles, and for rows too short for its prologues and epilogues.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// Pieces of functions that exist once per SIMD level must be inlined: a copy for each level exists only of the function
// that bears the macro MFWM_SIMD.
#define MFWM_INLINE inline __attribute__((always_inline))

namespace mfwm::cpu {

struct bfloat16 {
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

MFWM_INLINE float widen(float value) { return value; }
MFWM_INLINE double widen(double value) { return value; }
MFWM_INLINE float widen(bfloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

MFWM_INLINE void narrow(float value, float& to) { to = value; }
MFWM_INLINE void narrow(double value, double& to) { to = value; }
MFWM_INLINE void narrow(float value, bfloat16& to) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// 32 bytes of C: one register of AVX2. Of wider vectors GCC keeps there what it shuffles in memory, element by element,
// which made multi_horizon_loss five times slower; the baseline takes two registers. In memory they may lie at any address.
template <class C>
struct Lanes {
  static constexpr int64_t count = 32 / sizeof(C);
  typedef C type __attribute__((vector_size(32)));

  static MFWM_INLINE type load(const C* from) { return *reinterpret_cast<const Stored*>(from); }
  static MFWM_INLINE void store(const type& lanes, C* to) { *reinterpret_cast<Stored*>(to) = lanes; }
  // Past the caches where the machine can; `to` lies on a multiple of 16 bytes.
  static MFWM_INLINE void stream(const type& lanes, C* to) { stream_words<Words, 4>(reinterpret_cast<Words>(lanes), to); }

  // The same of bf16, rounded to nearest even; C is float.
  static MFWM_INLINE type load(const bfloat16* from) {
    return reinterpret_cast<type>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
  }
  static MFWM_INLINE void store(const type& lanes, bfloat16* to) { *reinterpret_cast<Halves*>(to) = rounded(lanes); }
  static MFWM_INLINE void stream(const type& lanes, bfloat16* to) {
    stream_words<HalfWords, 2>(reinterpret_cast<HalfWords>(rounded(lanes)), to);
  }

  // The elements at even, or odd, places of two neighbours.
  template <int odd>
  static MFWM_INLINE type every_other(const type& a, const type& b) {
    if constexpr (count == 8)
      return __builtin_shufflevector(a, b, odd, odd + 2, odd + 4, odd + 6, odd + 8, odd + 10, odd + 12, odd + 14);
    else
      return __builtin_shufflevector(a, b, odd, odd + 2, odd + 4, odd + 6);
  }
  // Each element of the lower, or upper, half twice.
  template <int upper>
  static MFWM_INLINE type doubled(const type& a) {
    constexpr int k = upper * count / 2;
    if constexpr (count == 8)
      return __builtin_shufflevector(a, a, k, k, k + 1, k + 1, k + 2, k + 2, k + 3, k + 3);
    else
      return __builtin_shufflevector(a, a, k, k, k + 1, k + 1);
  }

 private:
  typedef C Stored __attribute__((vector_size(32), aligned(sizeof(C)), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef long long Words __attribute__((vector_size(32)));
  typedef long long HalfWords __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));

  // In sums and shifts alone: of a comparison GCC makes one per element where a register holds fewer lanes.
  static MFWM_INLINE Halves rounded(const type& lanes) {
    const Bits bits = reinterpret_cast<Bits>(lanes);
    const Bits nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits is_nan = reinterpret_cast<Bits>(reinterpret_cast<Ints>(0x7f800000u - (bits & 0x7fffffffu)) >> 31);
    return __builtin_convertvector((nearest & ~is_nan) | (is_nan & 0x7fc0u), Halves);
  }

  template <class Words, int words>
  static MFWM_INLINE void stream_words(const Words& from, void* to) {
#ifdef __SSE2__
    __m128i* at = static_cast<__m128i*>(to);
    if constexpr (words == 4) {
      _mm_stream_si128(at, __builtin_shufflevector(from, from, 0, 1));
      _mm_stream_si128(at + 1, __builtin_shufflevector(from, from, 2, 3));
    } else {
      _mm_stream_si128(at, from);
    }
#else
    std::memcpy(to, &from, 8 * words);
#endif
  }
};

// What is written past the caches is in memory after this.
inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace mfwm::cpu
