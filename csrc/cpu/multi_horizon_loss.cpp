// multi_horizon_loss on the CPU, losses and gradients in one frame-major pass; bindings.cpp calls the function at the
// end of this file. A unit of work loads a tile of frame m and computes everything that concerns it while it is in a core's caches:
// its pyramid, the losses of the predictions of it (those at positions m - k_i), the consistency between them, and
// their gradients. So video, predictions and gradients cross memory once each.
#include <cmath>
#include <cstring>

#include "weighted_loss.h"

namespace mfwm::cpu {
namespace {

struct Pair {
  int near, far;
  int level;       // the far factor's level in the near horizon's chain
  bool exclusive;  // no other pair adds to the far horizon's gradient or to that level's
};

// Predictions of one horizon, or their gradients: means, or log-scales. Without an array there are none.
struct Part {
  Frames frames;
  bool in_place = false;  // read or written in the tensor; otherwise a tile of C is copied
  int64_t copy_at = 0;    // the offset of that tile in a thread's scratch
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
  const int count = static_cast<int>(op.preds.size());
  // Features: the channels of a pixel are adjacent in all tensors. A frame is then treated as an image of one channel,
  // whose rows are pixels and whose columns are channels; averaging adds whole rows.
  const bool are_features = has_channels_innermost();
  const int64_t grid_width = op.video.size[4];
  const int64_t batch = op.video.size[0], frames = op.video.size[1], channels = are_features ? 1 : op.video.size[2];
  const int64_t positions = op.preds[0].size[1];
  // Horizon i predicts frames offset .. positions - 1 + offset; predictions beyond the video get a zero gradient.
  const int64_t target_frames = std::max(frames, positions + op.offsets.back());
  Frames video = frames_of(op.video, 1, 0);
  std::vector<Part> preds, gradients, log_scales, log_scale_gradients;
  std::vector<Level> chain;                    // the video's, base 1
  std::vector<int> level_of;                   // horizon -> level of that chain
  std::vector<std::vector<Level>> near_chain;  // horizon i -> the chain of its predictions, base f_i
  std::vector<Pair> pairs;
  Tiling tiling;
  std::vector<double> coefficient;  // per term: one per horizon, then one per pair
  std::vector<int64_t> counts;      // elements per term
  // Write gradients with non-temporal stores if they are larger than the caches: an ordinary store would first read the
  // cache line that it overwrites.
  bool streams = false;
  // All predictions and gradients are bf16, gradients are written in place, and targets are split (lanes.h).
  bool is_split = std::is_same_v<C, float>;
  // In addition, the video is uint8 and used without conversion to a tile of C: pooled and compared as bytes.
  bool from_bytes;
  // The video is contiguous elements of C and used without a copy.
  bool video_in_place;
  // Offsets into a thread's scratch, in elements.
  int64_t scratch_size = 0, row_scratch, base, difference_at;
  std::vector<int64_t> level_at, other_level_at, addition_at, motion_at;
  std::vector<std::vector<int64_t>> near_at, near_gradient_at;

