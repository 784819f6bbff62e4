// libcuda.so.1 without a device, for Triton's launcher (triton/backends/nvidia/driver.c): it loads cubins, records the
// parameters of each launch by the sizes that the cubin itself gives, and refuses what a driver refuses.
//
// Rules: CUDA Driver API, cuLaunchKernelEx and cuTensorMapEncodeTiled; CUDA C++ Programming Guide, "Compute
// Capabilities". Cubins: ELF, whose sections .nv.info and .nv.info.<kernel> say what a launch has to look like.

#include <cuda.h>
#include <elf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_PARAMETERS = 256, MOST_BYTES = 4096, MOST_LAUNCHES = 256, KIB = 1024 };

typedef struct {
  int capability, shared_optin, shared_total, multiprocessors;
} Device;

typedef struct {
  char *image;
} Module;

typedef struct {
  uint32_t ordinal, offset, size;
} Parameter;

typedef struct {
  char name[256];
  int registers, local, threads[3], static_shared, dynamic_limit, count;
  Parameter parameters[MOST_PARAMETERS];
} Function;

// What tests read: the layout has its twin in stub_driver.py.
typedef struct {
  char name[256];
  uint32_t grid[3], block[3], shared, count;
  uint64_t stream;
  uint32_t offset[MOST_PARAMETERS], size[MOST_PARAMETERS];
  unsigned char bytes[MOST_BYTES];
} Launch;

// In the 128 bytes of a CUtensorMap, of which a real driver says nothing.
typedef struct {
  uint64_t address;
  uint64_t unused; // Triton changes a bit of it for old drivers
  uint16_t type, swizzle, rank, fill;
  uint32_t dims[5];
  uint64_t strides[4];
  uint16_t box[5], magic;
} TensorMap;

_Static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

static Device device = {90, 227 * KIB, 228 * KIB, 132};
static Launch launches[MOST_LAUNCHES];
static int num_launches;
static uint64_t host_first, host_end;
static char reason[512] = "no error";
static CUcontext current;

void stub_device(int capability, int shared_optin) {
  device.capability = capability;
  device.shared_optin = shared_optin;
  device.shared_total = shared_optin + KIB;
  num_launches = 0;
  host_first = host_end = 0;
}

// Addresses that are not the device's.
void stub_host(uint64_t first, uint64_t end) { host_first = first, host_end = end; }

int stub_count(void) { return num_launches; }

const Launch *stub_launch(int i) { return &launches[i]; }

static CUresult refuse(CUresult code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(reason, sizeof(reason), format, arguments);
  va_end(arguments);
  return code;
}

#define REQUIRE(condition, ...)                                                                                        \
  do {                                                                                                                 \
    if (!(condition)) return refuse(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__);                                            \
  } while (0)

// --- devices and contexts --------------------------------------------------------------------------------------------

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) { return *version = 13040, CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult code, const char **text) { return *text = reason, CUDA_SUCCESS; }

CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice *found, int ordinal) {
  REQUIRE(ordinal == 0, "device %d: there is one", ordinal);
  return *found = 0, CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { return *context = current, CUDA_SUCCESS; }

CUresult cuCtxSetCurrent(CUcontext context) { return current = context, CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *found) { return *found = 0, CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice of) {
  return *context = (CUcontext)&device, CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice of) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device.capability / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device.capability % 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device.shared_optin; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device.shared_total; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device.multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
  default: return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d is not asked of this stub", attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  REQUIRE(pointer < host_first || pointer >= host_end, "0x%llx is no address of the device", pointer);
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer) {
  return cuPointerGetAttribute(data[0], attributes[0], pointer);
}

// --- modules ---------------------------------------------------------------------------------------------------------

static const Elf64_Shdr *section_of(const Module *module, const char *prefix, const char *name) {
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)module->image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(module->image + header->e_shoff);
  const char *names = module->image + sections[header->e_shstrndx].sh_offset;
  size_t length = strlen(prefix);
  for (int i = 0; i < header->e_shnum; ++i) {
    const char *own = names + sections[i].sh_name;
    if (!strncmp(own, prefix, length) && !strcmp(own + length, name)) return &sections[i];
  }
  return NULL;
}

CUresult cuModuleLoadData(CUmodule *found, const void *image) {
  const Elf64_Ehdr *header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_machine != EM_CUDA)
    return refuse(CUDA_ERROR_INVALID_IMAGE, "not a cubin");
  // the capability that the code is for: up to version 7 of the format in the first byte
  int is_new = header->e_ident[EI_ABIVERSION] >= 8;
  int capability = header->e_flags >> (is_new ? 8 : 0) & 0xff;
  int fits = capability / 10 == device.capability / 10 && capability <= device.capability;
  if (!fits)
    return refuse(CUDA_ERROR_NO_BINARY_FOR_GPU, "code for sm_%d on a device of sm_%d", capability, device.capability);
  Module *module = malloc(sizeof(Module));
  size_t sections = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  size_t segments = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize; // one of the two comes last
  size_t size = sections > segments ? sections : segments;
  module->image = malloc(size);
  memcpy(module->image, image, size);
  return *found = (CUmodule)module, CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) {
  free(((Module *)module)->image);
  free(module);
  return CUDA_SUCCESS;
}

