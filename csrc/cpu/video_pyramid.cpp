// video_pyramid on the CPU: tile by tile, averaging each factor from a finer one while that is in cache. bindings.cpp
// calls the function at the end.
#include "pyramid.h"

namespace mfwm::cpu {
namespace {

template <class C>
struct Pyramid {
  const VideoPyramid& op;
  const int64_t batch = op.video.size[0], frames = op.video.size[1], channels = op.video.size[2];
  // The channels of a token share its cache lines, so write all channels of a token at once.
  const int64_t channels_at_once = op.patch_sizes.empty() ? 1 : channels;
  Frames video{op.video, 0, channels, op.video.size[3], op.video.size[4]};
  std::vector<Frames> outputs;
  // Plain images of C or bf16 are stored from whole tiles, which are split (pyramid.h) if they are bf16.
  bool stores_tiles = op.patch_sizes.empty(), is_split = stores_tiles;
  // Per output: whether to store it with non-temporal stores.
  std::vector<bool> non_temporal;
  // The output that is a copy of the split frame, stored while the frame is loaded: stores then hide behind the
  // conversion of pixels. -1: none.
  int copied = -1;
  std::vector<Level> chain;
  Tiling tiling;
  // Offsets into a thread's scratch, in elements: two rows for averaging, the frame's tile, and a tile per coarser
  // level.
  int64_t scratch_size = 0;
  std::vector<int64_t> level_at;

  explicit Pyramid(const VideoPyramid& op_)
      : op(op_),
        chain(chain_of(1, op_.factors)),
        tiling(video.height, video.width, common_multiple(op_.factors), common_multiple(op_.factors), batch * frames,
               target_pixels<C>(op_.factors, channels_at_once, 1, channels_at_once)) {
    for (size_t i = 0; i < op.outputs.size(); ++i)
      outputs.push_back(Frames{op.outputs[i], op.patch_sizes.empty() ? 0 : op.patch_sizes[i], channels,
                               video.height / op.factors[i], video.width / op.factors[i]});
    int64_t bytes = 0;
    for (const Frames& output : outputs) {
      const bool is_bf16 = std::is_same_v<C, float> && output.array.dtype == DType::bfloat16;
      stores_tiles = stores_tiles && output.is_plain_image() && (is_bf16 || output.array.dtype == dtype_of<C>);
      is_split = is_split && is_bf16;
      bytes += batch * frames * channels * output.height * output.width * size_of(output.array.dtype);
    }
    is_split = is_split && stores_tiles;
    for (const Frames& output : outputs)
      non_temporal.push_back(stores_tiles && exceed_caches(bytes) && output.has_aligned_rows());
    if (is_split && video.template loads_directly<C>() && tiling.columns % Frames::block == 0 &&
        tiling.width % Frames::block == 0)
      for (size_t i = 0; i < outputs.size() && copied < 0; ++i)
        if (op.factors[i] == 1) copied = static_cast<int>(i);
    scratch_size = frame_at() + channels_at_once * plane_of(1);
    for (const Level& level : chain) {
      level_at.push_back(level.factor == 1 ? frame_at() : scratch_size);
      if (level.factor > 1) scratch_size += channels_at_once * plane_of(level.factor);
    }
  }

  int64_t plane_of(int64_t factor) const { return padded<C>((tiling.rows / factor) * (tiling.columns / factor)); }
  int64_t frame_at() const { return 2 * padded<C>(tiling.columns); }

  // Write one tile at every factor, for channels first .. first + channels_at_once - 1.
  MFWM_SIMD void tile(int64_t b, int64_t t, int64_t first, int64_t y, int64_t x, C* scratch) const {
    const int64_t rows = std::min(tiling.rows, tiling.height - y), columns = std::min(tiling.columns, tiling.width - x);
    const auto tile_of = [&](int64_t at, int64_t factor, int64_t c) __attribute__((always_inline)) {
      return Tile<C>{scratch + at + c * plane_of(factor), columns / factor, rows / factor, columns / factor, is_split};
    };
    for (int64_t c = 0; c < channels_at_once; ++c) {
      const Tile<C> frame = tile_of(frame_at(), 1, c);
      const C scale = static_cast<C>(op.scale), shift = static_cast<C>(op.shift);
      if (copied >= 0) {
        const Frames& output = outputs[copied];
        auto* to = static_cast<bfloat16*>(output.array.data) + output.image_offset(b, t, first + c, y, x);
        const int64_t pitch = output.array.stride[3];
        const bool bypass = non_temporal[copied];
        video.load_split(frame, b, t, first + c, y, x, scale, shift,
                         [=](int64_t r, int64_t k, const auto& split) __attribute__((always_inline)) {
                           store_split(split, to + r * pitch + k, bypass);
                         });
      } else if (is_split)
        video.load_split(frame, b, t, first + c, y, x, scale, shift);
      else
        video.load(frame.data, b, t, first + c, y, x, rows, columns, scale, shift);
    }
    for (size_t l = 0; l < chain.size(); ++l) {
      const auto [factor, parent, ratio] = chain[l];
      const int64_t from = parent < 0 ? frame_at() : level_at[parent];
      for (int64_t c = 0; c < channels_at_once && factor > 1; ++c)
        average(read_only(tile_of(from, factor / ratio, c)), tile_of(level_at[l], factor, c), ratio, scratch);
      const Tile<C> average_tile = tile_of(level_at[l], factor, 0);
      for (size_t i = 0; i < outputs.size(); ++i) {
        if (op.factors[i] != factor || static_cast<int>(i) == copied) continue;
        if (stores_tiles)
          outputs[i].store_tile(average_tile, b, t, first, y / factor, x / factor, non_temporal[i]);
        else if (channels_at_once == 1)
          outputs[i].store(average_tile.data, b, t, first, y / factor, x / factor, average_tile.rows,
                           average_tile.columns);
        else
          outputs[i].store_channels(average_tile.data, plane_of(factor), b, t, y / factor, x / factor,
                                    average_tile.rows, average_tile.columns);
      }
    }
  }

  void run() const {
    parallel_for<C>(op.threads, batch * frames * tiling.chunks, scratch_size, [&](int64_t unit, C* scratch) {
      const int64_t chunk = unit % tiling.chunks, t = unit / tiling.chunks % frames, b = unit / tiling.chunks / frames;
      const int64_t top = chunk * tiling.chunk_rows, bottom = std::min(tiling.height, top + tiling.chunk_rows);
      for (int64_t first = 0; first < channels; first += channels_at_once)
        for (int64_t y = top; y < bottom; y += tiling.rows)
          for (int64_t x = 0; x < tiling.width; x += tiling.columns) tile(b, t, first, y, x, scratch);
      finish_streaming();
    });
  }
};

}  // namespace

void video_pyramid(const VideoPyramid& op) {
  bool is_double = op.video.dtype == DType::float64;
  for (const Array& output : op.outputs) is_double = is_double || output.dtype == DType::float64;
  in_precision(is_double, [&](auto zero) { Pyramid<decltype(zero)>(op).run(); });
}

}  // namespace mfwm::cpu
