// Vector units chosen at run time, so that one portable binary is fast everywhere.
//
//     template <typename T> SOLAR_MEGA_INLINE void scale_body(const T* x, T* y, int64_t n) { ...plain loops... }
//     SOLAR_MEGA_ISA_VARIANTS(scale)
//     scale(x, y, n);     // compiled three times, the widest the machine has is called
//
// The bodies are ordinary loops that the compiler vectorises (`#pragma omp simd`); always inlined, they take on the
// instruction set of the variant that calls them. SOLAR_MEGA_CPU_ISA=base|avx2|avx512 overrides the choice, which
// is how the tests reach every variant. Other architectures have the base variant only (on AArch64 that is NEON).

#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#define SOLAR_MEGA_INLINE inline __attribute__((always_inline))

namespace solar_mega {

enum class Isa { base, avx2, avx512 };

inline Isa widest_isa() {
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::base;
}

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "base";
}

inline Isa choose_isa() {
  const Isa widest = widest_isa();
  const char* wanted = std::getenv("SOLAR_MEGA_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return widest;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512})
    if (isa <= widest && std::string(wanted) == isa_name(isa)) return isa;
  throw std::runtime_error(
      std::string("SOLAR_MEGA_CPU_ISA=") + wanted + ": this machine allows base up to " + isa_name(widest));
}

inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

} // namespace solar_mega

#ifdef __x86_64__
#ifdef __clang__
#define SOLAR_MEGA_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#else
#define SOLAR_MEGA_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")))
#endif
#define SOLAR_MEGA_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define SOLAR_MEGA_ISA_VARIANTS(name)                                                                   \
  template <typename... Args>                                                                           \
  SOLAR_MEGA_TARGET_AVX512 void name##_avx512(Args... args) {                                           \
    name##_body(args...);                                                                               \
  }                                                                                                     \
  template <typename... Args>                                                                           \
  SOLAR_MEGA_TARGET_AVX2 void name##_avx2(Args... args) {                                               \
    name##_body(args...);                                                                               \
  }                                                                                                     \
  template <typename... Args>                                                                           \
  void name(Args... args) {                                                                             \
    switch (::solar_mega::isa()) {                                                                      \
      case ::solar_mega::Isa::avx512: return name##_avx512(args...);                                    \
      case ::solar_mega::Isa::avx2: return name##_avx2(args...);                                        \
      case ::solar_mega::Isa::base: return name##_body(args...);                                        \
    }                                                                                                   \
  }
#else
#define SOLAR_MEGA_ISA_VARIANTS(name) \
  template <typename... Args>         \
  void name(Args... args) {           \
    name##_body(args...);             \
  }
#endif
