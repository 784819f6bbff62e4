// Attention calls on random tensors in guarded memory. Shares no code with csrc/ but the description of a call.
#pragma once
#include <sanitizer/asan_interface.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "drive/driver.h"

using fastattn::DType;

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

inline int64_t size_of(DType dtype) {
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

inline double half_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31 ? (fraction ? NAN : infinity)
                           : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                          : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -magnitude : magnitude;
}
inline uint16_t double_to_half(double x) {  // exact values of `Random` and what is not finite
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  if (x == 0) return sign;
  int exponent;
  const double fraction = std::frexp(std::fabs(x), &exponent);  // in [0.5, 1)
  return (uint16_t)(sign | (exponent + 14) << 10 | ((int)(fraction * 2048) & 1023));
}

// A tensor [4] between guards, full of 0xff (NaN) where no element stands; the address sanitizer knows the guards too.
class Array {
  static constexpr int64_t guard = 64;  // bytes
  struct Free {
    int64_t bytes;
    void operator()(char* p) const {
      ASAN_UNPOISON_MEMORY_REGION(p, bytes);
      std::free(p);
    }
  };
  std::unique_ptr<char, Free> memory;

 public:
  int64_t size[4], stride[4];  // in elements
  DType dtype;
  int64_t bytes = 0;

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
    bytes = count() ? elements * size_of(dtype) : 0;
    const int64_t all = bytes + 2 * guard;
    memory = {(char*)std::malloc(all), Free{all}};
    memset(memory.get(), 0xff, all);
    close_guards();
  }

  explicit operator bool() const { return memory != nullptr; }
  char* data() const { return memory.get() + guard; }
  int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
  char* at(int64_t b, int64_t h, int64_t r, int64_t c) const {
    const int64_t index[4] = {b, h, r, c};
    int64_t offset = 0;
    for (int d = 0; d < 4; d++) offset += size[d] == 1 ? 0 : index[d] * stride[d];
    return data() + offset * size_of(dtype);
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
  template <class Function>
  void fill(Function value) {
    each([&](int64_t b, int64_t h, int64_t r, int64_t c) { set(b, h, r, c, value()); });
  }
  // All elements of the tensor seen as [b][h][r][c], which it may broadcast to.
  std::vector<double> expand(int64_t b, int64_t h, int64_t r, int64_t c) const {
    std::vector<double> all;
    all.reserve(b * h * r * c);
    for (int64_t i = 0; i < b * h * r; i++)
      for (int64_t column = 0; column < c; column++) all.push_back(get(i / (h * r), i / r % h, i % r, column));
    return all;
  }

  std::string contents() const { return {data(), (size_t)bytes}; }
  void forget() { memset(data(), 0xff, bytes); }
  std::string with_guards() const {
    ASAN_UNPOISON_MEMORY_REGION(memory.get(), bytes + 2 * guard);
    std::string all(memory.get(), bytes + 2 * guard);
    close_guards();
    return all;
  }
  // Whether the bytes that belong to no element are as they were made.
  bool intact_beside_elements() const {
    std::string all = with_guards();
    each([&](int64_t b, int64_t h, int64_t r, int64_t c) {
      memset(&all[at(b, h, r, c) - memory.get()], 0xff, size_of(dtype));
    });
    return all.find_first_not_of('\xff') == std::string::npos;
  }
  fastattn::Tensor tensor() const {
    fastattn::Tensor t;
    if (!memory) return t;
    t.data = data();
    t.dtype = dtype;
    for (int d = 0; d < 4; d++) t.stride[d] = size[d] == 1 ? 0 : stride[d];
    return t;
  }

 private:
  void close_guards() const {
    ASAN_POISON_MEMORY_REGION(memory.get(), guard);
    ASAN_POISON_MEMORY_REGION(data() + bytes, guard);
  }
};

// Philox-4x32-10 as the paper has it: the keep mask of dropout, keyed by the seed, counter (key / 4, query, head, batch).
struct Philox {
  uint32_t word[4];

  Philox(uint64_t seed, const uint32_t (&counter)[4]) {
    for (int i = 0; i < 4; i++) word[i] = counter[i];
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
      const uint64_t product0 = 0xd2511f53ull * word[0], product1 = 0xcd9e8d57ull * word[2];
      const uint32_t next[4] = {(uint32_t)(product1 >> 32) ^ word[1] ^ key[0], (uint32_t)product1,
                                (uint32_t)(product0 >> 32) ^ word[3] ^ key[1], (uint32_t)product0};
      for (int i = 0; i < 4; i++) word[i] = next[i];
      key[0] += 0x9e3779b9, key[1] += 0xbb67ae85;
    }
  }
};

