// The forward kernels against a plain triple loop in double, without torch and Python: for sanitizers and for machines
// that are only emulated. Shares no code with csrc/ but the description of a call.
//
//   parity [number of random problems] [first seed]      FASTATTN_CPU_ISA chooses the kernels, as everywhere
//
// Prints a line for each failure, then "N passed, M failed".
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"

using fastattn::DType;

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

struct Random {
  uint64_t state;

  uint64_t next() {  // splitmix64
    uint64_t x = state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  int64_t between(int64_t low, int64_t high) { return low + (int64_t)(next() % (uint64_t)(high - low + 1)); }
  bool chance(int percent) { return between(1, 100) <= percent; }
  double value() { return (double)between(-64, 64) / 32; }  // exact in every dtype
  template <class T>
  T pick(const std::vector<T>& from) {
    return from[between(0, (int64_t)from.size() - 1)];
  }
};

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::boolean: return 1;
    case DType::bfloat16:
    case DType::float16: return 2;
    case DType::float32:
    case DType::int32: return 4;
    case DType::float64: return 8;
  }
  return 0;
}

template <class T>
T read(const char* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
void write(char* p, T x) {
  memcpy(p, &x, sizeof x);
}

double half_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31 ? (fraction ? NAN : infinity)
                           : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                          : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}
uint16_t double_to_half(double x) {  // exact values of `Random` and what is not finite
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  if (x == 0) return sign;
  int exponent;
  const double fraction = std::frexp(std::fabs(x), &exponent);  // in [0.5, 1)
  return (uint16_t)(sign | (exponent + 14) << 10 | ((int)(fraction * 2048) & 1023));
}

// A tensor [4] with memory that ends with its last element, full of 0xff (NaN) where no element stands.
class Array {
 public:
  int64_t size[4], stride[4];
  DType dtype;
  int64_t bytes = 0;
  std::unique_ptr<char, void (*)(void*)> data{nullptr, std::free};

  Array() = default;
  // `order`: dimensions from the outermost in memory; `step`: gap of the innermost; broadcast dimensions have size 1.
  Array(DType dtype, const int64_t (&sizes)[4], const int (&order)[4], int64_t step) : dtype(dtype) {
    int64_t elements = 1, next = step;
    for (int i = 3; i >= 0; i--) {
      const int d = order[i];
      size[d] = sizes[d];
      stride[d] = next;
      next *= sizes[d] > 0 ? sizes[d] : 1;
      elements += (sizes[d] - 1) * stride[d];
    }
    for (int64_t s : sizes)
      if (s == 0) elements = 0;
    bytes = elements * size_of(dtype);
    data.reset((char*)std::malloc(bytes ? bytes : 1));
    memset(data.get(), 0xff, bytes);
  }

