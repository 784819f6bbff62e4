// One attention call as plain data: what crosses the border between the bindings, the driver and the ISA files.
#pragma once
#include <cstdint>

namespace fastattn {

enum class DType : int8_t { float32, float64, bfloat16, float16, boolean, uint8, int32, int64 };

// A tensor seen as [batch, heads, rows, columns]; strides in elements, 0 where it broadcasts. data is null if absent.
struct Tensor {
  char* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::float32;

  explicit operator bool() const { return data != nullptr; }
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

struct Problem {
  int64_t batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v;
  Tensor q, k, v, out, lse;  // lse [batch, num_heads, seqlen_q, 1], absent or float32 (float64 for float64)
  // [batch, num_heads, seqlen_q, 2] in lse's dtype, absent unless a backward pass follows: lse in units of log2 as
  // reference point + log2 of the sum. One rounded number would not do beside a bias of -1e38.
  Tensor lse_parts;
  Tensor out_exact;            // out before it is rounded to 16 bits; absent if nobody asks
  Tensor mask, bias;           // bool, float; [batch, num_heads, seqlen_q, seqlen_k]
  Tensor alibi_slopes, sinks;  // [batch, num_heads, 1, 1]
  Tensor scales;               // the same, absent or instead of softmax_scale
  Tensor k_start, k_end;       // int32 [batch, num_heads, seqlen_q, 1]
  BlockMask block_mask{};
  const BlockLists* blocks = nullptr;  // block_mask, by queries in a forward pass and by keys in a backward pass
  double softmax_scale, softcap;
  int64_t diagonal_lo, diagonal_hi;  // a query sees keys with lo <= key - query <= hi
  double keep_factor = 1.0;          // of the weights that dropout leaves: 1 / (1 - dropout_p)
  uint64_t seed = 0;
  uint32_t drop_below = 0;           // a weight is dropped if its word is below: dropout_p * 2^32
  int skip_negligible = -1;          // whether tiles that change nothing are looked for; -1: where that is known to pay
  double* tile_facts = nullptr;      // of a forward pass that skips: [batch][num_heads_k][tiles][2], -1: not found yet
  int64_t* skipped_pairs = nullptr;  // counts the (query, key) pairs that were skipped

  bool drops() const { return keep_factor != 1.0; }
  // Whether tiles that change nothing are looked for in some head (skip.h). A bias may be anything.
  bool may_skip() const { return !bias && (skip_negligible < 0 ? alibi_slopes && seqlen_q >= 128 : skip_negligible); }
};

int64_t l1_data_bytes();  // of this CPU

// How a problem is cut. It follows from the shape and the CPU alone, never from the number of threads or the batch size:
// the bits of a row depend on it.
struct Blocking {
  int lanes;           // query rows of a panel (NR), a multiple of the vector length
  int rows;            // query rows of a unit, a multiple of lanes
  int n_block;         // keys of a tile
  int heads_per_unit;  // query heads stacked as rows of one unit: the group if one head does not fill a unit, else 1
  int num_splits;      // key ranges of a row block that are computed apart and combined
  int64_t split_keys;  // keys of such a range, a multiple of n_block
};

// One row block of one key head, against the keys of one split.
struct Unit {
  int32_t batch, head, split;  // first query head
  int64_t row;                 // first stacked row: row r is query r % seqlen_q of head + r / seqlen_q
  int64_t k_lo, k_hi;          // keys that some row of the block sees, within the split
  int64_t keys;                // how many it visits
};

// Row r of a unit's partial result: out [rows][head_dim_v] not yet divided by the sum, its maximum (log2) and sum.
struct Partial {
  char* out;
  char* max;
  char* sum;
};

// What a backward pass reads and writes beside its Problem.
struct Gradients {
  Tensor dout, dlse;  // as out, and [batch, num_heads, seqlen_q, 1], absent: zero
  Tensor dq, dk, dv;  // absent: not wanted
  // Sums over what their tensors broadcast over, from zero; float64, but a dbias with both seqlens, or of edges, in q's
  // compute dtype.
  Tensor dbias, dalibi_slopes, dsinks, dscales;
  // What the units leave for those sums, null if not wanted: dbias by key or by query, dalibi_slopes by split, dsinks and
  // dscales by query.
  double *key_sums = nullptr, *query_sums = nullptr;   // [batch][num_heads][seqlen_k], [batch][num_heads][seqlen_q]
  double* slope_sums = nullptr;                        // [batch][num_heads][num_splits]
  double *sink_sums = nullptr, *scale_sums = nullptr;  // [batch][num_heads][seqlen_q]