  Loss(const MultiHorizonLoss& op_, int threads_)
      : op(op_),
        threads(threads_),
        chain(chain_of(1, op_.factors)),
        near_chain(op_.factors.size()),
        tiling(video.height, video.width, row_step(), column_step(), batch * frames,
               target_pixels<C>(op_.factors, channels_at_once(), has_distributions() ? 4 : 2, 1)) {
    for (int i = 0; i < count; ++i) {
      preds.push_back({frames_of(op.preds[i], op.factors[i], patch_size(i))});
      gradients.push_back({frames_of(op.gradients[i], op.factors[i], patch_size(i))});
      log_scales.push_back({frames_of(log_scales_of(op.preds[i], i), op.factors[i], patch_size(i))});
      log_scale_gradients.push_back({frames_of(log_scales_of(op.gradients[i], i), op.factors[i], patch_size(i))});
      is_split = is_split && op.preds[i].dtype == DType::bfloat16 && !is_weighted(i) &&
                 (!op.gradients[i] || gradients[i].frames.is_plain_image());
    }
    for (int i = 0; i < count; ++i) {
      const bool converts_bf16 = std::is_same_v<C, float> && !is_weighted(i);
      preds[i].in_place = !op.residual && can_be_in_place(preds[i], converts_bf16);
      log_scales[i].in_place = can_be_in_place(log_scales[i], false);
      gradients[i].in_place = is_split || can_be_in_place(gradients[i], false);
      log_scale_gradients[i].in_place = can_be_in_place(log_scale_gradients[i], false);
      level_of.push_back(index_of(chain, op.factors[i]));
      std::vector<int64_t> far;
      for (size_t k = 0; k < op.pairs.size(); k += 2)
        if (op.pairs[k] == i) far.push_back(op.factors[op.pairs[k + 1]]);
      near_chain[i] = chain_of(op.factors[i], far);
    }
    from_bytes = is_split && !are_features && op.video.dtype == DType::uint8 && video.is_plain_image();
    video_in_place = !is_split && op.scale == 1 && op.shift == 0 && video.is_plain_image() &&
                     op.video.dtype == dtype_of<C>;
    for (int i = 0; i < count; ++i) from_bytes = from_bytes && (op.factors[i] > 1 || preds[i].in_place);
    for (const Level& level : chain)
      from_bytes = from_bytes && (level.factor == 1 || level.ratio == 2 || !is_from_frame(level));
    for (size_t k = 0; k < op.pairs.size(); k += 2) {
      const int near = static_cast<int>(op.pairs[k]), far = static_cast<int>(op.pairs[k + 1]);
      pairs.push_back({near, far, index_of(near_chain[near], op.factors[far]), true});
    }
    for (Pair& pair : pairs)
      for (const Pair& other : pairs)
        if (&other != &pair && (other.far == pair.far || other.near == pair.far ||
                                (other.near == pair.near && other.level == pair.level)))
          pair.exclusive = false;
    int64_t bytes = 0;
    for (const Part& gradient : gradients) {
      const Frames& to = gradient.frames;
      if (to.array) bytes += batch * positions * channels * to.height * to.width * size_of(to.array.dtype);
    }
    streams = bytes > int64_t(16) << 20;
    lay_out_scratch();
    count_elements();
  }

  bool has_distributions() const { return std::any_of(op.kinds.begin(), op.kinds.end(), is_distribution); }
  // Whether the horizon's loss is that of weighted_loss.h.
  bool is_weighted(int i) const { return op.motion_gain > 0 || is_distribution(op.kinds[i]); }
  bool needs_current_frame() const { return op.residual || op.motion_gain > 0; }

  int64_t patch_size(int i) const { return op.patch_sizes.empty() ? 0 : op.patch_sizes[i]; }
  // The array of horizon i from its log-scales on; none if it has none.
  Array log_scales_of(Array array, int i) const {
    if (!array || !is_distribution(op.kinds[i])) return {};
    const int64_t patch = patch_size(i), planes = op.video.size[2];
    const int64_t first = patch == 0 ? planes * array.stride[2] : patch * patch * planes * array.stride[3];
    array.data = static_cast<char*>(array.data) + first * size_of(array.dtype);
    return array;
  }
  // Frames that are smaller than the video by `factor`.
  Frames frames_of(Array array, int64_t factor, int64_t patch) const {
    const int64_t height = op.video.size[3] / factor, width = op.video.size[4] / factor;
    if (!are_features) return {array, patch, channels, height, width};
    array.stride[3] = width > 1 ? array.stride[4] : array.stride[3], array.stride[4] = 1;
    return {array, 0, 1, height * width, op.video.size[2]};
  }
  // True if the channels of every pixel are adjacent, and pixels evenly spaced, in all tensors. Fewer channels than two
  // vectors are faster as planes.
  bool has_channels_innermost() const {
    const auto is_innermost = [&](const Array& array, int64_t factor) {
      const int64_t height = op.video.size[3] / factor, width = op.video.size[4] / factor;
      const bool is_even = height == 1 || width == 1 || array.stride[3] == width * array.stride[4];
      return !array || (array.stride[2] == 1 && is_even);
    };
    if (!op.patch_sizes.empty() || op.video.size[2] < 16 || !is_innermost(op.video, 1)) return false;
    for (int i = 0; i < count; ++i)
      if (!is_innermost(op.preds[i], op.factors[i]) || !is_innermost(op.gradients[i], op.factors[i])) return false;
    return true;
  }
  // The steps of a tile. The columns of features are channels: whole cache lines of them.
  int64_t row_step() const {
    const int64_t step = common_multiple(op.factors);
    return are_features && step > 1 ? step * grid_width : step;
  }
  int64_t column_step() const { return are_features ? 32 : common_multiple(op.factors); }
  // By how much tiles of this factor have fewer rows and fewer columns.
  MFWM_INLINE int64_t row_ratio(int64_t factor) const { return are_features ? factor * factor : factor; }
  MFWM_INLINE int64_t column_ratio(int64_t factor) const { return are_features ? 1 : factor; }

