// SPDX-License-Identifier: Apache-2.0
// Attention backward over one tile of keys, in the forward kernel's layout: queries in lanes, keys down the
// rows. Scores are computed again from the LSE (FlashAttention-2, arXiv:2307.08691). dk and dv of the tile
// stay in this thread's scratch; dq is summed over the tiles of a sequence in a fixed order, each block of
// rows being handed from tile to tile. Blocks are walked from the last to the first: then a tile is always
// one block behind the one before it, whatever the mask cuts off.
#include <sched.h>

#include "csrc/cpu/amx_tiles.h"
#include "csrc/cpu/gemm_tiles.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/scores.h"
#include "csrc/cpu/scratch.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kStepKeys = 64;              // keys whose probabilities are in flight at once
constexpr int64_t kDotRun = 32, kRowRun = 64;  // terms that are added up before they join a sum
#if defined(__AVX512F__)
constexpr int64_t kBlockRows = 128;
#elif defined(__AVX2__)
constexpr int64_t kBlockRows = 96;
#else
constexpr int64_t kBlockRows = 64;
#endif

/// What turns a score and the gradient of its probability into the probability and the gradient of the score.
template <class T>
struct Cells {
    const VarlenParams* p;
    T *lse, *delta;
    Lanes<T> lanes;

    template <bool kScored, bool kMasked>
    GAPLESS_INLINE void operator()(int64_t key, int64_t lane, Vec<T>* score, Vec<T>* gradient) const {
        Vec<T> x = *score * T(score_factor(*p)), tangent;
        if constexpr (kScored) x = modify_score<T>(x, lanes, lane, key, T(p->softcap), &tangent);
        Vec<T> e = vexp(x - load(lse + lane));
        Vec<T> d = e * (*gradient - load(delta + lane));
        if constexpr (kScored)
            if (p->softcap > 0) d *= T(1) - tangent * tangent;
        if constexpr (kMasked) {
            const IVec<T> seen = sees<T>(lanes, lane, key);
            e = seen ? e : Vec<T>{};
            d = seen ? d : Vec<T>{};
        }
        *score = e, *gradient = d;
    }

    /// Calls f with the two flags that a segment needs, as constants.
    template <class F>
    GAPLESS_INLINE void by_kind(bool partial, const F& f) const {
        if (p->softcap > 0 || p->alibi_slopes)
            f.template operator()<true, true>();
        else if (partial)
            f.template operator()<false, true>();
        else
            f.template operator()<false, false>();
    }
};

/// The five products by fused multiply-add, for any type.
template <class E>
class VectorGradients {
  public:
    using T = typename Compute<E>::type;
    using Registers = NoTiles;
    static constexpr int kVecs = kBlockRows / kLanes<T>;
    using View = StripView<T, kVecs>;

    VectorGradients(const VarlenParams& p, Ahead& ahead)
        : p(p), ahead(ahead), dim(padded<T>(p.dim)), dim_v(padded<T>(p.dim_v)) {}

    static int64_t width(int64_t rows) { return padded<T>(rows); }
    static int64_t dq_width(const VarlenParams& p) { return p.dim; }

    void carve(Carver& c, int64_t keys, int64_t lanes) {
        k = c.take<T>(keys * dim), v = c.take<T>(keys * dim_v);
        dk = c.take<T>(keys * dim), dv = c.take<T>(keys * dim_v);
        query_panel = c.take<T>(lanes * p.dim), dout_panel = c.take<T>(lanes * p.dim_v);
        query_rows = c.take<T>(lanes * dim), dout_rows = c.take<T>(lanes * dim_v);
        probabilities = c.take<T>(kStepKeys * lanes);
        dscores = c.take<T>(keys * lanes);
    }

    void pack_keys(const E* const* k_rows, const E* const* v_rows, int64_t keys) {
        for (int64_t i = 0; i < keys; ++i) {
            copy_row(k_rows[i], k + i * dim, p.dim);
            copy_row(v_rows[i], v + i * dim_v, p.dim_v);
        }
        std::memset(dk, 0, keys * dim * sizeof(T));
        std::memset(dv, 0, keys * dim_v * sizeof(T));
    }

