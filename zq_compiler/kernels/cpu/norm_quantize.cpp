// LayerNorm or RMSNorm of each row, with the residual add before it, and the quantization of the result:
//   h = x + residual, y = norm(h), (q, scale) = quantize_per_token(y), rotated if asked.
// The row stays in L1 as floats from the load to the integers. h and y are rounded to the tensor's dtype, as between
// separate ops; statistics are float32, the variance summed over differences to the mean.

#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "rows.h"

namespace {

using namespace zq;

struct Norm {
  const float* weight;  // [k] or null
  const float* bias;    // [k] or null
  float eps;
  bool rms, rotated;

  // In place, a row of h becomes what is quantized, whose range is returned; y is stored where it is wanted.
  template <typename T>
  float operator()(float* row, int64_t k, __m512 sum, T* y) const {
    const __m512 mean = _mm512_set1_ps(rms ? 0.0f : _mm512_reduce_add_ps(sum) / float(k));
    __m512 squares = _mm512_setzero_ps();
    for_each_vector(k, [&](int64_t i, __mmask16 mask) {
      const __m512 d = _mm512_maskz_sub_ps(mask, load(row + i, mask), mean);
      squares = _mm512_fmadd_ps(d, d, squares);
    });
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / float(k) + eps));
    Range range;
    for_each_vector(k, [&](int64_t i, __mmask16 mask) {
      __m512 v = _mm512_maskz_mul_ps(mask, _mm512_sub_ps(load(row + i, mask), mean), inverse);
      if (weight) v = _mm512_mul_ps(v, load(weight + i, mask));
      if (bias) v = _mm512_add_ps(v, load(bias + i, mask));
      v = rounded<T>(v);
      if (y) store(y + i, mask, v);
      if (rotated) v = rotate(v);
      range.add(v);
      store(row + i, mask, v);
    });
    return range.amax();
  }
};

std::optional<Tensor> parameter(const char* name, const std::optional<Tensor>& p, int64_t k) {
  if (!p) return p;
  TORCH_CHECK(p->is_floating_point(), "norm_quantize: ", name, " must be a float dtype, got ", p->scalar_type());
  TORCH_CHECK(p->dim() == 1 && p->size(0) == k, "norm_quantize: ", name, " must be [", k, "], got ", p->sizes());
  return p->to(at::kFloat).contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize(const Tensor& input, const std::optional<Tensor>& residual,
                                                         const std::optional<Tensor>& weight,
                                                         const std::optional<Tensor>& bias, double eps, bool rms,
                                                         bool want_y, bool want_h, bool rotated) {
  const Rows x("norm_quantize", "x", input);
  check_rotation("norm_quantize", rotated, x.k);
  std::optional<Rows> r;
  if (residual) {
    TORCH_CHECK(residual->sizes() == input.sizes(), "norm_quantize: residual must be ", input.sizes(), ", got ",
                residual->sizes());
    TORCH_CHECK(residual->scalar_type() == input.scalar_type(), "norm_quantize: residual must be ",
                input.scalar_type(), ", got ", residual->scalar_type());
    r.emplace("norm_quantize", "residual", *residual);
  }
  const auto w = parameter("weight", weight, x.k), b = parameter("bias", bias, x.k);
  const Norm norm{w ? w->const_data_ptr<float>() : nullptr, b ? b->const_data_ptr<float>() : nullptr, float(eps), rms,
                  rotated};
  const Quantized out(input);
  const auto like_x = [&](bool wanted) {
    return at::empty(wanted ? input.sizes() : at::IntArrayRef({0}), input.options());
  };
  const Tensor y = like_x(want_y), h = like_x(want_h);
  int8_t* q = out.q.mutable_data_ptr<int8_t>();
  float* scale = out.scale.mutable_data_ptr<float>();
  for_dtype(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* y_data = want_y ? y.mutable_data_ptr<T>() : nullptr;
    T* h_data = want_h ? h.mutable_data_ptr<T>() : nullptr;
    for_each_row(x.count, x.k, [&](int64_t i, float* row) {
      const T* a = x.row<T>(i);
      const T* c = r ? r->row<T>(i) : nullptr;
      T* h_row = h_data ? h_data + i * x.k : nullptr;
      __m512 sum = _mm512_setzero_ps();
      for_each_vector(x.k, [&](int64_t j, __mmask16 mask) {
        __m512 v = load(a + j, mask);
        if (c) v = rounded<T>(_mm512_add_ps(v, load(c + j, mask)));
        sum = _mm512_add_ps(sum, v);
        store(row + j, mask, v);
        if (h_row) store(h_row + j, mask, v);
      });
      const float range = norm(row, x.k, sum, y_data ? y_data + i * x.k : nullptr);
      scale[i] = quantize_row(row, x.k, range, q + i * x.k);
    });
  });
  return {out.q, out.scale, y, h};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def(
      "norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, bool want_y, "
      "bool want_h, bool rotated=False) -> (Tensor q, Tensor scale, Tensor y, Tensor h)");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("norm_quantize", &norm_quantize);
}