  // Contiguous elements of C, or of bf16 where that is converted on the way.
  static bool can_be_in_place(const Part& part, bool converts_bf16) {
    const DType dtype = part.frames.array.dtype;
    return part.frames.is_plain_image() && (dtype == dtype_of<C> || (converts_bf16 && dtype == DType::bfloat16));
  }

  // The channels of a token share its cache lines, so read and write all channels of a tile of tokens together.
  int64_t channels_at_once() const { return op.patch_sizes.empty() ? 1 : channels; }
  int64_t plane_of(int64_t factor) const {
    return padded<C>((tiling.rows / row_ratio(factor)) * (tiling.columns / column_ratio(factor)));
  }
  int64_t reserve(int64_t factor, int64_t planes = 1) {
    const int64_t at = scratch_size;
    scratch_size += planes * plane_of(factor);
    return at;
  }

  void lay_out_scratch() {
    row_scratch = scratch_size;
    scratch_size += 2 * padded<C>(tiling.columns);
    base = reserve(1);
    for (const Level& level : chain) level_at.push_back(level.factor == 1 ? base : reserve(level.factor));
    // A second pyramid: of the frame at which the predictions were computed.
    if (needs_current_frame())
      for (const Level& level : chain) other_level_at.push_back(reserve(level.factor));
    near_at.resize(count);
    near_gradient_at.resize(count);
    addition_at.resize(count);
    int64_t finest = 0;  // the smallest far factor
    for (int i = 0; i < count; ++i) {
      for (Part* part : {&preds[i], &gradients[i], &log_scales[i], &log_scale_gradients[i]})
        if (part->frames.array && !part->in_place) part->copy_at = reserve(op.factors[i], channels_at_once());
      if (op.motion_gain > 0) motion_at.push_back(reserve(op.factors[i]));
      for (const Level& level : near_chain[i]) {
        near_at[i].push_back(reserve(level.factor));
        near_gradient_at[i].push_back(reserve(level.factor));
      }
    }
    for (const Pair& pair : pairs) {
      for (int i : {pair.near, pair.far})
        if (addition_at[i] == 0) addition_at[i] = reserve(op.factors[i]);
      finest = finest == 0 ? op.factors[pair.far] : std::min(finest, op.factors[pair.far]);
    }
    if (finest > 0) difference_at = reserve(finest);
  }

  // Whether horizon i has a position that predicts frame m, and whether that prediction counts.
  bool active(int i, int64_t m) const { return m >= op.offsets[i] && m - op.offsets[i] < positions; }
  bool counted(int i, int64_t b, int64_t m) const {
    return m < frames && active(i, m) && same_segment(op.segment_ids, b, m - op.offsets[i], m) &&
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
    if (term < preds.size()) return static_cast<int64_t>(term) * array.stride[0];
    const Pair& pair = pairs[term - count];
    return array.rank == 2 ? pair.near * array.stride[0] + pair.far * array.stride[1] : pair.far * array.stride[0];
  }
  double weight_of(size_t term) const {
    const Array& array = term < preds.size() ? op.horizon_weights : op.consistency_weights;
    return number_at(array, offset_in(array, term));
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
      counts[k] *= channels * preds[i].frames.height * preds[i].frames.width;
      const double mean = weight_of(k) / static_cast<double>(counts[k]);
      coefficient.push_back(counts[k] == 0 ? 0 : std::isnan(mean) ? std::numeric_limits<double>::quiet_NaN() : mean);
    }
  }

