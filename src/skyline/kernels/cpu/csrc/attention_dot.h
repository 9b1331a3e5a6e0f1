// Paged attention in vectors of bfloat16 pairs (VDPBF16PS), for bfloat16 queries on AVX-512 without AMX.
#pragma once

#include "attention_pairs.h"
#include "repeat.h"

#if defined(__AVX512F__) && !defined(__AMX_TILE__)

namespace skyline::attention {

template <class KV>
class DotAttention {
 public:
  using View = attention::View<bf16, KV>;
  // Few rows read so many bytes of a token at a time: the hardware fetches ahead well only where memory is read in order.
  static constexpr int kMaxRows = 128, kHeadRows = 16, kHeadBytes = 2048;

  static int64_t padded(int64_t head_dim) { return round_up(head_dim, 32); }

  DotAttention(const View& view, Scratch& scratch)
      : view_(view), dim_(view.call.head_dim), width_(padded(dim_)), heads_(view.item.heads),
        scoring_(view.call.scale, view.call.softcap, sizeof(KV) == 1) {
    void* memory = scratch.ensure(carve(nullptr));
    carve(memory);
    std::memset(nothing_, 0, width_ * sizeof(KV));
    for (int head = 0; head < heads_; head++) {
      for (int row = 0; row < view.rows; row++) {
        bf16* to = q_ + (head * view.rows + row) * width_;
        std::memcpy(to, view.query(head, row), 2 * dim_);
        std::memset(to + dim_, 0, 2 * (width_ - dim_));
      }
    }
  }

  // done(head, row, sum, values): for each row that sees something of the split.
  template <class Done>
  void split(int index, const Done& done) {
    const Span all = view_.visible(index, 0, view_.rows - 1);
    if (all.empty()) return;
    view_.slots(index, all, slots_);
    const int first = all.first_chunk(), last = all.last_chunk();
    for (int chunk = first; chunk < last; chunk++)
      for (int head = 0; head < heads_; head++) {
        const KV* next = chunk + 1 < last ? view_.call.k : view_.call.v;
        const int next_chunk = chunk + 1 < last ? chunk + 1 : first;
        gather_scales(head, chunk);
        if (view_.rows <= kFewRows) {
          few([&]<int R>() { products_in_passing<R>(head, chunk, next, next_chunk); });
        } else {
          ask(next, next_chunk, head, heads_);
          pack_keys(head, chunk);
          each_block(index, chunk, [&]<int R>(int row) { products<R>(head, row, chunk); });
        }
      }
    for (int head = 0; head < heads_; head++)
      for (int row = 0; row < view_.rows; row++) weigh(head, row, view_.visible(index, row, row), all);
    std::memset(mixed_, 0, heads_ * view_.rows * width_ * sizeof(float));
    for (int chunk = first; chunk < last; chunk++)
      for (int head = 0; head < heads_; head++) {
        const int next_chunk = chunk + 1 < last ? chunk + 1 : -1;
        if (view_.rows <= kFewRows) {
          few([&]<int R>() { mix_in_passing<R>(head, chunk, next_chunk); });
        } else {
          ask(view_.call.v, next_chunk, head, heads_);
          pack_values(head, chunk);
          each_block(index, chunk, [&]<int R>(int row) { mix<R>(head, row, chunk); });
        }
      }
    for (int head = 0; head < heads_; head++) {
      for (int row = 0; row < view_.rows; row++) {
        const int64_t at = head * view_.rows + row;
        if (!view_.visible(index, row, row).empty()) done(head, row, sums_[at], mixed_ + at * width_);
      }
    }
  }

  static void store(bf16* to, const float* values, float factor, int64_t dim) { store_unpacked(to, values, factor, dim); }

 private:
  static constexpr int kFewRows = 4;           // that use keys and values as they are read, without packing them for others
  static constexpr int kBlock = 8;             // rows at once, by two vectors: 16 accumulators
  static constexpr int kStride = kSplit + 16;  // of rows of scores, which then do not all fall into the same sets of the cache

