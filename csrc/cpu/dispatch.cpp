// Exports every kernel as snn_<name>(const Arguments*), running the widest build this processor has.
#include "kernels.h"

SNN_NAMESPACE(base)
#if SSB_X86
SNN_NAMESPACE(v3)
SNN_NAMESPACE(v4)
#endif

namespace {

enum Isa { kBase, kV3, kV4 };
constexpr const char* kNames[] = {"baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)"};

#if SSB_X86
// What tells the processors of x86-64-v3 and v4; older compilers cannot ask for the levels by name.
bool is_v3() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("fma");
}
bool is_v4() {
  return is_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

Isa widest() {
#if SSB_X86
  if (is_v3()) return is_v4() ? kV4 : kV3;
#endif
  return kBase;
}

Isa chosen = widest();

// No exception may leave a C function; memory is all that a kernel can run out of.
template <class Arguments> int64_t guarded(int64_t (*kernel)(const Arguments&), const Arguments* a) {
  try {
    return kernel(*a);
  } catch (...) {
    return kOutOfMemory;
  }
}

}  // namespace

#define SNN_API extern "C" __attribute__((visibility("default")))

// The instruction set in force. `limit` in 0..2 lowers it (tests compare the builds); -1 only asks.
SNN_API const char* snn_instruction_set(int limit) {
  if (limit >= 0) {
    Isa best = widest();
    chosen = limit < best ? static_cast<Isa>(limit) : best;
  }
  return kNames[chosen];
}

// Whether this is an AMD processor with AVX-512, for which MKL picks narrower code than oneDNN.
SNN_API int snn_prefers_onednn() {
#if SSB_X86
  return is_v4() && __builtin_cpu_is("amd");
#else
  return 0;
#endif
}

#if SSB_X86
#define SNN_EXPORT(name, Arguments)                                      \
  SNN_API int64_t snn_##name(const Arguments* a) {                       \
    if (chosen == kV4) return guarded(snn::v4::name, a);                 \
    return guarded(chosen == kV3 ? snn::v3::name : snn::base::name, a);  \
  }
#else
#define SNN_EXPORT(name, Arguments) \
  SNN_API int64_t snn_##name(const Arguments* a) { return guarded(snn::base::name, a); }
#endif

SNN_KERNELS(SNN_EXPORT)
