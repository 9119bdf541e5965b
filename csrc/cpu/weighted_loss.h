// The loss of one tile of predictions that are distributions, or whose elements have weights, and its gradients.
// multi_horizon_loss.cpp calls weighted_loss; all other predictions take the faster loops of loss_tile.h.
#pragma once

#include "loss_tile.h"

namespace mfwm::cpu {

// Log-scales are clamped to +-log_scale_limit (LOG_SCALE_LIMIT in mfwm_kernels/ops/multi_horizon_loss.py).
constexpr double log_scale_limit = 10;

constexpr bool is_distribution(LossKind kind) { return kind == LossKind::gaussian || kind == LossKind::laplace; }

// The kind that compares the means of a pair.
constexpr LossKind kind_of_means(LossKind kind) {
  return kind == LossKind::gaussian ? LossKind::mse : kind == LossKind::laplace ? LossKind::l1 : kind;
}

// All of one shape. `log_scale` is empty where the kind is no distribution; `weight`, `addition` (to the mean's
// gradient) and the gradients may be empty.
template <class C>
struct WeightedTiles {
  Tile<const C> mean, log_scale, target, weight{}, addition{};
  Tile<C> gradient{}, log_scale_gradient{};

  template <class Body>
  MFWM_INLINE void for_each(const Body& body) {
    body(mean), body(log_scale), body(target), body(weight), body(addition), body(gradient), body(log_scale_gradient);
  }
};

// Pointers to the elements of one vector, null where a tile is empty.
template <class C>
struct WeightedRow {
  const C *mean, *log_scale, *target, *weight, *addition;
  C *gradient, *log_scale_gradient;
};

// The negative log-likelihood of a difference d at log-scale s, and its derivatives. Beyond the limit s is clamped and
// `slope_of_scale` is 0. At a NaN it is also 0, like the gradient of torch.clamp, and the other results are NaN.
template <class X, class C>
MFWM_INLINE X loss_of_distribution(LossKind kind, const X& d, const X& s, C beta, X& slope, X& slope_of_scale) {
  using L = Lanes<C>;
  const X zero{}, limit = zero + C(log_scale_limit), clamped = s > limit ? limit : s < -limit ? -limit : s;
  const X inverse = L::exponential(-clamped);
  X loss;
  if (kind == LossKind::laplace) {
    const X size = (d < zero ? -d : d) * inverse;
    loss = clamped + size;
    slope = d > zero ? inverse : d < zero ? -inverse : d * inverse;  // 0, or NaN, which must propagate
    slope_of_scale = C(1) - size;
  } else {
    const X likelihood = beta == 0 ? zero + C(0.5) : L::exponential(clamped * beta) * C(0.5);
    slope = d * inverse;
    const X square = d * slope;
    loss = (clamped + square) * likelihood;
    slope = slope * likelihood * C(2);
    slope_of_scale = (C(1) - square) * likelihood;
  }
  slope_of_scale = clamped == s ? slope_of_scale : zero;
  return loss;
}

// The weighted losses of one vector. Also writes its gradients.
template <class C>
MFWM_INLINE typename Lanes<C>::type weighted_vector(const WeightedRow<C>& row, const Curve<C>& curve, C beta) {
  using L = Lanes<C>;
  typename L::type loss, slope, slope_of_scale{};
  const auto difference = L::load(row.mean) - L::load(row.target);
  if (row.log_scale)
    loss = loss_of_distribution(curve.kind, difference, L::load(row.log_scale), beta, slope, slope_of_scale);
  else
    loss = loss_of(curve.kind, difference, curve, slope);
  if (row.weight) {
    const auto weight = L::load(row.weight);
    loss *= weight, slope *= weight, slope_of_scale *= weight;
  }
  slope *= curve.coefficient;
  if (row.addition) slope += L::load(row.addition);
  if (row.gradient) L::store(slope, row.gradient);
  if (row.log_scale_gradient) L::store(slope_of_scale * curve.coefficient, row.log_scale_gradient);
  return loss;
}

// The sum of the weighted losses. The gradient of a mean is weight * coefficient * slope + addition.
template <class C>
MFWM_SIMD double weighted_loss(WeightedTiles<C> tiles, const Curve<C>& curve, C beta) {
  using L = Lanes<C>;
  bool is_dense = true;
  tiles.for_each([&](const auto& tile) { is_dense = is_dense && (!tile.data || tile.is_dense()); });
  if (is_dense) tiles.for_each([&](auto& tile) { tile = tile.joined(); });
  const int64_t columns = tiles.target.columns;
  typename L::type sum{};
  double total = 0;
  for (int64_t y = 0; y < tiles.target.rows; ++y) {
    const auto row_at = [&](int64_t x) __attribute__((always_inline)) {
      const auto at = [&](const auto& tile) __attribute__((always_inline)) {
        return tile.data ? tile.row(y) + x : nullptr;
      };
      return WeightedRow<C>{at(tiles.mean),     at(tiles.log_scale), at(tiles.target),            at(tiles.weight),
                            at(tiles.addition), at(tiles.gradient),  at(tiles.log_scale_gradient)};
    };
    int64_t x = 0;
    for (; x + L::count <= columns; x += L::count) sum += weighted_vector(row_at(x), curve, beta);
    if (x == columns) continue;
    // Compute the rest as one vector, in copies filled up with zeros.
    const int64_t rest = columns - x;
    const WeightedRow<C> row = row_at(x);
    C copies[7][L::count] = {};
    int used = 0;
    const auto copy_of = [&](const C* from) __attribute__((always_inline)) -> C* {
      C* copy = copies[used++];
      if (from) std::copy(from, from + rest, copy);
      return from ? copy : nullptr;
    };
    const auto room_for = [&](const C* to) __attribute__((always_inline)) -> C* {
      return to ? copies[used++] : nullptr;
    };
    const WeightedRow<C> copy{copy_of(row.mean),     copy_of(row.log_scale), copy_of(row.target),
                              copy_of(row.weight),   copy_of(row.addition),  room_for(row.gradient),
                              room_for(row.log_scale_gradient)};
    const auto losses = weighted_vector(copy, curve, beta);
    for (int64_t k = 0; k < rest; ++k) {
      total += static_cast<double>(losses[k]);
      if (row.gradient) row.gradient[k] = copy.gradient[k];
      if (row.log_scale_gradient) row.log_scale_gradient[k] = copy.log_scale_gradient[k];
    }
  }
  for (int64_t k = 0; k < L::count; ++k) total += static_cast<double>(sum[k]);
  return total;
}

// weight = 1 + gain * |later - now|
template <class C>
MFWM_SIMD void motion_weight(Tile<const C> later, Tile<const C> now, C gain, Tile<C> weight) {
  if (later.is_dense() && now.is_dense()) later = later.joined(), now = now.joined(), weight = weight.joined();
  for (int64_t y = 0; y < weight.rows; ++y) {
    const C *__restrict a = later.row(y), *__restrict b = now.row(y);
    C* __restrict to = weight.row(y);
    for (int64_t x = 0; x < weight.columns; ++x) {
      const C change = a[x] - b[x];
      to[x] = C(1) + gain * (change < 0 ? -change : change);
    }
  }
}

}  // namespace mfwm::cpu
