// What reads the arguments of one kind and of another share.
#pragma once
#include "arguments.h"

namespace fastattn::python {

constexpr size_t num_tensor_terms = sizeof tensor_terms / sizeof *tensor_terms;

// The fields of a Terms that the kernels read: those of tensor_terms, in its order, and then these.
enum TermsField : size_t {
  kSoftcap = num_tensor_terms,
  kDiagonalLo,
  kDiagonalHi,
  kQueryStart,
  kBlockMask,
  kDropoutP,
  kSeed,
  kDropoutStart,
  kSkipNegligible,
  kRotaryCos,
  kRotarySin,
  kRotaryInterleaved,
  num_terms_fields,
};
std::vector<const char*> names_of_terms();
std::vector<const char*> names_of_sequences();

// The sizes of what belongs to queries and to keys, as many columns as asked for.
struct Sizes {
  int64_t of[4];

  using Four = const int64_t (&)[4];
  operator Four() const { return of; }
};

double number(PyObject* object);
int64_t integer(PyObject* object);

// scores: what terms broadcast to.
void read_terms(const Fields::Values& terms, const Sizes& scores, Operands& p, Owned& owned);

// Entries of a list.
Tensor list_of(const View& v, const char* name, int64_t size);

}  // namespace fastattn::python
