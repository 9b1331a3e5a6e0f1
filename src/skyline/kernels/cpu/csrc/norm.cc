// RMSNorm (arXiv:1910.07467) of rows, of the heads in a row, and of a sum of two rows.
#include <cmath>

#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

int64_t grain(int64_t cols) { return 1 + 8192 / (cols + 1); }

float inverse_rms(float squares, int64_t n, float eps) { return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps); }

// Rounds to T where the separate ops would: the normalised value, and its product with the weight.
template <class T>
void scale_by(T* to, const T* x, const T* weight, int64_t n, float scale) {
  Vec factor = Vec::all(scale);
  sweep(n, [&](int64_t i, auto m) {
    (Vec::load(weight + i, m) * rounded_to<T>(Vec::load(x + i, m) * factor)).store(to + i, m);
  });
}

template <class T>
const T* vector_of(const TensorView& t) {
  SKYLINE_CHECK(t.ndim() == 1 && (t.shape()[0] <= 1 || t.stride(0) == 1), "takes a contiguous vector");
  SKYLINE_CHECK(t.dtype().bits == 8 * sizeof(T), "takes a weight in the dtype of the rows");
  return data<T>(t);
}

}  // namespace

// out, x [T, heads * D], weight [D]: each D values of a row by themselves. One head: RMSNorm of rows.
void rms_norm(TensorView out, TensorView x, TensorView weight, double eps) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x);
    const T* scale = vector_of<T>(weight);
    int64_t size = weight.shape()[0];
    SKYLINE_CHECK(to.rows == from.rows && to.cols == from.cols && (size > 0 ? to.cols % size : to.cols) == 0,
                  "shapes do not match");
    ThreadPool::get().run_ranges(to.rows, grain(to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        for (int64_t head = 0; head < to.cols; head += size) {
          const T* values = from[row] + head;
          scale_by(to[row] + head, values, scale, size, inverse_rms(sum_of_squares(values, size), size, eps));
        }
      }
    });
  });
}

// out, total, x, residual [T, H], weight [H]: total = x + residual, out = rms_norm(total).
void add_rms_norm(TensorView out, TensorView total, TensorView x, TensorView residual, TensorView weight, double eps) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), sum = rows_of<T>(total), a = rows_of<T>(x), b = rows_of<T>(residual);
    const T* scale = vector_of<T>(weight);
    int64_t cols = to.cols;
    for (const auto& part : {sum, a, b}) {
      SKYLINE_CHECK(part.rows == to.rows && part.cols == cols, "shapes do not match");
    }
    SKYLINE_CHECK(weight.shape()[0] == cols, "shapes do not match");
    ThreadPool::get().run_ranges(to.rows, grain(2 * cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T *left = a[row], *right = b[row];
        T* both = sum[row];
        sweep(cols, [&](int64_t i, auto n) {
          (Vec::load(left + i, n) + Vec::load(right + i, n)).store(both + i, n);
        });
        scale_by(to[row], both, scale, cols, inverse_rms(sum_of_squares(both, cols), cols, eps));
      }
    });
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rms_norm, rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_rms_norm, add_rms_norm);

}  // namespace skyline
