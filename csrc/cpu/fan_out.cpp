// fan_out on the CPU, forward and backward; bindings.cpp calls the two functions at the end of this file. It processes
// a tile of tokens at a time (fan_tiles.h), level by level. The forward first sums over coarser cells, then computes the states
// of each level's cells. The backward runs the other way: the gradients of a coarse cell, then those of the cells it
// sums over.
//
// row_steps.h gives the operations on rows. Four cells are processed together, so that data they share is read once and
// their four independent sums hide each other's latency.
#include <cmath>
#include <utility>

#include "fan_tiles.h"
#include "row_steps.h"

namespace mfwm::cpu {
namespace {

// `layer`: LayerNorm instead of RMSNorm, if there is a norm.
template <class C, class S, bool layer>
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
  std::vector<C> norm_weight, norm_bias;  // a row per horizon, or one for all of them
  std::vector<C> ones;                    // with `layer`: 1 for each feature, 0 in the padding

  explicit Fan(const FanOut& op_) : FanTiles(op_), op(op_) {
    norm_weight = parameters(op.norm_weight, C(1));
    if (!layer) return;
    norm_bias = parameters(op.norm_bias, C(0));
    ones.assign(row, C(0));
    std::fill_n(ones.begin(), depth, C(1));
    if (R::is_split) split_row(ones.data(), ones.data(), row);
  }
  std::vector<C> parameters(const Array& array, C none) const {
    const int64_t count = array.rank == 2 ? horizons : 1;
    std::vector<C> all(count * row, none);
    for (int64_t i = 0; array && i < count; ++i)
      access.read_into(&all[i * row], array, count > 1 ? i * array.stride[0] : 0, array.stride[array.rank - 1]);
    return all;
  }
  const C* row_of(const std::vector<C>& all, int i) const {
    return &all[all.size() > static_cast<size_t>(row) ? i * row : 0];
  }
  C mean_of(int i) const { return C(1) / static_cast<C>(op.pool[i] * op.pool[i]); }
  C scale_of(const Lane& squares) const {
    return C(1) / std::sqrt(R::total(squares) / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
  }

  // The layout of a thread's scratch, in rows.
  struct Plan {
    int64_t size = 0;
    int64_t copies = 0;  // row copies of a group: 0-3 sources, 4-7 upstream gradients, 8-11 outputs
    int64_t zeros = 0;
    int64_t window_sums = 0;                // per horizon: the window sum plus the condition
    std::vector<int64_t> sums{};            // level -> sums over its cells; none for level 0
    int64_t group_gradients = 0;            // accumulators for the gradients of a group's tokens
    int64_t window_gradients = 0;           // per horizon: the gradient of its window sum
    int64_t weight_gradients = 0;           // per horizon: the gradient of its norm's weights
    int64_t bias_gradients = 0;             // per horizon, with `layer`: the gradient of its norm's bias
    std::vector<int64_t> sum_gradients{};   // level -> gradients at the sums over its cells; none for level 0
    std::vector<int64_t> state_gradients{}; // horizon -> gradients at its states, for the Gram matrix
    bool gram = false;
    std::vector<bool> non_temporal{};       // per array written: use non-temporal stores

    int64_t reserve(int64_t rows) { return std::exchange(size, size + rows); }
  };
  Plan plan() const {
    Plan plan;
    plan.copies = plan.reserve(12);
    plan.zeros = plan.reserve(1);
    plan.window_sums = plan.reserve(horizons);
    for (size_t l = 0; l < chain.size(); ++l) plan.sums.push_back(plan.reserve(l == 0 ? 0 : cells(l)));
    return plan;
  }

  // The tile that a thread is working on, with its scratch.
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
      return fan.access.is_in_place(array) ? R::row_in(array, offset(array, group, c)) : copy;
    }
    MFWM_INLINE void write_back(const Array& array, const Group& group, int c, const S* copy) const {
      if (!fan.access.is_in_place(array)) fan.access.write(array, offset(array, group, c), copy);
    }
  };

