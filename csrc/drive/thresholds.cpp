// Thresholds of rows of scores, which torch's operators find in many passes over them.
#include <algorithm>
#include <functional>
#include <limits>

#include "driver.h"
#include "parallel.h"

namespace fastattn {
namespace {

constexpr int64_t sampled = 8, least_sampled = 512;  // one of how many scores; of shorter rows, all

// The scores above `bound` side by side in `room`; how many. Neither NaN nor what is hidden, -inf, is above -inf.
template <class Real>
int64_t collect(const Real* scores, int64_t keys, int64_t step, Real bound, Real* room) {
  int64_t count = 0;
  for (int64_t j = 0; j < keys; j += step) {
    room[count] = scores[j];
    count += scores[j] > bound;
  }
  return count;
}

// The top_k-th largest score, or the smallest that is seen. A sample guesses a bound that few scores exceed; where they are
// fewer than top_k, it was wrong, and all are asked.
template <class Real>
Real kth_largest(const Real* scores, int64_t keys, int64_t top_k, Real* room) {
  constexpr Real lowest = -std::numeric_limits<Real>::infinity();
  int64_t count = 0;
  if (keys >= least_sampled) {
    const int64_t seen = collect(scores, keys, sampled, lowest, room);
    const int64_t rank = top_k / sampled + (int64_t)__builtin_sqrt(4.0 * top_k / sampled) + 2;
    if (rank < seen) {
      std::nth_element(room, room + rank, room + seen, std::greater<Real>());
      count = collect(scores, keys, 1, room[rank], room);
    }
  }
  if (count < top_k) count = collect(scores, keys, 1, lowest, room);
  if (!count) return 0;
  const int64_t place = std::min(top_k, count) - 1;
  std::nth_element(room, room + place, room + count, std::greater<Real>());
  return room[place];
}

template <class Real>
Real largest(const Real* scores, int64_t keys) {
  constexpr int lanes = 16;
  Real most[lanes], nan = 0;
  for (Real& x : most) x = -std::numeric_limits<Real>::infinity();
  int64_t j = 0;
  for (; j + lanes <= keys; j += lanes)
    for (int i = 0; i < lanes; i++) most[i] = scores[j + i] > most[i] ? scores[j + i] : most[i];
  for (; j < keys; j++) most[0] = scores[j] > most[0] ? scores[j] : most[0];
  for (j = 0; j < keys; j++) nan = scores[j] != scores[j] ? scores[j] : nan;
  return *std::max_element(most, most + lanes) + nan;
}

// tau of max(z - tau, 0), which sums to 1, for z whose largest is 0. Michelot's search: what is above the tau of a set that
// holds the support is such a set again.
double sparsemax(double* z, int64_t count) {
  for (;;) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += z[i];
    const double tau = (sum - 1) / count;
    const int64_t left = std::remove_if(z, z + count, [&](double x) { return x <= tau; }) - z;
    if (left == count) return tau;
    count = left;
  }
}

// tau of max(z - tau, 0)^2. Newton's search from the left, where the sum is convex and falls: it never goes too far, and
// what it has passed is not in the support.
double entmax15(double* z, int64_t count) {
  double tau = -1;
  for (int turn = 0; turn < 64; turn++) {
    double sum = 0, squares = -1;
    for (int64_t i = 0; i < count; i++) {
      const double above = z[i] - tau;
      sum += above, squares += above * above;
    }
    const double next = tau + squares / (2 * sum);
    if (!(next > tau)) break;
    tau = next;
    count = std::remove_if(z, z + count, [&](double x) { return x <= tau; }) - z;
  }
  return tau;
}

template <class Real>
Real threshold(const Real* scores, int64_t keys, Threshold rule, int64_t top_k, double* room) {
  if (rule == Threshold::largest) return kth_largest(scores, keys, top_k, (Real*)room);
  const double unit = rule == Threshold::entmax15 ? 0.5 : 1.0;
  const double top = largest(scores, keys);
  if (!(top - top == 0)) return (Real)(top - top);  // NaN or infinite: the row is NaN
  int64_t count = 0;
  for (int64_t j = 0; j < keys; j++) {
    room[count] = (scores[j] - top) * unit;
    count += room[count] > -1;
  }
  return (Real)(top * unit + (rule == Threshold::entmax15 ? entmax15(room, count) : sparsemax(room, count)));
}

struct Rows {
  const Tensor& scores;
  const Tensor& found;
  int64_t keys, top_k;
  Threshold rule;
};

constexpr int64_t rows_at_once = 16;

template <class Real>
void find_rows(const Rows& rows, int64_t first, int64_t end) {
  double* room = (double*)thread_scratch((rows.keys + 1) * sizeof(double));
  for (int64_t r = first; r < end; r++)
    ((Real*)rows.found.data)[r] =
        threshold((const Real*)rows.scores.data + r * rows.keys, rows.keys, rows.rule, rows.top_k, room);
}

}  // namespace

void thresholds(const Tensor& scores, const Tensor& found, int64_t rows, int64_t keys, Threshold rule, int64_t top_k,
                int threads) {
  struct Call {
    Rows of;
    int64_t rows;
    bool is_double;
  } call{{scores, found, keys, top_k, rule}, rows, scores.dtype == DType::float64};
  parallel_for((rows + rows_at_once - 1) / rows_at_once, threads, 8.0 * rows * keys,
               [](void* context, int64_t i, int) {
                 const Call& c = *(Call*)context;
                 const int64_t first = i * rows_at_once, end = std::min(first + rows_at_once, c.rows);
                 c.is_double ? find_rows<double>(c.of, first, end) : find_rows<float>(c.of, first, end);
               },
               &call);
}

}  // namespace fastattn
