// Rows of logits. What their entropy takes: m, the maximum, S = sum e^(x-m) and T = sum e^(x-m)
// (x-m), of which H = ln S - T / S; and its gradient. For *.isa.cpp files only.
#pragma once

#include "matrix.h"

namespace edt {
namespace {

template <class T>
constexpr T kNothing = -__builtin_huge_val();  // a logit of probability 0

// m, S and T of a row in every lane; without a logit -inf, 0 and 0.
template <class T>
struct Sums {
  Vec<T> top = broadcast(kNothing<T>), total{}, moment{};

  // What e^x is taken of is x - base(): -inf stays -inf where there is no logit but that.
  EDT_INLINE Vec<T> base() const { return max(top, broadcast(-Float<T>::kLargest)); }

  // For another maximum.
  EDT_INLINE Sums at(Vec<T> new_top) const {
    const Vec<T> apart = finite<T>(base() - Sums{new_top}.base());
    const Vec<T> shrink = exp_falling<T>(apart);
    return {new_top, shrink * total, shrink * fma(apart, total, moment)};
  }

  // Those of the rows that are two parts in a row each.
  EDT_INLINE Sums operator+(const Sums& other) const {
    const Vec<T> both = max(top, other.top);
    const Sums a = at(both), b = other.at(both);
    return {both, a.total + b.total, a.moment + b.moment};
  }
};

// The first `count` numbers of a vector.
template <class T>
EDT_INLINE void store_first(T* to, Vec<T> x, int64_t count) {
  if (count >= kLanes<T>) return store(to, x);
  T copy[kLanes<T>];
  store(copy, x);
  std::memcpy(to, copy, count * sizeof(T));
}

template <class T>
EDT_INLINE Vec<T> load_first(const T* from, int64_t count) {
  if (count >= kLanes<T>) return load(from);
  T copy[kLanes<T>] = {};
  std::memcpy(copy, from, count * sizeof(T));
  return load(copy);
}

// What lies between whole vectors and the end of a row of v numbers: the last vector that the row
// has, of which `seen` lanes were there before, or a short row filled up. kNothing is in lanes that
// do not count.
template <class S, class T = typename ComputeType<S>::type>
EDT_INLINE Vec<T> read_end(const S* row, int64_t v) {
  constexpr int n = kLanes<T>;
  if (v < n) {
    S copy[n] = {};
    __builtin_memcpy(copy, row, v * sizeof(S));
    return first<T>(load(copy), v, kNothing<T>);
  }
  const auto seen = static_cast<typename Float<T>::Int>(n - v % n);
  return iota<T>() >= seen ? load(row + v - n) : broadcast(kNothing<T>);
}

// Some rows of v logits, a stride apart; no more than there are lanes.
template <class S>
struct Rows {
  using T = typename ComputeType<S>::type;
  static constexpr int n = kLanes<T>;

  const S* data;
  int64_t stride, v, count;

  // The last one is read in the place of those that do not exist.
  EDT_INLINE const S* operator[](int64_t i) const {
    return data + (i < count ? i : count - 1) * stride;
  }

  EDT_INLINE int64_t whole() const { return v - v % n; }

  // m, a row in every lane.
  EDT_INLINE Vec<T> top() const {
    Vec<T> lanes[n];
    for (int64_t i = 0; i < n; ++i) {
      const S* row = (*this)[i];
      lanes[i] = whole() < v ? read_end(row, v) : broadcast(kNothing<T>);
      for (int64_t j = 0; j < whole(); j += n) lanes[i] = max(load(row + j), lanes[i]);
    }
    return first<T>(max_each<T>(lanes), count, kNothing<T>);
  }

