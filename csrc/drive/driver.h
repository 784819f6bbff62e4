// The passes of a whole call, forward, backward, forward-mode and statistics: units from the shape, longest first, over the threads.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace fastattn {

// The best instruction set that this machine runs, narrowed by FASTATTN_CPU_ISA; throws std::invalid_argument for one that
// is unknown, not built or not supported here. Decided once.
const InstructionSet& instruction_set();

std::vector<std::string> built_names();  // of all that this build has, best first

inline int64_t element_bytes(const Operands& p) { return p.q.dtype == DType::float64 ? 8 : 4; }  // when computing

// Whether the forward and backward kernels multiply pairs of bfloat16, not float: by the call's kind, never by its values.
inline bool multiplies_pairs(const Operands& p) { return instruction_set().with_pairs && p.has_pairs(); }

// Completes `p` by what is found on the way: lists of blocks, norms of tiles.
void forward(Operands& p, int threads);

// The same for few query rows a key head; no list of blocks.
void decode(Operands& p, int threads);

// The most query rows a key head for which `decode` is the faster of the two: asked for whole calls by fastattn.dispatch,
// and here for each of many sequences.
constexpr int64_t few_rows = 12;

// Each sequence by itself, with the bits of a call of its own. std::invalid_argument, before anything is read or written,
// for an entry of the lists that is out of range.
void forward(Operands& p, const Sequences& sequences, int threads);
void backward(Operands& p, const Gradients& gradients, const Sequences& sequences, int threads);

// dq, dk, dv and the sums of a forward pass that has filled out and lse_parts.
void backward(Operands& p, const Gradients& gradients, int threads);

// The tangents of out and lse, from the inputs and theirs alone.
void tangent(Operands& p, const Tangents& tangents, int threads);

// What the weights of a call amount to, whose lse_parts are known.
void statistics(Operands& p, const Statistics& statistics, int threads);

// What a number of a row of scores must reach: to be one of the largest (top_k, or what is seen if that is less), or to
// have a weight in sparsemax, or half of it in entmax-1.5. NaN where a score is NaN or infinite, but of the largest.
enum class Threshold { largest, sparsemax, entmax15 };

// Those of `scores`, contiguous [rows, keys], hidden ones -inf, into `found` [rows]: float32 or float64, both the same.
void thresholds(const Tensor& scores, const Tensor& found, int64_t rows, int64_t keys, Threshold rule, int64_t top_k,
                int threads);

// How many (query, key) pairs all calls of this process have left out because their weights are 0 (skip.h).
int64_t skipped_pairs();
int64_t* skipped_counter();

// Attention along edges and its gradients. std::invalid_argument, before anything is computed, if an entry of the lists is
// out of range.
void csr_forward(const Operands& p, const Csr& lists, int threads);
void csr_backward(const Operands& p, const Gradients& gradients, const Csr& lists, int threads);

// Peak of independent multiply-adds, FLOP/s summed over `threads`, measured for `seconds`.
double fma_rate(DType dtype, double seconds, int threads);

// Bytes/s of plain loads in the order of their addresses, of `bytes` bytes that `threads` threads share: the best of
// several passes.
double read_rate(int64_t bytes, int passes, int threads);

}  // namespace fastattn
