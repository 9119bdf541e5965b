// video_pyramid on the CPU: tile by tile, each factor averaged from the next finer one in cache.
#include "pyramid.h"

namespace mfwm::cpu {
namespace {

template <class C>
struct Pyramid {
  const VideoPyramid& op;
  Frames video;
  std::vector<Frames> outputs;
  std::vector<Level> chain;
  std::vector<int64_t> level_offset;
  Tiling tiling;
  int64_t scratch_size;

  explicit Pyramid(const VideoPyramid& op_)
      : op(op_),
        chain(chain_of(1, op_.factors)),
        tiling(op_.video.size[3], op_.video.size[4], op_.factors, op_.video.size[0] * op_.video.size[1],
               static_cast<int64_t>(sizeof(C))) {
    const int64_t* size = op.video.size;
    video = Frames{op.video, 0, size[2], size[3], size[4]};
    for (size_t i = 0; i < op.outputs.size(); ++i)
      outputs.push_back(Frames{op.outputs[i], op.patch_sizes.empty() ? 0 : op.patch_sizes[i], size[2],
                               size[3] / op.factors[i], size[4] / op.factors[i]});
    // The base, then two rows for averaging, then a tile per level.
    scratch_size = padded<C>(tiling.rows * tiling.columns) + 2 * padded<C>(tiling.columns);
    for (const Level& level : chain) {
      level_offset.push_back(scratch_size);
      scratch_size += padded<C>((tiling.rows / level.factor) * (tiling.columns / level.factor));
    }
  }

  MFWM_SIMD void tile(int64_t b, int64_t t, int64_t c, int64_t y, int64_t x, C* scratch) const {
    const int64_t rows = std::min(tiling.rows, tiling.height - y), columns = std::min(tiling.columns, tiling.width - x);
    const C scale = static_cast<C>(op.scale), shift = static_cast<C>(op.shift);
    const Tile<C> base{scratch, columns, rows, columns};
    C* spare = scratch + padded<C>(tiling.rows * tiling.columns);
    video.load(base.data, b, t, c, y, x, rows, columns, scale, shift);
    for (size_t l = 0; l < chain.size(); ++l) {
      const Level& level = chain[l];
      const Tile<C> out = level_tile(l, rows, columns, base, scratch);
      if (level.factor > 1)
        average(read_only(level.parent < 0 ? base : level_tile(level.parent, rows, columns, base, scratch)), out,
                level.ratio, spare);
      for (size_t i = 0; i < outputs.size(); ++i)
        if (op.factors[i] == level.factor)
          outputs[i].store(out.data, b, t, c, y / level.factor, x / level.factor, out.rows, out.columns);
    }
  }

  MFWM_INLINE Tile<C> level_tile(size_t l, int64_t rows, int64_t columns, const Tile<C>& base, C* scratch) const {
    const int64_t factor = chain[l].factor;
    return factor == 1 ? base : Tile<C>{scratch + level_offset[l], columns / factor, rows / factor, columns / factor};
  }

  void run() const {
    const int64_t channels = op.video.size[2], frames = op.video.size[1];
    parallel_for<C>(op.threads, op.video.size[0] * frames * tiling.chunks, scratch_size, [&](int64_t unit, C* scratch) {
      const int64_t chunk = unit % tiling.chunks, t = unit / tiling.chunks % frames, b = unit / tiling.chunks / frames;
      const int64_t top = chunk * tiling.chunk_rows, bottom = std::min(tiling.height, top + tiling.chunk_rows);
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = top; y < bottom; y += tiling.rows)
          for (int64_t x = 0; x < tiling.width; x += tiling.columns) tile(b, t, c, y, x, scratch);
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
