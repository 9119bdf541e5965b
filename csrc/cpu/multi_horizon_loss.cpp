// multi_horizon_loss on the CPU, losses and gradients in one frame-major pass; bindings.cpp calls the function at the
// end of this file. A unit of work loads a tile of frame m and computes everything that concerns it while it is in a
// core's caches: its pyramid, the losses of the predictions of it (those at positions m - k_i), the consistency between
// them, and their gradients. So video, predictions and gradients cross memory once each. loss_layout.h says where tiles
// are.
#include <cmath>
#include <cstring>

#include "loss_layout.h"

namespace mfwm::cpu {
namespace {

struct Pair {
  int near, far;
  int level;       // the far factor's level in the near horizon's chain
  bool exclusive;  // no other pair adds to the far horizon's gradient or to that level's
};

// A thread's state for the tile that it is processing: an entry per horizon, or per horizon and level of its near
// chain.
template <class C>
struct TileState {
  std::vector<char> counted;
  std::vector<double> weight;  // of the position at which the prediction was computed
  std::vector<AnyTile<C>> pred, gradient;
  std::vector<Addition<C>> addition;            // the pairs' contribution to the gradient
  std::vector<Tile<const C>> average_of;        // the levels of the near chain being compared
  std::vector<std::vector<char>> has_gradient;  // the level's near gradient has been written

  explicit TileState(const std::vector<std::vector<Level>>& near_chain)
      : counted(near_chain.size()),
        weight(counted.size()),
        pred(counted.size()),
        gradient(counted.size()),
        addition(counted.size()),
        average_of(counted.size()),
        has_gradient(counted.size()) {
    for (size_t i = 0; i < has_gradient.size(); ++i) has_gradient[i].resize(near_chain[i].size());
  }
};

template <class C>
struct Loss {
  const MultiHorizonLoss& op;
  const int threads;
  const LossLayout<C> layout{op};
  const int count = layout.count;
  // Horizon i predicts frames offset .. positions - 1 + offset; predictions beyond the video get a zero gradient.
  const int64_t target_frames = std::max(layout.frames, layout.positions + op.offsets.back());
  std::vector<Pair> pairs;
  std::vector<double> coefficient;  // per term: one per horizon, then one per pair
  std::vector<int64_t> counts;      // elements per term
  // Whether to write gradients with non-temporal stores.
  bool streams = false;

  Loss(const MultiHorizonLoss& op_, int threads_) : op(op_), threads(threads_) {
    for (size_t k = 0; k < op.pairs.size(); k += 2) {
      const int near = static_cast<int>(op.pairs[k]), far = static_cast<int>(op.pairs[k + 1]);
      pairs.push_back({near, far, index_of(layout.near_chain[near], op.factors[far]), true});
    }
    for (Pair& pair : pairs)
      for (const Pair& other : pairs)
        if (&other != &pair && (other.far == pair.far || other.near == pair.far ||
                                (other.near == pair.near && other.level == pair.level)))
          pair.exclusive = false;
    int64_t bytes = 0;
    for (const Part& gradient : layout.gradients) {
      const Frames& to = gradient.frames;
      if (to.array)
        bytes += layout.batch * layout.positions * layout.channels * to.height * to.width * size_of(to.array.dtype);
    }
    streams = exceed_caches(bytes);
    count_elements();
  }

  // Whether horizon i has a position that predicts frame m, and whether that prediction counts.
  bool active(int i, int64_t m) const { return m >= op.offsets[i] && m - op.offsets[i] < layout.positions; }
  bool counted(int i, int64_t b, int64_t m) const {
    return m < layout.frames && active(i, m) && same_segment(op.segment_ids, b, m - op.offsets[i], m) &&
           position_weight(i, b, m) > 0;
  }
  // The weight of the position at which horizon i predicts frame m.
  double position_weight(int i, int64_t b, int64_t m) const {
    const Array& weights = op.position_weights;
    if (!weights) return 1;
    return number_at(weights, b * weights.stride[0] + (m - op.offsets[i]) * weights.stride[1] + i * weights.stride[2]);
  }

  // The offset of a term in an array indexed by horizon, or in one indexed by pair.
  int64_t offset_in(const Array& array, size_t term) const {
    if (term < layout.preds.size()) return static_cast<int64_t>(term) * array.stride[0];
    const Pair& pair = pairs[term - count];
    return array.rank == 2 ? pair.near * array.stride[0] + pair.far * array.stride[1] : pair.far * array.stride[0];
  }
  double weight_of(size_t term) const {
    const Array& array = term < layout.preds.size() ? op.horizon_weights : op.consistency_weights;
    return number_at(array, offset_in(array, term));
  }

