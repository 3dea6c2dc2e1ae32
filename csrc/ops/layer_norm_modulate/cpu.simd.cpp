#include "ops/layer_norm_modulate/op.h"

#include "common/vec.h"

namespace fastdiff::layer_norm_modulate::FASTDIFF_ISA {
namespace {

using namespace fastdiff::FASTDIFF_ISA;

template <class T>
const T* row(const Rows& x, int64_t b, int64_t n) {
  return x.data ? static_cast<const T*>(x.data) + b * x.b + n * x.n : nullptr;
}

// f(p), p the operand's row in its own type.
template <class T, class F>
void with(const Operand& x, int64_t b, int64_t n, const F& f) {
  const int64_t at = b * x.b + n * x.n;
  if (x.wide) f(static_cast<const float*>(x.data) + at);
  else f(static_cast<const T*>(x.data) + at);
}

// f(value), value(j, load) the operand's row of a single one, or `absent` everywhere.
template <class T, class F>
void with_or(const Operand& x, float absent, const F& f) {
  if (x.data) with<T>(x, 0, 0, [&](const auto* p) { f([p](int64_t j, const auto& get) { return get(p + j); }); });
  else f([absent](int64_t, const auto&) { return splat(absent); });
}

// f(p), p the gradient in its own type.
template <class T, class F>
void to(const Gradient& g, const F& f) {
  if (g.wide) f(static_cast<float*>(g.data));
  else f(static_cast<T*>(g.data));
}

template <class T>
f32 rounded(f32 x) {
  if constexpr (sizeof(T) == 4) return x;
  else return to_f32(from_f32(x, T{}), T{});
}

void put(void* data, Type type, int64_t at, f32 x, int n) {
  typed(type, [&]<class T>() {
    T* p = static_cast<T*>(data) + at;
    if (n == kLanes) store(p, x);
    else store_n(p, x, n);
  });
}

f32 total(const f32 (&chain)[4]) { return (chain[0] + chain[1]) + (chain[2] + chain[3]); }

// A row's modulation in float32, made again when the sample changes, or for every row where it is a token's own:
// normal * gain + offset is the modulated norm, gain = weight (1 + scale), offset = bias (1 + scale) + shift. Null: not needed.
template <class T>
struct Coefficients {
  const Modulation& m;
  int64_t D;
  float *gain, *offset, *gate, *scale;  // scale: 1 + scale
  int64_t known = -1;

  void update(int64_t b, int64_t n) {
    const bool fresh = known != b;
    known = b;
    if (gate && m.gate.data && (fresh || m.gate.token)) fill(gate, m.gate, b, n, 0.0f, 0.0f);
    if (!gain || !(fresh || (m.scale.data && m.scale.token) || (offset && m.shift.data && m.shift.token))) return;
    fill(gain, m.scale, b, n, 1.0f, 1.0f);
    if (scale) std::memcpy(scale, gain, D * sizeof(float));
    if (offset) {
      fill(offset, m.bias, b, n, 0.0f, 0.0f);
      if (m.bias.data) for_vectors(D, [&](int64_t j, const auto& get, const auto& put, int) { put(offset + j, get(offset + j) * get(gain + j)); });
      join(offset, m.shift, b, n, [](f32 a, f32 shift) { return a + shift; });
    }
    join(gain, m.weight, b, n, [](f32 a, f32 weight) { return a * weight; });
  }

  template <class F>
  void join(float* out, const Operand& x, int64_t b, int64_t n, const F& f) {
    if (x.data)
      with<T>(x, b, n, [&](const auto* p) { for_vectors(D, [&](int64_t j, const auto& get, const auto& put, int) { put(out + j, f(get(out + j), get(p + j))); }); });
  }

  void fill(float* out, const Operand& x, int64_t b, int64_t n, float added, float absent) {
    if (x.data)
      with<T>(x, b, n, [&](const auto* p) { for_vectors(D, [&](int64_t j, const auto& get, const auto& put, int) { put(out + j, get(p + j) + added); }); });
    else for_vectors(D, [&](int64_t j, const auto&, const auto& put, int) { put(out + j, splat(absent)); });
  }
};

// normal = ((x - guess) - rest) rstd, guess + rest the mean: neither cancellation nor the mean's rounding reaches the result.
struct Statistics {
  float guess, rest, rstd;

