// SPDX-License-Identifier: Apache-2.0
// Attention backward over one tile of keys, in the forward kernel's layout: queries in lanes, keys down the
// rows. Scores are computed again from the LSE (FlashAttention-2, arXiv:2307.08691). dk and dv of the tile
// stay in this thread's scratch; dq is summed over the tiles of a sequence in a fixed order, each block of
// rows being handed from tile to tile. Blocks are walked from the last to the first: then a tile is always
// one block behind the one before it, whatever the mask cuts off.
#include "csrc/cpu/bf16_tiles.h"
#include "csrc/cpu/gemm_tiles.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/key_walk.h"
#include "csrc/cpu/scores.h"
#include "csrc/cpu/scratch.h"
#include "csrc/cpu/wait.h"

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
    KeyRun run;  // that the keys are of

    template <bool kScored, bool kMasked>
    GAPLESS_INLINE void operator()(int64_t key, int64_t lane, Vec<T>* score, Vec<T>* gradient) const {
        Vec<T> x = *score * T(score_factor(*p)), tangent;
        if constexpr (kScored) x = modify_score<T>(x, lanes, lane, key, T(p->softcap), &tangent);
        Vec<T> e = vexp(x - load(lse + lane));
        Vec<T> d = e * (*gradient - load(delta + lane));
        if constexpr (kScored)
            if (p->softcap > 0) d *= T(1) - tangent * tangent;
        if constexpr (kMasked) {
            const uint32_t* bits = run.bits ? run.bits + (key - run.begin) * p->blocks->words : nullptr;
            const IVec<T> seen = sees<T>(lanes, lane, key, bits);
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
    static constexpr int64_t kKeyAlign = 1;
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
    /// scores' gradients, from row `at` on where the kernel keeps those of its runs together.
    void step(const View& view, int64_t origin, int64_t from, int64_t to, int64_t, int64_t lanes,
              const Cells<T>& cells) {
        Segment segments[View::kMaxSegments];
        const int count = view.split({origin + from, origin + to, 0, 0, cells.run.bits}, 0, segments);
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

    /// Adds what runs of keys give to dq, [dim][lanes].
    void add_dq(const View& view, int64_t origin, const KeyRun* runs, int count, int64_t lanes, T* dq) const {
        for (int r = 0; r < count; ++r)
            for (int64_t step = runs[r].begin; step < runs[r].end; step += kStepKeys) {
                Segment segments[View::kMaxSegments];
                const int n =
                    view.split({step, least(runs[r].end, step + kStepKeys), 0, 0, nullptr}, 0, segments);
                for (int i = 0; i < n; ++i) {
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

#if defined(__AVX512BF16__)
/// The five products of bfloat16 by its own instructions: whole blocks of rows and steps of keys, padded
/// with zeros.
class TileGradients {
  public:
    using T = float;
    using Registers = Tiles;
    static constexpr int64_t kKeyAlign = kTileDepth;
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
        pack_columns(k_rows, keys, p.dim, k_columns, padded_keys, kTileDepth);
        std::memset(dk, 0, padded_keys * dim * sizeof(float));
        std::memset(dv, 0, padded_keys * dim_v * sizeof(float));
    }

    void pack_block(const bf16* const* q_rows, const bf16* const* dout, int64_t count, int64_t lanes) {
        pack_lanes(q_rows, count, p.dim, query_panel, lanes);
        pack_lanes(dout, count, p.dim_v, dout_panel, lanes);
        pack_pairs(q_rows, count, p.dim, query_pairs, lanes);
        pack_pairs(dout, count, p.dim_v, dout_pairs, lanes);
    }

    void step(const View& view, int64_t origin, int64_t from, int64_t to, int64_t at, int64_t lanes,
              const Cells<float>& cells) {
        const int64_t n = to - from, rows = round_up(n, kTileDepth);
        multiply(
            {k + from * depth, depth, query_panel, lanes, scores, lanes, n, lanes, depth, false, &ahead});
        multiply({v + from * depth_v, depth_v, dout_panel, lanes, gradients, lanes, n, lanes, depth_v, false,
                  &ahead});
        uint32_t* pairs = dscore_pairs + at / 2 * lanes;
        cells.by_kind(cells.run.bits || view.cuts(origin + from, origin + to),
                      [&]<bool kScored, bool kMasked>() {
                          for (int64_t key = 0; key < rows; key += 2)
                              for (int64_t l = 0; l < lanes; l += kTile) {
                                  Vec<float> e[2] = {}, d[2] = {};
#pragma GCC unroll 2
                                  for (int i = 0; i < 2; ++i) {
                                      if (key + i >= n) break;
                                      e[i] = load(scores + (key + i) * lanes + l),
                                      d[i] = load(gradients + (key + i) * lanes + l);
                                      cells.template operator()<kScored, kMasked>(origin + from + key + i, l,
                                                                                  &e[i], &d[i]);
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

    void add_dq(const View&, int64_t origin, const KeyRun* runs, int count, int64_t lanes, float* dq) const {
        // All runs are one product, so dq is read and written once.
        constexpr int kMost = kListedKeys / kTileDepth;
        const bf16* steps[kMost];
        int64_t done = 0, n = 0;
        const auto flush = [&] {
            multiply({steps[0], padded_keys, dscore_pairs + done * kTileDepth / 2 * lanes, lanes, dq, lanes,
                      dim, lanes, n * kTileDepth, true, nullptr, steps});
            done += n, n = 0;
        };
        for (int r = 0; r < count; ++r)
            for (int64_t key = runs[r].begin - origin; key < runs[r].end - origin; key += kTileDepth) {
                steps[n++] = k_columns + key;
                if (n == kMost) flush();
            }
        if (n > 0) flush();
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

/// How the rows of a bundle are cut into blocks: no block crosses the end of rows that share a list.
struct RowCut {
    int64_t rows, span, each;  // of a bundle; that share a list; most in a block

    RowCut(const VarlenParams& p, int64_t queries) {
        const int64_t group = p.heads / p.bundles;
        rows = queries * group;
        span = p.blocks ? p.blocks->block_q * group : most(rows, 1);
        each = least(span, kBlockRows);
    }
    int64_t per_span() const { return (span + each - 1) / each; }
    int64_t blocks() const { return rows == 0 ? 0 : index_of(rows - 1) + 1; }
    int64_t index_of(int64_t row) const { return row / span * per_span() + row % span / each; }
    int64_t begin(int64_t block) const { return block / per_span() * span + block % per_span() * each; }
    int64_t end(int64_t block) const {
        return least(rows, least(begin(block) + each, (block / per_span() + 1) * span));
    }
};

template <class E, class Gradients>
class Backward {
  public:
    using T = typename Compute<E>::type;

    Backward(const VarlenBackwardParams& params, const BackwardItem& item)
        : b(params),
          p(params.forward),
          item(item),
          gradients(params.forward, ahead),
          sequence(p.tiles[3 * (item.first_tile + item.tile)]),
          cut(p, p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence]) {
        const int32_t* tile = p.tiles + 3 * (item.first_tile + item.tile);
        key_begin = tile[1], keys = tile[2] - tile[1];
        group = p.heads / p.bundles;
        const int32_t* cu_q = p.cu_seqlens_q + sequence;
        const int32_t* cu_k = p.cu_seqlens_k + sequence;
        first_token = cu_q[0], first_key = cu_k[0];
        const int64_t len_k = cu_k[1] - cu_k[0];
        map = {group, p.first_position(sequence, cu_q[1] - cu_q[0], len_k), len_k, p.left, p.right};
        bundles = p.bundles / p.kv_heads, bundle = item.kv_head * bundles;
    }

    void run(const BackwardItem* next) {
        const typename Gradients::Registers registers;
        carve_scratch([this](Carver& c) { carve(c); });
        ahead.clear();
        for (int64_t i = 0; i < keys; ++i) k_rows[i] = key_row(p.k, i), v_rows[i] = key_row(p.v, i);
        gradients.pack_keys(k_rows, v_rows, keys);
        for (; bundle < (item.kv_head + 1) * bundles; ++bundle) {
            if (item.tile == 0) clear_unseen();
            for (int64_t i = before(cut.blocks()), next_block; i >= 0; i = next_block) {
                next_block = before(i);
                ahead.clear();
                if (next_block >= 0)
                    expect_rows(next_block, ahead);
                else if (next)
                    Backward(b, *next).expect(ahead);
                block(i);
            }
        }
        for (int64_t i = 0; i < keys; ++i) {
            write_row(key_row(b.dk, i), gradients.dk_row(i), p.dim, T(p.scale));
            write_row(key_row(b.dv, i), gradients.dv_row(i), p.dim_v, T(1));
        }
    }

    static BackwardSpace space(const VarlenParams& p, int64_t queries) {
        const RowCut cut(p, queries);
        const int64_t blocks = p.bundles / p.kv_heads * cut.blocks();
        return {blocks, blocks * Gradients::width(cut.each) * Gradients::dq_width(p) * int64_t(sizeof(T))};
    }

  private:
    const VarlenBackwardParams& b;
    const VarlenParams& p;
    const BackwardItem& item;
    Ahead ahead;
    Gradients gradients;
    const int64_t sequence;
    const RowCut cut;
    int64_t key_begin, keys, group, bundles, bundle, first_token, first_key;
    RowMap map;

    const E **k_rows, **v_rows, **query_rows, **dout_rows;
    E** dq_rows;
    T *dq, *factor;
    Cells<T> cells;

    void carve(Carver& c) {
        const int64_t lanes = Gradients::width(cut.each);
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

    /// Asks for the keys, and for the rows that are the first to meet them.
    void expect(Ahead& ahead) const {
        for (int64_t i = 0; i < keys; ++i) {
            ahead.add(key_row(p.k, i), p.dim * int64_t(sizeof(E)));
            ahead.add(key_row(p.v, i), p.dim_v * int64_t(sizeof(E)));
        }
        const int64_t block = before(cut.blocks());
        if (block >= 0) expect_rows(block, ahead);
    }
    void expect_rows(int64_t block, Ahead& ahead) const {
        map.each(cut.begin(block), cut.end(block), [&](int64_t, int64_t query, int64_t member) {
            const int64_t token = first_token + query, head = bundle * group + member;
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

    /// Which of the sequence's tiles meet a block of rows: whether this one does, how many before it, whether
    /// it is the last, and whether any does.
    struct Turn {
        bool mine = false, last = true, any = false;
        int32_t before = 0;
    };
    Turn turn_of(int64_t block) const {
        Turn turn;
        const auto meet = [&](int64_t tile) {
            turn.any = true;
            turn.mine |= tile == item.tile;
            turn.last &= tile <= item.tile;
            turn.before += tile < item.tile;
        };
        const int64_t begin = map.begin(cut.begin(block)), end = map.end(cut.end(block) - 1);
        if (!p.blocks) {
            for (int32_t i = 0; i < item.tiles; ++i) {
                const int32_t* tile = p.tiles + 3 * (item.first_tile + i);
                if (tile[1] < end && tile[2] > begin && begin < end) meet(i);
            }
            return turn;
        }
        ListedBlocks listed = listed_blocks(block, begin, end);
        for (int64_t at = -1; listed.any();) {
            const int64_t tile = listed.take() * p.blocks->block_k / kListedKeys;
            if (tile != at) meet(at = tile);
            if (tile > item.tile) break;
        }
        return turn;
    }
    /// The last block before `block` that meets this tile, or -1.
    int64_t before(int64_t block) const {
        while (--block >= 0 && !turn_of(block).mine) {
        }
        return block;
    }

    int64_t list_row(int64_t block) const {
        return p.blocks->row(bundle, p.bundles, sequence, map.query(cut.begin(block)));
    }
    ListedBlocks listed_blocks(int64_t block, int64_t begin, int64_t end) const {
        return {*p.blocks, list_row(block), begin, most(begin, end)};
    }

    /// Rows that nobody sees have gradient 0, and somebody has to write it.
    void clear_unseen() {
        const int64_t lanes = Gradients::width(cut.each);
        for (int64_t i = 0; i < cut.blocks(); ++i) {
            if (turn_of(i).any) continue;
            locate(i, lanes);
            std::memset(dq, 0, lanes * Gradients::dq_width(p) * sizeof(T));
            write_dq(dq, cut.end(i) - cut.begin(i), lanes);
        }
    }

    void block(int64_t i) {
        const int64_t row = cut.begin(i), count = cut.end(i) - row, lanes = Gradients::width(count);
        const int64_t begin = most(key_begin, map.begin(row)),
                      end = least(key_begin + keys, map.end(row + count - 1));
        const Turn turn = turn_of(i);
        locate(i, lanes);
        cells.lanes.fill(p, map, sequence, bundle, row, count, lanes);
        gradients.pack_block(query_rows, dout_rows, count, lanes);
        const typename Gradients::View view(map, row, count);
        KeyTile<kListedKeys, Gradients::kKeyAlign> met;
        if (p.blocks) {
            KeyWalk(*p.blocks, list_row(i), 1, begin, end).next(met);
        } else {
            // Steps begin at the same keys for every block, and are whole but for the last.
            const int64_t from = (begin - key_begin) / kStepKeys * kStepKeys;
            met.runs[met.count++] = {
                key_begin + from, least(key_begin + keys, key_begin + round_up(end - key_begin, kStepKeys)),
                0, 0, nullptr};
        }
        for (int n = 0; n < met.count; ++n) {
            const KeyRun& run = cells.run = met.runs[n];
            for (int64_t key = run.begin; key < run.end; key += kStepKeys)
                gradients.step(view, key_begin, key - key_begin, least(run.end, key + kStepKeys) - key_begin,
                               run.at + key - run.begin, lanes, cells);
        }

        const int64_t at = (bundle - item.kv_head * bundles) * cut.blocks() + i;
        T* sum = item.dq ? static_cast<T*>(item.dq) + at * Gradients::width(cut.each) * Gradients::dq_width(p)
                         : dq;
        if (item.dq)
            wait_until([&] { return __atomic_load_n(item.turn + at, __ATOMIC_ACQUIRE) == turn.before; });
        if (turn.before == 0) std::memset(sum, 0, lanes * Gradients::dq_width(p) * sizeof(T));
        gradients.add_dq(view, key_begin, met.runs, met.count, lanes, sum);
        if (turn.last) write_dq(sum, count, lanes);
        if (item.dq) __atomic_store_n(item.turn + at, turn.before + 1, __ATOMIC_RELEASE);
    }

    /// Where each row of a block lies in memory, its LSE and its delta.
    void locate(int64_t block, int64_t lanes) {
        const int64_t count = cut.end(block) - cut.begin(block);
        const T* lse_in = static_cast<const T*>(p.lse);
        const T* delta_in = static_cast<const T*>(b.delta);
        map.each(cut.begin(block), cut.end(block), [&](int64_t i, int64_t query, int64_t member) {
            const int64_t token = first_token + query, head = bundle * group + member;
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

/// Calls f.operator()<Backward>() with the class for the dtype and lists.
template <class F>
void by_gradients(const VarlenParams& p, const F& f) {
#if defined(__AVX512BF16__)
    // Tiles of 32 keys hold whole blocks, or none of the listed ones could do without its neighbour.
    if (p.dtype == DType::kBFloat16 && (!p.blocks || p.blocks->block_k >= kTileDepth))
        return f.template operator()<Backward<bf16, TileGradients>>();
#endif
    by_dtype(p.dtype, [&]<class E>() { f.template operator()<Backward<E, VectorGradients<E>>>(); });
}

}  // namespace

BackwardSpace backward_space(const VarlenParams& p, int64_t queries) {
    BackwardSpace space{};
    by_gradients(p, [&]<class Kernel>() { space = Kernel::space(p, queries); });
    return space;
}

void varlen_backward(const VarlenBackwardParams& b, const BackwardItem& item, const BackwardItem* next) {
    by_gradients(b.forward, [&]<class Kernel>() { Kernel(b, item).run(next); });
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
