// The body of every isa_*.cpp: the kernels compiled for one instruction set, behind one table.
// No std container here and nothing else with a body from a std header: compiled under -mavx512f it would be a weak
// symbol that the linker may pick for everybody.
#pragma once
#include "backward.h"
#include "csr.h"
#include "prefill.h"

namespace fastattn::FASTATTN_ISA {

FASTATTN_INLINE bool is_double(const Problem& p) { return p.q.dtype == DType::float64; }

Blocking blocking(const Problem& p) { return is_double(p) ? make_blocking<double>(p) : make_blocking<float>(p); }

int64_t scratch_bytes(const Problem& p, const Blocking& b) {
  return is_double(p) ? layout<double>(p, b, nullptr).bytes : layout<float>(p, b, nullptr).bytes;
}

void find_keys(const Problem& p, const Blocking& b, Unit& u) {
  const int64_t rows = smaller<int64_t>(b.rows, b.heads_per_unit * p.seqlen_q - u.row);
  Range seen = visited_range(p, u.batch, u.head, u.row, rows);
  u.k_lo = larger(seen.lo, u.split * b.split_keys);
  u.k_hi = smaller(seen.hi, (u.split + 1) * b.split_keys);
  if (!p.blocks) return (void)(u.keys = larger<int64_t>(0, u.k_hi - u.k_lo));
  u.keys = 0;
  each_key_tile(p.blocks, p.blocks->index(u.batch, u.head, u.row / b.rows), u.k_lo, u.k_hi, b.n_block,
                [&](const KeyTile& tile) { u.keys += tile.hi - tile.lo; });
}

void run(const Problem& p, const Blocking& b, const Unit& u, const Partial& partial, char* scratch) {
  is_double(p) ? run_unit<double>(p, b, u, partial, scratch) : run_unit<float>(p, b, u, partial, scratch);
}

void combine_splits(const Problem& p, const Blocking& b, const Unit& u, const Partial& first, char* scratch) {
  is_double(p) ? combine<double>(p, b, u, first, scratch) : combine<float>(p, b, u, first, scratch);
}

BackwardBlocking backward_blocking(const Problem& p, const Gradients& g) {
  return is_double(p) ? make_backward_blocking<double>(p, g) : make_backward_blocking<float>(p, g);
}

int64_t backward_scratch_bytes(const Problem& p, const BackwardBlocking& b) {
  return is_double(p) ? backward_layout<double>(p, b, nullptr).bytes : backward_layout<float>(p, b, nullptr).bytes;
}

double count_pairs(const Problem& p, const BackwardBlocking& b, const KeyUnit& u) { return pairs_of(p, b, u); }

void run_backward(const Problem& p, const Gradients& g, const BackwardBlocking& b, const KeyUnit& u, char* partial,
                  int64_t stride, char* scratch) {
  is_double(p) ? run_key_unit<double>(p, g, b, u, partial, stride, scratch)
               : run_key_unit<float>(p, g, b, u, partial, stride, scratch);
}

void combine_backward(const Problem& p, const Gradients& g, const BackwardBlocking& b, int64_t batch, int64_t head,
                      int64_t row, const char* partial, char* scratch) {
  is_double(p) ? combine_dq<double>(p, g, b, batch, head, row, partial, scratch)
               : combine_dq<float>(p, g, b, batch, head, row, partial, scratch);
}

int64_t csr_scratch_bytes(const Problem& p) {
  return is_double(p) ? csr_layout<double>(p, nullptr).bytes : csr_layout<float>(p, nullptr).bytes;
}

void csr_forward(const Problem& p, const Csr& lists, const CsrUnit& u, char* scratch) {
  is_double(p) ? CsrRows<double>(p, {}, lists, u, p.k, p.v, nullptr, scratch).forward()
               : CsrRows<float>(p, {}, lists, u, p.k, p.v, nullptr, scratch).forward();
}

void csr_backward_rows(const Problem& p, const Gradients& g, const Csr& lists, const CsrUnit& u, char* stats,
                       char* scratch) {
  is_double(p) ? CsrRows<double>(p, g, lists, u, p.k, p.v, stats, scratch).backward_rows()
               : CsrRows<float>(p, g, lists, u, p.k, p.v, stats, scratch).backward_rows();
}

void csr_backward_keys(const Problem& p, const Gradients& g, const Csr& lists, const CsrUnit& u, char* stats,
                       char* scratch) {
  is_double(p) ? CsrRows<double>(p, g, lists, u, p.q, g.dout, stats, scratch).backward_keys()
               : CsrRows<float>(p, g, lists, u, p.q, g.dout, stats, scratch).backward_keys();
}

// Independent multiply-add chains, enough to fill the pipes, kept opaque to the compiler.
template <class Real, int... I>
double multiply_adds(int64_t steps, std::integer_sequence<int, I...>) {
  const Vec<Real> a = splat((Real)0.5);
  Tile<Real, sizeof...(I), 1> tile = {splat((Real)I)...};
  for (int64_t t = 0; t < steps; t++) {
    ((tile.c[I] = tile.c[I] * a + a), ...);
    (keep(tile.c[I]), ...);
  }
  const Real sum = (tile.c[I][0] + ...);
  return sum == 0 ? 0 : 2.0 * sizeof...(I) * VL<Real> * steps;
}
double multiply_adds_of(DType dtype, int64_t steps) {
  constexpr std::make_integer_sequence<int, 12> chains;
  return dtype == DType::float64 ? multiply_adds<double>(steps, chains) : multiply_adds<float>(steps, chains);
}

extern const Kernels kernels;
const Kernels kernels = {FASTATTN_NAME, blocking,          scratch_bytes,     find_keys,
                         run,           combine_splits,    backward_blocking, backward_scratch_bytes,
                         count_pairs,   run_backward,      combine_backward,  csr_scratch_bytes,
                         csr_forward,   csr_backward_rows, csr_backward_keys, multiply_adds_of};

}  // namespace fastattn::FASTATTN_ISA
