// The forward pass of a few query rows against a long cache of keys and values: all rows of one key head at once, so that
// the cache is read once, vectors along head_dim, so that one row fills them.
//
//   loop 1  tiles of keys: large, because each turn from K to V and back lets the fetching ahead start anew
//   loop 2    blocks of keys that the L1 holds; rows by 4, 2 or 1: scores = q K^T                     (score_rows)
//             of each row: score modifications, masks, online softmax, keys in the lanes
//   loop 3    blocks of keys that the L1 holds; rows by 4, 2 or 1; columns: out += w V                (add_values)
//
// A row's bits depend neither on the rows beside it nor on the keys that they see: blocks, lanes and tiles lie on a fixed
// grid of key positions, and each sum has one order.
#pragma once
#include "prefill.h"
#include "tile/row_products.h"

namespace fastattn::FASTATTN_ISA {

constexpr int64_t cache_tile = 512 << 10, cache_block = 8 << 10;  // bytes of K or V

// Keys of a block, a power of two: lanes and quads of dropout divide it.
FASTATTN_INLINE int64_t block_keys(int64_t row_bytes) {
  int64_t keys = 16;
  while (keys < 64 && keys * 2 * row_bytes <= cache_block) keys *= 2;
  return keys;
}

template <class Real>
Blocking make_decode_blocking(const Operands& p) {
  Blocking b{};
  b.lanes = VL<Real>;
  b.heads_per_unit = (int)(p.num_heads_k ? p.group_size() : 1);
  b.rows = (int)larger<int64_t>(1, p.seqlen_q * b.heads_per_unit);
  const int64_t row_bytes = larger<int64_t>(p.head_dim, 16) * bytes_of(p.k.dtype);
  b.n_block = (int)larger<int64_t>(128, smaller<int64_t>(2048, cache_tile / row_bytes / 128 * 128));
  const int64_t heads = larger<int64_t>(p.num_heads_k, 1);
  int64_t splits = heads < few_units ? few_units / heads : 1;
  splits = larger<int64_t>(1, smaller(splits, p.seqlen_k / min_split_keys));
  b.split_keys = round_up(larger<int64_t>((p.seqlen_k + splits - 1) / splits, 1), 128);
  b.num_splits = (int)larger<int64_t>(1, (p.seqlen_k + b.split_keys - 1) / b.split_keys);
  return b;
}

// A query row: what the score modifications want to know of it, and its running softmax.
template <class Real>
struct DecodeRow {
  QueryRow place;
  Range seen;
  Real slope, position;
  Real max, shift, sum;  // as in Running; sum in the end
};

// The memory of one thread while it computes a unit.
template <class Real>
struct DecodeScratch {
  DecodeRow<Real>* rows;
  Real *q, *out, *sums;     // packed queries, outputs in the order of the loads, [rows][VL] sums of weights
  Real *scores, *seen;      // [rows][stride]; scores before the softmax where they must be kept
  Real *bias, *mask;        // [n_block] of a row
  Real* factors;            // [n_block] of the keys, then of the values
  Real *plain, *max, *sum;  // [rows][head_dim or head_dim_v], [rows]: rows on their way in and out
  char *k, *v;              // copies of a block
  int64_t stride, plain_stride, bytes;
};

template <class Rows>
class DecodeUnit {
  using Real = typename Rows::Real;
  static constexpr int L = VL<Real>;

  const Operands& p;
  const Blocking& b;
  const Unit& u;
  const RowLoads<Rows> k_loads, v_loads;
  const int64_t rows, k_block, v_block, q_size, out_size;
  const bool far, k_copied, v_copied, careful;  // far: keys and values come from memory
  const DecodeScratch<Real> s;
  bool any_masked = false;

 public:
  static DecodeScratch<Real> layout(const Operands& p, const Blocking& b, char* memory) {
    Arena arena{memory};
    DecodeScratch<Real> s;
    const RowLoads<Rows> k(p.head_dim), v(p.head_dim_v);
    s.stride = round_up(b.n_block, 64) + 16;  // never a power of two
    s.rows = arena.take<DecodeRow<Real>>(b.rows);
    s.q = arena.take<Real>(b.rows * k.vectors() * L), s.out = arena.take<Real>(b.rows * v.vectors() * L);
    s.sums = arena.take<Real>(b.rows * L);
    s.scores = arena.take<Real>(b.rows * s.stride), s.seen = arena.take<Real>(b.rows * s.stride);
    s.bias = arena.take<Real>(s.stride), s.mask = arena.take<Real>(s.stride);
    s.factors = arena.take<Real>(s.stride);
    s.plain_stride = k.padded;
    s.plain = arena.take<Real>(b.rows * larger(k.padded, v.padded));
    s.max = arena.take<Real>(b.rows), s.sum = arena.take<Real>(b.rows);
    s.k = arena.take<char>(block_keys(k.row_bytes()) * k.row_bytes());
    s.v = arena.take<char>(block_keys(v.row_bytes()) * v.row_bytes());
    s.bytes = arena.used;
    return s;
  }