// Attributes of the format { u8 format, u8 name, u16 value or size, bytes }.
enum { SIZED = 4, REQUIRED_THREADS = 0x10, FRAME_SIZE = 0x11, PARAMETER = 0x17, REGISTERS = 0x2f };

static void read_attributes(const Module *module, const Elf64_Shdr *section, Function *function, int symbol) {
  const unsigned char *at = (unsigned char *)module->image + section->sh_offset, *end = at + section->sh_size;
  while (at < end) {
    uint16_t size;
    uint32_t words[3] = {0};
    memcpy(&size, at + 2, 2);
    if (at[0] != SIZED) {
      at += 4;
      continue;
    }
    memcpy(words, at + 4, size < sizeof(words) ? size : sizeof(words));
    int is_ours = symbol < 0 || words[0] == (uint32_t)symbol;
    if (at[1] == REQUIRED_THREADS) memcpy(function->threads, words, sizeof(words));
    if (at[1] == REGISTERS && is_ours) function->registers = words[1];
    if (at[1] == FRAME_SIZE && is_ours) function->local = words[1];
    if (at[1] == PARAMETER && function->count < MOST_PARAMETERS) {
      Parameter parameter = {words[1] & 0xffff, words[1] >> 16, words[2] >> 18};
      function->parameters[function->count++] = parameter;
    }
    at += 4 + size;
  }
}

static int by_ordinal(const void *a, const void *b) {
  return (int)((const Parameter *)a)->ordinal - (int)((const Parameter *)b)->ordinal;
}

static int symbol_named(const Module *module, const char *name) {
  const Elf64_Shdr *table = section_of(module, ".symtab", ""), *strings = section_of(module, ".strtab", "");
  if (!table || !strings) return -1;
  const Elf64_Sym *symbols = (const Elf64_Sym *)(module->image + table->sh_offset);
  for (size_t i = 0; i < table->sh_size / sizeof(Elf64_Sym); ++i)
    if (!strcmp(module->image + strings->sh_offset + symbols[i].st_name, name)) return (int)i;
  return -1;
}

CUresult cuModuleGetFunction(CUfunction *found, CUmodule handle, const char *name) {
  const Module *module = (const Module *)handle;
  const Elf64_Shdr *info = section_of(module, ".nv.info.", name), *common = section_of(module, ".nv.info", "");
  int symbol = symbol_named(module, name);
  if (!info || !common || symbol < 0) return refuse(CUDA_ERROR_NOT_FOUND, "the module has no kernel %s", name);
  Function *function = calloc(1, sizeof(Function));
  snprintf(function->name, sizeof(function->name), "%s", name);
  read_attributes(module, info, function, -2);
  read_attributes(module, common, function, symbol);
  qsort(function->parameters, function->count, sizeof(Parameter), by_ordinal);
  const Elf64_Shdr *shared = section_of(module, ".nv.shared.", name);
  function->static_shared = shared ? (int)shared->sh_size : 0;
  // from sm_90 on, the system's KiB of each block, which is none of the kernel's, is counted there
  if (device.capability >= 90 && function->static_shared >= KIB) function->static_shared -= KIB;
  function->dynamic_limit = 48 * KIB - function->static_shared;
  return *found = (CUfunction)function, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
  const Function *function = (const Function *)handle;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->local; break;
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->static_shared; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = function->threads[0]; break;
  default: return refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d of a function is not asked of this stub", attribute);
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  Function *function = (Function *)handle;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return refuse(CUDA_ERROR_NOT_SUPPORTED, "attribute %d of a function", attribute);
  REQUIRE(value >= 0 && value + function->static_shared <= device.shared_optin,
          "%d bytes of shared memory, and the device has %d", value, device.shared_optin);
  return function->dynamic_limit = value, CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}

// --- tensor maps -----------------------------------------------------------------------------------------------------

