// fan_out on the CPU. A tile is L tokens high, L the least common multiple of the pools. It is read once; coarser cells
// are sums of finer ones, made while the tokens pass. Backward, gradients go the other way: a coarse cell's first, then
// those of the cells that it is made of, two neighbours at a time. What is done to a row is the same for each of its
// elements, so rows of bf16 are held in pairs (pyramid.h): they are read and written without a shuffle.
#include <cmath>
#include <utility>

#include "pyramid.h"

namespace mfwm::cpu {
namespace {

// An array [B, T, y, x, D], one row of D per cell.
inline int64_t cell_offset(const Array& a, int64_t b, int64_t n, int64_t y, int64_t x) {
  return b * a.stride[0] + n * a.stride[1] + y * a.stride[2] + x * a.stride[3];
}

inline int64_t smallest_prime(int64_t number) {
  int64_t prime = 2;
  while (number % prime) ++prime;
  return prime;
}

template <class C>
MFWM_INLINE void add_row(C* __restrict to, const C* __restrict from, int64_t count) {
  for (int64_t d = 0; d < count; ++d) to[d] += from[d];
}

template <class C>
MFWM_INLINE C dot(const C* __restrict one, const C* __restrict other, int64_t count) {
  C sum = 0;
  for (int64_t d = 0; d < count; ++d) sum += one[d] * other[d];
  return sum;
}

template <class C>
struct Fan {
  const FanOut& op;
  const int horizons = static_cast<int>(op.pool.size());
  const int64_t batch = op.hidden.size[0], positions = op.hidden.size[1], height = op.hidden.size[2],
                width = op.hidden.size[3], depth = op.hidden.size[4];
  const int64_t row = padded<C>(depth);
  int64_t side = 1;  // L
  int64_t span = 1;  // the width of a tile: L or 2 L, even where it can be
  std::vector<Level> chain;
  std::vector<int> level_of;  // horizon -> level
  const bool in_pairs = std::is_same_v<C, float> && op.hidden.dtype == DType::bfloat16;
  std::vector<C> norm_weight, sums_in_pairs;
  // Arrays larger than the caches are written past them.
  const bool streams = batch * positions * height * width * depth * size_of(op.hidden.dtype) > int64_t(8) << 20;
  // A position's tiles are cut into groups, so that few positions still occupy many threads. Shapes alone decide.
  int64_t tiles, groups;

  explicit Fan(const FanOut& op_) : op(op_) {
    // With every step down to 1 in the chain a cell is summed in one order, whichever other horizons there are.
    std::vector<int64_t> pools{1};
    for (int64_t pool : op.pool)
      for (; pool > 1; pool /= smallest_prime(pool)) pools.push_back(pool);
    chain = chain_of(1, pools);
    for (int64_t pool : op.pool) {
      side = std::lcm(side, pool);
      level_of.push_back(index_of(chain, pool));
    }
    span = side % 2 && width / side % 2 == 0 ? 2 * side : side;
    tiles = (height / side) * (width / span);
    const int64_t all = std::max<int64_t>(batch * positions, 1);
    groups = std::min(tiles, std::max<int64_t>(1, (64 + all - 1) / all));
    norm_weight.resize(op.norm_weight ? horizons * depth : 0);
    for (int i = 0; op.norm_weight && i < horizons; ++i)
      load_row(&norm_weight[i * depth], op.norm_weight.data, op.norm_weight.dtype, i * op.norm_weight.stride[0],
               op.norm_weight.stride[1], depth);
    if (!in_pairs) return;
    for (size_t k = 0; k < norm_weight.size(); k += depth) into_pairs(&norm_weight[k], &norm_weight[k], depth);
    sums_in_pairs.resize(batch * positions * horizons * depth);
    for (size_t k = 0; k < sums_in_pairs.size(); k += depth)
      into_pairs(static_cast<const C*>(op.sums.data) + k, &sums_in_pairs[k], depth);
  }

