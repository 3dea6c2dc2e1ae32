
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "common/tensor.h"
#include "ops/patchify/shape.h"

namespace fastdiff::patchify {
namespace {

// Pieces per thread worth waking one for: 32 KiB of elements.
int64_t grain(const Shape& s, int64_t bytes) { return std::max<int64_t>(1, 32768 * pieces(s) / std::max<int64_t>(1, bytes)); }

void to_tokens(const Tensor& x, const Shape& s, const Tensor& out) {
  const int size = static_cast<int>(x.element_size());
  const void* image = x.const_data_ptr();
  void* tokens = out.mutable_data_ptr();
  torch::stable::parallel_for(0, pieces(s), grain(s, out.numel() * size),
                              [&](int64_t begin, int64_t end) { pick_kernels().to_tokens(s, size, image, tokens, begin, end); });
}

void to_image(const Tensor& rows, const Shape& s, const Tensor& out) {
  const int size = static_cast<int>(out.element_size());
  const void* tokens = rows.const_data_ptr();
  void* image = out.mutable_data_ptr();
  torch::stable::parallel_for(0, pieces(s), grain(s, out.numel() * size),
                              [&](int64_t begin, int64_t end) { pick_kernels().to_image(s, size, tokens, image, begin, end); });
}

void patchify(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  if (out.numel()) to_tokens(x, shape_of(x, patch, order), out);
}

void unpatchify(const Tensor& tokens, std::vector<int64_t> patch, std::vector<int64_t>, std::string order, const Tensor& out) {
  if (out.numel()) to_image(torch::stable::contiguous(tokens), shape_of(out, patch, order), out);
}

Shape with_columns(Shape s) {
  s.columns = true;
  return s;
}

void space_to_depth(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  if (out.numel()) to_tokens(x, with_columns(shape_of(x, patch, order)), out);
}

void depth_to_space(const Tensor& x, std::vector<int64_t> patch, std::string order, const Tensor& out) {
  if (out.numel()) to_image(torch::stable::contiguous(x), with_columns(shape_of(out, patch, order)), out);
}

std::optional<Tensor> patchify_eager(const Tensor& x, std::vector<int64_t> patch, std::string order) {
  if (!is_native_float(x) || static_cast<size_t>(x.dim()) != patch.size() + 2 || x.numel() == 0) return std::nullopt;
  int64_t tokens = 1, width = x.size(1);
  for (size_t i = 0; i < patch.size(); ++i) {
    const int64_t size = x.size(2 + i);
    if (size % patch[i]) return std::nullopt;
    tokens *= size / patch[i], width *= patch[i];
  }
  const Tensor out = empty_like_type<3>(x, {x.size(0), tokens, width});
  to_tokens(x, shape_of(x, patch, order), out);
  return out;
}

std::optional<Tensor> unpatchify_eager(const Tensor& tokens, std::vector<int64_t> patch, std::vector<int64_t> grid, std::string order) {
  if (!is_native_float(tokens) || tokens.dim() != 3 || grid.size() != 2 || tokens.numel() == 0 || !tokens.is_contiguous()) return std::nullopt;
  const int64_t volume = patch[0] * patch[1];
  if (tokens.size(1) != grid[0] * grid[1] || tokens.size(2) % volume) return std::nullopt;
  const Tensor out = empty_like_type<4>(tokens, {tokens.size(0), tokens.size(2) / volume, grid[0] * patch[0], grid[1] * patch[1]});
  to_image(tokens, shape_of(out, patch, order), out);
  return out;
}

}  // namespace
}  // namespace fastdiff::patchify

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("patchify(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
  m.def("patchify_eager(Tensor x, int[] patch, str order) -> Tensor?");
  m.def("unpatchify_eager(Tensor tokens, int[] patch, int[] grid, str order) -> Tensor?");
  m.def("unpatchify(Tensor tokens, int[] patch, int[] grid, str order, Tensor(a!) out) -> ()");
  m.def("space_to_depth(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
  m.def("depth_to_space(Tensor x, int[] patch, str order, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("patchify", TORCH_BOX(&fastdiff::patchify::patchify));
  m.impl("patchify_eager", TORCH_BOX(&fastdiff::patchify::patchify_eager));
  m.impl("unpatchify_eager", TORCH_BOX(&fastdiff::patchify::unpatchify_eager));
  m.impl("unpatchify", TORCH_BOX(&fastdiff::patchify::unpatchify));
  m.impl("space_to_depth", TORCH_BOX(&fastdiff::patchify::space_to_depth));
  m.impl("depth_to_space", TORCH_BOX(&fastdiff::patchify::depth_to_space));
}
