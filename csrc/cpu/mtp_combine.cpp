// mtp_combine on the CPU, without its matrix products, which torch computes: two states, RMS-normed and concatenated,
// and the gradient of that. bindings.cpp calls the two functions at the end.
#include <cmath>

#include "common.h"

namespace mfwm::cpu {
namespace {

// Rows per unit of work.
constexpr int64_t block = 16;

template <class C>
struct Join {
  const MtpCombine& op;
  const int64_t rows = op.joined.size[0], depth = op.joined.size[1] / 2;
  const int64_t row = padded<C>(depth);

  MFWM_INLINE C scale_of(const C* x) const {
    const auto square = [=](int64_t d) __attribute__((always_inline)) { return x[d] * x[d]; };
    return C(1) / std::sqrt(sum_of<C>(depth, square) / static_cast<C>(depth) + static_cast<C>(op.eps));
  }

  MFWM_SIMD void norm_rows(int64_t begin, int64_t end, C* scratch) const {
    C* __restrict normed = scratch + row;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t half = 0; half < 2; ++half) {
        const Array& from = op.states[half];
        const C* x = row_of(scratch, from, r * from.stride[0], from.stride[1], depth);
        const C scale = scale_of(x);
        for (int64_t d = 0; d < depth; ++d) normed[d] = x[d] * scale;
        const int64_t offset = r * op.joined.stride[0] + half * depth * op.joined.stride[1];
        store_row(normed, op.joined.data, op.joined.dtype, offset, op.joined.stride[1], depth);
      }
  }

  // If g is the gradient at r x, then d x = r (g - x r^2 mean(x g)).
  MFWM_SIMD void gradient_rows(const std::vector<Array>& gradients, int64_t begin, int64_t end, C* scratch) const {
    C *state = scratch, *upstream = scratch + row, *__restrict out = scratch + 2 * row;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t half = 0; half < 2; ++half) {
        const Array &from = op.states[half], &to = gradients[half];
        if (!to) continue;
        const C* x = row_of(state, from, r * from.stride[0], from.stride[1], depth);
        const int64_t offset = r * op.joined.stride[0] + half * depth * op.joined.stride[1];
        const C* g = row_of(upstream, op.joined, offset, op.joined.stride[1], depth);
        const C scale = scale_of(x);
        const auto product = [=](int64_t d) __attribute__((always_inline)) { return x[d] * g[d]; };
        const C along = sum_of<C>(depth, product) * scale * scale / static_cast<C>(depth);
        for (int64_t d = 0; d < depth; ++d) out[d] = (g[d] - x[d] * along) * scale;
        store_row(out, to.data, to.dtype, r * to.stride[0], to.stride[1], depth);
      }
  }

  template <class Body>
  void blocks(const Body& body) const {
    parallel_for<C>(op.threads, (rows + block - 1) / block, 3 * row, [&](int64_t unit, C* scratch) {
      body(unit * block, std::min((unit + 1) * block, rows), scratch);
    });
  }
};

}  // namespace

void mtp_combine_norm(const MtpCombine& op) {
  in_precision(op.joined.dtype == DType::float64, [&](auto zero) {
    const Join<decltype(zero)> join{op};
    join.blocks([&](int64_t begin, int64_t end, auto* scratch) { join.norm_rows(begin, end, scratch); });
  });
}

void mtp_combine_gradient(const MtpCombine& op, const std::vector<Array>& gradients) {
  in_precision(op.joined.dtype == DType::float64, [&](auto zero) {
    const Join<decltype(zero)> join{op};
    join.blocks([&](int64_t begin, int64_t end, auto* scratch) { join.gradient_rows(gradients, begin, end, scratch); });
  });
}

}  // namespace mfwm::cpu
