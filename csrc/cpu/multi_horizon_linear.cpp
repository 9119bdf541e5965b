// What surrounds the matrix products of multi_horizon_linear on the CPU: three passes over a chunk of rows.
#include <cmath>

#include "common.h"

namespace mfwm::cpu {
namespace {

// Rows of one position; a piece of them where there are many, so that few positions still occupy many threads.
struct Unit {
  int64_t position, begin, end;
  bool whole;  // all the position's rows in this chunk
};

template <class C>
struct Heads {
  const MultiHorizonLinear& op;
  const int64_t rows = op.hidden.size[0], depth = op.hidden.size[1], horizons = op.sums.size[1];
  const int64_t row = padded<C>(depth);

  MFWM_INLINE const C* window_sum(int64_t position, int64_t i) const {
    return static_cast<const C*>(op.sums.data) + (position * horizons + i) * depth;
  }
  MFWM_INLINE const C* hidden(C* scratch, int64_t r) const {
    return row_of(scratch, op.hidden, r * op.hidden.stride[0], op.hidden.stride[1], depth);
  }

  MFWM_INLINE C scale_of(const C* __restrict h, const C* __restrict add) const {
    C squares = 0;
    for (int64_t d = 0; d < depth; ++d) {
      const C value = h[d] + add[d];
      squares += value * value;
    }
    return C(1) / std::sqrt(squares / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
  }

  std::vector<Unit> units() const {
    constexpr int64_t most = 64;
    std::vector<Unit> made;
    for (int64_t begin = 0; begin < rows;) {
      const int64_t position = (op.first + begin) / op.tokens;
      const int64_t end = std::min((position + 1) * op.tokens - op.first, rows);
      const bool whole = end - begin <= most;
      for (; begin < end; begin += most) made.push_back({position, begin, std::min(begin + most, end), whole});
      begin = end;
    }
    return made;
  }

  // body(number, unit, scratch, to) adds to `to`, the position's slab of `sums` (nullptr where there are no sums). Units
  // that share a position have slabs of their own, which are added in order.
  template <class Body>
  void by_position(int64_t scratch_size, const Array& sums, int64_t slab, const Body& body) const {
    const std::vector<Unit> all = units();
    std::vector<int64_t> part(all.size(), -1);
    int64_t parts = 0;
    for (size_t u = 0; sums && u < all.size(); ++u)
      if (!all[u].whole) part[u] = parts++;
    std::vector<C> partial(parts * slab, C(0));
    C* const total = static_cast<C*>(sums.data);
    parallel_for<C>(op.threads, static_cast<int64_t>(all.size()), scratch_size, [&](int64_t u, C* scratch) {
      C* own = part[u] >= 0 ? &partial[part[u] * slab] : total + all[u].position * slab;
      body(u, all[u], scratch, sums ? own : nullptr);
    });
    for (size_t u = 0; u < all.size(); ++u)
      for (int64_t k = 0; part[u] >= 0 && k < slab; ++k)
        total[all[u].position * slab + k] += partial[part[u] * slab + k];
  }

  // ---- outputs[i] = r_i (product_i + projected_i) + bias_i

  MFWM_SIMD void forward_rows(const MultiHorizonLinearOutputs& to, const Unit& unit, C* scratch) const {
    const int64_t columns = to.product.size[1];
    C *token = scratch, *__restrict out = scratch + row;
    const C* __restrict add = static_cast<const C*>(to.projected.data) + unit.position * columns;
    const C* bias = static_cast<const C*>(to.bias.data);
    for (int64_t r = unit.begin; r < unit.end; ++r) {
      const C* h = op.norm ? hidden(token, r) : nullptr;
      load_row(out, to.product.data, to.product.dtype, r * to.product.stride[0], to.product.stride[1], columns);
      int64_t first = 0;
      for (int64_t i = 0; i < horizons; ++i) {
        const Array& output = to.outputs[i];
        const int64_t last = first + output.size[1];
        const C scale = op.norm ? scale_of(h, window_sum(unit.position, i)) : C(1);
        for (int64_t n = first; n < last; ++n) out[n] = (out[n] + add[n]) * scale;
        if (bias)
          for (int64_t n = first; n < last; ++n) out[n] += bias[n];
        store_row(out + first, output.data, output.dtype, r * output.stride[0], output.stride[1], output.size[1]);
        first = last;
      }
    }
  }

  void forward(const MultiHorizonLinearOutputs& to) const {
    const std::vector<Unit> all = units();
    const int64_t size = row + padded<C>(to.product.size[1]);
    parallel_for<C>(op.threads, static_cast<int64_t>(all.size()), size,
                    [&](int64_t u, C* scratch) { forward_rows(to, all[u], scratch); });
  }

  // ---- scaled_i = r_i gradients_i, and its sums over the tokens of a position

  MFWM_SIMD void scale_rows(const MultiHorizonLinearScaled& to, const Unit& unit, C* scratch, C* sums) const {
    const int64_t columns = to.scaled.size[1];
    C *token = scratch, *__restrict out = scratch + row;
    for (int64_t r = unit.begin; r < unit.end; ++r) {
      const C* h = op.norm ? hidden(token, r) : nullptr;
      C* scales = static_cast<C*>(to.scales.data) + r * horizons;
      int64_t first = 0;
      for (int64_t i = 0; i < horizons; ++i) {
        const Array& gradient = to.gradients[i];
        const int64_t last = first + to.columns[i];
        scales[i] = C(0);
        if (gradient) {
          scales[i] = op.norm ? scale_of(h, window_sum(unit.position, i)) : C(1);
          const C scale = scales[i];
          load_row(out + first, gradient.data, gradient.dtype, r * gradient.stride[0], gradient.stride[1],
                   to.columns[i]);
          for (int64_t n = first; n < last; ++n) out[n] *= scale;
        } else {
          std::fill(out + first, out + last, C(0));
        }
        first = last;
      }
      if (sums)
        for (int64_t n = 0; n < columns; ++n) sums[n] += out[n];
      store_row(out, to.scaled.data, to.scaled.dtype, r * to.scaled.stride[0], to.scaled.stride[1], columns);
    }
  }

  void scale(const MultiHorizonLinearScaled& to) const {
    const int64_t columns = to.scaled.size[1];
    const auto body = [&](int64_t, const Unit& unit, C* scratch, C* sums) { scale_rows(to, unit, scratch, sums); };
    by_position(row + padded<C>(columns), to.sums, columns, body);
  }

  // ---- With g_i = scaled_i W_i the gradient of r_i x_i times r_i, x_i = h + a_i:
  //   d x_i = g_i - x_i r_i^2 / D <x_i, g_i>,  d h = sum of d x_i,  d a_i = sum of d x_i over tokens

  MFWM_SIMD void combine_rows(const MultiHorizonLinearGradients& to, const Unit& unit, C* scratch, C* sums,
                              double* gram) const {
    C *token = scratch, *state = scratch + row, *__restrict total = scratch + 2 * row, *each = scratch + 3 * row;
    for (int64_t r = unit.begin; r < unit.end; ++r) {
      const C* __restrict h = op.norm ? hidden(token, r) : nullptr;
      const C* scales = static_cast<const C*>(to.scales.data) + r * horizons;
      std::fill(total, total + depth, C(0));
      for (int64_t i = 0; i < horizons; ++i) {
        const Array& given = to.states[i];
        if (!given) continue;
        const C* __restrict g = row_of(state, given, r * given.stride[0], given.stride[1], depth);
        const C* __restrict add = window_sum(unit.position, i);
        C* __restrict own = each + i * row;
        if (op.norm) {
          C product = 0;
          for (int64_t d = 0; d < depth; ++d) product += g[d] * (h[d] + add[d]);
          const C along = product * scales[i] * scales[i] / static_cast<C>(depth);
          for (int64_t d = 0; d < depth; ++d) own[d] = g[d] - (h[d] + add[d]) * along;
        } else {
          std::copy(g, g + depth, own);
        }
        const C weight = to.weights.empty() ? C(1) : static_cast<C>(to.weights[i]);
        for (int64_t d = 0; d < depth; ++d) total[d] += own[d] * weight;
        if (sums) {
          C* __restrict into = sums + i * depth;
          for (int64_t d = 0; d < depth; ++d) into[d] += own[d];
        }
        for (int64_t j = 0; gram && j <= i; ++j) {
          if (!to.states[j]) continue;
          const C* __restrict other = each + j * row;
          C product = 0;
          for (int64_t d = 0; d < depth; ++d) product += own[d] * other[d];
          gram[i * horizons + j] += static_cast<double>(product);
        }
      }
      const Array& out = to.hidden;
      if (out) store_row(total, out.data, out.dtype, r * out.stride[0], out.stride[1], depth);
    }
  }

  void combine(const MultiHorizonLinearGradients& to) const {
    const int64_t pairs = to.gram ? horizons * horizons : 0;
    std::vector<double> grams(pairs * static_cast<int64_t>(units().size()), 0.0);
    const auto body = [&](int64_t u, const Unit& unit, C* scratch, C* sums) {
      combine_rows(to, unit, scratch, sums, pairs ? &grams[u * pairs] : nullptr);
    };
    by_position((3 + horizons) * row, to.sums, horizons * depth, body);
    double* const gram = static_cast<double*>(to.gram.data);
    for (size_t k = 0; k < grams.size(); ++k) {
      const int64_t i = k % pairs / horizons, j = k % pairs % horizons;
      gram[i * horizons + j] += grams[k];
      if (i != j) gram[j * horizons + i] += grams[k];
    }
  }
};

}  // namespace

void multi_horizon_linear_forward(const MultiHorizonLinear& op, const MultiHorizonLinearOutputs& to) {
  in_precision(op.sums.dtype == DType::float64, [&](auto zero) { Heads<decltype(zero)>{op}.forward(to); });
}

void multi_horizon_linear_scale(const MultiHorizonLinear& op, const MultiHorizonLinearScaled& to) {
  in_precision(op.sums.dtype == DType::float64, [&](auto zero) { Heads<decltype(zero)>{op}.scale(to); });
}

void multi_horizon_linear_combine(const MultiHorizonLinear& op, const MultiHorizonLinearGradients& to) {
  in_precision(op.sums.dtype == DType::float64, [&](auto zero) { Heads<decltype(zero)>{op}.combine(to); });
}

}  // namespace mfwm::cpu
