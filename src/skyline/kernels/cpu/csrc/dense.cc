// Elementwise ops and copies of rows.
#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace {

// Rows a task takes at least: below this much work, waking a thread takes longer than it saves.
int64_t grain(int64_t cols) { return 1 + 16384 / (cols + 1); }

}  // namespace

// out [T, I], gate_up [T, 2I]: silu(gate) * up, each step rounded to the dtype as the separate ops would.
void silu_mul(TensorView out, TensorView gate_up) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out);
    auto from = rows_of<T>(gate_up);
    SKYLINE_CHECK(from.cols == 2 * to.cols && from.rows == to.rows, "shapes do not match");
    ThreadPool::get().run_ranges(to.rows, grain(4 * to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T* gate = from[row];
        const T* up = gate + to.cols;
        T* result = to[row];
        sweep(to.cols, [&](int64_t i, auto n) {
          (rounded_to<T>(silu(Vec::load(gate + i, n))) * Vec::load(up + i, n)).store(result + i, n);
        });
      }
    });
  });
}

// out, x, y [T, H]: x + y.
void add(TensorView out, TensorView x, TensorView y) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), a = rows_of<T>(x), b = rows_of<T>(y);
    SKYLINE_CHECK(a.cols == to.cols && a.rows == to.rows && b.cols == to.cols && b.rows == to.rows,
                  "shapes do not match");
    ThreadPool::get().run_ranges(to.rows, grain(to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        const T *left = a[row], *right = b[row];
        T* result = to[row];
        sweep(to.cols, [&](int64_t i, auto n) {
          (Vec::load(left + i, n) + Vec::load(right + i, n)).store(result + i, n);
        });
      }
    });
  });
}

// out [R, H], x [T, H], rows int64 or int32 [R]: out[r] = x[rows[r]].
void select_rows(TensorView out, TensorView x, TensorView rows) {
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<T>(x);
    SKYLINE_CHECK(rows.ndim() == 1 && (rows.shape()[0] <= 1 || rows.stride(0) == 1), "takes a vector of rows");
    SKYLINE_CHECK(is_int64(rows) || is_int32(rows), "takes rows in int32 or int64");
    SKYLINE_CHECK(to.rows == rows.shape()[0] && to.cols == from.cols, "shapes do not match");
    bool wide = is_int64(rows);
    auto picked = [&](int64_t i) { return wide ? data<int64_t>(rows)[i] : int64_t{data<int32_t>(rows)[i]}; };
    for (int64_t i = 0; i < to.rows; i++) {
      SKYLINE_CHECK(picked(i) >= 0 && picked(i) < from.rows, "row " << picked(i) << " of " << from.rows);
    }
    ThreadPool::get().run_ranges(to.rows, grain(to.cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) std::memcpy(to[i], from[picked(i)], sizeof(T) * to.cols);
    });
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(silu_mul, silu_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add, add);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(select_rows, select_rows);

}  // namespace skyline
