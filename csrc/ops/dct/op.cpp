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
constexpr int64_t kStrips = 4;         // of columns are an item of it: whole cache lines of any dtype
constexpr int64_t kParts = 48;         // below, one dense product is less work than the passes between two

struct Tables {
  std::vector<float> floats;
  Axis axis, parts[2];
  std::shared_ptr<const Tables> kept[2];  // where the parts' tables lie
};

std::shared_ptr<const Tables> tables_of(int64_t n);

// The power of an odd number's smallest prime that divides it.
int64_t prime_power(int64_t n) {
  for (int64_t p = 3; p * p <= n; p += 2)
    if (n % p == 0) {
      int64_t power = p;
      while (n % (power * p) == 0) power *= p;
      return power;
    }
  return n;
}

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
  if (const int64_t part = prime_power(b); b >= kParts && part < b) {
    for (int i = 0; i < 2; ++i) {
      tables->kept[i] = tables_of(i ? b / part : part);
      tables->parts[i] = tables->kept[i]->axis;
    }
    axis.parts = tables->parts;
  } else {
    axis.sums = matrix(rest, rest, [](int64_t k) { return 4 * k; });
    axis.differences = matrix(half, half, [](int64_t k) { return 4 * k + 2; });
  }
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
const float* of(const std::optional<Tensor>& x) { return static_cast<const float*>(data(x)); }
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
    const int64_t groups = (strips + kStrips - 1) / kStrips;
    const bool enters = p.columns && p.kind != Kind::inverse, leaves = p.columns && p.kind != Kind::forward;
    const auto part = [&](int64_t plane, Phase phase, int64_t i, float* own, float* rest) {
      if (phase == Phase::rows) kernels.run(p, plane, phase, i, i + 1, own, rest);
      else kernels.run(p, plane, phase, i * kStrips, std::min(strips, (i + 1) * kStrips), own, rest);
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
    if (!gain || !p.columns || p.planes == 1 || gain->numel() != p.h * p.w) return {of(gain), begins.data(), nullptr};
    const Kernels& kernels = pick_kernels();
    arranged = allocate(kernels.image(p));
    kernels.arrange(p, of(gain), arranged.get());
    return {of(gain), begins.data(), arranged.get()};
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

// The factors of a blur's gain.
struct Decays {
  Tensor width;
  std::optional<Tensor> signal;
  Buffer floats;

  Decays(Problem& p, const Tensor& width_, const std::optional<Tensor>& signal_, double floor)
      : width(torch::stable::contiguous(width_)), signal(dense(signal_)), floats(allocate(width.size(0) * (p.h + p.w))) {
    const int64_t samples = width.size(0);
    float *rows = floats.get(), *columns = rows + samples * p.h;
    const Kernels& kernels = pick_kernels();
    kernels.decay(samples, of(width), p.h, static_cast<float>(1 - floor), rows);
    kernels.decay(samples, of(width), p.w, 1.0f, columns);
    p.blur_h = rows, p.blur_w = columns, p.signal = of(signal), p.floor = static_cast<float>(floor);
  }
};

void blur_diffuse(const Tensor& x_, const Tensor& width, const std::optional<Tensor>& signal, double floor, const std::optional<Tensor>& noise_,
                  const std::optional<Tensor>& sigma_, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor x = torch::stable::contiguous(x_);
  const std::optional<Tensor> noise = dense(noise_), sigma = dense(sigma_);
  Call call(x, 2, Kind::blur, y);
  Problem& p = call.p;
  p.channels = x.size(1), p.noise = data(noise), p.sigma = of(sigma);
  const Decays decays(p, width, signal, floor);
  call.run();
}

void frequency_mix_backward(const Tensor& dy_, const Tensor& x_, const Tensor& gain_, int64_t dims, const Tensor& dx, const Tensor& product) {
  if (dx.numel() == 0) return;
  const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_);
  Gains gain(dy, gain_, dims);
  Call call(dy, dims, Kind::gain, dx);
  Problem& p = call.p;
  p.eps = x.const_data_ptr(), p.gain = gain.view(p), p.product = static_cast<float*>(product.mutable_data_ptr());
  call.run();
}

void blur_diffuse_backward(const Tensor& dy_, const Tensor& x_, const Tensor& width, const std::optional<Tensor>& signal, double floor,
                           const Tensor& dx, const Tensor& dwidth, const Tensor& dsignal) {
  const int64_t samples = dwidth.numel();
  std::vector<double> to_width(samples), to_signal(samples);
  if (dx.numel()) {
    const Tensor dy = torch::stable::contiguous(dy_), x = torch::stable::contiguous(x_);
    Call call(dy, 2, Kind::blur, dx);
    Problem& p = call.p;
    p.channels = dy.size(1), p.eps = x.const_data_ptr();
    const Decays decays(p, width, signal, floor);
    const int64_t blocks = pick_kernels().blocks(p);
    const Buffer sums = allocate(p.planes * blocks * 3);
    p.sums = sums.get();
    call.run();
    for (int64_t i = 0; i < p.planes * blocks; ++i) {
      const float* sum = p.sums + 3 * i;
      const int64_t sample = i / blocks / p.channels;
      to_signal[sample] += sum[1] + p.floor * sum[0];
      to_width[sample] -= of(decays.width)[sample] * (p.signal ? p.signal[sample] : 1.0f) * sum[2];
    }
  }
  std::copy(to_width.begin(), to_width.end(), static_cast<float*>(dwidth.mutable_data_ptr()));
  std::copy(to_signal.begin(), to_signal.end(), static_cast<float*>(dsignal.mutable_data_ptr()));
}