  explicit operator bool() const { return data != nullptr; }
  int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
  char* at(int64_t b, int64_t h, int64_t r, int64_t c) const {
    const int64_t index[4] = {b, h, r, c};
    int64_t offset = 0;
    for (int d = 0; d < 4; d++) offset += size[d] == 1 ? 0 : index[d] * stride[d];
    return data.get() + offset * size_of(dtype);
  }
  double get(int64_t b, int64_t h, int64_t r, int64_t c) const {
    const char* p = at(b, h, r, c);
    switch (dtype) {
      case DType::boolean: return *p != 0;
      case DType::int32: return read<int32_t>(p);
      case DType::float32: return read<float>(p);
      case DType::float64: return read<double>(p);
      case DType::float16: return half_to_double(read<uint16_t>(p));
      case DType::bfloat16: {
        const uint32_t wide = (uint32_t)read<uint16_t>(p) << 16;
        return read<float>((const char*)&wide);
      }
    }
    return 0;
  }
  void set(int64_t b, int64_t h, int64_t r, int64_t c, double x) {
    char* p = at(b, h, r, c);
    const float narrow = (float)x;
    switch (dtype) {
      case DType::boolean: *p = x != 0; return;
      case DType::int32: return write(p, (int32_t)x);
      case DType::float32: return write(p, narrow);
      case DType::float64: return write(p, x);
      case DType::float16: return write(p, double_to_half(x));
      case DType::bfloat16: return write(p, (uint16_t)(read<uint32_t>((const char*)&narrow) >> 16));
    }
  }
  template <class Function>
  void each(Function function) const {
    for (int64_t b = 0; b < size[0]; b++)
      for (int64_t h = 0; h < size[1]; h++)
        for (int64_t r = 0; r < size[2]; r++)
          for (int64_t c = 0; c < size[3]; c++) function(b, h, r, c);
  }
  std::vector<double> values() const {
    std::vector<double> all;
    each([&](int64_t b, int64_t h, int64_t r, int64_t c) { all.push_back(get(b, h, r, c)); });
    return all;
  }
  template <class Function>
  void fill(Function value) {
    each([&](int64_t b, int64_t h, int64_t r, int64_t c) { set(b, h, r, c, value()); });
  }
  // Bytes that belong to no element are as they were made.
  bool intact_between_elements() const {
    std::vector<bool> mine(bytes);
    each([&](int64_t b, int64_t h, int64_t r, int64_t c) {
      const int64_t first = at(b, h, r, c) - data.get();
      for (int64_t i = 0; i < size_of(dtype); i++) mine[first + i] = true;
    });
    for (int64_t i = 0; i < bytes; i++)
      if (!mine[i] && (unsigned char)data.get()[i] != 0xff) return false;
    return true;
  }
  fastattn::Tensor tensor() const {
    fastattn::Tensor t;
    t.data = data.get();
    t.dtype = dtype;
    for (int d = 0; d < 4; d++) t.stride[d] = size[d] == 1 ? 0 : stride[d];
    return t;
  }
};

struct Call {
  DType dtype = DType::float32;
  int64_t batch = 1, num_heads = 1, num_heads_k = 1, seqlen_q = 1, seqlen_k = 1, head_dim = 8, head_dim_v = 8;
  int64_t lo = -(1ll << 40), hi = 1ll << 40;
  double softmax_scale = 0.3, softcap = 0;
  Array q, k, v, out, lse, mask, bias, alibi_slopes, sinks, k_start, k_end;

  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return j - i >= lo && j - i <= hi && (!mask || mask.get(b, h, i, j) != 0) &&
           (!bias || bias.get(b, h, i, j) != -infinity) && (!k_start || j >= k_start.get(b, h, i, 0)) &&
           (!k_end || j < k_end.get(b, h, i, 0));
  }

  fastattn::Problem problem() const {
    fastattn::Problem p{};
    p.batch = batch, p.num_heads = num_heads, p.num_heads_k = num_heads_k;
    p.seqlen_q = seqlen_q, p.seqlen_k = seqlen_k, p.head_dim = head_dim, p.head_dim_v = head_dim_v;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor(), p.out = out.tensor();
    if (lse) p.lse = lse.tensor();
    if (mask) p.mask = mask.tensor();
    if (bias) p.bias = bias.tensor();
    if (alibi_slopes) p.alibi_slopes = alibi_slopes.tensor();
    if (sinks) p.sinks = sinks.tensor();
    if (k_start) p.k_start = k_start.tensor();
    if (k_end) p.k_end = k_end.tensor();
    p.softmax_scale = softmax_scale, p.softcap = softcap, p.diagonal_lo = lo, p.diagonal_hi = hi;
    return p;
  }

  std::string text() const {
    const char* names[] = {"float32", "float64", "bfloat16", "float16"};
    std::string s = names[(int)dtype];
    for (int64_t n : {batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v})
      s += ' ' + std::to_string(n);
    if (lo > -(1ll << 40)) s += " lo=" + std::to_string(lo);
    if (hi < 1ll << 40) s += " hi=" + std::to_string(hi);
    if (mask) s += " mask";
    if (bias) s += " bias";
    if (alibi_slopes) s += " alibi";
    if (sinks) s += " sinks";
    if (k_start) s += " k_start";
    if (k_end) s += " k_end";
    if (softcap > 0) s += " softcap";
    return s;
  }
};

