// Attention along listed edges: query i sees the keys indices[indptr[i]] ... indices[indptr[i + 1] - 1] and no others.
//
//   forward          of each query: scores = K q, online softmax, out += V^T p
//   backward, rows   of each query: delta; scores and dP once more, dbias = dS, dq += K^T dS
//   backward, keys   of each key, by the transposed lists: the same with keys and queries exchanged; dk and dv
//
// One thread computes a query, or a key, from end to end: no atomics, and bits that depend on its edges alone.
// Source: FlashAttention-2's formulas (arXiv 2307.08691) on the edges of a graph, as in GAT (arXiv 1710.10903).
#pragma once
#include "gather_products.h"
#include "prefill.h"

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
  Real bias[chunk_edges];  // log2 units, -inf in the padding
  Real scores[chunk_edges], weights[chunk_edges], dp[chunk_edges], ds[chunk_edges];
  Real top[chunk_edges], log_sum[chunk_edges], delta[chunk_edges];  // QueryStats of each edge's query

  // Edges first ... last - 1 of the lists, without those that a bias of -inf masks: nobody reads their rows.
  void collect(const Problem& p, const Csr& lists, int64_t batch, int64_t head, int64_t first, int64_t last) {
    Real raw[chunk_edges];
    if (p.bias && !lists.edges)
      load_row(at(p.bias, batch, head, 0, first), p.bias.dtype, p.bias.stride[3], last - first, raw);
    n = 0;
    for (int64_t e = first; e < last; e++) {
      const int64_t id = lists.edges ? lists.edges[e] : e;
      bias[n] = 0;
      if (p.bias)
        bias[n] = lists.edges ? load_scalar<Real>(at(p.bias, batch, head, 0, id), p.bias.dtype) : raw[e - first];
      if (bias[n] == (Real)-__builtin_inf()) continue;
      other[n] = list_entry(lists.indices, e);
      edge[n++] = id;
    }
    padded = round_up(n, larger(VL<Real>, most_chains));
    if (p.bias)
      for (int64_t j = 0; j < padded; j += VL<Real>) store(bias + j, bias_log2<Real>(load(bias + j)));
    for (int64_t j = n; j < padded; j++) bias[j] = (Real)-__builtin_inf();
  }

  // Rows of t at the other ends: in place if they are whole vectors of Real, else copied.
  void gather(const Tensor& t, int64_t batch, int64_t head, int64_t columns, Real* copies, const Real* zeros,
              const Real** rows) const {
    const int64_t stride = round_up(columns, VL<Real>);
    if (t.dtype == dtype_of<Real> && t.stride[3] == 1 && stride == columns) {
      for (int64_t j = 0; j < n; j++) rows[j] = (const Real*)at(t, batch, head, other[j]);
    } else {
      for (int64_t j = 0; j < n; j++) {
        load_padded(t, batch, head, other[j], columns, copies + j * stride);
        rows[j] = copies + j * stride;
      }
    }
    for (int64_t j = n; j < padded; j++) rows[j] = zeros;
  }

  // scores (dot products until now) in log2 units; returns the largest.
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

  // weights = 2^(scores - shift); returns their sum.
  Real weigh(Real shift) {
    Vec<Real> sum{};
    for (int64_t j = 0; j < padded; j += VL<Real>) {
      const Vec<Real> w = exp2(load(scores + j) - shift);
      store(weights + j, w);
      sum += w;
    }
    return sum_across<Real>(sum);
  }

  // P = 2^(scores - lse) and dS = P (dP - delta), 0 where P is.
  void weigh_backward() {
    for (int64_t j = 0; j < padded; j += VL<Real>) {
      const Vec<Real> w = exp2(load(scores + j) - load(top + j) - load(log_sum + j));
      const Vec<Real> d = w * (load(dp + j) - load(delta + j));
      store(weights + j, w);
      store(ds + j, w == 0 ? Vec<Real>{} : d);
    }
  }

  void set_stats(int64_t j, const QueryStats<Real>& s) { top[j] = s.top, log_sum[j] = s.log_sum, delta[j] = s.delta; }

  // n elements of a row of t, and zeros up to a whole vector.
  static void load_padded(const Tensor& t, int64_t batch, int64_t head, int64_t row, int64_t n, Real* x) {
    load_row(at(t, batch, head, row), t.dtype, t.stride[3], n, x);
    for (int64_t d = n; d < round_up(n, VL<Real>); d++) x[d] = 0;
  }
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
CsrScratch<Real> csr_layout(const Problem& p, char* memory) {
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

// Fetches the rows of t at the other ends of row `row`, as many as a chunk has.
FASTATTN_INLINE void prefetch_rows(const Tensor& t, int64_t batch, int64_t head, int64_t columns, const Csr& lists,
                                   int64_t row) {
  const int64_t first = list_entry(lists.indptr, row), n = list_entry(lists.indptr, row + 1) - first;
  const int64_t bytes = columns * bytes_of(t.dtype);
  for (int64_t j = 0; j < smaller<int64_t>(n, chunk_edges); j++) {
    const char* source = at(t, batch, head, list_entry(lists.indices, first + j));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(source + i, 0, 2);
  }
}

template <class Real>
class CsrRows {
  const Problem& p;
  const Gradients& g;
  const Csr& lists;
  const CsrUnit& u;
  const CsrScratch<Real> s;
  Chunk<Real>& chunk;
  const int64_t group_size;
  const Real scale;               // to log2 units
  QueryStats<Real>* const stats;  // [batch][num_heads][seqlen_q], of the backward pass

 public:
  CsrRows(const Problem& p, const Gradients& g, const Csr& lists, const CsrUnit& u, char* stats, char* memory)
      : p(p),
        g(g),
        lists(lists),
        u(u),
        s(csr_layout<Real>(p, memory)),
        chunk(*s.chunk),
        group_size(p.num_heads / p.num_heads_k),
        scale((Real)(p.softmax_scale * log2e)),
        stats((QueryStats<Real>*)stats) {
    for (int64_t d = 0; d < larger(s.x_columns, s.y_columns); d++) s.zeros[d] = 0;
  }

  void forward() {
    each(
        [&](int64_t batch, int64_t head_k, int64_t query) {
          for (int64_t head = head_k * group_size; head < (head_k + 1) * group_size; head++)
            forward_query(batch, head, head_k, query);
        },
        p.k, p.v);
  }
  void backward_rows() {
    each(
        [&](int64_t batch, int64_t head_k, int64_t query) {
          for (int64_t head = head_k * group_size; head < (head_k + 1) * group_size; head++)
            backward_query(batch, head, head_k, query);
        },
        p.k, p.v);
  }
  void backward_keys() {
    each([&](int64_t batch, int64_t head_k, int64_t key) { backward_key(batch, head_k, key); }, p.q, g.dout);
  }

 private:
  // visit(batch, head_k, row) for the rows of the unit; the rows of a and b that the next one gathers are on their way.
  template <class Visit>
  void each(Visit visit, const Tensor& a, const Tensor& b) {
    for (int64_t batch = u.batch; batch < u.batch + u.batches; batch++)
      for (int64_t head_k = u.head_k; head_k < u.head_k + u.heads_k; head_k++)
        for (int64_t row = u.first; row < u.last; row++) visit(batch, head_k, row);
  }

  // body() for the chunks of a row that have an edge.
  template <class Body>
  void each_chunk(int64_t batch, int64_t head, int64_t row, Body body) {
    const int64_t last = list_entry(lists.indptr, row + 1);
    for (int64_t e = list_entry(lists.indptr, row); e < last; e += chunk_edges) {
      chunk.collect(p, lists, batch, head, e, smaller(e + chunk_edges, last));
      if (chunk.n) body();
    }
  }

  static void clear(Real* x, int64_t columns) {
    for (int64_t d = 0; d < columns; d++) x[d] = 0;
  }

  void forward_query(int64_t batch, int64_t head, int64_t head_k, int64_t query) {
    const Real lowest = (Real)-__builtin_inf();
    Real max = lowest, sum = 0;
    chunk.load_padded(p.q, batch, head, query, p.head_dim, s.x);
    clear(s.y_sum, s.y_columns);
    each_chunk(batch, head, query, [&] {
      chunk.gather(p.k, batch, head_k, p.head_dim, s.a, s.zeros, chunk.a);
      dots(s.x, chunk.a, chunk.padded, s.x_columns, chunk.scores);
      const Real now = larger(max, chunk.finish_scores(scale)), shift = now == lowest ? 0 : now;
      const Real factor = sum == 0 ? 0 : (Real)__builtin_exp2((double)max - shift);
      sum = sum * factor + chunk.weigh(shift);
      max = now;
      chunk.gather(p.v, batch, head_k, p.head_dim_v, s.b, s.zeros, chunk.b);
      add_rows(chunk.weights, chunk.b, chunk.padded, s.y_columns, factor, s.y_sum);
    });
    finish_rows(p, {batch, head, query, 1, {}, {}}, s.y_sum, &max, &sum);
  }

  void backward_query(int64_t batch, int64_t head, int64_t head_k, int64_t query) {
    chunk.load_padded(p.out, batch, head, query, p.head_dim_v, s.y_sum);
    chunk.load_padded(g.dout, batch, head, query, p.head_dim_v, s.y);
    QueryStats<Real>& own = stats[(batch * p.num_heads + head) * p.seqlen_q + query];
    own.top = *(const Real*)at(p.lse_parts, batch, head, query, 0);
    own.log_sum = *(const Real*)at(p.lse_parts, batch, head, query, 1);
    own.delta = dot(s.y, s.y_sum, s.y_columns);
    if (g.dlse) own.delta -= *(const Real*)at(g.dlse, batch, head, query);
    if (!g.dq && !g.dbias) return;

    chunk.load_padded(p.q, batch, head, query, p.head_dim, s.x);
    clear(s.x_sum, s.x_columns);
    each_chunk(batch, head, query, [&] {
      for (int64_t j = 0; j < chunk.padded; j++) chunk.set_stats(j, own);
      gradients_of_scores(p.k, p.v, batch, head_k);
      for (int64_t j = 0; g.dbias && j < chunk.n; j++)
        *(Real*)at(g.dbias, batch, head, 0, chunk.edge[j]) += chunk.ds[j];
      add_rows(chunk.ds, chunk.a, chunk.padded, s.x_columns, (Real)1, s.x_sum);
    });
    if (g.dq)
      store_row(s.x_sum, (Real)p.softmax_scale, p.head_dim, at(g.dq, batch, head, query), g.dq.dtype, g.dq.stride[3]);
  }

  void backward_key(int64_t batch, int64_t head_k, int64_t key) {
    chunk.load_padded(p.k, batch, head_k, key, p.head_dim, s.x);
    chunk.load_padded(p.v, batch, head_k, key, p.head_dim_v, s.y);
    clear(s.x_sum, s.x_columns);
    clear(s.y_sum, s.y_columns);
    for (int64_t head = head_k * group_size; head < (head_k + 1) * group_size; head++) {
      const QueryStats<Real>* of_head = stats + (batch * p.num_heads + head) * p.seqlen_q;
      each_chunk(batch, head, key, [&] {
        for (int64_t j = 0; j < chunk.n; j++) chunk.set_stats(j, of_head[chunk.other[j]]);
        for (int64_t j = chunk.n; j < chunk.padded; j++) chunk.set_stats(j, {});
        gradients_of_scores(p.q, g.dout, batch, head);
        add_rows(chunk.ds, chunk.a, chunk.padded, s.x_columns, (Real)1, s.x_sum);
        add_rows(chunk.weights, chunk.b, chunk.padded, s.y_columns, (Real)1, s.y_sum);
      });
    }
    if (g.dk)
      store_row(s.x_sum, (Real)p.softmax_scale, p.head_dim, at(g.dk, batch, head_k, key), g.dk.dtype, g.dk.stride[3]);
    if (g.dv) store_row(s.y_sum, (Real)1, p.head_dim_v, at(g.dv, batch, head_k, key), g.dv.dtype, g.dv.stride[3]);
  }

  // The chunk's weights and ds, with the rows of a and b at the other ends.
  void gradients_of_scores(const Tensor& a, const Tensor& b, int64_t batch, int64_t head) {
    chunk.gather(a, batch, head, p.head_dim, s.a, s.zeros, chunk.a);
    dots(s.x, chunk.a, chunk.padded, s.x_columns, chunk.scores);
    chunk.finish_scores(scale);
    chunk.gather(b, batch, head, p.head_dim_v, s.b, s.zeros, chunk.b);
    dots(s.y, chunk.b, chunk.padded, s.y_columns, chunk.dp);
    chunk.weigh_backward();
  }
};

}  // namespace fastattn::FASTATTN_ISA
