// What the kernels of small calls share: rows of any tensor, and the matrix products, a row at a time. Such a kernel
// computes a whole call on one thread, because for little work the calls of torch around it cost more than the work.
//
// Rows of C are padded with zeros to whole cache lines, so that the loops below have no remainder.
#pragma once

#include "common.h"

namespace mfwm::cpu {

// The rows of a tensor [..., D]: their number, their size, and the offset of row r, for any strides.
inline int64_t rows_in(const Array& array) {
  int64_t rows = 1;
  for (int axis = 0; axis < array.rank - 1; ++axis) rows *= array.size[axis];
  return rows;
}
inline int64_t row_size(const Array& array) { return array.size[array.rank - 1]; }
inline int64_t row_offset(const Array& array, int64_t r) {
  int64_t offset = 0;
  for (int axis = array.rank - 2; axis >= 0; --axis) {
    offset += r % array.size[axis] * array.stride[axis];
    r /= array.size[axis];
  }
  return offset;
}
template <class C>
void read_row(C* to, const Array& from, int64_t r) {
  load_row(to, from.data, from.dtype, row_offset(from, r), from.stride[from.rank - 1], row_size(from));
}
template <class C>
void write_row(const C* from, const Array& to, int64_t r) {
  store_row(from, to.data, to.dtype, row_offset(to, r), to.stride[to.rank - 1], row_size(to));
}
// All rows of a tensor, each padded to `row` elements.
template <class C>
std::vector<C> read_rows(const Array& from, int64_t row) {
  std::vector<C> all(rows_in(from) * row, C(0));
  for (int64_t r = 0; r < rows_in(from); ++r) read_row(&all[r * row], from, r);
  return all;
}
template <class C>
void write_rows(const C* from, int64_t row, const Array& to) {
  for (int64_t r = 0; r < rows_in(to); ++r) write_row(from + r * row, to, r);
}

// out[n] = <x, rows[n]>. Four rows at a time, because four independent sums hide each other's latency.
template <class C>
MFWM_INLINE void dots(const C* x, const C* rows, int64_t count, int64_t row, C* out) {
  using L = Lanes<C>;
  for (int64_t n = 0; n < count; n += 4) {
    const C* from[4];
    typename L::type sums[4] = {};
    for (int64_t k = 0; k < 4; ++k) from[k] = rows + std::min(n + k, count - 1) * row;
    for (int64_t d = 0; d < row; d += L::count)
      for (int64_t k = 0; k < 4; ++k) sums[k] += L::load(x + d) * L::load(from[k] + d);
    for (int64_t k = 0; k < std::min<int64_t>(4, count - n); ++k) {
      out[n + k] = 0;
      for (int64_t lane = 0; lane < L::count; ++lane) out[n + k] += sums[k][lane];
    }
  }
}

// out += the sum of x[n] rows[n]
template <class C>
MFWM_INLINE void add_rows(const C* x, const C* rows, int64_t count, int64_t row, C* out) {
  using L = Lanes<C>;
  for (int64_t d = 0; d < row; d += 2 * L::count) {
    typename L::type one = L::load(out + d), other = L::load(out + d + L::count);
    for (int64_t n = 0; n < count; ++n) {
      one += L::load(rows + n * row + d) * x[n];
      other += L::load(rows + n * row + d + L::count) * x[n];
    }
    L::store(one, out + d);
    L::store(other, out + d + L::count);
  }
}

// rows[n] += x[n] y
template <class C>
MFWM_INLINE void add_outer(const C* x, const C* y, int64_t count, int64_t row, C* rows) {
  using L = Lanes<C>;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t d = 0; d < row; d += L::count)
      L::store(L::load(rows + n * row + d) + L::load(y + d) * x[n], rows + n * row + d);
}

}  // namespace mfwm::cpu
