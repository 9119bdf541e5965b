// video_pyramid in CUDA C++; bindings.cpp calls the function at the end. video_pyramid_strips.cu serves most calls. The
// kernel here serves every call: a block loads a tile of one channel of one frame into shared memory, normalised, and
// writes the tile's part of every output. The tile's sides are multiples of every factor. If such a tile does not fit
// into shared memory, the block reads the pixels from global memory for each output.
#include <numeric>

#include "video_pyramid.cuh"

namespace mfwm::cuda {
namespace {

constexpr int max_outputs = 8;  // per launch; more outputs take several launches
constexpr int threads = 256;

struct Output {
  Array array;
  int factor, patch;  // patch 0: image layout
};

struct Parameters {
  Array video;
  Output outputs[max_outputs];
  int count;
  double scale, shift;
  int tile_height, tile_width, tiles_y, tiles_x;
  unsigned tiles;
};

__device__ __forceinline__ int64_t offset_of(const Output& output, int channels, int width, int64_t b, int64_t t, int c,
                                             int y, int x) {
  const int64_t* s = output.array.stride;
  if (output.patch == 0) return b * s[0] + t * s[1] + c * s[2] + y * s[3] + x * s[4];
  const int patch = output.patch, feature = ((y % patch) * patch + x % patch) * channels + c;
  const int64_t token = int64_t(y / patch) * (width / patch) + x / patch;
  return b * s[0] + t * s[1] + token * s[2] + feature * s[3];
}

// Four blocks per multiprocessor leave a thread 64 registers; without the 4 the compiler uses fewer and spills.
template <class C, bool in_shared>
__global__ void __launch_bounds__(threads, 4) pyramid_kernel(const __grid_constant__ Parameters p) {
  C* tile = dynamic_shared<C>();
  const C scale = static_cast<C>(p.scale), shift = static_cast<C>(p.shift);
  const int frames = static_cast<int>(p.video.size[1]), channels = static_cast<int>(p.video.size[2]);
  const int height = static_cast<int>(p.video.size[3]), width = static_cast<int>(p.video.size[4]);
  const int64_t* s = p.video.stride;
  for (unsigned index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const int left = static_cast<int>(index % p.tiles_x) * p.tile_width;
    const int top = static_cast<int>(index / p.tiles_x % p.tiles_y) * p.tile_height;
    const unsigned plane = index / p.tiles_x / p.tiles_y, frame = plane / channels;
    const int c = static_cast<int>(plane % channels);
    const int64_t b = frame / frames, t = frame % frames;
    const int rows = min(p.tile_height, height - top), columns = min(p.tile_width, width - left);
    const int64_t start = b * s[0] + t * s[1] + c * s[2] + top * s[3] + left * s[4];
    if (in_shared) {
      for (int k = threadIdx.x; k < rows * columns; k += threads) {
        const int64_t from = start + int64_t(k / columns) * s[3] + (k % columns) * s[4];
        tile[k] = load<C>(p.video.data, p.video.dtype, from) * scale + shift;
      }
      __syncthreads();
    }
    for (int i = 0; i < p.count; ++i) {
      const Output& output = p.outputs[i];
      const int factor = output.factor, out_columns = columns / factor;
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
  constexpr int64_t max_elements = 4096;
  int64_t step = 1;
  for (int64_t factor : op.factors) step = std::lcm(step, factor);
  const bool fits = step * step <= max_elements;
  const int64_t* size = op.video.size;
  Parameters p{};
  p.video = op.video;
  p.scale = op.scale;
  p.shift = op.shift;
  int64_t tile_width = std::min(size[4], fits ? std::max(step, 128 / step * step) : step);
  if (fits && tile_width * step > max_elements) tile_width = step;
  const int64_t tile_height = std::min(size[3], fits ? std::max(step, max_elements / tile_width / step * step) : step);
  const int64_t tiles_y = (size[3] + tile_height - 1) / tile_height, tiles_x = (size[4] + tile_width - 1) / tile_width;
  const int64_t tiles = size[0] * size[1] * size[2] * tiles_y * tiles_x;
  if (tiles == 0) return;
  if (tiles >= int64_t(1) << 31)
    throw std::invalid_argument("video_pyramid: the call has " + std::to_string(tiles) +
                                " tiles, the cuda backend takes fewer than 2**31");
  p.tile_height = static_cast<int>(tile_height);
  p.tile_width = static_cast<int>(tile_width);
  p.tiles_y = static_cast<int>(tiles_y);
  p.tiles_x = static_cast<int>(tiles_x);
  p.tiles = static_cast<unsigned>(tiles);
  const size_t shared = fits ? static_cast<size_t>(tile_width * tile_height) * sizeof(C) : 0;
  for (size_t first = 0; first < op.outputs.size(); first += max_outputs) {
    p.count = static_cast<int>(std::min<size_t>(max_outputs, op.outputs.size() - first));
    for (int i = 0; i < p.count; ++i)
      p.outputs[i] = {op.outputs[first + i], static_cast<int>(op.factors[first + i]),
                      op.patch_sizes.empty() ? 0 : static_cast<int>(op.patch_sizes[first + i])};
    const auto kernel = fits ? pyramid_kernel<C, true> : pyramid_kernel<C, false>;
    launch("video_pyramid", kernel, tiles, threads, shared, stream, p);
  }
}

}  // namespace

void video_pyramid(const VideoPyramid& op, void* stream) {
  if (op.video.data == nullptr) return;
  const DeviceGuard guard(op.video.data);
  if (run_pyramid_strips(op, static_cast<cudaStream_t>(stream))) return;
  bool is_double = op.video.dtype == DType::float64;
  for (const Array& output : op.outputs) is_double = is_double || output.dtype == DType::float64;
  if (is_double)
    run<double>(op, static_cast<cudaStream_t>(stream));
  else
    run<float>(op, static_cast<cudaStream_t>(stream));
}

}  // namespace mfwm::cuda
