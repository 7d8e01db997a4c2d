// What the kernels share: vectors of the float dtypes, rows of a tensor, and the exact INT8 quantization of a row.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>
#include <vector>

namespace zq {

using at::Tensor;

constexpr int64_t kLanes = 16;     // 32-bit lanes of one register
constexpr int64_t kGrain = 32768;  // values worth a thread of their own
constexpr float kEps = 1e-12f;
constexpr float kStep = 1.0f / 127.0f;

// Reciprocal and exact form each differ from 127 x / a by at most 3 units of 2^-24, relative, so from each other by
// less than 5e-5: farther than this margin from a rounding tie, both round to the same integer.
constexpr float kTieMargin = 1.0f / 4096.0f;

inline __mmask16 lane_mask(int64_t count) {
  return count >= kLanes ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

inline __m512 load(const float* x, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, x);
}

inline __m512 load(const at::Half* x, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}

inline __m512 load(const at::BFloat16* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

inline __m512 load(const int8_t* x, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, x)));
}

inline __m256i to_half(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Not vcvtneps2bf16: it flushes denormals.
inline __m512i to_bfloat16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, _mm512_set1_epi32(0x7FC0));
}

inline void store(float* y, __mmask16 mask, __m512 v) {
  _mm512_mask_storeu_ps(y, mask, v);
}

inline void store(at::Half* y, __mmask16 mask, __m512 v) {
  _mm256_mask_storeu_epi16(y, mask, to_half(v));
}

inline void store(at::BFloat16* y, __mmask16 mask, __m512 v) {
  _mm256_mask_storeu_epi16(y, mask, _mm512_cvtepi32_epi16(to_bfloat16(v)));
}

// Rounded half to even, saturated; NaN gives 0.
inline void store(int8_t* y, __mmask16 mask, __m512 v) {
  v = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, v, _CMP_ORD_Q), v);
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-128.0f)), _mm512_set1_ps(127.0f));
  _mm_mask_storeu_epi8(y, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

// v rounded to T, as floats: what an op of that dtype hands to the next.
template <typename T>
__m512 rounded(__m512 v) {
  if constexpr (std::is_same_v<T, at::Half>) return _mm512_cvtph_ps(to_half(v));
  if constexpr (std::is_same_v<T, at::BFloat16>) return _mm512_castsi512_ps(_mm512_slli_epi32(to_bfloat16(v), 16));
  return v;
}

// f(offset, mask) for each vector of a row of k values.
template <typename F>
void for_each_vector(int64_t k, F f) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) f(i, __mmask16(0xFFFF));
  if (i < k) f(i, lane_mask(k - i));
}

// numerics.rotate of one block of 16 features: four stages of sums and differences, in the reference's order.
inline __m512 rotate(__m512 v) {
  const auto stage = [&](__m512 partner, __mmask16 second) {  // partner + v, or partner - v where v is the second
    v = _mm512_fmadd_ps(v, _mm512_mask_blend_ps(second, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f)), partner);
  };
  stage(_mm512_permute_ps(v, 0xB1), 0xAAAA);  // of neighbours, then of features 2, 4 and 8 apart
  stage(_mm512_permute_ps(v, 0x4E), 0xCCCC);
  stage(_mm512_shuffle_f32x4(v, v, 0xB1), 0xF0F0);
  stage(_mm512_shuffle_f32x4(v, v, 0x4E), 0xFF00);
  return _mm512_mul_ps(v, _mm512_set1_ps(0.25f));
}

inline void check_rotation(const char* op, bool rotated, int64_t k) {
  TORCH_CHECK(!rotated || k % kLanes == 0, op, ": a rotated row must have a multiple of ", kLanes, " features, got ",
              k);
}

// The largest magnitude of a row. Of magnitudes, the bits order as the values do; NaN and Inf come out on top.
class Range {
 public:
  void add(__m512 v) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
    top_ = _mm512_max_epi32(top_, magnitude);
  }

  // max(amax(|x|), 1e-12), or NaN for a row that holds NaN or Inf.
  float amax() const {
    const int32_t bits = _mm512_reduce_max_epi32(top_);
    return bits >= 0x7F800000 ? std::numeric_limits<float>::quiet_NaN() : std::max(std::bit_cast<float>(bits), kEps);
  }

 private:
  __m512i top_ = _mm512_setzero_si512();
};

// q = round_half_even((x / a) / (1/127)) in float32; returns the scale, a * (1/127). A NaN range gives q = 0.
template <typename T>
float quantize_row(const T* x, int64_t k, float a, int8_t* q) {
  if (a != a) {
    std::fill(q, q + k, int8_t(0));
    return a;
  }
  const __m512 inverse = _mm512_set1_ps(127.0f / a), whole = _mm512_set1_ps(a), step = _mm512_set1_ps(kStep);
  const __m512 near_tie = _mm512_set1_ps(0.5f - kTieMargin);
  for_each_vector(k, [&](int64_t i, __mmask16 mask) {
    const __m512 value = load(x + i, mask);
    __m512 t = _mm512_mul_ps(value, inverse);
    const __m512 distance = _mm512_abs_ps(_mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT));  // |t - round(t)|
    if (_mm512_cmp_ps_mask(distance, near_tie, _CMP_GT_OQ)) [[unlikely]]
      t = _mm512_div_ps(_mm512_div_ps(value, whole), step);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(t)));
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
