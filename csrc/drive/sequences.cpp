#include "sequences.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "driver.h"
#include "parallel.h"

namespace fastattn {
namespace {

[[noreturn]] void refuse(const char* name, int64_t i, int64_t value, const std::string& rule) {
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "]=" + std::to_string(value) + " " + rule);
}
int64_t in_range(const char* name, int64_t i, int64_t value, int64_t most, const char* of_what) {
  if (value < 0 || value > most) refuse(name, i, value, "must be in 0 ... " + std::to_string(most) + ", " + of_what);
  return value;
}

int64_t entry(const Tensor& list, int64_t i, int64_t row = 0) {
  const int64_t at = row * list.stride[2] + i * list.stride[3];
  return list.dtype == DType::int32 ? ((const int32_t*)list.data)[at] : ((const int64_t*)list.data)[at];
}

// The entries of a list of starts, read once: nobody changes them after the check.
std::vector<int64_t> read_starts(const Tensor& list, const char* name, int64_t count, int64_t total, bool to_the_end) {
  std::vector<int64_t> starts(count + 1);
  for (int64_t i = 0; i <= count; i++) starts[i] = entry(list, i);
  if (starts[0] != 0) refuse(name, 0, starts[0], "must be 0");
  for (int64_t i = 1; i <= count; i++) {
    const int64_t next = starts[i];
    if (next < starts[i - 1])
      refuse(name, i, next, "is below the entry before it; the starts of sequences must not decrease");
    if (next > total) refuse(name, i, next, "must be at most " + std::to_string(total) + ", the rows that there are");
  }
  if (to_the_end && starts[count] != total)
    refuse(name, count, starts[count], "must be the number of rows, " + std::to_string(total));
  return starts;
}

}  // namespace

PlacedSequences::PlacedSequences(const Operands& whole, const Sequences& s) : whole(whole), s(s) {
  sequences.resize(s.count);
  place_queries();
  s.is_cache || s.block_table ? place_in_cache() : place_keys();
  for (int64_t i = 0; i < s.count; i++) bytes += operands(i).bytes();
  if (!whole.rotary.pairs) return;
  for (const Sequence& one : sequences)
    if (one.k_rows > whole.rotary.positions || one.q_rows > one.k_rows)
      throw std::invalid_argument("rotary: sequence " + std::to_string(&one - sequences.data()) + " has " +
                                  std::to_string(one.q_rows) + " queries and " + std::to_string(one.k_rows) +
                                  " keys; it must have no more queries than keys, and no more keys than the " +
                                  std::to_string(whole.rotary.positions) + " positions of the tables");
}

void PlacedSequences::place_queries() {
  std::vector<int64_t> starts;
  if (s.cu_seqlens_q) starts = read_starts(s.cu_seqlens_q, "cu_seqlens_q", s.count, whole.seqlen_q, true);
  for (int64_t i = 0; i < s.count; i++) {
    Sequence& one = sequences[i];
    one = {i, 0, whole.seqlen_q, i, 0, 0, {}};
    if (s.cu_seqlens_q) one.q_entry = 0, one.q_row = starts[i], one.q_rows = starts[i + 1] - starts[i];
    if (!s.seqused_q) continue;
    one.q_rows = in_range("seqused_q", i, entry(s.seqused_q, i), one.q_rows, "the queries of the sequence");
  }
}

void PlacedSequences::place_keys() {
  const auto starts = read_starts(s.cu_seqlens_k, "cu_seqlens_k", s.count, whole.seqlen_k, true);
  for (int64_t i = 0; i < s.count; i++) {
    Sequence& one = sequences[i];
    one.k_entry = 0, one.k_row = starts[i], one.k_rows = starts[i + 1] - starts[i];
    if (!s.seqused_k) continue;
    one.k_rows = in_range("seqused_k", i, entry(s.seqused_k, i), one.k_rows, "the keys of the sequence");
  }
}

// whole.seqlen_k: how many rows a sequence may have.
void PlacedSequences::place_in_cache() {
  const char* name = s.is_cache ? "cache_seqlens" : s.seqused_k ? "seqused_k" : "cu_seqlens_k";
  std::vector<int64_t> starts;
  if (!s.is_cache && !s.seqused_k) starts = read_starts(s.cu_seqlens_k, name, s.count, INT64_MAX, false);
  for (int64_t i = 0; i < s.count; i++) {
    Sequence& one = sequences[i];
    const int64_t seqlen = s.is_cache    ? entry(s.cache_seqlens, i)
                           : s.seqused_k ? entry(s.seqused_k, i)
                                         : starts[i + 1] - starts[i];
    in_range(name, i, seqlen, whole.seqlen_k - s.new_rows,
             s.new_rows ? "the capacity of the cache less what is appended" : "the capacity of the cache");
    if (s.cache_leftpad)
      one.k_row = in_range("cache_leftpad", i, entry(s.cache_leftpad, i), seqlen, "the cache_seqlens of the sequence");
    one.k_rows = seqlen + s.new_rows - one.k_row;
    if (s.rotary && seqlen + std::max(s.new_rows, s.rotary_steps ? one.q_rows : 1) > s.rotary.positions)
      refuse(name, i, seqlen, "leads beyond the " + std::to_string(s.rotary.positions) + " positions of rotary_cos");
    if (s.block_table) {
      place_in_pages(i, one.k_row, seqlen + s.new_rows);
      continue;
    }
    const int64_t place = s.cache_batch_idx ? entry(s.cache_batch_idx, i) : i;
    one.k_entry = in_range("cache_batch_idx", i, place, s.key_entries - 1, "the entries of the cache");
  }
  if (s.new_rows) check_appended();
}

