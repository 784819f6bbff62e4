// The forward and the backward pass of a whole call: units from the shape, longest first, over the threads.
#pragma once
#include "params.h"

namespace fastattn {

// The best kernels that this machine runs, narrowed by FASTATTN_CPU_ISA; throws std::runtime_error for an ISA that is
// unknown, not built or not supported here. Decided once.
const Kernels& kernels();

void forward(const Problem& problem, int threads);

// dq, dk, dv of a forward pass that has filled out and lse_parts.
void backward(const Problem& problem, const Gradients& gradients, int threads);

// How many (query, key) pairs all calls of this process have left out because their weights are 0 (skip.h).
int64_t skipped_pairs();

// Attention along edges and its gradients (csr.cpp). std::invalid_argument, before anything is computed, if an entry of
// the lists is out of range.
void csr_forward(const Problem& problem, const Csr& lists, int threads);
void csr_backward(const Problem& problem, const Gradients& gradients, const Csr& lists, int threads);
void check_lists(const Csr& lists, int64_t seqlen_q, int64_t seqlen_k);

// Peak of independent multiply-adds, FLOP/s summed over `threads`, measured for `seconds`.
double fma_rate(DType dtype, double seconds, int threads);

}  // namespace fastattn
