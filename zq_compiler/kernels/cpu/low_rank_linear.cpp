// The branch of low-rank compensation, added to a linear's result: y + (x @ v.T) @ u, u stored [r, N].
//
// Both factors are read as they are stored, ranks outermost: the first product has a sum for each rank, the second adds
// a rank's row of u, times its sum, to all outputs.

#include <torch/library.h>

#include "rows.h"

namespace {

using namespace zq;

template <typename T, typename F>
void add_branch(const T* y, const T* x, const F* v, const F* u, int64_t ranks, int64_t k, int64_t n, float* sums,
                T* out) {
  for (int64_t r = 0; r < ranks; ++r) {
    Floats acc = 0.0f;
    for_each_vector(k, [&](int64_t i, Lanes lanes) {
      acc = fmadd(load(x + i, lanes), rounded<T>(load(v + r * k + i, lanes)), acc);
    });
    alignas(64) float lanes_of[kLanes];
    store(lanes_of, rounded<T>(Floats(reduce_add(acc))));  // as the reference hands it on
    sums[r] = lanes_of[0];
  }
  for_each_vector(n, [&](int64_t i, Lanes lanes) {
    Floats acc = 0.0f;
    for (int64_t r = 0; r < ranks; ++r)
      acc = fmadd(Floats(sums[r]), rounded<T>(load(u + r * n + i, lanes)), acc);
    store(out + i, lanes, load(y + i, lanes) + rounded<T>(acc));
  });
}

Tensor low_rank_linear(const Tensor& y, const Tensor& x, const Tensor& v, const Tensor& u) {
  constexpr const char* op = "low_rank_linear";
  const Rows results(op, "y", y), rows(op, "x", x);
  TORCH_CHECK(x.scalar_type() == y.scalar_type() && rows.count == results.count, op,
              ": x must have y's dtype and rows, got ", x.scalar_type(), " ", x.sizes(), " and ", y.scalar_type(), " ",
              y.sizes());
  const auto dtype = v.scalar_type();
  TORCH_CHECK((dtype == at::kHalf || dtype == at::kFloat) && u.scalar_type() == dtype && v.dim() == 2 && u.dim() == 2 &&
                  v.size(0) == u.size(0) && v.size(1) == rows.k && u.size(1) == results.k,
              op, ": v must be Half or Float [r, ", rows.k, "] and u [r, ", results.k, "], got ", dtype, " ", v.sizes(),
              " and ", u.scalar_type(), " ", u.sizes());
  const Tensor down = v.contiguous(), up = u.contiguous();
  Tensor out = at::empty(y.sizes(), y.options());
  const int64_t ranks = v.size(0), k = rows.k, n = results.k;
  for_dtype(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto factor) {
      using F = decltype(factor);
      const F *first = down.const_data_ptr<F>(), *second = up.const_data_ptr<F>();
      T* to = out.mutable_data_ptr<T>();
      at::parallel_for(0, rows.count, std::max<int64_t>(1, kGrain / (ranks * (k + n))), [&](int64_t begin, int64_t end) {
        std::vector<float> sums(ranks);
        for (int64_t row = begin; row < end; ++row)
          add_branch<T, F>(results.row<T>(row), rows.row<T>(row), first, second, ranks, k, n, sums.data(),
                           to + row * n);
      });
    };
    if (dtype == at::kHalf) run(at::Half());
    else run(float());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(zq_cpu, m) {
  m.def("low_rank_linear(Tensor y, Tensor x, Tensor v, Tensor u) -> Tensor");
}

TORCH_LIBRARY_IMPL(zq_cpu, CPU, m) { m.impl("low_rank_linear", &low_rank_linear); }
