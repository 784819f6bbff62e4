// Attention along listed edges: query i sees the keys indices[indptr[i]] ... indices[indptr[i + 1] - 1] and no others.
//
//   forward          of each query: scores = K q, online softmax, out += V^T p
//   backward, rows   of each query: delta; scores and dP once more, dbias = dS, dq += K^T dS
//   backward, keys   of each key, by the transposed lists: the same with keys and queries exchanged; dk and dv
//
// One thread computes a query, or a key, from end to end: no atomics, and bits that depend on its edges alone.
// Source: FlashAttention-2's formulas (arXiv 2307.08691) on the edges of a graph, as in GAT (arXiv 1710.10903).
#pragma once
#include "prefill.h"
#include "tile/gather_products.h"

namespace fastattn::FASTATTN_ISA {

constexpr int chunk_edges = 64;  // edges of a row that are computed at once; a multiple of every vector length

FASTATTN_INLINE int64_t list_entry(const Tensor& list, int64_t i) {
  i *= list.stride[3];
  return list.dtype == DType::int32 ? ((const int32_t*)list.data)[i] : ((const int64_t*)list.data)[i];
}

// What the backward pass knows of a query.
template <class Real>
struct QueryStats {
  Real top, log_sum, delta;  // lse_parts, rowsum(dout * out) - dlse
};

// Some edges of a row: `n` of them, padded by rows of zeros and scores of -inf. "a" rows have head_dim columns, "b" rows
// head_dim_v: k and v of keys, or q and dout of queries.
template <class Real>
struct Chunk {
  int64_t n, padded;
  int64_t other[chunk_edges], edge[chunk_edges];  // the row at the other end, the place in the bias
  const Real *a[chunk_edges], *b[chunk_edges];
  Real bias[chunk_edges];  // -inf in the padding
  Real scores[chunk_edges], weights[chunk_edges], dp[chunk_edges], ds[chunk_edges];
  Real top[chunk_edges], log_sum[chunk_edges], delta[chunk_edges];  // QueryStats of each edge's query

  // Edges first ... last - 1 of the lists, without those that a bias of -inf masks: nobody reads their rows.
  void collect(const Operands& p, const Csr& lists, int64_t batch, int64_t head, int64_t first, int64_t last) {
    const Real lowest = (Real)-__builtin_inf();
    int64_t count = 0;
    if (!p.bias) {
      for (; count < last - first; count++) other[count] = list_entry(lists.indices, first + count), bias[count] = 0;
    } else {
      Real raw[chunk_edges];
      if (!lists.edges) load_row(at(p.bias, batch, head, 0, first), p.bias.dtype, p.bias.stride[3], last - first, raw);
      for (int64_t e = first; e < last; e++) {
        const int64_t place = lists.edges ? lists.edges[e] : e;
        const Real b = lists.edges ? load_number<Real>(p.bias, batch, head, 0, place) : raw[e - first];
        if (b == lowest) continue;
        other[count] = list_entry(lists.indices, e), edge[count] = place;
        bias[count++] = b;
      }
    }
    n = count;
    padded = round_up(n, larger(VL<Real>, most_chains));
    for (int64_t j = n; j < padded; j++) bias[j] = lowest;
  }

  // Rows of t at the other ends, and zeros for the padding.
  void gather(const Tensor& t, int64_t batch, int64_t head, int64_t columns, Real* copies, const Real* zeros,
              const Real** rows) const {
    gather_rows(t, batch, head, other, n, columns, copies, rows);
    for (int64_t j = n; j < padded; j++) rows[j] = zeros;
  }

  // scores, dot products until now; returns the largest.
  Real finish_scores(Real scale) {
    const Vec<Real> lowest = splat((Real)-__builtin_inf());
    Vec<Real> largest = lowest;
    for (int64_t j = 0; j < padded; j += VL<Real>) {
      const Vec<Real> b = load(bias + j), s = b == lowest ? lowest : load(scores + j) * scale + b;
      store(scores + j, s);
      largest = vmax(s, largest);
    }
    return max_across<Real>(largest);
  }

  // weights = exp(scores - shift); returns their sum.
  Real weigh(Real shift) {
    Vec<Real> sum{};
    for (int64_t j = 0; j < padded; j += VL<Real>) {
      const Vec<Real> w = exp(load(scores + j) - shift);
      store(weights + j, w);
      sum += w;
    }
    return sum_across<Real>(sum);
  }

  // P = exp(scores - lse) and dS = P (dP - delta), 0 where P is.
  void weigh_backward() {
    for (int64_t j = 0; j < padded; j += VL<Real>) {
      const Vec<Real> w = exp(load(scores + j) - load(top + j) - load(log_sum + j));
      const Vec<Real> d = w * (load(dp + j) - load(delta + j));
      store(weights + j, w);
      store(ds + j, w == 0 ? Vec<Real>{} : d);
    }
  }