  // From the sums of x - guess and its square, if the guess is no further off than the elements vary: then the difference of squares costs a bit
  // at most. Else a better guess, for another pass: then `again`.
  bool finish(float sum, float squares, int64_t D, float eps, bool again) {
    rest = sum / D;
    const float square = squares / D;
    if (!again && !(rest * rest <= 0.5f * square)) {
      guess += rest;
      return false;
    }
    rstd = 1.0f / __builtin_sqrtf(square - rest * rest + eps);
    return true;
  }
};

// A guess of a row's mean, from its first elements; value(j, load) are those from j on.
template <class F>
float first_mean(int64_t D, const F& value) {
  const int64_t few = D < kLanes ? D : kLanes;
  float sum = 0.0f;
  for_vectors(few, [&](int64_t j, const auto& get, const auto&, int) { sum = reduce_add(value(j, get)); });
  return sum / few;
}

template <class T, bool residual, bool norm>
void forward_rows(const Sizes& n, const Forward& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t D = n.D, step = stride(n);
  // What is a token's own is read in place; with weight or bias beside it, or for one of shift and scale alone, it goes through the coefficients.
  const Modulation& m = a.m;
  const bool direct = norm && m.scale.data && m.shift.data && (m.scale.token || m.shift.token) && !m.weight.data && !m.bias.data;
  const bool made = norm && !direct;
  Coefficients<T> c{m, D, made ? scratch : nullptr, made ? scratch + step : nullptr, m.gate.token ? nullptr : scratch + 2 * step, nullptr};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / n.N, t = i % n.N;
    c.update(b, t);
    const auto run = [&](const auto* gate) {
      const T *x = row<T>(a.x, b, t), *y = row<T>(a.y, b, t);
      T *out = static_cast<T*>(a.out) + i * D, *h = static_cast<T*>(a.h) + i * D;
      const auto value = [&](int64_t j, const auto& get) {
        if constexpr (residual) return get(x + j) + get(gate + j) * get(y + j);
        else return get(x + j);
      };
      Statistics s{};
      if constexpr (norm) s.guess = first_mean(D, value);
      f32 sum[4] = {}, squares[4] = {};
      // What is normalised: the row itself, or what becomes of it, kept in cache.
      constexpr bool kept = residual || sizeof(T) != 4;
      float* line = scratch + 3 * step;
      const auto add = [&](int u, f32 v, int count) {
        const f32 d = keep_n(v - s.guess, count, 0.0f);
        sum[u] += d;
        squares[u] += d * d;
      };
      for_chains(D, [&](int u, int64_t j, const auto& get, const auto& put_all, int count) {
        f32 v = value(j, get);
        if constexpr (residual) store_n(out + j, v, count, a.stream);
        if constexpr (norm) {
          if constexpr (residual) v = rounded<T>(v);
          if constexpr (kept) put_all(line + j, v);
          add(u, v, count);
        }
      });
      if constexpr (norm) {
        const float* z = line;
        if constexpr (!kept) z = x;
        if (!s.finish(reduce_add(total(sum)), reduce_add(total(squares)), D, a.m.eps, false)) {
          for (int u = 0; u < 4; ++u) sum[u] = squares[u] = f32{};
          for_chains(D, [&](int u, int64_t j, const auto& get, const auto&, int count) { add(u, get(z + j), count); });
          s.finish(reduce_add(total(sum)), reduce_add(total(squares)), D, a.m.eps, true);
        }
        const auto modulated = [&](const auto& finish) {
          for_vectors(D, [&](int64_t j, const auto& get, const auto&, int count) {
            store_n(h + j, finish(((get(z + j) - s.guess) - s.rest) * s.rstd, j, get), count, a.stream);
          });
        };
        if (direct)
          with<T>(a.m.scale, b, t, [&](const auto* scale) {
            with<T>(a.m.shift, b, t, [&](const auto* shift) {
              modulated([&](f32 normal, int64_t j, const auto& get) { return normal * (1.0f + get(scale + j)) + get(shift + j); });
            });
          });
        else modulated([&](f32 normal, int64_t j, const auto& get) { return normal * get(c.gain + j) + get(c.offset + j); });
      }
    };
    if (residual && a.m.gate.token) with<T>(a.m.gate, b, t, run);
    else run(c.gate);
  }
  if (a.stream) stream_end();
}

void forward(const Sizes& n, const Forward& a, int64_t begin, int64_t end, float* scratch) {
  typed(n.type, [&]<class T>() {
    if (!a.h) forward_rows<T, true, false>(n, a, begin, end, scratch);
    else if (a.out) forward_rows<T, true, true>(n, a, begin, end, scratch);
    else forward_rows<T, false, true>(n, a, begin, end, scratch);
  });
}


// A sample's backward pass. `own`: scale, and gate if there is one, are a token's own and of type T, with no weight or bias; they are read in place.
template <class T, bool residual, bool own>
struct BackwardRows {
  // Rows taken at once: what they share is loaded once. Nothing is where modulation is a token's own; and results stored past the caches are
  // streams, which the processor has few buffers for.
  static constexpr int kRows = own ? 1 : residual ? 2 : kRegisters / 8;

