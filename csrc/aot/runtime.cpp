// Stands in for the CUDA runtime, so that csrc/cuda runs without a GPU: a launch is handed to a callback, and nothing
// else happens. mfwm_kernels/cuda_launches.py builds it together with the kernels.
#include <cuda_runtime.h>

#include <cstdint>
#include <map>

namespace {

// The kernel's name in machine code, its blocks, threads and dynamic shared memory, and pointers to its arguments.
using Record = void (*)(const char* name, int64_t blocks, int threads, int64_t shared_bytes, void** arguments);
Record record = nullptr;

// The host's stub of each kernel -> the kernel's name.
std::map<const void*, const char*>& names() {
  static std::map<const void*, const char*> registered;
  return registered;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void mfwm_record_launches(Record callback) { record = callback; }

// What nvcc's host code calls when the module is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[stub] = name;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {};
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "the launch was not recorded"; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  const auto found = names().find(stub);
  if (record == nullptr || found == names().end()) return cudaErrorUnknown;
  record(found->second, config->gridDim.x, static_cast<int>(config->blockDim.x),
         static_cast<int64_t>(config->dynamicSmemBytes), arguments);
  return cudaSuccess;
}

}  // extern "C"