  // careful: NaN or Inf in v must not leak from behind a mask.
  DecodeUnit(const Operands& p, const Blocking& b, const Unit& u, char* memory, bool careful)
      : p(p),
        b(b),
        u(u),
        k_loads(p.head_dim),
        v_loads(p.head_dim_v),
        rows(p.seqlen_q * b.heads_per_unit),
        k_block(block_keys(k_loads.row_bytes())),
        v_block(block_keys(v_loads.row_bytes())),
        q_size(k_loads.vectors() * L),
        out_size(v_loads.vectors() * L),
        far(!p.keys_are_near && exceeds_caches(p)),
        k_copied(p.rotary || scattered(p.k, p.head_dim)),
        v_copied(scattered(p.v, p.head_dim_v)),
        careful(careful),
        s(layout(p, b, memory)) {
    const double unit = product_unit(p);
    for (int64_t r = 0; r < rows; r++) {
      const QueryRow place = stacked_row(p, u.head, r);
      const Range seen = row_range(p, u.batch, place.head, place.query);
      s.rows[r] = {place,
                   seen,
                   slope_of<Real>(p, u.batch, place.head),
                   (Real)(place.query + p.query_start),
                   (Real)-__builtin_inf(),
                   0,
                   0};
      Real* row = s.plain + r * s.plain_stride;
      for (int64_t d = p.head_dim; d < k_loads.padded; d++) row[d] = 0;
      load_query(p, u.batch, place.head, place.query, row);
      const Real scale = (Real)(scale_of(p, place.head) * unit);
      for (int64_t d = 0; d < p.head_dim; d++) row[d] *= scale;
    }
    each_rows(rows, [&](int64_t r, auto R) { pack_queries(r, R); });
    clear(s.out, rows * out_size), clear(s.sums, rows * L);
    if (k_copied) memset(s.k, 0, k_block * k_loads.row_bytes());
    if (v_copied) memset(s.v, 0, v_block * v_loads.row_bytes());
  }

  // False: behind some mask there may be a NaN or Inf in v, which shows in out whatever its weight.
  bool run() {
    const int64_t from = u.split * b.split_keys, first = from + (u.k_lo - from) / b.n_block * b.n_block;
    if (u.keys)
      for (int64_t tile = first; tile < u.k_hi; tile += b.n_block)
        visit({larger(tile, u.k_lo), smaller(tile + b.n_block, u.k_hi)});
    return careful || !any_masked || all_finite(s.out, rows * out_size);
  }

  void finish(const Partial& partial) {
    const int64_t Dv = p.head_dim_v;
    for (int64_t r = 0; r < rows; r++) {
      const Real* out = s.out + r * out_size;
      Real* row = s.plain + r * larger(Dv, v_loads.padded);
      for (int64_t i = 0; i < v_loads.count; i++)
        for (int v = 0; v < Rows::vectors; v++, out += L)
          for (int lane = 0; lane < L; lane++) row[v_loads.first(i) + Rows::column(v, lane)] = out[lane];
      if (row != s.plain + r * Dv) memmove(s.plain + r * Dv, row, Dv * sizeof(Real));
      s.max[r] = s.rows[r].max, s.sum[r] = sum_across<Real>(load(s.sums + r * L));
    }
    if (b.num_splits == 1) {
      const Lanes lanes{u.batch, u.head, 0, rows, {}, {}};
      return finish_rows(p, lanes, s.plain, s.max, s.sum);
    }
    memcpy(partial.out, s.plain, rows * Dv * sizeof(Real));
    memcpy(partial.max, s.max, rows * sizeof(Real)), memcpy(partial.sum, s.sum, rows * sizeof(Real));
  }

 private:
  // Whether rows are not read as they lie but copied: their elements lie apart, they are too short, or they lie apart
  // themselves, and far: hardware foresees none of those, and an L1 has room for few.
  bool scattered(const Tensor& t, int64_t columns) const {
    return t.pages || t.stride[3] != 1 || columns < Rows::step || (far && t.stride[2] > columns);
  }

  static void clear(Real* x, int64_t n) { memset(x, 0, n * sizeof(Real)); }