  // A function of its own, like finish_unit, because the lambda that visits a unit is compiled for the baseline only.
  MFWM_SIMD void load_window_sums(const Tile& tile, int64_t unit) const {
    std::fill_n(tile.at(tile.plan.zeros), row, C(0));
    for (int i = 0; i < horizons; ++i)
      access.read_into(tile.at(tile.plan.window_sums + i), op.sums, (unit / groups * horizons + i) * depth, 1);
  }
  // Load a unit's window sums, then call body(tile) for each of its tiles.
  template <class Body>
  MFWM_INLINE void visit(const Plan& plan, int64_t unit, C* scratch, const Body& body) const {
    Tile tile{*this, plan, scratch};
    load_window_sums(tile, unit);
    tiles_of(unit, [&](const Place& place, const Place& after) {
      tile.place = place;
      tile.after = after;
      body(tile);
    });
  }

  // ---- Sums over the cells of every level above the tokens

  // to = from[0] + ... + from[count - 1]; with `more`, to += that sum
  template <int count, bool more, class Row>
  MFWM_INLINE void add_rows(const Row* const* from, C* to) const {
    for (int64_t d = 0; d < row; d += step) {
      Two all = R::load(from[0] + d);
      if constexpr (count == 4) all = (all + R::load(from[1] + d)) + (R::load(from[2] + d) + R::load(from[3] + d));
      if constexpr (more) all = R::load(to + d) + all;
      R::store(all, to + d);
    }
  }
  // to = the sum of the rows of a cell's children. child(k, children, c) returns the row of child c; k < 4 numbers the
  // copies that may be needed at once.
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

  // A group's source rows, and rows to prefetch meanwhile: the tokens at the same place in the next tile.
  template <int count, class Row>
  struct Source {
    const Row *from[count], *ahead[count];
  };
  template <int count>
  MFWM_INLINE Source<count, S> tokens(const Tile& tile, const Group& group) const {
    Source<count, S> source;
    for (int c = 0; c < count; ++c) {
      source.from[c] = tile.read(op.hidden, group, c, tile.copy(c));
      source.ahead[c] = R::row_in(op.hidden, offset(op.hidden, tile.after, group, c));
    }
    return source;
  }
  template <int count>
  MFWM_INLINE Source<count, C> sums(const Tile& tile, const Group& group) const {
    Source<count, C> source;
    for (int c = 0; c < count; ++c)
      source.from[c] = source.ahead[c] = tile.at(tile.plan.sums[group.level] + index(group, c));
    return source;
  }

  // Each state's mean over its features; 0 if the norm subtracts none. It needs a pass of its own: mean(x^2) - mean(x)^2
  // would cancel where the mean is large.
  template <int count, class Row>
  MFWM_INLINE void means_of(const Source<count, Row>& source, const C* add, C mean, C* means) const {
    std::fill(means, means + count, C(0));
    if constexpr (layer) {
      Two totals[count] = {};
      for (int64_t d = 0; d < row; d += step) {
        const Two a = R::load(add + d);
        for (int c = 0; c < count; ++c) totals[c] = totals[c] + (R::load(source.from[c] + d) * mean + a);
      }
      for (int c = 0; c < count; ++c) means[c] = R::total(totals[c].even + totals[c].odd) / static_cast<C>(depth);
    }
  }
  // `value` less its row's mean, but 0 in the padding.
  MFWM_INLINE Two centred(const Two& value, C mean, int64_t d) const {
    if constexpr (layer) return value - R::load(ones.data() + d) * mean;
    return value;
  }

  // ---- Forward

