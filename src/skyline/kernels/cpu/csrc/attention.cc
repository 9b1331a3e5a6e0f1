// Paged attention: arguments, distribution of the work, merging of splits.
#include "attention.h"

#include <vector>

#include "attention_amx.h"
#include "attention_avx2.h"
#include "attention_dot.h"
#include "attention_stream_amx.h"
#include "attention_stream_dot.h"
#include "attention_vector.h"
#include "cache_shape.h"
#include "tensors.h"
#include "threads.h"

namespace skyline {
namespace attention {
namespace {

constexpr int64_t kManyRows = 64;  // with more of them, an item is a matter of arithmetic, not of reading the cache

struct Plan {
  std::vector<int32_t> order;
  std::vector<Item> items, shared;
  Scratch partial;
};

// Few and Many: the kernels for items of few rows and of more.
template <class Few, class Many, class T, class KV>
class Run {
 public:
  Run(const Attention<T, KV>& call, int64_t requests) : call_(call), requests_(requests), width_(Many::padded(call.head_dim)) {}

  void operator()() {
    static thread_local Plan plan;
    make(plan);
    partial_ = static_cast<float*>(plan.partial.ensure(partial_rows_ * row_size() * sizeof(float)));
    const Item* items = plan.items.data();  // the name `plan` means another one in each thread
    ThreadPool::get().run(plan.items.size(), [&](int64_t i) { compute(items[i]); });
    const Item* shared = plan.shared.data();
    ThreadPool::get().run(plan.shared.size(), [&](int64_t i) { combine(shared[i]); });
  }

 private:
  int64_t row_size() const { return width_ + 16; }  // values, and a cache line of which two floats are used

  int64_t rows_of_item(const Item& item) const { return item.heads * item.queries * call_.group; }

  // Work that one thread would do, in units of about one key of one row.
  int64_t cost(const Item& item) const {
    return static_cast<int64_t>(item.splits) * kSplit * (round_up(item.queries * call_.group, 16) + 16) * item.heads;
  }

  Item item_of(int32_t request, int32_t heads, int32_t first_query, int32_t queries) const {
    int64_t own = call_.starts[request + 1] - call_.starts[request];
    int64_t first = call_.contexts[request] - own + first_query, last = first + queries - 1;
    int64_t first_split = std::max<int64_t>(0, first - call_.window + 1) / kSplit;
    return {request, 0, heads, first_query, queries, static_cast<int32_t>(first_split),
            static_cast<int32_t>(last / kSplit + 1 - first_split), -1};
  }

  void make(Plan& plan) {
    const int64_t threads = ThreadPool::get().size();
    auto queries_of = [&](int32_t r) { return call_.starts[r + 1] - call_.starts[r]; };
    auto tile_of = [&](int64_t rows) { return static_cast<int32_t>(std::max<int64_t>(1, rows / call_.group)); };
    // The larger a tile of queries is, the more of them share the packing of keys and values.
    int64_t rows = Many::kMaxRows;
    auto tiles = [&] {
      int64_t count = 0;
      for (int32_t r = 0; r < requests_; r++) count += (queries_of(r) + tile_of(rows) - 1) / tile_of(rows);
      return count * call_.kv_heads;
    };
    while (threads > 1 && rows > 32 && tiles() < 8 * threads) rows /= 2;
    const int32_t tile = tile_of(rows);

    plan.order.clear();
    for (int32_t r = 0; r < requests_; r++)
      if (queries_of(r) > 0) plan.order.push_back(r);
    auto largest = [&](int32_t r) { return static_cast<int64_t>(call_.contexts[r]) * std::min(queries_of(r), tile); };
    std::sort(plan.order.begin(), plan.order.end(), [&](int32_t a, int32_t b) {
      int64_t left = largest(a), right = largest(b);
      return left != right ? left > right : a < b;
    });

    // Heads that are next to each other are read together, unless that would leave threads without work.
    const int64_t head_bytes = call_.head_dim * static_cast<int64_t>(sizeof(KV));
    int32_t heads = static_cast<int32_t>(std::clamp<int64_t>(Many::kHeadBytes / head_bytes, 1, call_.kv_heads));
    auto units = [&] {
      int64_t count = 0;
      for (int32_t r : plan.order) count += item_of(r, 1, 0, queries_of(r)).splits;
      return count * ((call_.kv_heads + heads - 1) / heads);
    };
    while (threads > 1 && heads > 1 && units() < 2 * threads) heads /= 2;

    plan.items.clear();
    int64_t total = 0;
    for (int32_t r : plan.order) {
      for (int32_t first = (queries_of(r) - 1) / tile * tile; first >= 0; first -= tile) {
        const int32_t queries = std::min(tile, queries_of(r) - first);
        Item item = item_of(r, queries * call_.group > Many::kHeadRows ? 1 : heads, first, queries);
        for (; item.head < call_.kv_heads; item.head += item.heads) {
          item.heads = std::min<int32_t>(item.heads, static_cast<int32_t>(call_.kv_heads) - item.head);
          total += cost(item);
          plan.items.push_back(item);
        }
      }
    }
    plan.shared.clear();
    partial_rows_ = 0;
    if (threads == 1) return;
    // What would keep one thread busy after the others are done is cut along the context.
    const int64_t limit = total / (3 * threads);
    for (size_t i = 0, count = plan.items.size(); i < count; i++) {
      Item item = plan.items[i];
      if (item.splits == 1 || item.queries * call_.group > kManyRows || cost(item) <= limit) continue;
      item.partial = partial_rows_;
      partial_rows_ += item.splits * rows_of_item(item);
      plan.shared.push_back(item);
      const int64_t pieces = std::min<int64_t>(item.splits, cost(item) / std::max<int64_t>(limit, 1) + 1);
      for (int64_t p = 0; p < pieces; p++) {
        int32_t begin = static_cast<int32_t>(item.splits * p / pieces), end = static_cast<int32_t>(item.splits * (p + 1) / pieces);
        Item piece = item;
        piece.first_split += begin;
        piece.splits = end - begin;
        piece.partial += begin * rows_of_item(item);
        if (p == 0) {
          plan.items[i] = piece;
        } else {
          plan.items.push_back(piece);
        }
      }
    }
  }

