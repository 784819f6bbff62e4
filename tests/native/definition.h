// What a call should give, row by row from the definition in double, and how far off rounding may take each number.
#pragma once
#include <algorithm>

#include "call.h"

// A sum and the sizes of its terms; a term's size is what one rounding of all that it is made of may be relative to.
struct Sum {
  double value = 0, size = 0;

  void add(double term, double of_size) { value += term, size += of_size; }
};

// The expected elements of a tensor that broadcasts to [b][h][r][c]; those that fall together add up.
class Sums {
  int64_t size[4] = {0, 0, 0, 0};
  std::vector<Sum> all;

 public:
  explicit Sums(const Array& shape) {
    if (!shape) return;
    std::copy_n(shape.size, 4, size);
    all.resize(shape.count());
  }
  explicit operator bool() const { return !all.empty(); }
  Sum& at(int64_t b, int64_t h, int64_t r, int64_t c) {
    const int64_t index[4] = {b, h, r, c};
    int64_t i = 0;
    for (int d = 0; d < 4; d++) i = i * size[d] + (size[d] == 1 ? 0 : index[d]);
    return all[i];
  }
  void add(int64_t b, int64_t h, int64_t r, int64_t c, double term, double of_size) {
    if (!all.empty()) at(b, h, r, c).add(term, of_size);
  }
};

class Definition {
  const Call& c;
  const int64_t B = c.batch, H = c.num_heads, Hk = c.num_heads_k, Sq = c.seqlen_q, Sk = c.seqlen_k;
  const int64_t D = c.head_dim, Dv = c.head_dim_v;
  const std::vector<double> q = c.q.expand(B, H, Sq, D), k = c.k.expand(B, Hk, Sk, D), v = c.v.expand(B, Hk, Sk, Dv);
  const std::vector<double> dout_rows = c.dout.expand(B, H, Sq, Dv);
  const std::vector<double> tq = rows(c.tq, B, H, Sq, D), tk = rows(c.tk, B, Hk, Sk, D), tv = rows(c.tv, B, Hk, Sk, Dv);

  struct Key {  // one that the row sees
    int64_t j;
    const double *k, *v;
    double distance, keep;  // keep: 0, or 1 / (1 - dropout_p)
    Sum product, score;
    double slope;   // of the softcap
    double weight;  // P
  };
  std::vector<Key> keys;  // of this row

 public:
  Sums out{c.out}, lse{c.lse}, dq{c.dq}, dk{c.dk}, dv{c.dv};
  Sums tout{c.tout}, tlse{c.tlse}, dbias{c.dbias}, dalibi_slopes{c.dalibi_slopes}, dsinks{c.dsinks}, dscales{c.dscales};