  // Write horizon i's states at a group of cells.
  template <int count, class Row>
  MFWM_INLINE void states(const Tile& tile, const Group& group, int i, const Source<count, Row> source) const {
    const C *add = tile.at(tile.plan.window_sums + i), *weight = row_of(norm_weight, i), mean = mean_of(i);
    C scale[count], means[count];
    std::fill(scale, scale + count, C(1));
    means_of(source, add, mean, means);
    if (norms) {
      Lane squares[count] = {};
      for (int64_t d = 0; d < row; d += line) {
        for (int c = 0; c < count; ++c) __builtin_prefetch(source.ahead[c] + d, 0, 2);
        for (int64_t k = d; k < d + line; k += step) {
          const Two a = R::load(add + k);
          for (int c = 0; c < count; ++c) {
            const Two state = centred(R::load(source.from[c] + k) * mean + a, means[c], k);
            R::add_products(state, state, squares[c]);
          }
        }
      }
      for (int c = 0; c < count; ++c) scale[c] = scale_of(squares[c]);
    }
    const Array& output = op.outputs[i];
    const bool non_temporal = tile.plan.non_temporal[i];
    S* to[count];
    for (int c = 0; c < count; ++c) to[c] = tile.target(output, group, c, tile.copy(8 + c));
    for (int64_t d = 0; d < row; d += line)
      for (int c = 0; c < count; ++c)
        for (int64_t k = d; k < d + line; k += step) {
          const Two state = centred(R::load(source.from[c] + k) * mean + R::load(add + k), means[c], k);
          Two normed = state * scale[c] * R::load(weight + k);
          if constexpr (layer) normed = normed + R::load(row_of(norm_bias, i) + k);
          R::store(normed, to[c] + k, non_temporal);
        }
    for (int c = 0; c < count; ++c) tile.write_back(output, group, c, to[c]);
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
    Plan layout = plan();
    for (const Array& output : op.outputs) layout.non_temporal.push_back(access.streams(output));
    parallel_for<C>(op.threads, units, layout.size * row, [&](int64_t unit, C* scratch) {
      visit(layout, unit, scratch, [&](const Tile& tile) { forward_tile(tile); });
      finish_streaming();
    });
  }

  // ---- Backward

  Plan plan(const FanOutGradients& gradients) const {
    Plan layout = plan();
    layout.gram = bool(gradients.gram);
    layout.non_temporal.push_back(gradients.hidden && access.streams(gradients.hidden));
    layout.group_gradients = layout.reserve(4);
    layout.window_gradients = layout.reserve(horizons);
    layout.weight_gradients = layout.reserve(horizons);
    layout.bias_gradients = layout.reserve(layer ? horizons : 0);
    for (size_t l = 0; l < chain.size(); ++l) layout.sum_gradients.push_back(layout.reserve(l == 0 ? 0 : cells(l)));
    for (int i = 0; i < horizons; ++i)
      layout.state_gradients.push_back(layout.reserve(layout.gram ? cells(level_of[i]) : 0));
    return layout;
  }

