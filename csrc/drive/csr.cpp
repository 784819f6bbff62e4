// Attention along edges: the check of the lists, their transposition, blocks of rows over the threads.
#include <algorithm>
#include <memory>
#include <stdexcept>

#include "driver.h"
#include "parallel.h"

namespace fastattn {
namespace {

constexpr int64_t unit_rows = 32;  // small, since rows may differ much in length

// Calls body(pointer of int32_t or int64_t) for the entries of a list.
template <class Body>
auto with_entries(const Tensor& list, Body body) {
  return list.dtype == DType::int32 ? body((const int32_t*)list.data) : body((const int64_t*)list.data);
}

int64_t entry(const Tensor& list, int64_t i) {
  return with_entries(list, [&](auto* x) { return (int64_t)x[i * list.stride[3]]; });
}

// Rows by key: a counting sort, so that the queries of a key ascend, and equal ones keep the order of their edges.
struct Transposed {
  std::unique_ptr<int64_t[]> indptr, queries, edges;
  Csr lists;

  Transposed(const Csr& rows, int64_t seqlen_q, int64_t seqlen_k, bool keep_edges)
      : indptr(new int64_t[seqlen_k + 2]()),
        queries(new int64_t[rows.num_edges]),
        edges(keep_edges ? new int64_t[rows.num_edges] : nullptr) {
    with_entries(rows.indices, [&](auto* key) {
      int64_t* const next = indptr.get() + 1;  // after the second loop, where each key's list ends
      const int64_t stride = rows.indices.stride[3];
      for (int64_t e = 0; e < rows.num_edges; e++) next[key[e * stride] + 1]++;
      for (int64_t j = 1; j <= seqlen_k; j++) next[j] += next[j - 1];
      for (int64_t i = 0, e = 0; i < seqlen_q; i++)
        for (const int64_t last = entry(rows.indptr, i + 1); e < last; e++) {
          const int64_t place = next[key[e * stride]]++;
          queries[place] = i;
          if (edges) edges[place] = e;
        }
    });
    lists = {list(indptr), list(queries), rows.num_edges, edges.get()};
  }

 private:
  static Tensor list(const std::unique_ptr<int64_t[]>& x) { return {(char*)x.get(), {0, 0, 0, 1}, DType::int64}; }
};

struct EdgesPass {
  const Kernels& kernels;
  const Operands& p;
  const Gradients& g;
  const Csr& lists;
  int64_t rows;              // of the lists
  int64_t batches, heads_k;  // that a unit takes one after the other
  char* stats;
  int64_t scratch_bytes;

  CsrUnit unit(int64_t index) const {
    const int64_t blocks = (rows + unit_rows - 1) / unit_rows, first = index % blocks * unit_rows;
    const int64_t groups = p.num_heads_k / heads_k;
    return {index / blocks / groups * batches, index / blocks % groups * heads_k, batches, heads_k, first,
            std::min(first + unit_rows, rows)};
  }
  int64_t units() const { return p.batch / batches * (p.num_heads_k / heads_k) * ((rows + unit_rows - 1) / unit_rows); }
  char* scratch() const { return thread_scratch(scratch_bytes); }
};

void forward_unit(void* context, int64_t index, int) {
  const EdgesPass& pass = *(EdgesPass*)context;
  pass.kernels.csr_forward(pass.p, pass.lists, pass.unit(index), pass.scratch());
}
void rows_unit(void* context, int64_t index, int) {
  const EdgesPass& pass = *(EdgesPass*)context;
  pass.kernels.csr_backward_rows(pass.p, pass.g, pass.lists, pass.unit(index), pass.stats, pass.scratch());
}
void keys_unit(void* context, int64_t index, int) {
  const EdgesPass& pass = *(EdgesPass*)context;
  pass.kernels.csr_backward_keys(pass.p, pass.g, pass.lists, pass.unit(index), pass.stats, pass.scratch());
}

// Nothing is read that lies outside of the lists or of k and v. Which entry is wrong, and why, the caller says.
void check_entries(const Csr& lists, int64_t seqlen_q, int64_t seqlen_k) {
  bool good = entry(lists.indptr, 0) == 0 && entry(lists.indptr, seqlen_q) == lists.num_edges;
  with_entries(lists.indptr, [&](auto* x) {
    const int64_t stride = lists.indptr.stride[3];
    for (int64_t i = 1; i <= seqlen_q; i++) good &= x[i * stride] >= x[(i - 1) * stride];
  });
  if (!good) throw std::invalid_argument("indptr: an entry is out of range");
  with_entries(lists.indices, [&](auto* x) {
    const int64_t stride = lists.indices.stride[3];
    for (int64_t e = 0; e < lists.num_edges; e++) good &= (uint64_t)x[e * stride] < (uint64_t)seqlen_k;
  });
  if (!good) throw std::invalid_argument("indices: an entry is out of range");
}

}  // namespace

void csr_forward(const Operands& p, const Csr& lists, int threads) {
  check_entries(lists, p.seqlen_q, p.seqlen_k);
  if (!p.batch || !p.num_heads) return;
  const Gradients none{};
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  EdgesPass pass{kernels, p, none, lists, p.seqlen_q, 1, 1, nullptr, kernels.csr_scratch_bytes(p)};
  const double flops = 2.0 * lists.num_edges * p.batch * p.num_heads * (p.head_dim + p.head_dim_v);
  parallel_for(pass.units(), threads, flops, forward_unit, &pass);
}

void csr_backward(const Operands& p, const Gradients& g, const Csr& lists, int threads) {
  check_entries(lists, p.seqlen_q, p.seqlen_k);
  if (!p.batch || !p.num_heads_k) return;
  const std::unique_ptr<char[]> stats(new char[p.batch * p.num_heads * p.seqlen_q * 3 * element_bytes(p)]);
  const double flops = 2.0 * lists.num_edges * p.batch * p.num_heads * (2 * p.head_dim + p.head_dim_v);
  const Kernels& kernels = instruction_set().kernels_for(p.q.dtype);
  EdgesPass pass{kernels, p, g, lists, p.seqlen_q, 1, 1, stats.get(), kernels.csr_scratch_bytes(p)};
  // One unit adds up all that meets in an element of dbias.
  if (g.dbias && !g.dbias.stride[0]) pass.batches = p.batch;
  if (g.dbias && !g.dbias.stride[1]) pass.heads_k = p.num_heads_k;
  parallel_for(pass.units(), threads, flops, rows_unit, &pass);
  if (!g.dk && !g.dv) return;
  const Transposed by_key(lists, p.seqlen_q, p.seqlen_k, (bool)p.bias);
  EdgesPass keys{kernels, p, g, by_key.lists, p.seqlen_k, 1, 1, stats.get(), pass.scratch_bytes};
  parallel_for(keys.units(), threads, flops, keys_unit, &keys);
}

}  // namespace fastattn
