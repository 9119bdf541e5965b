// Where multi_horizon_loss.cpp finds its tiles: those of the video, of the predictions and of their gradients, each in
// its tensor or copied to a thread's scratch, and the tiles that exist in scratch alone.
#pragma once

#include "weighted_loss.h"

namespace mfwm::cpu {

// Predictions of one horizon, or their gradients: means, or log-scales. Without an array there are none.
struct Part {
  Frames frames;
  bool in_place = false;  // read or written in the tensor; otherwise a tile of C is copied
  int64_t copy_at = 0;    // the offset of that tile in a thread's scratch
};

// A tile of one channel of frame m of clip b, at pixel y, x.
struct Place {
  int64_t b, m, c, y, x, rows, columns;
};

template <class C>
struct LossLayout {
  const MultiHorizonLoss& op;
  const int count = static_cast<int>(op.preds.size());
  // Features: the channels of a pixel are adjacent in all tensors. A frame is then treated as an image of one channel,
  // whose rows are pixels and whose columns are channels; averaging adds whole rows.
  const bool are_features = has_channels_innermost();
  const int64_t grid_width = op.video.size[4];
  const int64_t batch = op.video.size[0], frames = op.video.size[1], channels = are_features ? 1 : op.video.size[2];
  const int64_t positions = op.preds[0].size[1];
  const bool needs_current_frame = op.residual || op.motion_gain > 0;
  Frames video = frames_of(op.video, 1, 0);
  std::vector<Part> preds, gradients, log_scales, log_scale_gradients;
  std::vector<Level> chain;                    // the video's, base 1
  std::vector<int> level_of;                   // horizon -> level of that chain
  std::vector<std::vector<Level>> near_chain;  // horizon i -> the chain of its predictions, base f_i
  Tiling tiling;
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

  explicit LossLayout(const MultiHorizonLoss& op_)
      : op(op_),
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
    lay_out_scratch();
  }

  // Whether the horizon's loss is that of weighted_loss.h.
  bool is_weighted(int i) const { return op.motion_gain > 0 || is_distribution(op.kinds[i]); }
  // Whether a level of the video's chain is averaged directly from the frame.
  bool is_from_frame(const Level& level) const { return level.parent < 0 || chain[level.parent].factor == 1; }

  // By how much tiles of this factor have fewer rows and fewer columns.
  MFWM_INLINE int64_t row_ratio(int64_t factor) const { return are_features ? factor * factor : factor; }
  MFWM_INLINE int64_t column_ratio(int64_t factor) const { return are_features ? 1 : factor; }
  // The channels of a token share its cache lines, so read and write all channels of a tile of tokens together.
  int64_t channels_at_once() const { return op.patch_sizes.empty() ? 1 : channels; }
  int64_t plane_of(int64_t factor) const {
    return padded<C>((tiling.rows / row_ratio(factor)) * (tiling.columns / column_ratio(factor)));
  }
  // The offset of the place's channel in a buffer with all channels that are processed at once.
  MFWM_INLINE int64_t plane_at(const Place& place, int64_t factor) const {
    return channels_at_once() == 1 ? 0 : place.c * plane_of(factor);
  }

  // A tile in scratch.
  MFWM_INLINE Tile<C> tile_at(C* scratch, int64_t at, const Place& place, int64_t factor, bool split = false) const {
    const int64_t rows = place.rows / row_ratio(factor), columns = place.columns / column_ratio(factor);
    return {scratch + at, columns, rows, columns, split};
  }
  // The tile of frame t in the video: of bytes, or of elements of C.
  MFWM_INLINE Tile<const uint8_t> bytes_at(int64_t t, const Place& place) const {
    return {static_cast<const uint8_t*>(video.array.data) + video.image_offset(place.b, t, place.c, place.y, place.x),
            video.array.stride[3], place.rows, place.columns};
  }
  MFWM_INLINE Tile<const C> frame_at(int64_t t, const Place& place) const {
    return {static_cast<const C*>(video.array.data) + video.image_offset(place.b, t, place.c, place.y, place.x),
            video.array.stride[3], place.rows, place.columns};
  }
  // The tile of frame t at level l of a pyramid in scratch.
  MFWM_INLINE Tile<const C> level_tile(int64_t t, const Place& place, C* scratch, const std::vector<int64_t>& at, int l,
                                       bool split) const {
    if (chain[l].factor == 1 && video_in_place) return frame_at(t, place);
    return read_only(tile_at(scratch, at[l], place, chain[l].factor, split));
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

 private:
  bool has_distributions() const { return std::any_of(op.kinds.begin(), op.kinds.end(), is_distribution); }
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
  // Contiguous elements of C, or of bf16 where that is converted on the way.
  static bool can_be_in_place(const Part& part, bool converts_bf16) {
    const DType dtype = part.frames.array.dtype;
    return part.frames.is_plain_image() && (dtype == dtype_of<C> || (converts_bf16 && dtype == DType::bfloat16));
  }

  // The steps of a tile. The columns of features are channels: whole cache lines of them.
  int64_t row_step() const {
    const int64_t step = common_multiple(op.factors);
    return are_features && step > 1 ? step * grid_width : step;
  }
  int64_t column_step() const { return are_features ? 32 : common_multiple(op.factors); }

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
    if (needs_current_frame)
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
        finest = finest == 0 ? level.factor : std::min(finest, level.factor);
      }
    }
    for (int64_t i : op.pairs)
      if (addition_at[i] == 0) addition_at[i] = reserve(op.factors[i]);
    if (finest > 0) difference_at = reserve(finest);
  }
};

}  // namespace mfwm::cpu