  const Sizes& n;
  const Backward& a;
  const int64_t b;
  Coefficients<T> c;
  float *sum_dh, *sum_dh_normal, *sum_inner, *sum_inner_normal, *sum_dz_y;

  BackwardRows(const Sizes& n, const Backward& a, int64_t b, float* partial, float* scratch)
      : n(n), a(a), b(b), c{a.m, n.D, own ? nullptr : scratch, nullptr, own ? nullptr : scratch + stride(n), nullptr} {
    const Sums s = sums(a);
    std::memset(partial, 0, s.count * stride(n) * sizeof(float));
    const auto place = [&](int i) { return i < 0 ? nullptr : partial + i * stride(n); };
    sum_dh = place(s.dh), sum_dh_normal = place(s.dh_normal), sum_inner = place(s.inner), sum_inner_normal = place(s.inner_normal),
    sum_dz_y = place(s.dz_y);
    if (sum_inner || sum_inner_normal) c.scale = scratch + 2 * stride(n);
  }

  int64_t at(int64_t t) const { return (b * n.N + t) * n.D; }
  const T* own_row(const Operand& x, int64_t t) const { return row<T>(Rows{x.data, x.b, x.n}, b, t); }

  // The gradient of normal is g = dh gain. Sums of it and of g (x - guess), and the statistics; `again`: from a better guess.
  template <int rows>
  void gather(int64_t t, Statistics* z, float (*g)[2], bool again) const {
    const T *x[rows], *dh[rows], *scale[rows];
    f32 sum[rows] = {}, squares[rows] = {}, grads[rows] = {}, products[rows] = {};
    for (int r = 0; r < rows; ++r) x[r] = row<T>(a.x, b, t + r), dh[r] = row<T>(a.dh, b, t + r), scale[r] = own ? own_row(a.m.scale, t + r) : nullptr;
    for_vectors(n.D, [&](int64_t j, const auto& get, const auto&, int count) {
      f32 gain = {};
      if constexpr (!own) gain = get(c.gain + j);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        if constexpr (own) gain = 1.0f + get(scale[r] + j);
        const f32 d = keep_n(get(x[r] + j) - z[r].guess, count, 0.0f), g = get(dh[r] + j) * gain;
        sum[r] += d;
        squares[r] += d * d;
        grads[r] += g;
        products[r] += g * d;
      }
    });
    for (int r = 0; r < rows; ++r) {
      g[r][0] = reduce_add(grads[r]), g[r][1] = reduce_add(products[r]);
      if (!z[r].finish(reduce_add(sum[r]), reduce_add(squares[r]), n.D, a.m.eps, again)) gather<1>(t + r, z + r, g + r, true);
    }
  }

