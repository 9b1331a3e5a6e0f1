// The choice of experts for each token.
#include <cmath>
#include <vector>

#include "tensors.h"
#include "threads.h"

namespace skyline {

// weights float32 [T, k], ids int64 [T, k], logits [T, E]: softmax over all experts, then the k largest, lower id first among
// equals. A row with a NaN gets NaN weights and ids that exist.
void topk_router(TensorView weights, TensorView ids, TensorView logits, int64_t top_k, bool renormalize) {
  dispatch_float(logits, [&]<class T>(T*) {
    auto from = rows_of<T>(logits);
    SKYLINE_CHECK(is_float32(weights) && is_int64(ids), "gives float32 weights and int64 ids");
    auto shares = rows_of<float>(weights);
    auto chosen = rows_of<int64_t>(ids);
    const int64_t experts = from.cols;
    SKYLINE_CHECK(shares.rows == from.rows && chosen.rows == from.rows && shares.cols == top_k && chosen.cols == top_k &&
                      0 < top_k && top_k <= experts,
                  "shapes do not match");
    ThreadPool::get().run_ranges(from.rows, 1 + 4096 / (experts + 1), [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> scratch;
      scratch.resize(experts);
      float* values = scratch.data();
      for (int64_t row = begin; row < end; row++) {
        const T* x = from[row];
        Vec most = Vec::all(-INFINITY);
        sweep(experts, [&](int64_t i, auto n) {
          Vec part = Vec::load(x + i, n);
          part.store(values + i, n);
          // Beyond the row's end a vector is filled with zeros, so partial vectors are left to the loop below.
          if (n == Vec::width) most = max(most, part);
        });
        float top = most.max();
        for (int64_t i = experts / Vec::width * Vec::width; i < experts; i++) top = values[i] > top ? values[i] : top;

        int64_t* best = chosen[row];
        int64_t count = 0;
        for (int64_t expert = 0; expert < experts; expert++) {
          float value = values[expert];
          if (count == top_k && !(value > values[best[top_k - 1]])) continue;
          int64_t place = count < top_k ? count++ : top_k - 1;
          for (; place > 0 && value > values[best[place - 1]]; place--) best[place] = best[place - 1];
          best[place] = expert;
        }

        Vec sum = Vec::zero();
        float tail = 0;
        sweep(experts, [&](int64_t i, auto n) {
          Vec power = exp(Vec::load(values + i, n) - Vec::all(top));
          power.store(values + i, n);
          if (n == Vec::width) {
            sum = sum + power;
          } else {
            for (int j = 0; j < n; j++) tail += values[i + j];
          }
        });
        float total = sum.sum() + tail, kept = 0;
        for (int64_t i = 0; i < top_k; i++) kept += shares[row][i] = values[best[i]] / total;
        for (int64_t i = 0; renormalize && i < top_k; i++) shares[row][i] /= kept;
      }
    });
  });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(topk_router, topk_router);

}  // namespace skyline