  // Whether a level of the video's chain is averaged directly from the frame.
  bool is_from_frame(const Level& level) const { return level.parent < 0 || chain[level.parent].factor == 1; }

  // A tile of one channel of frame m of clip b, at pixel y, x.
  struct Place {
    int64_t b, m, c, y, x, rows, columns;
  };

  MFWM_INLINE Tile<C> tile_at(C* scratch, int64_t at, const Place& place, int64_t factor, bool split = false) const {
    const int64_t rows = place.rows / row_ratio(factor), columns = place.columns / column_ratio(factor);
    return {scratch + at, columns, rows, columns, split};
  }
  // The curve of a term. `weight` is that of the position.
  MFWM_INLINE Curve<C> curve_of(size_t k, double weight = 1) const {
    const LossKind kind = k < preds.size() ? op.kinds[k] : kind_of_means(op.kinds[pairs[k - count].far]);
    return {kind, static_cast<C>(weight * coefficient[k] * omitted_factor(kind)), static_cast<C>(op.delta),
            static_cast<C>(op.eps)};
  }

  // The offset of the place's channel in a buffer with all channels that are processed at once.
  MFWM_INLINE int64_t plane_at(const Place& place, int64_t factor) const {
    return channels_at_once() == 1 ? 0 : place.c * plane_of(factor);
  }

  MFWM_INLINE Tile<const uint8_t> bytes_at(int64_t t, const Place& place) const {
    return {static_cast<const uint8_t*>(video.array.data) + video.image_offset(place.b, t, place.c, place.y, place.x),
            video.array.stride[3], place.rows, place.columns};
  }

  // to = the average of `from` at a level.
  template <class S>
  MFWM_INLINE void pool(const Tile<const S>& from, const Tile<C>& to, const Level& level, C* scratch) const {
    if (are_features)
      average_pixels(from, to, level.ratio, grid_width / level.factor * level.ratio);
    else
      average(from, to, level.ratio, scratch + row_scratch);
  }
  // to += weight * `from`, which is at a level.
  MFWM_INLINE void unpool(const Tile<const C>& from, const Tile<C>& to, const Level& level, C weight,
                          C* scratch) const {
    if (are_features)
      add_repeated_pixels(from, to, level.ratio, weight, grid_width / level.factor * level.ratio);
    else
      add_repeated(from, to, level.ratio, weight, scratch + row_scratch);
  }

  // The tile of frame t at level l of a pyramid in scratch.
  MFWM_INLINE Tile<const C> level_tile(int64_t t, const Place& place, C* scratch, const std::vector<int64_t>& at, int l,
                                       bool split) const {
    if (chain[l].factor == 1 && video_in_place) return frame_at(t, place);
    return read_only(tile_at(scratch, at[l], place, chain[l].factor, split));
  }
  MFWM_INLINE Tile<const C> frame_at(int64_t t, const Place& place) const {
    return {static_cast<const C*>(video.array.data) + video.image_offset(place.b, t, place.c, place.y, place.x),
            video.array.stride[3], place.rows, place.columns};
  }