  // to = base + share * d state for horizon i's states at a group of cells. Also add d state to the gradient of the
  // horizon's window sum, and d weight to that of its norm's weights:
  //   d state = r (g w) - state r^3 / D <g w, state>,  d weight = g state r
  // With `layer`, state is centred here, d state less its mean r mean(g w), and d bias = g.
  template <int count, class Row, class Out>
  MFWM_INLINE void add_gradients(const Tile& tile, const Group& group, int i, const Source<count, Row> source,
                                 const C* const* base, C share, Out* const* to, bool non_temporal) const {
    const Array& g = op.outputs[i];
    const auto [next_group, next_tile] = next(group, tile.place, tile.after);
    const S *upstream[count], *ahead[count];
    for (int c = 0; c < count; ++c) {
      upstream[c] = tile.read(g, group, c, tile.copy(4 + c));
      ahead[c] = R::row_in(g, offset(g, next_tile, next_group, c));
    }
    const C *add = tile.at(tile.plan.window_sums + i), *weight = row_of(norm_weight, i), mean = mean_of(i);
    C* window_gradient = tile.at(tile.plan.window_gradients + i);
    C* weight_gradient = tile.at(tile.plan.weight_gradients + i);
    C* bias_gradient = tile.at(tile.plan.bias_gradients + (layer ? i : 0));
    if (!norms) {  // d state = g, so the states are not needed.
      for (int64_t d = 0; d < row; d += line) {
        Two window[line / step];
        for (int64_t k = 0; k < line; k += step) window[k / step] = R::load(window_gradient + d + k);
        for (int c = 0; c < count; ++c) {
          __builtin_prefetch(ahead[c] + d);
          for (int64_t k = 0; k < line; k += step) {
            const Two gradient = R::load(upstream[c] + d + k);
            window[k / step] = window[k / step] + gradient;
            R::store(R::load(base[c] + d + k) + gradient * share, to[c] + d + k, non_temporal);
          }
        }
        for (int64_t k = 0; k < line; k += step) R::store(window[k / step], window_gradient + d + k);
      }
      return;
    }
    C means[count];
    means_of(source, add, mean, means);
    Lane squares[count] = {}, products[count] = {}, weighted[count] = {};
    for (int64_t d = 0; d < row; d += line) {
      for (int c = 0; c < count; ++c) __builtin_prefetch(source.ahead[c] + d, 0, 2);
      for (int64_t k = d; k < d + line; k += step) {
        const Two a = R::load(add + k), w = R::load(weight + k);
        for (int c = 0; c < count; ++c) {
          const Two state = centred(R::load(source.from[c] + k) * mean + a, means[c], k);
          const Two gradient = R::load(upstream[c] + k) * w;
          R::add_products(state, state, squares[c]);
          R::add_products(gradient, state, products[c]);
          if constexpr (layer) weighted[c] += gradient.even + gradient.odd;
        }
      }
    }
    C r[count], projection[count], shift[count];
    for (int c = 0; c < count; ++c) {
      r[c] = scale_of(squares[c]);
      projection[c] = R::total(products[c]) * r[c] * r[c] * r[c] / static_cast<C>(depth);
      shift[c] = layer ? R::total(weighted[c]) * r[c] / static_cast<C>(depth) : C(0);
    }
    for (int64_t d = 0; d < row; d += line) {
      Two window[line / step], weights[line / step], biases[line / step];
      for (int64_t k = 0; k < line; k += step) {
        window[k / step] = R::load(window_gradient + d + k);
        weights[k / step] = R::load(weight_gradient + d + k);
        if constexpr (layer) biases[k / step] = R::load(bias_gradient + d + k);
      }
      for (int c = 0; c < count; ++c) {
        __builtin_prefetch(ahead[c] + d);
        for (int64_t k = 0; k < line; k += step) {
          const Two state = centred(R::load(source.from[c] + d + k) * mean + R::load(add + d + k), means[c], d + k);
          const Two scaled = R::load(upstream[c] + d + k) * r[c];
          const Two gradient = centred(scaled * R::load(weight + d + k) - state * projection[c], shift[c], d + k);
          if constexpr (layer) biases[k / step] = biases[k / step] + R::load(upstream[c] + d + k);
          window[k / step] = window[k / step] + gradient;
          weights[k / step] = weights[k / step] + scaled * state;
          R::store(R::load(base[c] + d + k) + gradient * share, to[c] + d + k, non_temporal);
        }
      }
      for (int64_t k = 0; k < line; k += step) {
        R::store(window[k / step], window_gradient + d + k);
        R::store(weights[k / step], weight_gradient + d + k);
        if constexpr (layer) R::store(biases[k / step], bias_gradient + d + k);
      }
    }
  }

  // to = base + share * term
  template <int count, class Out>
  MFWM_INLINE void combine(const C* const* base, C share, const C* const* term, Out* const* to,
                           bool non_temporal) const {
    for (int c = 0; c < count; ++c)
      for (int64_t d = 0; d < row; d += step)
        R::store(R::load(base[c] + d) + R::load(term[c] + d) * share, to[c] + d, non_temporal);
  }

