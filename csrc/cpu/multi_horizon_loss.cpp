// multi_horizon_loss on the CPU, frame-major: everything that concerns a tile of frame m (its pyramid, the predictions
// of it made at m - k_i, their losses, the consistency between them, their gradients) meets in the first-level cache,
// so video, predictions and gradients are each moved once.
#include <cmath>

#include "pyramid.h"

namespace mfwm::cpu {
namespace {

// The coefficient of a loss in the total, and the numbers that its kind takes.
template <class C>
struct Curve {
  C coefficient, delta, eps;
};

// The loss of d, and in `slope` its derivative.
template <LossKind kind, class C>
MFWM_INLINE C loss_of(C d, const Curve<C>& curve, C& slope) {
  if constexpr (kind == LossKind::mse) {
    slope = 2 * d;
    return d * d;
  } else if constexpr (kind == LossKind::l1) {
    slope = d > 0 ? C(1) : d < 0 ? C(-1) : d;  // 0, or NaN
    return std::abs(d);
  } else if constexpr (kind == LossKind::huber) {
    slope = d > curve.delta ? curve.delta : d < -curve.delta ? -curve.delta : d;
    const C size = std::abs(d);
    return size > curve.delta ? curve.delta * (size - curve.delta / 2) : d * d / 2;
  } else {
    const C root = std::sqrt(d * d + curve.eps * curve.eps);
    slope = d / root;
    return root;
  }
}

// Asks for a row that is needed in the next tile. Tiles are too short for the hardware to see them coming.
template <class C>
MFWM_INLINE void prefetch(const C* row, int64_t count) {
  for (int64_t k = 0; k < count; k += 64 / static_cast<int64_t>(sizeof(C))) __builtin_prefetch(row + k);
}

// What a gradient consists of besides the slope of the loss: weight * tile, each element repeated over ratio x ratio.
template <class C>
struct Addition {
  Tile<const C> tile;
  int64_t ratio = 0;  // 0: nothing, 1 or 2
  C weight = 1;
};

template <LossKind kind, bool with_gradient, bool with_addition, class C>
MFWM_INLINE C loss_row(const C* __restrict pred, const C* __restrict target, const C* __restrict addition,
                       C* __restrict gradient, int64_t count, const Curve<C>& curve) {
  C sum = 0;
  for (int64_t x = 0; x < count; ++x) {
    C slope;
    sum += loss_of<kind>(pred[x] - target[x], curve, slope);
    if constexpr (with_gradient) gradient[x] = curve.coefficient * slope + (with_addition ? addition[x] : C(0));
  }
  return sum;
}

template <LossKind kind, bool with_gradient, int ratio, class C>
MFWM_INLINE double loss_tile(const Tile<const C>& pred, const Tile<const C>& target, const Tile<C>& gradient,
                             const Addition<C>& addition, const Curve<C>& curve, bool fetch, C* __restrict scratch) {
  constexpr bool adds = ratio > 0;
  const int64_t rows = target.rows, columns = target.columns, next = rows * pred.pitch;
  double total = 0;
  if (ratio < 2 && pred.is_dense() && target.is_dense() && gradient.is_dense() && addition.tile.is_dense()) {
    // One long row, in pieces of a length that float sums bear.
    constexpr int64_t piece = 512;
    for (int64_t k = 0; k < rows * columns; k += piece) {
      const int64_t count = std::min(piece, rows * columns - k);
      if (fetch) prefetch(pred.data + next + k, count);
      total += static_cast<double>(loss_row<kind, with_gradient, adds>(
          pred.data + k, target.data + k, adds ? addition.tile.data + k : nullptr,
          with_gradient ? gradient.data + k : nullptr, count, curve));
    }
    return total;
  }
  for (int64_t y = 0; y < rows; ++y) {
    if (fetch) prefetch(pred.row(y) + next, columns);
    const C* a = adds ? addition.tile.row(ratio == 2 ? y / 2 : y) : nullptr;
    if (ratio == 2 && y % 2 == 0)
      for (int64_t x = 0; x < columns / 2; ++x) scratch[2 * x] = scratch[2 * x + 1] = a[x] * addition.weight;
    total += static_cast<double>(
        loss_row<kind, with_gradient, adds>(pred.row(y), target.row(y), ratio == 2 ? scratch : a,
                                            with_gradient ? gradient.row(y) : nullptr, columns, curve));
  }
  return total;
}

// Sum of the losses of pred - target; coefficient * slope + addition goes to `gradient` where it has data. `scratch`
// holds a row.
template <class C>
MFWM_SIMD double loss_and_gradient(LossKind kind, const Tile<const C>& pred, const Tile<const C>& target,
                                   const Tile<C>& gradient, const Addition<C>& addition, const Curve<C>& curve,
                                   bool fetch, C* scratch) {
  const auto with = [&](auto tag) __attribute__((always_inline)) {
    constexpr LossKind k = decltype(tag)::value;
    if (!gradient.data) return loss_tile<k, false, 0>(pred, target, gradient, {}, curve, fetch, scratch);
    if (addition.ratio == 0) return loss_tile<k, true, 0>(pred, target, gradient, {}, curve, fetch, scratch);
    if (addition.ratio == 1) return loss_tile<k, true, 1>(pred, target, gradient, addition, curve, fetch, scratch);
    return loss_tile<k, true, 2>(pred, target, gradient, addition, curve, fetch, scratch);
  };
  switch (kind) {
    case LossKind::mse: return with(std::integral_constant<LossKind, LossKind::mse>{});
    case LossKind::l1: return with(std::integral_constant<LossKind, LossKind::l1>{});
    case LossKind::huber: return with(std::integral_constant<LossKind, LossKind::huber>{});
    default: return with(std::integral_constant<LossKind, LossKind::charbonnier>{});
  }
}

template <class C>
MFWM_INLINE Tile<const C> read_only(const Tile<C>& tile) {
  return {tile.data, tile.pitch, tile.rows, tile.columns};
}

struct Pair {
  int near, far;
  int level;  // the far factor's place in the near horizon's chain
};

// What a thread knows of the frame that it is at: an entry per horizon, then an entry per level of a near chain.
template <class C>
struct Meeting {
  std::vector<char> counted;
  std::vector<Tile<const C>> pred;
  std::vector<Tile<C>> gradient;
  std::vector<Addition<C>> addition;  // what the pairs add to the gradient
  std::vector<Tile<const C>> average_of;
  std::vector<char> has_gradient;