  void count_elements() {
    counts.assign(count + pairs.size(), 0);
    for (int64_t b = 0; b < layout.batch; ++b)
      for (int64_t m = 0; m < layout.frames; ++m) {
        for (int i = 0; i < count; ++i) counts[i] += counted(i, b, m);
        for (size_t p = 0; p < pairs.size(); ++p)
          counts[count + p] += counted(pairs[p].near, b, m) && counted(pairs[p].far, b, m);
      }
    for (size_t k = 0; k < counts.size(); ++k) {
      const int i = k < layout.preds.size() ? static_cast<int>(k) : pairs[k - count].far;
      counts[k] *= layout.channels * layout.preds[i].frames.height * layout.preds[i].frames.width;
      const double mean = weight_of(k) / static_cast<double>(counts[k]);
      coefficient.push_back(counts[k] == 0 ? 0 : std::isnan(mean) ? std::numeric_limits<double>::quiet_NaN() : mean);
    }
  }

  // The curve of a term. `weight` is that of the position.
  MFWM_INLINE Curve<C> curve_of(size_t k, double weight = 1) const {
    const LossKind kind = k < layout.preds.size() ? op.kinds[k] : kind_of_means(op.kinds[pairs[k - count].far]);
    return {kind, static_cast<C>(weight * coefficient[k] * omitted_factor(kind)), static_cast<C>(op.delta),
            static_cast<C>(op.eps)};
  }

  // to = the average of `from` at a level.
  template <class S>
  MFWM_INLINE void pool(const Tile<const S>& from, const Tile<C>& to, const Level& level, C* scratch) const {
    if (layout.are_features)
      average_pixels(from, to, level.ratio, layout.grid_width / level.factor * level.ratio);
    else
      average(from, to, level.ratio, scratch + layout.row_scratch);
  }
  // to += weight * `from`, which is at a level.
  MFWM_INLINE void unpool(const Tile<const C>& from, const Tile<C>& to, const Level& level, C weight,
                          C* scratch) const {
    if (layout.are_features)
      add_repeated_pixels(from, to, level.ratio, weight, layout.grid_width / level.factor * level.ratio);
    else
      add_repeated(from, to, level.ratio, weight, scratch + layout.row_scratch);
  }

  // Compute the pyramid of frame t at the place, up to the level `coarsest`.
  MFWM_SIMD void build_pyramid(int64_t t, const Place& place, C* scratch, const std::vector<int64_t>& at,
                              int coarsest, bool split) const {
    const C scale = static_cast<C>(op.scale), shift = static_cast<C>(op.shift);
    const Tile<C> bottom = layout.tile_at(scratch, layout.chain[0].factor == 1 ? at[0] : layout.base, place, 1, split);
    const bool bytes = split && layout.from_bytes;
    if (split && !bytes) layout.video.load_split(bottom, place.b, t, place.c, place.y, place.x, scale, shift);
    if (!split && !layout.video_in_place)
      layout.video.load(bottom.data, place.b, t, place.c, place.y, place.x, bottom.rows, bottom.columns, scale, shift);
    if (!split) layout.video.prefetch_next(place.b, t, place.c, place.y, place.x, bottom.rows, bottom.columns);
    for (int l = 0; l <= coarsest; ++l) {
      const Level& level = layout.chain[l];
      if (level.factor == 1) continue;
      if constexpr (std::is_same_v<C, float>)
        if (bytes && layout.is_from_frame(level)) {
          average_bytes(layout.bytes_at(t, place), layout.tile_at(scratch, at[l], place, level.factor, true), scale,
                        shift, layout.chain[0].factor > 1);
          continue;
        }
      const Tile<const C> from = level.parent >= 0       ? layout.level_tile(t, place, scratch, at, level.parent, split)
                                 : layout.video_in_place ? layout.frame_at(t, place)
                                                         : read_only(bottom);
      pool(from, layout.tile_at(scratch, at[l], place, level.factor, split), level, scratch);
    }
  }

  static void set_zero(const AnyTile<C>& any) {
    if (!any.data) return;
    any.visit([&](const auto& tile) {
      for (int64_t r = 0; r < tile.rows; ++r)
        std::memset(static_cast<void*>(tile.row(r)), 0, tile.columns * sizeof(*tile.data));
    });
  }

