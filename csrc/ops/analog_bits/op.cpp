#include "ops/analog_bits/op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>

#include "common/parallel.h"
#include "common/tensor.h"

namespace fastdiff::analog_bits {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Elements of bits per thread worth waking one for.
constexpr int64_t kGrain = 32768;

bool is_integer(ScalarType type) { return type == ScalarType::Byte || type == ScalarType::Int || type == ScalarType::Long; }

Integer integer_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Byte: return Integer::u8;
    case ScalarType::Int: return Integer::i32;
    default: return Integer::i64;
  }
}

Shape shape_of(const Tensor& integers, const Tensor& analog, int64_t bits, bool msb) {
  const int64_t planes = integers.size(0) * integers.size(1), size = integers.numel() / std::max<int64_t>(1, planes);
  return {type_of(analog), integer_of(integers), planes, integers.size(1), size, (size + kPiece - 1) / kPiece, static_cast<int>(bits), msb};
}

template <class F>
void over_pieces(const Shape& s, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::min(s.size, kPiece) * s.bits));
  torch::stable::parallel_for(0, s.planes * s.pieces, grain, f);
}

// Whether a single stride runs over all of space.
bool is_plane(const Tensor& x) {
  for (int64_t i = 2; i + 1 < x.dim(); ++i)
    if (x.size(i) > 1 && x.stride(i) != x.size(i + 1) * x.stride(i + 1)) return false;
  return true;
}

bool write_bits(const Tensor& x, int64_t bits, double scale, const std::string& order, const Tensor& y) {
  if (y.numel() == 0) return true;
  const Tensor from = is_plane(x) ? x : torch::stable::contiguous(x);
  const Shape s = shape_of(from, y, bits, order == "msb");
  const Integers integers{from.const_data_ptr(), from.stride(0), from.stride(1), from.stride(from.dim() - 1)};
  void* out = y.mutable_data_ptr();
  std::atomic<bool> within{true};
  over_pieces(s, [&](int64_t begin, int64_t end) {
    if (!pick_kernels().encode(s, integers, static_cast<float>(scale), out, begin, end)) within = false;
  });
  return within;
}

void to_bits(const Tensor& x, int64_t bits, double scale, std::string order, ScalarType, const Tensor& y) { write_bits(x, bits, scale, order, y); }

void from_bits(const Tensor& x, int64_t bits, std::string order, ScalarType, const Tensor& y) {
  if (y.numel() == 0) return;
  const Tensor from = torch::stable::contiguous(x);
  const Shape s = shape_of(y, from, bits, order == "msb");
  const void* analog = from.const_data_ptr();
  void* out = y.mutable_data_ptr();
  over_pieces(s, [&](int64_t begin, int64_t end) { pick_kernels().decode(s, analog, out, begin, end); });
}

bool is_order(const std::string& order) { return order == "lsb" || order == "msb"; }

// The result of a call, with `channels` in place of x's.
Tensor result(const Tensor& x, int64_t channels, int32_t type) {
  if (x.dim() == 3) return empty<3>(type, {x.size(0), channels, x.size(2)});
  if (x.dim() == 4) return empty<4>(type, {x.size(0), channels, x.size(2), x.size(3)});
  return empty<5>(type, {x.size(0), channels, x.size(2), x.size(3), x.size(4)});
}

std::optional<Tensor> to_bits_eager(const Tensor& x, int64_t bits, double scale, std::string order, ScalarType dtype) {
  if (!x.is_cpu() || !is_integer(x.scalar_type()) || x.dim() < 3 || x.dim() > 5 || bits < 1 || bits > 63 || !is_order(order)) return std::nullopt;
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) return std::nullopt;
  const int32_t type = dtype == ScalarType::Float ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Half ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16();
  const Tensor y = result(x, x.size(1) * bits, type);
  // An integer out of range is for the long way to refuse.
  return write_bits(x, bits, scale, order, y) ? std::optional<Tensor>(y) : std::nullopt;
}

std::optional<Tensor> from_bits_eager(const Tensor& x, int64_t bits, std::string order, ScalarType dtype) {
  if (!is_native_float(x) || x.dim() < 3 || x.dim() > 5 || bits < 1 || bits > 63 || x.size(1) % bits || !is_order(order) || !is_integer(dtype))
    return std::nullopt;
  const int32_t type = dtype == ScalarType::Byte ? aoti_torch_dtype_uint8()
                       : dtype == ScalarType::Int ? aoti_torch_dtype_int32() : aoti_torch_dtype_int64();
  const Tensor y = result(x, x.size(1) / bits, type);
  from_bits(x, bits, order, dtype, y);
  return y;
}

}  // namespace
}  // namespace fastdiff::analog_bits

STABLE_TORCH_LIBRARY_FRAGMENT(fastdiff_cpu, m) {
  m.def("to_bits(Tensor x, int bits, float scale, str order, ScalarType dtype, Tensor(a!) y) -> ()");
  m.def("to_bits_eager(Tensor x, int bits, float scale, str order, ScalarType dtype) -> Tensor?");
  m.def("from_bits(Tensor x, int bits, str order, ScalarType dtype, Tensor(a!) y) -> ()");
  m.def("from_bits_eager(Tensor x, int bits, str order, ScalarType dtype) -> Tensor?");
}
STABLE_TORCH_LIBRARY_IMPL(fastdiff_cpu, CPU, m) {
  m.impl("to_bits", TORCH_BOX(&fastdiff::analog_bits::to_bits));
  m.impl("to_bits_eager", TORCH_BOX(&fastdiff::analog_bits::to_bits_eager));
  m.impl("from_bits", TORCH_BOX(&fastdiff::analog_bits::from_bits));
  m.impl("from_bits_eager", TORCH_BOX(&fastdiff::analog_bits::from_bits_eager));
}