  template <int rows>
  void block(int64_t t) const {
    Statistics z[rows] = {};
    float g[rows][2], mean_g[rows], mean_gn[rows], rest[rows];
    for (int r = 0; r < rows; ++r) z[r].guess = first_mean(n.D, [&](int64_t j, const auto& get) { return get(row<T>(a.x, b, t + r) + j); });
    gather<rows>(t, z, g, false);
    const T *x[rows], *dh[rows], *dout[rows], *y[rows], *scale[rows], *gate[rows];
    T *dx[rows], *dy[rows], *dscale[rows], *dgate[rows];
    for (int r = 0; r < rows; ++r) {
      mean_g[r] = g[r][0] / n.D, mean_gn[r] = (g[r][1] / n.D - mean_g[r] * z[r].rest) * z[r].rstd, rest[r] = z[r].rest * z[r].rstd;
      x[r] = row<T>(a.x, b, t + r), dh[r] = row<T>(a.dh, b, t + r), dout[r] = row<T>(a.dout, b, t + r), y[r] = row<T>(a.y, b, t + r);
      scale[r] = own ? own_row(a.m.scale, t + r) : nullptr, gate[r] = own && residual ? own_row(a.m.gate, t + r) : nullptr;
      const auto result = [&](void* data) { return data ? static_cast<T*>(data) + at(t + r) : nullptr; };
      dx[r] = result(a.dx), dy[r] = result(a.dy), dscale[r] = result(own ? a.dscale.data : nullptr), dgate[r] = result(own && residual ? a.dgate.data : nullptr);
    }
    for_vectors(n.D, [&](int64_t j, const auto& get, const auto& put_all, int count) {
      f32 gain = {}, gates = {}, all = {}, all_normal = {}, all_products = {};
      if constexpr (!own) gain = get(c.gain + j);
      if constexpr (!own && residual) gates = get(c.gate + j);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        if constexpr (own) gain = 1.0f + get(scale[r] + j);
        if constexpr (own && residual) gates = get(gate[r] + j);
        const f32 normal = (get(x[r] + j) - z[r].guess) * z[r].rstd - rest[r], dhj = get(dh[r] + j);
        f32 dz = (unfused(dhj * gain) - mean_g[r] - normal * mean_gn[r]) * z[r].rstd;  // 0 for a row of one element
        if (dout[r]) dz += get(dout[r] + j);
        store_n(dx[r] + j, dz, count, a.stream);
        all += dhj;
        all_normal += dhj * normal;
        if (own && dscale[r]) store_n(dscale[r] + j, dhj * normal, count, a.stream);
        if constexpr (residual) {
          const f32 product = dz * get(y[r] + j);
          all_products += product;
          if (dy[r]) store_n(dy[r] + j, dz * gates, count, a.stream);
          if (own && dgate[r]) store_n(dgate[r] + j, product, count, a.stream);
        }
      }
      if (sum_dh) put_all(sum_dh + j, get(sum_dh + j) + all);
      if (sum_dh_normal) put_all(sum_dh_normal + j, get(sum_dh_normal + j) + all_normal);
      if (sum_dz_y) put_all(sum_dz_y + j, get(sum_dz_y + j) + all_products);
    });
    for (int r = 0; r < rows; ++r) others(t + r, z[r], mean_g[r], mean_gn[r]);
  }

  // What is left for one row: gradients of a token's own modulation unless they were written in place, and sums under a scale of its own.
  void others(int64_t t, const Statistics& z, float mean_g, float mean_gn) const {
    const T *x = row<T>(a.x, b, t), *dh = row<T>(a.dh, b, t), *dout = row<T>(a.dout, b, t), *y = row<T>(a.y, b, t);
    const auto each = [&](const Gradient& gradient, const auto& value) {
      to<T>(gradient, [&](auto* out) { for_vectors(n.D, [&](int64_t j, const auto& get, const auto& put_all, int) { put_all(out + at(t) + j, value(j, get)); }); });
    };
    const auto normal = [&](int64_t j, const auto& get) { return ((get(x + j) - z.guess) - z.rest) * z.rstd; };
    if (a.dshift.data && a.m.shift.token) each(a.dshift, [&](int64_t j, const auto& get) { return get(dh + j); });
    if constexpr (own) return;
    if (residual && a.dgate.data && a.m.gate.token)
      each(a.dgate, [&](int64_t j, const auto& get) {
        const f32 dz = (unfused(get(dh + j) * get(c.gain + j)) - mean_g - normal(j, get) * mean_gn) * z.rstd;
        return (dout ? dz + get(dout + j) : dz) * get(y + j);
      });
    if (a.dscale.data && a.m.scale.token)
      with_or<T>(a.m.weight, 1.0f, [&](const auto& weight) {
        with_or<T>(a.m.bias, 0.0f, [&](const auto& bias) {
          each(a.dscale, [&](int64_t j, const auto& get) { return get(dh + j) * (normal(j, get) * weight(j, get) + bias(j, get)); });
        });
      });
    if (sum_inner || sum_inner_normal)
      for_vectors(n.D, [&](int64_t j, const auto& get, const auto& put_all, int) {
        const f32 inner = get(dh + j) * get(c.scale + j);
        if (sum_inner) put_all(sum_inner + j, get(sum_inner + j) + inner);
        if (sum_inner_normal) put_all(sum_inner_normal + j, get(sum_inner_normal + j) + inner * normal(j, get));
      });
  }

  void run(int64_t begin, int64_t end) {
    int64_t t = begin;
    if (own || !a.m.token()) {
      c.update(b, t);
      for (; t + kRows <= end; t += kRows) block<kRows>(t);
    }
    for (; t < end; ++t) {
      c.update(b, t);
      block<1>(t);
    }
    if (a.stream) stream_end();
  }
};

template <class T, bool residual>
void backward_rows(const Sizes& n, const Backward& a, int64_t b, int64_t begin, int64_t end, float* partial, float* scratch) {
  const auto in_place = [](const Operand& x) { return x.data && x.token && (sizeof(T) == 4 || !x.wide); };
  const bool own = in_place(a.m.scale) && (!residual || in_place(a.m.gate)) && !a.m.weight.data && !a.m.bias.data && !a.dweight.data && !a.dbias.data;
  if (own) BackwardRows<T, residual, true>(n, a, b, partial, scratch).run(begin, end);
  else BackwardRows<T, residual, false>(n, a, b, partial, scratch).run(begin, end);
}