  explicit Meeting(size_t count)
      : counted(count), pred(count), gradient(count), addition(count), average_of(count), has_gradient(count) {}
};

template <class C>
struct Loss {
  const MultiHorizonLoss& op;
  const int count = static_cast<int>(op.preds.size());
  const int64_t batch = op.video.size[0], frames = op.video.size[1], channels = op.video.size[2];
  const int64_t positions = op.preds[0].size[1];
  // Predictions are of frames offset .. positions - 1 + offset, and those beyond the video get a zero gradient.
  const int64_t last = std::max(frames, positions + op.offsets.back());
  Frames video{op.video, 0, channels, op.video.size[3], op.video.size[4]};
  std::vector<Frames> preds, gradients;
  std::vector<Level> chain;                    // of the video, base 1
  std::vector<int> level_of;                   // horizon -> level of that chain
  std::vector<std::vector<Level>> near_chain;  // of horizon i's predictions, base f_i
  std::vector<Pair> pairs;
  Tiling tiling;
  std::vector<double> coefficient;       // one per horizon, then one per pair
  std::vector<int64_t> counts;           // elements, likewise
  // Gradients larger than the caches are written past them, which saves reading what is overwritten.
  bool streams = false;
  // Scratch, in elements from its start.
  int64_t scratch_size = 0, spare, base, difference_at;
  std::vector<int64_t> level_at, other_level_at, pred_at, gradient_at, addition_at;
  std::vector<std::vector<int64_t>> near_at, near_gradient_at;

