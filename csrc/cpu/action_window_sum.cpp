// action_window_sum on the CPU: windowed sums of actions, optionally gated, and their gradients. bindings.cpp calls the
// two functions at the end. A window's terms are added one by one in order of their lag.
#include "common.h"

namespace mfwm::cpu {
namespace {

template <class C>
MFWM_SIMD void add_row(C* __restrict total, const C* __restrict term, int64_t count) {
  for (int64_t d = 0; d < count; ++d) total[d] += term[d];
}

template <class C>
MFWM_SIMD void add_product(C* __restrict total, const C* __restrict term, const C* __restrict gate, int64_t count) {
  for (int64_t d = 0; d < count; ++d) total[d] += term[d] * gate[d];
}

template <class C>
struct Window {
  const ActionWindowSum& op;
  const int64_t batch = op.actions.size[0], steps = op.actions.size[1], width = op.actions.size[2];
  const int64_t positions = op.sums.size[1], horizons = op.sums.size[2];
  const int64_t row = padded<C>(width);

  const C* action(C* scratch, int64_t b, int64_t n) const {
    const Array& a = op.actions;
    return row_of(scratch, a, b * a.stride[0] + n * a.stride[1], a.stride[2], width);
  }
  const C* gate(C* scratch, int64_t i, int64_t lag) const {
    const Array& w = op.lag_weight;
    return row_of(scratch, w, i * w.stride[0] + lag * w.stride[1], w.stride[2], width);
  }
  int64_t sum_offset(int64_t b, int64_t n, int64_t i) const {
    return b * op.sums.stride[0] + n * op.sums.stride[1] + i * op.sums.stride[2];
  }
  const C* gradient(C* scratch, int64_t b, int64_t n, int64_t i) const {
    return row_of(scratch, op.sums, sum_offset(b, n, i), op.sums.stride[3], width);
  }

  void forward() const {
    parallel_for<C>(op.threads, batch * positions, 3 * row, [&](int64_t unit, C* scratch) {
      const int64_t b = unit / positions, n = unit % positions;
      C* total = scratch;
      int64_t lag = op.window_start;
      std::fill(total, total + width, C(0));
      for (int64_t i = 0; i < horizons; ++i) {
        // Offsets never decrease, so a plain sum continues from the previous horizon's. A gated one must start again,
        // because each horizon has gates of its own.
        if (op.lag_weight) {
          lag = op.window_start;
          std::fill(total, total + width, C(0));
        }
        for (; lag < op.offsets[i] && n + lag < steps; ++lag) {
          if (!same_segment(op.segment_ids, b, n, n + lag)) continue;
          const C* term = action(scratch + row, b, n + lag);
          if (op.lag_weight)
            add_product(total, term, gate(scratch + 2 * row, i, lag), width);
          else
            add_row(total, term, width);
        }
        store_row(total, op.sums.data, op.sums.dtype, sum_offset(b, n, i), op.sums.stride[3], width);
      }
    });
  }

  // d actions[b, m] = the sum of the gradients of all window sums that contain action m, over lags and horizons
  void backward_actions(const Array& gradients) const {
    parallel_for<C>(op.threads, batch * steps, 3 * row, [&](int64_t unit, C* scratch) {
      const int64_t b = unit / steps, m = unit % steps;
      C* total = scratch;
      std::fill(total, total + width, C(0));
      for (int64_t i = 0; i < horizons; ++i)
        for (int64_t lag = op.window_start; lag < op.offsets[i] && lag <= m; ++lag) {
          const int64_t n = m - lag;
          if (n >= positions || !same_segment(op.segment_ids, b, n, m)) continue;
          const C* term = gradient(scratch + row, b, n, i);
          if (op.lag_weight)
            add_product(total, term, gate(scratch + 2 * row, i, lag), width);
          else
            add_row(total, term, width);
        }
      const int64_t offset = b * gradients.stride[0] + m * gradients.stride[1];
      store_row(total, gradients.data, gradients.dtype, offset, gradients.stride[2], width);
    });
  }

  // d lag_weight[i, lag] = the sum of gradient * action over the positions of each clip, then over clips
  void backward_gates(const Array& gradients) const {
    const int64_t lags = gradients.size[1];
    parallel_for<C>(op.threads, horizons * lags, 4 * row, [&](int64_t unit, C* scratch) {
      const int64_t i = unit / lags, lag = unit % lags;
      C *total = scratch, *clip = scratch + row;
      std::fill(total, total + width, C(0));
      const bool used = lag >= op.window_start && lag < op.offsets[i];
      for (int64_t b = 0; used && b < batch; ++b) {
        std::fill(clip, clip + width, C(0));
        for (int64_t n = 0; n < positions && n + lag < steps; ++n)
          if (same_segment(op.segment_ids, b, n, n + lag))
            add_product(clip, gradient(scratch + 2 * row, b, n, i), action(scratch + 3 * row, b, n + lag), width);
        add_row(total, clip, width);
      }
      const int64_t offset = i * gradients.stride[0] + lag * gradients.stride[1];
      store_row(total, gradients.data, gradients.dtype, offset, gradients.stride[2], width);
    });
  }
};

}  // namespace

void action_window_sum_forward(const ActionWindowSum& op) {
  in_precision(op.actions.dtype == DType::float64, [&](auto zero) { Window<decltype(zero)>{op}.forward(); });
}

void action_window_sum_backward(const ActionWindowSum& op, const ActionWindowSumGradients& gradients) {
  in_precision(op.actions.dtype == DType::float64, [&](auto zero) {
    const Window<decltype(zero)> window{op};
    if (gradients.actions) window.backward_actions(gradients.actions);
    if (gradients.lag_weight) window.backward_gates(gradients.lag_weight);
  });
}

}  // namespace mfwm::cpu
