#include "ops/layer_norm_modulate/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::layer_norm_modulate {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Elements worth waking a thread for.
constexpr int64_t kGrain = 16384;
// Pieces that a call is cut into, at least, where it is large: enough for this many threads, few enough that their sums cost nothing.
constexpr int64_t kPieces = 64, kLeastRows = 16;

Maybe with_rows(const Maybe& x) {
  const int64_t last = x ? x->dim() - 1 : 0;
  return !x || x->stride(last) == 1 || x->size(last) == 1 ? x : torch::stable::contiguous(*x);
}

Rows rows(const Maybe& x) { return x ? Rows{x->const_data_ptr(), x->stride(0), x->stride(1)} : Rows{}; }

Operand operand(const Maybe& x) {
  if (!x) return {};
  const int64_t rank = x->dim();
  return {x->const_data_ptr(), rank > 1 ? x->stride(0) : 0, rank > 2 ? x->stride(1) : 0, x->scalar_type() == ScalarType::Float, rank > 2};
}


Sizes sizes(const Tensor& x) { return {type_of(x), x.size(0), x.size(1), x.size(2)}; }

// The memory of a result.
void* written(const Tensor& out) {
  return out.numel() ? out.mutable_data_ptr() : nullptr;
}

Gradient gradient(const Tensor& x) { return {written(x), x.scalar_type() == ScalarType::Float}; }

bool streamed(const Tensor& out, int64_t arrays) { return past_caches(out, arrays) && whole_lines(out, out.size(2)); }

// f(item, scratch), on one thread where there is little to do.
template <class F>
void for_pieces(const Sizes& n, int64_t items, int64_t scratch, const F& f) {
  const int64_t together = n.B * n.N * n.D < 2 * kGrain ? items : 1;
  for_items(together ? (items + together - 1) / together : 0, scratch, [&](int64_t item, float* mine) {
    for (int64_t i = item * together; i < std::min(items, (item + 1) * together); ++i) f(i, mine);
  });
}

void run_forward(const Sizes& n, const Forward& a) {
  const int64_t rows = n.B * n.N, per = std::max({rows / kPieces, kGrain / std::max<int64_t>(1, n.D), int64_t{1}});
  for_pieces(n, (rows + per - 1) / per, forward_scratch(stride(n)), [&](int64_t item, float* scratch) {
    pick_kernels().forward(n, a, item * per, std::min(rows, (item + 1) * per), scratch);
  });
}

void run_backward(const Sizes& n, const Backward& a) {
  if (n.D == 0) return;
  const int64_t per = std::max(n.B * n.N / kPieces / 4 * 4, kLeastRows), pieces = std::max<int64_t>(1, (n.N + per - 1) / per);
  const int64_t count = sums(a).count, step = stride(n);
  const Buffer partial = allocate(n.B * pieces * count * step);
  if (n.N == 0) std::fill_n(partial.get(), n.B * count * step, 0.0f);
  else for_pieces(n, n.B * pieces, backward_scratch(step), [&](int64_t item, float* scratch) {
    const int64_t b = item / pieces, first = item % pieces * per;
    pick_kernels().backward(n, a, b, first, std::min(n.N, first + per), partial.get() + item * count * step, scratch);
  });
  if (count == 0) return;
  constexpr int64_t kColumns = 128;
  for_pieces({n.type, n.B, pieces * count, n.D}, (n.D + kColumns - 1) / kColumns, 0, [&](int64_t item, float*) {
    pick_kernels().finish(n, a, pieces, partial.get(), item * kColumns, std::min(n.D, (item + 1) * kColumns));
  });
}

void layer_norm_modulate(const Tensor& x, const Maybe& shift, const Maybe& scale, const Maybe& weight, const Maybe& bias, double eps, const Tensor& h) {
  if (h.numel() == 0) return;
  const Maybe X = with_rows(x), S = with_rows(shift), C = with_rows(scale), W = with_rows(weight), O = with_rows(bias);
  run_forward(sizes(x), {rows(X), {}, {{}, operand(S), operand(C), operand(W), operand(O), static_cast<float>(eps)}, nullptr, written(h), streamed(h, 2)});
}

void gate_residual(const Tensor& x, const Tensor& y, const Tensor& gate, const Tensor& out) {
  if (out.numel() == 0) return;
  const Maybe X = with_rows(x), Y = with_rows(y), G = with_rows(gate);
  run_forward(sizes(x), {rows(X), rows(Y), {operand(G), {}, {}, {}, {}, 0.0f}, written(out), nullptr, streamed(out, 3)});
}

void gate_residual_norm_modulate(const Tensor& x, const Tensor& y, const Tensor& gate, const Maybe& shift, const Maybe& scale, const Maybe& weight,
                                 const Maybe& bias, double eps, const Tensor& out, const Tensor& h) {
  if (out.numel() == 0) return;
  const Maybe X = with_rows(x), Y = with_rows(y), G = with_rows(gate), S = with_rows(shift), C = with_rows(scale), W = with_rows(weight), O = with_rows(bias);
  run_forward(sizes(x), {rows(X), rows(Y), {operand(G), operand(S), operand(C), operand(W), operand(O), static_cast<float>(eps)}, written(out),
                         written(h), streamed(out, 4) && streamed(h, 4)});
}

void gate_residual_backward(const Tensor& dout, const Tensor& y, const Tensor& gate, const Tensor& dy, const Tensor& dgate) {
  if (dgate.numel() == 0) return;
  const Maybe D = with_rows(dout), Y = with_rows(y), G = with_rows(gate);
  run_backward(sizes(y), {{}, rows(D), {}, rows(Y), {operand(G), {}, {}, {}, {}, 0.0f}, nullptr, written(dy),
                          gradient(dgate), {}, {}, {}, {}, streamed(dy, 3)});
}

