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

// The best that this CPU has, or what MEMDLM_CPU_CAPABILITY (default, avx2, avx512, avx512_bf16)
// holds it down to; where that is not set, torch's own ATEN_CPU_CAPABILITY does.
inline InstructionSet instruction_set() {
#if defined(__x86_64__)
  const char* asked = std::getenv("MEMDLM_CPU_CAPABILITY");
  if (!asked) asked = std::getenv("ATEN_CPU_CAPABILITY");
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
  const struct {
    const char* name;
    InstructionSet set;
    bool supported;
  } known[] = {
      {"avx512_bf16", InstructionSet::kAvx512Bf16, v4 && __builtin_cpu_supports("avx512bf16")},
      {"avx512", InstructionSet::kAvx512, v4},
      {"avx2", InstructionSet::kAvx2, bool(__builtin_cpu_supports("x86-64-v3"))},
  };
  if (asked && !std::strcmp(asked, "default")) return InstructionSet::kBaseline;
  bool allowed = !asked;  // from the one that was asked for on
  for (const auto& each : known) {
    allowed = allowed || !std::strcmp(asked, each.name);
    if (allowed && each.supported) return each.set;
  }
#endif
  return InstructionSet::kBaseline;
}

// Each calls `body`, compiled with all that it calls for one instruction set.
template <class Body>
__attribute__((flatten)) auto with_baseline(const Body& body) {
  return body();
}
template <class Body>
__attribute__((flatten)) MEMDLM_AVX2 auto with_avx2(const Body& body) {
  return body();
}
template <class Body>
__attribute__((flatten)) MEMDLM_AVX512 auto with_avx512(const Body& body) {
  return body();
}

// Calls `body` with the best of the above that this CPU has and may use.
template <class Body>
auto with_best_instructions(const Body& body) {
  const InstructionSet best = instruction_set();
  if (best >= InstructionSet::kAvx512) return with_avx512(body);
  if (best == InstructionSet::kAvx2) return with_avx2(body);
  return with_baseline(body);
}

}  // namespace memdlm