  // to = the gradients at the sums over a group's cells. They come from the states computed from those sums and from
  // the coarser cells that contain them. `partial` holds intermediate sums; it may be `to`.
  template <int count, class Row, class Out>
  MFWM_INLINE void gradients_of(const Tile& tile, const std::vector<double>& scale, const Group& group,
                                const Source<count, Row>& source, C* const* partial, Out* const* to,
                                bool non_temporal) const {
    const size_t l = group.level;
    const C *base[count], *zeros[count];
    std::fill(zeros, zeros + count, tile.at(tile.plan.zeros));
    std::copy(zeros, zeros + count, base);
    for (size_t coarse = l + 1; coarse < chain.size(); ++coarse) {
      if (chain[coarse].parent != static_cast<int>(l)) continue;
      for (int c = 0; c < count; ++c) {
        const Group parent{coarse, group.row(c) / chain[coarse].ratio, group.column(c) / chain[coarse].ratio, 1, 1};
        const C* total = tile.at(tile.plan.sum_gradients[coarse] + index(parent, 0));
        if (base[c] != zeros[c]) combine<1>(&base[c], C(1), &total, &partial[c], false);
        base[c] = base[c] == zeros[c] ? total : partial[c];
      }
    }
    int last = -1;
    for (int i = 0; i < horizons; ++i)
      if (level_of[i] == l && op.outputs[i]) last = i;
    if (last < 0) return combine<count>(base, C(0), zeros, to, non_temporal);
    for (int i = 0; i <= last; ++i) {
      if (level_of[i] != l || !op.outputs[i]) continue;
      const C share = mean_of(i) * (scale.empty() ? C(1) : static_cast<C>(scale[i]));
      const bool gram = tile.plan.gram;
      if (i == last && !gram) return add_gradients(tile, group, i, source, base, share, to, non_temporal);
      C* own[count];
      for (int c = 0; c < count; ++c)
        own[c] = gram ? tile.at(tile.plan.state_gradients[i] + index(group, c)) : partial[c];
      add_gradients(tile, group, i, source, gram ? zeros : base, gram ? C(1) : share, own, false);
      if (gram && i == last) return combine<count>(base, share, own, to, non_temporal);
      if (gram) combine<count>(base, share, own, partial, false);
      std::copy(partial, partial + count, base);
    }
  }

  MFWM_SIMD void backward_tile(const Tile& tile, const FanOutGradients& gradients, double* gram) const {
    if (norms) pool(tile);
    for (size_t l = chain.size(); l-- > 0;)
      groups_of(l, [&](auto cells, const Group& group) __attribute__((always_inline)) {
        constexpr int count = decltype(cells)::value;
        C* partial[count];
        for (int c = 0; c < count; ++c)
          partial[c] = tile.at(l > 0 ? tile.plan.sum_gradients[l] + index(group, c) : tile.plan.group_gradients + c);
        if (l > 0) return gradients_of(tile, gradients.scale, group, sums<count>(tile, group), partial, partial, false);
        const Array& hidden = gradients.hidden;
        S* to[count];
        for (int c = 0; c < count; ++c)
          to[c] = hidden ? tile.target(hidden, group, c, tile.copy(8 + c)) : tile.copy(8 + c);
        gradients_of(tile, gradients.scale, group, tokens<count>(tile, group), partial, to, tile.plan.non_temporal[0]);
        for (int c = 0; hidden && c < count; ++c) tile.write_back(hidden, group, c, to[c]);
      });
    if (gram) add_gram(tile, gram);
  }