  struct Place {
    int64_t b, n, y, x;  // of the tile, in tokens
  };
  template <class Body>
  MFWM_INLINE void tiles_of(int64_t position, int64_t group, const Body& body) const {
    const int64_t columns = width / span;
    for (int64_t tile = group * tiles / groups; tile < (group + 1) * tiles / groups; ++tile)
      body(Place{position / positions, position % positions, tile / columns * side, tile % columns * span});
  }

  int64_t columns(size_t l) const { return span / chain[l].factor; }
  int64_t cells(size_t l) const { return side / chain[l].factor * columns(l); }

  MFWM_INLINE const C* token(C* scratch, const Place& place, int64_t y, int64_t x) const {
    const int64_t offset = cell_offset(op.hidden, place.b, place.n, place.y + y, place.x + x);
    return row_at(scratch, op.hidden, offset);
  }
  MFWM_INLINE const C* row_at(C* scratch, const Array& array, int64_t offset) const {
    if constexpr (std::is_same_v<C, float>)
      if (in_pairs) {
        if (array.stride[4] == 1) {
          into_pairs(static_cast<const bfloat16*>(array.data) + offset, scratch, depth);
        } else {
          load_row(scratch, array.data, array.dtype, offset, array.stride[4], depth);
          into_pairs(scratch, scratch, depth);
        }
        return scratch;
      }
    return row_of(scratch, array, offset, array.stride[4], depth);
  }
  // Cell y, x of the tile at one of `factor` tokens a side.
  MFWM_INLINE int64_t cell_in(const Array& array, const Place& place, int64_t factor, int64_t y, int64_t x) const {
    return cell_offset(array, place.b, place.n, place.y / factor + y, place.x / factor + x);
  }
  MFWM_INLINE const C* window_sum(const Place& place, int i) const {
    const int64_t position = place.b * positions + place.n;
    return (in_pairs ? sums_in_pairs.data() : static_cast<const C*>(op.sums.data)) + (position * horizons + i) * depth;
  }
  MFWM_INLINE void put(const C* from, const Array& array, int64_t offset) const {
    if constexpr (std::is_same_v<C, float>)
      if (in_pairs) return from_pairs(from, static_cast<bfloat16*>(array.data) + offset, array.stride[4], depth, streams);
    if (streams && array.stride[4] == 1)
      stream_row(from, array.data, array.dtype, offset, depth);
    else
      store_row(from, array.data, array.dtype, offset, array.stride[4], depth);
  }

