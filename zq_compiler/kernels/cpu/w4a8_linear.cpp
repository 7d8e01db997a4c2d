// Linear of INT4 weights and INT8 activations: y = sum_g float(sum_{k in g} x_q w_q) * w_scale[g], times x_scale, plus
// bias.
//
// A weight is stored as its value plus 8, so that it is the unsigned operand and an activation the signed one; 8 times
// the sum of a row's activations is taken back. Codes of sixteen outputs and eight features lie in 64 bytes, features 0
// to 3 in the lower halves and 4 to 7 in the upper ones: a mask or a shift gives the four bytes that AVX512-VNNI sums
// into a lane of 32 bits. AVX2's vpmaddubsw sums two into 16 bits. With bytes it would saturate; with weights of at most
// 15 a lane of 16 bits holds eight such sums, 8 * 2 * 15 * 128 = 30720, and is widened once for all of them. Products are
// therefore exact, and at twice the rate of those of bytes.

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>

#include "rows.h"

namespace {

using namespace zq;

constexpr int64_t kStep = 8;                    // features whose codes of sixteen outputs are 64 bytes
constexpr int64_t kStepBytes = kStep * kLanes / 2;
constexpr int64_t kSteps = 4;                   // whose sums a lane of 16 bits holds: 4 steps of 2 sums each
constexpr int kTileRows = 6;                    // 6 x 2 registers of sums, one each of codes, of x and the mask
constexpr int64_t kVectors = 4;                 // of outputs, of a task
constexpr int64_t kZero = 8;                    // the code of 0
constexpr int64_t kMaxSummed = (int64_t(1) << 31) / (15 * 128);

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline int32_t four(const int8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, sizeof bytes);
  return bytes;
}

// sums[r][i] = sum over steps * kStep features of code[i] * x[r], of sixteen outputs.
template <int Rows>
void multiply(const int8_t* x, int64_t x_stride, const uint8_t* codes, int64_t steps, int32_t (*sums)[kLanes]) {
#ifdef __AVX512VNNI__
  const __m512i mask = _mm512_set1_epi8(15);
  __m512i acc[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) acc[r] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s, codes += kStepBytes, x += kStep) {
    const __m512i both = _mm512_loadu_si512(codes);
    const __m512i first = _mm512_and_si512(both, mask), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      acc[r] = _mm512_dpbusd_epi32(acc[r], first, _mm512_set1_epi32(four(x + r * x_stride)));
      acc[r] = _mm512_dpbusd_epi32(acc[r], second, _mm512_set1_epi32(four(x + r * x_stride + 4)));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) _mm512_storeu_si512(sums[r], acc[r]);
#else
  const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const auto load = [](const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); };
  for (int64_t from = 0; from < steps; from += kSteps) {
    const int64_t end = std::min(steps, from + kSteps);
    __m256i acc[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t s = from; s < end; ++s, codes += kStepBytes, x += kStep) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(load(codes), 4 * i), mask);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(load(codes + 32), 4 * i), mask);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const __m256i a = _mm256_set1_epi32(four(x + r * x_stride + 4 * i));
          acc[r][0] = _mm256_add_epi16(acc[r][0], _mm256_maddubs_epi16(low, a));
          acc[r][1] = _mm256_add_epi16(acc[r][1], _mm256_maddubs_epi16(high, a));
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        int32_t* to = sums[r] + 8 * half;
        __m256i wide = _mm256_madd_epi16(acc[r][half], ones);
        if (from) wide = _mm256_add_epi32(wide, load(to));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), wide);
      }
  }
#endif
}

constexpr decltype(&multiply<1>) kHeights[] = {multiply<1>, multiply<2>, multiply<3>,
                                               multiply<4>, multiply<5>, multiply<6>};

template <typename T>
struct Linear {
  const int8_t* x;         // [m, steps * kStep]
  int64_t x_stride;
  const int32_t* x_sums;   // [m, groups], times kZero
  const float* x_scale;    // [m]
  const uint8_t* codes;    // [ceil(n/kLanes), steps, kLanes, 4]
  const void* w_scale;     // [ceil(n/kLanes), groups, kLanes], float16 or, of whole rows, float32
  const float* bias;       // [n] or null
  T* y;                    // [m, n]
  int64_t m, n, steps, groups, group_steps;
  bool half;