  // Compute the pyramid of frame t at the place, up to the level `coarsest`.
  MFWM_SIMD void build_pyramid(int64_t t, const Place& place, C* scratch, const std::vector<int64_t>& at,
                              int coarsest, bool split) const {
    const C scale = static_cast<C>(op.scale), shift = static_cast<C>(op.shift);
    const Tile<C> bottom = tile_at(scratch, chain[0].factor == 1 ? at[0] : base, place, 1, split);
    const bool bytes = split && from_bytes;
    if (split && !bytes) video.load_split(bottom, place.b, t, place.c, place.y, place.x, scale, shift);
    if (!split && !video_in_place)
      video.load(bottom.data, place.b, t, place.c, place.y, place.x, bottom.rows, bottom.columns, scale, shift);
    if (!split) video.prefetch_next(place.b, t, place.c, place.y, place.x, bottom.rows, bottom.columns);
    for (int l = 0; l <= coarsest; ++l) {
      const Level& level = chain[l];
      if (level.factor == 1) continue;
      if constexpr (std::is_same_v<C, float>)
        if (bytes && is_from_frame(level)) {
          average_bytes(bytes_at(t, place), tile_at(scratch, at[l], place, level.factor, true), scale, shift,
                        chain[0].factor > 1);
          continue;
        }
      const Tile<const C> from = level.parent >= 0  ? level_tile(t, place, scratch, at, level.parent, split)
                                 : video_in_place ? frame_at(t, place)
                                                  : read_only(bottom);
      pool(from, tile_at(scratch, at[l], place, level.factor, split), level, scratch);
    }
  }

  // The tile of horizon i's predictions of the frame, or of their gradients: in place, or in scratch.
  MFWM_INLINE AnyTile<C> tile_of(const Part& part, int i, const Place& place, C* scratch) const {
    if (!part.frames.array) return {};
    const int64_t factor = op.factors[i], n = place.m - op.offsets[i];
    const Tile<C> tile = tile_at(scratch, part.copy_at + plane_at(place, factor), place, factor);
    if (!part.in_place) return tile;
    const int64_t y = place.y / row_ratio(factor), x = place.x / column_ratio(factor);
    return {part.frames.array, part.frames.image_offset(place.b, n, place.c, y, x), tile};
  }

  // Fill the tile if it is a copy.
  MFWM_INLINE void load(const Part& part, int i, const Place& place, const AnyTile<C>& tile) const {
    if (!tile.data || part.in_place) return;
    const int64_t factor = op.factors[i], n = place.m - op.offsets[i];
    const int64_t y = place.y / row_ratio(factor), x = place.x / column_ratio(factor);
    C* to = static_cast<C*>(tile.data);
    if (channels_at_once() == 1)
      part.frames.load(to, place.b, n, place.c, y, x, tile.rows, tile.columns);
    else if (place.c == 0)
      part.frames.load_channels(to, plane_of(factor), place.b, n, y, x, tile.rows, tile.columns);
  }

