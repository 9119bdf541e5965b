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

// Baseline, AVX2 and AVX-512 copies of a function side by side; the loader takes the one for the machine.
// It needs ifunc (glibc) and a compiler that knows the level names. -DMFWM_BASELINE leaves the baseline alone.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(MFWM_BASELINE)
#define MFWM_SIMD __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MFWM_SIMD
#endif
// Pieces of such functions must be inlined: a copy for each level exists only of the function that bears the macro.
#define MFWM_INLINE inline __attribute__((always_inline))

namespace mfwm::cpu {

template <class C>
constexpr DType dtype_of = std::is_same_v<C, double> ? DType::float64 : DType::float32;

// to[k] = from[offset + k * stride]
void load_row(float* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count);
void load_row(double* to, const void* from, DType dtype, int64_t offset, int64_t stride, int64_t count);
// to[offset + k * stride] = from[k], rounded to nearest even
void store_row(const float* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count);
void store_row(const double* from, void* to, DType dtype, int64_t offset, int64_t stride, int64_t count);

// to[k] = from[k], past the caches where the machine can. What is written so is in memory after finish_streaming().
void stream_row(const float* from, float* to, int64_t count);
void stream_row(const double* from, double* to, int64_t count);
void finish_streaming();

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

inline int64_t id_at(const Array& ids, int64_t row, int64_t column) {
  const int64_t offset = row * ids.stride[0] + column * ids.stride[1];
  return ids.dtype == DType::int32 ? static_cast<const int32_t*>(ids.data)[offset]
                                   : static_cast<const int64_t*>(ids.data)[offset];
}

// Two steps lie in one segment (always, where there are no segments).
inline bool same_segment(const Array& ids, int64_t row, int64_t one, int64_t other) {
  return !ids || id_at(ids, row, one) == id_at(ids, row, other);
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