  size_t carve(void* memory) {
    Carver carver(memory);
    const int64_t rows = heads_ * view_.rows;
    q_ = carver.take<bf16>(rows * width_);
    packed_ = carver.take<bf16>(kChunk * width_);
    scores_ = carver.take<float>(rows * kStride);
    mixed_ = carver.take<float>(rows * width_);
    slots_ = carver.take<int64_t>(kSplit);
    k_scale_ = carver.take<float>(heads_ * kSplit);
    v_scale_ = carver.take<float>(heads_ * kSplit);
    sums_ = carver.take<RowSum>(rows);
    nothing_ = carver.take<KV>(width_);
    return carver.used();
  }

  float* scores(int head, int row) const { return scores_ + (head * view_.rows + row) * kStride; }
  const KV* row_of(const KV* cache, int64_t slot, int head) const { return slot < 0 ? nothing_ : cache + (slot + head) * dim_; }
  // Asks for one of so many equal shares of a chunk that will be read soon, or of none if it is -1. All heads of a token lie
  // side by side.
  void ask(const KV* cache, int chunk, int64_t share, int64_t shares) const {
    if (chunk < 0) return;
    const int64_t lines = heads_ * dim_ * static_cast<int64_t>(sizeof(KV)) / 64;  // of a token: what is left over hardly matters
    const int64_t end = kChunk * lines * (share + 1) / shares;
    for (int64_t line = kChunk * lines * share / shares; line < end;) {
      const int64_t key = line / lines, first = line - key * lines, count = std::min(lines - first, end - line);
      const int64_t slot = slots_[chunk * kChunk + key];
      const char* from = reinterpret_cast<const char*>(cache + std::max<int64_t>(slot, 0) * dim_) + 64 * first;
      for (int64_t i = 0; i < count; i++) prefetch_l2(from + 64 * i);
      line += count;
    }
  }

  // body<R>() for as many rows as there are.
  template <int R = kFewRows, class Body>
  void few(const Body& body) const {
    if constexpr (R > 1) {
      if (view_.rows < R) return few<R - 1>(body);
    }
    body.template operator()<R>();
  }

  // body<R>(row) for blocks of rows [row, row + R) of which some see something of the chunk.
  template <class Body>
  void each_block(int index, int chunk, const Body& body) const {
    for (int row = 0; row < view_.rows; row += kBlock) block<kBlock>(index, chunk, row, std::min(kBlock, view_.rows - row), body);
  }
  template <int R, class Body>
  void block(int index, int chunk, int row, int rows, const Body& body) const {
    if constexpr (R > 1) {
      if (rows < R) return block<R - 1>(index, chunk, row, rows, body);
    }
    const Span span = view_.visible(index, row, row + R - 1);
    if (!span.empty() && span.first_chunk() <= chunk && chunk < span.last_chunk()) body.template operator()<R>(row);
  }

  void gather_scales(int head, int chunk) {
    if constexpr (sizeof(KV) == 1) {
      for (int key = chunk * kChunk; key < (chunk + 1) * kChunk; key++) {
        const int64_t slot = slots_[key], at = head * kSplit + key;
        k_scale_[at] = slot < 0 ? 0 : view_.call.k_scale[slot + head];
        v_scale_[at] = slot < 0 ? 0 : view_.call.v_scale[slot + head];
      }
    }
  }

  // packed_: of each 16 keys [pairs of dimensions][16 keys].
  void pack_keys(int head, int chunk) {
    for (int half = 0; half < kChunk; half += 16) {
      const KV* rows[16];
      for (int i = 0; i < 16; i++) rows[i] = row_of(view_.call.k, slots_[chunk * kChunk + half + i], head);
      pack_key_rows(rows, dim_, packed_ + half * width_);
    }
  }

  // packed_: of each 16 dimensions [16 pairs of keys][16 dimensions].
  void pack_values(int head, int chunk) {
    const int64_t* slot = slots_ + chunk * kChunk;
    for (int key = 0; key < kChunk; key += 2) {
      const KV *even = row_of(view_.call.v, slot[key], head), *odd = row_of(view_.call.v, slot[key + 1], head);
      pack_value_pair(even, odd, dim_, packed_ + key * 16);
    }
  }