  void set_stats(int64_t j, const QueryStats<Real>& s) { top[j] = s.top, log_sum[j] = s.log_sum, delta[j] = s.delta; }
};

// The memory of one thread.
template <class Real>
struct CsrScratch {
  Chunk<Real>* chunk;
  Real *x, *y;          // the row at hand: q and dout of a query, k and v of a key
  Real *x_sum, *y_sum;  // what is added up for it
  Real *a, *b;          // copies of gathered rows
  Real* zeros;
  int64_t x_columns, y_columns, bytes;  // padded to whole vectors
};

template <class Real>
CsrScratch<Real> csr_layout(const Operands& p, char* memory) {
  Arena arena{memory};
  CsrScratch<Real> s;
  s.x_columns = round_up(p.head_dim, VL<Real>), s.y_columns = round_up(p.head_dim_v, VL<Real>);
  s.chunk = arena.take<Chunk<Real>>(1);
  s.x = arena.take<Real>(s.x_columns), s.y = arena.take<Real>(s.y_columns);
  s.x_sum = arena.take<Real>(s.x_columns), s.y_sum = arena.take<Real>(s.y_columns);
  s.a = arena.take<Real>(chunk_edges * s.x_columns), s.b = arena.take<Real>(chunk_edges * s.y_columns);
  s.zeros = arena.take<Real>(larger(s.x_columns, s.y_columns));
  s.bytes = arena.used;
  return s;
}

// The rows of a unit: queries, which gather rows of k and v, or by the transposed lists keys, which gather q and dout.
template <class Real>
class CsrRows {
  const Operands& p;
  const Gradients& g;
  const Csr& lists;
  const CsrUnit& u;
  const Tensor &a, &b;  // what is gathered
  const CsrScratch<Real> s;
  Chunk<Real>& chunk;
  const int64_t group_size;
  const Real scale;
  QueryStats<Real>* const stats;  // [batch][num_heads][seqlen_q], of the backward pass

 public:
  CsrRows(const Operands& p, const Gradients& g, const Csr& lists, const CsrUnit& u, const Tensor& a, const Tensor& b,
          char* stats, char* memory)
      : p(p),
        g(g),
        lists(lists),
        u(u),
        a(a),
        b(b),
        s(csr_layout<Real>(p, memory)),
        chunk(*s.chunk),
        group_size(p.group_size()),
        scale((Real)p.softmax_scale),
        stats((QueryStats<Real>*)stats) {
    clear(s.x, s.x_columns), clear(s.y, s.y_columns), clear(s.y_sum, s.y_columns);
    clear(s.zeros, larger(s.x_columns, s.y_columns));
    if (s.x_columns != p.head_dim) clear(s.a, chunk_edges * s.x_columns);
    if (s.y_columns != p.head_dim_v) clear(s.b, chunk_edges * s.y_columns);
  }

  void forward() {
    each_query([&](int64_t batch, int64_t head, int64_t query) { forward_query(batch, head, query); });
  }
  void backward_rows() {
    each_query([&](int64_t batch, int64_t head, int64_t query) { backward_query(batch, head, query); });
  }
  void backward_keys() {
    each_row([&](int64_t batch, int64_t head_k, int64_t key) { backward_key(batch, head_k, key); });
  }

 private:
  template <class Visit>
  void each_row(Visit visit) {
    for (int64_t batch = u.batch; batch < u.batch + u.batches; batch++)
      for (int64_t head_k = u.head_k; head_k < u.head_k + u.heads_k; head_k++)
        for (int64_t row = u.first; row < u.last; row++) visit(batch, head_k, row);
  }
  template <class Visit>
  void each_query(Visit visit) {
    each_row([&](int64_t batch, int64_t head_k, int64_t query) {
      for (int64_t i = 0; i < group_size; i++) visit(batch, head_k * group_size + i, query);
    });
  }

  // body() for the chunks of a row that have an edge, with their scores. gathered: the head of a and b.
  template <class Body>
  void each_chunk(int64_t batch, int64_t head, int64_t gathered, int64_t row, Body body) {
    const int64_t last = list_entry(lists.indptr, row + 1);
    for (int64_t e = list_entry(lists.indptr, row); e < last; e += chunk_edges) {
      const int64_t end = smaller(e + chunk_edges, last);
      prefetch(batch, gathered, e + chunk_edges, end + chunk_edges);
      chunk.collect(p, lists, batch, head, e, end);
      if (!chunk.n) continue;
      chunk.gather(a, batch, gathered, p.head_dim, s.a, s.zeros, chunk.a);
      chunk.gather(b, batch, gathered, p.head_dim_v, s.b, s.zeros, chunk.b);
      dots(s.x, chunk.a, chunk.padded, s.x_columns, chunk.scores);
      body(chunk.finish_scores(scale));
    }
  }

  // Fetches what edges first ... last - 1 will gather. Inline, or GCC takes it for a function without effect.
  __attribute__((always_inline)) inline void prefetch(int64_t batch, int64_t gathered, int64_t first,
                                                      int64_t last) const {
    for (int64_t e = first; e < smaller(last, lists.num_edges); e++) {
      const int64_t other = list_entry(lists.indices, e);
      prefetch_row(a, batch, gathered, other, p.head_dim);
      prefetch_row(b, batch, gathered, other, p.head_dim_v);
    }
  }