// What a call has beside q, k and v. POISON: NaN and Inf where nobody may look; STRIDES: any order and gaps in memory;
// SHARED: one mask and bias for the whole batch.
enum : unsigned {
  MASK = 1,
  BIAS = 2,
  ALIBI = 4,
  SINKS = 8,
  INTERVALS = 16,
  SOFTCAP = 32,
  SCALES = 64,
  DROPOUT = 128,
  DLSE = 256,
  POISON = 512,
  STRIDES = 1024,
  SHARED = 2048,
};
constexpr unsigned everything = 2 * STRIDES - 1;  // but SHARED

struct Call {
  DType dtype = DType::float32;
  int64_t batch = 1, num_heads = 1, num_heads_k = 1, seqlen_q = 1, seqlen_k = 1, head_dim = 8, head_dim_v = 8;
  int64_t lo = -(1ll << 40), hi = 1ll << 40;
  double softmax_scale = 0.3, softcap = 0, dropout_p = 0;
  uint64_t seed = 0;
  Array q, k, v, mask, bias, alibi_slopes, sinks, scales, k_start, k_end, dout, dlse;
  Array tq, tk, tv, tbias, talibi_slopes, tsinks, tscales;
  Array tout, tlse, out, out_exact, lse, lse_parts, dq, dk, dv, dbias, dalibi_slopes, dsinks, dscales;

  DType compute_dtype() const { return dtype == DType::float64 ? DType::float64 : DType::float32; }
  int64_t group_size() const { return num_heads_k ? num_heads / num_heads_k : 1; }

  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return j - i >= lo && j - i <= hi && (!mask || mask.get(b, h, i, j) != 0) &&
           (!bias || bias.get(b, h, i, j) != -infinity) && (!k_start || j >= k_start.get(b, h, i, 0)) &&
           (!k_end || j < k_end.get(b, h, i, 0));
  }
  std::vector<const Array*> inputs() const {
    return {&q,    &k,    &v,  &mask, &bias, &alibi_slopes, &sinks,         &scales, &k_start, &k_end,
            &dout, &dlse, &tq, &tk,   &tv,   &tbias,        &talibi_slopes, &tsinks, &tscales};
  }
  std::vector<Array*> tangent_outputs() { return {&tout, &tlse}; }
  std::vector<Array*> outputs() { return {&out, &out_exact, &lse, &lse_parts}; }
  std::vector<Array*> strided_gradients() { return {&dq, &dk, &dv}; }
  std::vector<Array*> summed_gradients() { return {&dbias, &dalibi_slopes, &dsinks, &dscales}; }

  fastattn::Operands problem() const {
    fastattn::Operands p{};
    p.batch = batch, p.num_heads = num_heads, p.num_heads_k = num_heads_k;
    p.seqlen_q = seqlen_q, p.seqlen_k = seqlen_k, p.head_dim = head_dim, p.head_dim_v = head_dim_v;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor();
    p.mask = mask.tensor(), p.bias = bias.tensor(), p.alibi_slopes = alibi_slopes.tensor();
    p.sinks = sinks.tensor(), p.scales = scales.tensor(), p.k_start = k_start.tensor(), p.k_end = k_end.tensor();
    p.softmax_scale = scales ? NAN : softmax_scale;
    p.softcap = softcap, p.diagonal_lo = lo, p.diagonal_hi = hi, p.query_start = seqlen_k - seqlen_q;
    p.keep_factor = 1 / (1 - dropout_p), p.drop_below = (uint32_t)(dropout_p * 4294967296), p.seed = seed;
    return p;
  }
  fastattn::Operands forward_problem() const {
    fastattn::Operands p = problem();
    p.out = out.tensor(), p.lse = lse.tensor(), p.lse_parts = lse_parts.tensor(), p.out_exact = out_exact.tensor();
    return p;
  }
  fastattn::Operands backward_problem() const {
    fastattn::Operands p = problem();
    p.out = out_exact ? out_exact.tensor() : out.tensor(), p.lse_parts = lse_parts.tensor();
    return p;
  }
  fastattn::Gradients wanted() const {
    fastattn::Gradients g{};
    g.dout = dout.tensor(), g.dlse = dlse.tensor();
    g.dq = dq.tensor(), g.dk = dk.tensor(), g.dv = dv.tensor(), g.dbias = dbias.tensor();
    g.dalibi_slopes = dalibi_slopes.tensor(), g.dsinks = dsinks.tensor(), g.dscales = dscales.tensor();
    return g;
  }

  fastattn::Tangents tangents() const {
    return {tq.tensor(),     tk.tensor(),      tv.tensor(),   tbias.tensor(), {}, talibi_slopes.tensor(),
            tsinks.tensor(), tscales.tensor(), tout.tensor(), tlse.tensor()};
  }

  std::string text() const {
    const char* names[] = {"float32", "float64", "bfloat16", "float16"};
    std::string s = names[(int)dtype];
    for (int64_t n : {batch, num_heads, num_heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v})
      s += ' ' + std::to_string(n);
    if (lo > -(1ll << 40)) s += " lo=" + std::to_string(lo);
    if (hi < 1ll << 40) s += " hi=" + std::to_string(hi);
    auto tell = [&](const char* name, const Array& a) {
      if (a)
        s += std::string(" ") + name + "[" + std::to_string(a.size[0]) + " " + std::to_string(a.size[1]) + " " +
             std::to_string(a.size[2]) + " " + std::to_string(a.size[3]) + "]";
    };
    tell("mask", mask), tell("bias", bias), tell("alibi", alibi_slopes), tell("sinks", sinks), tell("scales", scales);
    tell("k_start", k_start), tell("k_end", k_end), tell("dlse", dlse);
    tell("tq", tq), tell("tk", tk), tell("tv", tv), tell("tbias", tbias), tell("talibi", talibi_slopes);
    tell("tsinks", tsinks), tell("tscales", tscales);
    if (softcap > 0) s += " softcap";
    if (dropout_p > 0) s += " dropout=" + std::to_string(dropout_p);
    return s;
  }
};

