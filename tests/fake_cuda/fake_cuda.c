// A stand-in for libcuda.so.1, as far as Triton's launcher uses it: everything succeeds, nothing runs, and each launch
// is recorded with the parameters that it was given.
#include <stdint.h>
#include <string.h>

#include "cuda.h"

enum { MOST = 512 };

struct launch {
    char kernel[256];
    uint32_t grid[3], block[3];
    uint32_t shared_bytes, parameters;
    uint64_t values[MOST];
};

static int context, module;
static char function[256];
static uint32_t widths[MOST], parameters;
static struct launch last;
static uint64_t launches;

// Says how many parameters the kernel has that is launched next, and how many bytes each: cuLaunchKernelEx is not told.
int fake_expect(uint32_t count, const uint32_t *bytes) {
    if (count > MOST) return 1;
    parameters = count;
    memcpy(widths, bytes, count * sizeof *bytes);
    return 0;
}

const struct launch *fake_last_launch(void) { return &last; }
uint64_t fake_launches(void) { return launches; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **given, void **extra) {
    last = (struct launch){
        .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
        .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
        .shared_bytes = config->sharedMemBytes,
        .parameters = parameters,
    };
    strcpy(last.kernel, (const char *)f);
    for (uint32_t i = 0; i < parameters; i++) memcpy(&last.values[i], given[i], widths[i]);
    launches++;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *made, const void *image) {
    *made = (CUmodule)&module;
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *made, CUmodule of, const char *name) {
    // One kernel is loaded and launched before the next is loaded.
    strncpy(function, name, sizeof function - 1);
    *made = (CUfunction)function;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 227 * 1024 : 65536;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    memcpy(value, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = (CUcontext)&context;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an error of the stand-in";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

// Linked to by Triton's module, never called here.
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
