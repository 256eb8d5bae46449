/* A GPU that computes nothing, for PyTorch and Triton to talk to where there is none: the CUDA runtime, and what they use of driver,
 * cuBLAS, cuDNN, NCCL and NVRTC. Memory is set aside and never touched, kernels are counted and not run, copies to and from the host are
 * made. What the host does in a training step is then what it does with a GPU: which kernels it launches, where it waits, what it
 * allocates, how long it takes. What comes out is arbitrary. `__init__.py` builds it; functions that only have to succeed are made there.
 *
 * Read in PyTorch 2.13, DeepSpeed 0.19.8 and Triton 3.7.1, CUDA 13.0. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define GIB (1ull << 30)
#define RESERVED (GIB / 2) /* what a CUDA context takes */

/* ---- What is known of what was asked for ---- */

static void (*on_launch)(const char *), (*on_wait)(const char *);
static volatile long captured; /* kernels of the graph that is being captured */
/* One graph at a time is captured, in one process. Meanwhile a thread may not wait, unless it says that it knows what it does. */
static volatile int capturing;
static __thread int captures, mode = cudaStreamCaptureModeGlobal;
static enum cudaStreamCaptureMode strictness;

/* To be called with each kernel's name, and with each function that lets the host wait; null for nothing. */
void idle_watch(void (*launch)(const char *), void (*wait)(const char *)) { on_launch = launch; on_wait = wait; }

static cudaError_t launched(const char *name) {
  if (capturing) captured++;
  else if (on_launch) on_launch(name);
  return cudaSuccess;
}
static cudaError_t waited(const char *function) {
  if (capturing && mode != cudaStreamCaptureModeRelaxed && (captures || strictness == cudaStreamCaptureModeGlobal))
    return cudaErrorStreamCaptureUnsupported;
  if (on_wait) on_wait(function);
  return cudaSuccess;
}

/* ---- Kernels ---- */

#define SLOTS (1u << 20)
static struct { const void *host; const char *name; } kernels[SLOTS];
static unsigned slot(const void *host) {
  unsigned i = ((size_t)host >> 4) * 2654435761u % SLOTS;
  while (kernels[i].host && kernels[i].host != host) i = (i + 1) % SLOTS;
  return i;
}
static const char *name_of(const void *host) { unsigned i = slot(host); return kernels[i].host ? kernels[i].name : "?"; }

void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 64); }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int external, size_t size, int constant, int global) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c,
                            void *d, int *e) {
  unsigned i = slot(host);
  kernels[i].host = host, kernels[i].name = name;
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) {
  return launched(name_of(kernel));
}
cudaError_t cudaLaunchKernel(const void *host, dim3 g, dim3 b, void **a, size_t s, cudaStream_t t) { return launched(name_of(host)); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *host, void **a) { return launched(name_of(host)); }
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) { function(data); return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *host) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->ptxVersion = found->binaryVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *k, int b, size_t s, unsigned f) {
  *blocks = 2;
  return cudaSuccess;
}

/* ---- Memory ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stretch { char *start; size_t size; int type; } *stretches;
static size_t held, room, taken;

static size_t total(void) {
  const char *wanted = getenv("IDLE_GPU_BYTES");
  return wanted ? strtoull(wanted, 0, 10) : 140 * GIB;
}
static void *pages(size_t size) {
  void *start = mmap(0, size + !size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return start == MAP_FAILED ? 0 : start;
}
static void keep(void *start, size_t size, int type) {
  pthread_mutex_lock(&lock);
  if (held == room) stretches = realloc(stretches, (room = 2 * room + 1024) * sizeof *stretches);
  stretches[held++] = (struct stretch){start, size, type};
  pthread_mutex_unlock(&lock);
}
static size_t forget(void *start) {
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < held; i++)
    if (stretches[i].start == start) { size = stretches[i].size; stretches[i] = stretches[--held]; break; }
  pthread_mutex_unlock(&lock);
  return size;
}
static int type_of(const void *at) {
  int type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < held; i++)
    if ((char *)at >= stretches[i].start && (char *)at < stretches[i].start + stretches[i].size) { type = stretches[i].type; break; }
  pthread_mutex_unlock(&lock);
  return type;
}

cudaError_t cudaMalloc(void **start, size_t size) {
  if (taken + size > total() - RESERVED || !(*start = pages(size))) return cudaErrorMemoryAllocation;
  __sync_fetch_and_add(&taken, size);
  keep(*start, size, cudaMemoryTypeDevice);
  return cudaSuccess;
}
cudaError_t cudaFree(void *start) {
  if (!start) return cudaSuccess;
  size_t size = forget(start);
  munmap(start, size + !size);
  __sync_fetch_and_sub(&taken, size);
  return waited("cudaFree");
}
cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) {
  *start = pages(size);
  keep(*start, size, cudaMemoryTypeHost);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *start) { size_t size = forget(start); munmap(start, size + !size); return cudaSuccess; }
cudaError_t cudaHostRegister(void *start, size_t size, unsigned flags) { keep(start, size, cudaMemoryTypeHost); return cudaSuccess; }
cudaError_t cudaHostUnregister(void *start) { forget(start); return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { *all = total(), *left = *all - RESERVED - taken; return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
  memset(found, 0, sizeof *found);
  found->type = type_of(at), found->devicePointer = (void *)at;
  found->hostPointer = found->type == cudaMemoryTypeHost ? (void *)at : 0;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  /* On the device, only what processes tell each other: objects as bytes. */
  if (kind != cudaMemcpyDeviceToDevice || size < 1 << 16) memmove(to, from, size);
  const void *host = kind == cudaMemcpyDeviceToHost ? to : kind == cudaMemcpyHostToDevice ? from : 0;
  return host && type_of(host) == cudaMemoryTypeUnregistered ? waited("cudaMemcpyAsync of pageable memory") : launched("copy");
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  memmove(to, from, size);
  return waited("cudaMemcpy");
}
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) { return launched("memset"); }
cudaError_t cudaMemset(void *at, int value, size_t size) { return waited("cudaMemset"); }
cudaError_t cudaGetSymbolAddress(void **at, const void *symbol) { *at = (void *)symbol; return cudaSuccess; }