  static __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

  // Products of R queries and the chunk's keys. Of the pairs of dimensions, those in even places are one chain of additions and
  // those in odd places another: a single one would leave few rows waiting for each addition.
  template <int R>
  void products(int head, int row, int chunk) {
    float* to = scores(head, row) + chunk * kChunk;
    for (int part = 0; part < 2; part++) {
      const bf16 *q = q_ + (head * view_.rows + row) * width_ + 2 * part, *left = packed_ + 32 * part, *right = left + 16 * width_;
      __m512 acc[R][2];
      repeat<R>(SKYLINE_EACH(r) { acc[r][0] = acc[r][1] = _mm512_setzero_ps(); });
      for (int64_t d = 0; d < width_; d += 4) {
        const __m512i a = _mm512_load_si512(left + 16 * d), b = _mm512_load_si512(right + 16 * d);
        repeat<R>(SKYLINE_EACH(r) {
          const __m512i x = spread_four(q + r * width_ + d);
          acc[r][0] = dot(acc[r][0], x, a);
          acc[r][1] = dot(acc[r][1], x, b);
        });
      }
      repeat<R>(SKYLINE_EACH(r) {
        repeat<2>(SKYLINE_EACH(t) {
          float* at = to + r * kStride + 16 * t;
          _mm512_store_ps(at, part == 0 ? acc[r][t] : _mm512_add_ps(_mm512_load_ps(at), acc[r][t]));
        });
      });
    }
  }

  // The same, bit for bit, of all R rows, from keys that are not packed.
  template <int R>
  void products_in_passing(int head, int chunk, const KV* next, int next_chunk) {
    const bf16* q = q_ + head * R * width_;
    const int64_t steps = (width_ + Pairs<KV>::kDims - 1) / Pairs<KV>::kDims;  // of each half
    const Pairs<KV> pairs{};
    for (int half = 0; half < kChunk; half += 16) {
      const KV* keys[16];
      for (int i = 0; i < 16; i++) keys[i] = row_of(view_.call.k, slots_[chunk * kChunk + half + i], head);
      __m512 acc[R][2];
      repeat<R>(SKYLINE_EACH(r) { acc[r][0] = acc[r][1] = _mm512_setzero_ps(); });
      for (int64_t d = 0; d < width_; d += Pairs<KV>::kDims) {
        ask(next, next_chunk, (2 * head + half / 16) * steps + d / Pairs<KV>::kDims, 2 * heads_ * steps);
        __m512i rows[16];
        repeat<16>(SKYLINE_EACH(i) { rows[i] = load_bytes(keys[i] + d, (dim_ - d) * static_cast<int64_t>(sizeof(KV))); });
        transpose_pairs(rows);
        pairs.keys(rows, [&](auto i, __m512i pair) __attribute__((always_inline)) {
          if (sizeof(KV) == 1 && i >= 16 && d + 32 >= width_) return;
          repeat<R>(SKYLINE_EACH(r) { acc[r][i % 2] = dot(acc[r][i % 2], spread_four(q + r * width_ + d + 2 * i), pair); });
        });
      }
      repeat<R>(SKYLINE_EACH(r) {
        _mm512_store_ps(scores(head, r) + chunk * kChunk + half, _mm512_add_ps(acc[r][0], acc[r][1]));
      });
    }
  }

  void weigh(int head, int row, Span mine, Span all) {
    float* s = scores(head, row);
    if (mine.empty()) {
      std::memset(s, 0, kSplit * sizeof(bf16));
    } else {
      const float* k_scale = sizeof(KV) == 1 ? k_scale_ + head * kSplit : nullptr;
      sums_[head * view_.rows + row] =
          weigh_row<sizeof(KV) == 1>(s, mine, all, scoring_, k_scale, v_scale_ + head * kSplit);
    }
  }

