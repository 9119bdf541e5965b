// Shared by every CPU kernel: the SIMD macro, loads and stores of rows of any dtype, and a parallel loop over work
// units.
//
// Kernels compute in C = float, or double if a tensor is float64. load_row and store_row convert rows of any dtype and
// stride to and from C, so each kernel is written once instead of once per dtype.
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

// Compiles a function for the baseline, AVX2 and AVX-512; the loader picks the copy that suits the machine. This needs
// ifunc (glibc) and a compiler that knows the level names. -DMFWM_BASELINE compiles the baseline only, and
// -DMFWM_SIMD_TARGET="arch=..." that level only.
#if defined(MFWM_SIMD_TARGET)
#define MFWM_SIMD __attribute__((target(MFWM_SIMD_TARGET)))
#elif defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
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

// A rectangle in an array: element k of row r is at offset + r * row_stride + k * stride.
struct Rows {
  int64_t offset, row_stride, stride, rows, count;

  // The same elements as one long row if the rows are adjacent in memory, else *this.
  MFWM_INLINE Rows joined() const {
    return row_stride == count * stride ? Rows{offset, 0, stride, rows > 0 ? 1 : 0, rows * count} : *this;
  }
};

// to = scale * from + shift, row after row
void load_rows(float* to, const void* from, DType dtype, const Rows& rows, float scale, float shift);
void load_rows(double* to, const void* from, DType dtype, const Rows& rows, double scale, double shift);
// The inverse, without scale or shift.
void store_rows(const float* from, void* to, DType dtype, const Rows& rows);
void store_rows(const double* from, void* to, DType dtype, const Rows& rows);

// A rectangle of pixels of a frame cut into tokens of patch x patch pixels. The channels of a pixel are adjacent.
struct TokenPixels {
  int64_t frame, token_stride;      // in elements: the offset of token 0, and from one token to the next
  int64_t across, patch, channels;  // across: tokens per row of tokens
  int64_t y, x, rows, columns;

  int64_t row_at(int64_t r) const {
    return frame + (y + r) / patch * across * token_stride + (y + r) % patch * patch * channels;
  }
  int64_t column_at(int64_t k) const { return (x + k) / patch * token_stride + (x + k) % patch * channels; }
};

// Copy pixels to and from planes: channel c of the pixel in row r and column k is element c * plane + r * columns + k.
// Loading prefetches the rectangle below, which the caller is likely to load next.
void load_planes(float* to, int64_t plane, const void* from, DType dtype, const TokenPixels& pixels);
void load_planes(double* to, int64_t plane, const void* from, DType dtype, const TokenPixels& pixels);
void store_planes(const float* from, int64_t plane, void* to, DType dtype, const TokenPixels& pixels);
void store_planes(const double* from, int64_t plane, void* to, DType dtype, const TokenPixels& pixels);

template <class C>
MFWM_INLINE bool is_plain(const Array& array, int64_t stride) {
  return array.dtype == dtype_of<C> && stride == 1;
}

// A pointer to the row itself if it has type C and unit stride, else to a converted copy in `scratch`.
template <class C>
MFWM_INLINE const C* row_of(C* scratch, const Array& array, int64_t offset, int64_t stride, int64_t count) {
  if (is_plain<C>(array, stride)) return static_cast<const C*>(array.data) + offset;
  load_row(scratch, array.data, array.dtype, offset, stride, count);
  return scratch;
}

// Prefetch a row of unit stride. Call it well before reading the row, so that the row has arrived in cache by then.
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

// Read or write one element of a float32 or float64 array.
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

// True if two time steps belong to the same segment; always true without segments.
inline bool same_segment(const Array& ids, int64_t row, int64_t one, int64_t other) {
  return !ids || id_at(ids, row, one) == id_at(ids, row, other);
}

// term(0) + ... + term(count - 1). Four partial sums hide the latency of addition; in a single sum every addition would
// wait for the one before it.
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

// Uninitialised memory, aligned to a cache line.
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

// `count` elements rounded up to whole cache lines.
template <class C>
constexpr int64_t padded(int64_t count) {
  constexpr int64_t line = 64 / sizeof(C);
  return (count + line - 1) / line * line;
}

// Call body(unit, scratch) for every unit. A unit must do the same work on any thread, so that results do not depend on
// the number of threads. Scratch is allocated before the threads start, because an exception must not leave an OpenMP
// loop.
//
// A thread takes a few neighbouring units at a time, so that it can prefetch the next one, but at least eight times, so
// that a slow thread does not hold up the others.
template <class C, class Body>
void parallel_for(int threads, int64_t units, int64_t scratch_size, const Body& body) {
  if (units <= 0) return;
  threads = static_cast<int>(std::clamp<int64_t>(threads, 1, units));
  std::vector<Scratch<C>> scratch;
  for (int thread = 0; thread < threads; ++thread) scratch.emplace_back(scratch_size);
  const int64_t at_once = std::max<int64_t>(1, units / (8 * threads));
#pragma omp parallel for schedule(dynamic, at_once) num_threads(threads)
  for (int64_t unit = 0; unit < units; ++unit) body(unit, scratch[omp_get_thread_num()].data());
}

// Call body(C{}) with C = double or float.
template <class Body>
auto in_precision(bool is_double, const Body& body) {
  return is_double ? body(double{}) : body(float{});
}

}  // namespace mfwm::cpu