    void pack_block(const E* const* q_rows, const E* const* dout, int64_t count, int64_t lanes) {
        transpose_rows(q_rows, count, p.dim, T(1), query_panel, lanes);
        transpose_rows(dout, count, p.dim_v, T(1), dout_panel, lanes);
        for (int64_t i = 0; i < count; ++i) {
            copy_row(q_rows[i], query_rows + i * dim, p.dim);
            copy_row(dout[i], dout_rows + i * dim_v, p.dim_v);
        }
        std::memset(query_rows + count * dim, 0, (lanes - count) * dim * sizeof(T));
        std::memset(dout_rows + count * dim_v, 0, (lanes - count) * dim_v * sizeof(T));
    }

    /// Keys [from, to), counted from the tile's first, which is key `origin`: adds to dk and dv, keeps the
    /// scores' gradients.
    void step(const View& view, int64_t origin, int64_t from, int64_t to, int64_t lanes,
              const Cells<T>& cells) {
        Segment segments[View::kMaxSegments];
        const int count = view.split(origin + from, origin + to, segments);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            const int64_t n = s.end - s.begin, at = s.begin - origin, lane = s.vec_begin * kLanes<T>;
            const int64_t vecs = s.vec_end - s.vec_begin, depth = vecs * kLanes<T>;
            T *ps = probabilities + lane, *ds = dscores + at * lanes + lane;
            gemm<Init::kZero, T>(
                {k + at * dim, dim, 1, query_panel + lane, lanes, ps, lanes, p.dim, nullptr, &ahead}, n,
                vecs);
            gemm_in_runs<Init::kZero, T>(
                {v + at * dim_v, dim_v, 1, dout_panel + lane, lanes, ds, lanes, p.dim_v, nullptr, &ahead},
                kDotRun, n, vecs);
            cells.by_kind(s.partial, [&]<bool kScored, bool kMasked>() {
                for (int64_t key = 0; key < n; ++key)
                    for (int64_t l = 0; l < depth; l += kLanes<T>) {
                        Vec<T> x = load(ps + key * lanes + l), d = load(ds + key * lanes + l);
                        cells.template operator()<kScored, kMasked>(s.begin + key, lane + l, &x, &d);
                        store(ps + key * lanes + l, x);
                        store(ds + key * lanes + l, d);
                    }
            });
            gemm_in_runs<Init::kAdd, T>({ps, lanes, 1, dout_rows + lane * dim_v, dim_v, dv + at * dim_v,
                                         dim_v, depth, nullptr, &ahead},
                                        kRowRun, n, dim_v / kLanes<T>);
            gemm_in_runs<Init::kAdd, T>(
                {ds, lanes, 1, query_rows + lane * dim, dim, dk + at * dim, dim, depth, nullptr, &ahead},
                kRowRun, n, dim / kLanes<T>);
        }
    }

    /// Adds what keys [from, to) give to dq, [dim][lanes].
    void add_dq(const View& view, int64_t origin, int64_t from, int64_t to, int64_t lanes, T* dq) const {
        for (int64_t step = from; step < to; step += kStepKeys) {
            Segment segments[View::kMaxSegments];
            const int count = view.split(origin + step, origin + least(to, step + kStepKeys), segments);
            for (int i = 0; i < count; ++i) {
                const Segment& s = segments[i];
                const int64_t at = s.begin - origin, lane = s.vec_begin * kLanes<T>;
                gemm<Init::kAdd, T>({k + at * dim, 1, dim, dscores + at * lanes + lane, lanes, dq + lane,
                                     lanes, s.end - s.begin, nullptr},
                                    p.dim, s.vec_end - s.vec_begin);
            }
        }
    }

    const T* dk_row(int64_t key) const { return dk + key * dim; }
    const T* dv_row(int64_t key) const { return dv + key * dim_v; }

  private:
    const VarlenParams& p;
    Ahead& ahead;
    const int64_t dim, dim_v;
    T *k, *v, *dk, *dv, *query_panel, *dout_panel, *query_rows, *dout_rows, *probabilities, *dscores;
};

