// Both GELUs on vectors of floats, for the kernels that quantize their result.
#pragma once

#include <cmath>
#include <numbers>
#include <string_view>

#include "rows.h"

namespace zq {

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

  Floats operator()(Floats x) const {
    const Floats magic = 0x1.8p23f;  // adding it rounds to an integer, left in the lowest bits
    const Floats t = abs(x), shifted = fmadd(t, 1 / kWidth, magic);
    const Ints segment = bits_of(shifted);
    const Floats u = fnmadd(shifted - magic, kWidth, t);
    Floats tail = lookup(terms_[kTerms - 1], segment);
#pragma GCC unroll 8
    for (int j = kTerms - 2; j >= 0; --j) tail = fmadd(tail, u, lookup(terms_[j], segment));
    // Beyond the reach 0, but NaN for -Inf, as -Inf * cdf(-Inf) is.
    const Floats zero = 0.0f;
    tail = select(t < kReach, tail, min(x, zero) * zero);
    return max(zero, x) - tail;  // in this order max keeps a NaN
  }

 private:
  static constexpr int kTerms = 7;
  static constexpr float kWidth = 25.0f / 64.0f;  // few bits: multiples are exact
  static constexpr float kReach = 15.5f * kWidth;
  alignas(64) float terms_[kTerms][kLanes];
};

inline double normal_cdf(double t) {
  return 0.5 * std::erfc(-t / std::numbers::sqrt2);
}

inline double tanh_cdf(double t) {
  return 1 / (1 + std::exp(-2 * std::sqrt(2 / std::numbers::pi) * (t + 0.044715 * t * t * t)));
}

// The GELU that torch calls approximate="none" or "tanh".
inline const Gelu& gelu_form(const char* op, std::string_view approximate) {
  static const Gelu erf_form(normal_cdf), tanh_form(tanh_cdf);
  TORCH_CHECK(approximate == "none" || approximate == "tanh", op, ": approximate must be none or tanh, got ",
              approximate);
  return approximate == "tanh" ? tanh_form : erf_form;
}

}  // namespace zq
