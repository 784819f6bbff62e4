// One attention call as plain data: its tensors, sizes and numbers, which the bindings fill, the driver completes and the
// kernels read; and the table of the tensors that a call may add to q, k and v.
#pragma once
#include <cstdint>

namespace fastattn {

enum class DType : int8_t { float32, float64, bfloat16, float16, boolean, uint8, int32, int64, int8 };
constexpr int64_t bytes_of_dtype[] = {4, 8, 2, 2, 1, 1, 4, 8, 1};

// Where the rows of a sequence lie in a cache [pages, heads, size, columns]: row i is row (first + i) % size of the page
// table[(first + i) / size].
struct Pages {
  const int64_t* table;
  int64_t size, first;
};

// A tensor seen as [batch, heads, rows, columns]; strides in elements, 0 where it broadcasts. data is null if absent.
struct Tensor {
  char* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::float32;
  const Pages* pages = nullptr;  // null: rows lie stride[2] apart
  const Tensor* factors =
      nullptr;  // [batch, heads, rows, 1], float32: what the elements of an int8 row are multiplied by

  explicit operator bool() const { return data != nullptr; }

  // The tensor from row `row` of batch entry `batch` on.
  Tensor from(int64_t batch, int64_t row) const {
    Tensor t = *this;
    if (data) t.data += (batch * stride[0] + row * stride[2]) * bytes_of_dtype[(int)dtype];
    return t;
  }
};

// Which blocks of keys a block of queries visits, as it comes from fastattn.BlockMask; int32 [batch, num_heads, rows] and
// [batch, num_heads, rows, longest], broadcast as all tensors.
struct BlockMask {
  int64_t block_q, block_k;
  Tensor num_partial, partial, bitmap, num_full, full;
  int64_t longest_partial, longest_full;
  const uint8_t* bitmaps;  // [num_bitmaps][block_q][block_k / 8]: bit j % 8 of byte j / 8 is key j
  int64_t num_bitmaps;

  explicit operator bool() const { return block_q != 0; }
};

struct Visit {
  int32_t block, bitmap;  // bitmap < 0: the block is full
};

// The same as one list for each block of queries, or transposed for each block of keys, ascending.
struct BlockLists {
  int64_t block_q, block_k;
  int64_t batch_stride, head_stride;  // in lists; 0: shared
  const int64_t* first;               // of list i in `visits`; that of list i + 1 ends it
  const Visit* visits;
  const uint8_t* bitmaps;

  int64_t index(int64_t batch, int64_t head, int64_t block) const {
    return batch * batch_stride + head * head_stride + block;
  }
  const uint8_t* bitmap(const Visit& visit) const {
    return visit.bitmap < 0 ? nullptr : bitmaps + visit.bitmap * block_q * (block_k / 8);
  }
};

// Where query 0 of head 0, and key 0, of a call stand in the whole by whose places dropout's bits are drawn.
struct DropoutStart {
  int64_t head = 0, query = 0, key = 0;
};

// Angles of positions: the first 2 * pairs columns of a row turn by those of its position.
struct Rotary {
  Tensor cos, sin;  // [batch, 1, positions, pairs], absent or both there
  int64_t positions = 0, pairs = 0;
  bool interleaved = false;  // columns 2 i and 2 i + 1 are a pair, not i and i + pairs