// What a call has beside q, k and v. POISON: NaN and Inf where no query looks; STRIDES: any order and gaps in memory.
enum : unsigned { MASK = 1, BIAS = 2, ALIBI = 4, SINKS = 8, INTERVALS = 16, SOFTCAP = 32, POISON = 64, STRIDES = 128 };
constexpr unsigned everything = 255;

void make_tensors(Call& c, unsigned has, Random& random) {
  const DType floats[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};
  auto make = [&](DType dtype, int64_t b, int64_t h, int64_t r, int64_t col, bool may_broadcast) {
    int64_t sizes[4] = {b, h, r, col};
    int order[4] = {0, 1, 2, 3};
    if (may_broadcast)
      for (int64_t& size : sizes)
        if (random.chance(30)) size = 1;
    if (has & STRIDES)
      for (int i = 3; i > 0; i--) std::swap(order[i], order[random.between(0, i)]);
    return Array(dtype, sizes, order, has & STRIDES && random.chance(40) ? 2 : 1);
  };
  auto value = [&] { return random.value(); };
  const int64_t B = c.batch, H = c.num_heads, Sq = c.seqlen_q, Sk = c.seqlen_k;
  c.q = make(c.dtype, B, H, Sq, c.head_dim, false), c.q.fill(value);
  c.k = make(c.dtype, B, c.num_heads_k, Sk, c.head_dim, false), c.k.fill(value);
  c.v = make(c.dtype, B, c.num_heads_k, Sk, c.head_dim_v, false), c.v.fill(value);
  c.out = make(c.dtype, B, H, Sq, c.head_dim_v, false);
  c.lse = make(c.dtype == DType::float64 ? DType::float64 : DType::float32, B, H, Sq, 1, false);
  if (has & MASK) c.mask = make(DType::boolean, B, H, Sq, Sk, true), c.mask.fill([&] { return random.chance(75); });
  if (has & BIAS) {
    c.bias = make(floats[random.between(0, 3)], B, H, Sq, Sk, true);
    c.bias.fill([&] { return random.chance(10) ? -infinity : random.value(); });
  }
  if (has & ALIBI)
    c.alibi_slopes = make(floats[random.between(0, 3)], B, H, 1, 1, true),
    c.alibi_slopes.fill([&] { return (double)random.between(0, 32) / 64; });
  if (has & SINKS) c.sinks = make(floats[random.between(0, 3)], 1, H, 1, 1, false), c.sinks.fill(value);
  if (has & INTERVALS) {
    // constant over some rows, so that neighbouring panels see keys far apart
    const int64_t run = random.pick<int64_t>({1, 7, 16, 64});
    c.k_start = make(DType::int32, B, H, Sq, 1, true), c.k_end = make(DType::int32, B, H, Sq, 1, true);
    int64_t start = 0, length = 0, n = 0;
    auto draw = [&] {
      if (n++ % (2 * run) == 0)
        start = random.between(-2, Sk), length = random.between(0, random.chance(50) ? 9 : Sk + 2);
    };
    c.k_start.fill([&] { return draw(), (double)start; });
    c.k_end.fill([&] { return draw(), (double)(start + length); });
  }
  if (has & SOFTCAP) c.softcap = 4;
  if (has & POISON) {
    const int64_t group = c.num_heads_k ? H / c.num_heads_k : 1;
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < c.num_heads_k; h++)
        for (int64_t j = 0; j < Sk; j++) {
          bool seen = false;
          for (int64_t g = 0; g < group; g++)
            for (int64_t i = 0; i < Sq && !seen; i++) seen = c.sees(b, h * group + g, i, j);
          const double poison = random.chance(50) ? NAN : infinity;
          for (int64_t d = 0; !seen && d < c.head_dim; d++) c.k.set(b, h, j, d, poison);
          for (int64_t d = 0; !seen && d < c.head_dim_v; d++) c.v.set(b, h, j, d, poison);
        }
  }
}