void PlacedSequences::place_in_pages(int64_t i, int64_t from, int64_t to) {
  const int64_t size = s.page_size, first = from / size, end = from < to ? (to + size - 1) / size : first;
  std::vector<int64_t>& table = tables.emplace_back(end - first);
  for (int64_t page = first; page < end; page++) {
    const int64_t number = table[page - first] = entry(s.block_table, page, i);
    if (number < 0 || number >= s.key_entries)
      throw std::invalid_argument("block_table[" + std::to_string(i) + ", " + std::to_string(page) +
                                  "]=" + std::to_string(number) + " must be a page, 0 <= page < " +
                                  std::to_string(s.key_entries));
  }
  sequences[i].pages = {table.data(), size, from % size};
}

// Two sequences that write one row would leave either's in it.
void PlacedSequences::check_appended() const {
  std::vector<std::pair<int64_t, int64_t>> written;  // entry or page, sequence
  for (int64_t i = 0; i < s.count; i++) {
    const Sequence& one = sequences[i];
    if (!s.block_table) {
      written.push_back({one.k_entry, i});
      continue;
    }
    const int64_t first = (one.pages.first + one.k_rows - s.new_rows) / one.pages.size;
    for (int64_t page = first; page < (int64_t)tables[i].size(); page++) written.push_back({tables[i][page], i});
  }
  std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); i++)
    if (written[i].first == written[i - 1].first)
      throw std::invalid_argument(std::string(s.block_table ? "block_table: page " : "cache_batch_idx: entry ") +
                                  std::to_string(written[i].first) + " would be written by sequence " +
                                  std::to_string(written[i - 1].second) + " and by sequence " +
                                  std::to_string(written[i].second) + "; what is appended needs rows of its own");
}

Operands PlacedSequences::operands(int64_t i) const {
  const Sequence& one = sequences[i];
  Operands p = whole;
  p.batch = 1, p.seqlen_q = one.q_rows, p.seqlen_k = one.k_rows;
  const int64_t offset = one.k_rows - one.q_rows;
  p.diagonal_lo += offset, p.diagonal_hi += offset, p.query_start += offset;
  for (Tensor* t : {&p.q, &p.out, &p.lse, &p.lse_parts, &p.out_exact}) *t = t->from(one.q_entry, one.q_row);
  for (Tensor* t : {&p.k, &p.v, &p.k_factors, &p.v_factors}) {
    if (!s.block_table)
      *t = t->from(one.k_entry, one.k_row);
    else if (*t)
      t->pages = &one.pages;
  }
  p.sequences_bytes = bytes;
  p.alibi_slopes = p.alibi_slopes.from(i, 0);
  p.seed = (whole.seed + (uint64_t)i) & INT64_MAX;  // as a call of its own with this seed
  return p;
}

Gradients PlacedSequences::gradients(const Gradients& whole_gradients, int64_t i) const {
  const Sequence& one = sequences[i];
  Gradients g = whole_gradients;
  for (Tensor* t : {&g.dout, &g.dlse, &g.dq}) *t = t->from(one.q_entry, one.q_row);
  for (Tensor* t : {&g.dk, &g.dv}) *t = t->from(one.k_entry, one.k_row);
  g.dalibi_slopes = g.dalibi_slopes.from(i, 0);
  return g;
}

namespace {

struct Appending {
  const Operands& whole;
  const Sequences& s;
  const PlacedSequences& placed;
  const Kernels& kernels;
  Tensor rotated;
};

// Sequence i, row of heads: those of k, then of v, then of q if it turns.
void append_head(void* context, int64_t index, int) {
  const Appending& a = *(const Appending*)context;
  const Operands& whole = a.whole;
  const int64_t heads = 2 * whole.num_heads_k + (a.rotated ? whole.num_heads : 0), i = index / heads;
  int64_t head = index % heads;
  Operands p = a.placed.operands(i);
  p.link_factors();
  const int64_t at = p.seqlen_k - a.s.new_rows, position = a.placed.sequences[i].k_row + at;
  RowMove move{a.s.k, p.k, i, head, 0, at, a.s.new_rows, whole.head_dim, position, 1, (bool)a.s.rotary};
  if (head >= 2 * whole.num_heads_k) {
    const int64_t rows = p.seqlen_q;
    head -= 2 * whole.num_heads_k;
    move = {whole.q, a.rotated, i, head, i, 0, rows, whole.head_dim, position, (int64_t)a.s.rotary_steps, true};
  } else if (head >= whole.num_heads_k) {
    move.from = a.s.v, move.to = p.v, move.head = head - whole.num_heads_k, move.columns = whole.head_dim_v;
    move.turns = false;
  }
  a.kernels.move_rows(move, a.s, thread_scratch(move.columns * 8));
}

}  // namespace

void append(Operands& whole, const Sequences& s, const PlacedSequences& placed, std::vector<char>& rotated,
            int threads) {
  if (!s.new_rows || !s.count) return;
  Appending a{whole, s, placed, instruction_set().kernels_for(whole.q.dtype), {}};
  if (s.rotary) {
    const int64_t rows = whole.seqlen_q, D = whole.head_dim;
    a.rotated = whole.q;
    a.rotated.stride[3] = 1, a.rotated.stride[2] = D, a.rotated.stride[1] = rows * D;
    a.rotated.stride[0] = whole.num_heads * rows * D;
    rotated.resize(std::max<int64_t>(1, s.count * a.rotated.stride[0] * bytes_of_dtype[(int)whole.q.dtype]));
    a.rotated.data = rotated.data();
  }
  const int64_t heads = 2 * whole.num_heads_k + (a.rotated ? whole.num_heads : 0);
  parallel_for(s.count * heads, threads, 8.0 * s.count * heads * s.new_rows * whole.head_dim, append_head, &a);
  if (a.rotated) whole.q = a.rotated;
}

}  // namespace fastattn