  explicit operator bool() const { return (bool)cos; }
};

// The tensors are the callers', read and written in place; those that are absent have no data.
struct Operands {
  int64_t batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v;
  Tensor k_factors, v_factors;  // of the rows of k and v where these are int8
  Tensor q, k, v, out, lse;     // lse [batch, num_heads, seqlen_q, 1], absent or float32 (float64 for float64)
  // [batch, num_heads, seqlen_q, 2] in lse's dtype, absent unless a backward pass follows: lse as
  // reference point + log of the sum. One rounded number would not do beside a bias of -1e38.
  Tensor lse_parts;
  Tensor out_exact;            // out before it is rounded to 16 bits; absent if nobody asks
  Tensor mask, bias;           // bool, float; [batch, num_heads, seqlen_q, seqlen_k]
  Tensor relative;             // [batch, num_heads, 1, num_diagonals()]: what `bias` reads then, see `along_diagonals`
  Tensor alibi_slopes, sinks;  // [batch, num_heads, 1, 1]
  Tensor scales;               // the same, absent or instead of softmax_scale
  Tensor k_start, k_end;       // int32 [batch, num_heads, seqlen_q, 1]
  // bias and mask as panels read them, [num_heads][panels][seqlen_k][lanes] in the dtype of computing; null: not laid.
  const char* laid_bias = nullptr;
  Rotary rotary;  // of key j by position j, of query i by query_start + i
  BlockMask block_mask{};
  // Products are of pairs of bfloat16, to which weights are rounded: forward and backward.
  bool in_pairs = false;
  bool keys_are_near = false;          // other queries have just read them
  double sequences_bytes = 0;          // `bytes` of all sequences of which this is one
  const BlockLists* blocks = nullptr;  // block_mask, by queries in a forward pass and by keys in a backward pass
  double softmax_scale, softcap;
  int64_t diagonal_lo, diagonal_hi;  // a query sees keys with lo <= key - query <= hi
  int64_t query_start;  // where query 0 stands among the keys; ALiBi's distances and rotary positions count from there
  double keep_factor = 1.0;  // of the weights that dropout leaves: 1 / (1 - dropout_p)
  uint64_t seed = 0;
  DropoutStart dropout_start;
  uint32_t drop_below = 0;       // a weight is dropped if its word is below: dropout_p * 2^32
  int skip_negligible = -1;      // whether tiles that change nothing are looked for; -1: where that is known to pay
  double* tile_facts = nullptr;  // of a forward pass that skips: [batch][num_heads_k][tiles][2], -1: not found yet
  // Asked within units that may take seconds: whether the call has failed or was interrupted, and its results are no use.
  bool (*ended)() = nullptr;
  int64_t* skipped_pairs = nullptr;  // counts the (query, key) pairs that were skipped

  // Query heads that share a key head, and the key head of a query head; most often without a division.
  int64_t group_size() const { return num_heads == num_heads_k ? 1 : num_heads / num_heads_k; }
  int64_t head_k(int64_t head) const { return num_heads == num_heads_k ? head : head / group_size(); }
  // Of the rows of q, k, v and out.
  double bytes() const {
    const double of_queries = (double)num_heads * seqlen_q * bytes_of_dtype[(int)q.dtype];
    const double of_keys = (double)num_heads_k * seqlen_k * bytes_of_dtype[(int)k.dtype];
    return batch * (of_queries + of_keys) * (head_dim + head_dim_v);
  }
  // The factors of int8 rows are part of this call.
  void link_factors() { k.factors = k_factors ? &k_factors : nullptr, v.factors = v_factors ? &v_factors : nullptr; }
  // Whether rows are bfloat16 as they lie in memory, so that products of pairs may read them.
  bool has_pairs() const { return q.dtype == DType::bfloat16 && k.dtype == q.dtype && v.dtype == q.dtype && !rotary; }
  bool must_end() const { return ended && ended(); }
  // Whether no diagonal and no bounds of a row hide keys.
  bool sees_all() const { return !k_start && !k_end && diagonal_lo <= 1 - seqlen_q && diagonal_hi >= seqlen_k - 1; }
  int64_t num_diagonals() const { return seqlen_q + seqlen_k > 0 ? seqlen_q + seqlen_k - 1 : 0; }
  // A tensor of diagonals as one of scores, whose entry (i, j) is the vector's entry i - j + seqlen_k - 1.
  Tensor along_diagonals(Tensor t) const {
    if (t && seqlen_k) t.data += (seqlen_k - 1) * t.stride[3] * bytes_of_dtype[(int)t.dtype];
    t.stride[2] = t.stride[3], t.stride[3] = -t.stride[3];
    return t;
  }
  bool drops() const { return keep_factor != 1.0; }
  // Whether tiles that change nothing are looked for in some head (skip.h). A bias may be anything.
  bool may_skip() const { return !bias && (skip_negligible < 0 ? alibi_slopes && seqlen_q >= 128 : skip_negligible); }
};

// What a backward pass reads and writes beside its Operands.
struct Gradients {
  Tensor dout, dlse;  // as out, and [batch, num_heads, seqlen_q, 1], absent: zero
  Tensor dq, dk, dv;  // absent: not wanted
  // Sums over what their tensors broadcast over, from zero; float64, but a dbias with both seqlens, or of edges, in q's
  // compute dtype.
  Tensor dbias, drelative, dalibi_slopes, dsinks, dscales;
  // What the units leave for those sums, null if not wanted: each writes its own places, so that no two threads meet.
  double *key_sums = nullptr, *query_sums = nullptr;  // of a dbias without queries or keys: SumsOver::keys or queries
  char* laid_bias = nullptr;  // of a short dbias that the batch shares: its sums in lanes, as Operands::laid_bias lies
  double *slope_sums = nullptr, *sink_sums = nullptr, *scale_sums = nullptr, *diagonal_sums = nullptr;  // tensor_terms

