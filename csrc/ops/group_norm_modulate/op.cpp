#include "ops/group_norm_modulate/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::group_norm_modulate {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Elements worth waking a thread for.
constexpr int64_t kGrain = 16384;
// Channels last: a sample's pieces, and the most pixels in one, over which sums are kept in float32.
constexpr int64_t kPieces = 64, kMostPixels = 256, kLeastPixels = 16, kLeastElements = 1 << 15;
// Elements of the samples that are worked on together, so that the second pass finds them in cache.
constexpr int64_t kWave = 1 << 19;

// The stride between pixels, if the axes of space are one run of them; else 0.
int64_t pixel_stride(const Tensor& x) {
  int64_t step = 1, size = 1;
  for (int64_t i = x.dim() - 1; i > 1; --i) {
    if (x.size(i) == 1) continue;
    if (size == 1) step = x.stride(i);
    if (x.stride(i) != step * size) return 0;
    size *= x.size(i);
  }
  return step;
}

// x, or a copy, in the layout.
Tensor laid_out(const Tensor& x, bool last) {
  const int64_t step = pixel_stride(x);
  if (!last) return step == 1 ? x : torch::stable::contiguous(x);
  if (step && (x.stride(1) == 1 || x.size(1) == 1)) return x;
  const Tensor pixels = torch::stable::contiguous(torch::stable::transpose(torch::stable::flatten(x, 2, -1), 1, 2));
  return torch::stable::transpose(pixels, 1, 2);
}

Image image(const Tensor& x, bool last) { return {x.const_data_ptr(), x.stride(0), last ? pixel_stride(x) : x.stride(1)}; }

Maybe with_rows(const Maybe& x) {
  const int64_t axis = x ? x->dim() - 1 : 0;
  return !x || x->stride(axis) == 1 || x->size(axis) == 1 ? x : torch::stable::contiguous(*x);
}

Operand operand(const Maybe& x) {
  if (!x || x->numel() == 0) return {};
  return {x->const_data_ptr(), x->dim() > 1 ? x->stride(0) : 0, x->scalar_type() == ScalarType::Float};
}

Gradient gradient(const Tensor& x) { return {x.numel() ? x.mutable_data_ptr() : nullptr, x.scalar_type() == ScalarType::Float}; }

// y, a dense result, tells the layout.
Shape shape(const Tensor& y, int64_t groups) {
  int64_t P = 1;
  for (int64_t i = 2; i < y.dim(); ++i) P *= y.size(i);
  return {type_of(y), y.size(0), y.size(1), P, groups, !y.is_contiguous()};
}

bool streamed(const Shape& s, const Tensor& y, int64_t arrays) { return past_caches(y, arrays) && whole_lines(y, s.last ? s.C : s.P); }

// f(item, scratch), on one thread where there is little to do: `elements` in all.
template <class F>
void for_pieces(int64_t elements, int64_t items, int64_t scratch, const F& f) {
  const int64_t together = elements < 2 * kGrain ? std::max<int64_t>(items, 1) : 1;
  for_items((items + together - 1) / together, scratch, [&](int64_t item, float* mine) {
    for (int64_t i = item * together; i < std::min(items, (item + 1) * together); ++i) f(i, mine);
  });
}

// Channels last: the pieces that a sample's pixels are cut into, by sizes alone.
struct Cut {
  int64_t P, per, pieces, wave;
  explicit Cut(const Shape& s)
      : P(s.P), per(std::clamp(std::max(s.B * s.P / kPieces, kLeastElements / s.C), kLeastPixels, kMostPixels)), pieces((s.P + per - 1) / per), wave(std::max<int64_t>(1, kWave / (s.C * s.P))) {}

  // first(b, begin, end, its place, scratch) for the pieces of a wave of samples, then between(b) for each, then second as first.
  template <class F, class G, class H>
  void run(const Shape& s, const F& first, const G& between, const H& second) const {
    for (int64_t from = 0; from < s.B; from += wave) {
      const int64_t samples = std::min(wave, s.B - from), elements = samples * s.C * s.P;
      const auto pass = [&](const auto& f) {
        for_pieces(elements, samples * pieces, scratch_floats(s), [&](int64_t item, float* scratch) {
          const int64_t begin = item % pieces * per;
          f(from + item / pieces, begin, std::min(P, begin + per), from * pieces + item, scratch);
        });
      };
      pass(first);
      for (int64_t b = from; b < from + samples; ++b) between(b);
      pass(second);
    }
  }
};

