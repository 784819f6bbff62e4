// Sequences of different lengths as calls of their own: where the rows of each lie, and its Operands.
#pragma once
#include <vector>

#include "kernels.h"

namespace fastattn {

// The rows of a call's tensors that belong to one sequence: q_rows from q_row on, and k_rows from k_row on of entry
// k_entry of k and v, or of the pages.
struct Sequence {
  int64_t q_entry, q_row, q_rows, k_entry, k_row, k_rows;
  Pages pages;
};

class PlacedSequences {
  const Operands& whole;
  const Sequences& s;
  std::vector<std::vector<int64_t>> tables;  // copies, so that what has been checked stays so
  double bytes = 0;                          // of all sequences, once they are placed

  void place_queries();
  void place_keys();
  void place_in_cache();
  void place_in_pages(int64_t i, int64_t from, int64_t to);
  void check_appended() const;

 public:
  std::vector<Sequence> sequences;

  // std::invalid_argument that names the entry which is out of range. Reads nothing but lists and writes nothing.
  PlacedSequences(const Operands& whole, const Sequences& s);
  PlacedSequences(const PlacedSequences&) = delete;

  // The call that sequence i is, and its gradients.
  Operands operands(int64_t i) const;
  Gradients gradients(const Gradients& whole, int64_t i) const;
};

// Writes the new rows into the caches, turned by rotary embedding. Queries that turn go to `rotated`, which becomes q.
void append(Operands& whole, const Sequences& s, const PlacedSequences& placed, std::vector<char>& rotated,
            int threads);

}  // namespace fastattn
