// What lets one header serve g++, nvcc and the tests' host harness.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SNN_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SNN_HD inline __attribute__((always_inline))
#else
#define SNN_HD inline
#endif
