// LayerNorm or RMSNorm of each row, with the residual add before it, and the quantization of the result:
//   h = x + residual, y = norm(h), (q, scale) = quantize_per_token(y), rotated if asked.
// Either summand may be integers: x with a scale a feature, the residual with a scale a row, perhaps rotated.
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
  float operator()(float* row, int64_t k, Floats sum, T* y) const {
    const Floats mean = rms ? 0.0f : reduce_add(sum) / float(k);
    Floats squares = 0.0f;
    for_each_vector(k, [&](int64_t i, Lanes lanes) {
      const Floats d = keep(lanes, load(row + i, lanes) - mean);
      squares = fmadd(d, d, squares);
    });
    const Floats inverse = 1.0f / std::sqrt(reduce_add(squares) / float(k) + eps);
    Range range;
    for_each_vector(k, [&](int64_t i, Lanes lanes) {
      Floats v = keep(lanes, (load(row + i, lanes) - mean) * inverse);
      if (weight) v = v * load(weight + i, lanes);
      if (bias) v = v + load(bias + i, lanes);
      v = rounded<T>(v);
      if (y) store(y + i, lanes, v);
      if (rotated) v = rotate(v);
      range.add(v);
      store(row + i, lanes, v);
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

// A summand: rows of floats, or of integers and their scales.
struct Summand {
  Rows rows;
  Tensor scale;  // undefined for floats
  bool per_row, rotated;

  Summand(const char* name, const Tensor& x, const std::optional<Tensor>& s, bool per_row, bool rotated)
      : rows("norm_quantize", name, x, s.has_value()), per_row(per_row), rotated(rotated && s) {
    check_rotation("norm_quantize", this->rotated, rows.k);
    if (!s) return;
    const int64_t expected = per_row ? rows.count : rows.k;
    TORCH_CHECK(s->scalar_type() == at::kFloat, "norm_quantize: the scale of ", name, " must be Float, got ",
                s->scalar_type());
    TORCH_CHECK(s->numel() == expected || (!per_row && s->numel() == 1), "norm_quantize: the scale of ", name,
                " must have ", expected, " elements, got ", s->sizes());
    scale = s->numel() == expected ? s->contiguous() : s->reshape({1}).expand({expected}).contiguous();
  }

  // f(lanes, j, vector) for each vector of row i, rounded to T.
  template <typename T, typename F>
  void row(int64_t i, F f) const {
    if (!scale.defined()) {
      const T* x = rows.row<T>(i);
      for_each_vector(rows.k, [&](int64_t j, Lanes lanes) { f(j, lanes, load(x + j, lanes)); });
      return;
    }
    const int8_t* x = rows.row<int8_t>(i);
    const float* s = scale.const_data_ptr<float>() + (per_row ? i : 0);
    for_each_vector(rows.k, [&](int64_t j, Lanes lanes) {
      Floats v = load(x + j, lanes) * (per_row ? Floats(*s) : load(s + j, lanes));
      if (rotated) v = rotate(v);
      f(j, lanes, rounded<T>(v));
    });
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_quantize(
    const Tensor& input, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, double eps, bool rms, bool want_y, bool want_h, bool rotated,
    const std::optional<Tensor>& x_scale, const std::optional<Tensor>& residual_scale, bool residual_rotated,
    std::optional<at::ScalarType> dtype) {
  const Summand x("x", input, x_scale, false, false);
  const int64_t k = x.rows.k;
  const at::ScalarType float_dtype = dtype.value_or(input.scalar_type());
  TORCH_CHECK(x_scale || input.scalar_type() == float_dtype, "norm_quantize: x must be ", float_dtype, ", got ",
              input.scalar_type());
  check_rotation("norm_quantize", rotated, k);
  std::optional<Summand> r;
  if (residual) {
    TORCH_CHECK(residual->sizes() == input.sizes(), "norm_quantize: residual must be ", input.sizes(), ", got ",
                residual->sizes());
    TORCH_CHECK(residual_scale || residual->scalar_type() == float_dtype, "norm_quantize: residual must be ",
                float_dtype, ", got ", residual->scalar_type());
    r.emplace("residual", *residual, residual_scale, true, residual_rotated);
  }
  const auto w = parameter("weight", weight, k), b = parameter("bias", bias, k);
  const Norm norm{w ? w->const_data_ptr<float>() : nullptr, b ? b->const_data_ptr<float>() : nullptr, float(eps), rms,
                  rotated};
  const Quantized out(input);
  const auto floats = [&](bool wanted) {
    return at::empty(wanted ? input.sizes() : at::IntArrayRef({0}), input.options().dtype(float_dtype));
  };
  const Tensor y = floats(want_y), h = floats(want_h);
  int8_t* q = out.q.mutable_data_ptr<int8_t>();
  float* scale = out.scale.mutable_data_ptr<float>();
  for_dtype(float_dtype, [&](auto type) {
    using T = decltype(type);
    T* y_data = want_y ? y.mutable_data_ptr<T>() : nullptr;
    T* h_data = want_h ? h.mutable_data_ptr<T>() : nullptr;
    for_each_row(x.rows.count, k, [&](int64_t i, float* row) {
      x.row<T>(i, [&](int64_t j, Lanes lanes, Floats v) { store(row + j, lanes, v); });
      if (r)
        r->row<T>(i, [&](int64_t j, Lanes lanes, Floats v) {
          store(row + j, lanes, rounded<T>(load(row + j, lanes) + v));
        });
      T* h_row = h_data ? h_data + i * k : nullptr;
      Floats sum = 0.0f;
      for_each_vector(k, [&](int64_t j, Lanes lanes) {
        const Floats v = load(row + j, lanes);
        sum = sum + v;
        if (h_row) store(h_row + j, lanes, v);
      });
      const float range = norm(row, k, sum, y_data ? y_data + i * k : nullptr);
      scale[i] = quantize_row(row, k, range, q + i * k);
    });
  });
  return {out.q, out.scale, y, h};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def(
      "norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms, bool want_y, "
      "bool want_h, bool rotated=False, Tensor? x_scale=None, Tensor? residual_scale=None, "
      "bool residual_rotated=False, ScalarType? dtype=None) -> (Tensor q, Tensor scale, Tensor y, Tensor h)");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("norm_quantize", &norm_quantize);
}