void layer_norm_modulate_backward(const Tensor& dh, const Maybe& dout, const Tensor& x, const Maybe& y, const Maybe& gate, const Maybe& shift,
                                  const Maybe& scale, const Maybe& weight, const Maybe& bias, double eps, std::vector<bool>, const Tensor& dx,
                                  const Tensor& dy, const Tensor& dgate, const Tensor& dshift, const Tensor& dscale, const Tensor& dweight,
                                  const Tensor& dbias) {
  const Sizes n = sizes(x);
  const Maybe H = with_rows(dh), D = with_rows(dout), X = with_rows(x), Y = with_rows(y), G = with_rows(gate), S = with_rows(shift), C = with_rows(scale),
              W = with_rows(weight), O = with_rows(bias);
  run_backward(n, {rows(H), rows(D), rows(X), rows(Y), {operand(G), operand(S), operand(C), operand(W), operand(O), static_cast<float>(eps)},
                   written(dx), written(dy), gradient(dgate), gradient(dshift), gradient(dscale),
                   gradient(dweight), gradient(dbias), streamed(dx, 3) && (dy.numel() == 0 || streamed(dy, 3))});
}

// Per sample or per token.
bool is_modulation(const Maybe& m, const Tensor& x) {
  return is_beside(m, x, {x.size(0), x.size(2)}) || is_beside(m, x, {x.size(0), x.size(1), x.size(2)});
}

bool is_norm(const Tensor& x, const Maybe& shift, const Maybe& scale, const Maybe& weight, const Maybe& bias) {
  return is_native_float(x) && x.dim() == 3 && is_modulation(shift, x) && is_modulation(scale, x) && is_beside(weight, x, {x.size(2)}) &&
         is_beside(bias, x, {x.size(2)});
}

bool is_gated(const Tensor& x, const Tensor& y, const Tensor& gate) {
  return is_native_float(x) && x.dim() == 3 && y.scalar_type() == x.scalar_type() && is_beside(y, x, {x.size(0), x.size(1), x.size(2)}) && is_modulation(gate, x);
}

Tensor rows_like(const Tensor& x) { return empty_like_type<3>(x, {x.size(0), x.size(1), x.size(2)}); }

Maybe layer_norm_modulate_eager(const Tensor& x, const Maybe& shift, const Maybe& scale, const Maybe& weight, const Maybe& bias, double eps) {
  if (!is_norm(x, shift, scale, weight, bias)) return std::nullopt;
  const Tensor h = rows_like(x);
  layer_norm_modulate(x, shift, scale, weight, bias, eps, h);
  return h;
}

Maybe gate_residual_eager(const Tensor& x, const Tensor& y, const Tensor& gate) {
  if (!is_gated(x, y, gate)) return std::nullopt;
  const Tensor out = rows_like(x);
  gate_residual(x, y, gate, out);
  return out;
}

std::tuple<Maybe, Maybe> gate_residual_norm_modulate_eager(const Tensor& x, const Tensor& y, const Tensor& gate, const Maybe& shift, const Maybe& scale,
                                                           const Maybe& weight, const Maybe& bias, double eps) {
  if (!is_gated(x, y, gate) || !is_norm(x, shift, scale, weight, bias)) return {};
  const Tensor out = rows_like(x), h = rows_like(x);
  gate_residual_norm_modulate(x, y, gate, shift, scale, weight, bias, eps, out, h);
  return {out, h};
}

}  // namespace
}  // namespace fastdiff::layer_norm_modulate

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, Tensor(a!) h) -> ()");
  m.def("layer_norm_modulate_eager(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) -> Tensor?");
  m.def("gate_residual_eager(Tensor x, Tensor y, Tensor gate) -> Tensor?");
  m.def(
      "gate_residual_norm_modulate_eager(Tensor x, Tensor y, Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor?, Tensor?)");
  m.def("gate_residual(Tensor x, Tensor y, Tensor gate, Tensor(a!) out) -> ()");
  m.def(
      "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps, "
      "Tensor(a!) out, Tensor(b!) h) -> ()");
  m.def("gate_residual_backward(Tensor dout, Tensor y, Tensor gate, Tensor(a!) dy, Tensor(b!) dgate) -> ()");
  m.def(
      "layer_norm_modulate_backward(Tensor dh, Tensor? dout, Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, "
      "Tensor? bias, float eps, bool[] wants, Tensor(a!) dx, Tensor(b!) dy, Tensor(c!) dgate, Tensor(d!) dshift, Tensor(e!) dscale, "
      "Tensor(f!) dweight, Tensor(g!) dbias) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&fastdiff::layer_norm_modulate::layer_norm_modulate));
  m.impl("layer_norm_modulate_eager", TORCH_BOX(&fastdiff::layer_norm_modulate::layer_norm_modulate_eager));
  m.impl("gate_residual_eager", TORCH_BOX(&fastdiff::layer_norm_modulate::gate_residual_eager));
  m.impl("gate_residual_norm_modulate_eager", TORCH_BOX(&fastdiff::layer_norm_modulate::gate_residual_norm_modulate_eager));
  m.impl("gate_residual", TORCH_BOX(&fastdiff::layer_norm_modulate::gate_residual));
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&fastdiff::layer_norm_modulate::gate_residual_norm_modulate));
  m.impl("gate_residual_backward", TORCH_BOX(&fastdiff::layer_norm_modulate::gate_residual_backward));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&fastdiff::layer_norm_modulate::layer_norm_modulate_backward));
}
