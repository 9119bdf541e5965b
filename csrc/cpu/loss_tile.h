// The loss of one tile of predictions, and its gradient, for every kind and dtype. multi_horizon_loss.cpp calls
// loss_and_gradient.
#pragma once

#include <cmath>

#include "pyramid.h"

namespace mfwm::cpu {

// The kind of a loss, its parameters, and its coefficient in the total.
template <class C>
struct Curve {
  LossKind kind;
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

// loss_of returns slope = derivative / omitted_factor(kind); callers fold the factor into the coefficient.
constexpr double omitted_factor(LossKind kind) { return kind == LossKind::mse ? 2 : 1; }

// The loss of a difference d, and in `slope` its derivative over omitted_factor(kind). X is C or its Lanes.
template <class X, class C>
MFWM_INLINE X loss_of(LossKind kind, const X& d, const Curve<C>& curve, X& slope) {
  const X zero{};
  switch (kind) {
    case LossKind::mse: slope = d; return d * d;
    case LossKind::l1:
      slope = d > zero ? zero + C(1) : d < zero ? zero - C(1) : d;  // otherwise d is 0, or NaN, which must propagate
      return d < zero ? -d : d;
    case LossKind::huber: {
      const X delta = zero + curve.delta, size = d < zero ? -d : d;
      slope = d > delta ? delta : d < -delta ? -delta : d;
      return size > delta ? delta * (size - delta * C(0.5)) : d * d * C(0.5);
    }
    default: {
      const X root = square_root(d * d + curve.eps * curve.eps);
      slope = d / root;
      return root;
    }
  }
}

// A term to add to a gradient: weight * tile, with each element repeated over ratio x ratio.
template <class C>
struct Addition {
  Tile<const C> tile;
  int64_t ratio = 0;  // 1 or 2; 0: add nothing
  C weight = 1;
};

// The target of a prediction: a tile, or bytes of a video, which are scaled and shifted when loaded.
template <class C>
struct Target {
  Tile<const C> tile;
  Tile<const uint8_t> bytes{};
  C scale = 1, shift = 0;

