// The part of CUDA that csrc/cuda uses, as ordinary C++. With this folder first on the include path, g++ compiles the
// kernels, and emulator.cpp runs them on the CPU. Blocks run one after another; the threads of a block are fibers that
// switch at barriers and warp collectives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Blocks run one at a time, so a static variable is shared by exactly the threads of one block.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// Runs `thread` for every thread of every block. Throws if a thread accesses memory outside all tensors or a misaligned
// vector, or if threads wait for others that never arrive.
void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// Ends the launch with an error.
[[noreturn]] void fail(const char* what);

void* shared_memory();
void sync_threads();

// Waits for the lanes of `mask` and returns the value that each lane of the warp passed.
const uint64_t* exchange(unsigned mask, uint64_t value);

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* values = exchange(mask, bits);
  // A lane whose source lane does not exist keeps its own value, as on the device.
  if (from >= 32) return value;
  if (!(mask >> from & 1)) fail("a shuffle reads from a lane outside its mask");
  std::memcpy(&value, &values[from], sizeof(T));
  return value;
}

}  // namespace emulator

inline float __expf(float x) { return std::exp(x); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
// c plus the dot product of the bytes of a and b.
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int shift = 0; shift < 32; shift += 8) c += (a >> shift & 255) * (b >> shift & 255);
  return c;
}

inline void __syncthreads() { emulator::sync_threads(); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::exchange(mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::shuffle(mask, value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::shuffle(mask, value, (threadIdx.x & 31) ^ bits);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return emulator::shuffle(mask, value, (threadIdx.x & 31) + by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulator::exchange(mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= static_cast<unsigned>(values[lane]) << lane;
  return votes;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}

using std::isnan;
using std::max;
using std::min;

// ---- Host code

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
struct cudaPointerAttributes {
  int device = 0;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes*, const void*) { return cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(arguments...);
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