  // [loads][R rows][vectors][VL], 0 where a load overlaps the one before it or the row has ended.
  template <int R>
  void pack_queries(int64_t first, std::integral_constant<int, R>) {
    Real* to = s.q + first * q_size;
    for (int64_t i = 0; i < k_loads.count; i++)
      for (int r = 0; r < R; r++)
        for (int v = 0; v < Rows::vectors; v++)
          for (int lane = 0; lane < L; lane++) {
            const int column = Rows::column(v, lane);
            const Real x = s.plain[(first + r) * s.plain_stride + k_loads.first(i) + column];
            *to++ = i < k_loads.whole || k_loads.is_fresh(i, column) ? x : 0;
          }
  }

  // body(first key, keys, their rows, bytes from one to the next) for the blocks of keys lo ... hi - 1.
  template <class Body>
  void each_block(const Tensor& t, Range keys, int64_t block, const RowLoads<Rows>& loads, char* copies,
                  const Body& body) {
    const int64_t head_k = p.head_k(u.head);
    for (int64_t key = keys.lo, n; key < keys.hi; key += n) {
      n = smaller((key / block + 1) * block, keys.hi) - key;
      if (!copies) {
        body(key, n, at(t, u.batch, head_k, key), t.stride[2] * bytes_of(t.dtype));
        continue;
      }
      for (int64_t j = key + n; far && j < smaller(key + 2 * n, keys.hi); j++)
        prefetch_row(t, u.batch, head_k, j, loads.columns);
      copy_rows(t, u.batch, head_k, key, n, loads.columns, copies, loads.row_bytes());
      if (p.rotary && &t == &p.k) turn_copies(key, n, copies, loads.row_bytes());
      body(key, n, copies, loads.row_bytes());
    }
  }

  // Copies of keys, `bytes` apart, turned and rounded to their dtype again.
  void turn_copies(int64_t key, int64_t n, char* copies, int64_t bytes) {
    const Tensor rows{copies, {0, 0, bytes / bytes_of(p.k.dtype), 1}, p.k.dtype};
    Real* row = s.plain;  // the queries are packed by now
    for (int64_t j = 0; j < n; j++) {
      load_row(rows, 0, 0, j, p.head_dim, row);
      turn_row(p.rotary, u.batch, key + j, row, p.head_dim, row);
      store_row(row, (Real)1, p.head_dim, rows, 0, 0, j);
    }
  }

  // The scores and the outputs of the keys of one tile that some row sees.
  void visit(Range keys) {
    constexpr int chains = row_chains<Real>;
    const Range whole{keys.lo / chains * chains, keys.hi};  // lanes have their place on the grid
    const bool cold = far && !k_copied && rows > 1;         // one row reads them in the order that hardware foresees
    each_block(p.k, whole, k_block, k_loads, k_copied ? s.k : nullptr,
               [&](int64_t key, int64_t n, const char* k, int64_t stride) {
                 each_rows(rows, [&](int64_t r, auto R) {
                   score_rows<Rows, decltype(R)::value>(k, stride, n, cold && r == 0, k_loads, s.q + r * q_size,
                                                        s.scores + r * s.stride + key - whole.lo, s.stride);
                 });
               });
    scale_scores(p.k, whole);
    const int64_t ahead = far ? smaller(v_block, keys.hi - keys.lo) : 0;
    for (int64_t j = 0; j < ahead; j++)  // memory should not rest meanwhile
      prefetch_row(p.v, u.batch, p.head_k(u.head), keys.lo + j, p.head_dim_v);
    for (int64_t r = 0; r < rows; r++) weigh(r, whole, keys);
    scale_scores(p.v, whole);
    each_block(p.v, keys, v_block, v_loads, v_copied ? s.v : nullptr,
               [&](int64_t key, int64_t n, const char* v, int64_t stride) {
                 auto add = [&](int64_t r, auto R, const Real* seen) {
                   const Real* weights = s.scores + r * s.stride + key - whole.lo;
                   add_values<Rows, decltype(R)::value>(v, stride, n, v_loads, weights, s.stride, seen,
                                                        far && !v_copied && r == 0, s.out + r * out_size, out_size);
                 };
                 if (!careful) return each_rows(rows, [&](int64_t r, auto R) { add(r, R, nullptr); });
                 for (int64_t r = 0; r < rows; r++)
                   add(r, std::integral_constant<int, 1>{}, s.seen + r * s.stride + key - whole.lo);
               });
  }