  void compute(const Item& item) {
    static thread_local Scratch scratch;
    View<T, KV> view(call_, item);
    if (view.rows <= Few::kMaxRows) {
      Few kernel(view, scratch);
      compute(item, view, kernel);
    } else {
      Many kernel(view, scratch);
      compute(item, view, kernel);
    }
  }

  template <class Kernel>
  void compute(const Item& item, const View<T, KV>& view, Kernel& kernel) {
    static thread_local Scratch results;
    const int64_t rows = rows_of_item(item);
    if (item.partial >= 0) {
      for (int s = 0; s < item.splits; s++) {
        float* to = partial_ + (item.partial + s * rows) * row_size();
        kernel.split(item.first_split + s, [&](int head, int row, RowSum sum, const float* values) {
          float* slot = to + (head * view.rows + row) * row_size();
          slot[0] = sum.largest;
          slot[1] = sum.total;
          std::memcpy(slot + 16, values, width_ * sizeof(float));
        });
      }
      return;
    }
    float* output = static_cast<float*>(results.ensure(rows * (width_ * sizeof(float) + sizeof(RowState))));
    RowState* states = reinterpret_cast<RowState*>(output + rows * width_);
    for (int64_t row = 0; row < rows; row++) states[row] = RowState::nothing();
    for (int s = 0; s < item.splits; s++) {
      kernel.split(item.first_split + s, [&](int head, int row, RowSum sum, const float* values) {
        const int64_t at = head * view.rows + row;
        merge(states[at], output + at * width_, sum, values, width_);
      });
    }
    for (int head = 0; head < item.heads; head++) {
      for (int row = 0; row < view.rows; row++) {
        const int64_t at = head * view.rows + row;
        finish(view, head, row, states[at], output + at * width_);
      }
    }
  }

  void combine(const Item& item) {
    static thread_local Scratch results;
    View<T, KV> view(call_, item);
    const int64_t rows = rows_of_item(item);
    float* output = static_cast<float*>(results.ensure(width_ * sizeof(float)));
    for (int head = 0; head < item.heads; head++) {
      for (int row = 0; row < view.rows; row++) {
        RowState state = RowState::nothing();
        for (int s = 0; s < item.splits; s++) {
          if (view.visible(item.first_split + s, row, row).empty()) continue;
          const float* slot = partial_ + (item.partial + s * rows + head * view.rows + row) * row_size();
          merge(state, output, {slot[0], slot[1]}, slot + 16, width_);
        }
        finish(view, head, row, state, output);
      }
    }
  }

  void finish(const View<T, KV>& view, int head, int row, const RowState& state, const float* output) {
    float factor = 1 / state.total;
    if (call_.sinks != nullptr) {
      const float sink = call_.sinks[view.query_head(head, row)] * kLog2e;
      const float largest = sink > state.largest ? sink : state.largest;
      const float shrink = exp2_scalar(state.largest - largest);
      factor = shrink / std::fma(state.total, shrink, exp2_scalar(sink - largest));
    }
    Many::store(view.output(head, row), output, factor, call_.head_dim);
  }

