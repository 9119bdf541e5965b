// fan_out on the CPU, a tile of tokens at a time (fan_tiles.h), level by level. Forward, sums over coarser cells come
// first, then the states of each level's cells. Backward, gradients go the other way: a coarse cell's first, then those of
// the cells that it is made of.
//
// What is done to a row is the same for each of its elements (row_steps.h), and four cells are gone through together: what
// they share is read once, and their sums do not wait for each other.
#include <cmath>
#include <utility>

#include "fan_tiles.h"
#include "row_steps.h"

namespace mfwm::cpu {
namespace {

template <class C, class S>
struct Fan : FanTiles {
  using R = RowSteps<C, S>;
  using Lane = typename R::Lane;
  using Two = typename R::Two;
  static constexpr int64_t step = R::step, line = R::line;

  const FanOut& op;
  const int horizons = static_cast<int>(op.pool.size());
  const int64_t depth = op.hidden.size[4];
  const R access{depth};
  const int64_t row = access.row;
  const bool norms = bool(op.norm_weight);
  std::vector<C> norm_weight;  // rows of the horizons, or one for all

  explicit Fan(const FanOut& op_) : FanTiles(op_), op(op_) {
    const bool one = !norms || op.norm_weight.stride[0] == 0;
    norm_weight.assign(one ? row : horizons * row, C(1));
    for (int64_t i = 0; norms && i < (one ? 1 : horizons); ++i)
      access.read_into(&norm_weight[i * row], op.norm_weight, i * op.norm_weight.stride[0], op.norm_weight.stride[1]);
  }
  const C* weight_of(int i) const { return &norm_weight[norm_weight.size() > static_cast<size_t>(row) ? i * row : 0]; }
  C mean_of(int i) const { return C(1) / static_cast<C>(op.pool[i] * op.pool[i]); }
  C scale_of(const Lane& squares) const {
    return C(1) / std::sqrt(R::total(squares) / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
  }

  // Where things lie in a thread's scratch, in rows.
  struct Plan {
    int64_t size = 0;
    int64_t copies = 0, zeros = 0;          // copies of a group's rows: made from, read besides, written
    int64_t adds = 0;                       // horizon -> window sum
    std::vector<int64_t> sums{};            // level -> sums over its cells, but of the first
    int64_t made = 0;                       // a group's gradients
    int64_t of_windows = 0, of_weights = 0; // horizon -> gradients of its window sum and of its norm's weights
    std::vector<int64_t> totals{};          // level -> gradients at the sums over its cells, but of the first
    std::vector<int64_t> own{};             // horizon -> gradients at its states, kept for the Gram matrix
    bool gram = false;
    std::vector<bool> past_caches{};        // of each array that is written

    int64_t take(int64_t rows) { return std::exchange(size, size + rows); }
  };
  Plan plan() const {
    Plan plan;
    plan.copies = plan.take(12);
    plan.zeros = plan.take(1);
    plan.adds = plan.take(horizons);
    for (size_t l = 0; l < chain.size(); ++l) plan.sums.push_back(plan.take(l == 0 ? 0 : cells(l)));
    return plan;
  }

  // A tile at work.
  struct Tile {
    const Fan& fan;
    const Plan& plan;
    C* scratch;
    Place place{}, after{};

    MFWM_INLINE C* at(int64_t place) const { return scratch + place * fan.row; }
    MFWM_INLINE S* copy(int k) const { return reinterpret_cast<S*>(at(plan.copies + k)); }
    MFWM_INLINE int64_t offset(const Array& array, const Group& group, int c) const {
      return fan.offset(array, place, group, c);
    }
    MFWM_INLINE const S* read(const Array& array, const Group& group, int c, S* copy) const {
      return fan.access.read(array, offset(array, group, c), copy);
    }
    MFWM_INLINE S* target(const Array& array, const Group& group, int c, S* copy) const {
      return fan.access.lies(array) ? R::row_in(array, offset(array, group, c)) : copy;
    }
    MFWM_INLINE void written(const Array& array, const Group& group, int c, const S* copy) const {
      if (!fan.access.lies(array)) fan.access.write(array, offset(array, group, c), copy);
    }
  };

  // The tiles of a unit one after the other, once its window sums are in place.
  template <class Body>
  MFWM_INLINE void visit(const Plan& plan, int64_t unit, C* scratch, const Body& body) const {
    Tile tile{*this, plan, scratch};
    std::fill_n(tile.at(plan.zeros), row, C(0));
    for (int i = 0; i < horizons; ++i)
      access.read_into(tile.at(plan.adds + i), op.sums, (unit / groups * horizons + i) * depth, 1);
    tiles_of(unit, [&](const Place& place, const Place& after) {
      tile.place = place;
      tile.after = after;
      body(tile);
    });
  }

  // ---- sums over the cells of every level but the first

  // to = from[0] + .. of `count` rows, and what is there
  template <int count, bool more, class Row>
  MFWM_INLINE void add_rows(const Row* const* from, C* to) const {
    for (int64_t d = 0; d < row; d += step) {
      Two all = R::load(from[0] + d);
      if constexpr (count == 4) all = (all + R::load(from[1] + d)) + (R::load(from[2] + d) + R::load(from[3] + d));
      if constexpr (more) all = R::load(to + d) + all;
      R::store(all, to + d);
    }
  }
  // child(k, cell): the row of a cell of the level below, the k-th of at most 4
  template <class Row, class Child>
  MFWM_INLINE void add_children(const Group& cell, C* to, const Child& child) const {
    const int64_t q = chain[cell.level].ratio;
    const Group children{static_cast<size_t>(chain[cell.level].parent), cell.y * q, cell.x * q, q, q};
    const Row* from[4];
    if (q == 2) {
      for (int c = 0; c < 4; ++c) from[c] = child(c, children, c);
      return add_rows<4, false>(from, to);
    }
    for (int c = 0; c < q * q; ++c) {
      from[0] = child(0, children, c);
      c == 0 ? add_rows<1, false>(from, to) : add_rows<1, true>(from, to);
    }
  }
  MFWM_INLINE void pool(const Tile& tile) const {
    const Plan& plan = tile.plan;
    for (size_t l = 1; l < chain.size(); ++l)
      for (int64_t y = 0; y < rows(l); ++y)
        for (int64_t x = 0; x < columns(l); ++x) {
          const Group cell{l, y, x, 1, 1};
          C* to = tile.at(plan.sums[l] + index(cell, 0));
          if (chain[l].parent == 0)
            add_children<S>(cell, to, [&](int k, const Group& tokens, int c) __attribute__((always_inline)) {
              return tile.read(op.hidden, tokens, c, tile.copy(k));
            });
          else
            add_children<C>(cell, to, [&](int, const Group& cells, int c) __attribute__((always_inline)) {
              return tile.at(plan.sums[cells.level] + index(cells, c));
            });
        }
  }

  // The rows that a group's states are made of, and rows to ask for meanwhile: the tokens at the same place in the next tile.
  template <int count, class Row>
  struct Source {
    const Row *from[count], *ahead[count];
  };
  template <int count>
  MFWM_INLINE Source<count, S> tokens(const Tile& tile, const Group& group) const {
    Source<count, S> made;
    for (int c = 0; c < count; ++c) {
      made.from[c] = tile.read(op.hidden, group, c, tile.copy(c));
      made.ahead[c] = R::row_in(op.hidden, offset(op.hidden, tile.after, group, c));
    }
    return made;
  }
  template <int count>
  MFWM_INLINE Source<count, C> sums(const Tile& tile, const Group& group) const {
    Source<count, C> made;
    for (int c = 0; c < count; ++c) made.from[c] = made.ahead[c] = tile.at(tile.plan.sums[group.level] + index(group, c));
    return made;
  }

  // ---- forward

  template <int count, class Row>
  MFWM_INLINE void states(const Tile& tile, const Group& group, int i, const Source<count, Row> source) const {
    const C *add = tile.at(tile.plan.adds + i), *weight = weight_of(i), mean = mean_of(i);
    C scale[count];
    std::fill(scale, scale + count, C(1));
    if (norms) {
      Lane squares[count] = {};
      for (int64_t d = 0; d < row; d += line) {
        for (int c = 0; c < count; ++c) __builtin_prefetch(source.ahead[c] + d, 0, 2);
        for (int64_t k = d; k < d + line; k += step) {
          const Two a = R::load(add + k);
          for (int c = 0; c < count; ++c) {
            const Two state = R::load(source.from[c] + k) * mean + a;
            R::add_products(state, state, squares[c]);
          }
        }
      }
      for (int c = 0; c < count; ++c) scale[c] = scale_of(squares[c]);
    }
    const Array& output = op.outputs[i];
    const bool past_caches = tile.plan.past_caches[i];
    S* to[count];
    for (int c = 0; c < count; ++c) to[c] = tile.target(output, group, c, tile.copy(8 + c));
    for (int64_t d = 0; d < row; d += line)
      for (int c = 0; c < count; ++c)
        for (int64_t k = d; k < d + line; k += step) {
          const Two state = R::load(source.from[c] + k) * mean + R::load(add + k);
          R::store(state * scale[c] * R::load(weight + k), to[c] + k, past_caches);
        }
    for (int c = 0; c < count; ++c) tile.written(output, group, c, to[c]);
  }

  MFWM_SIMD void forward_tile(const Tile& tile) const {
    pool(tile);
    for (size_t l = 0; l < chain.size(); ++l)
      groups_of(l, [&](auto cells, const Group& group) __attribute__((always_inline)) {
        constexpr int count = decltype(cells)::value;
        for (int i = 0; i < horizons; ++i) {
          if (level_of[i] != l) continue;
          if (l == 0)
            states(tile, group, i, tokens<count>(tile, group));
          else
            states(tile, group, i, sums<count>(tile, group));
        }
      });
  }

  void forward() const {
    Plan made = plan();
    for (const Array& output : op.outputs) made.past_caches.push_back(access.streams(output));
    parallel_for<C>(op.threads, units, made.size * row, [&](int64_t unit, C* scratch) {
      visit(made, unit, scratch, [&](const Tile& tile) { forward_tile(tile); });
      finish_streaming();
    });
  }

  // ---- backward

  Plan plan(const FanOutGradients& gradients) const {
    Plan made = plan();
    made.gram = bool(gradients.gram);
    made.past_caches.push_back(gradients.hidden && access.streams(gradients.hidden));
    made.made = made.take(4);
    made.of_windows = made.take(horizons);
    made.of_weights = made.take(horizons);
    for (size_t l = 0; l < chain.size(); ++l) made.totals.push_back(made.take(l == 0 ? 0 : cells(l)));
    for (int i = 0; i < horizons; ++i) made.own.push_back(made.take(made.gram ? cells(level_of[i]) : 0));
    return made;
  }

  // to = base + share * the gradients of horizon i's states at a group of cells, which are added to that of its window
  // sum, and to that of its norm's weights:
  //   d state = r (g w) - state r^3 / D <g w, state>,  d weight = g state r
  template <int count, class Row, class Out>
  MFWM_INLINE void add_gradients(const Tile& tile, const Group& group, int i, const Source<count, Row> source,
                                 const C* const* base, C share, Out* const* to, bool past_caches) const {
    const Array& g = op.outputs[i];
    const auto [next_group, next_tile] = next(group, tile.place, tile.after);
    const S *upstream[count], *ahead[count];
    for (int c = 0; c < count; ++c) {
      upstream[c] = tile.read(g, group, c, tile.copy(4 + c));
      ahead[c] = R::row_in(g, offset(g, next_tile, next_group, c));
    }
    const C *add = tile.at(tile.plan.adds + i), *weight = weight_of(i), mean = mean_of(i);
    C *of_window = tile.at(tile.plan.of_windows + i), *of_weight = tile.at(tile.plan.of_weights + i);
    if (!norms) {  // Nothing of the states is needed.
      for (int64_t d = 0; d < row; d += line) {
        Two window[line / step];
        for (int64_t k = 0; k < line; k += step) window[k / step] = R::load(of_window + d + k);
        for (int c = 0; c < count; ++c) {
          __builtin_prefetch(ahead[c] + d);
          for (int64_t k = 0; k < line; k += step) {
            const Two made = R::load(upstream[c] + d + k);
            window[k / step] = window[k / step] + made;
            R::store(R::load(base[c] + d + k) + made * share, to[c] + d + k, past_caches);
          }
        }
        for (int64_t k = 0; k < line; k += step) R::store(window[k / step], of_window + d + k);
      }
      return;
    }
    Lane squares[count] = {}, products[count] = {};
    for (int64_t d = 0; d < row; d += line) {
      for (int c = 0; c < count; ++c) __builtin_prefetch(source.ahead[c] + d, 0, 2);
      for (int64_t k = d; k < d + line; k += step) {
        const Two a = R::load(add + k), w = R::load(weight + k);
        for (int c = 0; c < count; ++c) {
          const Two state = R::load(source.from[c] + k) * mean + a;
          R::add_products(state, state, squares[c]);
          R::add_products(R::load(upstream[c] + k) * w, state, products[c]);
        }
      }
    }
    C r[count], along[count];
    for (int c = 0; c < count; ++c) {
      r[c] = scale_of(squares[c]);
      along[c] = R::total(products[c]) * r[c] * r[c] * r[c] / static_cast<C>(depth);
    }
    for (int64_t d = 0; d < row; d += line) {
      Two window[line / step], weights[line / step];
      for (int64_t k = 0; k < line; k += step) {
        window[k / step] = R::load(of_window + d + k);
        weights[k / step] = R::load(of_weight + d + k);
      }
      for (int c = 0; c < count; ++c) {
        __builtin_prefetch(ahead[c] + d);
        for (int64_t k = 0; k < line; k += step) {
          const Two state = R::load(source.from[c] + d + k) * mean + R::load(add + d + k);
          const Two scaled = R::load(upstream[c] + d + k) * r[c];
          const Two made = scaled * R::load(weight + d + k) - state * along[c];
          window[k / step] = window[k / step] + made;
          weights[k / step] = weights[k / step] + scaled * state;
          R::store(R::load(base[c] + d + k) + made * share, to[c] + d + k, past_caches);
        }
      }
      for (int64_t k = 0; k < line; k += step) {
        R::store(window[k / step], of_window + d + k);
        R::store(weights[k / step], of_weight + d + k);
      }
    }
  }

  // to = base + share * made
  template <int count, class Out>
  MFWM_INLINE void combine(const C* const* base, C share, const C* const* made, Out* const* to, bool past_caches) const {
    for (int c = 0; c < count; ++c)
      for (int64_t d = 0; d < row; d += step)
        R::store(R::load(base[c] + d) + R::load(made[c] + d) * share, to[c] + d, past_caches);
  }

  // to = the gradients at the sums over a group's cells: of the states made of them, and of the coarser cells that they
  // are parts of. `made` is where they are added up meanwhile; it may be `to`.
  template <int count, class Row, class Out>
  MFWM_INLINE void gradients_of(const Tile& tile, const std::vector<double>& scale, const Group& group,
                                const Source<count, Row>& source, C* const* made, Out* const* to, bool past_caches) const {
    const size_t l = group.level;
    const C *base[count], *zeros[count];
    std::fill(zeros, zeros + count, tile.at(tile.plan.zeros));
    std::copy(zeros, zeros + count, base);
    for (size_t coarse = l + 1; coarse < chain.size(); ++coarse) {
      if (chain[coarse].parent != static_cast<int>(l)) continue;
      for (int c = 0; c < count; ++c) {
        const Group parent{coarse, group.row(c) / chain[coarse].ratio, group.column(c) / chain[coarse].ratio, 1, 1};
        const C* total = tile.at(tile.plan.totals[coarse] + index(parent, 0));
        if (base[c] != zeros[c]) combine<1>(&base[c], C(1), &total, &made[c], false);
        base[c] = base[c] == zeros[c] ? total : made[c];
      }
    }
    int last = -1;
    for (int i = 0; i < horizons; ++i)
      if (level_of[i] == l && op.outputs[i]) last = i;
    if (last < 0) return combine<count>(base, C(0), zeros, to, past_caches);
    for (int i = 0; i <= last; ++i) {
      if (level_of[i] != l || !op.outputs[i]) continue;
      const C share = mean_of(i) * (scale.empty() ? C(1) : static_cast<C>(scale[i]));
      const bool gram = tile.plan.gram;
      if (i == last && !gram) return add_gradients(tile, group, i, source, base, share, to, past_caches);
      C* own[count];
      for (int c = 0; c < count; ++c) own[c] = gram ? tile.at(tile.plan.own[i] + index(group, c)) : made[c];
      add_gradients(tile, group, i, source, gram ? zeros : base, gram ? C(1) : share, own, false);
      if (gram && i == last) return combine<count>(base, share, own, to, past_caches);
      if (gram) combine<count>(base, share, own, made, false);
      std::copy(made, made + count, base);
    }
  }

  MFWM_SIMD void backward_tile(const Tile& tile, const FanOutGradients& gradients, double* gram) const {
    if (norms) pool(tile);
    for (size_t l = chain.size(); l-- > 0;)
      groups_of(l, [&](auto cells, const Group& group) __attribute__((always_inline)) {
        constexpr int count = decltype(cells)::value;
        C* made[count];
        for (int c = 0; c < count; ++c) made[c] = tile.at(l > 0 ? tile.plan.totals[l] + index(group, c) : tile.plan.made + c);
        if (l > 0) return gradients_of(tile, gradients.scale, group, sums<count>(tile, group), made, made, false);
        const Array& hidden = gradients.hidden;
        S* to[count];
        for (int c = 0; c < count; ++c)
          to[c] = hidden ? tile.target(hidden, group, c, tile.copy(8 + c)) : tile.copy(8 + c);
        gradients_of(tile, gradients.scale, group, tokens<count>(tile, group), made, to, tile.plan.past_caches[0]);
        for (int c = 0; hidden && c < count; ++c) tile.written(hidden, group, c, to[c]);
      });
    if (gram) add_gram(tile, gram);
  }

  // <g_i, g_j> over the tile's tokens: each pair of cells that overlap, times the tokens in the overlap.
  MFWM_INLINE void add_gram(const Tile& tile, double* gram) const {
    for (int i = 0; i < horizons; ++i)
      for (int j = 0; j < horizons; ++j) {
        const int64_t p = op.pool[i], q = op.pool[j];
        if (!op.outputs[i] || !op.outputs[j] || p > q || (p == q && j < i)) continue;
        double sum = 0;
        for (int64_t y = 0; y < tall / p; ++y)
          for (int64_t x = 0; x < wide / p; ++x)
            for (int64_t v = y * p / q; v <= (y * p + p - 1) / q; ++v)
              for (int64_t u = x * p / q; u <= (x * p + p - 1) / q; ++u) {
                const int64_t down = std::min(y * p + p, v * q + q) - std::max(y * p, v * q);
                const int64_t across = std::min(x * p + p, u * q + q) - std::max(x * p, u * q);
                const C product = access.dot(tile.at(tile.plan.own[i] + y * (wide / p) + x),
                                             tile.at(tile.plan.own[j] + v * (wide / q) + u));
                sum += static_cast<double>(down * across) * static_cast<double>(product);
              }
        sum /= static_cast<double>(p * p * q * q);
        gram[i * horizons + j] += sum;
        if (i != j) gram[j * horizons + i] += sum;
      }
  }

  void backward(const FanOutGradients& gradients) const {
    const Plan made = plan(gradients);
    const int64_t slab = horizons * depth, pairs = horizons * horizons;
    // Sums over tokens: per unit for the window sums, per slot for the rest. A slot is a fixed range of units taken in
    // order, and slots are added in order.
    const int64_t slots = std::min<int64_t>(units, 64);
    const bool apart = gradients.sums && groups > 1;
    Scratch<C> windows(apart ? units * slab : 0);
    C* of_windows = apart ? windows.data() : static_cast<C*>(gradients.sums.data);
    Scratch<double> of_weights(gradients.norm_weight ? slots * slab : 0);
    std::vector<double> gram(made.gram ? slots * pairs : 0, 0.0);
    parallel_for<C>(op.threads, slots, made.size * row, [&](int64_t slot, C* scratch) {
      const int64_t first = slot * units / slots;
      C *window = scratch + made.of_windows * row, *weights = scratch + made.of_weights * row;
      for (int64_t unit = first; unit < (slot + 1) * units / slots; ++unit) {
        std::fill_n(window, horizons * row, C(0));
        std::fill_n(weights, horizons * row, C(0));
        visit(made, unit, scratch, [&](const Tile& tile) {
          backward_tile(tile, gradients, gram.empty() ? nullptr : &gram[slot * pairs]);
        });
        for (int64_t i = 0; i < horizons; ++i) {
          if (R::in_pairs) from_pairs(window + i * row, window + i * row, row);
          if (R::in_pairs) from_pairs(weights + i * row, weights + i * row, row);
          if (gradients.sums) std::copy_n(window + i * row, depth, of_windows + unit * slab + i * depth);
          double* sum = of_weights.data() + slot * slab + i * depth;
          for (int64_t d = 0; gradients.norm_weight && d < depth; ++d)
            sum[d] = static_cast<double>(weights[i * row + d]) + (unit > first ? sum[d] : 0);
        }
      }
      finish_streaming();
    });
    if (apart) add_parts(of_windows, units / groups, groups, slab, static_cast<C*>(gradients.sums.data));
    if (gradients.norm_weight) add_parts(of_weights.data(), 1, slots, slab, static_cast<double*>(gradients.norm_weight.data));
    if (made.gram) add_parts(gram.data(), 1, slots, pairs, static_cast<double*>(gradients.gram.data));
  }

  // to[k] = sum of parts[k, part] over `each` parts, all rows of `size`
  template <class T>
  static void add_parts(const T* parts, int64_t count, int64_t each, int64_t size, T* to) {
    std::fill_n(to, count * size, T(0));
    for (int64_t k = 0; k < count; ++k)
      for (int64_t part = k * each; part < (k + 1) * each; ++part)
        for (int64_t d = 0; d < size; ++d) to[k * size + d] += parts[part * size + d];
  }
};

// run(C{}, S{})
template <class Run>
void with_types(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float64: return run(double{}, double{});
    case DType::bfloat16: return run(float{}, bfloat16{});
    default: return run(float{}, float{});
  }
}

}  // namespace

void fan_out_forward(const FanOut& op) {
  with_types(op.hidden.dtype, [&](auto c, auto s) { Fan<decltype(c), decltype(s)>(op).forward(); });
}

void fan_out_backward(const FanOut& op, const FanOutGradients& gradients) {
  with_types(op.hidden.dtype, [&](auto c, auto s) { Fan<decltype(c), decltype(s)>(op).backward(gradients); });
}

}  // namespace mfwm::cpu
