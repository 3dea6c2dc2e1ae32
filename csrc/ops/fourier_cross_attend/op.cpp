#include "ops/fourier_cross_attend/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::fourier_cross_attend {
namespace {

using torch::stable::Tensor;

const float* in(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }
float* out(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Keeps the tensors a Problem points into alive.
struct Inputs {
  Tensor u, rows, columns, planes;
  Problem problem;
  Inputs(const Tensor& u_, const Tensor& rows_, const Tensor& columns_, const Tensor& planes_)
      : u(torch::stable::contiguous(u_)), rows(torch::stable::contiguous(rows_)), columns(torch::stable::contiguous(columns_)),
        planes(torch::stable::contiguous(planes_)),
        problem{u.size(0), u.size(1), u.size(2), u.size(3), rows.size(3), columns.size(3), in(u), in(rows), in(columns), in(planes)} {}
};

// Queries per item: as many as share the planes' way through L1, fewer where threads would be idle. An item is of one sample.
int64_t block(const Problem& p) { return std::clamp<int64_t>(p.queries() / 32, 1, 8); }

template <class F>
void for_queries(const Problem& p, const F& f) {
  const int64_t n = block(p), heads = p.H * p.M, items = (heads + n - 1) / n;
  for_items(p.B * items, pick_kernels().scratch(p, n), [&](int64_t item, float* scratch) {
    const int64_t first = item / items * heads, begin = first + item % items * n;
    f(begin, std::min(begin + n, first + heads), scratch);
  });
}

void grid_attention(const Tensor& u, const Tensor& rows, const Tensor& columns, const Tensor& planes, const Tensor& sums, const Tensor& row_sums,
                    const Tensor& column_sums, const Tensor& lse, const Tensor& lse_low) {
  if (lse.numel() == 0) return;
  const Inputs inputs(u, rows, columns, planes);
  const Problem& p = inputs.problem;
  const Sums s{out(sums), out(row_sums), out(column_sums), out(lse), out(lse_low)};
  for_queries(p, [&](int64_t begin, int64_t end, float* scratch) { pick_kernels().forward(p, s, begin, end, scratch); });
}

void grid_attention_backward(const Tensor& dsums_, const Tensor& drow_sums_, const Tensor& dcolumn_sums_, const Tensor& u, const Tensor& rows,
                             const Tensor& columns, const Tensor& planes, const Tensor& sums_, const Tensor& row_sums_, const Tensor& column_sums_,
                             const Tensor& lse_, const Tensor& lse_low_, bool planes_grad, const Tensor& du, const Tensor& drows, const Tensor& dcolumns, const Tensor& dplanes) {
  const Inputs inputs(u, rows, columns, planes);
  const Problem& p = inputs.problem;
  const Tensor dsums = torch::stable::contiguous(dsums_), drow_sums = torch::stable::contiguous(drow_sums_),
               dcolumn_sums = torch::stable::contiguous(dcolumn_sums_), lse = torch::stable::contiguous(lse_),
               lse_low = torch::stable::contiguous(lse_low_), sums = torch::stable::contiguous(sums_),
               row_sums = torch::stable::contiguous(row_sums_), column_sums = torch::stable::contiguous(column_sums_);
  const Buffer delta = allocate(p.queries());
  const Gradient g{{out(sums), out(row_sums), out(column_sums), out(lse), out(lse_low)}, in(dsums), in(drow_sums), in(dcolumn_sums), delta.get(),
                   out(du), out(drows), out(dcolumns), planes_grad ? out(dplanes) : nullptr};
  if (lse.numel()) for_queries(p, [&](int64_t begin, int64_t end, float* scratch) { pick_kernels().backward(p, g, begin, end, scratch); });
  if (planes_grad && dplanes.numel()) {
    const int64_t lines = p.B * p.R, chunk = std::max<int64_t>(1, lines / 64);
    for_items((lines + chunk - 1) / chunk, 0, [&](int64_t item, float*) {
      pick_kernels().backward_planes(p, g, item * chunk, std::min(lines, (item + 1) * chunk));
    });
  }
}

}  // namespace
}  // namespace fastdiff::fourier_cross_attend

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def(
      "grid_attention(Tensor u, Tensor rows, Tensor columns, Tensor planes, Tensor(a!) sums, Tensor(b!) row_sums, Tensor(c!) column_sums, "
      "Tensor(d!) lse, Tensor(e!) lse_low) -> ()");
  m.def(
      "grid_attention_backward(Tensor dsums, Tensor drow_sums, Tensor dcolumn_sums, Tensor u, Tensor rows, Tensor columns, Tensor planes, "
      "Tensor sums, Tensor row_sums, Tensor column_sums, Tensor lse, Tensor lse_low, bool planes_grad, Tensor(a!) du, Tensor(b!) drows, Tensor(c!) dcolumns, Tensor(d!) dplanes) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("grid_attention", TORCH_BOX(&fastdiff::fourier_cross_attend::grid_attention));
  m.impl("grid_attention_backward", TORCH_BOX(&fastdiff::fourier_cross_attend::grid_attention_backward));
}