  const Attention<T, KV>& call_;
  const int64_t requests_, width_;
  int64_t partial_rows_ = 0;
  float* partial_ = nullptr;
};

}  // namespace
}  // namespace attention

namespace {

int64_t checked_requests(const TensorView& tables, const TensorView& starts, const TensorView& contexts, int64_t tokens,
                         int64_t block_size) {
  SKYLINE_CHECK(is_int32(tables) && is_int32(starts) && is_int32(contexts), "takes tables, starts and lengths in int32");
  SKYLINE_CHECK(tables.ndim() == 2 && starts.ndim() == 1 && contexts.ndim() == 1, "shapes do not match");
  const int64_t requests = contexts.shape()[0];
  SKYLINE_CHECK(starts.shape()[0] == requests + 1 && tables.shape()[0] == requests, "shapes do not match");
  SKYLINE_CHECK((tables.shape()[1] <= 1 || tables.stride(1) == 1) && starts.stride(0) == 1 &&
                    (requests <= 1 || contexts.stride(0) == 1), "takes contiguous tables, starts and lengths");
  const int32_t *start = data<int32_t>(starts), *context = data<int32_t>(contexts);
  SKYLINE_CHECK(start[0] == 0 && start[requests] == tokens, "query_starts does not match the queries");
  for (int64_t r = 0; r < requests; r++) {
    int64_t queries = start[r + 1] - start[r];
    SKYLINE_CHECK(queries >= 0 && queries <= context[r], "request " << r << " has more queries than context");
    SKYLINE_CHECK(context[r] <= tables.shape()[1] * block_size, "the context of request " << r << " exceeds its blocks");
  }
  return requests;
}

}  // namespace

// See the op of this name. window 0: none; softcap 0: none.
void paged_attention(TensorView out, TensorView q, TensorView k, TensorView v, ffi::Optional<TensorView> k_scale,
                     ffi::Optional<TensorView> v_scale, TensorView tables, TensorView starts, TensorView contexts,
                     double scale, int64_t window, ffi::Optional<TensorView> sinks, double softcap) {
  const CacheShape cache(k, v, k_scale, v_scale);
  const int64_t block_size = cache.block_size, kv_heads = cache.kv_heads, head_dim = cache.head_dim;
  SKYLINE_CHECK(block_size > 0 && kv_heads > 0 && head_dim > 0, "takes a cache that is not empty");
  SKYLINE_CHECK(window >= 0 && softcap >= 0, "a window or a softcap is positive");
  dispatch_float(out, [&]<class T>(T*) {
    auto to = rows_of<T>(out), from = rows_of<const T>(q);
    SKYLINE_CHECK(is_bf16(q) == is_bf16(out) && (is_float32(q) || is_bf16(q)), "q and the output differ in dtype");
    SKYLINE_CHECK(to.rows == from.rows && to.cols == from.cols, "q and the output differ in shape");
    SKYLINE_CHECK(from.cols > 0 && from.cols % (kv_heads * head_dim) == 0, "query heads do not match the cache");
    const int64_t group = from.cols / (kv_heads * head_dim);
    const int64_t requests = checked_requests(tables, starts, contexts, from.rows, block_size);
    static thread_local std::vector<float> sink;
    sink.clear();
    if (sinks.has_value()) {
      const TensorView& s = sinks.value();
      SKYLINE_CHECK(s.ndim() == 1 && s.IsContiguous() && s.shape()[0] == kv_heads * group,
                    "takes one sink for each query head");
      dispatch_float(s, [&]<class S>(S*) {
        for (int64_t i = 0; i < kv_heads * group; i++) sink.push_back(to_float(data<S>(s)[i]));
      });
    }
    if (from.rows == 0) return;
    auto with = [&]<class KV>(KV*) {
      attention::Attention<T, KV> call{
          to.data, from.data, to.stride, from.stride, data<KV>(k), data<KV>(v),
          cache.int8 ? data<float>(k_scale.value()) : nullptr, cache.int8 ? data<float>(v_scale.value()) : nullptr,
          block_size, kv_heads, head_dim, group, cache.token_stride, cache.head_stride,
          data<int32_t>(tables), data<int32_t>(starts), data<int32_t>(contexts),
          requests <= 1 ? tables.shape()[1] : tables.stride(0),
          static_cast<float>(scale), static_cast<float>(softcap), window == 0 ? int64_t{1} << 40 : window,
          sinks.has_value() ? sink.data() : nullptr};
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, float>) {
        attention::Run<attention::VectorAttention<KV>, attention::VectorAttention<KV>, T, KV>(call, requests)();
      } else {
#if defined(__AMX_TILE__)
        attention::Run<attention::StreamAttention<KV>, attention::TileAttention<KV>, T, KV>(call, requests)();
#else
        attention::Run<attention::DotStreamAttention<KV>, attention::DotAttention<KV>, T, KV>(call, requests)();
#endif
      }
#else
      attention::Run<attention::LaneAttention<T, KV>, attention::LaneAttention<T, KV>, T, KV>(call, requests)();
#endif
    };
    if (cache.int8) {
      with(static_cast<int8_t*>(nullptr));
    } else {
      SKYLINE_CHECK(is_bf16(k) == is_bf16(q) && is_bf16(v) == is_bf16(q) && is_float32(k) == is_float32(q) &&
                        is_float32(v) == is_float32(q), "the cache has neither the dtype of q nor int8");
      with(static_cast<T*>(nullptr));
    }
  });
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_attention, paged_attention);

}  // namespace skyline
