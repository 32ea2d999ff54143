// Error codes, and the text of the last failure.
#pragma once
#include <cstring>
#include <string>

#include "sanitizers.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorUnknown = 999,
};

namespace cuda_host {

// A place in a kernel or in a launch.
struct Site {
  const char* what;
  const char* file;
  int line;

  CUDA_HOST_UNSEEN bool same_as(const Site& other) const {
    return line == other.line && (file == other.file || (file && other.file && !std::strcmp(file, other.file)));
  }
};

struct Failure {
  cudaError_t code;
  std::string text;
};

// Of this thread, as with CUDA. `pending` is what cudaGetLastError returns next; the text outlives it.
inline thread_local cudaError_t pending = cudaSuccess;
inline thread_local Failure last_failure{cudaSuccess, ""};

inline cudaError_t remember(cudaError_t code, const std::string& text) {
  last_failure = {code, text};
  return pending = code;
}

struct ErrorName {
  cudaError_t code;
  const char *name, *text;
};
inline constexpr ErrorName kErrorNames[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorLaunchTimeout, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

inline const ErrorName& error_name(cudaError_t code) {
  static constexpr ErrorName unknown{cudaErrorUnknown, "cudaErrorUnknown", "unknown error"};
  for (const ErrorName& name : kErrorNames)
    if (name.code == code) return name;
  return unknown;
}

}  // namespace cuda_host

inline cudaError_t cudaPeekAtLastError() { return cuda_host::pending; }
inline cudaError_t cudaGetLastError() {
  const cudaError_t code = cuda_host::pending;
  cuda_host::pending = cudaSuccess;
  return code;
}
inline const char* cudaGetErrorName(cudaError_t code) { return cuda_host::error_name(code).name; }
inline const char* cudaGetErrorString(cudaError_t code) {
  const cuda_host::Failure& last = cuda_host::last_failure;
  return code != cudaSuccess && last.code == code ? last.text.c_str() : cuda_host::error_name(code).text;
}