  template <class S>
  MFWM_INLINE const Tile<const S>& as() const {
    if constexpr (std::is_same_v<S, uint8_t>)
      return bytes;
    else
      return tile;
  }
  // One vector at t; and two vectors at t, split into even and odd elements.
  MFWM_INLINE typename Lanes<C>::type lanes(const C* t) const { return Lanes<C>::load(t); }
  MFWM_INLINE typename Lanes<C>::type lanes(const uint8_t* t) const { return Lanes<C>::load(t) * scale + shift; }
  MFWM_INLINE typename Lanes<C>::Split split(const C* t) const {
    return {Lanes<C>::load(t), Lanes<C>::load(t + Lanes<C>::count)};
  }
  MFWM_INLINE typename Lanes<C>::Split split(const uint8_t* t) const {
    const auto bytes = Lanes<C>::load_split(t);
    return {bytes.even * scale + shift, bytes.odd * scale + shift};
  }
  MFWM_INLINE C element(const C* t) const { return *t; }
  MFWM_INLINE C element(const uint8_t* t) const { return static_cast<C>(*t) * scale + shift; }
};

// The loss of one tile and, if `with_gradient`, its gradient.
//
// `squares` selects the loops for mse. The other kinds share one loop that branches on the kind: specialising each
// would instantiate it about a hundred times.
//
// `next`: how many elements the next tile's predictions are away, to prefetch them; 0: do not.
//
// `stream`: write gradients with non-temporal stores. The types P (predictions) and G (gradients) are C or bf16; S
// (target) is C or uint8. If G is bf16, a target of C is split into even and odd elements. Float sums stay accurate: a
// tile adds at most a few thousand elements to a lane.
template <bool squares, bool with_gradient, int ratio, bool is_split, bool stream, class S, class C, class P, class G>
MFWM_INLINE double loss_tile(Tile<const P> pred, const Target<C> target, Tile<G> gradient, const Addition<C>& addition,
                             const Curve<C> curve, int64_t next) {
  using L = Lanes<C>;
  constexpr int64_t lanes = L::count;
  const C weight = addition.weight;
  Tile<const S> targets = target.template as<S>();
  Tile<const C> additions = addition.tile;
  // Prefetch for the next tile: a tile is too short for the hardware prefetcher. This loop is the place, because the
  // current tile is already in cache and few other misses are in flight. fp32 goes to L2 only: L1 is full of this tile.
  const int64_t next_bytes = next ? targets.rows * targets.pitch : 0;
  if (ratio < 2 && pred.is_dense() && targets.is_dense() && gradient.is_dense() && additions.is_dense()) {
    pred = pred.joined(), targets = targets.joined(), gradient = gradient.joined(), additions = additions.joined();
  }
  const LossKind kind = squares ? LossKind::mse : curve.kind;
  typename L::type sums[2] = {};
  C scalar_sum = 0;
  // The gradient of one vector. Adds its losses to one of two sums, whose latencies overlap.
  const auto gradient_of = [&](const typename L::type& d, const typename L::type& add, int which)
                               __attribute__((always_inline)) {
    typename L::type slope;
    sums[which] += loss_of(kind, d, curve, slope);
    return slope * curve.coefficient + add;
  };
  const auto one_vector = [&](const P* p, const S* t, G* g, const typename L::type& add, int which)
                              __attribute__((always_inline)) {
    const auto result = gradient_of(L::load(p) - target.lanes(t), add, which);
    if constexpr (with_gradient) stream ? L::stream(result, g) : L::store(result, g);
    __builtin_prefetch(p + next, 0, 2);
  };
  // Two neighbouring vectors, split if the tile is.
  const auto two_vectors = [&](const P* p, const S* t, G* g, const typename L::type& add,
                               const typename L::type& other) __attribute__((always_inline)) {
    if constexpr (is_split) {
      const auto difference = L::load_split(p) - target.split(t);
      const typename L::Split result{gradient_of(difference.even, add, 0), gradient_of(difference.odd, other, 1)};
      // None of the three inputs (addition, split tile, bf16) can hold a NaN whose lower 16 bits are non-zero, so
      // rounding cannot carry through one (see Split in lanes.h).
      constexpr bool any_nan = false;
      if constexpr (with_gradient)
        stream ? L::template stream_split<any_nan>(result, g) : L::template store_split<any_nan>(result, g);
      __builtin_prefetch(p + next, 0, 3);
      if constexpr (std::is_same_v<S, uint8_t>) __builtin_prefetch(t + next_bytes, 0, 3);
    } else {
      one_vector(p, t, g, add, 0);
      one_vector(p + lanes, t + lanes, g + lanes, other, 1);
    }
  };
  const auto element = [&](const P* p, const S* t, G* g, C add) __attribute__((always_inline)) {
    C slope;
    scalar_sum += loss_of(kind, widen(*p) - target.element(t), curve, slope);
    if constexpr (with_gradient) narrow(slope * curve.coefficient + add, *g);
  };
  const int64_t columns = targets.columns, vector_pairs = columns / (2 * lanes) * lanes;
  for (int64_t y = 0; y < targets.rows; ++y) {
    const P* p = pred.row(y);
    const S* t = targets.row(y);
    const C* a = ratio ? additions.row(y / ratio) : nullptr;
    G* g = with_gradient ? gradient.row(y) : nullptr;
    // x counts pairs: element 2 * x.
    for (int64_t x = 0; x < vector_pairs; x += lanes) {
      typename L::Split add{};
      if constexpr (ratio == 1 && is_split) add = L::load_split(a + 2 * x);
      if constexpr (ratio == 1 && !is_split) add = {L::load(a + 2 * x), L::load(a + 2 * x + lanes)};
      if constexpr (ratio == 2) {
        const auto terms = L::load(a + x) * weight;
        add = {is_split ? terms : L::template doubled<0>(terms), is_split ? terms : L::template doubled<1>(terms)};
      }
      two_vectors(p + 2 * x, t + 2 * x, g + 2 * x, add.even, add.odd);
    }
    if (2 * vector_pairs == columns) continue;
    int64_t x = 2 * vector_pairs;
    for (; x + lanes <= columns; x += lanes) {
      typename L::type add{};
      if constexpr (ratio == 1) add = L::load(a + x);
      // Only half the vector is used; reading past the end is safe, since more than a row of scratch follows.
      if constexpr (ratio == 2) add = L::template doubled<0>(L::load(a + x / 2) * weight);
      one_vector(p + x, t + x, g + x, add, 0);
    }
    for (; x < columns; ++x) element(p + x, t + x, g + x, ratio == 0 ? C(0) : ratio == 1 ? a[x] : a[x / 2] * weight);
  }
  double total = static_cast<double>(scalar_sum);
  const typename L::type sum = sums[0] + sums[1];
  for (int64_t k = 0; k < lanes; ++k) total += static_cast<double>(sum[k]);
  return total;
}

// A tile of C, or of bf16 if `is_bf16`, in scratch or in a tensor.
template <class C>
struct AnyTile {
  void* data = nullptr;
  int64_t pitch = 0, rows = 0, columns = 0;
  bool is_bf16 = false;

