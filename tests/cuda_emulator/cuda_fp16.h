// The part of CUDA's cuda_fp16.h that csrc/cuda uses, for the emulator.
#pragma once

#include <cstring>

struct __half {
  _Float16 value;
};

inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half(float value) { return {static_cast<_Float16>(value)}; }
inline __half __ushort_as_half(unsigned short bits) {
  __half half;
  std::memcpy(&half, &bits, sizeof(half));
  return half;
}

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
