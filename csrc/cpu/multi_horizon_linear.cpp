// multi_horizon_linear on the CPU, without its matrix products, which torch computes: four passes over a chunk of rows,
// one in the forward and three in the backward. bindings.cpp calls the functions at the end.
#include <cmath>

#include "common.h"

namespace mfwm::cpu {
namespace {

// A unit of work: the rows of one position, or at most 64 of them, so that few positions still occupy many threads.
struct Unit {
  int64_t position, begin, end;
  bool has_all_rows;  // the unit has all of the position's rows in this chunk
};

// to += shares[0] rows[0] + ... + shares[3] rows[3]
template <class C>
MFWM_INLINE void add_four(C* __restrict to, const C* const* rows, const C* shares, int64_t count) {
  const C *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
  const C of_a = shares[0], of_b = shares[1], of_c = shares[2], of_d = shares[3];
  for (int64_t k = 0; k < count; ++k) to[k] += (of_a * a[k] + of_b * b[k]) + (of_c * c[k] + of_d * d[k]);
}

// own = g - share (h + add); into += own; total += weight * own
template <class C>
MFWM_INLINE void subtract_share(C* __restrict own, C* __restrict into, C* __restrict total, const C* g, const C* h,
                                const C* add, C share, C weight, int64_t count) {
  for (int64_t d = 0; d < count; ++d) {
    const C value = g[d] - (h[d] + add[d]) * share;
    own[d] = value;
    into[d] += value;
    total[d] += value * weight;
  }
}

// `layer`: the norm is LayerNorm.
template <class C, bool layer>
struct Heads {
  const MultiHorizonLinear& op;
  const int64_t rows = op.hidden.size[0], depth = op.hidden.size[1], horizons = op.sums.size[1];
  const int64_t row = padded<C>(depth);

  MFWM_INLINE const C* window_sum(int64_t position, int64_t i) const {
    return static_cast<const C*>(op.sums.data) + (position * horizons + i) * depth;
  }
  // Row r of hidden, with LayerNorm less its mean.
  MFWM_INLINE const C* hidden(C* scratch, int64_t r) const {
    const C* h = raw_hidden(scratch, r);
    if constexpr (!layer) return h;
    const C mean = means()[r];
    for (int64_t d = 0; d < depth; ++d) scratch[d] = h[d] - mean;
    return scratch;
  }
  MFWM_INLINE const C* raw_hidden(C* scratch, int64_t r) const {
    if (r + 1 < rows) prefetch_row(op.hidden, (r + 1) * op.hidden.stride[0], depth);
    return row_of(scratch, op.hidden, r * op.hidden.stride[0], op.hidden.stride[1], depth);
  }
  MFWM_INLINE C* means() const { return static_cast<C*>(op.means.data); }
  MFWM_INLINE C& inverse_rms(int64_t i, int64_t r) const {
    return static_cast<C*>(op.inverse_rms.data)[i * op.inverse_rms.stride[0] + r];
  }

  // Like hidden, which reads the mean that this computes. It needs a pass of its own: mean(x^2) - mean(x)^2 would cancel
  // where a row's mean is large.
  MFWM_INLINE const C* measured_hidden(C* scratch, int64_t r) const {
    if constexpr (layer) {
      const C* h = raw_hidden(scratch, r);
      means()[r] = sum_of<C>(depth, [=](int64_t d) __attribute__((always_inline)) { return h[d]; }) /
                   static_cast<C>(depth);
    }
    return hidden(scratch, r);
  }

