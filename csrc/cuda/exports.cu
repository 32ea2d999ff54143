// Exports every kernel as snn_cuda_<name>(const Arguments*, device, stream): 0, or kCudaError - error.
#include "kernels.h"

namespace {

// The caller's device is the current one again afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error(cudaGetDevice(&before_)) {
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Arguments>
int64_t guarded(cudaError_t (*kernel)(const Arguments&, cudaStream_t), const Arguments* a, int device, void* stream) {
  DeviceGuard guard(device);
  cudaError_t error = guard.error;
  if (error == cudaSuccess) error = kernel(*a, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return 0;
  cudaGetLastError();  // reported here, and not again by the next call
  return kCudaError - static_cast<int64_t>(error);
}

}  // namespace

#define SNN_API extern "C" __attribute__((visibility("default")))

#define SNN_EXPORT(name, Arguments)                                                             \
  SNN_API int64_t snn_cuda_##name(const Arguments* a, int device, void* stream) {               \
    return guarded(snn::cuda::name, a, device, stream);                                         \
  }
SNN_CUDA_KERNELS(SNN_EXPORT)

// What a kernel's negative result means.
SNN_API const char* snn_cuda_error(int64_t result) {
  return cudaGetErrorString(static_cast<cudaError_t>(kCudaError - result));
}
