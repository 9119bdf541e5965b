// Shared by the kernels of video_pyramid.
#pragma once

#include "strips.cuh"

namespace mfwm::cuda {

// In video_pyramid_strips.cu; false if its kernel does not serve the call.
bool run_pyramid_strips(const VideoPyramid& op, cudaStream_t stream);

}  // namespace mfwm::cuda
