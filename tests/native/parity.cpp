// The forward, the backward and the forward-mode kernels against their definition in double, without torch and Python:
// for sanitizers and for machines that are only emulated.
//
//   parity [number of random problems] [first seed]      FASTATTN_CPU_ISA chooses the kernels, as everywhere
//
// Prints a line for each failure, the largest error as a share of what is allowed, then "N passed, M failed".
#include <cstdio>

#include "definition.h"
#include "drive/openmp.h"

namespace {

constexpr double roundings = 16;  // how many times a sum may be off by one rounding of the sizes of its terms

constexpr double rounded_weights = 0x1p-7;

double worst_share = 0;

// Checks one call; says what is wrong.
class Check {
  Call& c;
  const char* what;
  const uint64_t seed;
  const fastattn::Operands forward_problem, backward_problem;
  const fastattn::Gradients gradients;

 public:
  bool good = true;

  Check(Call& call, const char* what, uint64_t seed)
      : c(call),
        what(what),
        seed(seed),
        forward_problem(c.forward_problem()),
        backward_problem(c.backward_problem()),
        gradients(c.wanted()) {}

  void run() {
    std::vector<std::string> inputs;
    for (const Array* a : c.inputs()) inputs.push_back(*a ? a->with_guards() : "");
    Definition expected(c);
    if (!forward_problem.block_mask && c.seqlen_q <= 64) {
      kernel = fastattn::decode;
      check_forward(expected);
    }
    kernel = fastattn::forward;
    const std::vector<std::string> forward = check_forward(expected);
    clear_gradients();
    run_backward(1);
    compare_backward(expected);
    same_backward();
    if (bits(c.outputs()) != forward) say("backward wrote into out");
    run_tangent(1);
    compare("tout", c.tout, expected.tout), compare("tlse", c.tlse, expected.tlse);
    same_tangent();
    for (size_t i = 0; i < inputs.size(); i++)
      if (*c.inputs()[i] && c.inputs()[i]->with_guards() != inputs[i]) say("wrote into an input");
    for (const auto& arrays : {c.outputs(), c.strided_gradients(), c.summed_gradients(), c.tangent_outputs()})
      for (const Array* a : arrays)
        if (*a && !a->intact_beside_elements()) say("wrote beside a result");
  }

 private:
  void (*kernel)(fastattn::Operands&, int) = nullptr;

  std::vector<std::string> check_forward(Definition& expected) {
    for (Array* a : c.outputs())
      if (*a) a->forget();
    run_forward(1);
    compare_forward(expected);
    const std::vector<std::string> found = bits(c.outputs());
    same_forward(found);
    return found;
  }

  void say(const char* why, double share = 0) {
    good = false;
    std::printf("%s, seed %llu: %s [%s]", why, (unsigned long long)seed, what, c.text().c_str());
    std::printf(share ? ", %g of what is allowed\n" : "\n", share);
  }

  void compare(const char* name, const Array& actual, Sums& expected) {
    if (!actual) return;
    const bool exact = c.compute_dtype() == DType::float64;
    const double eps = exact ? 0x1p-52 : 0x1p-23, least = exact ? 0x1p-1000 : 0x1p-120;
    // where it is stored: relative, and below what is normal
    const double half_ulp = actual.dtype == DType::bfloat16 ? 0x1p-8 : actual.dtype == DType::float16 ? 0x1p-11 : 0;
    const double subnormal = actual.dtype == DType::float16 ? 0x1p-25 : 0;
    // Weights and dS are bfloat16 where products are of pairs.
    const bool in_pairs = c.dtype == DType::bfloat16 && fastattn::instruction_set().with_pairs;
    const double allowed = in_pairs ? rounded_weights : roundings * eps;
    double worst = 0;
    actual.each([&](int64_t b, int64_t h, int64_t r, int64_t col) {
      const double x = actual.get(b, h, r, col);
      const Sum e = expected.at(b, h, r, col);
      if (x == e.value) return;
      const double stored = e.size ? std::fmax(half_ulp * std::fabs(e.value), subnormal) : 0;
      const double share = (std::fabs(x - e.value) - stored) / (allowed * e.size + least);
      worst = std::isnan(share) ? infinity : std::fmax(worst, share);
    });
    worst_share = std::fmax(worst_share, worst);
    if (worst > 1) say(name, worst);
  }

