// The ends of a decode step, in which each of R requests computes one token: what the model reads, and where its tokens go.
#include <algorithm>

#include "tensors.h"

namespace skyline {
namespace {

template <class T>
T* vector_of(const TensorView& t, int64_t length, bool right_type) {
  SKYLINE_CHECK(right_type && t.ndim() == 1 && t.shape()[0] == length && (length <= 1 || t.stride(0) == 1),
                "takes vectors, one element a request");
  return data<T>(t);
}

// Where slot `slot` has position `at` in rows [slots, positions].
template <class T>
T& at(const Rows<T>& rows, int64_t slot, int64_t position) {
  SKYLINE_CHECK(slot >= 0 && slot < rows.rows && position >= 0 && position < rows.cols, "there is no such slot or position");
  return rows[slot][position];
}

}  // namespace

// ids, positions int64 [R] and context_lens int32 [R] of the tokens at starts int64 [R] of slots int64 [R] in token_ids int32
// [slots, positions].
void decode_inputs(TensorView ids, TensorView positions, TensorView context_lens, TensorView slots, TensorView starts,
                   TensorView token_ids) {
  SKYLINE_CHECK(is_int32(token_ids), "takes token ids of int32");
  const int64_t count = ids.shape()[0];
  int64_t *id = vector_of<int64_t>(ids, count, is_int64(ids)), *position = vector_of<int64_t>(positions, count, is_int64(positions));
  int32_t* context = vector_of<int32_t>(context_lens, count, is_int32(context_lens));
  const int64_t *slot = vector_of<int64_t>(slots, count, is_int64(slots)), *start = vector_of<int64_t>(starts, count, is_int64(starts));
  const Rows<int32_t> tokens = rows_of<int32_t>(token_ids);
  for (int64_t r = 0; r < count; r++) {
    id[r] = at(tokens, slot[r], start[r]);
    position[r] = start[r];
    context[r] = static_cast<int32_t>(start[r] + 1);
  }
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_inputs, decode_inputs);

// tables int32 [R, blocks]: the slots' rows of all int32 [slots, blocks], as far as their contexts reach; places int64 [R]:
// where the tokens at `starts` lie in a cache of such blocks.
void decode_places(TensorView places, TensorView tables, TensorView all, TensorView slots, TensorView starts, int64_t block_size) {
  SKYLINE_CHECK(is_int32(tables) && is_int32(all) && block_size > 0, "takes block tables of int32");
  const int64_t count = places.shape()[0];
  int64_t* place = vector_of<int64_t>(places, count, is_int64(places));
  const int64_t *slot = vector_of<int64_t>(slots, count, is_int64(slots)), *start = vector_of<int64_t>(starts, count, is_int64(starts));
  const Rows<int32_t> from = rows_of<int32_t>(all), to = rows_of<int32_t>(tables);
  SKYLINE_CHECK(to.rows == count && to.cols == from.cols, "takes tables of one width");
  for (int64_t r = 0; r < count; r++) {
    const int64_t last = start[r] / block_size, block = at(from, slot[r], last);
    std::copy_n(from[slot[r]], last + 1, to[r]);
    place[r] = block * block_size + start[r] % block_size;
  }
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_places, decode_places);

// Puts tokens int64 [R] behind those at `starts` of the slots.
void decode_outputs(TensorView token_ids, TensorView slots, TensorView starts, TensorView tokens) {
  SKYLINE_CHECK(is_int32(token_ids), "takes token ids of int32");
  const int64_t count = tokens.shape()[0];
  const int64_t* token = vector_of<int64_t>(tokens, count, is_int64(tokens));
  const int64_t *slot = vector_of<int64_t>(slots, count, is_int64(slots)), *start = vector_of<int64_t>(starts, count, is_int64(starts));
  const Rows<int32_t> to = rows_of<int32_t>(token_ids);
  for (int64_t r = 0; r < count; r++) at(to, slot[r], start[r] + 1) = static_cast<int32_t>(token[r]);
}
TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_outputs, decode_outputs);

}  // namespace skyline