class CallMaker {
  Call& c;
  const unsigned has;
  Random& random;
  const int64_t B = c.batch, H = c.num_heads, Hk = c.num_heads_k, Sq = c.seqlen_q, Sk = c.seqlen_k;

 public:
  CallMaker(Call& call, unsigned has, Random& random) : c(call), has(has), random(random) {}

  void make() {
    make_inputs();
    make_mask();
    const DType real = c.compute_dtype();
    c.out = strided(c.dtype, B, H, Sq, c.head_dim_v), c.lse = strided(real, B, H, Sq, 1);
    if (c.dtype != real) c.out_exact = strided(real, B, H, Sq, c.head_dim_v);
    c.lse_parts = strided(real, B, H, Sq, 2);
    c.dout = tensor(c.dtype, B, H, Sq, c.head_dim_v, broadcasts_inputs());
    if (has & DLSE) c.dlse = strided(real, B, H, Sq, 1), fill(c.dlse);
    fill(c.dout);
    make_tangents();
    if (has & POISON) poison();
    make_gradients();
  }

 private:
  int64_t mask_batch() const { return has & SHARED ? 1 : B; }
  int broadcasts_inputs() const { return has & STRIDES && !(has & POISON) ? 10 : 0; }
  // broadcast: percent of the dimensions
  Array tensor(DType dtype, int64_t b, int64_t h, int64_t r, int64_t col, int broadcast = 0) {
    int64_t sizes[4] = {b, h, r, col};
    int order[4] = {0, 1, 2, 3};
    for (int64_t& size : sizes)
      if (broadcast && random.chance(broadcast)) size = 1;
    if (has & STRIDES)
      for (int i = 3; i > 0; i--) std::swap(order[i], order[random.between(0, i)]);
    return Array(dtype, sizes, order, has & STRIDES && random.chance(40) ? 2 : 1);
  }
  Array strided(DType dtype, int64_t b, int64_t h, int64_t r, int64_t col) { return tensor(dtype, b, h, r, col); }
  DType any_float() { return random.pick<DType>({DType::float32, DType::float64, DType::bfloat16, DType::float16}); }
  void fill(Array& a) {
    a.fill([&] { return random.value(); });
  }

  void make_inputs() {
    c.q = tensor(c.dtype, B, H, Sq, c.head_dim, broadcasts_inputs());
    c.k = tensor(c.dtype, B, Hk, Sk, c.head_dim, broadcasts_inputs());
    c.v = tensor(c.dtype, B, Hk, Sk, c.head_dim_v, broadcasts_inputs());
    fill(c.q), fill(c.k), fill(c.v);
    if (has & BIAS) {
      c.bias = tensor(any_float(), mask_batch(), H, Sq, Sk, 30);
      c.bias.fill([&] { return random.chance(10) ? -infinity : random.value(); });
    }
    if (has & ALIBI) {
      c.alibi_slopes = tensor(any_float(), B, H, 1, 1, 30);
      c.alibi_slopes.fill([&] { return (double)random.between(0, 32) / 64; });
    }
    if (has & SINKS) c.sinks = tensor(any_float(), 1, H, 1, 1), fill(c.sinks);
    if (has & SCALES) {
      c.scales = tensor(any_float(), 1, H, 1, 1, 30);
      c.scales.fill([&] { return (double)random.between(-8, 24) / 64; });
    }
    if (has & SOFTCAP) c.softcap = 4;
    if (has & DROPOUT) c.dropout_p = random.pick<double>({0.1, 0.5, 0.9}), c.seed = random.next();
  }