  // Adds the chunk's values, weighted, in the order of the keys.
  template <int R>
  void mix(int head, int row, int chunk) {
    const bf16* weights = reinterpret_cast<const bf16*>(scores(head, row)) + chunk * kChunk;
    for (int64_t d = 0; d < width_; d += 32) {
      const bf16* values = packed_ + d * kChunk;
      float* to = mixed_ + (head * view_.rows + row) * width_ + d;
      __m512 acc[R][2];
      repeat<R>(SKYLINE_EACH(r) {
        acc[r][0] = _mm512_load_ps(to + r * width_);
        acc[r][1] = _mm512_load_ps(to + r * width_ + 16);
      });
      for (int key = 0; key < kChunk; key += 2) {
        const __m512i a = _mm512_load_si512(values + 16 * key), b = _mm512_load_si512(values + 16 * key + 512);
        repeat<R>(SKYLINE_EACH(r) {
          const __m512i x = spread_four(weights + r * 2 * kStride + key);
          acc[r][0] = dot(acc[r][0], x, a);
          acc[r][1] = dot(acc[r][1], x, b);
        });
      }
      repeat<R>(SKYLINE_EACH(r) {
        _mm512_store_ps(to + r * width_, acc[r][0]);
        _mm512_store_ps(to + r * width_ + 16, acc[r][1]);
      });
    }
  }

  // The same, bit for bit, for all R rows, of values that are not packed.
  template <int R>
  void mix_in_passing(int head, int chunk, int next_chunk) {
    constexpr int blocks = R <= 2 ? 4 : 2;  // of 32 dimensions: no more accumulators than registers
    int64_t d = 0;
    for (; d + 32 * blocks <= width_; d += 32 * blocks) mix_dimensions<R, blocks>(head, chunk, next_chunk, d);
    for (; d < width_; d += 32) mix_dimensions<R, 1>(head, chunk, next_chunk, d);
  }
  template <int R, int D>
  void mix_dimensions(int head, int chunk, int next_chunk, int64_t from) {
    const bf16* weights = reinterpret_cast<const bf16*>(scores(head, 0)) + chunk * kChunk;
    const int64_t* slot = slots_ + chunk * kChunk;
    const Pairs<KV> pairs{};
    float* to = mixed_ + head * R * width_ + from;
    __m512 acc[R][2 * D];
    repeat<R>(SKYLINE_EACH(r) { repeat<2 * D>(SKYLINE_EACH(v) { acc[r][v] = _mm512_load_ps(to + r * width_ + 16 * v); }); });
    for (int key = 0; key < kChunk; key += 2) {
      if (from == 0) ask(view_.call.v, next_chunk, (head * kChunk + key) / 2, heads_ * kChunk / 2);
      const KV *even = row_of(view_.call.v, slot[key], head) + from, *odd = row_of(view_.call.v, slot[key + 1], head) + from;
      __m512i x[R];
      repeat<R>(SKYLINE_EACH(r) { x[r] = spread_four(weights + r * 2 * kStride + key); });
      repeat<D>(SKYLINE_EACH(block) {
        const int64_t left = dim_ - from - 32 * block;
        __m512i low, high;
        pairs.values(even + 32 * block, odd + 32 * block, left, low, high);
        repeat<R>(SKYLINE_EACH(r) {
          acc[r][2 * block] = dot(acc[r][2 * block], x[r], low);
          acc[r][2 * block + 1] = dot(acc[r][2 * block + 1], x[r], high);
        });
      });
    }
    repeat<R>(SKYLINE_EACH(r) { repeat<2 * D>(SKYLINE_EACH(v) { _mm512_store_ps(to + r * width_ + 16 * v, acc[r][v]); }); });
  }

  const View view_;
  const int64_t dim_, width_;
  const int heads_;
  const Scoring scoring_;
  bf16 *q_, *packed_;
  float *scores_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  RowSum* sums_;
  KV* nothing_;
};

}  // namespace skyline::attention

#endif
