#include "common/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string_view>

namespace fastdiff {
namespace {

Isa detect() {
  Isa best = Isa::baseline;
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
      best = __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  }
#endif
  const char* text = std::getenv("FASTDIFF_ISA");
  const std::string_view wanted = text ? text : "";
  const Isa cap = wanted == "baseline" ? Isa::baseline : wanted == "avx2" ? Isa::avx2 : wanted == "avx512" ? Isa::avx512 : Isa::avx512bf16;
  return cap < best ? cap : best;
}

int64_t isa_number() { return static_cast<int64_t>(isa()); }

}  // namespace

Isa isa() {
  static const Isa level = detect();
  return level;
}

}  // namespace fastdiff

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) { m.def("isa() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&fastdiff::isa_number)); }