  // Horizon i's means. Computes the weights of motion too.
  MFWM_SIMD AnyTile<C> prediction(int i, const Place& place, C* scratch) const {
    const AnyTile<C> means = layout.tile_of(layout.preds[i], i, place, scratch);
    layout.load(layout.preds[i], i, place, means);
    if (!layout.needs_current_frame) return means;
    const int64_t n = place.m - op.offsets[i];
    const int level = layout.level_of[i];
    build_pyramid(n, place, scratch, layout.other_level_at, level, false);
    const Tile<const C> current = layout.level_tile(n, place, scratch, layout.other_level_at, level, false);
    if (op.motion_gain > 0) {
      const Tile<const C> target = layout.level_tile(place.m, place, scratch, layout.level_at, level, false);
      motion_weight(target, current, static_cast<C>(op.motion_gain),
                    layout.tile_at(scratch, layout.motion_at[i], place, op.factors[i]));
    }
    if (!op.residual) return means;
    const Tile<C> copy = means.template as<C>();
    for (int64_t r = 0; r < copy.rows; ++r) {
      C* __restrict to = copy.row(r);
      const C* __restrict add = current.row(r);
      for (int64_t k = 0; k < copy.columns; ++k) {
        const C sum = to[k] + add[k];
        // Make every NaN quiet: its lower 16 bits must be zero (see Split in lanes.h).
        to[k] = sum == sum ? sum : std::numeric_limits<C>::quiet_NaN();
      }
    }
    return means;
  }

  // The pairs' contribution to horizon i's gradient, converted to a full-size tile that more can be added to.
  MFWM_INLINE Tile<C> addition_tile(int i, const Place& place, TileState<C>& state, C* scratch) const {
    const Tile<C> tile = layout.tile_at(scratch, layout.addition_at[i], place, op.factors[i]);
    Addition<C>& addition = state.addition[i];
    if (addition.ratio == 1) return tile;
    std::fill(tile.data, tile.data + tile.rows * tile.columns, C(0));
    if (addition.ratio == 2) add_repeated(addition.tile, tile, 2, addition.weight, scratch + layout.row_scratch);
    addition = {read_only(tile), 1, 1};
    return tile;
  }

  // Losses of the pairs whose near side is `near`; accumulates their gradients per level of near's chain and per far
  // horizon.
  MFWM_SIMD void compare_pairs(int near, const Place& place, TileState<C>& state, double* sums, C* scratch) const {
    const std::vector<Level>& levels = layout.near_chain[near];
    const std::vector<AnyTile<C>>&pred = state.pred, &gradient = state.gradient;
    std::vector<Tile<const C>>& average_of = state.average_of;
    std::vector<char>& has_gradient = state.has_gradient[near];
    std::fill(has_gradient.begin(), has_gradient.end(), 0);
    for (size_t l = 0; l < levels.size(); ++l) {
      const Level& level = levels[l];
      if (level.parent < 0 && level.ratio == 1 && !pred[near].is_bf16) {
        average_of[l] = pred[near].template as<const C>();
        continue;
      }
      const Tile<C> to = layout.tile_at(scratch, layout.near_at[near][l], place, level.factor);
      if (level.parent < 0)
        pred[near].visit([&](const auto& from) __attribute__((always_inline)) {
          pool(read_only(from), to, level, scratch);
        });
      else
        pool(average_of[level.parent], to, level, scratch);
      average_of[l] = read_only(to);
    }
    for (size_t k = 0; k < pairs.size(); ++k) {
      const Pair& pair = pairs[k];
      if (pair.near != near || !state.counted[pair.far]) continue;
      const bool near_learns = op.detach != Detach::near && gradient[near].data;
      const bool far_learns = op.detach != Detach::far && gradient[pair.far].data;
      const bool is_first = far_learns && state.addition[pair.far].ratio == 0;
      const int64_t factor = op.factors[pair.far];
      const Tile<C> level_gradient = layout.tile_at(scratch, layout.near_gradient_at[near][pair.level], place, factor);
      // Both gradients may read the same tile: the far gradient is computed before backpropagate_levels changes it.
      const bool writes_level = near_learns && !has_gradient[pair.level] && (pair.exclusive || !far_learns);
      Tile<C> difference{};
      if (writes_level)
        difference = level_gradient;
      else if (near_learns || far_learns)
        difference =
            layout.tile_at(scratch, is_first ? layout.addition_at[pair.far] : layout.difference_at, place, factor);
      sums[count + k] += loss_and_gradient<C>(pred[pair.far], {average_of[pair.level]}, difference, {},
                                              curve_of(count + k), 0, false);
      if (near_learns && !writes_level) {
        if (has_gradient[pair.level])
          add_repeated(read_only(difference), level_gradient, 1, C(1), scratch + layout.row_scratch);
        else
          std::copy(difference.data, difference.data + difference.rows * difference.columns, level_gradient.data);
      }
      has_gradient[pair.level] |= near_learns;
      if (is_first)
        state.addition[pair.far] = {read_only(difference), 1, 1};
      else if (far_learns)
        add_repeated(read_only(difference), addition_tile(pair.far, place, state, scratch), 1, C(1),
                     scratch + layout.row_scratch);
    }
  }