/* ---- The device: what an H200 says of itself ---- */

static int attribute(int which) {
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: case cudaDevAttrConcurrentKernels: return 1;
    default: return 0;
  }
}
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) { *value = attribute(which); return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "NVIDIA H200");
  found->totalGlobalMem = total(), found->major = 9, found->multiProcessorCount = 132, found->warpSize = 32;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
  found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->maxThreadsPerMultiProcessor = 2048, found->maxBlocksPerMultiProcessor = 32;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536, found->l2CacheSize = 50 << 20, found->textureAlignment = 512;
  found->sharedMemPerBlock = 49152, found->sharedMemPerBlockOptin = 232448, found->sharedMemPerMultiprocessor = 233472;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:01:00.0"); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return waited("cudaDeviceSynchronize"); }
const char *cudaGetErrorString(cudaError_t error) { 
  return error == cudaErrorMemoryAllocation            ? "out of memory"
         : error == cudaErrorStreamCaptureUnsupported ? "waiting while a graph is captured"
         : error == cudaErrorStreamCaptureImplicit    ? "the default stream waits for what a graph captures"
                                                      : "no such thing on an idle GPU";
}
const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }

/* ---- Streams, events, graphs ---- */

static void *handle(void) { return calloc(1, 4096); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = handle(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { *stream = handle(); return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waited("cudaStreamSynchronize"); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { *event = handle(); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = handle(); return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
struct event { struct timespec at; int captured; };
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  struct event *recorded = (struct event *)event;
  clock_gettime(CLOCK_MONOTONIC, &recorded->at);
  recorded->captured = capturing && stream; /* not the default stream, which can't be captured */
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return capturing && !stream && ((struct event *)event)->captured ? cudaErrorStreamCaptureImplicit : cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) { return cudaEventRecord(event, stream); }
static volatile int busy;
void idle_busy(int from_now_on) { busy = from_now_on; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return busy ? cudaErrorNotReady : cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waited("cudaEventSynchronize"); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t begin, cudaEvent_t end) {
  struct timespec *a = &((struct event *)begin)->at, *b = &((struct event *)end)->at;
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = capturing; return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
  *status = capturing;
  if (id) *id = capturing;
  if (graph) *graph = 0;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode wanted) {
  capturing = cudaStreamCaptureStatusActive, captures = 1, strictness = wanted, captured = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  capturing = captures = 0, *graph = handle();
  sprintf((char *)*graph, "graph of %ld kernels", captured);
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *wanted) {
  enum cudaStreamCaptureMode before = mode;
  mode = *wanted, *wanted = before;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
  *ready = handle();
  strcpy((char *)*ready, (char *)graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return launched((char *)graph); }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return cudaSuccess; }

/* ---- The driver ---- */

static int nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void *)nothing;
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
static char context[64];
struct function { char name[256]; };
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return 0; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return 0; }
CUresult cuDeviceGetName(char *name, int size, CUdevice device) { snprintf(name, size, "NVIDIA H200"); return 0; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) { *value = attribute(which); return 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) { *found = (CUcontext)context; return 0; }
CUresult cuCtxGetCurrent(CUcontext *found) { *found = (CUcontext)context; return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "no such thing on an idle GPU"; return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = handle(); return 0; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *o, void **v) { *module = handle(); return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  struct function *made = handle();
  strncpy(made->name, name, sizeof made->name - 1);
  *function = (CUfunction)made;
  return 0;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned s, CUstream t,
                        void **p, void **x) {
  return launched(((struct function *)f)->name);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **p, void **x) { return launched(((struct function *)f)->name); }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr at) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = at;
  else *(unsigned *)value = type_of((void *)at);
  return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int b, size_t s) { *blocks = 2; return 0; }

