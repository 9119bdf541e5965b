// A small call of multi_horizon_linear whole, matrix products included: window sums, norms and heads, a row at a time.
// bindings.cpp calls the two functions at the end.
#include <cmath>

#include "small.h"

namespace mfwm::cpu {
namespace {

template <class C>
struct SmallHeads {
  const MultiHorizonLinearSmall& op;
  const int64_t depth = row_size(op.hidden), row = padded<C>(depth), rows = rows_in(op.hidden);
  const int64_t batch = op.hidden.size[0], positions = op.hidden.size[1], horizons = op.offsets.size();
  const int64_t tokens = rows / std::max<int64_t>(batch * positions, 1);
  const bool norms = bool(op.norm_weight);
  const std::vector<C> norm_weight = parameter(op.norm_weight), norm_bias = parameter(op.norm_bias);
  std::vector<std::vector<C>> weights = {}, biases = {};  // of each head
  std::vector<C> sums = {};                               // [B, T, K, row]

  std::vector<C> parameter(const Array& array) const {
    return array ? read_rows<C>(array, row) : std::vector<C>(row, C(0));
  }
  // Where horizon i's part of a parameter of the norm, or of its gradient, is.
  int64_t part(const Array& parameter, int64_t i) const { return parameter.rank == 2 ? i * row : 0; }

  ActionWindowSum window(std::vector<C>& sums_or_gradient) const {
    const Array array{sums_or_gradient.data(), dtype_of<C>, 4, {batch, positions, horizons, depth, 1},
                      {positions * horizons * row, horizons * row, row, 1, 0}};
    return {op.actions, op.lag_weight, op.segment_ids, op.offsets, op.window_start, array, 1};
  }

  explicit SmallHeads(const MultiHorizonLinearSmall& op_) : op(op_) {
    for (const Array& weight : op.weights) weights.push_back(read_rows<C>(weight, row));
    for (const Array& bias : op.biases) biases.push_back(read_rows<C>(bias, row_size(bias)));
    sums.assign(batch * positions * horizons * row, C(0));
    if (op.actions) action_window_sum_forward(window(sums));
    if (!op.condition) return;
    const std::vector<C> condition = read_rows<C>(op.condition, row);
    for (size_t k = 0; k < sums.size(); ++k) sums[k] += condition[k];
  }