  explicit Loss(const MultiHorizonLoss& op_)
      : op(op_),
        chain(chain_of(1, op_.factors)),
        near_chain(op_.factors.size()),
        tiling(op_.video.size[3], op_.video.size[4], op_.factors, op_.video.size[0] * op_.video.size[1],
               static_cast<int64_t>(sizeof(C))) {
    for (int i = 0; i < count; ++i) {
      Frames pred{op.preds[i], op.patch_sizes.empty() ? 0 : op.patch_sizes[i], channels, video.height / op.factors[i],
                  video.width / op.factors[i]};
      preds.push_back(pred);
      pred.array = op.gradients[i];
      gradients.push_back(pred);
      level_of.push_back(index_of(chain, op.factors[i]));
      std::vector<int64_t> far;
      for (size_t k = 0; k < op.pairs.size(); k += 2)
        if (op.pairs[k] == i) far.push_back(op.factors[op.pairs[k + 1]]);
      near_chain[i] = chain_of(op.factors[i], far);
    }
    for (size_t k = 0; k < op.pairs.size(); k += 2) {
      const int near = static_cast<int>(op.pairs[k]), far = static_cast<int>(op.pairs[k + 1]);
      pairs.push_back({near, far, index_of(near_chain[near], op.factors[far])});
    }
    int64_t bytes = 0;
    for (const Frames& gradient : gradients)
      if (gradient.array)
        bytes += batch * positions * channels * gradient.height * gradient.width * size_of(gradient.array.dtype);
    streams = bytes > int64_t(16) << 20;
    lay_out_scratch();
    count_elements();
  }

  int64_t take(int64_t factor) {
    const int64_t at = scratch_size;
    scratch_size += padded<C>((tiling.rows / factor) * (tiling.columns / factor));
    return at;
  }

  void lay_out_scratch() {
    spare = scratch_size;
    scratch_size += 2 * padded<C>(tiling.columns);
    base = take(1);
    for (const Level& level : chain) level_at.push_back(level.factor == 1 ? base : take(level.factor));
    // With `residual`, the pyramid of the frame that a prediction is added to.
    if (op.residual)
      for (const Level& level : chain) other_level_at.push_back(take(level.factor));
    near_at.resize(count);
    near_gradient_at.resize(count);
    addition_at.resize(count);
    int64_t finest = 0;  // of the far sides
    for (int i = 0; i < count; ++i) {
      pred_at.push_back(reads_in_place(i) ? 0 : take(op.factors[i]));
      gradient_at.push_back(writes_in_place(i) ? 0 : take(op.factors[i]));
      for (const Level& level : near_chain[i]) {
        near_at[i].push_back(level.factor == op.factors[i] ? -1 : take(level.factor));
        near_gradient_at[i].push_back(take(level.factor));
      }
    }
    for (const Pair& pair : pairs) {
      for (int i : {pair.near, pair.far})
        if (addition_at[i] == 0) addition_at[i] = take(op.factors[i]);
      finest = finest == 0 ? op.factors[pair.far] : std::min(finest, op.factors[pair.far]);
    }
    if (finest > 0) difference_at = take(finest);
  }

  bool reads_in_place(int i) const { return !op.residual && preds[i].template is_plain_image<C>(); }
  bool writes_in_place(int i) const { return !streams && gradients[i].template is_plain_image<C>(); }

  // Horizon i has a position that predicts frame m.
  bool active(int i, int64_t m) const { return m >= op.offsets[i] && m - op.offsets[i] < positions; }
  bool counted(int i, int64_t b, int64_t m) const {
    return m < frames && active(i, m) && same_segment(op.segment_ids, b, m - op.offsets[i], m);
  }

  void count_elements() {
    counts.assign(count + pairs.size(), 0);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t m = 0; m < frames; ++m) {
        for (int i = 0; i < count; ++i) counts[i] += counted(i, b, m);
        for (size_t p = 0; p < pairs.size(); ++p)
          counts[count + p] += counted(pairs[p].near, b, m) && counted(pairs[p].far, b, m);
      }
    for (size_t k = 0; k < counts.size(); ++k) {
      const int i = k < preds.size() ? static_cast<int>(k) : pairs[k - count].far;
      counts[k] *= channels * preds[i].height * preds[i].width;
      const double weight = k < preds.size() ? op.weights[k] : op.pair_weights[k - count];
      coefficient.push_back(counts[k] ? weight / static_cast<double>(counts[k]) : 0);
    }
  }