#if defined(__AMX_BF16__)
/// The five products of bfloat16 on tile registers: whole blocks of rows and steps of keys, padded with
/// zeros.
class TileGradients {
  public:
    using T = float;
    using Registers = Tiles;
    using View = StripView<float, kBlockRows / kTile>;

    TileGradients(const VarlenParams& p, Ahead& ahead)
        : p(p),
          ahead(ahead),
          dim(round_up(p.dim, kTile)),
          dim_v(round_up(p.dim_v, kTile)),
          depth(round_up(p.dim, kTileDepth)),
          depth_v(round_up(p.dim_v, kTileDepth)) {}

    static int64_t width(int64_t rows) { return round_up(rows, kTileDepth); }
    static int64_t dq_width(const VarlenParams& p) { return round_up(p.dim, kTile); }

    void carve(Carver& c, int64_t keys, int64_t lanes) {
        padded_keys = round_up(keys, kStepKeys);
        k = c.take<bf16>(padded_keys * depth), v = c.take<bf16>(padded_keys * depth_v);
        k_columns = c.take<bf16>(padded_keys * dim);
        dk = c.take<float>(padded_keys * dim), dv = c.take<float>(padded_keys * dim_v);
        query_panel = c.take<uint32_t>(lanes * depth / 2), dout_panel = c.take<uint32_t>(lanes * depth_v / 2);
        query_pairs = c.take<uint32_t>(lanes * dim / 2), dout_pairs = c.take<uint32_t>(lanes * dim_v / 2);
        scores = c.take<float>(kStepKeys * lanes), gradients = c.take<float>(kStepKeys * lanes);
        probabilities = c.take<bf16>(kStepKeys * lanes), dscores = c.take<bf16>(kStepKeys * lanes);
        dscore_pairs = c.take<uint32_t>(padded_keys / 2 * lanes);
    }

    void pack_keys(const bf16* const* k_rows, const bf16* const* v_rows, int64_t keys) {
        pack_rows(k_rows, keys, p.dim, k);
        pack_rows(v_rows, keys, p.dim_v, v);
        pack_columns(k_rows, keys, p.dim, k_columns, padded_keys);
        std::memset(dk, 0, padded_keys * dim * sizeof(float));
        std::memset(dv, 0, padded_keys * dim_v * sizeof(float));
    }

    void pack_block(const bf16* const* q_rows, const bf16* const* dout, int64_t count, int64_t lanes) {
        pack_lanes(q_rows, count, p.dim, query_panel, lanes);
        pack_lanes(dout, count, p.dim_v, dout_panel, lanes);
        pack_pairs(q_rows, count, p.dim, query_pairs, lanes);
        pack_pairs(dout, count, p.dim_v, dout_pairs, lanes);
    }

    void step(const View& view, int64_t origin, int64_t from, int64_t to, int64_t lanes,
              const Cells<float>& cells) {
        const int64_t n = to - from, rows = round_up(n, kTileDepth);
        multiply(
            {k + from * depth, depth, query_panel, lanes, scores, lanes, n, lanes, depth, false, &ahead});
        multiply({v + from * depth_v, depth_v, dout_panel, lanes, gradients, lanes, n, lanes, depth_v, false,
                  &ahead});
        uint32_t* pairs = dscore_pairs + from / 2 * lanes;
        cells.by_kind(view.cuts(origin + from, origin + to), [&]<bool kScored, bool kMasked>() {
            for (int64_t key = 0; key < rows; key += 2)
                for (int64_t l = 0; l < lanes; l += kTile) {
                    Vec<float> e[2] = {}, d[2] = {};
#pragma GCC unroll 2
                    for (int i = 0; i < 2; ++i) {
                        if (key + i >= n) break;
                        e[i] = load(scores + (key + i) * lanes + l),
                        d[i] = load(gradients + (key + i) * lanes + l);
                        cells.template operator()<kScored, kMasked>(origin + from + key + i, l, &e[i], &d[i]);
                    }
                    for (int i = 0; i < 2; ++i) {
                        store_narrow(probabilities + (key + i) * lanes + l, e[i]);
                        store_narrow(dscores + (key + i) * lanes + l, d[i]);
                    }
                    _mm512_storeu_si512(pairs + key / 2 * lanes + l, round_pairs(d[0], d[1]));
                }
        });
        multiply({probabilities, lanes, dout_pairs, dim_v, dv + from * dim_v, dim_v, n, dim_v, lanes, true,
                  &ahead});
        multiply({dscores, lanes, query_pairs, dim, dk + from * dim, dim, n, dim, lanes, true, &ahead});
    }

