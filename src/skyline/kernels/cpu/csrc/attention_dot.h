// Paged attention in vectors of bfloat16 pairs (VDPBF16PS), for bfloat16 queries on AVX-512 without AMX: items of many rows,
// for which keys and values are packed.
#pragma once

#include "attention_pairs.h"
#include "repeat.h"

#if defined(__AVX512F__) && !defined(__AMX_TILE__)

namespace skyline::attention {

template <class KV>
class DotAttention {
 public:
  using View = attention::View<bf16, KV>;
  // Items of few rows take several heads, which lie next to each other in a block: so many bytes of each token.
  static constexpr int kMaxRows = 128, kHeadRows = 16, kHeadBytes = 2048;
  static constexpr int kStride = kSplit + 16;  // of rows of scores, which then do not all fall into the same sets of the cache

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
    view_.visible(index, spans_);
    view_.slots(index, all, slots_);
    view_.scales(slots_, all, k_scale_, v_scale_);
    const int first = all.first_chunk(), last = all.last_chunk();
    for (int chunk = first; chunk < last; chunk++)
      for (int head = 0; head < heads_; head++) {
        chunk + 1 < last ? ask(view_.call.k, chunk + 1, head) : ask(view_.call.v, first, head);
        pack_keys(head, chunk);
        each_block<kKeyBlock>(chunk, [&]<int R>(int row) { products<R>(head, row, chunk); });
      }
    for (int head = 0, at = 0; head < heads_; head++) {
      const float *k_scale = k_scale_ + head * kSplit, *v_scale = v_scale_ + head * kSplit;
      for (int row = 0; row < view_.rows; row++, at++)
        sums_[at] = weigh_row<sizeof(KV) == 1>(scores_ + at * kStride, spans_[row], all, scoring_, k_scale, v_scale);
    }
    std::memset(mixed_, 0, heads_ * view_.rows * width_ * sizeof(float));
    for (int chunk = first; chunk < last; chunk++)
      for (int head = 0; head < heads_; head++) {
        if (chunk + 1 < last) ask(view_.call.v, chunk + 1, head);
        pack_values(head, chunk);
        each_block<kBlock>(chunk, [&]<int R>(int row) { mix<R>(head, row, chunk); });
      }
    for (int head = 0; head < heads_; head++) {
      for (int row = 0; row < view_.rows; row++) {
        const int64_t at = head * view_.rows + row;
        if (!spans_[row].empty()) done(head, row, sums_[at], mixed_ + at * width_);
      }
    }
  }

  static void store(bf16* to, const float* values, float factor, int64_t dim) { store_unpacked(to, values, factor, dim); }

 private:
  static constexpr int kBlock = 8;     // rows at once, by two vectors: 16 accumulators
  static constexpr int kKeyBlock = 4;  // the same of keys, where each accumulator is added to two others

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
    spans_ = carver.take<Span>(view_.rows);
    sums_ = carver.take<RowSum>(rows);
    nothing_ = carver.take<KV>(width_);
    return carver.used();
  }

  float* scores(int head, int row) const { return scores_ + (head * view_.rows + row) * kStride; }
  const KV* row_of(const KV* cache, int64_t slot, int head) const {
    return slot < 0 ? nothing_ : cache + (slot + head * view_.call.head_stride) * dim_;
  }
  // Asks for what a head has in a chunk that will be read soon.
  void ask(const KV* cache, int chunk, int head) const {
    for (int key = chunk * kChunk; key < (chunk + 1) * kChunk; key++) {
      const char* from = reinterpret_cast<const char*>(row_of(cache, slots_[key], head));
      for (int64_t byte = 0; byte < dim_ * static_cast<int64_t>(sizeof(KV)); byte += 64) prefetch_l2(from + byte);
    }
  }

  // body<R>(row) for blocks of rows [row, row + R) of which some see something of the chunk.
  template <int most, class Body>
  void each_block(int chunk, const Body& body) const {
    for (int row = 0; row < view_.rows; row += most) block<most>(chunk, row, std::min(most, view_.rows - row), body);
  }
  template <int R, class Body>
  void block(int chunk, int row, int rows, const Body& body) const {
    if constexpr (R > 1) {
      if (rows < R) return block<R - 1>(chunk, row, rows, body);
    }
    const Span span{spans_[row].lo, spans_[row + R - 1].hi};
    if (!span.empty() && span.first_chunk() <= chunk && chunk < span.last_chunk()) body.template operator()<R>(row);
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

  // Products of R queries and the chunk's keys, added up as they are where a vector holds one key: each of its lanes for itself
  // (Pairs::pair says what is in it), then the lanes of both halves, then these sums in order.
  template <int R>
  void products(int head, int row, int chunk) {
    const bf16* q = q_ + (head * view_.rows + row) * width_;
    const int64_t vectors = round_up(dim_, Pairs<KV>::kDims) / 32;
    __m512 total[R][2];
    for (int lane = 0; lane < 8; lane++) {
      __m512 acc[2][R][2];
      repeat<2>(SKYLINE_EACH(half) {
        repeat<R>(SKYLINE_EACH(r) { acc[half][r][0] = acc[half][r][1] = _mm512_setzero_ps(); });
        for (int64_t v = 0; v < vectors; v++) {
          const int64_t pair = Pairs<KV>::pair(v, lane + 8 * half);
          if (2 * pair >= width_) continue;
          const bf16* keys = packed_ + 32 * pair;
          const __m512i a = _mm512_load_si512(keys), b = _mm512_load_si512(keys + 16 * width_);
          repeat<R>(SKYLINE_EACH(r) {
            const __m512i x = spread_four(q + r * width_ + 2 * pair);
            acc[half][r][0] = dot(acc[half][r][0], x, a);
            acc[half][r][1] = dot(acc[half][r][1], x, b);
          });
        }
      });
      repeat<R>(SKYLINE_EACH(r) {
        repeat<2>(SKYLINE_EACH(t) {
          const __m512 sum = _mm512_add_ps(acc[0][r][t], acc[1][r][t]);
          total[r][t] = lane == 0 ? sum : _mm512_add_ps(total[r][t], sum);
        });
      });
    }
    float* to = scores(head, row) + chunk * kChunk;
    repeat<R>(SKYLINE_EACH(r) { repeat<2>(SKYLINE_EACH(t) { _mm512_store_ps(to + r * kStride + 16 * t, total[r][t]); }); });
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

  const View view_;
  const int64_t dim_, width_;
  const int heads_;
  const Scoring scoring_;
  bf16 *q_, *packed_;
  float *scores_, *mixed_, *k_scale_, *v_scale_;
  int64_t* slots_;
  Span* spans_;  // what each row of a head sees of the split
  RowSum* sums_;
  KV* nothing_;
};

}  // namespace skyline::attention

#endif
