// SPDX-License-Identifier: Apache-2.0
// Attention backward over one tile of keys, in the forward kernel's layout: queries in lanes, keys down the rows. Scores
// are computed again from the LSE (FlashAttention-2, arXiv:2307.08691). dk and dv of the tile stay in this thread's
// scratch; dq is summed over the tiles of a sequence in a fixed order, each block of rows being handed from tile to tile.
// Blocks are walked from the last to the first: then a tile is always one block behind the one before it, whatever the
// mask cuts off.
#include <sched.h>

#include "csrc/cpu/gemm_tiles.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/scores.h"
#include "csrc/cpu/scratch.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kStepKeys = 64;  // keys whose probabilities are in flight at once
#if defined(__AVX512F__)
constexpr int64_t kBlockRows = 128;
#elif defined(__AVX2__)
constexpr int64_t kBlockRows = 96;
#else
constexpr int64_t kBlockRows = 64;
#endif

template <class E>
class Backward {
  public:
    using T = typename Compute<E>::type;
    static constexpr int kVecs = kBlockRows / kLanes<T>;

    Backward(const VarlenBackwardParams& params, const BackwardItem& item) : b(params), p(params.forward), item(item) {
        const int32_t* tile = p.tiles + 3 * (item.first_tile + item.tile);
        sequence = tile[0], key_begin = tile[1], keys = tile[2] - tile[1];
        group = p.heads / p.kv_heads;
        const int32_t* cu_q = p.cu_seqlens_q + sequence;
        const int32_t* cu_k = p.cu_seqlens_k + sequence;
        first_token = cu_q[0], first_key = cu_k[0];
        map = {group, cu_q[1] - cu_q[0], cu_k[1] - cu_k[0], p.left, p.right};
        rows = map.len_q * group;
    }

    void run() {
        Carver sizes(nullptr);
        carve(sizes);
        Carver memory(scratch(sizes.used()));
        carve(memory);
        const T* k = rows_of(p.k, p.dim, key_tile, &key_stride);
        const T* v = rows_of(p.v, p.dim_v, value_tile, &value_stride);
        std::memset(dk, 0, keys * dim_pad() * sizeof(T));
        std::memset(dv, 0, keys * dim_v_pad() * sizeof(T));
        for (int64_t row = (rows - 1) / kBlockRows * kBlockRows; row >= 0; row -= kBlockRows)
            block(row, least(kBlockRows, rows - row), k, v);
        write_keys(b.dk, dk, dim_pad(), p.dim, T(p.scale));
        write_keys(b.dv, dv, dim_v_pad(), p.dim_v, T(1));
    }

  private:
    const VarlenBackwardParams& b;
    const VarlenParams& p;
    const BackwardItem& item;
    int64_t sequence, key_begin, keys, group, first_token, first_key, rows, key_stride, value_stride;
    RowMap map;

    T *key_tile, *value_tile, *dk, *dv;
    T *query_panel, *dout_panel, *query_rows, *dout_rows;  // [dim][rows], [dim_v][rows], [rows][dim], [rows][dim_v]
    T *p_step, *ds, *dq, *lse, *delta, *factor;
    const E **query_of_row, **dout_of_row;
    E** dq_of_row;
    Lanes<T> lanes;

    int64_t dim_pad() const { return padded<T>(p.dim); }
    int64_t dim_v_pad() const { return padded<T>(p.dim_v); }
    static constexpr bool kInPlace = sizeof(E) == sizeof(T);

    void carve(Carver& c) {
        key_tile = c.take<T>(kInPlace ? 0 : keys * dim_pad());
        value_tile = c.take<T>(kInPlace ? 0 : keys * dim_v_pad());
        dk = c.take<T>(keys * dim_pad());
        dv = c.take<T>(keys * dim_v_pad());
        const int64_t n = least(kBlockRows, padded<T>(rows));
        query_panel = c.take<T>(n * p.dim);
        dout_panel = c.take<T>(n * p.dim_v);
        query_rows = c.take<T>(n * dim_pad());
        dout_rows = c.take<T>(n * dim_v_pad());
        p_step = c.take<T>(kStepKeys * n);
        ds = c.take<T>(keys * n);
        dq = c.take<T>(n * p.dim);
        lse = c.take<T>(n);
        delta = c.take<T>(n);
        factor = c.take<T>(n);
        query_of_row = c.take<const E*>(n);
        dout_of_row = c.take<const E*>(n);
        dq_of_row = c.take<E*>(n);
        lanes.carve(c, n);
    }

    E* key_row(const Packed& x, int64_t key) const {
        return static_cast<E*>(x.data) + item.kv_head * x.head_stride + (first_key + key) * x.token_stride;
    }