  AnyTile() = default;
  AnyTile(const Tile<C>& tile) : data(tile.data), pitch(tile.pitch), rows(tile.rows), columns(tile.columns) {}
  // A tile inside a plain image, of the shape of `like`.
  AnyTile(const Array& array, int64_t offset, const Tile<C>& like)
      : data(static_cast<char*>(array.data) + offset * size_of(array.dtype)),
        pitch(array.stride[3]),
        rows(like.rows),
        columns(like.columns),
        is_bf16(array.dtype == DType::bfloat16) {}

  template <class S>
  MFWM_INLINE Tile<S> as() const {
    return {static_cast<S*>(data), pitch, rows, columns};
  }
  // Call body(tile) with the type of its elements.
  template <class Body>
  MFWM_INLINE auto visit(const Body& body) const {
    if constexpr (std::is_same_v<C, float>)
      if (is_bf16) return body(as<bfloat16>());
    return body(as<C>());
  }
  // True if every whole vector of the tile is aligned to 16 bytes.
  bool is_aligned() const {
    const int64_t bytes = is_bf16 ? 2 : sizeof(C);
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch * bytes % 16 == 0;
  }
};

// The sum of the losses of pred - target. Also writes coefficient * slope + addition to `gradient` if that has data.
// Gradients are bf16 if the target is split, else C. A target of bytes requires bf16 predictions and gradients.
template <class C>
MFWM_SIMD double loss_and_gradient(const AnyTile<C>& pred, const Target<C>& target, const AnyTile<C>& gradient,
                                   const Addition<C>& addition, const Curve<C>& curve, int64_t next, bool stream) {
  const auto for_kind = [&](auto squares_tag) __attribute__((always_inline)) {
    constexpr bool squares = decltype(squares_tag)::value;
    const auto for_types = [&](auto split_tag, auto element, const auto& p, const auto& g)
                               __attribute__((always_inline)) {
      constexpr bool split = decltype(split_tag)::value;
      using S = decltype(element);
      const auto for_ratio = [&](auto ratio_tag) __attribute__((always_inline)) {
        constexpr int ratio = decltype(ratio_tag)::value;
        if (stream) return loss_tile<squares, true, ratio, split, true, S>(p, target, g, addition, curve, next);
        return loss_tile<squares, true, ratio, split, false, S>(p, target, g, addition, curve, next);
      };
      if (!g.data) return loss_tile<squares, false, 0, split, false, S>(p, target, g, {}, curve, next);
      if (addition.ratio == 0) return for_ratio(std::integral_constant<int, 0>{});
      if (addition.ratio == 1) return for_ratio(std::integral_constant<int, 1>{});
      return for_ratio(std::integral_constant<int, 2>{});
    };
    if constexpr (std::is_same_v<C, float>)
      if (target.bytes.data)
        return for_types(std::true_type{}, uint8_t{}, pred.template as<const bfloat16>(),
                         gradient.template as<bfloat16>());
    return pred.visit([&](const auto& p) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<C, float>)
        if (target.tile.is_split)
          return for_types(std::true_type{}, C{}, read_only(p), gradient.template as<bfloat16>());
      return for_types(std::false_type{}, C{}, read_only(p), gradient.template as<C>());
    });
  };
  return curve.kind == LossKind::mse ? for_kind(std::true_type{}) : for_kind(std::false_type{});
}

}  // namespace mfwm::cpu