  // x = horizon i's normed state before the norm's weight and bias, of row r, whose hidden state is `h`. Returns what
  // the norm has multiplied it by.
  MFWM_INLINE C normed(const C* h, int64_t r, int64_t i, C* __restrict x) const {
    const C* sum = &sums[(r / tokens * horizons + i) * row];
    for (int64_t d = 0; d < row; ++d) x[d] = h[d] + sum[d];
    if (!norms) return 1;
    if (op.layer) centre(x);
    const auto square = [=](int64_t d) __attribute__((always_inline)) { return x[d] * x[d]; };
    const C scale = 1 / std::sqrt(sum_of<C>(row, square) / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
    for (int64_t d = 0; d < row; ++d) x[d] *= scale;
    return scale;
  }
  MFWM_INLINE void centre(C* x) const {
    const C mean =
        sum_of<C>(row, [=](int64_t d) __attribute__((always_inline)) { return x[d]; }) / static_cast<C>(depth);
    for (int64_t d = 0; d < depth; ++d) x[d] -= mean;
  }
  // The state that head i multiplies.
  MFWM_INLINE void finish(const C* x, int64_t i, C* __restrict state) const {
    const C *w = &norm_weight[part(op.norm_weight, i)], *b = &norm_bias[part(op.norm_bias, i)];
    for (int64_t d = 0; d < row; ++d) state[d] = norms ? x[d] * w[d] + b[d] : x[d];
  }

  MFWM_SIMD void forward(const std::vector<Array>& outputs) const {
    std::vector<C> memory(3 * row, C(0)), out;
    C *h = memory.data(), *x = h + row, *state = x + row;
    for (int64_t r = 0; r < rows; ++r) {
      read_row(h, op.hidden, r);
      for (int64_t i = 0; i < horizons; ++i) {
        const int64_t columns = row_size(outputs[i]);
        out.resize(columns);
        normed(h, r, i, x);
        finish(x, i, state);
        dots(state, weights[i].data(), columns, row, out.data());
        for (int64_t n = 0; !biases.empty() && n < columns; ++n) out[n] += biases[i][n];
        write_row(out.data(), outputs[i], r);
      }
    }
  }

  // upstream[i] is the gradient of output i, or none.
  MFWM_SIMD void backward(const std::vector<Array>& upstream, const MultiHorizonLinearSmallGradients& to) const {
    std::vector<C> memory(5 * row, C(0)), out, sum_gradients(sums.size(), C(0));
    std::vector<C> norm_weight_gradient(norm_weight.size(), C(0)), norm_bias_gradient(norm_bias.size(), C(0));
    std::vector<std::vector<C>> weight_gradients, bias_gradients;
    for (const auto& weight : weights) weight_gradients.emplace_back(weight.size(), C(0));
    for (const auto& bias : biases) bias_gradients.emplace_back(bias.size(), C(0));
    C *h = memory.data(), *x = h + row, *state = x + row, *g = state + row, *hidden = g + row;
    for (int64_t r = 0; r < rows; ++r) {
      read_row(h, op.hidden, r);
      std::fill_n(hidden, row, C(0));
      for (int64_t i = 0; i < horizons; ++i) {
        if (!upstream[i]) continue;
        const int64_t columns = row_size(upstream[i]);
        out.resize(columns);
        read_row(out.data(), upstream[i], r);
        const C scale = normed(h, r, i, x);
        finish(x, i, state);
        add_outer(out.data(), state, columns, row, weight_gradients[i].data());
        for (int64_t n = 0; !biases.empty() && n < columns; ++n) bias_gradients[i][n] += out[n];
        std::fill_n(g, row, C(0));
        add_rows(out.data(), weights[i].data(), columns, row, g);
        if (norms)
          through_norm(x, scale, &norm_weight[part(op.norm_weight, i)], g,
                       &norm_weight_gradient[part(op.norm_weight, i)], &norm_bias_gradient[part(op.norm_bias, i)]);
        C* __restrict sum = &sum_gradients[(r / tokens * horizons + i) * row];
        for (int64_t d = 0; d < row; ++d) sum[d] += g[d];
        for (int64_t d = 0; d < row; ++d) hidden[d] += g[d];
      }
      if (to.hidden) write_row(hidden, to.hidden, r);
    }
    for (int64_t i = 0; i < horizons; ++i) {
      if (to.weights[i]) write_rows(weight_gradients[i].data(), row, to.weights[i]);
      if (!biases.empty() && to.biases[i]) write_row(bias_gradients[i].data(), to.biases[i], 0);
    }
    if (to.norm_weight) write_rows(norm_weight_gradient.data(), row, to.norm_weight);
    if (to.norm_bias) write_rows(norm_bias_gradient.data(), row, to.norm_bias);
    if (to.condition) write_rows(sum_gradients.data(), row, to.condition);
    if (to.actions || to.lag_weight) action_window_sum_backward(window(sum_gradients), {to.actions, to.lag_weight});
  }

  // g, the gradient at x * weight + bias, becomes that at the state before the norm: scale (g w - x mean(x g w)), with
  // LayerNorm less its mean. Also add to the gradients of weight and bias.
  MFWM_INLINE void through_norm(const C* x, C scale, const C* weight, C* g, C* __restrict weight_gradient,
                                C* __restrict bias_gradient) const {
    for (int64_t d = 0; d < row; ++d) {
      weight_gradient[d] += g[d] * x[d];
      bias_gradient[d] += g[d];
      g[d] *= weight[d];
    }
    if (op.layer) centre(g);
    const auto product = [=](int64_t d) __attribute__((always_inline)) { return x[d] * g[d]; };
    const C along = sum_of<C>(row, product) / static_cast<C>(depth);
    for (int64_t d = 0; d < row; ++d) g[d] = (g[d] - x[d] * along) * scale;
  }
};

}  // namespace

void multi_horizon_linear_small_forward(const MultiHorizonLinearSmall& op, const std::vector<Array>& outputs) {
  in_precision(op.hidden.dtype == DType::float64, [&](auto zero) { SmallHeads<decltype(zero)>(op).forward(outputs); });
}

void multi_horizon_linear_small_backward(const MultiHorizonLinearSmall& op, const std::vector<Array>& upstream,
                                         const MultiHorizonLinearSmallGradients& to) {
  in_precision(op.hidden.dtype == DType::float64,
               [&](auto zero) { SmallHeads<decltype(zero)>(op).backward(upstream, to); });
}

}  // namespace mfwm::cpu
