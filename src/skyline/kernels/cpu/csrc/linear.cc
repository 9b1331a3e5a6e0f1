// Linear layers over packed weights.
#include "packed_arguments.h"
#include "product.h"
#include "tensors.h"
#include "threads.h"
#include "workspace.h"

namespace skyline {
// out [T, N], or [T, N / 2] for a gated weight; x [T, K] of the same dtype; bias [N] of that dtype. The Tactic's fields, of
// which rows may be 0, as many as are best for this instruction set.
void linear(TensorView out, TensorView x, ffi::Optional<TensorView> bias, int64_t tactic_rows, int64_t tactic_piece,
            int64_t tactic_level_rows, PACKED_PARAMETERS) {
  const PackedMatrix m = PACKED_MATRIX;
  const Tactic tactic{tactic_rows ? tactic_rows : kRowsAtOnce, tactic_piece, tactic_level_rows};
  SKYLINE_CHECK(tactic.rows >= 128 && tactic.rows <= 512 && tactic.level_rows >= 0 &&
                    (tactic.piece == 128 || tactic.piece == 256 || tactic.piece == 512), "no tactic that there is");
  dispatch_float(x, [&]<class T>(T*) {
    auto to = rows_of<T>(out);
    auto from = rows_of<const T>(x);
    SKYLINE_CHECK(is_bf16(out) == is_bf16(x) && from.cols == m.k && to.rows == from.rows && to.cols == (gated ? n / 2 : n),
                  "shapes or dtypes do not match");
    SKYLINE_CHECK(m.format != Format::kFloat32 || is_float32(x), "a float32 weight takes float32 activations");
    SKYLINE_CHECK(!bias.has_value() || (is_bf16(bias.value()) == is_bf16(x) && bias.value().numel() == n), "bias does not match");
    if (from.rows == 0) return;
    static thread_local Workspace workspace;
    uint8_t* memory = workspace.at_least(prepared_bytes<T>(m, from.rows, from.stride));
    const Activations a = prepare<T>(m, from.data, from.stride, from.rows, memory);
    const Product<T> product{m, a, bias.has_value() ? data<const T>(bias.value()) : nullptr, to.data, to.stride, tactic};
    const int64_t panels = m.panels(), at_once = max_rows(m, tactic);
    ThreadPool& pool = ThreadPool::get();
    const int64_t tasks = std::min<int64_t>(panels, ThreadPool::kTasks * pool.size()), turns = ceil_div(from.rows, at_once);
    pool.run_in_order(turns, tasks, [&](int64_t turn, int64_t task, int64_t next) {
      const int64_t begin = from.rows * turn / turns, end = from.rows * (turn + 1) / turns;
      const int64_t last = panels * (task + 1) / tasks - 1, after = next < 0 ? -1 : panels * next / tasks;
      for (int64_t panel = panels * task / tasks; panel <= last; panel++)
        compute_panel(product, begin, end, panel, panel < last ? panel + 1 : after);
    });
  });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear, linear);

}  // namespace skyline