// Without a norm: dy = gate dout, and dgate.
template <class T>
void gate_rows(const Sizes& n, const Backward& a, int64_t b, int64_t begin, int64_t end, float* partial) {
  const int64_t D = n.D;
  const bool token = a.m.gate.token;
  if (!token) std::memset(partial, 0, D * sizeof(float));
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = (b * n.N + t) * D;
    const T *dout = row<T>(a.dout, b, t), *y = row<T>(a.y, b, t);
    T* dy = static_cast<T*>(a.dy) + at;
    with<T>(a.m.gate, b, t, [&](const auto* gate) {
      const auto run = [&](const auto& keep) {
        for_vectors(D, [&](int64_t j, const auto& get, const auto& put_all, int count) {
          const f32 dz = get(dout + j);
          store_n(dy + j, dz * get(gate + j), count, a.stream);
          keep(j, dz * get(y + j), get, put_all);
        });
      };
      if (token) to<T>(a.dgate, [&](auto* out) { run([&](int64_t j, f32 product, const auto&, const auto& put_all) { put_all(out + at + j, product); }); });
      else run([&](int64_t j, f32 product, const auto& get, const auto& put_all) { put_all(partial + j, get(partial + j) + product); });
    });
  }
  if (a.stream) stream_end();
}

void backward(const Sizes& n, const Backward& a, int64_t b, int64_t begin, int64_t end, float* partial, float* scratch) {
  typed(n.type, [&]<class T>() {
    if (!a.dh.data) gate_rows<T>(n, a, b, begin, end, partial);
    else if (a.y.data) backward_rows<T, true>(n, a, b, begin, end, partial, scratch);
    else backward_rows<T, false>(n, a, b, begin, end, partial, scratch);
  });
}

// With a scale per sample, weight's and bias' gradients are sums over samples of 1 + scale times the sample's sums, and dscale is
// weight and bias times these.
template <class T>
void finish_columns(const Sizes& n, const Backward& a, int64_t pieces, const float* partial, int64_t begin, int64_t end) {
  const Sums s = sums(a);
  const int64_t step = stride(n);
  const bool own = a.m.scale.data && a.m.scale.token;
  const auto type = [&](const Gradient& g) { return g.wide ? Type::f32 : n.type; };
  for_vectors(end - begin, [&](int64_t k, const auto& get, const auto&, int count) {
    const int64_t j = begin + k;
    const auto read = [&](const Operand& x, int64_t b, float absent) {
      f32 v = splat(absent);
      if (x.data) with<T>(x, b, 0, [&](const auto* p) { v = get(p + j); });
      return v;
    };
    const f32 weight = read(a.m.weight, 0, 1.0f), bias = read(a.m.bias, 0, 0.0f);
    f32 dweight = {}, dbias = {};
    for (int64_t b = 0; b < n.B; ++b) {
      const auto sum = [&](int i) {
        f32 v = {};
        for (int64_t p = 0; p < pieces; ++p) v += get(partial + ((b * pieces + p) * s.count + i) * step + j);
        return v;
      };
      const f32 dh = s.dh < 0 ? f32{} : sum(s.dh), dh_normal = s.dh_normal < 0 ? f32{} : sum(s.dh_normal);
      const int64_t at = b * n.D + j;
      if (a.dshift.data && !a.m.shift.token) put(a.dshift.data, type(a.dshift), at, dh, count);
      if (a.dscale.data && !own) put(a.dscale.data, type(a.dscale), at, dh_normal * weight + dh * bias, count);
      if (s.dz_y >= 0) put(a.dgate.data, type(a.dgate), at, sum(s.dz_y), count);
      const f32 scale = own ? splat(1.0f) : 1.0f + read(a.m.scale, b, 0.0f);
      if (a.dweight.data) dweight += own ? sum(s.inner_normal) : dh_normal * scale;
      if (a.dbias.data) dbias += own ? sum(s.inner) : dh * scale;
    }
    if (a.dweight.data) put(a.dweight.data, type(a.dweight), j, dweight, count);
    if (a.dbias.data) put(a.dbias.data, type(a.dbias), j, dbias, count);
  });
}

void finish(const Sizes& n, const Backward& a, int64_t pieces, const float* partial, int64_t begin, int64_t end) {
  typed(n.type, [&]<class T>() { finish_columns<T>(n, a, pieces, partial, begin, end); });
}

}  // namespace

const Kernels kernels{forward, backward, finish};

}  // namespace fastdiff::layer_norm_modulate::FASTDIFF_ISA
