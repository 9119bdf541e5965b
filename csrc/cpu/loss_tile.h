// The losses of one tile of predictions, and their gradients, of any kind and any dtype.
#pragma once

#include <cmath>

#include "pyramid.h"

namespace mfwm::cpu {

// The coefficient of a loss in the total, and the numbers that its kind takes.
template <class C>
struct Curve {
  C coefficient, delta, eps;
};

MFWM_INLINE float square_root(float x) { return std::sqrt(x); }
MFWM_INLINE double square_root(double x) { return std::sqrt(x); }
template <class X>
MFWM_INLINE X square_root(const X& x) {
  using C = std::decay_t<decltype(x[0])>;
  alignas(64) C root[Lanes<C>::count];
  Lanes<C>::store(x, root);
  for (C& each : root) each = std::sqrt(each);
  return Lanes<C>::load(root);
}

// By how much a slope of loss_of falls short of the derivative: a factor that goes into the coefficient instead.
constexpr double omitted_factor(LossKind kind) { return kind == LossKind::mse ? 2 : 1; }

// The loss of d, and in `slope` its derivative over omitted_factor(kind). X is C or its Lanes.
template <LossKind kind, class X, class C>
MFWM_INLINE X loss_of(const X& d, const Curve<C>& curve, X& slope) {
  const X zero{};
  if constexpr (kind == LossKind::mse) {
    slope = d;
    return d * d;
  } else if constexpr (kind == LossKind::l1) {
    slope = d > zero ? zero + C(1) : d < zero ? zero - C(1) : d;  // 0, or NaN
    return d < zero ? -d : d;
  } else if constexpr (kind == LossKind::huber) {
    const X delta = zero + curve.delta, size = d < zero ? -d : d;
    slope = d > delta ? delta : d < -delta ? -delta : d;
    return size > delta ? delta * (size - delta * C(0.5)) : d * d * C(0.5);
  } else {
    const X root = square_root(d * d + curve.eps * curve.eps);
    slope = d / root;
    return root;
  }
}

// What a gradient consists of besides the slope of the loss: weight * tile, each element repeated over ratio x ratio.
template <class C>
struct Addition {
  Tile<const C> tile;
  int64_t ratio = 0;  // 0: nothing, 1 or 2
  C weight = 1;
};

// P and G are C or bf16; the target is in pairs where G is bf16. With `stream`, gradients are written past the caches. Sums
// of float lanes stay short: a tile adds a few hundred elements to each.
template <LossKind kind, bool with_gradient, int ratio, bool in_pairs, class C, class P, class G>
MFWM_INLINE double loss_tile(Tile<const P> pred, Tile<const C> target, Tile<G> gradient, const Addition<C>& addition,
                             Curve<C> curve, bool fetch, bool stream) {
  using L = Lanes<C>;
  constexpr int64_t lanes = L::count;
  const C weight = addition.weight;
  Tile<const C> added = addition.tile;
  // Asks for what the next tile reads, since a tile is too short for the hardware to see it coming. Into the second-level
  // cache: the first is full of this tile.
  const int64_t next = fetch ? target.rows * pred.pitch : 0;
  if (ratio < 2 && pred.is_dense() && target.is_dense() && gradient.is_dense() && added.is_dense()) {
    pred = pred.joined(), target = target.joined(), gradient = gradient.joined(), added = added.joined();
  }
  typename L::type sums[2] = {};
  C rest = 0;
  // The gradient of lanes; their losses are added to one of two sums, which do not wait for each other.
  const auto gradient_of = [&](const typename L::type& d, const typename L::type& add, int which)
                               __attribute__((always_inline)) {
    typename L::type slope;
    sums[which] += loss_of<kind>(d, curve, slope);
    return slope * curve.coefficient + add;
  };
  const auto piece = [&](const P* p, const C* t, G* g, const typename L::type& add, int which)
                         __attribute__((always_inline)) {
    const auto made = gradient_of(L::load(p) - L::load(t), add, which);
    if constexpr (with_gradient && !in_pairs) stream ? L::stream(made, g) : L::store(made, g);
    __builtin_prefetch(p + next, 0, 2);
  };
  // Two neighbours, or the pairs of both.
  const auto pieces = [&](const P* p, const C* t, G* g, const typename L::type& add, const typename L::type& other)
                          __attribute__((always_inline)) {
    if constexpr (in_pairs) {
      const auto of_p = L::load_pairs(p);
      const typename L::Pairs made{gradient_of(of_p.even - L::load(t), add, 0),
                                   gradient_of(of_p.odd - L::load(t + lanes), other, 1)};
      // What is added, a tile in pairs and bf16 have no NaN with a one among its lower 16 bits.
      constexpr bool any_nan = false;
      if constexpr (with_gradient)
        stream ? L::template stream_pairs<any_nan>(made, g) : L::template store_pairs<any_nan>(made, g);
      __builtin_prefetch(p + next, 0, 2);
    } else {
      piece(p, t, g, add, 0);
      piece(p + lanes, t + lanes, g + lanes, other, 1);
    }
  };
  const auto element = [&](const P* p, const C* t, G* g, C add) __attribute__((always_inline)) {
    C slope;
    rest += loss_of<kind>(widen(*p) - *t, curve, slope);
    if constexpr (with_gradient) narrow(slope * curve.coefficient + add, *g);
  };
  const int64_t columns = target.columns;
  if constexpr (ratio == 2) {
    for (int64_t y = 0; y < target.rows; ++y) {
      const P* p = pred.row(y);
      const C *t = target.row(y), *a = added.row(y / 2);
      G* g = gradient.row(y);
      int64_t x = 0;
      for (; x + 2 * lanes <= columns; x += 2 * lanes) {
        const auto add = L::load(a + x / 2) * weight;
        const auto left = in_pairs ? add : L::template doubled<0>(add);
        const auto right = in_pairs ? add : L::template doubled<1>(add);
        pieces(p + x, t + x, g + x, left, right);
      }
      for (; x < columns; ++x) element(p + x, t + x, g + x, a[x / 2] * weight);
    }
  } else {
    for (int64_t y = 0; y < target.rows; ++y) {
      const P* p = pred.row(y);
      const C *t = target.row(y), *a = ratio ? added.row(y) : nullptr;
      G* g = with_gradient ? gradient.row(y) : nullptr;
      int64_t x = 0;
      for (; x + 2 * lanes <= columns; x += 2 * lanes) {
        typename L::Pairs add{};
        if constexpr (ratio == 1 && in_pairs) add = L::load_pairs(a + x);
        if constexpr (ratio == 1 && !in_pairs) add = {L::load(a + x), L::load(a + x + lanes)};
        pieces(p + x, t + x, g + x, add.even, add.odd);
      }
      if constexpr (!in_pairs)
        for (; x + lanes <= columns; x += lanes)
          piece(p + x, t + x, g + x, ratio ? L::load(a + x) : typename L::type{}, 0);
      for (; x < columns; ++x) element(p + x, t + x, g + x, ratio ? a[x] : C(0));
    }
  }
  double total = static_cast<double>(rest);
  const typename L::type sum = sums[0] + sums[1];
  for (int64_t k = 0; k < lanes; ++k) total += static_cast<double>(sum[k]);
  return total;
}

// A tile of C, or of bf16 where `is_half`, in scratch or in a tensor.
template <class C>
struct AnyTile {
  void* data = nullptr;
  int64_t pitch = 0, rows = 0, columns = 0;
  bool is_half = false;

