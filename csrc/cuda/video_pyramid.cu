// video_pyramid in CUDA C++. A block reads a tile of one channel of one frame into shared memory, normalised, and
// writes the tile's part of every output. The tile's sides are multiples of every factor; where such a tile does not fit
// in shared memory, pixels are read from global memory for each output.
#include <algorithm>
#include <numeric>

#include "common.cuh"

namespace mfwm::cuda {
namespace {

constexpr int most_outputs = 8;  // per launch; more take several
constexpr int threads = 256;

struct Output {
  Array array;
  int64_t factor, patch;  // patch 0: image layout
};

struct Parameters {
  Array video;
  Output outputs[most_outputs];
  int count;
  double scale, shift;
  int64_t tile_height, tile_width, tiles_y, tiles_x, tiles;
};

__device__ __forceinline__ int64_t offset_of(const Output& output, int64_t channels, int64_t width, int64_t b, int64_t t,
                                             int64_t c, int64_t y, int64_t x) {
  const int64_t* s = output.array.stride;
  if (output.patch == 0) return b * s[0] + t * s[1] + c * s[2] + y * s[3] + x * s[4];
  const int64_t patch = output.patch, token = (y / patch) * (width / patch) + x / patch;
  const int64_t feature = ((y % patch) * patch + x % patch) * channels + c;
  return b * s[0] + t * s[1] + token * s[2] + feature * s[3];
}

// Left to itself the compiler takes fewer registers and spills.
template <class C, bool in_shared>
__global__ void __launch_bounds__(threads, 4) pyramid_kernel(const Parameters p) {
  C* tile = dynamic_shared<C>();
  const C scale = static_cast<C>(p.scale), shift = static_cast<C>(p.shift);
  const int64_t frames = p.video.size[1], channels = p.video.size[2], height = p.video.size[3], width = p.video.size[4];
  const int64_t* s = p.video.stride;
  for (int64_t index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const int64_t left = index % p.tiles_x * p.tile_width, top = index / p.tiles_x % p.tiles_y * p.tile_height;
    const int64_t c = index / (p.tiles_x * p.tiles_y) % channels, frame = index / (p.tiles_x * p.tiles_y * channels);
    const int64_t b = frame / frames, t = frame % frames;
    const int rows = static_cast<int>(min(p.tile_height, height - top));
    const int columns = static_cast<int>(min(p.tile_width, width - left));
    const int64_t start = b * s[0] + t * s[1] + c * s[2] + top * s[3] + left * s[4];
    if (in_shared) {
      for (int k = threadIdx.x; k < rows * columns; k += threads)
        tile[k] = load<C>(p.video.data, p.video.dtype, start + (k / columns) * s[3] + (k % columns) * s[4]) * scale + shift;
      __syncthreads();
    }
    for (int i = 0; i < p.count; ++i) {
      const Output& output = p.outputs[i];
      const int factor = static_cast<int>(output.factor), out_columns = columns / factor;
      const int out_elements = (rows / factor) * out_columns;
      for (int k = threadIdx.x; k < out_elements; k += threads) {
        const int y = k / out_columns, x = k % out_columns;
        C sum = 0;
        for (int dy = 0; dy < factor; ++dy)
          for (int dx = 0; dx < factor; ++dx) {
            const int row = y * factor + dy, column = x * factor + dx;
            sum += in_shared ? tile[row * columns + column]
                             : load<C>(p.video.data, p.video.dtype, start + row * s[3] + column * s[4]) * scale + shift;
          }
        const int64_t to = offset_of(output, channels, width / factor, b, t, c, top / factor + y, left / factor + x);
        store<C>(output.array.data, output.array.dtype, to, sum / static_cast<C>(factor * factor));
      }
    }
    if (in_shared) __syncthreads();
  }
}

template <class C>
void run(const VideoPyramid& op, cudaStream_t stream) {
  constexpr int64_t most_elements = 4096;
  int64_t step = 1;
  for (int64_t factor : op.factors) step = std::lcm(step, factor);
  const bool fits = step * step <= most_elements;
  const int64_t* size = op.video.size;
  Parameters p{};
  p.video = op.video;
  p.scale = op.scale;
  p.shift = op.shift;
  p.tile_width = std::min(size[4], fits ? std::max(step, 128 / step * step) : step);
  p.tile_width = fits && p.tile_width * step > most_elements ? step : p.tile_width;
  p.tile_height = std::min(size[3], fits ? std::max(step, most_elements / p.tile_width / step * step) : step);
  p.tiles_y = (size[3] + p.tile_height - 1) / p.tile_height;
  p.tiles_x = (size[4] + p.tile_width - 1) / p.tile_width;
  p.tiles = size[0] * size[1] * size[2] * p.tiles_y * p.tiles_x;
  if (p.tiles == 0) return;
  const int64_t blocks = std::min<int64_t>(p.tiles, (int64_t(1) << 31) - 1);
  const size_t shared = fits ? static_cast<size_t>(p.tile_width * p.tile_height) * sizeof(C) : 0;
  for (size_t first = 0; first < op.outputs.size(); first += most_outputs) {
    p.count = static_cast<int>(std::min<size_t>(most_outputs, op.outputs.size() - first));
    for (int i = 0; i < p.count; ++i)
      p.outputs[i] = {op.outputs[first + i], op.factors[first + i],
                      op.patch_sizes.empty() ? 0 : op.patch_sizes[first + i]};
    launch("video_pyramid", fits ? pyramid_kernel<C, true> : pyramid_kernel<C, false>, blocks, threads, shared, stream, p);
  }
}

}  // namespace

void video_pyramid(const VideoPyramid& op, void* stream) {
  if (op.video.data == nullptr) return;
  const DeviceGuard guard(op.video.data);
  bool is_double = op.video.dtype == DType::float64;
  for (const Array& output : op.outputs) is_double = is_double || output.dtype == DType::float64;
  if (is_double)
    run<double>(op, static_cast<cudaStream_t>(stream));
  else
    run<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace mfwm::cuda
