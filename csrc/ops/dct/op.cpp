#include "ops/dct/op.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::dct {
namespace {

using torch::stable::Tensor;

constexpr int64_t kRowsOfAnItem = 64;  // where rows alone are transformed
constexpr int64_t kItem = 1 << 14;     // floats: an item is several small planes
constexpr int64_t kPlane = 1 << 18;    // floats; a larger one is shared by the threads

struct Tables {
  std::vector<float> floats;
  Axis axis;
};

// The splitting of a length with its cosines, made in double. cos(pi j / (2 n)) has period 4 n in j.
std::shared_ptr<const Tables> make(int64_t n) {
  auto tables = std::make_shared<Tables>();
  Axis& axis = tables->axis;
  axis.n = axis.base = n;
  axis.small = alone_in_registers(n);
  while (!axis.small && axis.base % 2 == 0 && !in_registers(axis.base)) axis.base /= 2, ++axis.levels;
  axis.small |= in_registers(axis.base);
  std::vector<float>& out = tables->floats;
  const double pi = std::acos(-1.0);
  const int64_t b = axis.base, half = b / 2, rest = b - half;
  out.reserve(4 * n + (axis.small ? 0 : rest * rest + half * half + b * b));
  for (int l = 1; l < axis.levels; ++l) {
    const int64_t M = n >> l;
    axis.turns[l] = out.data() + out.size();
    for (int table = 0; table < 4; ++table)
      for (int64_t i = 0; i < M / 2; ++i) {
        const double turn = pi * (2 * i + 1) / (4 * M), value = table % 2 ? std::sin(turn) : std::cos(turn);
        out.push_back(static_cast<float>(table / 2 && i % 2 ? -value : value));
      }
  }
  if (axis.small) return tables;
  std::vector<float> cosines(8 * b);
  for (int64_t j = 0; j < 8 * b; ++j) cosines[j] = static_cast<float>(std::cos(pi * j / (4 * b)));
  // Rows k, columns i: cos(pi times (2 i + 1) over 4 b).
  const auto matrix = [&](int64_t rows, int64_t columns, auto times) {
    const float* first = out.data() + out.size();
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t i = 0; i < columns; ++i) out.push_back(cosines[times(k) * (2 * i + 1) % (8 * b)]);
    return first;
  };
  axis.sums = matrix(rest, rest, [](int64_t k) { return 4 * k; });
  axis.differences = matrix(half, half, [](int64_t k) { return 4 * k + 2; });
  if (axis.levels) axis.fourth = matrix(b, b, [](int64_t k) { return 2 * k + 1; });
  return tables;
}

// Tables of the last lengths that were asked for; large ones are made anew.
std::shared_ptr<const Tables> tables_of(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::shared_ptr<const Tables>> known;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = known.find(n); found != known.end()) return found->second;
  }
  auto made = make(n);
  if (made->floats.size() <= size_t{1} << 18) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (known.size() >= 16) known.clear();
    known[n] = made;
  }
  return made;
}

const void* data(const std::optional<Tensor>& x) { return x ? x->const_data_ptr() : nullptr; }
const float* floats(const std::optional<Tensor>& x) { return static_cast<const float*>(data(x)); }
std::optional<Tensor> dense(const std::optional<Tensor>& x) { return x ? std::optional(torch::stable::contiguous(*x)) : std::nullopt; }

// Tables stay alive while the call runs.
struct Call {
  Problem p{};
  std::shared_ptr<const Tables> h, w;

  Call(const Tensor& x, int64_t dims, Kind kind, const Tensor& y) {
    p.type = type_of(x), p.kind = kind, p.columns = dims == 2;
    p.x = x.const_data_ptr(), p.y = y.mutable_data_ptr();
    p.w = x.size(x.dim() - 1), p.rows = x.numel() / p.w;
    p.h = p.columns ? x.size(x.dim() - 2) : std::min(p.rows, kRowsOfAnItem);
    p.planes = (p.rows + p.h - 1) / p.h;
    w = tables_of(p.w), p.along_w = w->axis;
    if (p.columns) h = tables_of(p.h), p.along_h = h->axis;
  }

