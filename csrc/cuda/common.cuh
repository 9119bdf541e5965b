// Shared by every CUDA kernel: loads and stores of any dtype, launches, the caller's device, and errors as exceptions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../ops.h"

namespace mfwm::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes the device of `data` current, and restores the caller's device when destroyed.
class DeviceGuard {
 public:
  explicit DeviceGuard(const void* data) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    cudaPointerAttributes attributes;
    check(cudaPointerGetAttributes(&attributes, data), "cudaPointerGetAttributes");
    check(cudaSetDevice(attributes.device), "cudaSetDevice");
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { cudaSetDevice(previous_); }

 private:
  int previous_ = 0;
};

// All kernels are launched here, on one-dimensional grids, because axes y and z are limited to 65,535 blocks.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// The dynamic shared memory, whose size the launch sets.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  // tests/cuda_emulator compiles the kernels with g++ and runs them on the CPU.
  return static_cast<T*>(emulator::shared_memory());
#endif
}

template <class C>
__device__ __forceinline__ C load(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::uint8: return static_cast<C>(static_cast<const uint8_t*>(data)[offset]);
    case DType::float32: return static_cast<C>(static_cast<const float*>(data)[offset]);
    case DType::bfloat16: return static_cast<C>(__bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]));
    case DType::float16: return static_cast<C>(__half2float(static_cast<const __half*>(data)[offset]));
    default: return static_cast<C>(static_cast<const double*>(data)[offset]);
  }
}

template <class C>
__device__ __forceinline__ void store(void* data, DType dtype, int64_t offset, C value) {
  switch (dtype) {
    case DType::float32: static_cast<float*>(data)[offset] = static_cast<float>(value); break;
    case DType::bfloat16:
      static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16(static_cast<float>(value));
      break;
    case DType::float16: static_cast<__half*>(data)[offset] = __float2half(static_cast<float>(value)); break;
    default: static_cast<double*>(data)[offset] = static_cast<double>(value);
  }
}

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::uint8 ? 1 : dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2;
}

__device__ __forceinline__ float to_float(uint8_t value) { return value; }
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ void assign(float& to, float value) { to = value; }
__device__ __forceinline__ void assign(__nv_bfloat16& to, float value) { to = __float2bfloat16(value); }
__device__ __forceinline__ void assign(__half& to, float value) { to = __float2half(value); }

// `size` contiguous elements, aligned for vector loads and stores of up to 16 bytes.
template <class T, int size>
struct alignas(size * sizeof(T) < 16 ? size * sizeof(T) : 16) Vector {
  T values[size];
};

template <class T, int size>
__device__ __forceinline__ void load_vector(float* to, const T* from) {
  const auto vector = *reinterpret_cast<const Vector<T, size>*>(from);
#pragma unroll
  for (int k = 0; k < size; ++k) to[k] = to_float(vector.values[k]);
}

template <class T, int size>
__device__ __forceinline__ void store_vector(const float* from, T* to) {
  Vector<T, size> vector;
#pragma unroll
  for (int k = 0; k < size; ++k) assign(vector.values[k], from[k]);
  *reinterpret_cast<Vector<T, size>*>(to) = vector;
}

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

}  // namespace mfwm::cuda
