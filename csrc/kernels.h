// What an instruction set offers the driver: a table of functions for each real type, and how these cut their work.
#pragma once
#include "operands.h"

namespace fastattn {

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

// Row r of a unit's partial result: out [rows][head_dim_v] not yet divided by the sum, its maximum and sum.
struct Partial {
  char* out;
  char* max;
  char* sum;
};

// How a backward pass is cut, from the shape, the CPU and whether a dense dbias is wanted.
struct BackwardBlocking {
  int lanes;       // query rows of a panel (NR)
  int block_rows;  // query rows of a block, a multiple of lanes
  int n_block;     // keys of a tile
  int num_splits;  // key ranges of a head that are computed apart, each with a dq of its own
  int64_t split_keys;
  int64_t partial_size;  // elements of the dq of one query head and one split
  bool sums_diagonals;   // whether the gradient of a relative bias is wanted
  int64_t last_queries;  // those at the end of a head whose products have columns in the lanes (few_queries.h)
};

// One key range of a key head; of several heads and batches, one after the other, where these share a dense dbias.
struct KeyUnit {
  int32_t batch, head_k, split;
  int32_t batches, heads_k;
};

// Rows first ... last - 1 of some key heads and batches, one after the other.
struct CsrUnit {
  int64_t batch, head_k, batches, heads_k, first, last;
};

// Rows 0 ... rows - 1 of a head of `from`, with or without a turn by rotary embedding, to rows to_row ... of `to`.
struct RowMove {
  Tensor from, to;
  int64_t batch, head;  // the head of both
  int64_t to_batch, to_row, rows, columns;
  int64_t position, step;  // of row 0, and from row to row
  bool turns;
};

// The kernels of one instruction set that compute in float, or in double.
struct Kernels {
  Blocking (*blocking)(const Operands&);
  int64_t (*scratch_bytes)(const Operands&, const Blocking&);
  // Sets unit.k_lo, k_hi and keys.
  void (*find_keys)(const Operands&, const Blocking&, Unit&);
  // Computes a unit into out and lse (num_splits == 1) or into its partial result.
  void (*run_unit)(const Operands&, const Blocking&, const Unit&, const Partial&, char* scratch);
  // Fills Operands::laid_bias, of batch entry 0, for panels of `lanes` rows; scratch: lanes * seqlen_k elements.
  void (*lay_bias)(const Operands&, int lanes, char* to, char* scratch);
  // Adds Gradients::laid_bias to dbias; scratch: lanes * seqlen_k elements.
  void (*add_laid_bias)(const Operands&, const Gradients&, int lanes, char* scratch);
  // Combines the partial results of a row block's splits into out and lse; `first` is that of split 0.
  void (*combine)(const Operands&, const Blocking&, const Unit&, const Partial& first, char* scratch);
  // The same three of few query rows a key head (decode.h); find_keys and combine serve both.
  Blocking (*decode_blocking)(const Operands&);
  int64_t (*decode_scratch_bytes)(const Operands&, const Blocking&);
  void (*run_decode_unit)(const Operands&, const Blocking&, const Unit&, const Partial&, char* scratch);
  Blocking (*tangent_blocking)(const Operands&);
  int64_t (*tangent_scratch_bytes)(const Operands&, const Blocking&);
  // The tangents of out and lse of a unit, which has all its keys (num_splits == 1).
  void (*run_tangent_unit)(const Operands&, const Tangents&, const Blocking&, const Unit&, char* scratch);
  // num_splits: groups of row blocks, every num_splits-th block each.
  Blocking (*statistics_blocking)(const Operands&);
  int64_t (*statistics_scratch_bytes)(const Operands&, const Blocking&);
  // The statistics of the rows of a group of a query head; adds their weights to key_mass, null or [seqlen_k].
  void (*run_statistics_unit)(const Operands&, const Statistics&, const Blocking&, int64_t batch, int64_t head,
                              int64_t group, char* key_mass, char* scratch);
  // key_mass of a query head from those of its groups; `first` is that of group 0.
  void (*add_groups)(const Operands&, const Statistics&, const Blocking&, int64_t batch, int64_t head,
                     const char* first);
  BackwardBlocking (*backward_blocking)(const Operands&, const Gradients&);
  int64_t (*backward_scratch_bytes)(const Operands&, const BackwardBlocking&);
  // About how many (query, key) pairs the unit has; for the order of the units.
  double (*count_pairs)(const Operands&, const BackwardBlocking&, const KeyUnit&);
  // Computes dk and dv of a unit, and dq (num_splits == 1) or its partial results, one for each batch and query head.
  void (*run_key_unit)(const Operands&, const Gradients&, const BackwardBlocking&, const KeyUnit&, char* partial,
                       int64_t partial_stride, char* scratch);
  // dq of rows row ... row + block_rows - 1 of a query head from the partial results of its splits, stride apart.
  void (*combine_dq)(const Operands&, const Gradients&, const BackwardBlocking&, int64_t batch, int64_t head,
                     int64_t row, const char* partial, char* scratch);
  int64_t (*csr_scratch_bytes)(const Operands&);
  // out and lse of a unit of queries.
  void (*csr_forward)(const Operands&, const Csr&, const CsrUnit&, char* scratch);
  // Of a unit of queries: what csr_backward_keys wants to know of each, [batch][num_heads][seqlen_q] of 3 elements in
  // `stats`; dq and dbias.
  void (*csr_backward_rows)(const Operands&, const Gradients&, const Csr&, const CsrUnit&, char* stats, char* scratch);
  // dk and dv of a unit of keys, by the transposed lists.
  void (*csr_backward_keys)(const Operands&, const Gradients&, const Csr&, const CsrUnit&, char* stats, char* scratch);
  void (*move_rows)(const RowMove&, const Sequences&, char* scratch);
  // `steps` rounds of independent multiply-adds on registers; returns how many FLOPs they were.
  double (*multiply_adds)(int64_t steps);
};

// What an isa_*.cpp offers, compiled for both real types.
struct InstructionSet {
  const char* name;
  const Kernels *of_float, *of_double;
  // Its name where products are of pairs of bfloat16; null: none are.
  const char* with_pairs = nullptr;

  const Kernels& kernels_for(DType dtype) const { return dtype == DType::float64 ? *of_double : *of_float; }
};

}  // namespace fastattn