  void compare_forward(Definition& expected) {
    compare("out", c.out, expected.out), compare("lse", c.lse, expected.lse);
    compare("out_exact", c.out_exact, expected.out);
    bool good = true;
    c.lse.each([&](int64_t b, int64_t h, int64_t i, int64_t) {
      const double top = c.lse_parts.get(b, h, i, 0), log_sum = c.lse_parts.get(b, h, i, 1),
                   lse = c.lse.get(b, h, i, 0);
      const double allowed = 4 * (c.compute_dtype() == DType::float64 ? 0x1p-52 : 0x1p-23) * (1 + std::fabs(lse));
      good &= lse == -infinity ? top == 0 && log_sum == infinity : std::fabs(top + log_sum - lse) <= allowed;
    });
    if (!good) say("lse_parts");
  }
  void compare_backward(Definition& expected) {
    compare("dq", c.dq, expected.dq), compare("dk", c.dk, expected.dk), compare("dv", c.dv, expected.dv);
    compare("dbias", c.dbias, expected.dbias), compare("dalibi_slopes", c.dalibi_slopes, expected.dalibi_slopes);
    compare("dsinks", c.dsinks, expected.dsinks), compare("dscales", c.dscales, expected.dscales);
  }

  void run_forward(int threads) {
    fastattn::Operands p = forward_problem;
    kernel(p, threads);
  }
  void run_backward(int threads) {
    fastattn::Operands p = backward_problem;
    fastattn::backward(p, gradients, threads);
  }

  void run_tangent(int threads) {
    fastattn::Operands p = c.problem();
    fastattn::tangent(p, c.tangents(), threads);
  }

  static std::vector<std::string> bits(const std::vector<Array*>& arrays) {
    std::vector<std::string> all;
    for (const Array* a : arrays) all.push_back(*a ? a->contents() : "");
    return all;
  }

  template <class Run>
  static void nested(Run run) {
    if (!fastattn::openmp.parallel) return run();
    fastattn::openmp.parallel(
        [](void* run) {
          if (fastattn::openmp.thread_num() == 1) (*(Run*)run)();
        },
        &run, 2, 0);
  }

  // The same bits however a call is run, and whatever else is asked for.
  void same_forward(const std::vector<std::string>& expected) {
    auto again = [&](const char* how, auto run) {
      for (Array* a : c.outputs())
        if (*a) a->forget();
      run();
      if (bits(c.outputs()) != expected) say(how);
    };
    again("other bits with two threads", [&] { run_forward(2); });
    again("other bits with three threads", [&] { run_forward(3); });
    again("other bits within a parallel region", [&] { nested([&] { run_forward(2); }); });
    fastattn::Operands out_alone = forward_problem;
    out_alone.lse = out_alone.lse_parts = out_alone.out_exact = {};
    kernel(out_alone, 1);
    if (bits(c.outputs()) != expected) say("other bits with out alone");
  }

  void same_tangent() {
    const std::vector<std::string> expected = bits(c.tangent_outputs());
    for (Array* a : c.tangent_outputs()) a->forget();
    run_tangent(3);
    if (bits(c.tangent_outputs()) != expected) say("other tangents with three threads");
  }

