// mtp_combine on the CPU, without its matrix products, which torch computes: two states, RMS-normed and concatenated,
// and the gradient of that. Small calls are computed whole. bindings.cpp calls the four functions at the end.
#include <cmath>

#include "small.h"

namespace mfwm::cpu {
namespace {

// Rows per unit of work.
constexpr int64_t block = 16;

template <class C>
MFWM_INLINE C scale_of(const C* x, int64_t depth, double eps) {
  const auto square = [=](int64_t d) __attribute__((always_inline)) { return x[d] * x[d]; };
  return C(1) / std::sqrt(sum_of<C>(depth, square) / static_cast<C>(depth) + static_cast<C>(eps));
}

template <class C>
struct Join {
  const MtpCombine& op;
  const int64_t rows = op.joined.size[0], depth = op.joined.size[1] / 2;
  const int64_t row = padded<C>(depth);

  MFWM_SIMD void norm_rows(int64_t begin, int64_t end, C* scratch) const {
    C* __restrict normed = scratch + row;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t half = 0; half < 2; ++half) {
        const Array& from = op.states[half];
        const C* x = row_of(scratch, from, r * from.stride[0], from.stride[1], depth);
        const C scale = scale_of(x, depth, op.eps);
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
        const C scale = scale_of(x, depth, op.eps);
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

// ---- A small call whole. Rows of both halves are side by side, each padded.

template <class C>
struct SmallJoin {
  const MtpCombineSmall& op;
  const int64_t depth = op.norm_weights[0].size[0], columns = op.weight.size[0], rows = rows_in(op.out);
  const int64_t half = padded<C>(depth), row = 2 * half;

  MFWM_INLINE void load_parameters(C* norm_weights, C* weight) const {
    const Array& from = op.weight;
    for (int64_t h = 0; h < 2; ++h) {
      read_row(norm_weights + h * half, op.norm_weights[h], 0);
      for (int64_t n = 0; n < columns; ++n)
        load_row(weight + n * row + h * half, from.data, from.dtype, n * from.stride[0] + h * depth * from.stride[1],
                 from.stride[1], depth);
    }
  }

  // Row r of both states, each times its scale.
  MFWM_INLINE void load_normed(int64_t r, C* normed, C* scales) const {
    for (int64_t h = 0; h < 2; ++h) {
      C* x = normed + h * half;
      read_row(x, op.states[h], r);
      scales[h] = scale_of(x, depth, op.eps);
      for (int64_t d = 0; d < depth; ++d) x[d] *= scales[h];
    }
  }

  MFWM_SIMD void forward() const {
    std::vector<C> memory((columns + 2) * row + columns, C(0));
    C *weight = memory.data(), *norm_weights = weight + columns * row, *normed = norm_weights + row;
    C* out = normed + row;
    load_parameters(norm_weights, weight);
    for (int64_t r = 0; r < rows; ++r) {
      C scales[2];
      load_normed(r, normed, scales);
      for (int64_t d = 0; d < row; ++d) normed[d] *= norm_weights[d];
      dots(normed, weight, columns, row, out);
      write_row(out, op.out, r);
    }
  }

  MFWM_SIMD void backward(const MtpCombineGradients& to) const {
    std::vector<C> memory((2 * columns + 4) * row + columns, C(0));
    C *weight = memory.data(), *weight_gradient = weight + columns * row;
    C *norm_weights = weight_gradient + columns * row, *norm_gradient = norm_weights + row;
    C *normed = norm_gradient + row, *gradient = normed + row, *out = gradient + row;
    load_parameters(norm_weights, weight);
    for (int64_t r = 0; r < rows; ++r) {
      C scales[2];
      load_normed(r, normed, scales);
      read_row(out, op.out, r);
      add_outer(out, normed, columns, row, weight_gradient);
      std::fill_n(gradient, row, C(0));
      add_rows(out, weight, columns, row, gradient);
      for (int64_t h = 0; h < 2; ++h) {
        if (!to.states[h]) continue;
        C* g = gradient + h * half;
        const C *x = normed + h * half, *w = norm_weights + h * half;
        for (int64_t d = 0; d < depth; ++d) g[d] *= w[d];
        const auto product = [=](int64_t d) __attribute__((always_inline)) { return x[d] * g[d]; };
        const C along = sum_of<C>(depth, product) / static_cast<C>(depth);
        for (int64_t d = 0; d < depth; ++d) g[d] = (g[d] - x[d] * along) * scales[h];
        write_row(g, to.states[h], r);
      }
    }
    for (int64_t n = 0; n < columns; ++n) {
      const C* w = weight + n * row;
      C* __restrict own = weight_gradient + n * row;
      for (int64_t d = 0; d < row; ++d) norm_gradient[d] += w[d] * own[d];
      for (int64_t d = 0; d < row; ++d) own[d] *= norm_weights[d];
    }
    for (int64_t h = 0; h < 2; ++h) {
      if (to.norm_weights[h]) write_row(norm_gradient + h * half, to.norm_weights[h], 0);
      const Array& into = to.weight;
      for (int64_t n = 0; into && n < columns; ++n)
        store_row(weight_gradient + n * row + h * half, into.data, into.dtype,
                  n * into.stride[0] + h * depth * into.stride[1], into.stride[1], depth);
    }
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

void mtp_combine_small_forward(const MtpCombineSmall& op) {
  in_precision(op.out.dtype == DType::float64, [&](auto zero) { SmallJoin<decltype(zero)>{op}.forward(); });
}

void mtp_combine_small_backward(const MtpCombineSmall& op, const MtpCombineGradients& to) {
  in_precision(op.out.dtype == DType::float64, [&](auto zero) { SmallJoin<decltype(zero)>{op}.backward(to); });
}

}  // namespace mfwm::cpu