    const T* rows_of(const Packed& x, int64_t width, T* tile, int64_t* stride) const {
        if constexpr (kInPlace) {
            *stride = x.token_stride;
            return key_row(x, key_begin);
        } else {
            *stride = padded<T>(width);
            for (int64_t i = 0; i < keys; ++i) copy_row<E>(key_row(x, key_begin + i), tile + i * *stride, width);
            return tile;
        }
    }

    void write_keys(const Packed& to, const T* from, int64_t stride, int64_t width, T scale) const {
        for (int64_t i = 0; i < keys; ++i)
            for (int64_t d = 0; d < width; d += kLanes<T>)
                store_row(key_row(to, key_begin + i), d, width, load(from + i * stride + d) * scale);
    }

    /// Which of the sequence's tiles see a block of rows: how many before this one, and whether it is the last.
    struct Turn {
        int32_t before = 0;
        bool last = true, any = false;
    };
    Turn turn_of(int64_t begin, int64_t end) const {
        Turn turn;
        for (int32_t i = 0; i < item.tiles; ++i) {
            const int32_t* tile = p.tiles + 3 * (item.first_tile + i);
            if (tile[1] >= end || tile[2] <= begin || begin >= end) continue;
            turn.any = true;
            if (i < item.tile) ++turn.before;
            if (i > item.tile) turn.last = false;
        }
        return turn;
    }

    void block(int64_t row, int64_t count, const T* k, const T* v) {
        const int64_t begin = map.begin(row), end = map.end(row + count - 1);
        const Turn turn = turn_of(begin, end);
        const int64_t from = most(begin, key_begin), to = least(end, key_begin + keys), width = padded<T>(count);
        if (from >= to) {
            // Nobody sees these rows, or others do.
            if (!turn.any && item.tile == 0) {
                point(row, count);
                std::memset(dq, 0, width * p.dim * sizeof(T));
                write_dq(dq, count, width);
            }
            return;
        }
        point(row, count);
        lanes.fill(p, map, sequence, item.kv_head, row, count, 1);
        transpose_rows(query_of_row, count, p.dim, T(query_factor(p, 1)), query_panel, width);
        transpose_rows(dout_of_row, count, p.dim_v, T(1), dout_panel, width);
        for (int64_t i = 0; i < width; ++i) {
            if (i < count) {
                copy_row<E>(query_of_row[i], query_rows + i * dim_pad(), p.dim);
                copy_row<E>(dout_of_row[i], dout_rows + i * dim_v_pad(), p.dim_v);
            } else {
                std::memset(query_rows + i * dim_pad(), 0, dim_pad() * sizeof(T));
                std::memset(dout_rows + i * dim_v_pad(), 0, dim_v_pad() * sizeof(T));
            }
        }
        const StripView<T, kVecs> view(map, row, count);
        for (int64_t step = from; step < to; step += kStepKeys) {
            Segment segments[view.kMaxSegments];
            const int n = view.split(step, least(to, step + kStepKeys), segments);
            for (int i = 0; i < n; ++i) segment(segments[i], width, k, v);
        }

        T* sum = item.dq ? static_cast<T*>(item.dq) + row * p.dim : dq;
        int32_t* at = item.dq ? item.turn + row / kBlockRows : nullptr;
        if (item.dq)
            for (int spins = 0; __atomic_load_n(at, __ATOMIC_ACQUIRE) != turn.before;)
                if (++spins > 1000) sched_yield();
        if (turn.before == 0) std::memset(sum, 0, width * p.dim * sizeof(T));
        for (int64_t step = from; step < to; step += kStepKeys) {
            Segment segments[view.kMaxSegments];
            const int n = view.split(step, least(to, step + kStepKeys), segments);
            for (int i = 0; i < n; ++i) {
                const Segment& s = segments[i];
                const int64_t lane = s.vec_begin * kLanes<T>;
                gemm<Init::kAdd, T>({k + (s.begin - key_begin) * key_stride, 1, key_stride,
                                     ds + (s.begin - key_begin) * width + lane, width, sum + lane, width, s.end - s.begin,
                                     nullptr},
                                    p.dim, s.vec_end - s.vec_begin);
            }
        }
        if (turn.last) write_dq(sum, count, width);
        if (item.dq) __atomic_store_n(at, turn.before + 1, __ATOMIC_RELEASE);
    }