  // Add <g_i, g_j> over the tile's tokens: the product of every two cells that overlap, times the tokens they share.
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
                const C product = access.dot(tile.at(tile.plan.state_gradients[i] + y * (wide / p) + x),
                                             tile.at(tile.plan.state_gradients[j] + v * (wide / q) + u));
                sum += static_cast<double>(down * across) * static_cast<double>(product);
              }
        sum /= static_cast<double>(p * p * q * q);
        gram[i * horizons + j] += sum;
        if (i != j) gram[j * horizons + i] += sum;
      }
  }

  void backward(const FanOutGradients& gradients) const {
    const Plan layout = plan(gradients);
    const int64_t slab = horizons * depth, pairs = horizons * horizons;
    // Sum over tokens per unit for the window sums, and per slot for the rest. A slot is a fixed range of units, summed
    // in order; the slots are then summed in order, so results do not depend on the number of threads.
    const int64_t slots = std::min<int64_t>(units, 64);
    const bool separate = gradients.sums && groups > 1;
    Scratch<C> windows(separate ? units * slab : 0);
    C* window_gradients = separate ? windows.data() : static_cast<C*>(gradients.sums.data);
    Scratch<double> weight_gradients(gradients.norm_weight ? slots * slab : 0);
    Scratch<double> bias_gradients(gradients.norm_bias ? slots * slab : 0);
    std::vector<double> gram(layout.gram ? slots * pairs : 0, 0.0);
    parallel_for<C>(op.threads, slots, layout.size * row, [&](int64_t slot, C* scratch) {
      const int64_t first = slot * units / slots;
      C *window = scratch + layout.window_gradients * row, *weights = scratch + layout.weight_gradients * row,
        *biases = scratch + layout.bias_gradients * row;
      for (int64_t unit = first; unit < (slot + 1) * units / slots; ++unit) {
        std::fill_n(window, horizons * row, C(0));
        std::fill_n(weights, horizons * row, C(0));
        if (layer) std::fill_n(biases, horizons * row, C(0));
        visit(layout, unit, scratch, [&](const Tile& tile) {
          backward_tile(tile, gradients, gram.empty() ? nullptr : &gram[slot * pairs]);
        });
        finish_unit(window, weights, biases, unit == first, gradients.sums ? window_gradients + unit * slab : nullptr,
                    gradients.norm_weight ? weight_gradients.data() + slot * slab : nullptr,
                    gradients.norm_bias ? bias_gradients.data() + slot * slab : nullptr);
      }
      finish_streaming();
    });
    if (separate) add_parts(window_gradients, units / groups, groups, slab, static_cast<C*>(gradients.sums.data));
    write_parameter(weight_gradients.data(), slots, gradients.norm_weight);
    write_parameter(bias_gradients.data(), slots, gradients.norm_bias);
    if (layout.gram) add_parts(gram.data(), 1, slots, pairs, static_cast<double*>(gradients.gram.data));
  }

  // Write a unit's gradients of the window sums, and add those of the norm's parameters to a slot's sums.
  MFWM_SIMD void finish_unit(C* window, C* weights, C* biases, bool is_first, C* to, double* weight_sums,
                             double* bias_sums) const {
    for (int64_t i = 0; i < horizons; ++i) {
      if (R::is_split) interleave_row(window + i * row, window + i * row, row);
      if (to) std::copy_n(window + i * row, depth, to + i * depth);
      if (weight_sums) add_unit(weights + i * row, is_first, weight_sums + i * depth);
      if (bias_sums) add_unit(biases + i * row, is_first, bias_sums + i * depth);
    }
  }
  // sum (+)= a unit's gradient of a parameter of the norm, a row that is left interleaved
  MFWM_INLINE void add_unit(C* gradient, bool is_first, double* sum) const {
    if (R::is_split) interleave_row(gradient, gradient, row);
    for (int64_t d = 0; d < depth; ++d) sum[d] = static_cast<double>(gradient[d]) + (is_first ? 0 : sum[d]);
  }

  // Write the sum of the parts [slots, K, D] to a gradient [K, D], or their sum over horizons too to one [D].
  void write_parameter(const double* parts, int64_t slots, const Array& to) const {
    if (!to) return;
    const int64_t count = to.rank == 2 ? horizons : 1;
    std::vector<double> total(count * depth);
    add_parts(parts, 1, slots * horizons / count, count * depth, total.data());
    for (int64_t i = 0; i < count; ++i)
      store_row(&total[i * depth], to.data, to.dtype, count > 1 ? i * to.stride[0] : 0, to.stride[to.rank - 1], depth);
  }

  // to[k] = the sum of `each` parts, parts[k * each] and following; every part and to[k] are rows of `size`.
  template <class T>
  static void add_parts(const T* parts, int64_t count, int64_t each, int64_t size, T* to) {
    std::fill_n(to, count * size, T(0));
    for (int64_t k = 0; k < count; ++k)
      for (int64_t part = k * each; part < (k + 1) * each; ++part)
        for (int64_t d = 0; d < size; ++d) to[k * size + d] += parts[part * size + d];
  }
};

// Call run(fan) with the Fan of the op's norm, and of its dtype's compute and storage types (row_steps.h).
template <bool layer, class Run>
void with_types(const FanOut& op, const Run& run) {
  switch (op.hidden.dtype) {
    case DType::float64: return run(Fan<double, double, layer>(op));
    case DType::bfloat16: return run(Fan<float, bfloat16, layer>(op));
    default: return run(Fan<float, float, layer>(op));
  }
}
template <class Run>
void with_fan(const FanOut& op, const Run& run) {
  op.layer && op.norm_weight ? with_types<true>(op, run) : with_types<false>(op, run);
}

}  // namespace

void fan_out_forward(const FanOut& op) {
  with_fan(op, [](const auto& fan) { fan.forward(); });
}

void fan_out_backward(const FanOut& op, const FanOutGradients& gradients) {
  with_fan(op, [&](const auto& fan) { fan.backward(gradients); });
}

}  // namespace mfwm::cpu