    void add_dq(const View&, int64_t, int64_t from, int64_t to, int64_t lanes, float* dq) const {
        multiply({k_columns + from, padded_keys, dscore_pairs + from / 2 * lanes, lanes, dq, lanes, dim,
                  lanes, round_up(to - from, kTileDepth), true});
    }

    const float* dk_row(int64_t key) const { return dk + key * dim; }
    const float* dv_row(int64_t key) const { return dv + key * dim_v; }

  private:
    const VarlenParams& p;
    Ahead& ahead;
    const int64_t dim, dim_v, depth, depth_v;  // widths of results, and of sums
    int64_t padded_keys;
    bf16 *k, *v, *k_columns, *probabilities, *dscores;
    float *dk, *dv, *scores, *gradients;
    uint32_t *query_panel, *dout_panel, *query_pairs, *dout_pairs, *dscore_pairs;
};
#endif

template <class E, class Gradients>
class Backward {
  public:
    using T = typename Compute<E>::type;

    Backward(const VarlenBackwardParams& params, const BackwardItem& item)
        : b(params), p(params.forward), item(item), gradients(params.forward, ahead) {
        const int32_t* tile = p.tiles + 3 * (item.first_tile + item.tile);
        sequence = tile[0], key_begin = tile[1], keys = tile[2] - tile[1];
        group = p.heads / p.kv_heads;
        const int32_t* cu_q = p.cu_seqlens_q + sequence;
        const int32_t* cu_k = p.cu_seqlens_k + sequence;
        first_token = cu_q[0], first_key = cu_k[0];
        map = {group, cu_q[1] - cu_q[0], cu_k[1] - cu_k[0], p.left, p.right};
        rows = map.len_q * group;
    }

    void run(const BackwardItem* next) {
        const typename Gradients::Registers registers;
        carve_scratch([this](Carver& c) { carve(c); });
        ahead.clear();
        for (int64_t i = 0; i < keys; ++i) k_rows[i] = key_row(p.k, i), v_rows[i] = key_row(p.v, i);
        gradients.pack_keys(k_rows, v_rows, keys);
        for (int64_t row = last_block(); row >= 0; row -= kBlockRows) {
            ahead.clear();
            if (row > 0)
                expect_rows(row - kBlockRows, ahead);
            else if (next)
                Backward(b, *next).expect(ahead);
            block(row, least(kBlockRows, rows - row));
        }
        for (int64_t i = 0; i < keys; ++i) {
            write_row(key_row(b.dk, i), gradients.dk_row(i), p.dim, T(p.scale));
            write_row(key_row(b.dv, i), gradients.dv_row(i), p.dim_v, T(1));
        }
    }

  private:
    const VarlenBackwardParams& b;
    const VarlenParams& p;
    const BackwardItem& item;
    Ahead ahead;
    Gradients gradients;
    int64_t sequence, key_begin, keys, group, first_token, first_key, rows;
    RowMap map;

    const E **k_rows, **v_rows, **query_rows, **dout_rows;
    E** dq_rows;
    T *dq, *factor;
    Cells<T> cells;

