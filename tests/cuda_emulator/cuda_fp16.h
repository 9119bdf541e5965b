// The part of CUDA's cuda_fp16.h that csrc/cuda uses, for the emulator.
#pragma once

struct __half {
  _Float16 value;
};

inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half(float value) { return {static_cast<_Float16>(value)}; }