  // Backpropagate the level gradients into an addition to near's own gradient, coarsest level first; each level spreads
  // its gradient evenly over its parent's pixels.
  MFWM_SIMD void backpropagate_levels(int near, const Place& place, TileState<C>& state, C* scratch) const {
    const std::vector<Level>& levels = layout.near_chain[near];
    const std::vector<int64_t>& gradient_at = layout.near_gradient_at[near];
    std::vector<char>& has_gradient = state.has_gradient[near];
    for (int l = static_cast<int>(levels.size()) - 1; l >= 0; --l) {
      if (!has_gradient[l]) continue;
      const Level& level = levels[l];
      const Tile<const C> from = read_only(layout.tile_at(scratch, gradient_at[l], place, level.factor));
      const C share = C(1) / static_cast<C>(level.ratio * level.ratio);
      if (level.parent < 0) {
        if (level.ratio == 2 && state.addition[near].ratio == 0 && !layout.are_features)
          state.addition[near] = {from, 2, -share};
        else
          unpool(from, addition_tile(near, place, state, scratch), level, -share, scratch);
        continue;
      }
      const int64_t factor = levels[level.parent].factor;
      const Tile<C> to = layout.tile_at(scratch, gradient_at[level.parent], place, factor);
      if (!has_gradient[level.parent]) std::fill(to.data, to.data + to.rows * to.columns, C(0));
      has_gradient[level.parent] = true;
      unpool(from, to, level, share, scratch);
    }
  }

  // The losses of horizon i at one place, times the weight of the position. Also writes the gradients.
  MFWM_INLINE double compare(int i, const Place& place, TileState<C>& state, C* scratch) const {
    Target<C> target{layout.level_tile(place.m, place, scratch, layout.level_at, layout.level_of[i], layout.is_split)};
    const AnyTile<C>& gradient = state.gradient[i];
    const Curve<C> curve = curve_of(i, state.weight[i]);
    if (layout.is_weighted(i)) {
      const AnyTile<C> log_scale = layout.tile_of(layout.log_scales[i], i, place, scratch);
      const AnyTile<C> slope = layout.tile_of(layout.log_scale_gradients[i], i, place, scratch);
      layout.load(layout.log_scales[i], i, place, log_scale);
      WeightedTiles<C> tiles{state.pred[i].template as<const C>(), log_scale.template as<const C>(), target.tile};
      if (op.motion_gain > 0)
        tiles.weight = read_only(layout.tile_at(scratch, layout.motion_at[i], place, op.factors[i]));
      if (state.addition[i].ratio == 2) addition_tile(i, place, state, scratch);
      tiles.addition = state.addition[i].tile;
      tiles.gradient = gradient.template as<C>(), tiles.log_scale_gradient = slope.template as<C>();
      const double sum = weighted_loss(tiles, curve, static_cast<C>(op.beta));
      layout.store(layout.log_scale_gradients[i], i, place, slope);
      return sum * state.weight[i];
    }
    if (layout.from_bytes && op.factors[i] == 1)
      target = {target.tile, layout.bytes_at(place.m, place), static_cast<C>(op.scale), static_cast<C>(op.shift)};
    const bool stream = streams && layout.gradients[i].in_place && gradient.is_aligned();
    const AnyTile<C>& pred = state.pred[i];
    const int64_t next = layout.preds[i].in_place ? layout.preds[i].frames.to_next(pred.rows, pred.columns) : 0;
    return state.weight[i] * loss_and_gradient<C>(pred, target, gradient, state.addition[i], curve, next, stream);
  }