  static void clear(Real* x, int64_t columns) {
    for (int64_t d = 0; d < columns; d++) x[d] = 0;
  }

  void forward_query(int64_t batch, int64_t head, int64_t query) {
    const Real lowest = (Real)-__builtin_inf();
    Real max = lowest, sum = 0;
    load_row(p.q, batch, head, query, p.head_dim, s.x);
    clear(s.y_sum, s.y_columns);
    each_chunk(batch, head, head / group_size, query, [&](Real largest) {
      const Real now = larger(max, largest), shift = now == lowest ? 0 : now;
      const Real factor = sum == 0 ? 0 : (Real)__builtin_exp2(((double)max - shift) * log2e);
      sum = sum * factor + chunk.weigh(shift);
      max = now;
      add_rows(chunk.weights, chunk.b, chunk.padded, s.y_columns, factor, s.y_sum);
    });
    finish_rows(p, {batch, head, query, 1, {}, {}}, s.y_sum, &max, &sum);
  }

  void backward_query(int64_t batch, int64_t head, int64_t query) {
    load_row(g.dout, batch, head, query, p.head_dim_v, s.y);
    load_row(p.out, batch, head, query, p.head_dim_v, s.y_sum);
    QueryStats<Real>& own = stats[(batch * p.num_heads + head) * p.seqlen_q + query];
    own.top = *(const Real*)at(p.lse_parts, batch, head, query, 0);
    own.log_sum = *(const Real*)at(p.lse_parts, batch, head, query, 1);
    own.delta = dot(s.y, s.y_sum, s.y_columns);
    if (g.dlse) own.delta -= *(const Real*)at(g.dlse, batch, head, query);
    if (!g.dq && !g.dbias) return;

    load_row(p.q, batch, head, query, p.head_dim, s.x);
    clear(s.x_sum, s.x_columns);
    each_chunk(batch, head, head / group_size, query, [&](Real) {
      for (int64_t j = 0; j < chunk.padded; j++) chunk.set_stats(j, own);
      weigh_backward();
      for (int64_t j = 0; g.dbias && j < chunk.n; j++)
        *(Real*)at(g.dbias, batch, head, 0, chunk.edge[j]) += chunk.ds[j];
      add_rows(chunk.ds, chunk.a, chunk.padded, s.x_columns, (Real)1, s.x_sum);
    });
    if (g.dq) store_row(s.x_sum, (Real)p.softmax_scale, p.head_dim, g.dq, batch, head, query);
  }

  void backward_key(int64_t batch, int64_t head_k, int64_t key) {
    load_row(p.k, batch, head_k, key, p.head_dim, s.x);
    load_row(p.v, batch, head_k, key, p.head_dim_v, s.y);
    clear(s.x_sum, s.x_columns), clear(s.y_sum, s.y_columns);
    for (int64_t head = head_k * group_size; head < (head_k + 1) * group_size; head++) {
      const QueryStats<Real>* of_head = stats + (batch * p.num_heads + head) * p.seqlen_q;
      each_chunk(batch, head, head, key, [&](Real) {
        for (int64_t j = 0; j < chunk.n; j++) chunk.set_stats(j, of_head[chunk.other[j]]);
        for (int64_t j = chunk.n; j < chunk.padded; j++) chunk.set_stats(j, {});
        weigh_backward();
        add_rows(chunk.ds, chunk.a, chunk.padded, s.x_columns, (Real)1, s.x_sum);
        add_rows(chunk.weights, chunk.b, chunk.padded, s.y_columns, (Real)1, s.y_sum);
      });
    }
    if (g.dk) store_row(s.x_sum, (Real)p.softmax_scale, p.head_dim, g.dk, batch, head_k, key);
    if (g.dv) store_row(s.y_sum, (Real)1, p.head_dim_v, g.dv, batch, head_k, key);
  }

  void weigh_backward() {
    dots(s.y, chunk.b, chunk.padded, s.y_columns, chunk.dp);
    chunk.weigh_backward();
  }
};

template <class Real>
int64_t csr_scratch_bytes(const Operands& p) {
  return csr_layout<Real>(p, nullptr).bytes;
}

template <class Real>
void csr_forward(const Operands& p, const Csr& lists, const CsrUnit& u, char* memory) {
  CsrRows<Real>(p, {}, lists, u, p.k, p.v, nullptr, memory).forward();
}
template <class Real>
void csr_backward_rows(const Operands& p, const Gradients& g, const Csr& lists, const CsrUnit& u, char* stats,
                       char* memory) {
  CsrRows<Real>(p, g, lists, u, p.k, p.v, stats, memory).backward_rows();
}
template <class Real>
void csr_backward_keys(const Operands& p, const Gradients& g, const Csr& lists, const CsrUnit& u, char* stats,
                       char* memory) {
  CsrRows<Real>(p, g, lists, u, p.q, g.dout, stats, memory).backward_keys();
}

}  // namespace fastattn::FASTATTN_ISA