  // A tile of one channel of frame m of clip b, at pixel y, x.
  struct Place {
    int64_t b, m, c, y, x, rows, columns;
  };

  MFWM_INLINE Tile<C> tile_at(C* scratch, int64_t at, const Place& place, int64_t factor) const {
    return {scratch + at, place.columns / factor, place.rows / factor, place.columns / factor};
  }
  MFWM_INLINE Curve<C> curve_of(size_t k) const {
    return {static_cast<C>(coefficient[k]), static_cast<C>(op.delta), static_cast<C>(op.eps)};
  }

  // The pyramid of frame t at the place, down to the level `coarsest`.
  MFWM_SIMD void make_pyramid(int64_t t, const Place& place, C* scratch, const std::vector<int64_t>& at,
                              int coarsest) const {
    const C scale = static_cast<C>(op.scale), shift = static_cast<C>(op.shift);
    const Tile<C> bottom = tile_at(scratch, chain[0].factor == 1 ? at[0] : base, place, 1);
    video.load(bottom.data, place.b, t, place.c, place.y, place.x, bottom.rows, bottom.columns, scale, shift);
    for (int l = 0; l <= coarsest; ++l) {
      const Level& level = chain[l];
      if (level.factor == 1) continue;
      const Tile<C> from = level.parent < 0 ? bottom : tile_at(scratch, at[level.parent], place, chain[level.parent].factor);
      average(from, tile_at(scratch, at[l], place, level.factor), level.ratio, scratch + spare);
    }
  }

  // Horizon i's prediction of the frame: where it lies if it can be read there, else a copy in scratch.
  MFWM_SIMD Tile<const C> prediction(int i, const Place& place, C* scratch) const {
    const Frames& pred = preds[i];
    const int64_t factor = op.factors[i], n = place.m - op.offsets[i], y = place.y / factor, x = place.x / factor;
    const Tile<C> copy = tile_at(scratch, pred_at[i], place, factor);
    if (reads_in_place(i))
      return {static_cast<const C*>(pred.array.data) + pred.image_offset(place.b, n, place.c, y, x),
              pred.array.stride[3], copy.rows, copy.columns};
    pred.load(copy.data, place.b, n, place.c, y, x, copy.rows, copy.columns);
    if (op.residual) {
      make_pyramid(n, place, scratch, other_level_at, level_of[i]);
      const Tile<C> current = tile_at(scratch, other_level_at[level_of[i]], place, factor);
      for (int64_t r = 0; r < copy.rows; ++r) {
        C *__restrict to = copy.row(r), *__restrict add = current.row(r);
        for (int64_t k = 0; k < copy.columns; ++k) to[k] += add[k];
      }
    }
    return read_only(copy);
  }

  // Where horizon i's gradient is made: in place if it can be, in scratch if it must be converted or streamed, nowhere
  // if it is not wanted.
  MFWM_INLINE Tile<C> gradient_tile(int i, const Place& place, C* scratch) const {
    const Frames& gradient = gradients[i];
    const int64_t factor = op.factors[i];
    if (!gradient.array) return {};
    Tile<C> tile = tile_at(scratch, gradient_at[i], place, factor);
    if (writes_in_place(i)) {
      const int64_t n = place.m - op.offsets[i];
      tile.data = static_cast<C*>(gradient.array.data) +
                  gradient.image_offset(place.b, n, place.c, place.y / factor, place.x / factor);
      tile.pitch = gradient.array.stride[3];
    }
    return tile;
  }

  MFWM_INLINE void store_gradient(int i, const Place& place, const Tile<C>& tile) const {
    const Frames& gradient = gradients[i];
    const int64_t factor = op.factors[i], n = place.m - op.offsets[i];
    if (tile.data && !writes_in_place(i))
      gradient.store(tile.data, place.b, n, place.c, place.y / factor, place.x / factor, tile.rows, tile.columns, streams);
  }

