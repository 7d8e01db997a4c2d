// Symmetric INT8 quantization of each row by its largest magnitude:
//   a = max(amax(|x|), 1e-12), q = round_half_even((x / a) / (1/127)), scale = a * (1/127), in float32.
// Rotated rows go through numerics.rotate first. A row that holds NaN or Inf gets scale NaN and q = 0.

#include <torch/library.h>

#include <tuple>

#include "rows.h"

namespace {

using namespace zq;

std::tuple<Tensor, Tensor> quantize_per_token(const Tensor& input, bool rotated) {
  const Rows x("quantize_per_token", "x", input);
  check_rotation("quantize_per_token", rotated, x.k);
  const Quantized out(input);
  int8_t* q = out.q.mutable_data_ptr<int8_t>();
  float* scale = out.scale.mutable_data_ptr<float>();
  for_dtype(input.scalar_type(), [&](auto type) {
    using T = decltype(type);
    for_each_row(x.count, x.k, [&](int64_t row, float* buffer) {
      const T* from = x.row<T>(row);
      Range range;
      if (rotated) {
        for_each_vector(x.k, [&](int64_t i, Lanes lanes) {
          const Floats v = rotate(load(from + i, lanes));
          range.add(v);
          store(buffer + i, lanes, v);
        });
        scale[row] = quantize_row(buffer, x.k, range.amax(), q + row * x.k);
        return;
      }
      for_each_vector(x.k, [&](int64_t i, Lanes lanes) { range.add(load(from + i, lanes)); });
      scale[row] = quantize_row(from, x.k, range.amax(), q + row * x.k);
    });
  });
  return {out.q, out.scale};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def("quantize_per_token(Tensor x, bool rotated=False) -> (Tensor q, Tensor scale)");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) {
  m.impl("quantize_per_token", &quantize_per_token);
}
