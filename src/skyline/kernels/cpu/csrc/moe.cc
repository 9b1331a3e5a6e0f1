// The experts of a mixture, over packed weights.
//
// The (token, choice) pairs are sorted by expert, so that each expert's weights are read once for all rows that chose it. A
// row's products do not depend on the rows it is computed with, and a token adds its experts in the order of its choices.
#include <algorithm>
#include <vector>

#include "packed_arguments.h"
#include "product.h"
#include "tensors.h"
#include "threads.h"
#include "workspace.h"

namespace skyline {
namespace {

// Scratch of one pass. A prompt that needs more is cut, and each part reads the weights once more.
constexpr int64_t kPassBytes = 128 << 20;

// What reading a panel from memory costs, in rows to multiply by it.
constexpr int64_t kReadRows = 32;

// The pairs of some tokens in the order of their experts.
struct Pairs {
  std::vector<int64_t> starts;  // [E + 1]: where each expert's pairs begin
  std::vector<int64_t> tokens;  // [P]: by place in that order
  std::vector<int64_t> places;  // [P]: by pair, which is token * k + choice

  void sort(const Rows<const int64_t>& ids, int64_t begin, int64_t end, int64_t experts) {
    starts.assign(experts + 1, 0);
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < ids.cols; c++) starts[ids[t][c] + 1]++;
    for (int64_t e = 0; e < experts; e++) starts[e + 1] += starts[e];
    tokens.resize((end - begin) * ids.cols);
    places.resize(tokens.size());
    next_.assign(starts.begin(), starts.end() - 1);
    for (int64_t t = begin; t < end; t++)
      for (int64_t c = 0; c < ids.cols; c++) {
        const int64_t place = next_[ids[t][c]]++;
        tokens[place] = t;
        places[(t - begin) * ids.cols + c] = place;
      }
  }

 private:
  std::vector<int64_t> next_;
};

// Rows [begin, end) times some panels of one expert.
struct Task {
  int64_t expert, begin, end, first_panel, last_panel;
};

// Each expert's rows of `a` times its matrix, plus its row of `biases` [E, N] if there are any. All experts are one list of
// tasks: a few rows for a few experts, which is what decoding gives, then still keep every thread reading.
template <class T>
void multiply_experts(const PackedMatrix& m, const Activations& a, const std::vector<int64_t>& starts, const T* biases, T* out,
                      int64_t out_stride, Gating gating) {
  static thread_local std::vector<Task> tasks;
  tasks.clear();
  const int64_t experts = static_cast<int64_t>(starts.size()) - 1, panels = m.panels();
  const int64_t at_once = max_rows(m, Tactic{512});  // few rows an expert: one way through its weight is best
  int64_t total = 0;
  for (int64_t e = 0; e < experts; e++) {
    const int64_t rows = starts[e + 1] - starts[e];
    total += rows + kReadRows * ceil_div(rows, at_once);
  }
  const int64_t wanted = ThreadPool::kTasks * ThreadPool::get().size();
  for (int64_t e = 0; e < experts; e++) {
    const int64_t rows = starts[e + 1] - starts[e], turns = ceil_div(rows, at_once);
    for (int64_t turn = 0; turn < turns; turn++) {
      const int64_t begin = starts[e] + rows * turn / turns, end = starts[e] + rows * (turn + 1) / turns;
      const int64_t pieces = std::clamp<int64_t>(ceil_div(wanted * (end - begin + kReadRows), total), 1, panels);
      for (int64_t i = 0; i < pieces; i++)
        tasks.push_back({e, begin, end, panels * i / pieces, panels * (i + 1) / pieces});
    }
  }
  const Task* list = tasks.data();  // the name `tasks` means another vector in each thread
  ThreadPool::get().run_in_order(1, static_cast<int64_t>(tasks.size()), [&](int64_t, int64_t i, int64_t) {
    const Task& task = list[i];
    const T* bias = biases ? biases + task.expert * m.n : nullptr;
    const Product<T> product{expert_matrix(m, task.expert), a, bias, out, out_stride, {}, gating};
    for (int64_t panel = task.first_panel; panel < task.last_panel; panel++)
      compute_panel(product, task.begin, task.end, panel, panel + 1 < task.last_panel ? panel + 1 : -1);
  });
}

// Rows begin on cache lines, and not a power of two apart.
template <class T>
int64_t row_stride(int64_t columns) {
  constexpr int64_t line = 64 / sizeof(T);
  return (ceil_div(columns, line) | 1) * line;
}

template <class T>
class Experts {
 public:
  // biases: [E, N] of either weight, or null.
  Experts(const PackedMatrix& gate_up, const PackedMatrix& down, const T* gate_up_biases, const T* down_biases, int64_t experts,
          Gating gating)
      : gate_up_(gate_up), down_(down), gate_up_biases_(gate_up_biases), down_biases_(down_biases), experts_(experts),
        gating_(gating), wide_(row_stride<T>(down.n)), narrow_(row_stride<T>(down.k)) {}

  int64_t bytes(int64_t pairs) const {
    return pairs * (wide_ + narrow_) * static_cast<int64_t>(sizeof(T)) +
           std::max(prepared_bytes<T>(gate_up_, pairs, wide_), prepared_bytes<T>(down_, pairs, narrow_));
  }