  // Two rows go side by side: their steps overlap, and a row has the same bits beside any other.
  EDT_INLINE Sums<T> sums(Vec<T> top) const {
    Sums<T> sums{top};
    T bases[n];
    store(bases, sums.base());
    Vec<T> totals[n], moments[n];
    for (int64_t i = 0; i < n; ++i) totals[i] = moments[i] = Vec<T>{};
    for (int64_t i = 0; i < count; i += 2) {
      const S* row[] = {(*this)[i], (*this)[i + 1]};
      const Vec<T> base[] = {broadcast(bases[i]), broadcast(bases[i + 1])};
      Vec<T> total[2] = {}, moment[2] = {};
      const auto add = [&](Vec<T> a, Vec<T> b) __attribute__((always_inline)) {
        const Vec<T> shifted[] = {finite<T>(a - base[0]), finite<T>(b - base[1])};
        Vec<T> weight[2];
        exp_falling<T>(shifted, weight);
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          total[k] += weight[k];
          moment[k] = fma(weight[k], shifted[k], moment[k]);
        }
      };
      for (int64_t j = 0; j < whole(); j += n) {
        add(load(row[0] + j), load(row[1] + j));
      }
      if (whole() < v) add(read_end(row[0], v), read_end(row[1], v));
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) totals[i + k] = total[k], moments[i + k] = moment[k];
    }
    sums.total = first<T>(sum_each<T>(totals), count, 0);
    sums.moment = first<T>(sum_each<T>(moments), count, 0);
    return sums;
  }
};

// visit(first row, sums) for `count` rows of v logits, a stride apart, as many at a time as there
// are lanes. Some maxima come first: so their latency is met once for all of them.
template <class S, class F>
EDT_INLINE void sum_rows(const S* data, int64_t stride, int64_t v, int64_t count, F visit) {
  using T = typename ComputeType<S>::type;
  constexpr int n = kLanes<T>, kGroups = 4;
  const auto rows = [=](int64_t first) __attribute__((always_inline)) {
    return Rows<S>{data + first * stride, stride, v, count - first < n ? count - first : n};
  };
  for (int64_t i = 0; i < count; i += kGroups * n) {
    const int64_t end = count - i < kGroups * n ? count : i + kGroups * n;
    Vec<T> tops[kGroups];
    for (int64_t j = i; j < end; j += n) tops[(j - i) / n] = rows(j).top();
    for (int64_t j = i; j < end; j += n) visit(j, rows(j).sums(tops[(j - i) / n]));
  }
}

// What the gradient of a row takes: -g p (scale ln p + h)
template <class W>
struct Slope {
  Vec<W> top, log_total, by_log_p, constant;

  EDT_INLINE Slope(const void* grad, const void* h, const void* top, const void* log_total,
                   double scale, int64_t row)
      : top(at(top, row)), log_total(at(log_total, row)) {
    const Vec<W> minus = -at(grad, row);
    by_log_p = minus * static_cast<W>(scale);
    constant = minus * at(h, row);
  }

  static EDT_INLINE Vec<W> at(const void* numbers, int64_t row) {
    return broadcast(static_cast<const W*>(numbers)[row]);
  }
};

// Two rows, or two parts of one: their steps overlap.
template <class S, class W = typename ComputeType<S>::type>
EDT_INLINE void write_slopes(const Slope<W> (&slope)[2], const S* const (&from)[2],
                             S* const (&to)[2], int64_t v) {
  constexpr int n = kLanes<W>;
  const auto write = [&](const S* const(&from)[2], S* const(&to)[2],
                         int64_t j) __attribute__((always_inline)) {
    Vec<W> log_p[2], p[2];
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k)
      log_p[k] = finite<W>(load(from[k] + j) - slope[k].top - slope[k].log_total);
    exp_falling<W>(log_p, p);
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k)
      store(to[k] + j, p[k] * fma(log_p[k], slope[k].by_log_p, slope[k].constant));
  };
  if (v < n) {
    S copy[2][n] = {};
    for (int k = 0; k < 2; ++k) __builtin_memcpy(copy[k], from[k], v * sizeof(S));
    write({copy[0], copy[1]}, {copy[0], copy[1]}, 0);
    for (int k = 0; k < 2; ++k) __builtin_memcpy(to[k], copy[k], v * sizeof(S));
    return;
  }
  for (int64_t j = 0; j + n <= v; j += n) write(from, to, j);
  if (v % n) write(from, to, v - n);
}

}  // namespace
}  // namespace edt
