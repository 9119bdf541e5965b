// The kernel of video_pyramid for the common layouts (strips.cuh) and factors 1, 2, 4 and 8. A warp loads a tile of
// strips of a frame, sums it over boxes from level to level, and writes the tile's part of every output. It needs no
// barrier.
#include "video_pyramid.cuh"

namespace mfwm::cuda {
namespace {

constexpr int threads = 128, warps = threads / 32, max_outputs = 8;

struct Parameters {
  Frames video, outputs[max_outputs];
  int8_t first_at[levels], next[max_outputs];  // the outputs of each level, -1: no more
  int coarsest;
  float scale, shift;
  Divisor by_tiles, by_frames;
  Tiling tiling;
  unsigned units;
};

// Write the outputs from this level on. `sums` are of boxes of the frame.
template <class S, class T, int level>
__device__ __forceinline__ void write(const Parameters& p, const StripPlace<S>& place, unsigned b, unsigned t,
                                      const float (&sums)[S::count(level)]) {
  if (p.first_at[level] >= 0) {
    const float scale = p.scale * inverse_area(level);
    float values[S::count(level)];
#pragma unroll
    for (int k = 0; k < S::count(level); ++k) values[k] = sums[k] * scale + p.shift;
    for (int i = p.first_at[level]; i >= 0; i = p.next[i]) {
      const Frames& output = p.outputs[i];
      T* to = static_cast<T*>(output.data) + (start_of(output, b, t) + place.offset(output, level));
      if (place.owns(level)) store_strip<S, level>(values, to, output);
    }
  }
  if constexpr (level + 1 < levels) {
    if (level == p.coarsest) return;
    float coarse[S::count(level + 1)];
    sum_boxes<S, level + 1>(sums, coarse);
    write<S, T, level + 1>(p, place, b, t, coarse);
  }
}

template <class S, class T>
__global__ void __launch_bounds__(threads) pyramid_strip_kernel(const __grid_constant__ Parameters p) {
  const unsigned unit = blockIdx.x * warps + threadIdx.x / 32;
  if (unit >= p.units) return;
  const unsigned frame = p.by_tiles.quotient(unit), b = p.by_frames.quotient(frame);
  const unsigned t = frame - b * p.by_frames.divisor;
  const StripPlace<S> place(p.tiling, unit - frame * p.by_tiles.divisor);
  float sums[S::count(0)];
  load_video_strip<S, 0>(sums, p.video, start_of(p.video, b, t) + place.offset(p.video, 0));
  write<S, T, 0>(p, place, b, t, sums);
}

// ---- Host code

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>           ? DType::float32
                           : std::is_same_v<T, __nv_bfloat16> ? DType::bfloat16
                                                              : DType::float16;

template <class S, class T>
bool run(Parameters& p, const VideoPyramid& op, cudaStream_t stream) {
  if (!serves_video<S>(op.video, p.video)) return false;
  const int64_t* size = op.video.size;
  for (size_t i = 0; i < op.outputs.size(); ++i) {
    int level = 0;
    while (1 << level < op.factors[i]) ++level;
    const Array& output = op.outputs[i];
    if (output.dtype != dtype_of<T> || !serves_frames<S>(output, p.outputs[i], size[2], level)) return false;
  }
  p.tiling = tiling_of<S>(size[2], size[3], size[4]);
  const int64_t tiles = tiles_of<S>(p.tiling), units = size[0] * size[1] * tiles;
  if (units >= int64_t(1) << 31) return false;
  if (units == 0) return true;
  p.units = static_cast<unsigned>(units);
  p.by_tiles = divisor_of(tiles);
  p.by_frames = divisor_of(size[1]);
  launch("video_pyramid", pyramid_strip_kernel<S, T>, (units + warps - 1) / warps, threads, 0, stream, p);
  return true;
}

template <class T>
bool run_any(Parameters& p, const VideoPyramid& op, cudaStream_t stream) {
  return run<PatchStrip, T>(p, op, stream) || run<TokenStrip, T>(p, op, stream) ||
         run<ChannelStrip, T>(p, op, stream) || run<ImageStrip, T>(p, op, stream);
}

}  // namespace

bool run_pyramid_strips(const VideoPyramid& op, cudaStream_t stream) {
  const int count = static_cast<int>(op.outputs.size());
  const int64_t* size = op.video.size;
  if (count > max_outputs || op.video.dtype == DType::float64) return false;
  Parameters p{};
  p.scale = static_cast<float>(op.scale);
  p.shift = static_cast<float>(op.shift);
  p.video = frames_of(op.video, 0, size[2], size[4], 0);
  std::fill(p.first_at, p.first_at + levels, int8_t(-1));
  for (int i = count - 1; i >= 0; --i) {
    int level = 0;
    while (level < levels - 1 && 1 << level < op.factors[i]) ++level;
    if (1 << level != op.factors[i]) return false;
    const int64_t patch = op.patch_sizes.empty() ? 0 : op.patch_sizes[i];
    p.outputs[i] = frames_of(op.outputs[i], patch, size[2], size[4] / op.factors[i], level);
    p.next[i] = p.first_at[level];
    p.first_at[level] = static_cast<int8_t>(i);
    p.coarsest = std::max(p.coarsest, level);
  }
  return run_any<float>(p, op, stream) || run_any<__nv_bfloat16>(p, op, stream) || run_any<__half>(p, op, stream);
}

}  // namespace mfwm::cuda
