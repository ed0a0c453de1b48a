// The instruction sets that a kernel is compiled for, and the choice among them at run time.
#pragma once

#include <cstdlib>
#include <cstring>

namespace memdlm {

enum class InstructionSet { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

#if defined(__x86_64__)
#define MEMDLM_AVX2 __attribute__((target("arch=x86-64-v3")))
#define MEMDLM_AVX512 __attribute__((target("arch=x86-64-v4")))
#define MEMDLM_AVX512_BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#else
#define MEMDLM_AVX2
#define MEMDLM_AVX512
#define MEMDLM_AVX512_BF16
#endif

// The best that this CPU has, or what torch's own ATEN_CPU_CAPABILITY holds it down to.
inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const auto allows = [asked](const char* name) { return !asked || !std::strcmp(asked, name); };
  if (asked && !std::strcmp(asked, "default")) return InstructionSet::kBaseline;
  if (!asked && __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"))
    return InstructionSet::kAvx512Bf16;
  if (allows("avx512") && __builtin_cpu_supports("x86-64-v4")) return InstructionSet::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return InstructionSet::kAvx2;
#endif
  return InstructionSet::kBaseline;
}

}  // namespace memdlm