  // Compute all losses and gradients at one place.
  void process(const Place& place, TileState<C>& state, double* sums, C* scratch) const {
    int coarsest = -1;
    for (int i = 0; i < count; ++i)
      if (state.counted[i]) coarsest = std::max(coarsest, layout.level_of[i]);
    if (coarsest >= 0) build_pyramid(place.m, place, scratch, layout.level_at, coarsest, layout.is_split);
    for (int i = 0; i < count; ++i) {
      if (active(i, place.m)) state.gradient[i] = layout.tile_of(layout.gradients[i], i, place, scratch);
      if (state.counted[i]) state.pred[i] = prediction(i, place, scratch);
      state.addition[i] = {};
    }
    for (int i = 0; i < count; ++i)
      if (state.counted[i] && !layout.near_chain[i].empty()) compare_pairs(i, place, state, sums, scratch);
    // Last horizon first, because a far gradient must be computed before that of its near horizon.
    for (int i = count - 1; i >= 0; --i) {
      if (!active(i, place.m)) continue;
      if (state.counted[i]) {
        if (!layout.near_chain[i].empty()) backpropagate_levels(i, place, state, scratch);
        sums[i] += compare(i, place, state, scratch);
      } else {
        const AnyTile<C> slope = layout.tile_of(layout.log_scale_gradients[i], i, place, scratch);
        set_zero(state.gradient[i]), set_zero(slope);
        layout.store(layout.log_scale_gradients[i], i, place, slope);
      }
      layout.store(layout.gradients[i], i, place, state.gradient[i]);
    }
  }

  void run() const {
    const size_t terms = coefficient.size();
    const Tiling& tiling = layout.tiling;
    const int64_t units = layout.positions == 0 ? 0 : layout.batch * target_frames * tiling.chunks;
    // Each unit has a row of sums. Adding the rows in order at the end makes the result independent of the threads.
    std::vector<double> sums(units * terms, 0.0);
    std::vector<TileState<C>> states(threads, TileState<C>(layout.near_chain));
    parallel_for<C>(threads, units, layout.scratch_size, [&](int64_t unit, C* scratch) {
      const int64_t chunk = unit % tiling.chunks, frame = unit / tiling.chunks;
      const int64_t m = frame % target_frames, b = frame / target_frames;
      const int64_t top = chunk * tiling.chunk_rows, bottom = std::min(tiling.height, top + tiling.chunk_rows);
      TileState<C>& state = states[omp_get_thread_num()];
      for (int i = 0; i < count; ++i) {
        state.counted[i] = counted(i, b, m);
        state.weight[i] = state.counted[i] ? position_weight(i, b, m) : 0;
      }
      for (int64_t first = 0; first < layout.channels; first += layout.channels_at_once())
        for (int64_t y = top; y < bottom; y += tiling.rows)
          for (int64_t x = 0; x < tiling.width; x += tiling.columns)
            for (int64_t c = first; c < first + layout.channels_at_once(); ++c) {
              const Place place{b, m, c, y, x, std::min(tiling.rows, tiling.height - y),
                                std::min(tiling.columns, tiling.width - x)};
              process(place, state, sums.data() + unit * terms, scratch);
            }
      if (streams) finish_streaming();
    });
    for (const Array* array : {&op.consistency, &op.consistency_counts})
      std::memset(array->data, 0, array->size[0] * array->size[1] * size_of(array->dtype));
    double total = 0;
    for (size_t k = 0; k < terms; ++k) {
      double sum = 0;
      for (int64_t unit = 0; unit < units; ++unit) sum += sums[unit * terms + k];
      const double mean = counts[k] ? sum / static_cast<double>(counts[k]) : 0;
      const Array &means = k < layout.preds.size() ? op.per_horizon : op.consistency,
                  &numbers = k < layout.preds.size() ? op.counts : op.consistency_counts;
      set_number(means, offset_in(means, k), mean);
      static_cast<int64_t*>(numbers.data)[offset_in(numbers, k)] = counts[k];
      total += weight_of(k) * mean;
    }
    set_number(op.total, 0, total);
  }
};

}  // namespace

void multi_horizon_loss(const MultiHorizonLoss& op, int threads) {
  const bool is_double = op.video.dtype == DType::float64 || op.preds[0].dtype == DType::float64;
  in_precision(is_double, [&](auto zero) { Loss<decltype(zero)>(op, threads).run(); });
}

}  // namespace mfwm::cpu
