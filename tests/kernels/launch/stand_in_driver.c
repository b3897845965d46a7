// A stand-in for libcuda.so.1 in which nothing computes. It has the functions that Triton's driver
// calls. Launches are written to the file STAND_IN_LOG; their grids and every TMA descriptor are
// held to the limits that the CUDA documentation states. An error's text says which was broken.
#include "cuda.h"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int context;
static const char *complaint = "no complaint";

static CUresult verdict(const char *broken) {
  if (!broken) return CUDA_SUCCESS;
  complaint = broken;
  return CUDA_ERROR_INVALID_VALUE;
}

static int shared_limit(void) { return atoi(getenv("STAND_IN_SHARED")); }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  const char *broken = 0;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) broken = "an empty grid";
  if (config->gridDimX > 2147483647u) broken = "grid x beyond 2^31 - 1";
  if (config->gridDimY > 65535u || config->gridDimZ > 65535u) broken = "grid y or z beyond 65535";
  if (config->blockDimX * config->blockDimY * config->blockDimZ > 1024u) broken = "block beyond 1024";
  if (config->sharedMemBytes > (unsigned)shared_limit()) broken = "shared memory beyond the limit";
  if (!broken) {
    FILE *log = fopen(getenv("STAND_IN_LOG"), "a");
    fprintf(log, "%s\n", (const char *)f);
    fclose(log);
  }
  return verdict(broken);
}

static unsigned size_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

static unsigned width_of(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
    default: return 128;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *base, const cuuint64_t *dim, const cuuint64_t *stride,
                                const cuuint32_t *box, const cuuint32_t *step,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const char *broken = 0;
  unsigned size = size_of(type), width = width_of(swizzle);
  if ((uintptr_t)map % 64) return verdict("TMA: the descriptor is not at 64 bytes");
  if (rank < 1 || rank > 5) return verdict("TMA: rank is not 1 to 5");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return verdict("TMA: interleaving is not known");
  if ((uintptr_t)base % 16) broken = "TMA: the base is not at 16 bytes";
  for (unsigned i = 0; i < rank; i++) {
    if (!dim[i] || dim[i] > 1ull << 32) broken = "TMA: a size is not 1 to 2^32";
    if (!box[i] || box[i] > 256) broken = "TMA: a box is not 1 to 256";
    if (!step[i] || step[i] > 8) broken = "TMA: an element stride is not 1 to 8";
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    if (stride[i] % 16 || stride[i] >= 1ull << 40) broken = "TMA: a stride is not a multiple of 16";
    // Not in the documentation's list; rows that overlap are never meant here.
    if (stride[i] < dim[0] * size) broken = "TMA: rows overlap";
  }
  if (box[0] * size % 16) broken = "TMA: the inner box is not a multiple of 16 bytes";
  if (width && box[0] * size > width) broken = "TMA: the inner box is wider than the swizzle";
  return verdict(broken);
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit(); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = shared_limit() + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

// A function is its name.
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  *f = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

// Host memory stands for the device's: a pointer is its own device pointer.
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)out = pointer;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *attributes, void **out,
                                CUdeviceptr pointer) {
  for (unsigned i = 0; i < n; i++) *(CUdeviceptr *)out[i] = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = complaint;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
  return cuCtxGetCurrent(retained);
}

CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
  *n = 1;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)&context;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuTensorMapEncodeIm2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                 void *base, const cuuint64_t *dim, const cuuint64_t *stride,
                                 const int *lower, const int *upper, cuuint32_t channels,
                                 cuuint32_t pixels, const cuuint32_t *step,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return verdict("TMA: im2col is not known");
}