  // scales[i] = r_i. Four horizons at a time, because four independent sums hide each other's latency.
  MFWM_INLINE void scales_of(const C* h, int64_t position, C* scales) const {
    for (int64_t i = 0; i < horizons; i += 4) {
      const int64_t last = horizons - 1;
      const C *a = window_sum(position, i), *b = window_sum(position, std::min(i + 1, last)),
              *c = window_sum(position, std::min(i + 2, last)), *e = window_sum(position, std::min(i + 3, last));
      C squares[4] = {0, 0, 0, 0};
      for (int64_t d = 0; d < depth; ++d) {
        const C x = h[d] + a[d], y = h[d] + b[d], z = h[d] + c[d], w = h[d] + e[d];
        squares[0] += x * x;
        squares[1] += y * y;
        squares[2] += z * z;
        squares[3] += w * w;
      }
      for (int64_t k = i; k < std::min(i + 4, horizons); ++k)
        scales[k] = C(1) / std::sqrt(squares[k - i] / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
    }
  }

  std::vector<Unit> units() const {
    constexpr int64_t max_rows = 64;
    std::vector<Unit> all;
    for (int64_t begin = 0; begin < rows;) {
      const int64_t position = (op.first + begin) / op.tokens;
      const int64_t end = std::min((position + 1) * op.tokens - op.first, rows);
      const bool has_all_rows = end - begin <= max_rows;
      for (; begin < end; begin += max_rows)
        all.push_back({position, begin, std::min(begin + max_rows, end), has_all_rows});
      begin = end;
    }
    return all;
  }

  // Call body(index, unit, scratch, to) for every unit. The body adds to `to`, the position's slab of `sums` (nullptr
  // without sums). Units that share a position get a slab each; these are then added in order.
  template <class Body>
  void by_position(int64_t scratch_size, const Array& sums, int64_t slab, const Body& body) const {
    const std::vector<Unit> all = units();
    std::vector<int64_t> part(all.size(), -1);
    int64_t parts = 0;
    for (size_t u = 0; sums && u < all.size(); ++u)
      if (!all[u].has_all_rows) part[u] = parts++;
    std::vector<C> partial(parts * slab, C(0));
    C* const total = static_cast<C*>(sums.data);
    parallel_for<C>(op.threads, static_cast<int64_t>(all.size()), scratch_size, [&](int64_t u, C* scratch) {
      C* to = part[u] >= 0 ? &partial[part[u] * slab] : total + all[u].position * slab;
      body(u, all[u], scratch, sums ? to : nullptr);
    });
    for (size_t u = 0; u < all.size(); ++u)
      for (int64_t k = 0; part[u] >= 0 && k < slab; ++k)
        total[all[u].position * slab + k] += partial[part[u] * slab + k];
  }

  // ---- outputs[i] = r_i (product_i - means head_sums_i + projected_i) + bias_i, the means with LayerNorm only

  MFWM_SIMD void forward_rows(const MultiHorizonLinearOutputs& to, const Unit& unit, C* scratch) const {
    const int64_t columns = to.product.size[1];
    C *token = scratch, *scales = scratch + row, *__restrict out = scales + padded<C>(horizons);
    const C* __restrict add = static_cast<const C*>(to.projected.data) + unit.position * columns;
    const C* bias = static_cast<const C*>(to.bias.data);
    const C* __restrict head_sums = static_cast<const C*>(to.head_sums.data);
    for (int64_t r = unit.begin; r < unit.end; ++r) {
      if (op.inverse_rms) {
        scales_of(measured_hidden(token, r), unit.position, scales);
        for (int64_t i = 0; i < horizons; ++i) inverse_rms(i, r) = scales[i];
      }
      load_row(out, to.product.data, to.product.dtype, r * to.product.stride[0], to.product.stride[1], columns);
      if constexpr (layer) {
        const C mean = means()[r];
        for (int64_t n = 0; n < columns; ++n) out[n] -= mean * head_sums[n];
      }
      int64_t first = 0;
      for (int64_t i = 0; i < horizons; ++i) {
        const Array& output = to.outputs[i];
        const int64_t last = first + output.size[1];
        const C scale = op.inverse_rms ? scales[i] : C(1);
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
    const int64_t size = row + padded<C>(horizons) + padded<C>(to.product.size[1]);
    parallel_for<C>(op.threads, static_cast<int64_t>(all.size()), size,
                    [&](int64_t u, C* scratch) { forward_rows(to, all[u], scratch); });
  }

  // ---- scaled_i = r_i gradients_i and its sum over the tokens of a position, and
  //   shares_i = r_i^2 / D <x_i, scaled_i W_i> = r_i^2 / D <gradients_i, outputs_i - bias_i>

  MFWM_SIMD void scale_rows(const MultiHorizonLinearScaled& to, const Unit& unit, C* scratch, C* sums) const {
    const int64_t columns = to.scaled.size[1];
    C *out = scratch, *__restrict unbiased = scratch + padded<C>(columns);
    const C* bias = static_cast<const C*>(to.bias.data);
    C* shares = static_cast<C*>(to.shares.data) + unit.begin * horizons;
    for (int64_t r = unit.begin; r < unit.end; ++r, shares += horizons) {
      int64_t first = 0;
      for (int64_t i = 0; i < horizons; ++i) {
        const Array &gradient = to.gradients[i], &output = to.outputs[i];
        const int64_t count = output.size[1];
        C *own = out + first, product = 0;
        shares[i] = 0;
        if (!gradient) {
          std::fill(own, own + count, C(0));
        } else {
          load_row(own, gradient.data, gradient.dtype, r * gradient.stride[0], gradient.stride[1], count);
          if (op.inverse_rms) {
            load_row(unbiased, output.data, output.dtype, r * output.stride[0], output.stride[1], count);
            if (bias)
              for (int64_t n = 0; n < count; ++n) unbiased[n] -= bias[first + n];
            for (int64_t n = 0; n < count; ++n) product += own[n] * unbiased[n];
            const C scale = inverse_rms(i, r);
            shares[i] = product * scale * scale / static_cast<C>(depth);
            for (int64_t n = 0; n < count; ++n) own[n] *= scale;
          }
        }
        first += count;
      }
      if (sums)
        for (int64_t n = 0; n < columns; ++n) sums[n] += out[n];
      store_row(out, to.scaled.data, to.scaled.dtype, r * to.scaled.stride[0], to.scaled.stride[1], columns);
    }
  }

  void scale(const MultiHorizonLinearScaled& to) const {
    const int64_t columns = to.scaled.size[1];
    const auto body = [&](int64_t, const Unit& unit, C* scratch, C* sums) { scale_rows(to, unit, scratch, sums); };
    by_position(2 * padded<C>(columns), to.sums, columns, body);
  }

  // ---- With G_i = scaled_i W_i: d x_i = G_i - shares_i x_i; d hidden = the sum of d x_i over i; d sums_i = the sum of
  // d x_i over tokens. This pass reads the sum of G_i over i. It leaves the sum of G_i over tokens out of d sums_i,
  // since the caller gets that from a matrix product.

  MFWM_SIMD void combine_rows(const MultiHorizonLinearCombined& to, const Unit& unit, C* scratch, C* sums) const {
    C *state = scratch, *total = scratch + row, *zeros = scratch + 2 * row, *tokens = scratch + 3 * row;
    std::fill(zeros, zeros + depth, C(0));
    const C* shares = static_cast<const C*>(to.shares.data);
    for (int64_t r = unit.begin; r < unit.end; r += 4) {
      const int64_t count = std::min<int64_t>(4, unit.end - r);
      const C* h[4] = {zeros, zeros, zeros, zeros};
      for (int64_t j = 0; j < count; ++j) h[j] = hidden(tokens + j * row, r + j);
      for (int64_t j = 0; to.hidden && j < count; ++j) {
        const C *share = shares + (r + j) * horizons, *from = h[j];
        C all = 0;
        for (int64_t i = 0; i < horizons; ++i) all += share[i];
        const Array &product = to.product, &out = to.hidden;
        const C* g = row_of(state, product, (r + j) * product.stride[0], product.stride[1], depth);
        for (int64_t d = 0; d < depth; ++d) total[d] = g[d] - all * from[d];
        for (int64_t i = 0; i < horizons; i += 4) {
          const C* window_sums[4] = {zeros, zeros, zeros, zeros};
          C factors[4] = {0, 0, 0, 0};
          for (int64_t k = i; k < std::min(i + 4, horizons); ++k) {
            window_sums[k - i] = window_sum(unit.position, k);
            factors[k - i] = -share[k];
          }
          add_four(total, window_sums, factors, depth);
        }
        store_row(total, out.data, out.dtype, (r + j) * out.stride[0], out.stride[1], depth);
      }
      for (int64_t i = 0; sums && i < horizons; ++i) {
        C factors[4] = {0, 0, 0, 0}, all = 0;
        for (int64_t j = 0; j < count; ++j) {
          factors[j] = -shares[(r + j) * horizons + i];
          all += factors[j];
        }
        C* into = sums + i * depth;
        add_four(into, h, factors, depth);
        const C* add = window_sum(unit.position, i);
        for (int64_t d = 0; d < depth; ++d) into[d] += all * add[d];
      }
    }
  }

  void combine(const MultiHorizonLinearCombined& to) const {
    const auto body = [&](int64_t, const Unit& unit, C* scratch, C* sums) { combine_rows(to, unit, scratch, sums); };
    by_position(7 * row, to.sums, horizons * depth, body);
  }

  // ---- The same gradients from each G_i separately: a gradient monitor needs the dot products between horizons.

  MFWM_SIMD void monitor_rows(const MultiHorizonLinearMonitored& to, const Unit& unit, C* scratch, C* sums,
                              double* gram) const {
    C *token = scratch, *state = scratch + row, *total = scratch + 2 * row, *discarded = scratch + 3 * row,
      *each = scratch + 4 * row;
    std::fill(scratch, scratch + 4 * row, C(0));
    for (int64_t r = unit.begin; r < unit.end; ++r) {
      const C* h = op.inverse_rms ? hidden(token, r) : token;
      const C* shares = static_cast<const C*>(to.shares.data) + r * horizons;
      std::fill(total, total + depth, C(0));
      for (int64_t i = 0; i < horizons; ++i) {
        const Array& gradient = to.states[i];
        if (!gradient) continue;
        const C* g = row_of(state, gradient, r * gradient.stride[0], gradient.stride[1], depth);
        const C* add = op.inverse_rms ? window_sum(unit.position, i) : token;
        C *own = each + i * row, *into = sums ? sums + i * depth : discarded;
        const C weight = to.scale.empty() ? C(1) : static_cast<C>(to.scale[i]);
        subtract_share(own, into, total, g, h, add, shares[i], weight, depth);
        for (int64_t j = 0; j <= i; ++j) {
          if (!to.states[j]) continue;
          const C* other = each + j * row;
          const auto product = [=](int64_t d) __attribute__((always_inline)) { return own[d] * other[d]; };
          gram[i * horizons + j] += static_cast<double>(sum_of<C>(depth, product));
        }
      }
      const Array& out = to.hidden;
      store_row(total, out.data, out.dtype, r * out.stride[0], out.stride[1], depth);
    }
  }

  void monitor(const MultiHorizonLinearMonitored& to) const {
    const int64_t pairs = horizons * horizons;
    std::vector<double> grams(pairs * static_cast<int64_t>(units().size()), 0.0);
    const auto body = [&](int64_t u, const Unit& unit, C* scratch, C* sums) {
      monitor_rows(to, unit, scratch, sums, &grams[u * pairs]);
    };
    by_position((4 + horizons) * row, to.sums, horizons * depth, body);
    double* const gram = static_cast<double*>(to.gram.data);
    for (size_t k = 0; k < grams.size(); ++k) {
      const int64_t i = k % pairs / horizons, j = k % pairs % horizons;
      gram[i * horizons + j] += grams[k];
      if (i != j) gram[j * horizons + i] += grams[k];
    }
  }
};

// Call run(heads) with the Heads of the op's precision and norm.
template <class Run>
void with_heads(const MultiHorizonLinear& op, const Run& run) {
  in_precision(op.sums.dtype == DType::float64, [&](auto zero) {
    op.means ? run(Heads<decltype(zero), true>{op}) : run(Heads<decltype(zero), false>{op});
  });
}

}  // namespace

void multi_horizon_linear_forward(const MultiHorizonLinear& op, const MultiHorizonLinearOutputs& to) {
  with_heads(op, [&](const auto& heads) { heads.forward(to); });
}

void multi_horizon_linear_scale(const MultiHorizonLinear& op, const MultiHorizonLinearScaled& to) {
  with_heads(op, [&](const auto& heads) { heads.scale(to); });
}

void multi_horizon_linear_combine(const MultiHorizonLinear& op, const MultiHorizonLinearCombined& to) {
  with_heads(op, [&](const auto& heads) { heads.combine(to); });
}

void multi_horizon_linear_monitor(const MultiHorizonLinear& op, const MultiHorizonLinearMonitored& to) {
  with_heads(op, [&](const auto& heads) { heads.monitor(to); });
}

}  // namespace mfwm::cpu
