// Which of the four copies of a SIMD kernel runs. Every *.simd.cpp is compiled with FASTDIFF_ISA = baseline, avx2, avx512 and
// avx512bf16 (baseline alone where the processor is not x86-64) and defines one table of function pointers in the namespace of that name.
#pragma once

namespace fastdiff {

enum class Isa { baseline, avx2, avx512, avx512bf16 };

// The best level that the processor has, capped by the environment variable FASTDIFF_ISA=baseline|avx2|avx512|avx512bf16;
// read once.
Isa isa();

}  // namespace fastdiff

// Declares `extern const Type name` for every ISA that is compiled, and pick_name() that returns the one to use.
#ifdef __x86_64__
#define FASTDIFF_PER_ISA(Type, name)                  \
  namespace baseline { extern const Type name; }      \
  namespace avx2 { extern const Type name; }          \
  namespace avx512 { extern const Type name; }        \
  namespace avx512bf16 { extern const Type name; }    \
  inline const Type& pick_##name() {                  \
    switch (isa()) {                                  \
      case Isa::avx512bf16: return avx512bf16::name;  \
      case Isa::avx512: return avx512::name;          \
      case Isa::avx2: return avx2::name;              \
      default: return baseline::name;                 \
    }                                                 \
  }
#else
#define FASTDIFF_PER_ISA(Type, name)                  \
  namespace baseline { extern const Type name; }      \
  inline const Type& pick_##name() { return baseline::name; }
#endif