bool close(double actual, double expected, double tolerance) {
  if (std::isinf(expected)) return actual == expected;
  return std::fabs(actual - expected) <= tolerance * std::fmax(1.0, std::fabs(expected));
}

// The definition, row by row.
bool equals_definition(const Call& c, double& worst) {
  const double eps = c.dtype == DType::float64 ? 0x1p-52 : 0x1p-23;
  const double half_ulp = c.dtype == DType::bfloat16 ? 0x1p-8 : c.dtype == DType::float16 ? 0x1p-11 : 0;
  const int64_t group = c.num_heads_k ? c.num_heads / c.num_heads_k : 1;
  const std::vector<double> qs = c.q.values(), ks = c.k.values(), vs = c.v.values();
  std::vector<double> score(c.seqlen_k), row(c.head_dim_v);
  bool good = true;
  for (int64_t b = 0; b < c.batch; b++)
    for (int64_t h = 0; h < c.num_heads; h++)
      for (int64_t i = 0; i < c.seqlen_q; i++) {
        const double* q = &qs[((b * c.num_heads + h) * c.seqlen_q + i) * c.head_dim];
        const int64_t key0 = (b * c.num_heads_k + h / group) * c.seqlen_k;
        const double sink = c.sinks ? c.sinks.get(0, h, 0, 0) : -infinity;
        double largest = sink, total = 0;
        for (int64_t j = 0; j < c.seqlen_k; j++) {
          score[j] = -infinity;
          if (!c.sees(b, h, i, j)) continue;
          double s = 0;
          for (int64_t d = 0; d < c.head_dim; d++) s += q[d] * ks[(key0 + j) * c.head_dim + d];
          s *= c.softmax_scale;
          if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
          if (c.bias) s += c.bias.get(b, h, i, j);
          if (c.alibi_slopes) s -= c.alibi_slopes.get(b, h, 0, 0) * std::abs(i + c.seqlen_k - c.seqlen_q - j);
          score[j] = s;
          largest = std::fmax(largest, s);
        }
        for (double& x : row) x = 0;
        for (int64_t j = 0; j < c.seqlen_k; j++) {
          if (score[j] == -infinity) continue;
          const double weight = std::exp(score[j] - largest);
          total += weight;
          for (int64_t d = 0; d < c.head_dim_v; d++) row[d] += weight * vs[(key0 + j) * c.head_dim_v + d];
        }
        if (sink != -infinity) total += std::exp(sink - largest);
        const double lse = total == 0 ? -infinity : largest + std::log(total);
        // rounding a score moves its weight by that much
        const double tolerance = eps * (40 + (total == 0 ? 0 : 2 * std::fabs(lse)));
        good &= close(c.lse.get(b, h, i, 0), lse, tolerance);
        for (int64_t d = 0; d < c.head_dim_v; d++) {
          const double expected = total == 0 ? 0 : row[d] / total, actual = c.out.get(b, h, i, d);
          good &= close(actual, expected, half_ulp + tolerance);
          worst = std::fmax(worst, std::fabs(actual - expected));
        }
      }
  return good;
}

int passed = 0, failed = 0;

