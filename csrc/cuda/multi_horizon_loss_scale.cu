// The backward of multi_horizon_loss: multiply the gradients that the forward computed by the upstream gradient, in
// place. bindings.cpp calls the function at the end. The kernel reads the upstream gradient on the device, so that the
// host need not wait for it, and returns early if it is 1.
#include <algorithm>

#include "common.cuh"

namespace mfwm::cuda {
namespace {

constexpr int threads = 128;
constexpr int max_tensors = 18;       // 16 horizons and two tensors of weights
constexpr int vectors_by_thread = 4;  // of 16 bytes

struct Scaled {
  void* data;
  DType dtype;
  bool vectors;
  int64_t size, first_block;
};

struct Scaling {
  Scaled tensors[max_tensors];
  int count;
  const float* upstream;
};

template <class T>
__device__ __forceinline__ void scale_tensor(const Scaled& tensor, int64_t block, float factor) {
  constexpr int size = 16 / sizeof(T);
  T* data = static_cast<T*>(tensor.data);
#pragma unroll
  for (int step = 0; step < vectors_by_thread; ++step) {
    const int64_t first = ((block * vectors_by_thread + step) * threads + threadIdx.x) * size;
    if (tensor.vectors && first + size <= tensor.size) {
      float values[size];
      load_vector<T, size>(values, data + first);
#pragma unroll
      for (int k = 0; k < size; ++k) values[k] *= factor;
      store_vector<T, size>(values, data + first);
    } else {
      for (int64_t k = first; k < min(first + size, tensor.size); ++k) assign(data[k], to_float(data[k]) * factor);
    }
  }
}

__global__ void __launch_bounds__(threads) scale_kernel(const __grid_constant__ Scaling p) {
  const float factor = *p.upstream;
  if (factor == 1) return;
  int t = 0;
  while (t + 1 < p.count && blockIdx.x >= p.tensors[t + 1].first_block) ++t;
  const Scaled& tensor = p.tensors[t];
  const int64_t block = blockIdx.x - tensor.first_block;
  switch (tensor.dtype) {
    case DType::float32: return scale_tensor<float>(tensor, block, factor);
    case DType::bfloat16: return scale_tensor<__nv_bfloat16>(tensor, block, factor);
    case DType::float16: return scale_tensor<__half>(tensor, block, factor);
    default: {  // float64: only the gradients of fp64 weights, which are short
      double* data = static_cast<double*>(tensor.data);
      for (int64_t k = threadIdx.x; k < tensor.size; k += threads) data[k] *= factor;
    }
  }
}

}  // namespace

void multi_horizon_loss_scale(const std::vector<Array>& tensors, const Array& upstream, void* stream) {
  if (tensors.empty()) return;
  const DeviceGuard guard(upstream.data);
  Scaling p{};
  p.upstream = static_cast<const float*>(upstream.data);
  int64_t blocks = 0;
  for (const Array& array : tensors) {
    Scaled& tensor = p.tensors[p.count++];
    tensor = {array.data, array.dtype, reinterpret_cast<uintptr_t>(array.data) % 16 == 0, 1, blocks};
    for (int axis = 0; axis < array.rank; ++axis) tensor.size *= array.size[axis];
    const int64_t by_block = threads * vectors_by_thread * 16 / bytes_of(array.dtype);
    blocks += array.dtype == DType::float64 ? 1 : (tensor.size + by_block - 1) / by_block;
  }
  if (blocks > 0)
    launch("multi_horizon_loss: scale", scale_kernel, blocks, threads, 0, static_cast<cudaStream_t>(stream), p);
}

}  // namespace mfwm::cuda