static int bytes_of(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_UINT32:
  case CU_TENSOR_MAP_DATA_TYPE_INT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
  case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
  default: return 0;
  }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  int bytes = bytes_of(type);
  const int spans[] = {[CU_TENSOR_MAP_SWIZZLE_NONE] = 1 << 30, [CU_TENSOR_MAP_SWIZZLE_32B] = 32,
                       [CU_TENSOR_MAP_SWIZZLE_64B] = 64, [CU_TENSOR_MAP_SWIZZLE_128B] = 128};
  REQUIRE(device.capability >= 90, "a tensor map on sm_%d: they begin with sm_90", device.capability);
  REQUIRE((uintptr_t)map % 64 == 0, "a tensor map at %p: a multiple of 64 is needed", (void *)map);
  REQUIRE(bytes, "data type %d", type);
  REQUIRE(rank >= 1 && rank <= 5, "rank %u: 1 to 5", rank);
  REQUIRE(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE, "interleave %d is not asked of this stub", interleave);
  REQUIRE((unsigned)swizzle <= CU_TENSOR_MAP_SWIZZLE_128B, "swizzle %d", swizzle);
  REQUIRE((uintptr_t)address % 16 == 0, "a tensor at %p: a multiple of 16 is needed", address);
  REQUIRE(address && ((uint64_t)address < host_first || (uint64_t)address >= host_end), "a tensor at %p", address);
  REQUIRE((unsigned)promotion <= CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "L2 promotion %d", promotion);
  int is_float = type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  REQUIRE(fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || is_float, "NaN outside of a tensor of integers");
  TensorMap made = {.address = (uint64_t)address, .type = type, .swizzle = swizzle, .rank = rank, .fill = fill};
  for (cuuint32_t i = 0; i < rank; ++i) {
    REQUIRE(dims[i] >= 1 && dims[i] <= 1ull << 32, "dimension %u has size %llu", i, (unsigned long long)dims[i]);
    REQUIRE(box[i] >= 1 && box[i] <= 256, "the box has %u in dimension %u: 1 to 256", box[i], i);
    REQUIRE(steps[i] >= 1 && steps[i] <= 8, "steps of %u elements", steps[i]);
    made.dims[i] = dims[i], made.box[i] = box[i];
    if (i + 1 == rank) break;
    REQUIRE(strides[i] % 16 == 0 && strides[i] < 1ull << 40, "stride %llu: a multiple of 16 below 2^40",
            (unsigned long long)strides[i]);
    made.strides[i] = strides[i];
  }
  REQUIRE(box[0] * bytes % 16 == 0, "rows of the box have %d bytes: a multiple of 16 is needed", box[0] * bytes);
  REQUIRE((int)box[0] * bytes <= spans[swizzle], "rows of the box have %d bytes, the swizzle %d", box[0] * bytes,
          spans[swizzle]);
  made.magic = 0x7a7a;
  memset(map, 0, sizeof(*map));
  memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

// --- launches --------------------------------------------------------------------------------------------------------

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
  const Function *function = (const Function *)handle;
  uint32_t grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  uint32_t block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  const uint32_t most[3] = {0x7fffffff, 65535, 65535};
  for (int i = 0; i < 3; ++i) {
    REQUIRE(grid[i] >= 1 && grid[i] <= most[i], "%s: %u blocks in dimension %d", function->name, grid[i], i);
    REQUIRE(block[i] == (uint32_t)function->threads[i], "%s: %u threads, compiled for %d", function->name, block[i],
            function->threads[i]);
  }
  REQUIRE(block[0] * block[1] * block[2] <= 1024, "%s: %u threads", function->name, block[0]);
  uint32_t registers = (function->registers + 7) / 8 * 8 * block[0];
  if (registers > 65536)
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %u registers", function->name, registers);
  REQUIRE((int)config->sharedMemBytes <= function->dynamic_limit, "%s: %u bytes of shared memory, %d were asked for",
          function->name, config->sharedMemBytes, function->dynamic_limit);
  REQUIRE(config->numAttrs == 0, "%s: launch attributes are not asked of this stub", function->name);
  REQUIRE(!extra && num_launches < MOST_LAUNCHES, "%s: launch %d", function->name, num_launches);
  Launch *launch = &launches[num_launches];
  memset(launch, 0, sizeof(*launch));
  memcpy(launch->name, function->name, sizeof(launch->name));
  memcpy(launch->grid, grid, sizeof(grid)), memcpy(launch->block, block, sizeof(block));
  launch->shared = config->sharedMemBytes, launch->stream = (uint64_t)config->hStream;
  launch->count = function->count;
  for (int i = 0; i < function->count; ++i) {
    Parameter parameter = function->parameters[i];
    REQUIRE((int)parameter.ordinal == i && parameter.offset + parameter.size <= MOST_BYTES, "%s: parameter %d",
            function->name, i);
    REQUIRE(parameters[i], "%s: parameter %d is missing", function->name, i);
    launch->offset[i] = parameter.offset, launch->size[i] = parameter.size;
    memcpy(launch->bytes + parameter.offset, parameters[i], parameter.size);
  }
  ++num_launches;
  return CUDA_SUCCESS;
}