void check(Call& c, const char* what, uint64_t seed) {
  auto say = [&](const char* why, double worst = 0) {
    std::printf("%s, seed %llu: %s [%s], largest error %g\n", why, (unsigned long long)seed, what, c.text().c_str(),
                worst);
  };
  const fastattn::Problem problem = c.problem();
  fastattn::forward(problem, 1);
  double worst = 0;
  bool good = true;
  if (!equals_definition(c, worst)) good = false, say("wrong", worst);
  if (!c.out.intact_between_elements() || !c.lse.intact_between_elements()) good = false, say("wrote beside out");

  const std::string out(c.out.data.get(), c.out.bytes), lse(c.lse.data.get(), c.lse.bytes);
  auto same_bits = [&] {
    return !memcmp(c.out.data.get(), out.data(), out.size()) && !memcmp(c.lse.data.get(), lse.data(), lse.size());
  };
  auto again = [&](int threads, bool nested) {
    memset(c.out.data.get(), 0xff, c.out.bytes), memset(c.lse.data.get(), 0xff, c.lse.bytes);
    if (!nested) return fastattn::forward(problem, threads);
#pragma omp parallel num_threads(2)
#pragma omp single
    fastattn::forward(problem, threads);
  };
  again(3, false);
  if (!same_bits()) good = false, say("other bits with three threads");
  again(2, true);
  if (!same_bits()) good = false, say("other bits within a parallel region");

  fastattn::Problem without_lse = problem;
  without_lse.lse = {};
  fastattn::forward(without_lse, 1);
  if (!same_bits()) good = false, say("other bits without lse");
  good ? passed++ : failed++;
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
  for (unsigned extra = MASK; extra <= SOFTCAP; extra *= 2) has |= random.chance(25) ? extra : 0;
  for (unsigned extra : {POISON, STRIDES}) has |= random.chance(50) ? extra : 0;
  make_tensors(c, has, random);
  check(c, "random", seed);
}

// Each dtype and odd head_dim once by itself, and the sizes at which something begins or ends.
void check_chosen() {
  constexpr unsigned plain = 0;
  uint64_t seed = 1;
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
    auto run = [&](const char* what, int64_t b, int64_t h, int64_t hk, int64_t sq, int64_t sk, int64_t d, int64_t dv,
                   unsigned has, bool causal) {
      Random random{seed};
      Call c;
      c.dtype = dtype, c.batch = b, c.num_heads = h, c.num_heads_k = hk;
      c.seqlen_q = sq, c.seqlen_k = sk, c.head_dim = d, c.head_dim_v = dv;
      c.softmax_scale = 1 / std::sqrt((double)d);
      if (causal) c.hi = sk - sq;
      make_tensors(c, has, random);
      check(c, what, seed++);
    };
    for (int64_t d : {1, 2, 7, 8, 9, 15, 16, 17, 33, 64, 65, 127, 300})
      for (int64_t s : {1, 3, 17}) run("head_dim", 1, 2, 1, s, s + 20, d, 302 - d, plain, false);
    for (int64_t sq : {1, 15, 16, 17, 127, 128, 129, 257})
      for (int64_t sk : {1, 127, 128, 129, 257}) run("lengths", 1, 1, 1, sq, sk, 9, 12, plain, true);
    run("no query", 1, 2, 2, 0, 5, 8, 8, plain, false);
    run("no key", 1, 2, 2, 5, 0, 8, 8, plain, false);
    run("no key but sinks", 1, 2, 2, 5, 0, 8, 8, SINKS, false);
    run("no batch", 0, 2, 2, 5, 5, 8, 8, plain, false);
    run("no head", 1, 0, 0, 5, 5, 8, 8, plain, false);
    run("largest head_dim", 1, 1, 1, 33, 140, 512, 512, plain, true);
    for (int64_t sq : {1, 4, 140}) {
      run("splits", 2, 2, 1, sq, 2100, 8, 24, plain, true);
      run("splits, everything", 1, 2, 1, sq, 1100, 8, 24, everything, true);
    }
    for (unsigned more : {(unsigned)POISON, POISON | STRIDES}) {
      run("mask", 2, 4, 2, 40, 150, 16, 16, MASK | more, false);
      run("bias", 2, 4, 2, 40, 150, 16, 16, BIAS | more, false);
      run("mask and bias", 2, 4, 2, 40, 150, 16, 16, MASK | BIAS | more, true);
      run("intervals", 2, 4, 2, 140, 700, 16, 16, INTERVALS | more, false);
      run("everything", 2, 4, 2, 60, 170, 16, 20, (everything & ~STRIDES) | more, true);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : 300;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  try {
    std::printf("%s\n", fastattn::kernels().name);
    check_chosen();
    for (int i = 0; i < count; i++) check_random(first + i);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
