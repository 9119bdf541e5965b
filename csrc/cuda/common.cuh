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