  bool dense_bias() const { return dbias && dbias.stride[2] && dbias.stride[3]; }
  bool needs_dq() const { return dq || scale_sums; }
};

// How a backward pass is cut, from the shape, the CPU and whether a dense dbias is wanted.
struct BackwardBlocking {
  int lanes;       // query rows of a panel (NR)
  int block_rows;  // query rows of a block, a multiple of lanes
  int n_block;     // keys of a tile
  int num_splits;  // key ranges of a head that are computed apart, each with a dq of its own
  int64_t split_keys;
  int64_t partial_size;  // elements of the dq of one query head and one split
};

// One key range of a key head; of several heads and batches, one after the other, where these share a dense dbias.
struct KeyUnit {
  int32_t batch, head_k, split;
  int32_t batches, heads_k;
};

// Edges as compressed sparse rows; bias of the Problem is [batch, num_heads, 1, num_edges]. Or transposed: row j holds the
// queries that see key j, ascending, and `edges` says where each edge stands in the bias.
struct Csr {
  Tensor indptr, indices;  // int32 or int64, [1, 1, 1, rows + 1] and [1, 1, 1, num_edges]
  int64_t num_edges;
  const int64_t* edges;  // null: in the order of indices
};

// Rows first ... last - 1 of some key heads and batches, one after the other.
struct CsrUnit {
  int64_t batch, head_k, batches, heads_k, first, last;
};

// What an ISA file offers.
struct Kernels {
  const char* name;
  Blocking (*blocking)(const Problem&);
  int64_t (*scratch_bytes)(const Problem&, const Blocking&);
  // Sets unit.k_lo, k_hi and keys.
  void (*find_keys)(const Problem&, const Blocking&, Unit&);
  // Computes a unit into out and lse (num_splits == 1) or into its partial result.
  void (*run_unit)(const Problem&, const Blocking&, const Unit&, const Partial&, char* scratch);
  // Combines the partial results of a row block's splits into out and lse; `first` is that of split 0.
  void (*combine)(const Problem&, const Blocking&, const Unit&, const Partial& first, char* scratch);
  BackwardBlocking (*backward_blocking)(const Problem&, const Gradients&);
  int64_t (*backward_scratch_bytes)(const Problem&, const BackwardBlocking&);
  // About how many (query, key) pairs the unit has; for the order of the units.
  double (*count_pairs)(const Problem&, const BackwardBlocking&, const KeyUnit&);
  // Computes dk and dv of a unit, and dq (num_splits == 1) or its partial results, one for each batch and query head.
  void (*run_key_unit)(const Problem&, const Gradients&, const BackwardBlocking&, const KeyUnit&, char* partial,
                       int64_t partial_stride, char* scratch);
  // dq of rows row ... row + block_rows - 1 of a query head from the partial results of its splits, stride apart.
  void (*combine_dq)(const Problem&, const Gradients&, const BackwardBlocking&, int64_t batch, int64_t head,
                     int64_t row, const char* partial, char* scratch);
  int64_t (*csr_scratch_bytes)(const Problem&);
  // out and lse of a unit of queries.
  void (*csr_forward)(const Problem&, const Csr&, const CsrUnit&, char* scratch);
  // Of a unit of queries: what csr_backward_keys wants to know of each, [batch][num_heads][seqlen_q] of 3 elements in
  // `stats`; dq and dbias.
  void (*csr_backward_rows)(const Problem&, const Gradients&, const Csr&, const CsrUnit&, char* stats, char* scratch);
  // dk and dv of a unit of keys, by the transposed lists.
  void (*csr_backward_keys)(const Problem&, const Gradients&, const Csr&, const CsrUnit&, char* stats, char* scratch);
  // `steps` rounds of independent multiply-adds on registers; returns how many FLOPs they were.
  double (*multiply_adds)(DType, int64_t steps);
};

}  // namespace fastattn