void group_norm_modulate(const Tensor& x, int64_t groups, const Maybe& weight, const Maybe& bias, const Maybe& scale, const Maybe& shift, double eps,
                         bool silu, const Tensor& y, const Tensor& statistics) {
  Statistics* stats = static_cast<Statistics*>(statistics.mutable_data_ptr());
  if (y.numel() == 0) {
    std::fill_n(stats, statistics.numel() / 3, Statistics{});
    return;
  }
  const Shape s = shape(y, groups);
  const Tensor in = laid_out(x, s.last);
  const Maybe W = with_rows(weight), O = with_rows(bias), C = with_rows(scale), S = with_rows(shift);
  const Forward a{image(in, s.last), {operand(W), operand(O), operand(C), operand(S), static_cast<float>(eps), silu}, stats, y.mutable_data_ptr(), streamed(s, y, 2)};
  const Kernels& k = pick_kernels();
  if (!s.last)
    return for_pieces(y.numel(), s.B * groups, scratch_floats(s), [&](int64_t item, float* scratch) { k.forward(s, a, item, item + 1, scratch); });
  const Cut cut(s);
  std::vector<Moments> parts(s.B * cut.pieces * groups);
  cut.run(
      s, [&](int64_t b, int64_t begin, int64_t end, int64_t piece, float* scratch) { k.pixel_moments(s, a.x, b, begin, end, parts.data() + piece * groups, scratch); },
      [&](int64_t b) { k.join(s, a.m.eps, cut.pieces, parts.data() + b * cut.pieces * groups, stats + b * groups); },
      [&](int64_t b, int64_t begin, int64_t end, int64_t, float* scratch) { k.pixel_forward(s, a, b, begin, end, scratch); });
}

void group_norm_modulate_backward(const Tensor& dy, const Tensor& x, const Tensor& statistics, int64_t groups, const Maybe& weight, const Maybe& bias,
                                  const Maybe& scale, const Maybe& shift, double eps, bool silu, std::vector<bool>, const Tensor& dx, const Tensor& dweight,
                                  const Tensor& dbias, const Tensor& dscale, const Tensor& dshift) {
  const Shape s = shape(dx, groups);
  const Maybe W = with_rows(weight), O = with_rows(bias), C = with_rows(scale), S = with_rows(shift);
  const Modulation m{operand(W), operand(O), operand(C), operand(S), static_cast<float>(eps), silu};
  const int64_t step = stride(s);
  const Buffer sums = allocate(s.B * 2 * step);
  const Kernels& k = pick_kernels();
  if (dx.numel() == 0) {
    std::fill_n(sums.get(), s.B * 2 * step, 0.0f);
  } else {
    const Tensor given = torch::stable::contiguous(statistics), in = laid_out(x, s.last), out = laid_out(dy, s.last);
    const Backward a{image(out, s.last), image(in, s.last), m, static_cast<const Statistics*>(given.const_data_ptr()), dx.mutable_data_ptr(), streamed(s, dx, 3)};
    if (!s.last) {
      for_pieces(dx.numel(), s.B * groups, scratch_floats(s), [&](int64_t item, float* scratch) { k.backward(s, a, sums.get(), item, item + 1, scratch); });
    } else {
      const Cut cut(s);
      const Buffer parts = allocate(s.B * cut.pieces * 2 * step);
      cut.run(
          s,
          [&](int64_t b, int64_t begin, int64_t end, int64_t piece, float* scratch) { k.pixel_sums(s, a, b, begin, end, parts.get() + piece * 2 * step, scratch); },
          [&](int64_t b) {
            for (int64_t i = 0; i < 2 * step; ++i) {
              double sum = 0.0;
              for (int64_t p = 0; p < cut.pieces; ++p) sum += parts[(b * cut.pieces + p) * 2 * step + i];
              sums[b * 2 * step + i] = static_cast<float>(sum);
            }
          },
          [&](int64_t b, int64_t begin, int64_t end, int64_t, float* scratch) { k.pixel_backward(s, a, b, begin, end, sums.get() + b * 2 * step, scratch); });
    }
  }
  k.finish(s, m, sums.get(), {gradient(dweight), gradient(dbias), gradient(dscale), gradient(dshift)});
}

Maybe group_norm_modulate_eager(const Tensor& x, int64_t groups, const Maybe& weight, const Maybe& bias, const Maybe& scale, const Maybe& shift, double eps,
                                bool silu) {
  if (!is_native_float(x) || x.dim() < 3 || x.dim() > 5 || groups < 1 || x.size(1) % groups) return std::nullopt;
  const int64_t B = x.size(0), C = x.size(1);
  if (!is_beside(weight, x, {C}) || !is_beside(bias, x, {C}) || !is_beside(scale, x, {B, C}) || !is_beside(shift, x, {B, C})) return std::nullopt;
  const Maybe y = empty_as(x);
  if (y) group_norm_modulate(x, groups, weight, bias, scale, shift, eps, silu, *y, empty_floats<3>({B, groups, 3}));
  return y;
}

}  // namespace
}  // namespace fastdiff::group_norm_modulate

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def(
      "group_norm_modulate(Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, bool silu, Tensor(a!) y, "
      "Tensor(b!) statistics) -> ()");
  m.def(
      "group_norm_modulate_eager(Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, bool silu) -> Tensor?");
  m.def(
      "group_norm_modulate_backward(Tensor dy, Tensor x, Tensor statistics, int groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
      "float eps, bool silu, bool[] wants, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor(d!) dscale, Tensor(e!) dshift) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("group_norm_modulate", TORCH_BOX(&fastdiff::group_norm_modulate::group_norm_modulate));
  m.impl("group_norm_modulate_eager", TORCH_BOX(&fastdiff::group_norm_modulate::group_norm_modulate_eager));
  m.impl("group_norm_modulate_backward", TORCH_BOX(&fastdiff::group_norm_modulate::group_norm_modulate_backward));
}