  // Write the tile to its tensor if it is a copy.
  MFWM_INLINE void store(const Part& part, int i, const Place& place, const AnyTile<C>& tile) const {
    if (!tile.data || part.in_place) return;
    const int64_t factor = op.factors[i], n = place.m - op.offsets[i];
    const int64_t y = place.y / row_ratio(factor), x = place.x / column_ratio(factor);
    const C* from = static_cast<const C*>(tile.data) - plane_at(place, factor);
    if (channels_at_once() == 1)
      part.frames.store(from, place.b, n, place.c, y, x, tile.rows, tile.columns);
    else if (place.c == channels - 1)
      part.frames.store_channels(from, plane_of(factor), place.b, n, y, x, tile.rows, tile.columns);
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
    const AnyTile<C> means = tile_of(preds[i], i, place, scratch);
    load(preds[i], i, place, means);
    if (!needs_current_frame()) return means;
    const int64_t n = place.m - op.offsets[i];
    build_pyramid(n, place, scratch, other_level_at, level_of[i], false);
    const Tile<const C> current = level_tile(n, place, scratch, other_level_at, level_of[i], false);
    if (op.motion_gain > 0) {
      const Tile<const C> target = level_tile(place.m, place, scratch, level_at, level_of[i], false);
      motion_weight(target, current, static_cast<C>(op.motion_gain),
                    tile_at(scratch, motion_at[i], place, op.factors[i]));
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
    const Tile<C> tile = tile_at(scratch, addition_at[i], place, op.factors[i]);
    Addition<C>& addition = state.addition[i];
    if (addition.ratio == 1) return tile;
    std::fill(tile.data, tile.data + tile.rows * tile.columns, C(0));
    if (addition.ratio == 2) add_repeated(addition.tile, tile, 2, addition.weight, scratch + row_scratch);
    addition = {read_only(tile), 1, 1};
    return tile;
  }

  // Losses of the pairs whose near side is `near`; accumulates their gradients per level of near's chain and per far
  // horizon.
  MFWM_SIMD void compare_pairs(int near, const Place& place, TileState<C>& state, double* sums, C* scratch) const {
    const std::vector<Level>& levels = near_chain[near];
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
      const Tile<C> to = tile_at(scratch, near_at[near][l], place, level.factor);
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
      const Tile<C> level_gradient = tile_at(scratch, near_gradient_at[near][pair.level], place, op.factors[pair.far]);
      // Both gradients may read the same tile: the far gradient is computed before backpropagate_levels changes it.
      const bool writes_level = near_learns && !has_gradient[pair.level] && (pair.exclusive || !far_learns);
      Tile<C> difference{};
      if (writes_level)
        difference = level_gradient;
      else if (near_learns || far_learns)
        difference = tile_at(scratch, is_first ? addition_at[pair.far] : difference_at, place, op.factors[pair.far]);
      sums[count + k] += loss_and_gradient<C>(pred[pair.far], {average_of[pair.level]}, difference, {},
                                              curve_of(count + k), 0, false);
      if (near_learns && !writes_level) {
        if (has_gradient[pair.level])
          add_repeated(read_only(difference), level_gradient, 1, C(1), scratch + row_scratch);
        else
          std::copy(difference.data, difference.data + difference.rows * difference.columns, level_gradient.data);
      }
      has_gradient[pair.level] |= near_learns;
      if (is_first)
        state.addition[pair.far] = {read_only(difference), 1, 1};
      else if (far_learns)
        add_repeated(read_only(difference), addition_tile(pair.far, place, state, scratch), 1, C(1),
                     scratch + row_scratch);
    }
  }

  // Backpropagate the level gradients into an addition to near's own gradient, coarsest level first; each level spreads
  // its gradient evenly over its parent's pixels.
  MFWM_SIMD void backpropagate_levels(int near, const Place& place, TileState<C>& state, C* scratch) const {
    const std::vector<Level>& levels = near_chain[near];
    std::vector<char>& has_gradient = state.has_gradient[near];
    for (int l = static_cast<int>(levels.size()) - 1; l >= 0; --l) {
      if (!has_gradient[l]) continue;
      const Level& level = levels[l];
      const Tile<const C> from = read_only(tile_at(scratch, near_gradient_at[near][l], place, level.factor));
      const C share = C(1) / static_cast<C>(level.ratio * level.ratio);
      if (level.parent < 0) {
        if (level.ratio == 2 && state.addition[near].ratio == 0 && !are_features)
          state.addition[near] = {from, 2, -share};
        else
          unpool(from, addition_tile(near, place, state, scratch), level, -share, scratch);
        continue;
      }
      const int64_t factor = levels[level.parent].factor;
      const Tile<C> to = tile_at(scratch, near_gradient_at[near][level.parent], place, factor);
      if (!has_gradient[level.parent]) std::fill(to.data, to.data + to.rows * to.columns, C(0));
      has_gradient[level.parent] = true;
      unpool(from, to, level, share, scratch);
    }
  }

