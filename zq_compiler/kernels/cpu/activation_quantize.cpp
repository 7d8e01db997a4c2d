// GELU or SiLU-mul of each row and the quantization of the result, token-wise or with static scales. The row stays in L1 as floats in between; values are
// rounded to the tensor's dtype, as between separate ops.

#include <c10/util/string_view.h>
#include <torch/library.h>

#include <cmath>
#include <numbers>
#include <tuple>

#include "rows.h"

namespace {

using namespace zq;

// Both GELUs are x * cdf(x) with cdf(-x) = 1 - cdf(x), so
//   gelu(x) = max(x, 0) - tail(|x|), tail(t) = t * (1 - cdf(t)),
// and the tail is smooth, at most 0.17 and gone beyond kReach. It is a table of polynomials around the multiples of
// kWidth, looked up in registers. They interpolate within 2e-9, and exactly at 0, so tiny x lose nothing.
class Gelu {
 public:
  explicit Gelu(double (*cdf)(double)) {
    for (int s = 0; s < kLanes; ++s) {
      double u[kTerms], c[kTerms];  // Chebyshev-Lobatto nodes, kWidth/2 around s * kWidth
      for (int j = 0; j < kTerms; ++j) {
        u[j] = 2 * j == kTerms - 1 ? 0.0 : -std::cos(std::numbers::pi * j / (kTerms - 1)) * kWidth / 2;
        const double t = s * kWidth + u[j];
        c[j] = t * (1 - cdf(t));
      }
      for (int i = 1; i < kTerms; ++i)  // divided differences
        for (int j = kTerms - 1; j >= i; --j) c[j] = (c[j] - c[j - 1]) / (u[j] - u[j - i]);
      for (int i = kTerms - 2; i >= 0; --i)  // to powers of u
        for (int j = i; j < kTerms - 1; ++j) c[j] -= u[i] * c[j + 1];
      for (int j = 0; j < kTerms; ++j) terms_[j][s] = float(c[j]);
    }
    terms_[0][0] = 0.0f;
  }

  __m512 operator()(__m512 x) const {
    const __m512 magic = _mm512_set1_ps(0x1.8p23f);  // adding it rounds to an integer, left in the lowest bits
    const __m512 t = _mm512_abs_ps(x);
    const __m512 shifted = _mm512_fmadd_ps(t, _mm512_set1_ps(1 / kWidth), magic);
    const __m512i segment = _mm512_castps_si512(shifted);  // the lookup takes the lowest 4 bits
    const __m512 u = _mm512_fnmadd_ps(_mm512_sub_ps(shifted, magic), _mm512_set1_ps(kWidth), t);
    __m512 tail = _mm512_permutexvar_ps(segment, _mm512_load_ps(terms_[kTerms - 1]));
#pragma GCC unroll 8
    for (int j = kTerms - 2; j >= 0; --j)
      tail = _mm512_fmadd_ps(tail, u, _mm512_permutexvar_ps(segment, _mm512_load_ps(terms_[j])));
    // Beyond the reach 0, but NaN for -Inf, as -Inf * cdf(-Inf) is.
    const __mmask16 near = _mm512_cmp_ps_mask(t, _mm512_set1_ps(kReach), _CMP_LT_OQ);
    const __m512 zero = _mm512_setzero_ps();
    tail = _mm512_mask_mov_ps(_mm512_mul_ps(_mm512_min_ps(x, zero), zero), near, tail);
    return _mm512_sub_ps(_mm512_max_ps(zero, x), tail);  // in this order max keeps a NaN
  }

 private:
  static constexpr int kTerms = 7;
  static constexpr float kWidth = 25.0f / 64.0f;  // few bits: multiples are exact
  static constexpr float kReach = 15.5f * kWidth;
  alignas(64) float terms_[kTerms][kLanes];
};

double normal_cdf(double t) {
  return 0.5 * std::erfc(-t / std::numbers::sqrt2);
}

double tanh_cdf(double t) {
  return 1 / (1 + std::exp(-2 * std::sqrt(2 / std::numbers::pi) * (t + 0.044715 * t * t * t)));
}

// e^x to 1 unit in the last place: the Taylor series around the nearest multiple of ln 2.
__m512 exp(__m512 x) {
  constexpr float kTaylor[] = {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 1 / 2.0f, 1.0f, 1.0f};
  x = _mm512_min_ps(_mm512_set1_ps(104.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));  // keeps a NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(std::numbers::log2e_v<float>)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);  // ln 2 in two parts, the first of few bits
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(float(std::numbers::ln2 - 0x1.62e4p-1)), r);
  __m512 p = _mm512_set1_ps(1 / 5040.0f);
  for (const float c : kTaylor) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

__m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// value(type, row) gives a function from (offset, mask) to a vector of the row; what it returns is kept and quantized.
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
      for_each_vector(x.k, [&](int64_t i, __mmask16 mask) {
        __m512 v = rounded<T>(at(i, mask));
        if (rotated) v = rotate(v);
        range.add(v);
        store(buffer + i, mask, v);
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
      for_each_vector(x.k, [&](int64_t i, __mmask16 mask) {
        store(to + row * x.k + i, mask, _mm512_div_ps(rounded<T>(at(i, mask)), load(step + i, mask)));
      });
    });
  });
  return q;
}

// gelu_values(x, approximate) and silu_mul_values(gate, up): functions that quantize_values takes.
auto gelu_values(const Rows& x, std::string_view approximate) {
  static const Gelu erf_form(normal_cdf), tanh_form(tanh_cdf);
  TORCH_CHECK(approximate == "none" || approximate == "tanh",
              "gelu_quantize: approximate must be none or tanh, got ", approximate);
  return [&x, &gelu = approximate == "tanh" ? tanh_form : erf_form](auto type, int64_t row) {
    return [&gelu, from = x.row<decltype(type)>(row)](int64_t i, __mmask16 mask) { return gelu(load(from + i, mask)); };
  };
}

auto silu_mul_values(const Rows& gate, const Rows& up) {
  TORCH_CHECK(up.tensor.sizes() == gate.tensor.sizes(), "silu_mul_quantize: up must be ", gate.tensor.sizes(),
              ", got ", up.tensor.sizes());
  TORCH_CHECK(up.tensor.scalar_type() == gate.tensor.scalar_type(), "silu_mul_quantize: up must be ",
              gate.tensor.scalar_type(), ", got ", up.tensor.scalar_type());
  return [&gate, &up](auto type, int64_t row) {
    using T = decltype(type);
    return [a = gate.row<T>(row), b = up.row<T>(row)](int64_t i, __mmask16 mask) {
      return _mm512_mul_ps(rounded<T>(silu(load(a + i, mask))), load(b + i, mask));
    };
  };
}

std::tuple<Tensor, Tensor> gelu_quantize(const Tensor& input, std::string_view approximate, bool rotated) {
  const Rows x("gelu_quantize", "x", input);
  check_rotation("gelu_quantize", rotated, x.k);
  return quantize_values(x, rotated, gelu_values(x, approximate));
}

Tensor gelu_quantize_static(const Tensor& input, std::string_view approximate, const Tensor& scale) {
  const Rows x("gelu_quantize_static", "x", input);
  return quantize_values(x, scale, gelu_values(x, approximate));
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