  // Tokens [begin, end).
  void compute(const Rows<T>& out, const Rows<const T>& x, const Rows<const float>& weights, const Rows<const int64_t>& ids,
               int64_t begin, int64_t end, uint8_t* memory) {
    static thread_local Pairs sorted;
    const Pairs& pairs = sorted;
    sorted.sort(ids, begin, end, experts_);
    const int64_t count = static_cast<int64_t>(pairs.tokens.size()), columns = down_.n;
    T* rows = reinterpret_cast<T*>(memory);  // of x, and once those have been used, the experts' results
    T* hidden = rows + count * wide_;
    uint8_t* prepared = reinterpret_cast<uint8_t*>(hidden + count * narrow_);
    const int64_t grain = 1 + 16384 / (columns + 1);

    const int64_t* tokens = pairs.tokens.data();
    ThreadPool::get().run_ranges(count, grain, [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; p++) std::copy_n(x[tokens[p]], columns, rows + p * wide_);
    });
    Activations a = prepare<T>(gate_up_, rows, wide_, count, prepared);
    multiply_experts(gate_up_, a, pairs.starts, gate_up_biases_, hidden, narrow_, gating_);
    a = prepare<T>(down_, hidden, narrow_, count, prepared);
    multiply_experts(down_, a, pairs.starts, down_biases_, rows, wide_, {});

    const int64_t* places = pairs.places.data();
    ThreadPool::get().run_ranges(end - begin, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; t++) {
        const float* shares = weights[begin + t];
        sweep(columns, [&](int64_t i, auto n) {
          Vec sum = Vec::zero();
          for (int64_t c = 0; c < ids.cols; c++)
            sum = fma(Vec::all(shares[c]), Vec::load(rows + places[t * ids.cols + c] * wide_ + i, n), sum);
          sum.store(out[begin + t] + i, n);
        });
      }
    });
  }

 private:
  PackedMatrix gate_up_, down_;
  const T *gate_up_biases_, *down_biases_;
  int64_t experts_;
  Gating gating_;
  int64_t wide_, narrow_;
};

}  // namespace

// out, x [T, H] of one dtype; weights float32 [T, top_k], ids int64 [T, top_k]; biases of that dtype, [E, 2 I] and [E, H], and
// the two numbers of Gating (0: silu); PACKED_PARAMETERS: the gated weight [E, 2 I, H] of gate and up; down [E, H, I], not
// gated, in a format of its own, to which the results of the first are no less plain: both quantize their activations, or neither.
void moe_experts(TensorView out, TensorView x, TensorView weights, TensorView ids, ffi::Optional<TensorView> gate_up_biases,
                 ffi::Optional<TensorView> down_biases, double alpha, double limit, TensorView down,
                 ffi::Optional<TensorView> down_scales, ffi::Optional<TensorView> down_sums, int64_t down_format, int64_t down_group,
                 bool down_zeros, PACKED_PARAMETERS) {
  const PackedMatrix first = PACKED_MATRIX;
  const PackedMatrix second = packed_matrix(down, down_scales, down_sums, down_format, k, n / 2, false, down_group, down_zeros);
  dispatch_float(x, [&]<class T>(T*) {
    auto to = rows_of<T>(out);
    auto from = rows_of<const T>(x);
    SKYLINE_CHECK(is_bf16(out) == is_bf16(x) && is_float32(weights) && is_int64(ids),
                  "takes float32 weights, int64 ids, and results in the dtype of x");
    auto shares = rows_of<const float>(weights);
    auto chosen = rows_of<const int64_t>(ids);
    SKYLINE_CHECK(gated && from.cols == k && to.cols == k && to.rows == from.rows && shares.rows == from.rows &&
                      chosen.rows == from.rows && shares.cols == chosen.cols,
                  "shapes do not match");
    SKYLINE_CHECK(first.format != Format::kFloat32 || is_float32(x), "float32 weights take float32 activations");
    SKYLINE_CHECK(weight.ndim() == 2 && weight.shape()[1] == first.panel_bytes() && down.ndim() == 2 &&
                      down.shape()[1] == second.panel_bytes() &&
                      weight.shape()[0] * second.panels() == down.shape()[0] * first.panels(),
                  "the two weights do not match");
    const int64_t experts = first.panels() ? weight.shape()[0] / first.panels() : 0;
    for (int64_t t = 0; t < chosen.rows; t++)
      for (int64_t c = 0; c < chosen.cols; c++)
        SKYLINE_CHECK(chosen[t][c] >= 0 && chosen[t][c] < experts, "an id is none of the experts'");
    if (from.rows == 0) return;

    auto biases = [&](const ffi::Optional<TensorView>& of, int64_t columns) -> const T* {
      if (!of.has_value()) return nullptr;
      const TensorView& b = of.value();
      SKYLINE_CHECK(is_bf16(b) == is_bf16(x) && (is_bf16(b) || is_float32(b)) && b.ndim() == 2 && b.shape()[0] == experts &&
                        b.shape()[1] == columns && b.IsContiguous(), "biases do not match the experts");
      return data<const T>(b);
    };
    Experts<T> mixture(first, second, biases(gate_up_biases, n), biases(down_biases, k), experts,
                       {static_cast<float>(alpha), static_cast<float>(limit)});
    const int64_t fit = std::max<int64_t>(1, kPassBytes / (mixture.bytes(chosen.cols) + 1));
    const int64_t passes = ceil_div(from.rows, fit), tokens = ceil_div(from.rows, passes);
    static thread_local Workspace workspace;
    uint8_t* memory = workspace.at_least(mixture.bytes(tokens * chosen.cols) + 64);
    for (int64_t begin = 0; begin < from.rows; begin += tokens)
      mixture.compute(to, from, shares, chosen, begin, std::min(begin + tokens, from.rows), memory);
  });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(moe_experts, moe_experts);

}  // namespace skyline
