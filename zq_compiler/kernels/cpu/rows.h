// What the kernels share: rows of a tensor, their rotation, and the exact INT8 quantization of a row.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include "simd.h"

namespace zq {

using at::Tensor;

constexpr int64_t kGrain = 32768;  // values worth a thread of their own
constexpr float kEps = 1e-12f;
constexpr float kStep = 1.0f / 127.0f;

// Reciprocal and exact form each differ from 127 x / a by at most 3 units of 2^-24, relative, so from each other by
// less than 5e-5: farther than this margin from a rounding tie, both round to the same integer.
constexpr float kTieMargin = 1.0f / 4096.0f;

// numerics.rotate of one block of 16 features: sums and differences of features 1, 2, 4 and 8 apart, in this order.
inline Floats rotate(Floats v) {
  v = fmadd(v, signs<1>(), partners<1>(v));
  v = fmadd(v, signs<2>(), partners<2>(v));
  v = fmadd(v, signs<4>(), partners<4>(v));
  v = fmadd(v, signs<8>(), partners<8>(v));
  return v * 0.25f;
}

inline void check_rotation(const char* op, bool rotated, int64_t k) {
  TORCH_CHECK(!rotated || k % kLanes == 0, op, ": a rotated row must have a multiple of ", kLanes, " features, got ",
              k);
}

// The largest magnitude of a row. Of magnitudes, the bits order as the values do; NaN and Inf come out on top.
class Range {
 public:
  void add(Floats v) { top_ = max(top_, bits_of(v) & Ints(0x7FFFFFFF)); }

  // max(amax(|x|), 1e-12), or NaN for a row that holds NaN or Inf.
  float amax() const {
    const int32_t bits = reduce_max(top_);
    return bits >= 0x7F800000 ? std::numeric_limits<float>::quiet_NaN() : std::max(std::bit_cast<float>(bits), kEps);
  }

 private:
  Ints top_ = 0;
};

// q = round_half_even((x / a) / (1/127)) in float32; returns the scale, a * (1/127). A NaN range gives q = 0.
template <typename T>
float quantize_row(const T* x, int64_t k, float a, int8_t* q) {
  if (a != a) {
    std::fill(q, q + k, int8_t(0));
    return a;
  }
  const Floats inverse = 127.0f / a, whole = a, step = kStep, near_tie = 0.5f - kTieMargin;
  for_each_vector(k, [&](int64_t i, Lanes lanes) {
    const Floats value = load(x + i, lanes);
    Floats t = value * inverse;
    if (any(abs(past_round(t)) > near_tie)) [[unlikely]] t = value / whole / step;
    store_low8(q + i, lanes, to_ints(t));
  });
  return a * kStep;
}

// A tensor [..., K] as rows of contiguous values, one stride apart; copied only where the strides are others.
struct Rows {
  Tensor tensor;
  int64_t count, k, stride;

  Rows(const char* op, const char* name, const Tensor& x, bool integers = false) : tensor(x) {
    TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0, op, ": ", name, " must be [..., K] with K at least 1, got ", x.sizes());
    const auto dtype = x.scalar_type();
    const bool floats = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
    TORCH_CHECK(integers ? dtype == at::kChar : floats, op, ": ", name, " must be ",
                integers ? "Char" : "Float, BFloat16 or Half", ", got ", dtype);
    k = x.size(-1);
    count = x.numel() / k;
    stride = k;
    int64_t next = -1;  // the stride that one more leading dimension must have
    bool regular = k == 1 || x.stride(-1) == 1;
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (next < 0) stride = x.stride(d);
      else regular &= x.stride(d) == next;
      next = x.stride(d) * x.size(d);
    }
    if (!regular) {
      tensor = x.contiguous();
      stride = k;
    }
  }

  template <typename T>
  const T* row(int64_t i) const {
    return tensor.const_data_ptr<T>() + i * stride;
  }
};

// Where a kernel puts the integers and scales of each row.
struct Quantized {
  Tensor q, scale;

  explicit Quantized(const Tensor& x) : q(at::empty(x.sizes(), x.options().dtype(at::kChar))) {
    auto shape = x.sizes().vec();
    shape.back() = 1;
    scale = at::empty(shape, x.options().dtype(at::kFloat));
  }
};

// f(T()) for T of the dtype, one of those that Rows admits.
template <typename F>
void for_dtype(at::ScalarType dtype, F f) {
  if (dtype == at::kFloat) f(float());
  else if (dtype == at::kBFloat16) f(at::BFloat16());
  else f(at::Half());
}

// f(row, buffer of k floats) for each row, in parallel.
template <typename F>
void for_each_row(int64_t rows, int64_t k, F f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / k), [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> buffer;
    if (int64_t(buffer.size()) < k) buffer.resize(k);
    for (int64_t row = begin; row < end; ++row) f(row, buffer.data());
  });
}

}  // namespace zq
