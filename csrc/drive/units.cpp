#include "units.h"

#include <algorithm>

namespace fastattn {

Units::Units(const Operands& p, const Kernels& kernels, const Blocking& b, int threads, int64_t least_rows) {
  const int64_t stacked = b.heads_per_unit * p.seqlen_q, blocks = (stacked + b.rows - 1) / b.rows;
  units.reserve(p.batch * (p.num_heads / b.heads_per_unit) * blocks * b.num_splits);
  for (int64_t batch = 0; batch < p.batch; batch++)
    for (int64_t head = 0; head < p.num_heads; head += b.heads_per_unit)
      for (int64_t row = 0; row < stacked; row += b.rows)
        for (int64_t split = 0; split < b.num_splits; split++) {
          Unit unit{(int32_t)batch, (int32_t)head, (int32_t)split, row, 0, 0, 0};
          kernels.find_keys(p, b, unit);
          pairs += (double)unit.keys * std::max(std::min<int64_t>(b.rows, stacked - row), least_rows);
          units.push_back(unit);
        }
  if (threads <= 1 || size() <= 1) return;
  const int64_t per_head = blocks * b.num_splits;
  order.resize(units.size());
  for (int64_t i = 0; i < size(); i++) order[i] = i;
  auto keys = [&](int64_t i) { return units[i].keys; };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return i / per_head != j / per_head ? i < j : keys(i) > keys(j); });
}

}  // namespace fastattn