  // The losses of horizon i at one place, times the weight of the position. Also writes the gradients.
  MFWM_INLINE double compare(int i, const Place& place, TileState<C>& state, C* scratch) const {
    Target<C> target{level_tile(place.m, place, scratch, level_at, level_of[i], is_split)};
    const AnyTile<C>& gradient = state.gradient[i];
    const Curve<C> curve = curve_of(i, state.weight[i]);
    if (is_weighted(i)) {
      const AnyTile<C> log_scale = tile_of(log_scales[i], i, place, scratch);
      const AnyTile<C> slope = tile_of(log_scale_gradients[i], i, place, scratch);
      load(log_scales[i], i, place, log_scale);
      WeightedTiles<C> tiles{state.pred[i].template as<const C>(), log_scale.template as<const C>(), target.tile};
      if (op.motion_gain > 0) tiles.weight = read_only(tile_at(scratch, motion_at[i], place, op.factors[i]));
      if (state.addition[i].ratio == 2) addition_tile(i, place, state, scratch);
      tiles.addition = state.addition[i].tile;
      tiles.gradient = gradient.template as<C>(), tiles.log_scale_gradient = slope.template as<C>();
      const double sum = weighted_loss(tiles, curve, static_cast<C>(op.beta));
      store(log_scale_gradients[i], i, place, slope);
      return sum * state.weight[i];
    }
    if (from_bytes && op.factors[i] == 1)
      target = {target.tile, bytes_at(place.m, place), static_cast<C>(op.scale), static_cast<C>(op.shift)};
    const bool stream = streams && gradients[i].in_place && gradient.is_aligned();
    const int64_t next = preds[i].in_place ? preds[i].frames.to_next(state.pred[i].rows, state.pred[i].columns) : 0;
    return state.weight[i] *
           loss_and_gradient<C>(state.pred[i], target, gradient, state.addition[i], curve, next, stream);
  }

  // Compute all losses and gradients at one place.
  void process(const Place& place, TileState<C>& state, double* sums, C* scratch) const {
    int coarsest = -1;
    for (int i = 0; i < count; ++i)
      if (state.counted[i]) coarsest = std::max(coarsest, level_of[i]);
    if (coarsest >= 0) build_pyramid(place.m, place, scratch, level_at, coarsest, is_split);
    for (int i = 0; i < count; ++i) {
      if (active(i, place.m)) state.gradient[i] = tile_of(gradients[i], i, place, scratch);
      if (state.counted[i]) state.pred[i] = prediction(i, place, scratch);
      state.addition[i] = {};
    }
    for (int i = 0; i < count; ++i)
      if (state.counted[i] && !near_chain[i].empty()) compare_pairs(i, place, state, sums, scratch);
    // Last horizon first, because a far gradient must be computed before that of its near horizon.
    for (int i = count - 1; i >= 0; --i) {
      if (!active(i, place.m)) continue;
      if (state.counted[i]) {
        if (!near_chain[i].empty()) backpropagate_levels(i, place, state, scratch);
        sums[i] += compare(i, place, state, scratch);
      } else {
        const AnyTile<C> slope = tile_of(log_scale_gradients[i], i, place, scratch);
        set_zero(state.gradient[i]), set_zero(slope);
        store(log_scale_gradients[i], i, place, slope);
      }
      store(gradients[i], i, place, state.gradient[i]);
    }
  }

  void run() const {
    const size_t terms = coefficient.size();
    const int64_t units = positions == 0 ? 0 : batch * target_frames * tiling.chunks;
    // Each unit has a row of sums. Adding the rows in order at the end makes the result independent of the threads.
    std::vector<double> sums(units * terms, 0.0);
    std::vector<TileState<C>> states(threads, TileState<C>(near_chain));
    parallel_for<C>(threads, units, scratch_size, [&](int64_t unit, C* scratch) {
      const int64_t chunk = unit % tiling.chunks, frame = unit / tiling.chunks;
      const int64_t m = frame % target_frames, b = frame / target_frames;
      const int64_t top = chunk * tiling.chunk_rows, bottom = std::min(tiling.height, top + tiling.chunk_rows);
      TileState<C>& state = states[omp_get_thread_num()];
      for (int i = 0; i < count; ++i) {
        state.counted[i] = counted(i, b, m);
        state.weight[i] = state.counted[i] ? position_weight(i, b, m) : 0;
      }
      for (int64_t first = 0; first < channels; first += channels_at_once())
        for (int64_t y = top; y < bottom; y += tiling.rows)
          for (int64_t x = 0; x < tiling.width; x += tiling.columns)
            for (int64_t c = first; c < first + channels_at_once(); ++c) {
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
      const Array &means = k < preds.size() ? op.per_horizon : op.consistency,
                  &numbers = k < preds.size() ? op.counts : op.consistency_counts;
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
