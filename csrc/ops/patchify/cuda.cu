#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/launch.cuh"
#include "ops/patchify/kernel.cuh"
#include "ops/patchify/shape.h"

namespace fastdiff::patchify {
namespace {

template <bool ToTokens>
void run(const char* op, const Tensor& image, const Tensor& tokens, Shape s, bool columns) {
  if (tokens.numel() == 0) return;
  s.columns = columns;
  const Plan p = plan_of(s, static_cast<int>(tokens.element_size()), image.data_ptr(), tokens.data_ptr());
  on_stream_of(tokens, op, [&](const Launcher& launch) {
    if (tokens.element_size() == 4) run<uint32_t, ToTokens>(launch, s, p, data<uint32_t>(image), data<uint32_t>(tokens));
    else run<uint16_t, ToTokens>(launch, s, p, data<uint16_t>(image), data<uint16_t>(tokens));
  });
}

void patchify(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  run<true>("patchify", x, out, shape_of(x, patch, order), false);
}

void unpatchify(const Tensor& tokens, std::vector<int64_t> patch, std::vector<int64_t>, std::string order, const Tensor& out) {
  run<false>("unpatchify", out, torch::stable::contiguous(tokens), shape_of(out, patch, order), false);
}

void space_to_depth(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  run<true>("space_to_depth", x, out, shape_of(x, patch, order), true);
}

void depth_to_space(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  run<false>("depth_to_space", out, torch::stable::contiguous(x), shape_of(out, patch, order), true);
}

}  // namespace
}  // namespace fastdiff::patchify

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cuda, m) {
  m.def("patchify(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
  m.def("unpatchify(Tensor tokens, int[] patch, int[] grid, str order, Tensor(a!) out) -> ()");
  m.def("space_to_depth(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
  m.def("depth_to_space(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  m.impl("patchify", TORCH_BOX(&fastdiff::patchify::patchify));
  m.impl("unpatchify", TORCH_BOX(&fastdiff::patchify::unpatchify));
  m.impl("space_to_depth", TORCH_BOX(&fastdiff::patchify::space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&fastdiff::patchify::depth_to_space));
}
