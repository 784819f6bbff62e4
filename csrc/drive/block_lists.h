// BlockMask -> BlockLists, with every index checked: no kernel reads what a list says before this has.
#pragma once
#include <vector>

#include "operands.h"

namespace fastattn {

// Owns what `lists` points to.
class OwnedLists {
  std::vector<int64_t> first;
  std::vector<Visit> visits;

 public:
  BlockLists lists{};

  // std::invalid_argument for a count or an index out of range, and for a block that is listed twice or out of order.
  OwnedLists(const Operands& p, bool transposed);
  OwnedLists(const OwnedLists&) = delete;
};

}  // namespace fastattn
