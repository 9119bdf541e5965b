// Rows [D] of tensors, gone through two registers at a time, read and written where they lie: bf16 in pairs (lanes.h),
// which rows of C that are made of it keep.
#pragma once

#include "pyramid.h"

namespace mfwm::cpu {

// C is what is computed in; S is what tensors are read and written as where their rows are of unit stride and a whole
// number of cache lines: bf16, or C. Other rows are copied to rows of S, and those end in zeros.
template <class C, class S>
struct RowSteps {
  using L = Lanes<C>;
  using Lane = typename L::type;
  using Two = typename L::Pairs;  // of a row that lies in pairs its even and its odd elements
  static constexpr bool in_pairs = !std::is_same_v<C, S>;
  static constexpr int64_t step = 2 * L::count;
  static constexpr int64_t line = 64 / sizeof(S);

  const int64_t depth, row = padded<S>(depth);

  MFWM_INLINE bool lies(const Array& array) const {
    return array.dtype == (in_pairs ? DType::bfloat16 : dtype_of<C>) && array.stride[4] == 1 && depth == row;
  }
  static MFWM_INLINE S* row_in(const Array& array, int64_t offset) { return static_cast<S*>(array.data) + offset; }
  // The row where it lies, or `copy`.
  MFWM_INLINE const S* read(const Array& array, int64_t offset, S* copy) const {
    if (lies(array)) return row_in(array, offset);
    if constexpr (in_pairs)
      for (int64_t d = 0; d < depth; ++d) copy[d] = row_in(array, offset)[d * array.stride[4]];
    else
      load_row(copy, array.data, array.dtype, offset, array.stride[4], depth);
    std::fill(copy + depth, copy + row, S{});
    return copy;
  }
  MFWM_INLINE void write(const Array& array, int64_t offset, const S* copy) const {
    if constexpr (in_pairs)
      for (int64_t d = 0; d < depth; ++d) row_in(array, offset)[d * array.stride[4]] = copy[d];
    else
      store_row(copy, array.data, array.dtype, offset, array.stride[4], depth);
  }
  // A row of any dtype and stride as one of C.
  void read_into(C* to, const Array& array, int64_t offset, int64_t stride) const {
    load_row(to, array.data, array.dtype, offset, stride, depth);
    std::fill(to + depth, to + row, C(0));
    if (in_pairs) into_pairs(to, to, row);
  }
  // Arrays larger than the caches are written past them: whole lines, one after the other. (Half lines of four rows in
  // turn made fan_out twice as slow in bf16.)
  bool streams(const Array& array) const {
    int64_t places = reinterpret_cast<int64_t>(array.data), bytes = sizeof(S);
    for (int k = 0; k < 4; ++k) places |= array.stride[k] * static_cast<int64_t>(sizeof(S));
    for (int64_t size : array.size) bytes *= size;
    return lies(array) && places % 16 == 0 && bytes > int64_t(4) << 20;
  }

  static MFWM_INLINE Two load(const C* from) { return {L::load(from), L::load(from + L::count)}; }
  static MFWM_INLINE Two load(const bfloat16* from) { return L::load_pairs(from); }
  static MFWM_INLINE void store(const Two& two, C* to, bool past_caches = false) {
    if (past_caches) {
      L::stream(two.even, to);
      L::stream(two.odd, to + L::count);
    } else {
      L::store(two.even, to);
      L::store(two.odd, to + L::count);
    }
  }
  // Of numbers made of bf16 alone, whose NaN need not be looked for.
  static MFWM_INLINE void store(const Two& two, bfloat16* to, bool past_caches = false) {
    past_caches ? L::template stream_pairs<false>(two, to) : L::template store_pairs<false>(two, to);
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