  // The scores of keys, or weights of values, times the factors of these rows.
  void scale_scores(const Tensor& t, Range keys) {
    if (!t.factors) return;
    const int64_t n = keys.hi - keys.lo;
    for (int64_t j = 0; j < n; j++) s.factors[j] = (Real)factor_of(t, u.batch, p.head_k(u.head), keys.lo + j);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < n; j++) s.scores[r * s.stride + j] *= s.factors[j];
  }

  // The scores of a row become weights; `visited` keys of the tile are multiplied by them.
  void weigh(int64_t r, Range tile, Range visited) {
    DecodeRow<Real>& row = s.rows[r];
    Real* scores = s.scores + r * s.stride;
    const int64_t n = round_up(tile.hi - tile.lo, L);
    modify(row, scores, tile, n);
    const Real lowest = (Real)-__builtin_inf();
    const Range seen{larger(tile.lo, row.seen.lo), smaller(tile.hi, row.seen.hi)};
    for (int64_t j = 0; j < smaller(seen.lo, tile.hi) - tile.lo; j++) scores[j] = lowest;
    for (int64_t j = larger(seen.hi, tile.lo) - tile.lo; j < n; j++) scores[j] = lowest;
    any_masked |= seen.lo > visited.lo || seen.hi < visited.hi;
    if (careful) memcpy(s.seen + r * s.stride, scores, n * sizeof(Real));

    Real largest;
    find_row_max(scores, n, &largest);
    if (largest > row.max + (Real)headroom<false>) {
      const Real factor = exp(splat(row.max - largest))[0];
      row.max = row.shift = largest;
      store(s.sums + r * L, load(s.sums + r * L) * factor);
      Real* out = s.out + r * out_size;
      for (int64_t i = 0; i < out_size; i += L) store(out + i, load(out + i) * factor);
    }
    Vec<Real> sum{};
    for (int64_t j = 0; j < n; j += L) {
      const Vec<Real> w = exp(load(scores + j) - row.shift);
      store(scores + j, w);
      sum += w;
    }
    store(s.sums + r * L, load(s.sums + r * L) + sum);
    if (p.drops()) drop_row(p, u.batch, row.place, tile.lo, tile.hi - tile.lo, scores);
  }

  static void find_row_max(const Real* scores, int64_t n, Real* largest) {
    Real lanes[L];
    find_max<Real, 1>(scores, n / L, lanes);
    *largest = max_across<Real>(load(lanes));
  }

  void modify(const DecodeRow<Real>& row, Real* scores, Range tile, int64_t n) {
    if (p.softcap > 0.0) softcap_scores<Real, 1>(scores, n / L, (Real)p.softcap, (Real*)nullptr);
    if (p.alibi_slopes) add_alibi_row(scores, n, row.slope, row.position, tile.lo);
    const int64_t keys = tile.hi - tile.lo;
    for (const auto& [tensor, to] : {std::pair<const Tensor&, Real*>{p.bias, s.bias}, {p.mask, s.mask}}) {
      if (!tensor) continue;
      load_row(at(tensor, u.batch, row.place.head, row.place.query, tile.lo), tensor.dtype, tensor.stride[3], keys, to);
      for (int64_t j = keys; j < n; j++) to[j] = 0;
      any_masked |= add_bias<Real, 1>(scores, n / L, to, L);
    }
  }
};

template <class Rows>
void decode_rows(const Operands& p, const Blocking& b, const Unit& u, const Partial& partial, char* memory) {
  DecodeUnit<Rows> unit(p, b, u, memory, false);
  if (unit.run()) return unit.finish(partial);
  DecodeUnit<Rows> again(p, b, u, memory, true);  // rare, and keeps the check out of the loop
  again.run();
  again.finish(partial);
}

// body(how the elements of k and v lie)
template <class Real, class Body>
FASTATTN_INLINE auto with_rows(DType dtype, const Body& body) {
  if constexpr (sizeof(Real) == 4) {
    if (dtype == DType::bfloat16) return body(BFloat16Rows{});
    if (dtype == DType::float16) return body(Float16Rows{});
    if (dtype == DType::int8) return body(Int8Rows{});
  }
  return body(PlainRows<Real>{});
}

template <class Real>
int64_t decode_scratch_bytes(const Operands& p, const Blocking& b) {
  return with_rows<Real>(p.k.dtype, [&](auto rows) { return DecodeUnit<decltype(rows)>::layout(p, b, nullptr).bytes; });
}

template <class Real>
void run_decode_unit(const Operands& p, const Blocking& b, const Unit& u, const Partial& partial, char* memory) {
  with_rows<Real>(p.k.dtype, [&](auto rows) { decode_rows<decltype(rows)>(p, b, u, partial, memory); });
}

}  // namespace fastattn::FASTATTN_ISA