    /// Where each row of the block lies in memory, its LSE and its delta.
    void point(int64_t row, int64_t count) {
        int64_t token = first_token + map.query(row), member = row % group;
        const T* lse_in = static_cast<const T*>(p.lse);
        const T* delta_in = static_cast<const T*>(b.delta);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t head = item.kv_head * group + member;
            query_of_row[i] = static_cast<const E*>(p.q.data) + token * p.q.token_stride + head * p.q.head_stride;
            dout_of_row[i] = static_cast<const E*>(b.dout.data) + token * b.dout.token_stride + head * b.dout.head_stride;
            dq_of_row[i] = static_cast<E*>(b.dq.data) + token * b.dq.token_stride + head * b.dq.head_stride;
            const T l = lse_in[head * p.total_q + token];
            lse[i] = l == -kInfinity<T> ? kInfinity<T> : l;  // a row that saw nothing: every exp gives 0
            delta[i] = delta_in[head * p.total_q + token];
            if (++member == group) member = 0, ++token;
        }
        for (int64_t i = count; i < padded<T>(count); ++i) lse[i] = kInfinity<T>, delta[i] = 0;
    }

    void segment(const Segment& s, int64_t width, const T* k, const T* v) {
        const int64_t n = s.end - s.begin, at = s.begin - key_begin, lane = s.vec_begin * kLanes<T>;
        const int64_t vecs = s.vec_end - s.vec_begin, depth = vecs * kLanes<T>;
        T* probabilities = p_step + lane;
        T* dscores = ds + at * width + lane;
        gemm<Init::kZero, T>({k + at * key_stride, key_stride, 1, query_panel + lane, width, probabilities, width, p.dim, nullptr},
                             n, vecs);
        gemm<Init::kZero, T>({v + at * value_stride, value_stride, 1, dout_panel + lane, width, dscores, width, p.dim_v, nullptr},
                             n, vecs);
        if (p.softcap > 0 || p.alibi_slopes)
            cells<true, true>(s, probabilities, dscores, width);
        else if (s.partial)
            cells<false, true>(s, probabilities, dscores, width);
        else
            cells<false, false>(s, probabilities, dscores, width);
        gemm<Init::kAdd, T>({probabilities, width, 1, dout_rows + lane * dim_v_pad(), dim_v_pad(), dv + at * dim_v_pad(),
                             dim_v_pad(), depth, nullptr},
                            n, dim_v_pad() / kLanes<T>);
        gemm<Init::kAdd, T>({dscores, width, 1, query_rows + lane * dim_pad(), dim_pad(), dk + at * dim_pad(), dim_pad(),
                             depth, nullptr},
                            n, dim_pad() / kLanes<T>);
    }

    /// Scores to probabilities, their gradients to the scores' gradients, in place.
    template <bool kScored, bool kMasked>
    void cells(const Segment& s, T* probabilities, T* dscores, int64_t width) const {
        constexpr int w = kLanes<T>;
        for (int64_t key = s.begin; key < s.end; ++key, probabilities += width, dscores += width)
            for (int v = s.vec_begin; v < s.vec_end; ++v) {
                const int64_t lane = v * w, at = lane - s.vec_begin * w;
                Vec<T> x = load(probabilities + at), tangent;
                if constexpr (kScored) x = modify_score<T>(x, lanes, lane, key, T(p.softcap), &tangent);
                Vec<T> e = vexp2((x - load(lse + lane)) * T(kLog2e));
                Vec<T> d = e * (load(dscores + at) - load(delta + lane));
                if constexpr (kScored)
                    if (p.softcap > 0) d *= T(1) - tangent * tangent;
                if constexpr (kMasked) {
                    const IVec<T> seen = sees<T>(lanes, lane, key);
                    e = seen ? e : Vec<T>{};
                    d = seen ? d : Vec<T>{};
                }
                store(probabilities + at, e);
                store(dscores + at, d);
            }
    }

    void write_dq(const T* sum, int64_t count, int64_t width) {
        for (int64_t i = 0; i < width; ++i) factor[i] = T(p.scale);
        untranspose_rows(sum, width, factor, dq_of_row, count, p.dim);
    }
};

}  // namespace

extern const int64_t backward_block_rows;
const int64_t backward_block_rows = kBlockRows;

void varlen_backward(const VarlenBackwardParams& b, const BackwardItem& item) {
    by_dtype(b.forward.dtype, [&]<class E>() { Backward<E>(b, item).run(); });
}

void varlen_delta(const VarlenBackwardParams& b, int64_t begin, int64_t end) {
    by_dtype(b.forward.dtype, [&]<class E>() {
        using T = typename Compute<E>::type;
        const VarlenParams& p = b.forward;
        for (int64_t token = begin; token < end; ++token)
            for (int64_t head = 0; head < p.heads; ++head) {
                const E* out = static_cast<const E*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride;
                const E* dout = static_cast<const E*>(b.dout.data) + token * b.dout.token_stride + head * b.dout.head_stride;
                Vec<T> sums = {};
                for (int64_t d = 0; d < p.dim_v; d += kLanes<T>) sums += load_row(out, d, p.dim_v) * load_row(dout, d, p.dim_v);
                T sum = 0;
                for (int i = 0; i < kLanes<T>; ++i) sum += sums[i];
                const int64_t at = head * p.total_q + token;
                static_cast<T*>(b.delta)[at] = sum - (b.dlse ? static_cast<const T*>(b.dlse)[at] : T(0));
            }
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