  // 1 / rms of a state, and <weighted, state>: state = sum * mean + add is not kept, it is made again where it is needed.
  struct Statistics {
    C scale, product;
  };
  template <bool product>
  MFWM_INLINE Statistics statistics(const C* __restrict sum, C mean, const C* __restrict add,
                                    const C* __restrict weight, const C* __restrict upstream) const {
    C squares[2] = {0, 0}, products[2] = {0, 0};
    const int64_t half = depth / 2;
    const auto visit = [&](int side_by_side, int64_t d) __attribute__((always_inline)) {
      const C value = sum[d] * mean + add[d];
      squares[side_by_side] += value * value;
      if constexpr (product) products[side_by_side] += upstream[d] * weight[d] * value;
    };
    // In one sum each addition waits for the last; two halves go on side by side.
    for (int64_t d = 0; d < half; ++d) {
      visit(0, d);
      visit(1, half + d);
    }
    if (depth % 2) visit(0, depth - 1);
    const C rms = std::sqrt((squares[0] + squares[1]) / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
    return {C(1) / rms, products[0] + products[1]};
  }

  // Sums over the cells of every level but the first, in `sums` (per level, cells by rows); done(level, y, x, row) is
  // called once for every cell of every level, when its sum is complete.
  template <class Done>
  MFWM_INLINE void pool(const Place& place, C* token_scratch, C* sums, const Done& done) const {
    for (int64_t y = 0; y < side; ++y)
      for (int64_t x = 0; x < span; ++x) {
        // A tile's rows are too short for the hardware to see the next one coming.
        if (const int64_t next = y * span + x + 2; next < side * span)
          prefetch_row(op.hidden, cell_in(op.hidden, place, 1, next / span, next % span), depth);
        const C* tokens = token(token_scratch, place, y, x);
        C* level_sums = sums;
        for (size_t l = 0; l < chain.size(); ++l) {
          const int64_t p = chain[l].factor;
          if (l > 0 && ((y + 1) % p || (x + 1) % p)) {
            level_sums += cells(l) * row;
            continue;
          }
          const C* complete = l == 0 ? tokens : level_sums + (y / p * columns(l) + x / p) * row;
          done(l, y / p, x / p, complete);
          C* child_sums = sums;
          for (size_t child = 1; child < chain.size(); ++child) {
            if (chain[child].parent == static_cast<int>(l)) {
              const int64_t q = chain[child].factor;
              C* __restrict to = child_sums + (y / q * columns(child) + x / q) * row;
              // The first part of a cell is its top left one.
              if (y - y % p == y - y % q && x - x % p == x - x % q && y % q < p && x % q < p)
                std::copy(complete, complete + depth, to);
              else
                for (int64_t d = 0; d < depth; ++d) to[d] += complete[d];
            }
            child_sums += cells(child) * row;
          }
          if (l > 0) level_sums += cells(l) * row;
        }
      }
  }

  int64_t pool_scratch() const {
    int64_t size = row;
    for (size_t l = 1; l < chain.size(); ++l) size += cells(l) * row;
    return size;
  }

  // ---- forward

  MFWM_SIMD void forward_tile(const Place& place, C* scratch) const {
    C *__restrict state = scratch, *token_scratch = scratch + row, *sums = scratch + 2 * row;
    pool(place, token_scratch, sums, [&](size_t l, int64_t y, int64_t x, const C* sum) __attribute__((always_inline)) {
      const int64_t p = chain[l].factor;
      const C mean = C(1) / static_cast<C>(p * p);
      for (int i = 0; i < horizons; ++i) {
        if (level_of[i] != static_cast<int>(l)) continue;
        const C *__restrict add = window_sum(place, i), *__restrict from = sum;
        if (norm_weight.empty()) {
          for (int64_t d = 0; d < depth; ++d) state[d] = from[d] * mean + add[d];
        } else {
          const C* __restrict weight = &norm_weight[i * depth];
          const C r = statistics<false>(from, mean, add, weight, nullptr).scale;
          for (int64_t d = 0; d < depth; ++d) state[d] = (from[d] * mean + add[d]) * (r * weight[d]);
        }
        put(state, op.outputs[i], cell_in(op.outputs[i], place, p, y, x));
      }
    });
  }

  void forward() const {
    parallel_for<C>(op.threads, batch * positions * groups, row + pool_scratch(), [&](int64_t unit, C* scratch) {
      tiles_of(unit / groups, unit % groups, [&](const Place& place) { forward_tile(place, scratch); });
      if (streams) finish_streaming();
    });
  }

  // ---- backward

  // Where things lie in a thread's scratch, in elements. What is of a cell is there twice, for two neighbours.
  struct Plan {
    const FanOutGradients& gradients;
    bool norms, gram;
    int64_t upstream_at = 0, token_at = 0, made_at = 0, zeros_at = 0, pooled_at = 0, size = 0;
    int64_t window_at = 0, weight_at = 0;  // horizon -> gradients of its window sum and of its norm's weights
    std::vector<int64_t> totals_at{};      // level -> gradients at the sums of its cells
    std::vector<int64_t> own_at{};         // horizon -> gradients at its states, kept for the Gram matrix
  };

  Plan plan(const FanOutGradients& gradients) const {
    Plan plan{gradients, !norm_weight.empty(), bool(gradients.gram)};
    const auto take = [&](int64_t rows) { return std::exchange(plan.size, plan.size + rows * row); };
    plan.upstream_at = take(2);
    plan.token_at = take(2);
    plan.made_at = take(2);
    plan.zeros_at = take(1);
    plan.window_at = take(horizons);
    plan.weight_at = take(horizons);
    plan.pooled_at = take(pool_scratch() / row);
    for (size_t l = 0; l < chain.size(); ++l) plan.totals_at.push_back(take(l == 0 ? 0 : cells(l)));
    for (int i = 0; i < horizons; ++i) plan.own_at.push_back(take(plan.gram ? cells(level_of[i]) : 0));
    return plan;
  }

  // One cell, or two neighbours: the sum over each, the gradient that each has from coarser cells and other horizons,
  // and where its gradient goes (it may be the same place).
  template <int count>
  struct Cells {
    const C *sum[count], *base[count];
    C* to[count];
  };

  // Adds the gradients of horizon i's states at these cells, and to those of its window sum and its norm's weights:
  //   d state = r (g w) - state r^3 / D <g w, state>,  d weight = g state r
  template <int count, bool keep>
  MFWM_INLINE void add_states(const Plan& plan, int i, const Place& place, int64_t y, int64_t x, const Cells<count>& cells,
                              C* scratch) const {
    const Array& g = op.outputs[i];
    const int64_t p = op.pool[i];
    const C share = static_cast<C>((plan.gradients.scale.empty() ? 1.0 : plan.gradients.scale[i]) / (p * p));
    const C* upstream[count];
    C* own[count];
    for (int c = 0; c < count; ++c) {
      if (const int64_t next = y * (span / p) + x + c + count; next < side * span / (p * p))
        prefetch_row(g, cell_in(g, place, p, next / (span / p), next % (span / p)), depth);
      upstream[c] = row_at(scratch + plan.upstream_at + c * row, g, cell_in(g, place, p, y, x + c));
      own[c] = scratch + plan.own_at[i] + (y * (span / p) + x + c) * row;
    }
    C *window = scratch + plan.window_at + i * row, *weight_gradient = scratch + plan.weight_at + i * row;
    if (!plan.norms) {
#pragma GCC ivdep
      for (int64_t d = 0; d < depth; ++d) {
        C all = 0;
        for (int c = 0; c < count; ++c) {
          const C made = upstream[c][d];
          cells.to[c][d] = cells.base[c][d] + share * made;
          if constexpr (keep) own[c][d] = made;
          all += made;
        }
        window[d] += all;
      }
      return;
    }
    const C *add = window_sum(place, i), *weight = &norm_weight[i * depth], mean = C(1) / static_cast<C>(p * p);
    C r[count], along[count];
    for (int c = 0; c < count; ++c) {
      const auto [scale, product] = statistics<true>(cells.sum[c], mean, add, weight, upstream[c]);
      r[c] = scale;
      along[c] = product * scale * scale * scale / static_cast<C>(depth);
    }
#pragma GCC ivdep
    for (int64_t d = 0; d < depth; ++d) {
      C all = 0, of_weight = 0;
      for (int c = 0; c < count; ++c) {
        const C state = cells.sum[c][d] * mean + add[d], scaled = upstream[c][d] * r[c];
        const C made = scaled * weight[d] - state * along[c];
        cells.to[c][d] = cells.base[c][d] + share * made;
        if constexpr (keep) own[c][d] = made;
        all += made;
        of_weight += scaled * state;
      }
      window[d] += all;
      weight_gradient[d] += of_weight;
    }
  }

  // The gradients at the sums over cells x, x + 1 .. of row y of level l: of the states made of them, and of the coarser
  // cells that they are parts of. Each lies in `to` or, where nothing is added, at its base.
  template <int count>
  MFWM_INLINE Cells<count> gradients_of(const Plan& plan, size_t l, const Place& place, int64_t y, int64_t x,
                                        Cells<count> cells, C* scratch) const {
    for (int c = 0; c < count; ++c) {
      const C* zeros = scratch + plan.zeros_at;
      cells.base[c] = zeros;
      for (size_t coarse = l + 1; coarse < chain.size(); ++coarse) {
        if (chain[coarse].parent != static_cast<int>(l)) continue;
        const int64_t q = chain[coarse].ratio;
        const C* total = scratch + plan.totals_at[coarse] + (y / q * columns(coarse) + (x + c) / q) * row;
        if (cells.base[c] == zeros) {
          cells.base[c] = total;
        } else {
#pragma GCC ivdep
          for (int64_t d = 0; d < depth; ++d) cells.to[c][d] = cells.base[c][d] + total[d];
          cells.base[c] = cells.to[c];
        }
      }
    }
    for (int i = 0; i < horizons; ++i) {
      if (level_of[i] != static_cast<int>(l) || !op.outputs[i]) continue;
      if (plan.gram)
        add_states<count, true>(plan, i, place, y, x, cells, scratch);
      else
        add_states<count, false>(plan, i, place, y, x, cells, scratch);
      for (int c = 0; c < count; ++c) cells.base[c] = cells.to[c];
    }
    return cells;
  }

  template <int count>
  MFWM_INLINE void backward_cells(const Plan& plan, size_t l, const Place& place, const C* sums, C* scratch) const {
    Cells<count> cells{};
    for (int64_t y = 0; y < side / chain[l].factor; ++y)
      for (int64_t x = 0; x < columns(l); x += count) {
        for (int c = 0; c < count; ++c) {
          const int64_t cell = (y * columns(l) + x + c) * row;
          cells.to[c] = scratch + (l > 0 ? plan.totals_at[l] + cell : plan.made_at + c * row);
          if (!plan.norms) continue;  // The states themselves are not needed.
          cells.sum[c] = l > 0 ? sums + cell : token(scratch + plan.token_at + c * row, place, y, x + c);
        }
        const Cells<count> made = gradients_of(plan, l, place, y, x, cells, scratch);
        for (int c = 0; c < count; ++c) {
          const Array& hidden = plan.gradients.hidden;
          if (l > 0 && made.base[c] != made.to[c]) std::copy(made.base[c], made.base[c] + depth, made.to[c]);
          if (l == 0 && hidden) put(made.base[c], hidden, cell_in(hidden, place, 1, y, x + c));
        }
      }
  }

  MFWM_SIMD void backward_tile(const Plan& plan, const Place& place, C* scratch, double* gram) const {
    C* sums = scratch + plan.pooled_at + row;
    if (plan.norms)
      pool(place, scratch + plan.pooled_at, sums, [](size_t, int64_t, int64_t, const C*) __attribute__((always_inline)) {});
    sums += pool_scratch() - row;
    for (size_t l = chain.size(); l-- > 0;) {
      if (l > 0) sums -= cells(l) * row;
      if (columns(l) % 2 == 0)
        backward_cells<2>(plan, l, place, sums, scratch);
      else
        backward_cells<1>(plan, l, place, sums, scratch);
    }
    if (plan.gram) add_gram(plan, scratch, gram);
  }

  // <g_i, g_j> over the tile's tokens: each pair of cells that overlap, times the tokens in the overlap.
  MFWM_INLINE void add_gram(const Plan& plan, C* scratch, double* gram) const {
    for (int i = 0; i < horizons; ++i)
      for (int j = 0; j < horizons; ++j) {
        const int64_t p = op.pool[i], q = op.pool[j];
        if (!op.outputs[i] || !op.outputs[j] || p > q || (p == q && j < i)) continue;
        double sum = 0;
        for (int64_t y = 0; y < side / p; ++y)
          for (int64_t x = 0; x < span / p; ++x)
            for (int64_t v = y * p / q; v <= (y * p + p - 1) / q; ++v)
              for (int64_t u = x * p / q; u <= (x * p + p - 1) / q; ++u) {
                const int64_t rows = std::min(y * p + p, v * q + q) - std::max(y * p, v * q);
                const int64_t columns = std::min(x * p + p, u * q + q) - std::max(x * p, u * q);
                sum += static_cast<double>(rows * columns) *
                       static_cast<double>(dot(scratch + plan.own_at[i] + (y * (span / p) + x) * row,
                                               scratch + plan.own_at[j] + (v * (span / q) + u) * row, depth));
              }
        sum /= static_cast<double>(p * p * q * q);
        gram[i * horizons + j] += sum;
        if (i != j) gram[j * horizons + i] += sum;
      }
  }

  void backward(const FanOutGradients& gradients) const {
    const Plan scratch_plan = plan(gradients);
    const int64_t all = batch * positions, units = all * groups, slab = horizons * depth;
    // Sums over tokens: per position and group for the window sums, per slot for the rest. A slot is a fixed range of
    // units taken in order, and slots are added in order.
    const int64_t slots = std::min<int64_t>(units, 256);
    std::vector<C> window(gradients.sums ? units * slab : 0);
    std::vector<double> weight(gradients.norm_weight ? slots * slab : 0, 0.0);
    std::vector<double> gram(gradients.gram ? slots * horizons * horizons : 0, 0.0);
    parallel_for<C>(op.threads, slots, scratch_plan.size, [&](int64_t slot, C* scratch) {
      C *windows = scratch + scratch_plan.window_at, *weights = scratch + scratch_plan.weight_at;
      std::fill(scratch + scratch_plan.zeros_at, scratch + scratch_plan.zeros_at + row, C(0));
      for (int64_t unit = slot * units / slots; unit < (slot + 1) * units / slots; ++unit) {
        std::fill(windows, windows + horizons * row, C(0));
        std::fill(weights, weights + horizons * row, C(0));
        tiles_of(unit / groups, unit % groups, [&](const Place& place) {
          backward_tile(scratch_plan, place, scratch, gram.empty() ? nullptr : &gram[slot * horizons * horizons]);
        });
        for (int i = 0; i < horizons; ++i) {
          if (in_pairs) {
            from_pairs(windows + i * row, windows + i * row, depth);
            from_pairs(weights + i * row, weights + i * row, depth);
          }
          if (!window.empty()) std::copy_n(windows + i * row, depth, &window[unit * slab + i * depth]);
          for (int64_t d = 0; !weight.empty() && d < depth; ++d) weight[slot * slab + i * depth + d] += weights[i * row + d];
        }
      }
      if (streams) finish_streaming();
    });
    if (gradients.sums) add_groups(window, static_cast<C*>(gradients.sums.data), slab);
    if (gradients.norm_weight) add_slots(weight, static_cast<double*>(gradients.norm_weight.data), slab);
    if (gradients.gram) add_slots(gram, static_cast<double*>(gradients.gram.data), horizons * horizons);
  }

  void add_groups(const std::vector<C>& window, C* to, int64_t slab) const {
    parallel_for<C>(op.threads, batch * positions, 0, [&](int64_t position, C*) {
      for (int64_t k = 0; k < slab; ++k) {
        C sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += window[(position * groups + group) * slab + k];
        to[position * slab + k] = sum;
      }
    });
  }

  static void add_slots(const std::vector<double>& parts, double* to, int64_t size) {
    std::fill(to, to + size, 0.0);
    for (size_t k = 0; k < parts.size(); ++k) to[k % size] += parts[k];
  }
};

}  // namespace

void fan_out_forward(const FanOut& op) {
  in_precision(op.hidden.dtype == DType::float64, [&](auto zero) { Fan<decltype(zero)>(op).forward(); });
}

void fan_out_backward(const FanOut& op, const FanOutGradients& gradients) {
  in_precision(op.hidden.dtype == DType::float64, [&](auto zero) { Fan<decltype(zero)>(op).backward(gradients); });
}

}  // namespace mfwm::cpu
