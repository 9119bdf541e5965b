// Step over rows [D] two registers at a time, in place where possible. bf16 rows are split into even and odd elements
// (lanes.h); rows of C computed from them stay in that order. fan_out.cpp uses it.
#pragma once

#include "pyramid.h"

namespace mfwm::cpu {

// C is the compute type; S is the storage type, bf16 or C. Tensor rows of S with unit stride and whole cache lines are
// read and written in place. All others go through copies of type S, padded with zeros to whole cache lines.
template <class C, class S>
struct RowSteps {
  using L = Lanes<C>;
  using Lane = typename L::type;
  using Two = typename L::Split;  // two registers: neighbours or, in a split row, the even and the odd elements
  static constexpr bool is_split = !std::is_same_v<C, S>;
  static constexpr int64_t step = 2 * L::count;
  static constexpr int64_t line = 64 / sizeof(S);

  const int64_t depth, row = padded<S>(depth);

  MFWM_INLINE bool is_in_place(const Array& array) const {
    return array.dtype == (is_split ? DType::bfloat16 : dtype_of<C>) && array.stride[4] == 1 && depth == row;
  }
  static MFWM_INLINE S* row_in(const Array& array, int64_t offset) { return static_cast<S*>(array.data) + offset; }
  // A pointer to the row itself if it can be read in place, else `copy`, filled.
  MFWM_INLINE const S* read(const Array& array, int64_t offset, S* copy) const {
    if (is_in_place(array)) return row_in(array, offset);
    if constexpr (is_split)
      for (int64_t d = 0; d < depth; ++d) copy[d] = row_in(array, offset)[d * array.stride[4]];
    else
      load_row(copy, array.data, array.dtype, offset, array.stride[4], depth);
    std::fill(copy + depth, copy + row, S{});
    return copy;
  }
  MFWM_INLINE void write(const Array& array, int64_t offset, const S* copy) const {
    if constexpr (is_split)
      for (int64_t d = 0; d < depth; ++d) row_in(array, offset)[d * array.stride[4]] = copy[d];
    else
      store_row(copy, array.data, array.dtype, offset, array.stride[4], depth);
  }
  // Convert a row of any dtype and stride to a row of C.
  void read_into(C* to, const Array& array, int64_t offset, int64_t stride) const {
    load_row(to, array.data, array.dtype, offset, stride, depth);
    std::fill(to + depth, to + row, C(0));
    if (is_split) split_row(to, to, row);
  }
  // Whether to write an array with non-temporal stores: if its rows are in place and aligned, and it is larger than the
  // caches. Write whole cache lines one after another: alternating half lines of four rows made fan_out twice as slow
  // in bf16.
  bool streams(const Array& array) const {
    int64_t alignment = reinterpret_cast<int64_t>(array.data), bytes = sizeof(S);
    for (int k = 0; k < 4; ++k) alignment |= array.stride[k] * static_cast<int64_t>(sizeof(S));
    for (int64_t size : array.size) bytes *= size;
    return is_in_place(array) && alignment % 16 == 0 && bytes > int64_t(4) << 20;
  }

  static MFWM_INLINE Two load(const C* from) { return {L::load(from), L::load(from + L::count)}; }
  static MFWM_INLINE Two load(const bfloat16* from) { return L::load_split(from); }
  static MFWM_INLINE void store(const Two& two, C* to, bool non_temporal = false) {
    if (non_temporal) {
      L::stream(two.even, to);
      L::stream(two.odd, to + L::count);
    } else {
      L::store(two.even, to);
      L::store(two.odd, to + L::count);
    }
  }
  // For values computed from bf16 only: no NaN needs special rounding.
  static MFWM_INLINE void store(const Two& two, bfloat16* to, bool non_temporal = false) {
    non_temporal ? L::template stream_split<false>(two, to) : L::template store_split<false>(two, to);
  }

  static MFWM_INLINE void add_products(const Two& one, const Two& other, Lane& to) {
    to += one.even * other.even;
    to += one.odd * other.odd;
  }
  static MFWM_INLINE C total(const Lane& sums) {
    C sum = 0;
    for (int64_t k = 0; k < L::count; ++k) sum += sums[k];
    return sum;
  }
  MFWM_INLINE C dot(const C* one, const C* other) const {
    Two sums{};
    for (int64_t d = 0; d < row; d += step) sums = sums + load(one + d) * load(other + d);
    return total(sums.even + sums.odd);
  }
};

}  // namespace mfwm::cpu