  void clear_gradients() {
    for (Array* a : c.strided_gradients())
      if (*a) a->forget();
    for (Array* a : c.summed_gradients())
      if (*a) a->fill([] { return 0.0; });
  }
  void same_backward() {
    const std::vector<std::string> strided = bits(c.strided_gradients()), summed = bits(c.summed_gradients());
    auto again = [&](const char* how, auto run) {
      clear_gradients();
      run();
      if (bits(c.strided_gradients()) != strided || bits(c.summed_gradients()) != summed) say(how);
    };
    again("other gradients with two threads", [&] { run_backward(2); });
    again("other gradients within a parallel region", [&] { nested([&] { run_backward(2); }); });
  }
};

int passed = 0, failed = 0;

void check(Call& c, const char* what, uint64_t seed) {
  Check check(c, what, seed);
  check.run();
  check.good ? passed++ : failed++;
}

void check_random(uint64_t seed) {
  Random random{seed * 1000003};
  Call c;
  c.dtype = (DType)random.between(0, 3);
  c.batch = random.between(1, 2);
  c.num_heads_k = random.between(1, 2);
  c.num_heads = c.num_heads_k * random.between(1, 3);
  c.seqlen_q = random.chance(60) ? random.between(1, 40) : random.pick<int64_t>({64, 127, 128, 129, 200});
  c.seqlen_k = random.chance(60) ? random.between(1, 70) : random.pick<int64_t>({127, 128, 129, 300, 520});
  if (random.chance(15)) c.seqlen_q = random.between(1, 5), c.seqlen_k = random.between(1020, 1700);
  c.head_dim = random.chance(70) ? random.between(1, 40) : random.pick<int64_t>({64, 65, 128});
  c.head_dim_v = random.chance(50) ? c.head_dim : random.between(1, 48);
  c.softmax_scale = 1 / std::sqrt((double)c.head_dim);
  const int64_t offset = random.chance(70) ? c.seqlen_k - c.seqlen_q : 0;
  if (random.chance(40)) c.hi = offset + (random.chance(70) ? 0 : random.between(0, 50));
  if (random.chance(20)) c.lo = offset - random.between(0, 50);
  unsigned has = 0;
  for (unsigned extra = MASK; extra < POISON; extra *= 2) has |= random.chance(25) ? extra : 0;
  for (unsigned extra : {POISON, STRIDES}) has |= random.chance(50) ? extra : 0;
  if (random.chance(15)) c.batch = random.between(4, 6), has |= SHARED;
  CallMaker(c, has, random).make();
  check(c, "random", seed);
}

// Each dtype and odd head_dim once by itself, and the sizes at which something begins or ends.
void check_chosen() {
  constexpr unsigned plain = 0;
  uint64_t seed = 1;
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    auto run = [&](const char* what, int64_t b, int64_t h, int64_t hk, int64_t sq, int64_t sk, int64_t d, int64_t dv,
                   unsigned has, bool causal, int64_t window = -1) {
      Random random{seed};
      Call c;
      c.dtype = dtype, c.batch = b, c.num_heads = h, c.num_heads_k = hk;
      c.seqlen_q = sq, c.seqlen_k = sk, c.head_dim = d, c.head_dim_v = dv;
      c.softmax_scale = 1 / std::sqrt((double)d);
      if (causal) c.hi = sk - sq;
      if (window >= 0) c.lo = sk - sq - window;
      CallMaker(c, has, random).make();
      check(c, what, seed++);
    };
    for (int64_t d : {1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 65, 127, 300})
      for (int64_t s : {1, 3, 17}) run("head_dim", 1, 2, 1, s, s + 20, d, 302 - d, plain, false);
    for (int64_t sq : {1, 15, 16, 17, 127, 128, 129, 257})
      for (int64_t sk : {1, 127, 128, 129, 257}) run("lengths", 1, 1, 1, sq, sk, 9, 12, plain, true);
    for (unsigned has : {plain, everything & ~POISON}) {
      run("no query", 1, 2, 2, 0, 5, 8, 8, has, false);
      run("no key", 1, 2, 2, 5, 0, 8, 8, has, false);
      run("no batch", 0, 2, 2, 5, 5, 8, 8, has, false);
      run("no head", 1, 0, 0, 5, 5, 8, 8, has, false);
    }
    run("no key but sinks", 1, 2, 2, 5, 0, 8, 8, SINKS | DLSE, false);
    run("largest head_dim", 1, 1, 1, 33, 140, 512, 512, plain, true);
    for (int64_t sq : {1, 4, 140}) {
      run("splits", 2, 2, 1, sq, 2100, 8, 24, plain, true);
      run("splits, everything", 1, 2, 1, sq, 1100, 8, 24, everything, true);
    }
    run("all splits", 1, 1, 1, 3, 4200, 8, 12, DROPOUT, false);
    run("all splits, one dbias", 2, 4, 2, 5, 4200, 8, 12, BIAS, true);
    for (unsigned more : {(unsigned)POISON, POISON | STRIDES}) {
      run("mask", 2, 4, 2, 40, 150, 16, 16, MASK | more, false);
      run("bias", 2, 4, 2, 40, 150, 16, 16, BIAS | more, false);
      run("mask and bias", 2, 4, 2, 40, 150, 16, 16, MASK | BIAS | more, true);
      run("intervals", 2, 4, 2, 140, 700, 16, 16, INTERVALS | more, false);
      run("everything", 2, 4, 2, 60, 170, 16, 20, (everything & ~STRIDES) | more, true);
      for (unsigned terms : {(unsigned)MASK, (unsigned)BIAS, everything & ~STRIDES}) {
        run("shared, one row", 4, 2, 2, 1, 50, 16, 12, terms | SHARED | more, false);
        run("shared, narrow", 4, 2, 2, 17, 50, 20, 12, terms | SHARED | more, false);
        run("shared, a group", 5, 4, 2, 49, 128, 16, 16, terms | SHARED | more, true);
        run("shared, longest to be laid", 4, 2, 1, 128, 128, 8, 16, terms | SHARED | more, true);
      }
    }
    // partial results of dq of more than 64 MiB: a few batches at a time
    if (dtype == DType::float32) run("waves", 5, 8, 8, 600, 4200, 128, 8, BIAS, true, 9);
  }
}

bool philox_is_right() {  // the known answers of the paper's code
  const Philox x(0x299f31d0a4093822, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344});
  return x.word[0] == 0xd16cfe09 && x.word[1] == 0x94fdcceb && x.word[2] == 0x5001e420 && x.word[3] == 0x24126ea1;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  try {
    const fastattn::InstructionSet& isa = fastattn::instruction_set();
    std::printf("%s\n", isa.with_pairs ? isa.with_pairs : isa.name);
    philox_is_right() ? passed++ : failed++;
    check_chosen();
    for (int i = 0; i < count; i++) check_random(first + i);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("largest error: %g of what is allowed\n%d passed, %d failed\n", worst_share, passed, failed);
  return failed != 0;
}
