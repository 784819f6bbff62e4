// The body of every isa_*.cpp, compiled once for each real type (FASTATTN_REAL: float, double), so that a build has units
// of like size: the kernels of one instruction set, behind one table.
// No std container here and nothing else with a body from a std header: compiled under -mavx512f it would be a weak
// symbol that the linker may pick for everybody.
#pragma once
#include "passes/append.h"
#include "passes/backward.h"
#include "passes/csr.h"
#include "passes/decode.h"
#include "passes/prefill.h"
#include "passes/statistics.h"
#include "passes/tangent.h"

namespace fastattn::FASTATTN_ISA {

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

template <class Real>
constexpr Kernels make_kernels() {
  Kernels table{};
  table.blocking = make_blocking<Real>;
  table.scratch_bytes = scratch_bytes<Real>;
  table.find_keys = find_keys;
  table.run_unit = run_unit<Real>;
  table.lay_bias = lay_bias<Real>;
  table.add_laid_bias = add_laid_bias<Real>;
  table.combine = combine<Real>;
  table.decode_blocking = make_decode_blocking<Real>;
  table.decode_scratch_bytes = decode_scratch_bytes<Real>;
  table.run_decode_unit = run_decode_unit<Real>;
  table.tangent_blocking = make_tangent_blocking<Real>;
  table.tangent_scratch_bytes = tangent_scratch_bytes<Real>;
  table.run_tangent_unit = run_tangent_unit<Real>;
  table.statistics_blocking = make_statistics_blocking<Real>;
  table.statistics_scratch_bytes = statistics_scratch_bytes<Real>;
  table.run_statistics_unit = run_statistics_unit<Real>;
  table.add_groups = add_groups<Real>;
  table.backward_blocking = make_backward_blocking<Real>;
  table.backward_scratch_bytes = backward_scratch_bytes<Real>;
  table.count_pairs = count_pairs;
  table.run_key_unit = run_key_unit<Real>;
  table.combine_dq = combine_dq<Real>;
  table.csr_scratch_bytes = csr_scratch_bytes<Real>;
  table.csr_forward = csr_forward<Real>;
  table.csr_backward_rows = csr_backward_rows<Real>;
  table.csr_backward_keys = csr_backward_keys<Real>;
  table.move_rows = move_rows<Real>;
  table.multiply_adds = [](int64_t steps) { return multiply_adds<Real>(steps, std::make_integer_sequence<int, 12>{}); };
  return table;
}

#define FASTATTN_PASTE(a, b) a##b
#define FASTATTN_KERNELS(real) FASTATTN_PASTE(kernels_of_, real)
extern const Kernels FASTATTN_KERNELS(FASTATTN_REAL);
const Kernels FASTATTN_KERNELS(FASTATTN_REAL) = make_kernels<FASTATTN_REAL>();

}  // namespace fastattn::FASTATTN_ISA