    void carve(Carver& c) {
        const int64_t lanes = Gradients::width(least(kBlockRows, rows));
        gradients.carve(c, keys, lanes);
        k_rows = c.take<const E*>(keys), v_rows = c.take<const E*>(keys);
        query_rows = c.take<const E*>(lanes), dout_rows = c.take<const E*>(lanes);
        dq_rows = c.take<E*>(lanes);
        dq = c.take<T>(lanes * Gradients::dq_width(p));
        factor = c.take<T>(lanes);
        ahead.carve(
            c, (keys + lanes) * (ahead.lines_of(p.dim * sizeof(E)) + ahead.lines_of(p.dim_v * sizeof(E))));
        cells.p = &p;
        cells.lse = c.take<T>(lanes), cells.delta = c.take<T>(lanes);
        cells.lanes.carve(c, lanes);
    }

    int64_t last_block() const { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows - kBlockRows; }

    /// Asks for the keys, and for the rows that are the first to meet them.
    void expect(Ahead& ahead) const {
        for (int64_t i = 0; i < keys; ++i) {
            ahead.add(key_row(p.k, i), p.dim * int64_t(sizeof(E)));
            ahead.add(key_row(p.v, i), p.dim_v * int64_t(sizeof(E)));
        }
        if (rows > 0) expect_rows(last_block(), ahead);
    }
    void expect_rows(int64_t row, Ahead& ahead) const {
        map.each(row, least(rows, row + kBlockRows), [&](int64_t, int64_t query, int64_t member) {
            const int64_t token = first_token + query, head = item.kv_head * group + member;
            const auto add = [&](const Packed& x, int64_t width) {
                ahead.add(static_cast<const E*>(x.data) + token * x.token_stride + head * x.head_stride,
                          width * int64_t(sizeof(E)));
            };
            add(p.q, p.dim), add(b.dout, p.dim_v);
        });
    }

    E* key_row(const Packed& x, int64_t key) const {
        return static_cast<E*>(x.data) + item.kv_head * x.head_stride +
               (first_key + key_begin + key) * x.token_stride;
    }

    static void write_row(E* to, const T* from, int64_t width, T scale) {
        for (int64_t d = 0; d < width; d += kLanes<T>) store_row(to, d, width, load(from + d) * scale);
    }

    /// Which of the sequence's tiles see a block of rows: how many before this one, and whether it is the
    /// last.
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

    void block(int64_t row, int64_t count) {
        const int64_t begin = map.begin(row), end = map.end(row + count - 1), lanes = Gradients::width(count);
        const Turn turn = turn_of(begin, end);
        if (!turn.any &&
            item.tile == 0) {  // nobody sees these rows: their gradient is 0, and somebody has to write it
            locate(row, count, lanes);
            std::memset(dq, 0, lanes * Gradients::dq_width(p) * sizeof(T));
            return write_dq(dq, count, lanes);
        }
        // Steps begin at the same keys for every block, and are whole but for the last.
        const int64_t from = most(0, begin - key_begin) / kStepKeys * kStepKeys;
        const int64_t to = least(keys, round_up_to_step(end - key_begin));
        if (least(end, key_begin + keys) <= most(begin, key_begin)) return;
        locate(row, count, lanes);
        cells.lanes.fill(p, map, sequence, item.kv_head, row, count, lanes);
        gradients.pack_block(query_rows, dout_rows, count, lanes);
        const typename Gradients::View view(map, row, count);
        for (int64_t step = from; step < to; step += kStepKeys)
            gradients.step(view, key_begin, step, least(to, step + kStepKeys), lanes, cells);

        T* sum = item.dq ? static_cast<T*>(item.dq) + row * Gradients::dq_width(p) : dq;
        int32_t* at = item.dq ? item.turn + row / kBlockRows : nullptr;
        if (item.dq)
            for (int spins = 0; __atomic_load_n(at, __ATOMIC_ACQUIRE) != turn.before;)
                if (++spins > 1000) sched_yield();
        if (turn.before == 0) std::memset(sum, 0, lanes * Gradients::dq_width(p) * sizeof(T));
        gradients.add_dq(view, key_begin, from, to, lanes, sum);
        if (turn.last) write_dq(sum, count, lanes);
        if (item.dq) __atomic_store_n(at, turn.before + 1, __ATOMIC_RELEASE);
    }

