#include "block_lists.h"

#include <stdexcept>
#include <string>

namespace fastattn {
namespace {

int32_t element(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t column = 0) {
  const int64_t offset = batch * t.stride[0] + head * t.stride[1] + row * t.stride[2] + column * t.stride[3];
  return ((const int32_t*)t.data)[offset];
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("block_mask: " + what); }

// The indices of one row, checked, in order of their blocks.
class RowOfBlocks {
  struct List {
    const Tensor& indices;
    int64_t count, next = 0;
    int32_t last = -1;
  };

  const BlockMask& mask;
  const int64_t batch, head, row, columns;
  List partial, full;

  int64_t counted(const Tensor& count, int64_t longest) const {
    const int32_t n = element(count, batch, head, row);
    if (n < 0 || n > longest)
      refuse("a row has " + std::to_string(n) + " blocks in a list of " + std::to_string(longest));
    return n;
  }
  int32_t peek(const List& list) const {
    if (list.next == list.count) return INT32_MAX;
    const int32_t block = element(list.indices, batch, head, row, list.next);
    if (block < 0 || block >= columns)
      refuse("block " + std::to_string(block) + " is not in 0 ... " + std::to_string(columns - 1));
    if (block <= list.last) refuse("the blocks of a row must ascend");
    return block;
  }

 public:
  RowOfBlocks(const BlockMask& mask, int64_t batch, int64_t head, int64_t row, int64_t columns)
      : mask(mask),
        batch(batch),
        head(head),
        row(row),
        columns(columns),
        partial{mask.partial, counted(mask.num_partial, mask.longest_partial)},
        full{mask.full, counted(mask.num_full, mask.longest_full)} {}

  bool next(Visit& visit) {
    const int32_t p = peek(partial), f = peek(full);
    if (p == f && p != INT32_MAX) refuse("block " + std::to_string(p) + " is both partial and full");
    if (p == f) return false;
    if (f < p) {
      visit = {full.last = f, -1};
      full.next++;
      return true;
    }
    const int32_t bitmap = element(mask.bitmap, batch, head, row, partial.next++);
    if (bitmap < 0 || bitmap >= mask.num_bitmaps) refuse("bitmap " + std::to_string(bitmap) + " does not exist");
    visit = {partial.last = p, bitmap};
    return true;
  }
};

}  // namespace

OwnedLists::OwnedLists(const Operands& p, bool transposed) {
  const BlockMask& mask = p.block_mask;
  const int64_t rows = (p.seqlen_q + mask.block_q - 1) / mask.block_q;
  const int64_t columns = (p.seqlen_k + mask.block_k - 1) / mask.block_k;
  const bool by_batch = mask.num_partial.stride[0], by_head = mask.num_partial.stride[1];
  const int64_t batches = by_batch ? p.batch : 1, heads = by_head ? p.num_heads : 1;
  const int64_t per_head = transposed ? columns : rows;
  first.assign(batches * heads * per_head + 1, 0);
  // Rows come one after the other; a transposed list is filled from its end, rows backwards, once all are counted.
  auto each = [&](auto&& visit_block) {
    for (int64_t list = batches * heads * rows - 1; list >= 0; list--) {
      const int64_t head = list / rows % heads, batch = list / rows / heads, row = list % rows;
      RowOfBlocks blocks(mask, batch, head, row, columns);
      for (Visit visit; blocks.next(visit);)
        visit_block(transposed ? (batch * heads + head) * columns + visit.block : list, visit, row);
    }
  };
  each([&](int64_t list, const Visit&, int64_t) { first[list + 1]++; });
  for (size_t i = 1; i < first.size(); i++) first[i] += first[i - 1];
  visits.resize(first.back());
  std::vector<int64_t> next(first.begin() + transposed, first.end() - !transposed);
  each([&](int64_t list, const Visit& visit, int64_t row) {
    visits[transposed ? --next[list] : next[list]++] = transposed ? Visit{(int32_t)row, visit.bitmap} : visit;
  });
  lists = {mask.block_q,  mask.block_k, by_batch ? heads * per_head : 0, by_head ? per_head : 0, first.data(),
           visits.data(), mask.bitmaps};
}

}  // namespace fastattn