  void make_mask() {
    if (has & MASK) c.mask = tensor(DType::boolean, mask_batch(), H, Sq, Sk, 30);
    if (has & MASK) c.mask.fill([&] { return random.chance(75); });
    if (!(has & INTERVALS)) return;
    // constant over some rows, so that neighbouring panels see keys far apart
    const int64_t run = random.pick<int64_t>({1, 7, 16, 64});
    c.k_start = tensor(DType::int32, B, H, Sq, 1, 30), c.k_end = tensor(DType::int32, B, H, Sq, 1, 30);
    int64_t start = 0, length = 0, n = 0;
    auto draw = [&] {
      if (n++ % (2 * run) == 0)
        start = random.between(-2, Sk), length = random.between(0, random.chance(50) ? 9 : Sk + 2);
    };
    c.k_start.fill([&] { return draw(), (double)start; });
    c.k_end.fill([&] { return draw(), (double)(start + length); });
  }

  // Keys that no query sees, and queries that see no key.
  void poison() {
    auto spoil = [&](Array& a, int64_t b, int64_t h, int64_t row) {
      const double poison = random.chance(50) ? NAN : infinity;
      for (int64_t d = 0; a && d < a.size[3]; d++) a.set(b, h, row, d, poison);
    };
    std::vector<bool> seen(B * Hk * Sk);
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < Sq; i++) {
          bool any = false;
          for (int64_t j = 0; j < Sk; j++)
            if (c.sees(b, h, i, j)) any = seen[(b * Hk + h / c.group_size()) * Sk + j] = true;
          if (any) continue;
          spoil(c.q, b, h, i), spoil(c.tq, b, h, i);
          if (c.sinks) continue;  // its gradient is of dout and dlse, whatever the row sees
          spoil(c.dout, b, h, i);
          spoil(c.dlse, b, h, i);
        }
    for (int64_t n = 0; n < B * Hk * Sk; n++)
      for (Array* a : {&c.k, &c.v, &c.tk, &c.tv})
        if (!seen[n]) spoil(*a, n / Sk / Hk, n / Sk % Hk, n % Sk);
  }

  void make_tangents() {
    auto like = [&](const Array& of, Array& tangent) {
      if (!of || !random.chance(80)) return;
      int order[4] = {0, 1, 2, 3};
      if (has & STRIDES)
        for (int i = 3; i > 0; i--) std::swap(order[i], order[random.between(0, i)]);
      tangent = Array(of.dtype, of.size, order, 1);
      fill(tangent);
    };
    like(c.q, c.tq), like(c.k, c.tk), like(c.v, c.tv), like(c.bias, c.tbias);
    like(c.alibi_slopes, c.talibi_slopes), like(c.sinks, c.tsinks), like(c.scales, c.tscales);
    c.tout = strided(c.dtype, B, H, Sq, c.head_dim_v), c.tlse = strided(c.compute_dtype(), B, H, Sq, 1);
  }

  void make_gradients() {
    auto wanted = [&] { return random.chance(85); };
    if (wanted()) c.dq = strided(c.dtype, B, H, Sq, c.head_dim);
    if (wanted()) c.dk = strided(c.dtype, B, Hk, Sk, c.head_dim);
    if (wanted()) c.dv = strided(c.dtype, B, Hk, Sk, c.head_dim_v);
    auto sum = [&](const Array& of, DType dtype) {
      return wanted() && of ? Array(dtype, of.size, {0, 1, 2, 3}, 1) : Array();
    };
    const bool dense = c.bias && c.bias.size[2] != 1 && c.bias.size[3] != 1;
    c.dbias = sum(c.bias, dense ? c.compute_dtype() : DType::float64);
    c.dalibi_slopes = sum(c.alibi_slopes, DType::float64);
    c.dsinks = sum(c.sinks, DType::float64), c.dscales = sum(c.scales, DType::float64);
  }
};
