// SPDX-License-Identifier: Apache-2.0
// Softmax cross-entropy of logits that are there in part: a row's running sums, and its gradient. Narrow
// logits are widened in registers; nothing wide is kept but a block of one row.
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/panels.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // columns of a row that are kept widened
// Gradients that are turned sideways: of bfloat16, so many rows are a line. Rows of a tile are not a power of
// two apart.
constexpr int64_t kSideRows = 32, kSideColumns = 256, kTileRow = kSideColumns + 32;

template <class T>
GAPLESS_INLINE T sum_of(Vec<T> x) {
    T sum = 0;
    for (int i = 0; i < kLanes<T>; ++i) sum += x[i];
    return sum;
}

template <class T>
GAPLESS_INLINE T exp_of(T x) {
    return vexp(splat(x))[0];
}

template <class E>
class CrossEntropy {
    using T = typename Compute<E>::type;
    static constexpr int w = kLanes<T>;

  public:
    explicit CrossEntropy(const CrossEntropyParams& p) : p(p) {}

    void forward(int64_t begin, int64_t end) const {
        const T* before = static_cast<const T*>(p.before);
        T* after = static_cast<T*>(p.after);
        for (int64_t r = begin; r < end; ++r) {
            Sums sums{before[r], before[p.rows + r], before[2 * p.rows + r], before[3 * p.rows + r]};
            if (p.targets[r] >= 0) add_row(r, sums);
            after[r] = sums.highest, after[p.rows + r] = sums.sum;
            after[2 * p.rows + r] = sums.target, after[3 * p.rows + r] = sums.total;
        }
    }

    void backward(int64_t begin, int64_t end) const {
        if (!p.sideways)
            for (int64_t r = begin; r < end; ++r) differentiate(r, 0, p.columns, out_row(r));
        for (int64_t r = begin; p.sideways && r < end; r += kSideRows)
            for (int64_t at = 0; at < p.columns; at += kSideColumns)
                differentiate_both(r, least(end, r + kSideRows), at, least(p.columns, at + kSideColumns));
    }

  private:
    const CrossEntropyParams& p;

    struct Sums {
        T highest, sum, target, total;
    };

    const E* row(int64_t r) const { return static_cast<const E*>(p.logits.data) + r * p.logits.row; }
    E* out_row(int64_t r) const { return static_cast<E*>(p.out.data) + r * p.out.row; }

    /// Vector `i` of a row with its bias, divided by the cap where there is one.
    GAPLESS_INLINE Vec<T> biased(const E* logits, int64_t i) const {
        Vec<T> x = load_row(logits, i, p.columns);
        if (p.bias) x += load_row(static_cast<const E*>(p.bias), i, p.columns);
        return x;
    }
    GAPLESS_INLINE Vec<T> logit(const E* logits, int64_t i) const {
        const Vec<T> x = biased(logits, i);
        return p.softcap > 0 ? vtanh(x / T(p.softcap)) * T(p.softcap) : x;
    }

    void add_row(int64_t r, Sums& sums) const {
        const E* logits = row(r);
        const int64_t target = p.targets[r] - p.first;
        T block[kBlock];
        for (int64_t at = 0; at < p.columns; at += kBlock) {
            const int64_t count = least(kBlock, p.columns - at), padded_count = padded<T>(count);
            Vec<T> high = splat(-kInfinity<T>), total{};
            for (int64_t i = 0; i < padded_count; i += w) {
                Vec<T> x = logit(logits, at + i);
                if (p.total) total += x;  // zeros beyond the end
                if (i + w > count)
                    for (int64_t lane = count - i; lane < w; ++lane) x[lane] = -kInfinity<T>;
                store(block + i, x);
                high = vmax<T>(x, high);  // passes NaN by: the sum will have it
            }
            T highest = sums.highest;
            for (int i = 0; i < w; ++i) highest = high[i] > highest ? high[i] : highest;
            const T shift = highest == -kInfinity<T> ? 0 : highest;
            Vec<T> sum{};
            for (int64_t i = 0; i < padded_count; i += w) sum += vexp(load(block + i) - shift);
            sums.sum = sums.sum * exp_of<T>(sums.highest - shift) + sum_of<T>(sum);
            sums.highest = highest;
            if (p.total) sums.total += sum_of<T>(total);
            if (target >= at && target < at + count) sums.target = block[target - at];
        }
    }

    /// Columns [from, to) of a row's gradient.
    void differentiate(int64_t r, int64_t from, int64_t to, E* out) const {
        if (p.targets[r] < 0) {
            std::memset(static_cast<void*>(out), 0, (to - from) * sizeof(E));
            return;
        }
        const E* logits = row(r);
        const T* factors = static_cast<const T*>(p.factors) + r;
        const T lse = factors[0], softmax = factors[p.rows], hot = factors[2 * p.rows],
                every = factors[3 * p.rows];
        const int64_t target = p.targets[r] - p.first;
        for (int64_t i = from; i < to; i += w) {
            Vec<T> x = biased(logits, i), slope;
            if (p.softcap > 0) {
                const Vec<T> t = vtanh(x / T(p.softcap));
                x = t * T(p.softcap), slope = T(1) - t * t;
            }
            Vec<T> y = vexp(x - lse) * softmax + every;
            if (target >= i && target < i + w) y[target - i] += hot;
            if (p.softcap > 0) y *= slope;
            store_row(out, i - from, to - from, y);
        }
    }

    /// The same of rows [begin, end), by way of a tile that is turned sideways while it is near.
    void differentiate_both(int64_t begin, int64_t end, int64_t from, int64_t to) const {
        E tile[kSideRows * kTileRow];
        const int64_t columns = to - from;
        for (int64_t r = begin; r < end; ++r) {
            E* const made = tile + (r - begin) * kTileRow;
            differentiate(r, from, to, made);
            std::memcpy(static_cast<void*>(out_row(r) + from), made, columns * sizeof(E));
        }
        E* const side = static_cast<E*>(p.sideways) + from * p.sideways_row + begin;
        for (int64_t i = 0; i < columns; i += w)
            for (int64_t r = 0; r < end - begin; r += w) {
                const int64_t rows = least(w, end - begin - r);
                Vec<T> x[w];
#pragma GCC unroll 16
                for (int k = 0; k < w; ++k)
                    x[k] = k < rows ? load_row(tile + (r + k) * kTileRow, i, columns) : Vec<T>{};
                transpose<T>(x);
                for (int k = 0; k < least(w, columns - i); ++k)
                    store_row(side + (i + k) * p.sideways_row + r, 0, rows, x[k]);
            }
    }
};

}  // namespace

void softmax_sums(const CrossEntropyParams& p, int64_t begin, int64_t end) {
    by_dtype(p.dtype, [&]<class E>() { CrossEntropy<E>(p).forward(begin, end); });
}

void softmax_gradient(const CrossEntropyParams& p, int64_t begin, int64_t end) {
    by_dtype(p.dtype, [&]<class E>() { CrossEntropy<E>(p).backward(begin, end); });
}

}  // namespace gapless::cpu::GAPLESS_ISA