  void run() const {
    const Kernels& kernels = pick_kernels();
    const int64_t image = kernels.image(p), scratch = kernels.scratch(p), strips = kernels.strips(p), blocks = kernels.blocks(p);
    const int64_t group = kernels.group(p), groups = (strips + group - 1) / group;
    const bool enters = p.columns && p.kind != Kind::inverse, leaves = p.columns && p.kind != Kind::forward;
    const auto part = [&](int64_t plane, Phase phase, int64_t i, float* own, float* rest) {
      if (phase == Phase::rows) kernels.run(p, plane, phase, i, i + 1, own, rest);
      else kernels.run(p, plane, phase, i * group, std::min(strips, (i + 1) * group), own, rest);
    };
    const auto phases = [&](const auto& each) {
      if (enters) each(Phase::enter, groups);
      each(Phase::rows, blocks);
      if (leaves) each(Phase::leave, groups);
    };
    if (image <= kPlane) {
      const int64_t several = std::clamp<int64_t>(kItem / (p.h * p.w), 1, std::max<int64_t>(1, p.planes / (4 * torch::stable::get_num_threads())));
      return for_items((p.planes + several - 1) / several, image + scratch, [&](int64_t item, float* own) {
        for (int64_t plane = item * several; plane < std::min(p.planes, (item + 1) * several); ++plane)
          phases([&](Phase phase, int64_t count) {
            for (int64_t i = 0; i < count; ++i) part(plane, phase, i, own, own + image);
          });
      });
    }
    const Buffer shared = allocate(image);
    for (int64_t plane = 0; plane < p.planes; ++plane)
      phases([&](Phase phase, int64_t count) {
        for_items(count, scratch, [&](int64_t i, float* own) { part(plane, phase, i, shared.get(), own); });
      });
  }
};

void dct(const Tensor& x_, int64_t dims, bool inverse, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor x = torch::stable::contiguous(x_);
  Call(x, dims, inverse ? Kind::inverse : Kind::forward, y).run();
}

// A gain that is x's shape, or 1 along each axis but the transformed ones, with the element at which each plane's begins.
struct Gains {
  std::optional<Tensor> gain;
  std::vector<int64_t> begins{0};
  Buffer arranged;

  Gains(const Tensor& x, const std::optional<Tensor>& given, int64_t dims) : gain(dense(given)) {
    if (!gain) return;
    const int64_t lead = x.dim() - dims, missing = x.dim() - gain->dim();
    int64_t step = 1;
    for (int64_t axis = lead; axis < x.dim(); ++axis) step *= x.size(axis);
    for (int64_t axis = lead; axis-- > 0;) {
      const bool whole = axis >= missing && gain->size(axis - missing) > 1;
      const size_t inner = begins.size();
      for (int64_t i = 1; i < x.size(axis); ++i)
        for (size_t k = 0; k < inner; ++k) begins.push_back(begins[k] + (whole ? i * step : 0));
      if (whole) step *= x.size(axis);
    }
  }

  // One for all planes is arranged once.
  Gain view(const Problem& p) {
    if (!gain || !p.columns || p.planes == 1 || gain->numel() != p.h * p.w) return {floats(gain), begins.data(), nullptr};
    const Kernels& kernels = pick_kernels();
    arranged = allocate(kernels.image(p));
    kernels.arrange(p, floats(gain), arranged.get());
    return {floats(gain), begins.data(), arranged.get()};
  }
};

void frequency_mix(const Tensor& x_, const Tensor& gain_, const std::optional<Tensor>& eps_, const std::optional<Tensor>& gain_eps_,
                   const std::optional<Tensor>& noise_, const std::optional<Tensor>& gain_noise_, int64_t dims, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor x = torch::stable::contiguous(x_);
  const std::optional<Tensor> eps = dense(eps_), noise = dense(noise_);
  Gains gain(x, gain_, dims), gain_eps(x, gain_eps_, dims), gain_noise(x, gain_noise_, dims);
  Call call(x, dims, Kind::gain, y);
  Problem& p = call.p;
  p.eps = data(eps), p.noise = data(noise);
  p.gain = gain.view(p), p.gain_eps = gain_eps.view(p), p.gain_noise = gain_noise.view(p);
  call.run();
}

void separable_gain(const Tensor& x_, const Tensor& rows_, const Tensor& columns_, const Tensor& base_, const std::optional<Tensor>& noise_,
                    const std::optional<Tensor>& sigma_, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor x = torch::stable::contiguous(x_), rows = torch::stable::contiguous(rows_), columns = torch::stable::contiguous(columns_),
               base = torch::stable::contiguous(base_);
  const std::optional<Tensor> noise = dense(noise_), sigma = dense(sigma_);
  Call call(x, 2, Kind::separable, y);
  Problem& p = call.p;
  p.channels = x.size(1), p.noise = data(noise), p.sigma = floats(sigma);
  p.gain_h = floats(rows), p.gain_w = floats(columns), p.base = floats(base);
  call.run();
}

}  // namespace
}  // namespace fastdiff::dct

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("dct(Tensor x, int dims, bool inverse, Tensor(a!) y) -> ()");
  m.def(
      "frequency_mix(Tensor x, Tensor gain, Tensor? eps, Tensor? gain_eps, Tensor? noise, Tensor? gain_noise, int dims, Tensor(a!) y) "
      "-> ()");
  m.def("separable_gain(Tensor x, Tensor rows, Tensor columns, Tensor base, Tensor? noise, Tensor? sigma, Tensor(a!) y) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("dct", TORCH_BOX(&fastdiff::dct::dct));
  m.impl("frequency_mix", TORCH_BOX(&fastdiff::dct::frequency_mix));
  m.impl("separable_gain", TORCH_BOX(&fastdiff::dct::separable_gain));
}