  // What the pairs add to horizon i's gradient as a tile of its own size.
  MFWM_INLINE Tile<C> addition_tile(int i, const Place& place, Meeting<C>& here, C* scratch) const {
    const Tile<C> tile = tile_at(scratch, addition_at[i], place, op.factors[i]);
    Addition<C>& addition = here.addition[i];
    if (addition.ratio == 1) return tile;
    std::fill(tile.data, tile.data + tile.rows * tile.columns, C(0));
    if (addition.ratio == 2) add_repeated(addition.tile, tile, 2, addition.weight, scratch + spare);
    addition = {read_only(tile), 1, 1};
    return tile;
  }

  // The consistency pairs whose near side is horizon `near`.
  MFWM_SIMD void agree(int near, const Place& place, Meeting<C>& here, double* sums, C* scratch) const {
    const std::vector<Level>& levels = near_chain[near];
    const std::vector<Tile<const C>>& pred = here.pred;
    const std::vector<Tile<C>>& gradient = here.gradient;
    std::vector<Tile<const C>>& average_of = here.average_of;
    std::vector<char>& has_gradient = here.has_gradient;
    const int depth = static_cast<int>(levels.size());
    std::fill(has_gradient.begin(), has_gradient.end(), 0);
    const Tile<const C>& p = pred[near];
    for (int l = 0; l < depth; ++l) {
      const Level& level = levels[l];
      const Tile<const C> from = level.parent < 0 ? p : average_of[level.parent];
      if (level.ratio == 1) {
        average_of[l] = from;
        continue;
      }
      const Tile<C> to = tile_at(scratch, near_at[near][l], place, level.factor);
      average(Tile<C>{const_cast<C*>(from.data), from.pitch, from.rows, from.columns}, to, level.ratio, scratch + spare);
      average_of[l] = read_only(to);
    }
    for (size_t k = 0; k < pairs.size(); ++k) {
      const Pair& pair = pairs[k];
      if (pair.near != near || !here.counted[pair.far]) continue;
      const bool near_learns = op.detach != Detach::near && gradient[near].data;
      const bool far_learns = op.detach != Detach::far && gradient[pair.far].data;
      const bool first = far_learns && here.addition[pair.far].ratio == 0;
      Tile<C> difference{};
      if (near_learns || far_learns)
        difference = tile_at(scratch, first ? addition_at[pair.far] : difference_at, place, op.factors[pair.far]);
      sums[count + k] += loss_and_gradient<C>(op.kind, pred[pair.far], average_of[pair.level], difference, {},
                                              curve_of(count + k), false, scratch + spare);
      if (near_learns) {
        const Tile<C> level = tile_at(scratch, near_gradient_at[near][pair.level], place, op.factors[pair.far]);
        if (has_gradient[pair.level])
          add_repeated(read_only(difference), level, 1, C(1), scratch + spare);
        else
          std::copy(difference.data, difference.data + difference.rows * difference.columns, level.data);
        has_gradient[pair.level] = true;
      }
      if (first)
        here.addition[pair.far] = {read_only(difference), 1, 1};
      else if (far_learns)
        add_repeated(read_only(difference), addition_tile(pair.far, place, here, scratch), 1, C(1), scratch + spare);
    }
    // From the coarsest level down: what a level is asked for, its parent is asked for in equal parts.
    for (int l = depth - 1; l >= 0; --l) {
      if (!has_gradient[l]) continue;
      const Level& level = levels[l];
      const Tile<const C> from = read_only(tile_at(scratch, near_gradient_at[near][l], place, level.factor));
      const C share = C(1) / static_cast<C>(level.ratio * level.ratio);
      if (level.parent < 0) {
        if (level.ratio == 2 && here.addition[near].ratio == 0)
          here.addition[near] = {from, 2, -share};
        else
          add_repeated(from, addition_tile(near, place, here, scratch), level.ratio, -share, scratch + spare);
        continue;
      }
      const int64_t factor = levels[level.parent].factor;
      const Tile<C> to = tile_at(scratch, near_gradient_at[near][level.parent], place, factor);
      if (!has_gradient[level.parent]) std::fill(to.data, to.data + to.rows * to.columns, C(0));
      has_gradient[level.parent] = true;
      add_repeated(from, to, level.ratio, share, scratch + spare);
    }
  }

