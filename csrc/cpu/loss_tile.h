// The losses of one tile of predictions, and their gradients, of any kind and any dtype.
#pragma once

#include <cmath>

#include "pyramid.h"

namespace mfwm::cpu {

// A loss's kind, the numbers that it takes, and its coefficient in the total.
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

// By how much a slope of loss_of falls short of the derivative: a factor that goes into the coefficient instead.
constexpr double omitted_factor(LossKind kind) { return kind == LossKind::mse ? 2 : 1; }

// The loss of d, and in `slope` its derivative over omitted_factor(kind). X is C or its Lanes.
template <class X, class C>
MFWM_INLINE X loss_of(LossKind kind, const X& d, const Curve<C>& curve, X& slope) {
  const X zero{};
  switch (kind) {
    case LossKind::mse: slope = d; return d * d;
    case LossKind::l1:
      slope = d > zero ? zero + C(1) : d < zero ? zero - C(1) : d;  // 0, or NaN
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

// What a gradient consists of besides the slope of the loss: weight * tile, each element repeated over ratio x ratio.
template <class C>
struct Addition {
  Tile<const C> tile;
  int64_t ratio = 0;  // 0: nothing, 1 or 2
  C weight = 1;
};

// What a prediction is compared with: a tile, or the bytes of a video, scaled and shifted here.
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
  // Lanes at t, and what of the pairs at t is at even places and at odd ones.
  MFWM_INLINE typename Lanes<C>::type lanes(const C* t) const { return Lanes<C>::load(t); }
  MFWM_INLINE typename Lanes<C>::type lanes(const uint8_t* t) const { return Lanes<C>::load(t) * scale + shift; }
  MFWM_INLINE typename Lanes<C>::Pairs pairs(const C* t) const {
    return {Lanes<C>::load(t), Lanes<C>::load(t + Lanes<C>::count)};
  }
  MFWM_INLINE typename Lanes<C>::Pairs pairs(const uint8_t* t) const {
    const auto given = Lanes<C>::load_pairs(t);
    return {given.even * scale + shift, given.odd * scale + shift};
  }
  MFWM_INLINE C element(const C* t) const { return *t; }
  MFWM_INLINE C element(const uint8_t* t) const { return static_cast<C>(*t) * scale + shift; }
};

// `squares`: the kind is mse; the others share a loop that asks which it is, for each would be built a hundred times.
// P and G are C or bf16, S is C or a byte; a target of C is in pairs where G is bf16. With `stream`, gradients are written
// past the caches. Sums of float lanes stay short: a tile adds at most some thousand elements to each.
template <bool squares, bool with_gradient, int ratio, bool in_pairs, bool stream, class S, class C, class P, class G>
MFWM_INLINE double loss_tile(Tile<const P> pred, const Target<C> of, Tile<G> gradient, const Addition<C>& addition,
                             const Curve<C> curve, bool fetch) {
  using L = Lanes<C>;
  constexpr int64_t lanes = L::count;
  const C weight = addition.weight;
  Tile<const S> target = of.template as<S>();
  Tile<const C> added = addition.tile;
  // Asks for what the next tile reads, since a tile is too short for the hardware to see it coming: here, where reads
  // of this tile are near, since it was averaged, and requests wait for few others. fp32 only into the second-level cache:
  // the first is full of this tile.
  const int64_t next = fetch ? target.rows * pred.pitch : 0, next_bytes = fetch ? target.rows * target.pitch : 0;
  if (ratio < 2 && pred.is_dense() && target.is_dense() && gradient.is_dense() && added.is_dense()) {
    pred = pred.joined(), target = target.joined(), gradient = gradient.joined(), added = added.joined();
  }
  const LossKind kind = squares ? LossKind::mse : curve.kind;
  typename L::type sums[2] = {};
  C rest = 0;
  // The gradient of lanes; their losses are added to one of two sums, which do not wait for each other.
  const auto gradient_of = [&](const typename L::type& d, const typename L::type& add, int which)
                               __attribute__((always_inline)) {
    typename L::type slope;
    sums[which] += loss_of(kind, d, curve, slope);
    return slope * curve.coefficient + add;
  };
  const auto piece = [&](const P* p, const S* t, G* g, const typename L::type& add, int which)
                         __attribute__((always_inline)) {
    const auto made = gradient_of(L::load(p) - of.lanes(t), add, which);
    if constexpr (with_gradient) stream ? L::stream(made, g) : L::store(made, g);
    __builtin_prefetch(p + next, 0, 2);
  };
  // Two neighbours, or the pairs of both.
  const auto pieces = [&](const P* p, const S* t, G* g, const typename L::type& add, const typename L::type& other)
                          __attribute__((always_inline)) {
    if constexpr (in_pairs) {
      const auto difference = L::load_pairs(p) - of.pairs(t);
      const typename L::Pairs made{gradient_of(difference.even, add, 0), gradient_of(difference.odd, other, 1)};
      // What is added, a tile in pairs and bf16 have no NaN with a one among its lower 16 bits.
      constexpr bool any_nan = false;
      if constexpr (with_gradient)
        stream ? L::template stream_pairs<any_nan>(made, g) : L::template store_pairs<any_nan>(made, g);
      __builtin_prefetch(p + next, 0, 3);
      if constexpr (std::is_same_v<S, uint8_t>) __builtin_prefetch(t + next_bytes, 0, 3);
    } else {
      piece(p, t, g, add, 0);
      piece(p + lanes, t + lanes, g + lanes, other, 1);
    }
  };
  const auto element = [&](const P* p, const S* t, G* g, C add) __attribute__((always_inline)) {
    C slope;
    rest += loss_of(kind, widen(*p) - of.element(t), curve, slope);
    if constexpr (with_gradient) narrow(slope * curve.coefficient + add, *g);
  };
  const int64_t columns = target.columns, whole = columns / (2 * lanes) * lanes;
  for (int64_t y = 0; y < target.rows; ++y) {
    const P* p = pred.row(y);
    const S* t = target.row(y);
    const C* a = ratio ? added.row(y / ratio) : nullptr;
    G* g = with_gradient ? gradient.row(y) : nullptr;
    // x counts in twos.
    for (int64_t x = 0; x < whole; x += lanes) {
      typename L::Pairs add{};
      if constexpr (ratio == 1 && in_pairs) add = L::load_pairs(a + 2 * x);
      if constexpr (ratio == 1 && !in_pairs) add = {L::load(a + 2 * x), L::load(a + 2 * x + lanes)};
      if constexpr (ratio == 2) {
        const auto once = L::load(a + x) * weight;
        add = {in_pairs ? once : L::template doubled<0>(once), in_pairs ? once : L::template doubled<1>(once)};
      }
      pieces(p + 2 * x, t + 2 * x, g + 2 * x, add.even, add.odd);
    }
    if (2 * whole == columns) continue;
    int64_t x = 2 * whole;
    for (; x + lanes <= columns; x += lanes) {
      typename L::type add{};
      if constexpr (ratio == 1) add = L::load(a + x);
      // Half of it is of use; more than a row of scratch lies behind.
      if constexpr (ratio == 2) add = L::template doubled<0>(L::load(a + x / 2) * weight);
      piece(p + x, t + x, g + x, add, 0);
    }
    for (; x < columns; ++x) element(p + x, t + x, g + x, ratio == 0 ? C(0) : ratio == 1 ? a[x] : a[x / 2] * weight);
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
// of bf16 where the target is in pairs, else of C. A target of bytes is for predictions and gradients of bf16.
template <class C>
MFWM_SIMD double loss_and_gradient(const AnyTile<C>& pred, const Target<C>& target, const AnyTile<C>& gradient,
                                   const Addition<C>& addition, const Curve<C>& curve, bool fetch, bool stream) {
  const auto with = [&](auto squares_tag) __attribute__((always_inline)) {
    constexpr bool squares = decltype(squares_tag)::value;
    const auto into = [&](auto pairs_tag, auto element, const auto& p, const auto& g) __attribute__((always_inline)) {
      constexpr bool pairs = decltype(pairs_tag)::value;
      using S = decltype(element);
      const auto adding = [&](auto ratio_tag) __attribute__((always_inline)) {
        constexpr int ratio = decltype(ratio_tag)::value;
        if (stream) return loss_tile<squares, true, ratio, pairs, true, S>(p, target, g, addition, curve, fetch);
        return loss_tile<squares, true, ratio, pairs, false, S>(p, target, g, addition, curve, fetch);
      };
      if (!g.data) return loss_tile<squares, false, 0, pairs, false, S>(p, target, g, {}, curve, fetch);
      if (addition.ratio == 0) return adding(std::integral_constant<int, 0>{});
      if (addition.ratio == 1) return adding(std::integral_constant<int, 1>{});
      return adding(std::integral_constant<int, 2>{});
    };
    if constexpr (std::is_same_v<C, float>)
      if (target.bytes.data)
        return into(std::true_type{}, uint8_t{}, pred.template as<const bfloat16>(), gradient.template as<bfloat16>());
    return pred.visit([&](const auto& p) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<C, float>)
        if (target.tile.in_pairs) return into(std::true_type{}, C{}, read_only(p), gradient.template as<bfloat16>());
      return into(std::false_type{}, C{}, read_only(p), gradient.template as<C>());
    });
  };
  return curve.kind == LossKind::mse ? with(std::true_type{}) : with(std::false_type{});
}

}  // namespace mfwm::cpu