using Maybe = std::optional<Tensor>;

bool transforms(const Tensor& x, int64_t dims) {
  return (dims == 1 || dims == 2) && is_native_float(x) && x.dim() >= dims && x.dim() <= static_cast<int64_t>(kRank) && x.numel() > 0;
}

bool is_like(const Maybe& u, const Tensor& x) {
  return !u || (u->is_cpu() && u->scalar_type() == x.scalar_type() && u->dim() == x.dim() && std::equal(u->sizes().begin(), u->sizes().end(), x.sizes().begin()));
}

// Whether frequency_mix takes it beside x as it is.
bool is_gain(const Maybe& gain, const Tensor& x, int64_t dims) {
  if (!gain) return true;
  const int64_t missing = x.dim() - gain->dim();
  if (!gain->is_cpu() || gain->scalar_type() != torch::headeronly::ScalarType::Float || missing < 0 || gain->dim() < dims) return false;
  for (int64_t axis = 0; axis < gain->dim(); ++axis)
    if (gain->size(axis) != x.size(missing + axis) && (gain->size(axis) != 1 || axis >= gain->dim() - dims)) return false;
  return true;
}

bool is_per_sample(const Maybe& u, const Tensor& x) {
  return !u || (u->is_cpu() && u->scalar_type() == torch::headeronly::ScalarType::Float && u->dim() == 1 && u->size(0) == x.size(0));
}

Tensor made_as(const Tensor& x) { return empty(torch_type(x), x.dim(), x.sizes().data()); }

Maybe dct_eager(const Tensor& x, int64_t dims, bool inverse) {
  if (!transforms(x, dims)) return std::nullopt;
  const Tensor y = made_as(x);
  dct(x, dims, inverse, y);
  return y;
}

Maybe frequency_mix_eager(const Tensor& x, const Tensor& gain, const Maybe& eps, const Maybe& gain_eps, const Maybe& noise, const Maybe& gain_noise,
                          int64_t dims) {
  if (!transforms(x, dims) || x.scalar_type() != torch::headeronly::ScalarType::Float || !is_like(eps, x) || !is_like(noise, x)) return std::nullopt;
  if (!is_gain(gain, x, dims) || !is_gain(gain_eps, x, dims) || !is_gain(gain_noise, x, dims)) return std::nullopt;
  const Tensor y = made_as(x);
  frequency_mix(x, gain, eps, gain_eps, noise, gain_noise, dims, y);
  return y;
}

Maybe blur_diffuse_eager(const Tensor& x, const Tensor& width, const Maybe& signal, double floor, const Maybe& noise, const Maybe& sigma) {
  if (!transforms(x, 2) || x.dim() != 4 || !is_like(noise, x)) return std::nullopt;
  if (!is_per_sample(width, x) || !is_per_sample(signal, x) || !is_per_sample(sigma, x)) return std::nullopt;
  const Tensor y = made_as(x);
  blur_diffuse(x, width, signal, floor, noise, sigma, y);
  return y;
}

}  // namespace
}  // namespace fastdiff::dct

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("dct(Tensor x, int dims, bool inverse, Tensor(a!) y) -> ()");
  m.def(
      "frequency_mix(Tensor x, Tensor gain, Tensor? eps, Tensor? gain_eps, Tensor? noise, Tensor? gain_noise, int dims, Tensor(a!) y) "
      "-> ()");
  m.def("dct_eager(Tensor x, int dims, bool inverse) -> Tensor?");
  m.def(
      "frequency_mix_eager(Tensor x, Tensor gain, Tensor? eps, Tensor? gain_eps, Tensor? noise, Tensor? gain_noise, int dims) "
      "-> Tensor?");
  m.def("blur_diffuse_eager(Tensor x, Tensor width, Tensor? signal, float floor, Tensor? noise, Tensor? sigma) -> Tensor?");
  m.def("frequency_mix_backward(Tensor dy, Tensor x, Tensor gain, int dims, Tensor(a!) dx, Tensor(b!) product) -> ()");
  m.def("blur_diffuse(Tensor x, Tensor width, Tensor? signal, float floor, Tensor? noise, Tensor? sigma, Tensor(a!) y) -> ()");
  m.def(
      "blur_diffuse_backward(Tensor dy, Tensor x, Tensor width, Tensor? signal, float floor, Tensor(a!) dx, Tensor(b!) dwidth, "
      "Tensor(c!) dsignal) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("dct", TORCH_BOX(&fastdiff::dct::dct));
  m.impl("frequency_mix", TORCH_BOX(&fastdiff::dct::frequency_mix));
  m.impl("blur_diffuse", TORCH_BOX(&fastdiff::dct::blur_diffuse));
  m.impl("dct_eager", TORCH_BOX(&fastdiff::dct::dct_eager));
  m.impl("frequency_mix_eager", TORCH_BOX(&fastdiff::dct::frequency_mix_eager));
  m.impl("blur_diffuse_eager", TORCH_BOX(&fastdiff::dct::blur_diffuse_eager));
  m.impl("frequency_mix_backward", TORCH_BOX(&fastdiff::dct::frequency_mix_backward));
  m.impl("blur_diffuse_backward", TORCH_BOX(&fastdiff::dct::blur_diffuse_backward));
}