  // Everything at one place.
  void meet(const Place& place, Meeting<C>& here, double* sums, C* scratch) const {
    int coarsest = -1;
    for (int i = 0; i < count; ++i)
      if (here.counted[i]) coarsest = std::max(coarsest, level_of[i]);
    if (coarsest >= 0) make_pyramid(place.m, place, scratch, level_at, coarsest);
    for (int i = 0; i < count; ++i) {
      if (active(i, place.m)) here.gradient[i] = gradient_tile(i, place, scratch);
      if (here.counted[i]) here.pred[i] = prediction(i, place, scratch);
      here.addition[i] = {};
    }
    for (int i = 0; i < count; ++i)
      if (here.counted[i] && !near_chain[i].empty()) agree(i, place, here, sums, scratch);
    for (int i = 0; i < count; ++i) {
      if (!active(i, place.m)) continue;
      const Tile<C>& gradient = here.gradient[i];
      if (here.counted[i]) {
        const Tile<C> target = tile_at(scratch, level_at[level_of[i]], place, op.factors[i]);
        sums[i] += loss_and_gradient<C>(op.kind, here.pred[i], read_only(target), gradient, here.addition[i],
                                        curve_of(i), reads_in_place(i), scratch + spare);
      } else if (gradient.data) {
        for (int64_t r = 0; r < gradient.rows; ++r)
          std::fill(gradient.row(r), gradient.row(r) + gradient.columns, C(0));
      }
      store_gradient(i, place, gradient);
    }
  }

  MultiHorizonLossResult run() const {
    const size_t terms = coefficient.size();
    const int64_t units = positions == 0 ? 0 : batch * last * tiling.chunks;
    // A row of sums per unit, added in order at the end: the result does not depend on which thread did what.
    std::vector<double> sums(units * terms, 0.0);
    std::vector<Meeting<C>> meetings(op.threads, Meeting<C>(count));
    parallel_for<C>(op.threads, units, scratch_size, [&](int64_t unit, C* scratch) {
      const int64_t chunk = unit % tiling.chunks, m = unit / tiling.chunks % last, b = unit / tiling.chunks / last;
      const int64_t top = chunk * tiling.chunk_rows, bottom = std::min(tiling.height, top + tiling.chunk_rows);
      Meeting<C>& here = meetings[omp_get_thread_num()];
      for (int i = 0; i < count; ++i) here.counted[i] = counted(i, b, m);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = top; y < bottom; y += tiling.rows)
          for (int64_t x = 0; x < tiling.width; x += tiling.columns) {
            const Place place{b, m, c, y, x, std::min(tiling.rows, tiling.height - y),
                              std::min(tiling.columns, tiling.width - x)};
            meet(place, here, sums.data() + unit * terms, scratch);
          }
      if (streams) finish_streaming();
    });
    MultiHorizonLossResult result;
    for (size_t k = 0; k < terms; ++k) {
      double sum = 0;
      for (int64_t unit = 0; unit < units; ++unit) sum += sums[unit * terms + k];
      const double mean = counts[k] ? sum / static_cast<double>(counts[k]) : 0;
      const bool horizon = k < preds.size();
      (horizon ? result.per_horizon : result.agreement).push_back(mean);
      (horizon ? result.counts : result.agreement_counts).push_back(counts[k]);
      result.total += (horizon ? op.weights[k] : op.pair_weights[k - count]) * mean;
    }
    return result;
  }
};

}  // namespace

MultiHorizonLossResult multi_horizon_loss(const MultiHorizonLoss& op) {
  const bool is_double = op.video.dtype == DType::float64 || op.preds[0].dtype == DType::float64;
  return in_precision(is_double, [&](auto zero) { return Loss<decltype(zero)>(op).run(); });
}

}  // namespace mfwm::cpu
