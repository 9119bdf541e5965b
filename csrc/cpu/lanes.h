// Lanes: explicit vectors of half a cache line, with loads and stores of C, bf16 and bytes. Also bfloat16 itself.
//
// Most loops are plain C++, which the compiler vectorises well. Lanes serve the loops where it does not: those over
// pairs of neighbours, which it turns into long chains of shuffles, and rows too short to pay for its prologues and
// epilogues.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// Every helper of an MFWM_SIMD function must be inlined: only the function that carries the macro is compiled once per
// SIMD level, so a helper that is called would run at the baseline.
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
MFWM_INLINE float widen(uint8_t value) { return static_cast<float>(value); }
MFWM_INLINE float widen(bfloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

MFWM_INLINE void narrow(float value, float& to) { to = value; }
MFWM_INLINE void narrow(double value, double& to) { to = value; }
MFWM_INLINE void narrow(float value, bfloat16& to) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// 32 bytes of C: one AVX2 register, or two at the baseline. GCC shuffles wider vectors through memory, element by
// element, which made multi_horizon_loss five times slower. Loads and stores accept any address.
template <class C>
struct Lanes {
  static constexpr int64_t count = 32 / sizeof(C);
  typedef C type __attribute__((vector_size(32)));

  static MFWM_INLINE type load(const C* from) { return *reinterpret_cast<const Stored*>(from); }
  static MFWM_INLINE void store(const type& lanes, C* to) { *reinterpret_cast<Stored*>(to) = lanes; }
  // A non-temporal store if the machine has one. `to` must be aligned to 16 bytes.
  static MFWM_INLINE void stream(const type& lanes, C* to) { stream_words(reinterpret_cast<Words>(lanes), to); }

  // The same for bf16, rounded to nearest even; C must be float.
  static MFWM_INLINE type load(const bfloat16* from) {
    return reinterpret_cast<type>(widened(*reinterpret_cast<const Halves*>(from)) << 16);
  }
  static MFWM_INLINE type load(const uint8_t* from) {
    type result;
    C wide[count];
    for (int k = 0; k < count; ++k) wide[k] = static_cast<C>(from[k]);
    std::memcpy(&result, wide, sizeof result);
    return result;
  }
  static MFWM_INLINE void store(const type& lanes, bfloat16* to) {
    *reinterpret_cast<Halves*>(to) = narrowed(lanes);
  }
  static MFWM_INLINE void stream(const type& lanes, bfloat16* to) {
    const Halves halves = narrowed(lanes);
#ifdef __SSE2__
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(halves));
#else
    *reinterpret_cast<Halves*>(to) = halves;
#endif
  }

  // 2 * count neighbouring elements, split into those at even and those at odd positions. bf16 loads and stores this
  // way without a shuffle, because a word of 4 bytes holds one even and one odd element. `any_nan` = false skips the
  // check for NaN when storing as bf16. No NaN may then have a non-zero bit among its lower 16, or rounding could carry
  // all the way through it; a NaN that arithmetic on bf16 produces never has one.
  struct Split {
    type even, odd;

    friend MFWM_INLINE Split operator+(const Split& a, const Split& b) { return {a.even + b.even, a.odd + b.odd}; }
    friend MFWM_INLINE Split operator-(const Split& a, const Split& b) { return {a.even - b.even, a.odd - b.odd}; }
    friend MFWM_INLINE Split operator*(const Split& a, const Split& b) { return {a.even * b.even, a.odd * b.odd}; }
    friend MFWM_INLINE Split operator*(const Split& a, C b) { return {a.even * b, a.odd * b}; }
  };
  static MFWM_INLINE Split load_split(const C* from) {
    const type a = load(from), b = load(from + count);
    return {every_other<0>(a, b), every_other<1>(a, b)};
  }
  static MFWM_INLINE Split load_split(const bfloat16* from) {
    const Bits words = *reinterpret_cast<const StoredBits*>(from);
    return {reinterpret_cast<type>(words << 16), reinterpret_cast<type>(words & 0xffff0000u)};
  }
  static MFWM_INLINE Split load_split(const uint8_t* from) {
    const Bits words = widened(*reinterpret_cast<const Halves*>(from));
    return {__builtin_convertvector(reinterpret_cast<Ints>(words & 0xff), type),
            __builtin_convertvector(reinterpret_cast<Ints>(words >> 8), type)};
  }
  // Sums over 2 x 2 bytes: 16 neighbouring sums, split; C must be float.
  static MFWM_INLINE Split sums_of_squares(const uint8_t* upper, const uint8_t* lower) {
    const ManyHalves above = *reinterpret_cast<const StoredHalves*>(upper);
    const ManyHalves below = *reinterpret_cast<const StoredHalves*>(lower);
    const ManyHalves sums = ((above & 0xff) + (above >> 8)) + ((below & 0xff) + (below >> 8));
    const Bits words = reinterpret_cast<Bits>(sums);
    return {__builtin_convertvector(reinterpret_cast<Ints>(words & 0xffff), type),
            __builtin_convertvector(reinterpret_cast<Ints>(words >> 16), type)};
  }
  static MFWM_INLINE void store_split(const Split& split, C* to) {
    if constexpr (count == 8) {
      store(__builtin_shufflevector(split.even, split.odd, 0, 8, 1, 9, 2, 10, 3, 11), to);
      store(__builtin_shufflevector(split.even, split.odd, 4, 12, 5, 13, 6, 14, 7, 15), to + count);
    } else {
      store(__builtin_shufflevector(split.even, split.odd, 0, 4, 1, 5), to);
      store(__builtin_shufflevector(split.even, split.odd, 2, 6, 3, 7), to + count);
    }
  }
  template <bool any_nan = true>
  static MFWM_INLINE void store_split(const Split& split, bfloat16* to) {
    *reinterpret_cast<StoredBits*>(to) = interleaved<any_nan>(split);
  }
  template <bool any_nan = true>
  static MFWM_INLINE void stream_split(const Split& split, bfloat16* to) {
    stream_words(reinterpret_cast<Words>(interleaved<any_nan>(split)), to);
  }

  // The elements at even (or odd) positions of two neighbouring vectors.
  template <int odd>
  static MFWM_INLINE type every_other(const type& a, const type& b) {
    return in_order(alternate<odd>(a, b));
  }
  // a[0] + a[1], a[2] + a[3], ..., and then the same of b.
  static MFWM_INLINE type pair_sums(const type& a, const type& b) {
    return in_order(alternate<0>(a, b) + alternate<1>(a, b));
  }
  // Each element of the lower (or upper) half, twice.
  template <int upper>
  static MFWM_INLINE type doubled(const type& a) {
    constexpr int k = upper * count / 2;
    if constexpr (count == 8)
      return __builtin_shufflevector(a, a, k, k, k + 1, k + 1, k + 2, k + 2, k + 3, k + 3);
    else
      return __builtin_shufflevector(a, a, k, k, k + 1, k + 1);
  }

  // De-interleave three neighbouring vectors of 8 triples into a vector of first, of second and of third elements, and
  // back. 3 * k modulo 8 takes every value, so no two elements of one result are in the same lane, and blends suffice.
  struct Triple {
    type first, second, third;
  };
  static MFWM_INLINE Triple split_triples(const type& a, const type& b, const type& c) {
    static_assert(count == 8);
    const type first = blended(a, b, c), second = blended(c, a, b), third = blended(b, c, a);
    return {__builtin_shufflevector(first, first, 0, 3, 6, 1, 4, 7, 2, 5),
            __builtin_shufflevector(second, second, 1, 4, 7, 2, 5, 0, 3, 6),
            __builtin_shufflevector(third, third, 2, 5, 0, 3, 6, 1, 4, 7)};
  }
  static MFWM_INLINE Triple join_triples(const Triple& planes) {
    static_assert(count == 8);
    const type first = __builtin_shufflevector(planes.first, planes.first, 0, 3, 6, 1, 4, 7, 2, 5);
    const type second = __builtin_shufflevector(planes.second, planes.second, 5, 0, 3, 6, 1, 4, 7, 2);
    const type third = __builtin_shufflevector(planes.third, planes.third, 2, 5, 0, 3, 6, 1, 4, 7);
    return {blended(first, second, third), blended(third, first, second), blended(second, third, first)};
  }

  // Load or store four elements at each of two addresses; C must be float.
  static MFWM_INLINE type load_halves(const float* lower, const float* upper) {
    const Half a = *reinterpret_cast<const StoredHalf*>(lower), b = *reinterpret_cast<const StoredHalf*>(upper);
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  static MFWM_INLINE type load_halves(const bfloat16* lower, const bfloat16* upper) {
    const Quarters quarters{*reinterpret_cast<const StoredQuarter*>(lower),
                            *reinterpret_cast<const StoredQuarter*>(upper)};
    return reinterpret_cast<type>(widened(reinterpret_cast<Halves>(quarters)) << 16);
  }
  static MFWM_INLINE void store_halves(const type& lanes, float* lower, float* upper) {
    *reinterpret_cast<StoredHalf*>(lower) = __builtin_shufflevector(lanes, lanes, 0, 1, 2, 3);
    *reinterpret_cast<StoredHalf*>(upper) = __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7);
  }
  static MFWM_INLINE void store_halves(const type& lanes, bfloat16* lower, bfloat16* upper) {
    const auto quarters = reinterpret_cast<Quarters>(narrowed(lanes));
    *reinterpret_cast<StoredQuarter*>(lower) = quarters[0];
    *reinterpret_cast<StoredQuarter*>(upper) = quarters[1];
  }
  // Transpose the 4 x 4 matrix in the lower halves of four vectors, and the one in their upper halves.
  static MFWM_INLINE void transpose_halves(type* rows) {
    static_assert(count == 8);
    const type a = __builtin_shufflevector(rows[0], rows[1], 0, 8, 1, 9, 4, 12, 5, 13);
    const type b = __builtin_shufflevector(rows[2], rows[3], 0, 8, 1, 9, 4, 12, 5, 13);
    const type c = __builtin_shufflevector(rows[0], rows[1], 2, 10, 3, 11, 6, 14, 7, 15);
    const type d = __builtin_shufflevector(rows[2], rows[3], 2, 10, 3, 11, 6, 14, 7, 15);
    rows[0] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
    rows[1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    rows[2] = __builtin_shufflevector(c, d, 0, 1, 8, 9, 4, 5, 12, 13);
    rows[3] = __builtin_shufflevector(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  // The lower (or upper) halves of a and b as one vector.
  static MFWM_INLINE type lower_halves(const type& a, const type& b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
  }
  static MFWM_INLINE type upper_halves(const type& a, const type& b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }

  // e^x, with relative errors up to 2e-7 in fp32 and 4e-14 in fp64; 0 where it would be subnormal.
  static MFWM_INLINE type exponential(const type& x) {
    constexpr bool is_double = std::is_same_v<C, double>;
    const type zero{}, t = x * C(1.44269504088896340736), half = zero + C(0.5);
    // x = n log(2) + r. n * upper is exact, because upper ends in enough zero bits. lower is applied to e^r and not to
    // r, because the compiler may add the two constants (-fassociative-math).
    const type to_round = t + (t < zero ? -half : half);
    const Whole n = __builtin_convertvector(to_round, Whole);
    const type whole = __builtin_convertvector(n, type);
    constexpr C upper = is_double ? C(6.93147180369123816490e-01) : C(0.693145751953125);
    constexpr C lower = is_double ? C(1.90821492927058770002e-10) : C(1.42860682030941723212e-6);
    const type r = x - whole * upper;
    // Taylor's polynomial: |r| <= log(2) / 2, so the next term is below 1e-8, or 2e-16.
    constexpr C coefficients[] = {C(1.0 / 479001600), C(1.0 / 39916800), C(1.0 / 3628800), C(1.0 / 362880),
                                  C(1.0 / 40320),     C(1.0 / 5040),     C(1.0 / 720),     C(1.0 / 120),
                                  C(1.0 / 24),        C(1.0 / 6),        C(0.5),           C(1),
                                  C(1)};
    constexpr int first = is_double ? 0 : 5;
    type power = zero + coefficients[first];
    for (int k = first + 1; k < 13; ++k) power = power * r + coefficients[k];
    power -= power * (whole * lower);
    // Multiply by 2^n.
    constexpr int mantissa = std::numeric_limits<C>::digits - 1;
    const Exponents exponents = __builtin_convertvector(n, Exponents) * (Word(1) << mantissa);
    power = reinterpret_cast<type>(reinterpret_cast<Exponents>(power) + exponents);
    constexpr C largest = is_double ? C(709.782712893384) : C(88.72283);
    constexpr C smallest = is_double ? C(-708.396418532264) : C(-87.33654);
    power = x > zero + largest ? zero + std::numeric_limits<C>::infinity() : x < zero + smallest ? zero : power;
    return x == x ? power : x;
  }

 private:
  // Lanes 0, 3, 6 of a; 1, 4, 7 of b; 2, 5 of c.
  static MFWM_INLINE type blended(const type& a, const type& b, const type& c) {
    const type ab = __builtin_shufflevector(a, b, 0, 9, 2, 3, 12, 5, 6, 15);
    return __builtin_shufflevector(ab, c, 0, 1, 10, 3, 4, 13, 6, 7);
  }

  typedef C Stored __attribute__((vector_size(32), aligned(sizeof(C)), may_alias));
  typedef C Half __attribute__((vector_size(16)));
  typedef C StoredHalf __attribute__((vector_size(16), aligned(sizeof(C)), may_alias));
  typedef uint64_t Quarters __attribute__((vector_size(16)));
  typedef uint64_t StoredQuarter __attribute__((aligned(2), may_alias));
  typedef std::conditional_t<std::is_same_v<C, double>, int64_t, int32_t> Word;
  typedef Word Exponents __attribute__((vector_size(32)));
  typedef int32_t Whole __attribute__((vector_size(4 * count)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef long long Words __attribute__((vector_size(32)));
  typedef uint32_t StoredBits __attribute__((vector_size(32), aligned(2), may_alias));
  typedef uint16_t ManyHalves __attribute__((vector_size(32)));
  typedef uint16_t StoredHalves __attribute__((vector_size(32), aligned(1), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(16), aligned(1), may_alias));

  // A loop, because GCC splits a vector conversion into two conversions of its halves.
  static MFWM_INLINE Bits widened(const Halves& from) {
    uint16_t narrow[8];
    uint32_t wide[8];
    std::memcpy(narrow, &from, sizeof narrow);
    for (int k = 0; k < 8; ++k) wide[k] = narrow[k];
    Bits result;
    std::memcpy(&result, wide, sizeof result);
    return result;
  }
  // Every other element of a and b, in the order that a single shuffle within register halves produces; in_order sorts
  // them with a second one. GCC needs three shuffles if both steps are written as one.
  template <int odd>
  static MFWM_INLINE type alternate(const type& a, const type& b) {
    if constexpr (count == 8)
      return __builtin_shufflevector(a, b, odd, odd + 2, odd + 8, odd + 10, odd + 4, odd + 6, odd + 12, odd + 14);
    else
      return __builtin_shufflevector(a, b, odd, odd + 4, odd + 2, odd + 6);
  }
  static MFWM_INLINE type in_order(const type& alternated) {
    const Words words = reinterpret_cast<Words>(alternated);
    return reinterpret_cast<type>(__builtin_shufflevector(words, words, 0, 2, 1, 3));
  }
  // The nearest bf16 in the upper half of each word. With `any_nan`, a NaN becomes all ones; the baseline makes that
  // comparison one element at a time, so skip it where possible.
  template <bool any_nan = true>
  static MFWM_INLINE Bits rounded(const type& lanes) {
    const Bits bits = reinterpret_cast<Bits>(lanes), nearest = bits + 0x7fffu + ((bits << 15) >> 31);
    return any_nan ? nearest | reinterpret_cast<Bits>(lanes != lanes) : nearest;
  }
  static MFWM_INLINE Halves narrowed(const type& lanes) {
    return __builtin_convertvector(rounded(lanes) >> 16, Halves);
  }
  template <bool any_nan>
  static MFWM_INLINE Bits interleaved(const Split& split) {
    const auto even = reinterpret_cast<ManyHalves>(rounded<any_nan>(split.even) >> 16);
    const auto odd = reinterpret_cast<ManyHalves>(rounded<any_nan>(split.odd));
    return reinterpret_cast<Bits>(
        __builtin_shufflevector(even, odd, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31));
  }

  static MFWM_INLINE void stream_words(const Words& from, void* to) {
#ifdef __SSE2__
    __m128i* at = static_cast<__m128i*>(to);
    __m128i halves[2];
    std::memcpy(halves, &from, sizeof from);
    _mm_stream_si128(at, halves[0]);
    _mm_stream_si128(at + 1, halves[1]);
#else
    std::memcpy(to, &from, sizeof from);
#endif
  }
};

// Order all earlier non-temporal stores before any later store, so that other threads see them.
inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace mfwm::cpu