    static int64_t round_up_to_step(int64_t n) { return (n + kStepKeys - 1) / kStepKeys * kStepKeys; }

    /// Where each row of the block lies in memory, its LSE and its delta.
    void locate(int64_t row, int64_t count, int64_t lanes) {
        const T* lse_in = static_cast<const T*>(p.lse);
        const T* delta_in = static_cast<const T*>(b.delta);
        map.each(row, row + count, [&](int64_t i, int64_t query, int64_t member) {
            const int64_t token = first_token + query, head = item.kv_head * group + member;
            query_rows[i] =
                static_cast<const E*>(p.q.data) + token * p.q.token_stride + head * p.q.head_stride;
            dout_rows[i] =
                static_cast<const E*>(b.dout.data) + token * b.dout.token_stride + head * b.dout.head_stride;
            dq_rows[i] = static_cast<E*>(b.dq.data) + token * b.dq.token_stride + head * b.dq.head_stride;
            const T l = lse_in[head * p.total_q + token];
            cells.lse[i] =
                l == -kInfinity<T> ? kInfinity<T> : l;  // a row that saw nothing: every exp gives 0
            cells.delta[i] = delta_in[head * p.total_q + token];
        });
        for (int64_t i = count; i < lanes; ++i) cells.lse[i] = kInfinity<T>, cells.delta[i] = 0;
    }

    void write_dq(const T* sum, int64_t count, int64_t lanes) {
        for (int64_t i = 0; i < lanes; ++i) factor[i] = T(p.scale);
        untranspose_rows(sum, lanes, factor, dq_rows, count, p.dim);
    }
};

}  // namespace

extern const int64_t backward_block_rows;
const int64_t backward_block_rows = kBlockRows;

void varlen_backward(const VarlenBackwardParams& b, const BackwardItem& item, const BackwardItem* next) {
#if defined(__AMX_BF16__)
    if (b.forward.dtype == DType::kBFloat16) return Backward<bf16, TileGradients>(b, item).run(next);
#endif
    by_dtype(b.forward.dtype, [&]<class E>() { Backward<E, VectorGradients<E>>(b, item).run(next); });
}

// Sums in the order of the products of dout and v: where a row sees one key, the two cancel to the last bit.
void varlen_delta(const VarlenBackwardParams& b, int64_t begin, int64_t end) {
    by_dtype(b.forward.dtype, [&]<class E>() {
        using T = typename Compute<E>::type;
        constexpr int w = kLanes<T>;
        const VarlenParams& p = b.forward;
        T outs[256 * w], douts[256 * w];
        for (int64_t token = begin; token < end; token += w)
            for (int64_t head = 0; head < p.heads; ++head) {
                const int64_t count = least(w, end - token);
                const E *out[w], *dout[w];
                for (int64_t i = 0; i < count; ++i) {
                    out[i] = static_cast<const E*>(p.out.data) + (token + i) * p.out.token_stride +
                             head * p.out.head_stride;
                    dout[i] = static_cast<const E*>(b.dout.data) + (token + i) * b.dout.token_stride +
                              head * b.dout.head_stride;
                }
                transpose_rows(out, count, p.dim_v, T(1), outs, w);
                transpose_rows(dout, count, p.dim_v, T(1), douts, w);
                Vec<T> sum = {};
                for (int64_t d = 0; d < p.dim_v;) {
                    Vec<T> run = {};
                    for (const int64_t end = least(p.dim_v, d + kDotRun); d < end; ++d)
                        run += load(outs + d * w) * load(douts + d * w);
                    sum += run;
                }
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t at = head * p.total_q + token + i;
                    static_cast<T*>(b.delta)[at] =
                        sum[i] - (b.dlse ? static_cast<const T*>(b.dlse)[at] : T(0));
                }
            }
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