  Floats scales(int64_t block, int64_t g) const {
    const int64_t at = (block * groups + g) * kLanes;
    return half ? load(static_cast<const at::Half*>(w_scale) + at, kAll)
                : load(static_cast<const float*>(w_scale) + at, kAll);
  }

  // Rows [row, row + rows) of sixteen outputs.
  void tile(int64_t row, int64_t rows, int64_t block) const {
    alignas(64) int32_t sums[kTileRows][kLanes];
    alignas(64) float totals[kTileRows][kLanes];
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t from = g * group_steps, count = std::min(group_steps, steps - from);
      kHeights[rows - 1](x + row * x_stride + from * kStep, x_stride, codes + (block * steps + from) * kStepBytes,
                         count, sums);
      const Floats scale = scales(block, g);
      for (int64_t r = 0; r < rows; ++r) {
        const Ints sum = load(sums[r], kAll) - Ints(x_sums[(row + r) * groups + g]);
        const Floats product = to_floats(sum) * scale;
        store(totals[r], g ? load(totals[r], kAll) + product : product);
      }
    }
    const int64_t c = block * kLanes;
    const Lanes lanes = first_lanes(n - c);
    for (int64_t r = 0; r < rows; ++r) {
      Floats out = load(totals[r], kAll) * Floats(x_scale[row + r]);
      if (bias) out = out + load(bias + c, lanes);
      store(y + (row + r) * n + c, lanes, out);
    }
  }

  void run() const {
    const int64_t blocks = ceil_div(n, kLanes), tiles = ceil_div(m, kTileRows), grain = tiles > 1 ? 1 : kVectors;
    at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t t = 0; t < tiles; ++t) {  // of nearly equal height
          const int64_t row = m * t / tiles;
          tile(row, m * (t + 1) / tiles - row, block);
        }
    });
  }
};

// Values [n, k], in [-8, 7], and scales, as the product reads them.
std::tuple<Tensor, Tensor> pack_nibbles(const Tensor& w_q, const Tensor& w_scale) {
  constexpr const char* op = "pack_nibbles";
  TORCH_CHECK(w_q.dim() == 2 && w_q.scalar_type() == at::kChar && w_q.numel() > 0, op,
              ": w_q must be Char [N, K], not empty, got ", w_q.scalar_type(), " ", w_q.sizes());
  TORCH_CHECK(w_scale.dim() == 2 && w_scale.size(0) == w_q.size(0) &&
                  (w_scale.scalar_type() == at::kHalf || w_scale.scalar_type() == at::kFloat),
              op, ": w_scale must be Half or Float [N, groups], got ", w_scale.scalar_type(), " ", w_scale.sizes());
  const int64_t n = w_q.size(0), k = w_q.size(1), blocks = ceil_div(n, kLanes), steps = ceil_div(k, kStep);
  const Tensor from = w_q.contiguous();
  Tensor codes = at::empty({blocks, steps, kLanes, kStep / 2}, w_q.options().dtype(at::kByte));
  std::memset(codes.mutable_data_ptr(), kZero << 4 | kZero, codes.numel());
  for (int64_t i = 0; i < n; ++i) {
    const int8_t* row = from.const_data_ptr<int8_t>() + i * k;
    uint8_t* to = codes.mutable_data_ptr<uint8_t>() + i / kLanes * steps * kStepBytes + i % kLanes * (kStep / 2);
    for (int64_t j = 0; j < k; ++j) {
      TORCH_CHECK(row[j] >= -kZero && row[j] < kZero, op, ": w_q must be in [-8, 7], got ", int(row[j]));
      uint8_t& byte = to[j / kStep * kStepBytes + j % 4];
      const int code = row[j] + kZero;
      byte = j % kStep < 4 ? (byte & 0xF0) | code : (byte & 0x0F) | code << 4;
    }
  }
  const int64_t groups = w_scale.size(1), bytes = w_scale.element_size();
  const Tensor scale = w_scale.contiguous();
  Tensor scales = at::zeros({blocks, groups, kLanes}, w_scale.options());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t g = 0; g < groups; ++g)
      std::memcpy(static_cast<char*>(scales.mutable_data_ptr()) + ((i / kLanes * groups + g) * kLanes + i % kLanes) * bytes,
                  static_cast<const char*>(scale.const_data_ptr()) + (i * groups + g) * bytes, bytes);
  return {codes, scales};
}