  explicit Definition(const Call& call) : c(call) {
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < Sq; i++) add_row(b, h, i);
  }

 private:
  static std::vector<double> rows(const Array& x, int64_t b, int64_t h, int64_t r, int64_t n) {
    return x ? x.expand(b, h, r, n) : std::vector<double>(b * h * r * n);
  }
  static Sum dot(const double* x, const double* y, int64_t n) {
    Sum sum;
    for (int64_t d = 0; d < n; d++) sum.add(x[d] * y[d], std::fabs(x[d] * y[d]));
    return sum;
  }

  double scale_of(int64_t h) const { return c.scales ? c.scales.get(0, h, 0, 0) : c.softmax_scale; }

  Key key_of(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const int64_t key = (b * Hk + h / c.group_size()) * Sk + j;
    Key x{j, &k[key * D], &v[key * Dv], -std::fabs((double)(i + Sk - Sq - j)), 1, {}, {}, 1, 0};
    x.product = dot(&q[((b * H + h) * Sq + i) * D], x.k, D);
    x.score.add(x.product.value * scale_of(h), std::fabs(x.product.size * scale_of(h)));
    if (c.softcap > 0) {
      const double t = std::tanh(x.score.value / c.softcap);
      x.score.value = c.softcap * t;
      x.slope = 1 - t * t;
    }
    auto add = [&](double term) { x.score.add(term, std::fabs(term)); };
    if (c.bias) add(c.bias.get(b, h, i, j));
    if (c.alibi_slopes) add(c.alibi_slopes.get(b, h, 0, 0) * x.distance);
    if (c.dropout_p > 0) {
      const Philox words(c.seed, {(uint32_t)(j / 4), (uint32_t)i, (uint32_t)h, (uint32_t)b});
      x.keep = words.word[j % 4] < (uint32_t)(c.dropout_p * 4294967296) ? 0 : 1 / (1 - c.dropout_p);
    }
    return x;
  }

  void add_row(int64_t b, int64_t h, int64_t i) {
    const double sink = c.sinks ? c.sinks.get(0, h, 0, 0) : -infinity;
    double top = sink, doubt = 1 + (c.sinks ? std::fabs(sink) : 0);
    long double total = 0;  // equal terms round to the same side
    keys.clear();
    for (int64_t j = std::max<int64_t>(0, i + c.lo); j < Sk && j <= i + c.hi; j++)
      if (c.sees(b, h, i, j)) keys.push_back(key_of(b, h, i, j));
    for (const Key& x : keys) {
      top = std::fmax(top, x.score.value);
      doubt = std::fmax(doubt, 1 + x.score.size);  // rounding a score by so much changes its weight by that factor
    }
    for (Key& x : keys) total += x.weight = std::exp(x.score.value - top);
    if (sink != -infinity) total += std::exp(sink - top);
    if (total == 0) return (void)lse.at(b, h, i, 0).add(-infinity, 0);
    for (Key& x : keys) x.weight /= (double)total;
    lse.add(b, h, i, 0, top + std::log((double)total), doubt);
    for (const Key& x : keys)
      for (int64_t d = 0; d < Dv; d++)
        out.add(b, h, i, d, x.weight * x.keep * x.v[d], std::fabs(x.weight * x.keep * x.v[d]) * doubt);
    const double sink_weight = sink == -infinity ? 0 : std::exp(sink - top) / (double)total;
    add_gradients(b, h, i, sink_weight, doubt);
    add_tangents(b, h, i, sink_weight, doubt);
  }

  // tS = the tangent of a score, mean = sum of P tS, tout = sum of dropout(P) (tS V + tV) - mean * out, tlse = mean.
  void add_tangents(int64_t b, int64_t h, int64_t i, double sink_weight, double doubt) {
    const int64_t row = (b * H + h) * Sq + i, head_k = b * Hk + h / c.group_size();
    auto number = [&](const Array& x, int64_t batch, int64_t query, int64_t key) {
      return x ? x.get(batch, h, query, key) : 0;
    };
    const double tscale = number(c.tscales, 0, 0, 0), tslope = number(c.talibi_slopes, b, 0, 0),
                 tsink = number(c.tsinks, 0, 0, 0), scale = scale_of(h);
    std::vector<Sum> tscores;
    Sum mean;
    for (const Key& x : keys) {
      const Sum by_q = dot(&tq[row * D], x.k, D), by_k = dot(&q[row * D], &tk[(head_k * Sk + x.j) * D], D);
      const double tproduct = (by_q.value + by_k.value) * scale + tscale * x.product.value,
                   size = (by_q.size + by_k.size) * std::fabs(scale) + std::fabs(tscale) * x.product.size;
      Sum ts{tproduct * x.slope, size};  // the derivative of the softcap is a difference from 1
      for (double term : {number(c.tbias, b, i, x.j), tslope * x.distance}) ts.add(term, std::fabs(term));
      mean.add(x.weight * ts.value, x.weight * ts.size);
      tscores.push_back(ts);
    }
    mean.add(sink_weight * tsink, sink_weight * std::fabs(tsink));
    tlse.add(b, h, i, 0, mean.value, mean.size * doubt);
    for (size_t n = 0; n < keys.size(); n++)
      for (int64_t d = 0; d < Dv; d++) {
        const Key& x = keys[n];
        const double weight = x.weight * x.keep, tvalue = tv[(head_k * Sk + x.j) * Dv + d], value = x.v[d];
        tout.add(b, h, i, d, weight * ((tscores[n].value - mean.value) * value + tvalue),
                 weight * ((tscores[n].size + mean.size) * std::fabs(value) + std::fabs(tvalue)) * doubt);
      }
  }

  // P = exp(scores - lse), dP = dropout(dout V^T), delta = rowsum(dP * P) - dlse, dS = P (dP - delta).
  void add_gradients(int64_t b, int64_t h, int64_t i, double sink_weight, double doubt) {
    const int64_t row = (b * H + h) * Sq + i, hk = h / c.group_size();
    const double *dout = &dout_rows[row * Dv], *query = &q[row * D], scale = scale_of(h);
    std::vector<Sum> dp;
    Sum delta;
    for (const Key& x : keys) {
      dp.push_back(dot(dout, x.v, Dv));
      dp.back().value *= x.keep, dp.back().size *= x.keep;
      delta.add(x.weight * dp.back().value, x.weight * dp.back().size);
    }
    if (c.dlse) delta.add(-c.dlse.get(b, h, i, 0), std::fabs(c.dlse.get(b, h, i, 0)));
    const double by_sink = sink_weight * delta.size * doubt;
    dsinks.add(b, h, i, 0, -sink_weight * delta.value, by_sink);
    // a row's dS may come as their sum, dlse + delta * sink_weight, which rounds even where no key is seen
    if (c.bias && c.bias.size[3] == 1) dbias.add(b, h, i, 0, 0, by_sink);
    for (size_t n = 0; n < keys.size(); n++) {
      const Key& x = keys[n];
      const double ds = x.weight * (dp[n].value - delta.value), size = x.weight * (dp[n].size + delta.size) * doubt;
      const double dproduct = ds * x.slope;
      dbias.add(b, h, i, x.j, ds, size);
      dalibi_slopes.add(b, h, i, x.j, ds * x.distance, size * std::fabs(x.distance));
      dscales.add(b, h, i, x.j, dproduct * x.product.value, size * x.product.size);
      for (int64_t d = 0; d < D; d++) {
        dq.add(b, h, i, d, dproduct * scale * x.k[d], std::fabs(size * scale * x.k[d]));
        dk.add(b, hk, x.j, d, dproduct * scale * query[d], std::fabs(size * scale * query[d]));
      }
      for (int64_t d = 0; d < Dv; d++)
        dv.add(b, hk, x.j, d, x.weight * x.keep * dout[d], std::fabs(x.weight * x.keep * dout[d]) * doubt);
    }
  }
};