/* ---- Libraries ---- */

size_t cublasLtGetVersion(void) { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *o, void *a, void *b, void *c, void *d, void *p, int wanted, void *results, int *found) {
  memset(results, 0, 64);
  *found = 1;
  return 0;
}
int cublasLtMatmul() { return launched("cublasLtMatmul"); }
int cublasGemmEx() { return launched("cublasGemmEx"); }
int cublasSgemm_v2() { return launched("cublasSgemm"); }
int cublasGemmStridedBatchedEx() { return launched("cublasGemmStridedBatchedEx"); }
int cublasSgemmStridedBatched() { return launched("cublasSgemmStridedBatched"); }

size_t cudnnGetVersion(void) { return CUDNN; }
size_t cudnnGetCudartVersion(void) { return 13000; }
int cudnnGetProperty(int which, int *value) { *value = (int[]){CUDNN / 10000, CUDNN / 100 % 100, CUDNN % 100}[which]; return 0; }
const char *cudnnGetErrorString(int status) { return "no such thing on an idle GPU"; }
int cudnnBackendCreateDescriptor(int type, void **descriptor) { *descriptor = handle(); return 0; }
int cudnnBackendDestroyDescriptor(void *descriptor) { free(descriptor); return 0; }
int cudnnBackendExecute() { return launched("cudnnBackendExecute"); }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, long wanted, long *found, void *values) {
  enum { INT64 = 3, DESCRIPTOR = 15, ENGINES_OF_A_GRAPH = 802 };
  if (found) *found = type == INT64 || type == DESCRIPTOR;
  if (values && wanted && type == INT64) *(long *)values = name == ENGINES_OF_A_GRAPH;
  return 0;
}
int cudnnBatchNormalizationForwardTrainingEx() { return launched("cudnnBatchNormalizationForwardTraining"); }
int cudnnBatchNormalizationBackwardEx() { return launched("cudnnBatchNormalizationBackward"); }
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void *h, int m, int o, void *x, void *z, void *y, void *b, void *a,
                                                             size_t *bytes) {
  *bytes = 0;
  return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void *h, int m, int o, void *x, void *y, void *dy, void *dz, void *dx, void *db,
                                                      void *a, size_t *bytes) {
  *bytes = 0;
  return 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void *h, int m, int o, void *a, void *x, size_t *bytes) { *bytes = 0; return 0; }

int ncclGetVersion(int *version) { *version = 22907; return 0; }
const char *ncclGetErrorString(int error) { return "no such thing on an idle GPU"; }
int ncclCommInitRank(void **communicator) { *communicator = handle(); return 0; }
int ncclCommInitRankConfig(void **communicator) { *communicator = handle(); return 0; }
int ncclCommInitRankScalable(void **communicator) { *communicator = handle(); return 0; }
int ncclCommGetAsyncError(void *communicator, int *error) { *error = 0; return 0; }
int ncclCommCount(void *communicator, int *ranks) { *ranks = 1; return 0; }
int ncclCommUserRank(void *communicator, int *rank) { *rank = 0; return 0; }
static int alone(const void *from, void *to, size_t count, int type, const char *what) {
  static const int sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* by ncclDataType_t */
  if (from != to && count * sizes[type] < 1 << 16) memcpy(to, from, count * sizes[type]);
  return launched(what);
}
int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, void *c, void *s) {
  return alone(from, to, n, type, "ncclAllReduce");
}
int ncclReduceScatter(const void *from, void *to, size_t n, int type, int op, void *c, void *s) {
  return alone(from, to, n, type, "ncclReduceScatter");
}
int ncclAllGather(const void *from, void *to, size_t n, int type, void *c, void *s) { return alone(from, to, n, type, "ncclAllGather"); }
int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, void *c, void *s) {
  return alone(from, to, n, type, "ncclBroadcast");
}

int nvrtcVersion(int *major, int *minor) { *major = 13, *minor = 0; return 0; }
int nvrtcGetNumSupportedArchs(int *count) { *count = 1; return 0; }
int nvrtcGetSupportedArchs(int *which) { *which = 90; return 0; }
int nvrtcGetLoweredName(void *program, const char *expression, const char **name) { *name = "jitted"; return 0; }
int nvrtcGetPTXSize(void *program, size_t *size) { *size = 8; return 0; }
int nvrtcGetCUBINSize(void *program, size_t *size) { *size = 8; return 0; }
int nvrtcGetProgramLogSize(void *program, size_t *size) { *size = 8; return 0; }
const char *nvrtcGetErrorString(int error) { return "no such thing on an idle GPU"; }
