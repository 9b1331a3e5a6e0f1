// Norms, activations and gates that only some architectures use: see ops/gates.py for the formulas.
#include <cmath>

#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

int64_t grain(int64_t cols) { return 1 + 8192 / (cols + 1); }

template <class T>
const T* vector_of(const TensorView& t, int64_t length) {
  SKYLINE_CHECK(t.ndim() == 1 && t.shape()[0] == length && (length <= 1 || t.stride(0) == 1), "shapes do not match");
  SKYLINE_CHECK(t.dtype().bits == 8 * sizeof(T), "takes a weight in the dtype of the rows");
  return data<T>(t);
}

template <class T>
void same_shape(const Rows<T>& a, const Rows<T>& b) {
  SKYLINE_CHECK(a.rows == b.rows && a.cols == b.cols, "shapes do not match");
}

template <class T>
float inverse_rms(const T* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
}

// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) { return Vec::all(1.0f) / (Vec::all(1.0f) + exp(Vec::zero() - x)); }

// The tanh form: x / 2 (1 + tanh(u)) = x / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu(Vec x) {
  Vec cube = x * x * x;
  Vec u = fma(cube, Vec::all(0.044715f), x) * Vec::all(0.7978845608028654f);
  return x * sigmoid(u + u);
}

}  // namespace

// out, x [T, heads * D], weight [D]: each D values of a row by themselves, times 1 + weight.
void offset_rms_norm(TensorView out, TensorView x, TensorView weight, double eps) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x);
    const int64_t size = weight.shape()[0];
    const T* offset = vector_of<T>(weight, size);
    same_shape(to, from);
    SKYLINE_CHECK((size > 0 ? to.cols % size : to.cols) == 0, "shapes do not match");
    ThreadPool::get().run_ranges(to.rows, grain(to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        for (int64_t head = 0; head < to.cols; head += size) {
          const T* values = from[row] + head;
          T* result = to[row] + head;
          Vec factor = Vec::all(inverse_rms(values, size, eps));
          sweep(size, [&](int64_t i, auto n) {
            (Vec::load(values + i, n) * factor * (Vec::all(1.0f) + Vec::load(offset + i, n))).store(result + i, n);
          });
        }
      }
    });
  });
}

// out, x [T, H], weight, bias [H]
void layer_norm(TensorView out, TensorView x, TensorView weight, TensorView bias, double eps) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x);
    same_shape(to, from);
    const int64_t cols = to.cols;
    const T *scale = vector_of<T>(weight, cols), *shift = vector_of<T>(bias, cols);
    ThreadPool::get().run_ranges(to.rows, grain(2 * cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T* values = from[row];
        T* result = to[row];
        Vec sum = Vec::zero();
        sweep(cols, [&](int64_t i, auto n) { sum = sum + Vec::load(values + i, n); });
        const float mean = sum.sum() / static_cast<float>(cols);
        float squares = 0;  // of what is off the mean, where subtracting squares of sums would cancel
        for (int64_t i = 0; i < cols; i++) squares += (to_float(values[i]) - mean) * (to_float(values[i]) - mean);
        Vec factor = Vec::all(1.0f / std::sqrt(squares / static_cast<float>(cols) + static_cast<float>(eps)));
        sweep(cols, [&](int64_t i, auto n) {
          Vec normed = (Vec::load(values + i, n) - Vec::all(mean)) * factor;
          fma(normed, Vec::load(scale + i, n), Vec::load(shift + i, n)).store(result + i, n);
        });
      }
    });
  });
}

// out, x, gate [T, heads * D], weight [D]
void gated_rms_norm(TensorView out, TensorView x, TensorView gate, TensorView weight, double eps) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x), by = rows_of<T>(gate);
    const int64_t size = weight.shape()[0];
    const T* scale = vector_of<T>(weight, size);
    same_shape(to, from);
    same_shape(to, by);
    SKYLINE_CHECK((size > 0 ? to.cols % size : to.cols) == 0, "shapes do not match");
    ThreadPool::get().run_ranges(to.rows, grain(2 * to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        for (int64_t head = 0; head < to.cols; head += size) {
          const T *values = from[row] + head, *gates = by[row] + head;
          T* result = to[row] + head;
          Vec factor = Vec::all(inverse_rms(values, size, eps));
          sweep(size, [&](int64_t i, auto n) {
            Vec normed = rounded_to<T>(Vec::load(scale + i, n) * rounded_to<T>(Vec::load(values + i, n) * factor));
            (normed * silu(Vec::load(gates + i, n))).store(result + i, n);
          });
        }
      }
    });
  });
}

// out [T, I], gate_up [T, 2I]
void gelu_mul(TensorView out, TensorView gate_up) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(gate_up);
    SKYLINE_CHECK(to.rows == from.rows && 2 * to.cols == from.cols, "shapes do not match");
    ThreadPool::get().run_ranges(to.rows, grain(4 * to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T *gate = from[row], *up = gate + to.cols;
        T* result = to[row];
        sweep(to.cols, [&](int64_t i, auto n) {
          (rounded_to<T>(gelu(Vec::load(gate + i, n))) * Vec::load(up + i, n)).store(result + i, n);
        });
      }
    });
  });
}

// out, x [T, H], gate [T, H] or [T, 1]
void sigmoid_mul(TensorView out, TensorView x, TensorView gate) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x), by = rows_of<T>(gate);
    same_shape(to, from);
    SKYLINE_CHECK(by.rows == to.rows && (by.cols == to.cols || by.cols == 1), "shapes do not match");
    const bool one = by.cols == 1 && to.cols != 1;
    ThreadPool::get().run_ranges(to.rows, grain(2 * to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T *values = from[row], *gates = by[row];
        T* result = to[row];
        Vec all = rounded_to<T>(sigmoid(Vec::all(to_float(gates[0]))));
        sweep(to.cols, [&](int64_t i, auto n) {
          Vec factor = one ? all : rounded_to<T>(sigmoid(Vec::load(gates + i, n)));
          (Vec::load(values + i, n) * factor).store(result + i, n);
        });
      }
    });
  });
}

// out, x [T, H]
void scale_rows(TensorView out, TensorView x, double factor) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x);
    same_shape(to, from);
    Vec by = Vec::all(to_float(from_float<T>(static_cast<float>(factor))));
    ThreadPool::get().run_ranges(to.rows, grain(to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T* values = from[row];
        T* result = to[row];
        sweep(to.cols, [&](int64_t i, auto n) { (Vec::load(values + i, n) * by).store(result + i, n); });
      }
    });
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(offset_rms_norm, offset_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_norm, layer_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gated_rms_norm, gated_rms_norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gelu_mul, gelu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sigmoid_mul, sigmoid_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scale_rows, scale_rows);

}  // namespace skyline
