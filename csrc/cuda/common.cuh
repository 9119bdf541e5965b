// What every CUDA kernel uses: elements of any dtype, the caller's device, and errors as exceptions.
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

// Makes the device that `data` lies on current, and gives the caller's back.
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

// The one place where kernels are launched: on a one-dimensional grid, axes y and z stop at 65,535.
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

// The shared memory whose size the launch gives.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  // g++ compiles the kernels for the tests' emulator, tests/cuda_emulator.
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

}  // namespace mfwm::cuda