  bool dense_bias() const { return dbias && dbias.stride[2] && dbias.stride[3]; }
  // What a visit adds dS to, or null.
  const Tensor* dbias_rows() const { return dense_bias() && !laid_bias ? &dbias : nullptr; }
  bool needs_dq() const { return dq || scale_sums; }
};

// What a forward-mode pass reads and writes beside its Operands: the tangents of what these hold, and of out and lse.
struct Tangents {
  Tensor q, k, v, bias, relative, alibi_slopes, sinks, scales;  // as what they are the tangents of; absent: zero
  Tensor out, lse;                                              // as out and lse; lse may be absent
};

// What a pass over the weights alone fills in; those that are absent are not wanted.
struct Statistics {
  Tensor key_mass;                // [batch, num_heads, seqlen_k, 1], a key's weights summed over queries
  Tensor entropy, distance, max;  // [batch, num_heads, seqlen_q, 1]
};

// Of what a unit leaves a number for a sum: [batch][num_heads][seqlen_q], [seqlen_k], [num_splits] or
// [num_splits][num_diagonals].
enum class SumsOver : int8_t { queries, keys, splits, diagonals };

enum class Holds : int8_t { floats, booleans, int32s };

// A tensor that a call may add to q, k and v. `name` is that of its field in fastattn's Terms, of which the bindings read
// the tensor, its gradient and its tangent.
struct TensorTerm {
  const char* name;
  Tensor Operands::* tensor;
  int missing_right;  // dimensions of [batch, num_heads, seqlen_q, seqlen_k] that it lacks on the right
  Holds holds;
  Tensor Gradients::* gradient = nullptr;  // null: it has none
  Tensor Tangents::* tangent = nullptr;    // the same
  double* Gradients::* sums = nullptr;     // what the units leave for the gradient; null: bias, whose shape decides
  SumsOver over = SumsOver::queries;
  double Operands::* number = nullptr;  // where the field may be a number instead
};

inline constexpr TensorTerm tensor_terms[] = {
    {"softmax_scale", &Operands::scales, 2, Holds::floats, &Gradients::dscales, &Tangents::scales,
     &Gradients::scale_sums, SumsOver::queries, &Operands::softmax_scale},
    {"k_start", &Operands::k_start, 1, Holds::int32s},
    {"k_end", &Operands::k_end, 1, Holds::int32s},
    {"mask", &Operands::mask, 0, Holds::booleans},
    {"bias", &Operands::bias, 0, Holds::floats, &Gradients::dbias, &Tangents::bias},
    {"alibi_slopes", &Operands::alibi_slopes, 2, Holds::floats, &Gradients::dalibi_slopes, &Tangents::alibi_slopes,
     &Gradients::slope_sums, SumsOver::splits},
    {"sinks", &Operands::sinks, 2, Holds::floats, &Gradients::dsinks, &Tangents::sinks, &Gradients::sink_sums},
    {"relative", &Operands::relative, 1, Holds::floats, &Gradients::drelative, &Tangents::relative,
     &Gradients::diagonal_sums, SumsOver::diagonals},
};

// Sequences of different lengths in one call, as the caller names them; lists are [1, 1, 1, n] of int32 or int64, absent
// ones have no data. The diagonal and query_start of the Operands count from length of keys - length of queries.
struct Sequences {
  int64_t count = 0;
  Tensor cu_seqlens_q,
      cu_seqlens_k;             // [count + 1]: the batch has one entry, the sequences lie one after the other in it
  Tensor seqused_q, seqused_k;  // [count]: how many of its rows a sequence uses; absent: all
  Tensor block_table;           // [1, 1, count, entries]: k and v are [pages, num_heads_k, page_size, columns]
  int64_t page_size = 0;
  int64_t key_entries = 0;                               // batch entries, or pages, of k and v
  Tensor cache_seqlens, cache_batch_idx, cache_leftpad;  // [count]: k and v are caches
  bool is_cache = false;

  // What is appended to the caches first: [count, num_heads_k, new_rows, columns]
  Tensor k, v;
  int64_t new_rows = 0;
  Rotary rotary;              // of what is appended, and of the queries
  bool rotary_steps = false;  // query i turns by cache_seqlens + i, not all alike
};

// Edges as compressed sparse rows; the bias of the Operands is [batch, num_heads, 1, num_edges]. Or transposed: row j holds
// the queries that see key j, ascending, and `edges` says where each edge stands in the bias.
struct Csr {
  Tensor indptr, indices;  // int32 or int64, [1, 1, 1, rows + 1] and [1, 1, 1, num_edges]
  int64_t num_edges;
  const int64_t* edges;  // null: in the order of indices
};

}  // namespace fastattn
