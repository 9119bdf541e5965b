// fan_out on the CPU. A tile of L x L tokens, L the least common multiple of the pools, is read once; coarser cells are
// sums of finer ones, made while the tokens pass.
#include <cmath>

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
MFWM_INLINE void add_scaled(C* __restrict to, const C* __restrict from, C scale, int64_t count) {
  for (int64_t d = 0; d < count; ++d) to[d] += from[d] * scale;
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
  std::vector<Level> chain;
  std::vector<int> level_of;  // horizon -> level
  std::vector<C> norm_weight;
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
    tiles = (height / side) * (width / side);
    const int64_t all = std::max<int64_t>(batch * positions, 1);
    groups = std::min(tiles, std::max<int64_t>(1, (64 + all - 1) / all));
    norm_weight.resize(op.norm_weight ? horizons * depth : 0);
    for (int i = 0; op.norm_weight && i < horizons; ++i)
      load_row(&norm_weight[i * depth], op.norm_weight.data, op.norm_weight.dtype, i * op.norm_weight.stride[0],
               op.norm_weight.stride[1], depth);
  }

  struct Place {
    int64_t b, n, y, x;  // of the tile, in tokens
  };
  template <class Body>
  MFWM_INLINE void tiles_of(int64_t position, int64_t group, const Body& body) const {
    const int64_t columns = width / side;
    for (int64_t tile = group * tiles / groups; tile < (group + 1) * tiles / groups; ++tile)
      body(Place{position / positions, position % positions, tile / columns * side, tile % columns * side});
  }

  int64_t cells(size_t l) const { return (side / chain[l].factor) * (side / chain[l].factor); }

  MFWM_INLINE const C* token(C* scratch, const Place& place, int64_t y, int64_t x) const {
    const int64_t offset = cell_offset(op.hidden, place.b, place.n, place.y + y, place.x + x);
    return row_of(scratch, op.hidden, offset, op.hidden.stride[4], depth);
  }
  MFWM_INLINE const C* window_sum(const Place& place, int i) const {
    const int64_t position = place.b * positions + place.n;
    return static_cast<const C*>(op.sums.data) + (position * horizons + i) * depth;
  }

  // Sums over the cells of every level but the first, in `sums` (per level, cells by rows); done(level, y, x, row) is
  // called once for every cell of every level, when its sum is complete.
  template <class Done>
  MFWM_INLINE void pool(const Place& place, C* token_scratch, C* sums, const Done& done) const {
    for (int64_t y = 0; y < side; ++y)
      for (int64_t x = 0; x < side; ++x) {
        const C* tokens = token(token_scratch, place, y, x);
        C* level_sums = sums;
        for (size_t l = 0; l < chain.size(); ++l) {
          const int64_t p = chain[l].factor;
          if (l > 0 && ((y + 1) % p || (x + 1) % p)) {
            level_sums += cells(l) * row;
            continue;
          }
          const C* complete = l == 0 ? tokens : level_sums + ((y / p) * (side / p) + x / p) * row;
          done(l, y / p, x / p, complete);
          C* child_sums = sums;
          for (size_t child = 1; child < chain.size(); ++child) {
            if (chain[child].parent == static_cast<int>(l)) {
              const int64_t q = chain[child].factor;
              C* __restrict to = child_sums + ((y / q) * (side / q) + x / q) * row;
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
        C squares = 0;
        for (int64_t d = 0; d < depth; ++d) {
          const C value = from[d] * mean + add[d];
          state[d] = value;
          squares += value * value;
        }
        if (!norm_weight.empty()) {
          const C* __restrict weight = &norm_weight[i * depth];
          const C r = C(1) / std::sqrt(squares / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
          for (int64_t d = 0; d < depth; ++d) state[d] *= r * weight[d];
        }
        const Array& out = op.outputs[i];
        const int64_t offset = cell_offset(out, place.b, place.n, place.y / p + y, place.x / p + x);
        store_row(state, out.data, out.dtype, offset, out.stride[4], depth);
      }
    });
  }

  void forward() const {
    parallel_for<C>(op.threads, batch * positions * groups, row + pool_scratch(), [&](int64_t unit, C* scratch) {
      tiles_of(unit / groups, unit % groups, [&](const Place& place) { forward_tile(place, scratch); });
    });
  }

  // ---- backward

  struct Backward {
    const FanOutGradients& gradients;
    std::vector<int64_t> state_at;  // horizon -> its gradients at its own cells, in scratch
    int64_t pooled_at = 0, size = 0;
    bool norms, gram;
  };

  Backward plan(const FanOutGradients& gradients) const {
    Backward plan{gradients, {}, 0, 0, !norm_weight.empty(), bool(gradients.gram)};
    plan.size = 4 * row;
    plan.pooled_at = plan.size;
    plan.size += pool_scratch();
    for (int i = 0; i < horizons; ++i) {
      plan.state_at.push_back(plan.size);
      plan.size += cells(level_of[i]) * row;
    }
    return plan;
  }

  // The gradient at one state, before it is spread over the tokens of its cell:
  //   d state = r (g w) - state r^3 / D <g w, state>,  d weight = g state r
  MFWM_INLINE void state_gradient(int i, const Place& place, int64_t y, int64_t x, const C* __restrict sum,
                                  C* __restrict to, C* scratch, double* weight_gradient, C* window_gradient) const {
    const Array& g = op.outputs[i];
    const int64_t p = op.pool[i], offset = cell_offset(g, place.b, place.n, place.y / p + y, place.x / p + x);
    const C* __restrict upstream = row_of(scratch, g, offset, g.stride[4], depth);
    if (norm_weight.empty()) {
      for (int64_t d = 0; d < depth; ++d) to[d] = upstream[d];
    } else {
      C* __restrict state = scratch + row;
      const C *__restrict add = window_sum(place, i), *__restrict weight = &norm_weight[i * depth];
      const C mean = C(1) / static_cast<C>(p * p);
      C squares = 0, product = 0;
      for (int64_t d = 0; d < depth; ++d) {
        const C value = sum[d] * mean + add[d];
        state[d] = value;
        squares += value * value;
        product += upstream[d] * weight[d] * value;
      }
      const C r = C(1) / std::sqrt(squares / static_cast<C>(depth) + static_cast<C>(op.norm_eps));
      const C along = product * r * r * r / static_cast<C>(depth);
      for (int64_t d = 0; d < depth; ++d) to[d] = upstream[d] * weight[d] * r - state[d] * along;
      if (weight_gradient) {
        double* __restrict into = weight_gradient + i * depth;
        for (int64_t d = 0; d < depth; ++d) into[d] += static_cast<double>(upstream[d] * state[d] * r);
      }
    }
    if (window_gradient) {
      C* __restrict into = window_gradient + i * depth;
      for (int64_t d = 0; d < depth; ++d) into[d] += to[d];
    }
  }

  MFWM_SIMD void backward_tile(const Backward& plan, const Place& place, C* scratch, C* window_gradient,
                               double* weight_gradient, double* gram) const {
    const auto at = [&](size_t l, int64_t y, int64_t x, const C* sum) __attribute__((always_inline)) {
      const int64_t columns = side / chain[l].factor;
      for (int i = 0; i < horizons; ++i)
        if (level_of[i] == static_cast<int>(l) && op.outputs[i])
          state_gradient(i, place, y, x, sum, scratch + plan.state_at[i] + (y * columns + x) * row, scratch,
                         weight_gradient, window_gradient);
    };
    if (plan.norms) {
      pool(place, scratch + plan.pooled_at, scratch + plan.pooled_at + row, at);
    } else {
      // Without a norm the states themselves are not needed.
      for (size_t l = 0; l < chain.size(); ++l)
        for (int64_t y = 0; y < side / chain[l].factor; ++y)
          for (int64_t x = 0; x < side / chain[l].factor; ++x) at(l, y, x, nullptr);
    }
    const Array& hidden = plan.gradients.hidden;
    for (int64_t y = 0; hidden && y < side; ++y)
      for (int64_t x = 0; x < side; ++x) {
        C* total = scratch;
        std::fill(total, total + depth, C(0));
        for (int i = 0; i < horizons; ++i) {
          if (!op.outputs[i]) continue;
          const int64_t p = op.pool[i];
          const C share = static_cast<C>((plan.gradients.scale.empty() ? 1.0 : plan.gradients.scale[i]) / (p * p));
          add_scaled(total, scratch + plan.state_at[i] + ((y / p) * (side / p) + x / p) * row, share, depth);
        }
        const int64_t offset = cell_offset(hidden, place.b, place.n, place.y + y, place.x + x);
        store_row(total, hidden.data, hidden.dtype, offset, hidden.stride[4], depth);
      }
    if (plan.gram) add_gram(plan, scratch, gram);
  }

  // <g_i, g_j> over the tile's tokens: each pair of cells that overlap, times the tokens in the overlap.
  MFWM_INLINE void add_gram(const Backward& plan, C* scratch, double* gram) const {
    for (int i = 0; i < horizons; ++i)
      for (int j = 0; j < horizons; ++j) {
        const int64_t p = op.pool[i], q = op.pool[j];
        if (!op.outputs[i] || !op.outputs[j] || p > q || (p == q && j < i)) continue;
        double sum = 0;
        for (int64_t y = 0; y < side / p; ++y)
          for (int64_t x = 0; x < side / p; ++x)
            for (int64_t v = y * p / q; v <= (y * p + p - 1) / q; ++v)
              for (int64_t u = x * p / q; u <= (x * p + p - 1) / q; ++u) {
                const int64_t rows = std::min(y * p + p, v * q + q) - std::max(y * p, v * q);
                const int64_t columns = std::min(x * p + p, u * q + q) - std::max(x * p, u * q);
                sum += static_cast<double>(rows * columns) *
                       static_cast<double>(dot(scratch + plan.state_at[i] + (y * (side / p) + x) * row,
                                               scratch + plan.state_at[j] + (v * (side / q) + u) * row, depth));
              }
        sum /= static_cast<double>(p * p * q * q);
        gram[i * horizons + j] += sum;
        if (i != j) gram[j * horizons + i] += sum;
      }
  }

  void backward(const FanOutGradients& gradients) const {
    const Backward scratch_plan = plan(gradients);
    const int64_t all = batch * positions, units = all * groups, slab = horizons * depth;
    // Sums over tokens: per position and group for the window sums, per slot for the rest. A slot is a fixed range of
    // units taken in order, and slots are added in order.
    const int64_t slots = std::min<int64_t>(units, 256);
    std::vector<C> window(gradients.sums ? units * slab : 0, C(0));
    std::vector<double> weight(gradients.norm_weight ? slots * slab : 0, 0.0);
    std::vector<double> gram(gradients.gram ? slots * horizons * horizons : 0, 0.0);
    parallel_for<C>(op.threads, slots, scratch_plan.size, [&](int64_t slot, C* scratch) {
      for (int64_t unit = slot * units / slots; unit < (slot + 1) * units / slots; ++unit)
        tiles_of(unit / groups, unit % groups, [&](const Place& place) {
          backward_tile(scratch_plan, place, scratch, window.empty() ? nullptr : &window[unit * slab],
                        weight.empty() ? nullptr : &weight[slot * slab],
                        gram.empty() ? nullptr : &gram[slot * horizons * horizons]);
        });
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
