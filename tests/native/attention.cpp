#include "ops/attention/backward.cuh"
#include "ops/attention/forward.cuh"

#include "bind.h"

using namespace fastdiff;
using namespace fastdiff::attention;
using emulation::Array, emulation::Ints;

template <class T>
static Rows<T> rows(const Array& x, const Ints& stride) { return {x.as<T>(), stride[0], stride[1], stride[2]}; }

template <class T>
static Problem<T> sized(const Ints& sizes) {
  Problem<T> p{};
  p.B = sizes[0], p.H = sizes[1], p.M = static_cast<int>(sizes[2]), p.N = static_cast<int>(sizes[3]), p.E = static_cast<int>(sizes[4]);
  return p;
}

// sizes B, H, M, N, E; strides of three axes a tensor.
template <class T>
static Problem<T> problem(const Ints& sizes, Array q, Array k, Array v, const Ints& strides, Array bias, const Ints& bias_stride, Array lengths, bool causal,
                          double scale) {
  Problem<T> p = sized<T>(sizes);
  p.q = rows<const T>(q, {strides[0], strides[1], strides[2]}), p.k = rows<const T>(k, {strides[3], strides[4], strides[5]});
  p.v = rows<const T>(v, {strides[6], strides[7], strides[8]});
  p.bias = bias.as<const T>(), p.lengths = lengths.as<const int64_t>(), p.lengths_stride = 1;
  for (int a = 0; a < 4; ++a) p.bias_stride[a] = bias_stride[a];
  p.causal = causal, p.scale = static_cast<float>(scale);
  return p;
}

template <class T>
static Rows<T> dense(const Array& x, const Ints& sizes, int64_t count) { return rows<T>(x, {sizes[1] * count * sizes[4], count * sizes[4], sizes[4]}); }

template <class T>
static void forward(uint64_t seed, const Ints& sizes, const Problem<T>& p, Array out, Array low, Array lse, Array lse_low, Array parts, Array tops, Array totals,
                    const Ints& by) {
  ForwardOut<T> o{dense<T>(out, sizes, p.M), low.as<T>(), {lse.as<float>(), lse_low.as<float>()}, parts.as<float>(), tops.as<float>(), totals.as<float>()};
  run_forward<T>(Launcher{seed}, p, o, {static_cast<int>(by[0]), static_cast<int>(by[1])});
}

// type: 0 float, 1 bf16, 2 f16. by: blocks that share the keys, and the keys of each.
BIND(attention, +[](uint64_t seed, int64_t type, Ints sizes, Array q, Array k, Array v, Ints strides, Array bias, Ints bias_stride, Array lengths, bool causal,
                    double scale, Array out, Array low, Array lse, Array lse_low, Array parts, Array tops, Array totals, Ints by) {
  const auto run = [&](auto x) {
    using T = decltype(x);
    forward<T>(seed, sizes, problem<T>(sizes, q, k, v, strides, bias, bias_stride, lengths, causal, scale), out, low, lse, lse_low, parts, tops, totals, by);
  };
  if (type == 0) run(float{});
  else if (type == 1) run(bf16{});
  else run(f16{});
})

// by: blocks that share the keys, the keys of each, blocks that share the queries, the queries of each.
BIND(attention_backward, +[](uint64_t seed, int64_t type, Ints sizes, Array dout, Array dlse, Array q, Array k, Array v, Ints strides, Array bias,
                             Ints bias_stride, Array lengths, bool causal, double scale, Array out, Array low, Array lse, Array lse_low, Array stats, Array dq,
                             Array dk, Array dv, Array dq_parts, Array dk_parts, Array dv_parts, Ints by) {
  const auto run = [&](auto x) {
    using T = decltype(x);
    const auto p = problem<T>(sizes, q, k, v, strides, bias, bias_stride, lengths, causal, scale);
    const Backward<T> g{dense<const T>(dout, sizes, p.M), dense<const T>(out, sizes, p.M), dense<const T>(low, sizes, p.M), lse.as<const float>(),
                        lse_low.as<const float>(), dlse.as<const float>(), stats.as<float>(), dense<T>(dq, sizes, p.M), dense<T>(dk, sizes, p.N),
                        dense<T>(dv, sizes, p.N), dq_parts.as<float>(), dk_parts.as<float>(), dv_parts.as<float>()};
    run_backward<T>(Launcher{seed}, p, g, {{static_cast<int>(by[0]), static_cast<int>(by[1])}, {static_cast<int>(by[2]), static_cast<int>(by[3])}});
  };
  if (type == 0) run(float{});
  else if (type == 1) run(bf16{});
  else run(f16{});
})

// out: splits and per, of the forward, the query gradients and the key gradients.
BIND(attention_shares, +[](Array out, int64_t architecture, int64_t type, Ints sizes) {
  const auto run = [&](auto x) {
    using T = decltype(x);
    const Problem<T> p = sized<T>(sizes);
    const Shares f = forward_shares(static_cast<int>(architecture), p);
    const BackwardShares b = backward_shares(static_cast<int>(architecture), p);
    const int64_t facts[] = {f.splits, f.per, b.keys.splits, b.keys.per, b.queries.splits, b.queries.per};
    std::copy(std::begin(facts), std::end(facts), static_cast<int64_t*>(out.data));
  };
  if (type == 0) run(float{});
  else run(bf16{});
})