// kZero times the sums of each group of a row.
std::vector<int32_t> sums_of(const int8_t* x, int64_t x_stride, int64_t m, int64_t k, int64_t group, int64_t groups) {
  std::vector<int32_t> sums(m * groups);
  for (int64_t row = 0; row < m; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      int32_t sum = 0;
      for (int64_t i = g * group; i < std::min(k, (g + 1) * group); ++i) sum += x[row * x_stride + i];
      sums[row * groups + g] = sum * kZero;
    }
  return sums;
}

Tensor w4a8_linear(const Tensor& x_q, const Tensor& x_scale, const Tensor& codes, const Tensor& w_scale,
                   const std::optional<Tensor>& bias, int64_t group, int64_t n, at::ScalarType out_dtype) {
  constexpr const char* op = "w4a8_linear";
  const Rows given(op, "x_q", x_q, /*integers=*/true);
  TORCH_CHECK(n > 0, op, ": n must be positive, got ", n);
  TORCH_CHECK(group >= 0 && group % kStep == 0, op, ": group must be a multiple of ", kStep, " or 0, got ", group);
  const int64_t k = given.k, steps = ceil_div(k, kStep), blocks = ceil_div(n, kLanes);
  const int64_t groups = group ? ceil_div(k, group) : 1;
  TORCH_CHECK(k <= kMaxSummed, op, ": K may be at most ", kMaxSummed, ", got ", k);
  const auto check = [&](const char* name, const Tensor& t, at::ScalarType dtype, std::vector<int64_t> shape) {
    const at::IntArrayRef wanted(shape);
    TORCH_CHECK(t.scalar_type() == dtype && t.sizes() == wanted, op, ": ", name, " must be ", dtype, " ", wanted,
                " (for N=", n, ", K=", k, "), got ", t.scalar_type(), " ", t.sizes());
  };
  auto shape = x_q.sizes().vec();
  shape.back() = 1;
  check("x_scale", x_scale, at::kFloat, shape);
  check("codes", codes, at::kByte, {blocks, steps, kLanes, kStep / 2});
  check("scale", w_scale, group ? at::kHalf : at::kFloat, {blocks, groups, kLanes});
  std::optional<Tensor> offset;
  if (bias) {
    TORCH_CHECK(bias->is_floating_point(), op, ": bias must be a float dtype, got ", bias->scalar_type());
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == n, op, ": bias must be [", n, "], got ", bias->sizes());
    offset = bias->to(at::kFloat).contiguous();
  }
  const int64_t pad = steps * kStep - k;  // meets codes of 0, and the sum of a row's activations
  const Rows x(op, "x_q", pad ? at::constant_pad_nd(x_q, {0, pad}) : x_q, true);
  const Tensor row_scale = x_scale.contiguous(), words = codes.contiguous(), scale = w_scale.contiguous();
  const int8_t* from = x.tensor.const_data_ptr<int8_t>();
  const auto sums = sums_of(from, x.stride, x.count, k, group ? group : k, groups);
  shape.back() = n;
  const auto run = [&](auto type) {
    using T = decltype(type);
    Tensor y = at::empty(shape, x_q.options().dtype(c10::CppTypeToScalarType<T>::value));
    Linear<T>{from, x.stride, sums.data(), row_scale.const_data_ptr<float>(), words.const_data_ptr<uint8_t>(),
              scale.const_data_ptr(), offset ? offset->const_data_ptr<float>() : nullptr, y.template mutable_data_ptr<T>(),
              x.count, n, steps, groups, group ? group / kStep : steps, group != 0}
        .run();
    return y;
  };
  switch (out_dtype) {
    case at::kFloat: return run(float());
    case at::kBFloat16: return run(at::BFloat16());
    case at::kHalf: return run(at::Half());
    default: TORCH_CHECK(false, op, ": out_dtype must be Float, BFloat16 or Half, got ", out_dtype);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def("pack_nibbles(Tensor w_q, Tensor w_scale) -> (Tensor codes, Tensor scale)");
  m.def(
      "w4a8_linear(Tensor x_q, Tensor x_scale, Tensor codes, Tensor scale, Tensor? bias, int group, int n, "
      "ScalarType out_dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("pack_nibbles", &pack_nibbles);
  m.impl("w4a8_linear", &w4a8_linear);
}
