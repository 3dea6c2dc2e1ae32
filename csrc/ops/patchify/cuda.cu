#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/launch.cuh"
#include "ops/patchify/kernel.cuh"
#include "ops/patchify/shape.h"

namespace fastdiff::patchify {
namespace {

template <bool ToTokens>
void run(const char* op, const Tensor& image, const Tensor& tokens, const Shape& s) {
  const int64_t n = tokens.numel();
  if (n == 0) return;
  on_stream_of(tokens, op, [&](const Launcher& launch) {
    if (tokens.element_size() == 4) run<uint32_t, ToTokens>(launch, s, data<uint32_t>(image), data<uint32_t>(tokens), n);
    else run<uint16_t, ToTokens>(launch, s, data<uint16_t>(image), data<uint16_t>(tokens), n);
  });
}

void patchify(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  run<true>("patchify", x, out, shape_of(x, patch, order));
}

void unpatchify(const Tensor& tokens, std::vector<int64_t> patch, std::vector<int64_t>, std::string order, const Tensor& out) {
  run<false>("unpatchify", out, torch::stable::contiguous(tokens), shape_of(out, patch, order));
}

}  // namespace
}  // namespace fastdiff::patchify

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cuda, m) {
  m.def("patchify(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
  m.def("unpatchify(Tensor tokens, int[] patch, int[] grid, str order, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&fastdiff::patchify::patchify));
  m.impl("unpatchify", TORCH_BOX(&fastdiff::patchify::unpatchify));
}
