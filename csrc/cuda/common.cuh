// Shared by every CUDA kernel: loads and stores of any dtype, launches, the caller's device, and errors as exceptions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

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

// Element k of a word, which is a compile-time constant in every use. Words, rather than arrays of T, keep two or four
// elements in one register until they are needed.
template <class T>
__device__ __forceinline__ float element_of(uint32_t word, int k) {
  if constexpr (std::is_same_v<T, uint8_t>)
    return static_cast<float>(word >> 8 * k & 255);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __uint_as_float(k == 0 ? word << 16 : word & 0xffff0000);
  else if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16 * k)));
  else
    return __uint_as_float(word);
}

// The bits of one or two values.
template <class T>
__device__ __forceinline__ uint32_t word_of(const float* values) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(values[0]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// `size` contiguous elements of one load or store: 1, 2, 4, 8 or 16 bytes, aligned.
template <class T, int size>
struct Vector {
  static constexpr int bytes = size * sizeof(T), words = bytes < 4 ? 1 : bytes / 4, by_word = 4 / sizeof(T);
  struct alignas(bytes) Memory {
    std::conditional_t<bytes == 1, uint8_t, std::conditional_t<bytes == 2, uint16_t, uint32_t>> words[Vector::words];
  };
  Memory memory;

  __device__ __forceinline__ float operator[](int k) const {
    return element_of<T>(memory.words[k / by_word], k % by_word);
  }
  __device__ __forceinline__ void load(const T* from) { memory = *reinterpret_cast<const Memory*>(from); }
};

template <class T, int size>
__device__ __forceinline__ void load_vector(float* to, const T* from) {
  constexpr int vector = size * sizeof(T) > 16 ? 16 / sizeof(T) : size;
#pragma unroll
  for (int first = 0; first < size; first += vector) {
    Vector<T, vector> values;
    values.load(from + first);
#pragma unroll
    for (int k = 0; k < vector; ++k) to[first + k] = values[k];
  }
}

template <class T, int size>
__device__ __forceinline__ void store_vector(const float* from, T* to) {
  constexpr int vector = size * sizeof(T) > 16 ? 16 / sizeof(T) : size;
  if constexpr (vector * sizeof(T) < 4) {
#pragma unroll
    for (int k = 0; k < size; ++k) assign(to[k], from[k]);
  } else {
#pragma unroll
    for (int first = 0; first < size; first += vector) {
      using Values = Vector<T, vector>;
      typename Values::Memory memory;
#pragma unroll
      for (int k = 0; k < Values::words; ++k) memory.words[k] = word_of<T>(from + first + k * Values::by_word);
      *reinterpret_cast<typename Values::Memory*>(to + first) = memory;
    }
  }
}

template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

}  // namespace mfwm::cuda
