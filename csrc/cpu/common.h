// What every CPU kernel uses: the SIMD macro, rows of any dtype, and a loop over work units.
//
// Kernels compute in C = float, or double where a tensor is float64. A row of any dtype and stride is loaded into C
// and stored from C by two functions, so that a kernel is written once and not per dtype.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../ops.h"
#include "lanes.h"

// Baseline, AVX2 and AVX-512 copies of a function side by side; the loader takes the one for the machine.
// It needs ifunc (glibc) and a compiler that knows the level names. -DMFWM_BASELINE leaves the baseline alone.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(MFWM_BASELINE)
#define MFWM_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MFWM_SIMD
#endif

namespace mfwm::cpu {

template <class C>
constexpr DType dtype_of = std::is_same_v<C, double> ? DType::float64 : DType::float32;

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::uint8: return 1;
    case DType::bfloat16:
    case DType::float16: return 2;
    case DType::float32:
    case DType::int32: return 4;
    default: return 8;
  }
}

// to[k] = from[offset + k * stride]
void load_row(float* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count);
void load_row(double* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count);
// to[offset + k * stride] = from[k], rounded to nearest even
void store_row(const float* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count);
void store_row(const double* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count);

// A rectangle in an array: element k of row r lies at offset + r * row_stride + k * stride.
struct Rows {
  int64_t offset, row_stride, stride, rows, count;

  // As one long row, where the rows lie one after the other.
  MFWM_INLINE Rows joined() const {
    return row_stride == count * stride ? Rows{offset, 0, stride, rows > 0 ? 1 : 0, rows * count} : *this;
  }
};

// to = scale * from + shift, row after row
void load_rows(float* to, const void* from, DType dtype, const Rows& rows, float scale, float shift);
void load_rows(double* to, const void* from, DType dtype, const Rows& rows, double scale, double shift);
// The inverse, without scale and shift.
void store_rows(const float* from, void* to, DType dtype, const Rows& rows);
void store_rows(const double* from, void* to, DType dtype, const Rows& rows);

// A rectangle of pixels in tokens of patch x patch of them, whose channels lie side by side.
struct TokenPixels {
  int64_t frame, token_stride;  // in elements: where token 0 begins, and from one to the next
  int64_t across, patch, channels;
  int64_t y, x, rows, columns;

  int64_t row_at(int64_t r) const {
    return frame + (y + r) / patch * across * token_stride + (y + r) % patch * patch * channels;
  }
  int64_t column_at(int64_t k) const { return (x + k) / patch * token_stride + (x + k) % patch * channels; }
};

// Channel c of the pixel in row r and column k goes to, or comes from, c * plane + r * columns + k. To load one asks for
// the rectangle below.
void load_planes(float* to, int64_t plane, const void* from, DType dtype, const TokenPixels& pixels);
void load_planes(double* to, int64_t plane, const void* from, DType dtype, const TokenPixels& pixels);
void store_planes(const float* from, int64_t plane, void* to, DType dtype, const TokenPixels& pixels);
void store_planes(const double* from, int64_t plane, void* to, DType dtype, const TokenPixels& pixels);

template <class C>
MFWM_INLINE bool is_plain(const Array& array, int64_t stride) {
  return array.dtype == dtype_of<C> && stride == 1;
}

// The row where it lies if it is of type C with unit stride, else a copy of it in `scratch`.
template <class C>
MFWM_INLINE const C* row_of(C* scratch, const Array& array, int64_t offset, int64_t stride, int64_t count) {
  if (is_plain<C>(array, stride)) return static_cast<const C*>(array.data) + offset;
  load_row(scratch, array.data, array.dtype, offset, stride, count);
  return scratch;
}

// Asks for a row of unit stride: one that is read a while later is then in cache.
MFWM_INLINE void prefetch_row(const Array& array, int64_t offset, int64_t count) {
  const int64_t size = array.dtype == DType::float64 ? 8 : array.dtype == DType::float32 ? 4 : 2;
  const char* from = static_cast<const char*>(array.data) + offset * size;
  for (int64_t k = 0; k < count * size; k += 64) __builtin_prefetch(from + k);
}

inline int64_t id_at(const Array& ids, int64_t row, int64_t column) {
  const int64_t offset = row * ids.stride[0] + column * ids.stride[1];
  return ids.dtype == DType::int32 ? static_cast<const int32_t*>(ids.data)[offset]
                                   : static_cast<const int64_t*>(ids.data)[offset];
}

// An element of an array of float32 or float64.
inline double number_at(const Array& array, int64_t offset) {
  return array.dtype == DType::float64 ? static_cast<const double*>(array.data)[offset]
                                       : static_cast<const float*>(array.data)[offset];
}
inline void set_number(const Array& array, int64_t offset, double value) {
  if (array.dtype == DType::float64)
    static_cast<double*>(array.data)[offset] = value;
  else
    static_cast<float*>(array.data)[offset] = static_cast<float>(value);
}

// Two steps lie in one segment (always, where there are no segments).
inline bool same_segment(const Array& ids, int64_t row, int64_t one, int64_t other) {
  return !ids || id_at(ids, row, one) == id_at(ids, row, other);
}

// term(0) + ... + term(count - 1). In one sum each addition waits for the last; four quarters go on side by side.
template <class C, class Term>
MFWM_INLINE C sum_of(int64_t count, const Term& term) {
  const int64_t quarter = count / 4;
  C a = 0, b = 0, c = 0, d = 0;
  for (int64_t k = 0; k < quarter; ++k) {
    a += term(k);
    b += term(k + quarter);
    c += term(k + 2 * quarter);
    d += term(k + 3 * quarter);
  }
  for (int64_t k = 4 * quarter; k < count; ++k) a += term(k);
  return (a + b) + (c + d);
}

// Memory on cache-line boundaries, not initialised.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<C*>(::operator new(sizeof(C) * std::max<int64_t>(count, 1), std::align_val_t(64)))) {}
  Scratch(Scratch&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  C* data() { return data_; }

 private:
  C* data_;
};

// A whole number of cache lines, in elements.
template <class C>
constexpr int64_t padded(int64_t count) {
  constexpr int64_t line = 64 / sizeof(C);
  return (count + line - 1) / line * line;
}

// body(unit, scratch) for every unit. What a unit does must not depend on which thread does it: results are then the
// same for any number of threads. Scratch is made before the threads start, since nothing may throw inside.
template <class C, class Body>
void parallel_for(int threads, int64_t units, int64_t scratch_size, const Body& body) {
  if (units <= 0) return;
  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, units));
  std::vector<Scratch<C>> scratch;
  for (int thread = 0; thread < threads; ++thread) scratch.emplace_back(scratch_size);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t unit = 0; unit < units; ++unit) body(unit, scratch[omp_get_thread_num()].data());
}

// body(C{}) with C = double or float.
template <class Body>
auto in_precision(bool is_double, const Body& body) {
  return is_double ? body(double{}) : body(float{});
}

}  // namespace mfwm::cpu