  AnyTile() = default;
  AnyTile(const Tile<C>& tile) : data(tile.data), pitch(tile.pitch), rows(tile.rows), columns(tile.columns) {}
  // A tile of the shape of `like` in a plain image.
  AnyTile(const Array& array, int64_t offset, const Tile<C>& like)
      : data(static_cast<char*>(array.data) + offset * size_of(array.dtype)),
        pitch(array.stride[3]),
        rows(like.rows),
        columns(like.columns),
        is_half(array.dtype == DType::bfloat16) {}

  template <class S>
  MFWM_INLINE Tile<S> as() const {
    return {static_cast<S*>(data), pitch, rows, columns};
  }
  // body(tile) with its elements' type.
  template <class Body>
  MFWM_INLINE auto visit(const Body& body) const {
    if constexpr (std::is_same_v<C, float>)
      if (is_half) return body(as<bfloat16>());
    return body(as<C>());
  }
  // Whole lanes of it lie on multiples of 16 bytes.
  bool is_aligned() const {
    const int64_t bytes = is_half ? 2 : sizeof(C);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch * bytes % 16 == 0;
  }
};

// Sum of the losses of pred - target; coefficient * slope + addition goes to `gradient` where it has data. Gradients are
// of bf16 where the target is in pairs, else of C.
template <class C>
MFWM_SIMD double loss_and_gradient(LossKind kind, const AnyTile<C>& pred, const Tile<const C>& target,
                                   const AnyTile<C>& gradient, const Addition<C>& addition, const Curve<C>& curve,
                                   bool fetch, bool stream) {
  const auto with = [&](auto tag) __attribute__((always_inline)) {
    constexpr LossKind k = decltype(tag)::value;
    return pred.visit([&](const auto& p) __attribute__((always_inline)) {
      const auto from = read_only(p);
      const auto into = [&](auto in_pairs, const auto& g) __attribute__((always_inline)) {
        constexpr bool pairs = decltype(in_pairs)::value;
        if (!g.data) return loss_tile<k, false, 0, pairs>(from, target, g, {}, curve, fetch, false);
        if (addition.ratio == 0) return loss_tile<k, true, 0, pairs>(from, target, g, {}, curve, fetch, stream);
        if (addition.ratio == 1) return loss_tile<k, true, 1, pairs>(from, target, g, addition, curve, fetch, stream);
        return loss_tile<k, true, 2, pairs>(from, target, g, addition, curve, fetch, stream);
      };
      if constexpr (std::is_same_v<C, float>)
        if (target.in_pairs) return into(std::true_type{}, gradient.template as<bfloat16>());
      return into(std::false_type{}, gradient.template as<C>());
    });
  };
  switch (kind) {
    case LossKind::mse: return with(std::integral_constant<LossKind, LossKind::mse>{});
    case LossKind::l1: return with(std::integral_constant<LossKind, LossKind::l1>{});
    case LossKind::huber: return with(std::integral_constant<LossKind, LossKind::huber>{});
    default: return with(std::integral_constant<LossKind, LossKind::charbonnier>{});
  }
}

}  // namespace mfwm::cpu
