// GELU or SiLU-mul of each row and the quantization of the result, token-wise or with static scales. The row stays in
// L1 as floats in between; values are rounded to the tensor's dtype, as between separate ops.

#include <c10/util/string_view.h>
#include <torch/library.h>

#include <cmath>
#include <numbers>
#include <tuple>

#include "gelu.h"
#include "rows.h"

namespace {

using namespace zq;

// e^x to 1 unit in the last place: the Taylor series around the nearest multiple of ln 2.
Floats exp(Floats x) {
  constexpr float kTaylor[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 1 / 2.0f, 1.0f, 1.0f};
  x = min(104.0f, max(-104.0f, x));  // keeps a NaN
  const Floats n = round(x * std::numbers::log2e_v<float>);
  Floats r = fnmadd(n, 0x1.62e4p-1f, x);  // ln 2 in two parts, the first of few bits
  r = fnmadd(n, float(std::numbers::ln2 - 0x1.62e4p-1), r);
  Floats p = 1 / 5040.0f;
  for (const float c : kTaylor) p = fmadd(p, r, c);
  return scale(p, n);
}

Floats silu(Floats x) {
  return x / (1.0f + exp(0.0f - x));
}

// value(type, row) gives a function from (offset, lanes) to a vector of the row; what it returns is kept and quantized.
template <typename F>
std::tuple<Tensor, Tensor> quantize_values(const Rows& x, bool rotated, F value) {
  const Quantized out(x.tensor);
  int8_t* q = out.q.mutable_data_ptr<int8_t>();
  float* scale = out.scale.mutable_data_ptr<float>();
  for_dtype(x.tensor.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_each_row(x.count, x.k, [&](int64_t row, float* buffer) {
      const auto at = value(type, row);
      Range range;
      for_each_vector(x.k, [&](int64_t i, Lanes lanes) {
        Floats v = rounded<T>(at(i, lanes));
        if (rotated) v = rotate(v);
        range.add(v);
        store(buffer + i, lanes, v);
      });
      scale[row] = quantize_row(buffer, x.k, range.amax(), q + row * x.k);
    });
  });
  return {out.q, out.scale};
}

// The same with scales known ahead of time, one a feature or one for all.
template <typename F>
Tensor quantize_values(const Rows& x, const Tensor& scale, F value) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat, "the scale must be Float, got ", scale.scalar_type());
  TORCH_CHECK(scale.numel() == x.k || scale.numel() == 1, "the scale must have ", x.k, " elements, got ",
              scale.sizes());
  const Tensor steps = scale.reshape({-1}).expand({x.k}).contiguous();
  const float* step = steps.const_data_ptr<float>();
  const Tensor q = at::empty(x.tensor.sizes(), x.tensor.options().dtype(at::kChar));
  int8_t* to = q.mutable_data_ptr<int8_t>();
  for_dtype(x.tensor.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_each_row(x.count, x.k, [&](int64_t row, float*) {
      const auto at = value(type, row);
      for_each_vector(x.k, [&](int64_t i, Lanes lanes) {
        store(to + row * x.k + i, lanes, rounded<T>(at(i, lanes)) / load(step + i, lanes));
      });
    });
  });
  return q;
}

// gelu_values(x, gelu) and silu_mul_values(gate, up): functions that quantize_values takes.
auto gelu_values(const Rows& x, const Gelu& gelu) {
  return [&x, &gelu](auto type, int64_t row) {
    return [&gelu, from = x.row<decltype(type)>(row)](int64_t i, Lanes lanes) { return gelu(load(from + i, lanes)); };
  };
}

auto silu_mul_values(const Rows& gate, const Rows& up) {
  TORCH_CHECK(up.tensor.sizes() == gate.tensor.sizes(), "silu_mul_quantize: up must be ", gate.tensor.sizes(),
              ", got ", up.tensor.sizes());
  TORCH_CHECK(up.tensor.scalar_type() == gate.tensor.scalar_type(), "silu_mul_quantize: up must be ",
              gate.tensor.scalar_type(), ", got ", up.tensor.scalar_type());
  return [&gate, &up](auto type, int64_t row) {
    using T = decltype(type);
    return [a = gate.row<T>(row), b = up.row<T>(row)](int64_t i, Lanes lanes) {
      return rounded<T>(silu(load(a + i, lanes))) * load(b + i, lanes);
    };
  };
}

std::tuple<Tensor, Tensor> gelu_quantize(const Tensor& input, std::string_view approximate, bool rotated) {
  const Rows x("gelu_quantize", "x", input);
  check_rotation("gelu_quantize", rotated, x.k);
  return quantize_values(x, rotated, gelu_values(x, gelu_form("gelu_quantize", approximate)));
}

Tensor gelu_quantize_static(const Tensor& input, std::string_view approximate, const Tensor& scale) {
  const Rows x("gelu_quantize_static", "x", input);
  return quantize_values(x, scale, gelu_values(x, gelu_form("gelu_quantize_static", approximate)));
}

std::tuple<Tensor, Tensor> silu_mul_quantize(const Tensor& gate, const Tensor& up, bool rotated) {
  const Rows g("silu_mul_quantize", "gate", gate), u("silu_mul_quantize", "up", up);
  check_rotation("silu_mul_quantize", rotated, g.k);
  return quantize_values(g, rotated, silu_mul_values(g, u));
}

Tensor silu_mul_quantize_static(const Tensor& gate, const Tensor& up, const Tensor& scale) {
  const Rows g("silu_mul_quantize_static", "gate", gate), u("silu_mul_quantize_static", "up", up);
  return quantize_values(g, scale, silu_mul_values(g, u));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def("gelu_quantize(Tensor x, str approximate, bool rotated=False) -> (Tensor q, Tensor scale)");
  m.def("silu_mul_quantize(Tensor gate, Tensor up, bool rotated=False) -> (Tensor q, Tensor scale)");
  m.def("gelu_quantize_static(Tensor x, str approximate, Tensor scale) -> Tensor");
  m.def("silu_mul_quantize_static(Tensor gate, Tensor up, Tensor scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("gelu_quantize", &gelu_quantize);
  m.impl("silu_mul_quantize", &silu_mul_quantize);
  m.impl("gelu_quantize_static", &gelu_quantize_static);
  m.impl("silu_mul_quantize_static", &silu_mul_quantize_static);
}
