// The units of a pass over queries: what it computes, and in which order.
#pragma once
#include <vector>

#include "kernels.h"

namespace fastattn {

struct Units {
  std::vector<Unit> units;  // the splits of a row block stand together
  double pairs = 0;         // about how many (query, key) pairs they visit

  // least_rows: a unit of fewer rows takes as long as one of so many.
  // threads > 1: a head's row blocks longest first, so that the last units are short ones and the threads end together.
  Units(const Operands& p, const Kernels& kernels, const Blocking& blocking, int threads, int64_t least_rows = 1);

  int64_t size() const { return (int64_t)units.size(); }
  // The place in `units` of the one to compute after `index` others.
  int64_t place(int64_t index) const { return order.empty() ? index : order[index]; }

 private:
  std::vector<int64_t> order;
};

}  // namespace fastattn
