// Paged attention: what its implementations share.
//
// The arithmetic of a query row is fixed by the positions it sees and by nothing else. The context is cut at multiples of
// kSplit keys. Of each split that the row sees anything of, the softmax numerators (relative to the split's own largest
// score), their sum and the weighted sum of the values are computed from scratch, in the order of the keys; then the splits
// are merged in order (arXiv:2205.14135, arXiv:2311.01282). Keys that a row does not see contribute exact zeros. So one
// query alone, a chunk of a prompt and a whole prompt give the same bits, whichever threads compute the splits.
//
// Scores are in units of log2: weights are powers of two.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

#include "simd.h"

namespace skyline::attention {

constexpr int kSplit = 256;  // keys
constexpr int kChunk = 32;   // keys that are packed and multiplied together
constexpr float kLog2e = 1.44269504088896341f;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline Vec select_below(Vec a, Vec limit, Vec below, Vec otherwise) {
#if defined(__AVX512F__)
  return {_mm512_mask_mov_ps(otherwise.v, _mm512_cmp_ps_mask(a.v, limit.v, _CMP_LT_OQ), below.v)};
#else
  return {_mm256_blendv_ps(otherwise.v, below.v, _mm256_cmp_ps(a.v, limit.v, _CMP_LT_OQ))};
#endif
}

// 2^x for x <= 127, relative error below 2e-7; exactly 0 below -126, and NaN of NaN.
inline Vec exp2(Vec x) {
  Vec inside = max(Vec::all(-126.0f), x);  // of a NaN, max returns the second operand
  Vec n = round_even(inside);
  Vec f = inside - n;
  Vec p = fma(Vec::all(0.00132647f), f, Vec::all(0.00967151f));
  p = fma(p, f, Vec::all(0.05550734f));
  p = fma(p, f, Vec::all(0.24022242f));
  p = fma(p, f, Vec::all(0.69314698f));
  p = fma(p, f, Vec::all(1.0f));
#if defined(__AVX512F__)
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p.v, n.v)};
#else
  Vec result = p * exp2_whole(n);
  result.v = _mm256_blendv_ps(result.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  result.v = _mm256_and_ps(result.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
  return result;
#endif
}

inline float exp2_scalar(float x) {
  float result[Vec::width];
  exp2(Vec::all(x)).store(result);
  return result[0];
}

// Within 2e-7 absolutely and 1e-6 relatively.
inline Vec tanh(Vec x) {
  Vec square = x * x;
  Vec series = fma(square, Vec::all(62.0f / 2835), Vec::all(-17.0f / 315));
  series = fma(series, square, Vec::all(2.0f / 15));
  series = fma(series, square, Vec::all(-1.0f / 3));
  series = fma(series * square, x, x);
  Vec shrunk = exp2(abs(x) * Vec::all(-2.0f * kLog2e));
  Vec size = (Vec::all(1.0f) - shrunk) / (Vec::all(1.0f) + shrunk);
  Vec wide = select_below(x, Vec::zero(), Vec::zero() - size, size);
  return select_below(abs(x), Vec::all(0.25f), series, wide);
}

// Memory of a thread, kept from call to call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }
  void* ensure(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = round_up(static_cast<int64_t>(bytes), 4096);
      data_ = std::aligned_alloc(4096, size_);
      if (data_ == nullptr) std::abort();
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Cuts one piece of memory into arrays, each on a cache line of its own. With a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// One call of the op. T: of queries and output; KV: of the cache.
template <class T, class KV>
struct Attention {
  T* out;
  const T* q;
  int64_t out_stride, q_stride;
  const KV *k, *v;                 // [num_blocks, block_size, kv_heads, head_dim]
  const float *k_scale, *v_scale;  // [num_blocks, block_size, kv_heads], of int8 only
  int64_t block_size, kv_heads, head_dim, group;
  int64_t token_stride, head_stride;  // within a block, in units of a token's head: either may be the inner one
  const int32_t *tables, *starts, *contexts;
  int64_t table_stride;
  float scale, softcap;  // softcap 0: none
  int64_t window;        // at least 1; larger than any context: none
  const float* sinks;    // [Hq], or null
};

// Work of one thread: some of a request's consecutive queries, with the query heads of some KV heads, over some splits.
struct Item {
  int32_t request, head, heads;
  int32_t first_query, queries;
  int32_t first_split, splits;
  int64_t partial;  // index of its first row in the partial results, or -1 if the splits are merged at once
};

// Keys [lo, hi) of a split.
struct Span {
  int lo, hi;
  bool empty() const { return lo >= hi; }
  int first_chunk() const { return lo / kChunk; }
  int last_chunk() const { return (hi + kChunk - 1) / kChunk; }
};

// An item's rows: of each KV head `rows`, of which r is query first_query + r / group with the r % group-th of its heads.
template <class T, class KV>
struct View {
  const Attention<T, KV>& call;
  const Item& item;
  int rows;
  int64_t first_position;

  View(const Attention<T, KV>& c, const Item& i) : call(c), item(i) {
    rows = static_cast<int>(i.queries * c.group);
    int64_t queries = c.starts[i.request + 1] - c.starts[i.request];
    first_position = c.contexts[i.request] - queries + i.first_query;
  }
  const T* query(int head, int row) const { return call.q + token(row) * call.q_stride + column(head, row); }
  T* output(int head, int row) const { return call.out + token(row) * call.out_stride + column(head, row); }
  int64_t token(int row) const { return call.starts[item.request] + item.first_query + row / call.group; }
  int64_t query_head(int head, int row) const { return (item.head + head) * call.group + row % call.group; }
  int64_t column(int head, int row) const { return query_head(head, row) * call.head_dim; }
  // Of the split's keys, those that any of the rows [first, last] sees.
  Span visible(int split, int first, int last) const { return seen(split, first / call.group, last / call.group); }
  // Those that each row sees, without dividing.
  void visible(int split, Span* rows_spans) const {
    for (int query = 0; query < item.queries; query++, rows_spans += call.group)
      std::fill_n(rows_spans, call.group, seen(split, query, query));
  }
  // Where the key at this position lies, as below; -1 beyond the context.
  int64_t slot(int64_t position) const {
    if (position >= call.contexts[item.request]) return -1;
    const int64_t block = call.tables[item.request * call.table_stride + position / call.block_size];
    return block * call.block_size * call.kv_heads + position % call.block_size * call.token_stride + item.head * call.head_stride;
  }
  // Where the keys of `span` lie for the first head, in units of a token's head: slots[key of the split]; outside of the
  // span, -1. The next head is head_stride further.
  void slots(int split, Span span, int64_t* slots) const {
    const int32_t* table = call.tables + item.request * call.table_stride;
    int64_t begin = static_cast<int64_t>(split) * kSplit;
    for (int key = span.first_chunk() * kChunk; key < span.lo; key++) slots[key] = -1;
    for (int key = span.hi; key < span.last_chunk() * kChunk; key++) slots[key] = -1;
    int64_t block = (begin + span.lo) / call.block_size, offset = (begin + span.lo) % call.block_size;
    for (int key = span.lo; key < span.hi; block++, offset = 0) {
      int64_t slot = table[block] * call.block_size * call.kv_heads + offset * call.token_stride + item.head * call.head_stride;
      int count = static_cast<int>(std::min<int64_t>(call.block_size - offset, span.hi - key));
      for (int i = 0; i < count; i++) slots[key++] = slot + i * call.token_stride;
    }
  }
  // [heads][kSplit]: the scales of an int8 cache; of keys that are not there, 0.
  void scales(const int64_t* slots, Span span, float* k, float* v) const {
    if constexpr (sizeof(KV) == 1) {
      for (int head = 0; head < item.heads; head++, k += kSplit, v += kSplit) {
        for (int key = span.first_chunk() * kChunk; key < span.last_chunk() * kChunk; key++) {
          const int64_t slot = slots[key] + head * call.head_stride;
          k[key] = slots[key] < 0 ? 0 : call.k_scale[slot];
          v[key] = slots[key] < 0 ? 0 : call.v_scale[slot];
        }
      }
    }
  }

 private:
  // Of the split's keys, those that any of the item's queries [first, last] sees.
  Span seen(int split, int64_t first, int64_t last) const {
    const int64_t begin = static_cast<int64_t>(split) * kSplit, from = first_position + first - call.window + 1;
    return {static_cast<int>(std::clamp<int64_t>(from - begin, 0, kSplit)),
            static_cast<int>(std::clamp<int64_t>(first_position + last + 1 - begin, 0, kSplit))};
  }
};

// How products of queries and keys become scores.
struct Scoring {
  float factor;   // the score is product * factor, where nothing else is asked for
  float scale, softcap;
  bool plain;
  Scoring(float scale_, float softcap_, bool scaled_keys)
      : factor(scale_ * kLog2e), scale(scale_), softcap(softcap_), plain(softcap_ == 0 && !scaled_keys && scale_ > 0) {}
  Vec operator()(Vec product) const {
    if (softcap == 0) return product * Vec::all(factor);
    return tanh(product * Vec::all(scale / softcap)) * Vec::all(softcap * kLog2e);
  }
};

struct RowSum {
  float largest, total;
};

// The softmax numerators of one row of one split. s: products with the keys of the chunks of `all`, overwritten; of these
// keys the row sees `mine`. put(key, weights) stores the weights of a chunk, 0 for keys that the row does not see; it may
// write to s where it has been read. k_scale: factors of the products, or null.
template <class Put>
inline RowSum softmax(float* s, Span mine, Span all, const Scoring& scoring, const float* k_scale, const Put& put) {
  constexpr int W = Vec::width, parts = kChunk / W;
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  const int first = mine.lo / W * W, last = (mine.hi + W - 1) / W * W;
  float factor = scoring.factor;
  if (!scoring.plain) {
    for (int key = first; key < last; key += W) {
      Vec product = Vec::load(s + key);
      if (k_scale != nullptr) product = product * Vec::load(k_scale + key);
      scoring(product).store(s + key);
    }
    factor = 1;
  }
  std::fill(s + first, s + mine.lo, kNothing);
  std::fill(s + mine.hi, s + last, kNothing);
  Vec top = Vec::all(kNothing), other = top;
  int key = first;
  for (; key + 2 * W <= last; key += 2 * W) {
    top = max(top, Vec::load(s + key));
    other = max(other, Vec::load(s + key + W));
  }
  if (key < last) top = max(top, Vec::load(s + key));
  const float largest = max(top, other).max() * factor;

  const int from = mine.first_chunk() * kChunk, to = mine.last_chunk() * kChunk;
  std::fill(s + from, s + first, kNothing);
  std::fill(s + last, s + to, kNothing);
  Vec weights[parts];
  for (Vec& weight : weights) weight = Vec::zero();
  for (key = all.first_chunk() * kChunk; key < from; key += kChunk) put(key, weights);
  Vec sums[2] = {Vec::zero(), Vec::zero()}, shift = Vec::all(-largest), by = Vec::all(factor);
  for (; key < to; key += kChunk) {
    for (int i = 0; i < parts; i++) {
      weights[i] = exp2(fma(Vec::load(s + key + i * W), by, shift));
      sums[i % 2] = sums[i % 2] + weights[i];
    }
    put(key, weights);
  }
  for (Vec& weight : weights) weight = Vec::zero();
  for (; key < all.last_chunk() * kChunk; key += kChunk) put(key, weights);
  return {largest, (sums[0] + sums[1]).sum()};
}

// What a row knows after some splits.
struct RowState {
  float largest, total;
  bool empty;
  static RowState nothing() { return {0, 0, true}; }
};

// Adds a split's result to a row's. n is a multiple of Vec::width.
inline void merge(RowState& state, float* output, RowSum split, const float* values, int64_t n) {
  if (state.empty) {
    state = {split.largest, split.total, false};
    std::memcpy(output, values, n * sizeof(float));
    return;
  }
  const float largest = split.largest > state.largest ? split.largest : state.largest;
  const float before = exp2_scalar(state.largest - largest), now = exp2_scalar(split.largest - largest);
  state = {largest, std::fma(state.total, before, split.total * now), false};
  const Vec a = Vec::all(before), b = Vec::all(now);
  for (int64_t i = 0; i < n; i += Vec::width) {
    fma(Vec::load(output + i), a, Vec::load(values + i) * b).store(output + i);
  }
}

}  // namespace skyline::attention
