// SPDX-License-Identifier: Apache-2.0
// Attention forward, transposed: queries lie in the lanes of vectors, keys run down the rows. Then keys and values are
// read as they lie in memory, one scalar at a time, softmax needs no horizontal operation, and a mask is a comparison of
// lanes. Online softmax as in FlashAttention-2 (arXiv:2307.08691), in units of log2.
#include "csrc/cpu/gemm_tiles.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/scores.h"
#include "csrc/cpu/scratch.h"

namespace gapless::cpu::GAPLESS_ISA {
namespace {

constexpr int64_t kTileKeys = 128;   // scores of a strip stay in L1
constexpr int64_t kSharingRows = 512;  // rows that share one packing of keys and values; their state stays in L2

template <class E>
class Forward {
  public:
    using T = typename Compute<E>::type;
    static constexpr int kStripVecs = kMaxVecs;
    static constexpr int64_t kStripRows = kStripVecs * kLanes<T>;

    Forward(const VarlenParams& params, const ForwardItem& item) : p(params), item(item) {
        const int32_t* tile = p.tiles + 3 * item.tile;
        sequence = tile[0];
        group = p.heads / p.kv_heads;
        const int32_t* cu_q = p.cu_seqlens_q + sequence;
        const int32_t* cu_k = p.cu_seqlens_k + sequence;
        first_token = cu_q[0];
        first_key = cu_k[0];
        map = {group, cu_q[1] - cu_q[0], p.seqused_k ? p.seqused_k[sequence] : cu_k[1] - cu_k[0], p.left, p.right};
        row_begin = tile[1] * group, row_end = tile[2] * group;
    }

    void run() {
        Carver sizes(nullptr);
        carve(sizes);
        Carver memory(scratch(sizes.used()));
        carve(memory);
        for (int64_t row = row_begin; row < row_end; row += kSharingRows) block(row, least(kSharingRows, row_end - row));
    }

  private:
    const VarlenParams& p;
    const ForwardItem& item;
    int64_t sequence, group, first_token, first_key, row_begin, row_end;
    RowMap map;

    T *queries, *out, *top, *sum, *scores, *factor, *key_tile, *value_tile;
    const E** query_rows;
    E** out_rows;
    T** lse_of_row;
    Lanes<T> lanes;

    void carve(Carver& c) {
        const int64_t rows = least(kSharingRows, padded<T>(row_end - row_begin));
        queries = c.take<T>(rows * p.dim);
        out = c.take<T>(rows * p.dim_v);
        top = c.take<T>(rows);
        sum = c.take<T>(rows);
        factor = c.take<T>(kStripRows);
        scores = c.take<T>(kTileKeys * kStripRows);
        query_rows = c.take<const E*>(rows);
        out_rows = c.take<E*>(rows);
        lse_of_row = c.take<T*>(rows);
        lanes.carve(c, rows);
        key_tile = c.take<T>(reads_in_place(p.k) ? 0 : kTileKeys * padded<T>(p.dim));
        value_tile = c.take<T>(reads_in_place(p.v) ? 0 : kTileKeys * padded<T>(p.dim_v));
    }

    bool reads_in_place(const Packed&) const { return sizeof(E) == sizeof(T) && !p.block_table; }

    const E* key_row(const Packed& x, int64_t page_stride, int64_t key) const {
        const E* base = static_cast<const E*>(x.data) + item.kv_head * x.head_stride;
        if (!p.block_table) return base + (first_key + key) * x.token_stride;
        const int64_t page = p.block_table[sequence * p.max_pages + key / p.page_size];
        return base + page * page_stride + key % p.page_size * x.token_stride;
    }

    /// Keys [from, to) as rows that the matrix multiplication can read, and their stride.
    const T* widened(const Packed& x, int64_t page_stride, int64_t from, int64_t to, int64_t width, T* tile,
                     int64_t* stride) const {
        if (reads_in_place(x)) {
            *stride = x.token_stride;
            return reinterpret_cast<const T*>(key_row(x, page_stride, from));
        }
        *stride = padded<T>(width);
        for (int64_t key = from; key < to; ++key) copy_row(key_row(x, page_stride, key), tile + (key - from) * *stride, width);
        return tile;
    }

    void block(int64_t row, int64_t rows) {
        lanes.fill(p, map, sequence, item.kv_head, row, rows, kLog2e);
        start(row, rows);
        const int64_t begin = most(item.key_begin, map.begin(row));
        const int64_t end = least(item.key_end, map.end(row + rows - 1));
        for (int64_t from = begin; from < end; from += kTileKeys) {
            const int64_t to = least(end, from + kTileKeys);
            int64_t key_stride, value_stride;
            const T* keys = widened(p.k, p.k_page_stride, from, to, p.dim, key_tile, &key_stride);
            const T* values = widened(p.v, p.v_page_stride, from, to, p.dim_v, value_tile, &value_stride);
            for (int64_t at = 0; at < rows; at += kStripRows)
                strip(row, at, least(kStripRows, rows - at), from, to, keys, key_stride, values, value_stride);
        }
        for (int64_t at = 0; at < rows; at += kStripRows) finish(row, at, least(kStripRows, rows - at));
    }

    void start(int64_t row, int64_t rows) {
        int64_t token = first_token + map.query(row), member = row % group;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t head = item.kv_head * group + member;
            query_rows[i] = static_cast<const E*>(p.q.data) + token * p.q.token_stride + head * p.q.head_stride;
            out_rows[i] = static_cast<E*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride;
            lse_of_row[i] = static_cast<T*>(p.lse) + head * p.total_q + token;
            // The sink is one more score, of a key without a value. Of several parts of the keys, the first has it.
            const bool sink = p.sinks && item.key_begin == 0;
            top[i] = sink ? T(p.sinks[head] * kLog2e) : -kInfinity<T>;
            sum[i] = sink ? 1 : 0;
            if (++member == group) member = 0, ++token;
        }
        for (int64_t i = rows; i < padded<T>(rows); ++i) top[i] = -kInfinity<T>, sum[i] = 0;
        for (int64_t at = 0; at < rows; at += kStripRows) {
            const int64_t count = least(kStripRows, rows - at);
            transpose_rows(query_rows + at, count, p.dim, T(query_factor(p, kLog2e)), queries + at * p.dim, padded<T>(count));
        }
        std::memset(out, 0, padded<T>(rows) * p.dim_v * sizeof(T));
    }

    void strip(int64_t row, int64_t at, int64_t rows, int64_t from, int64_t to, const T* keys, int64_t key_stride,
               const T* values, int64_t value_stride) {
        constexpr int w = kLanes<T>;
        const StripView<T, kStripVecs> view(map, row + at, rows);
        Segment segments[view.kMaxSegments];
        const int count = view.split(from, to, segments);
        if (count == 0) return;
        const int64_t width = padded<T>(rows);
        const T* panel = queries + at * p.dim;
        T* o = out + at * p.dim_v;

        Vec<T> old_top[kStripVecs], new_top[kStripVecs];
        for (int v = 0; v < view.vecs; ++v) new_top[v] = old_top[v] = load(top + at + v * w);
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            T* block = scores + (s.begin - from) * width + s.vec_begin * w;
            gemm<Init::kZero, T>({keys + (s.begin - from) * key_stride, key_stride, 1, panel + s.vec_begin * w, width, block,
                                  width, p.dim, nullptr},
                                 s.end - s.begin, s.vec_end - s.vec_begin);
            if (s.partial || p.softcap > 0 || p.alibi_slopes) modify(s, at, block, width);
            by_width(s, [&]<int n>() { largest<n>(block, width, s.end - s.begin, new_top + s.vec_begin); });
        }
        Vec<T> base[kStripVecs], part[kStripVecs];
        for (int v = 0; v < view.vecs; ++v) {
            base[v] = new_top[v] == -kInfinity<T> ? Vec<T>{} : new_top[v];
            const Vec<T> f = vexp2(old_top[v] - base[v]);
            store(factor + v * w, f);
            store(top + at + v * w, new_top[v]);
            part[v] = load(sum + at + v * w) * f;
        }
        // The first segment's product rescales what is there, if it has every vector; else that takes a round of its own.
        const bool fused = segments[0].vec_begin == 0 && segments[0].vec_end == view.vecs;
        if (!fused)
            for (int64_t i = 0; i < p.dim_v; ++i)
                for (int v = 0; v < view.vecs; ++v)
                    store(o + i * width + v * w, load(o + i * width + v * w) * load(factor + v * w));
        for (int i = 0; i < count; ++i) {
            const Segment& s = segments[i];
            T* block = scores + (s.begin - from) * width + s.vec_begin * w;
            by_width(s, [&]<int n>() {
                exponentials<n>(block, width, s.end - s.begin, base + s.vec_begin, part + s.vec_begin);
            });
            const Gemm<T> g{values + (s.begin - from) * value_stride, 1, value_stride, block, width, o + s.vec_begin * w,
                            width, s.end - s.begin, factor + s.vec_begin * w};
            if (fused && i == 0)
                gemm<Init::kScale>(g, p.dim_v, s.vec_end - s.vec_begin);
            else
                gemm<Init::kAdd>(g, p.dim_v, s.vec_end - s.vec_begin);
        }
        for (int v = 0; v < view.vecs; ++v) store(sum + at + v * w, part[v]);
    }

    /// Calls with the number of vectors of a segment as a constant, so that their state stays in registers.
    template <class F>
    static GAPLESS_INLINE void by_width(const Segment& s, const F& f) {
        static_assert(kStripVecs <= 4);
        switch (s.vec_end - s.vec_begin) {
            case 1: return f.template operator()<1>();
            case 2: return f.template operator()<2>();
            case 3: return f.template operator()<(kStripVecs >= 3 ? 3 : 1)>();
            default: return f.template operator()<(kStripVecs >= 4 ? 4 : 1)>();
        }
    }

    template <int n>
    static void largest(const T* block, int64_t width, int64_t keys, Vec<T>* top) {
        constexpr int w = kLanes<T>;
        Vec<T> best[n];
        for (int v = 0; v < n; ++v) best[v] = top[v];
        for (int64_t k = 0; k < keys; ++k, block += width)
#pragma GCC unroll 4
            for (int v = 0; v < n; ++v) best[v] = vmax<T>(load(block + v * w), best[v]);
        for (int v = 0; v < n; ++v) top[v] = best[v];
    }

    template <int n>
    static void exponentials(T* block, int64_t width, int64_t keys, const Vec<T>* base, Vec<T>* sum) {
        constexpr int w = kLanes<T>;
        constexpr int64_t kRun = 16;  // one long chain of additions would lose bits that the LSE needs
        Vec<T> b[n], total[n];
        for (int v = 0; v < n; ++v) b[v] = base[v], total[v] = sum[v];
        for (int64_t from = 0; from < keys; from += kRun) {
            Vec<T> run[n] = {};
            for (int64_t k = from; k < least(keys, from + kRun); ++k, block += width)
#pragma GCC unroll 4
                for (int v = 0; v < n; ++v) {
                    const Vec<T> e = vexp2(load(block + v * w) - b[v]);
                    run[v] += e;
                    store(block + v * w, e);
                }
            for (int v = 0; v < n; ++v) total[v] += run[v];
        }
        for (int v = 0; v < n; ++v) sum[v] = total[v];
    }

    void modify(const Segment& s, int64_t at, T* block, int64_t width) const {
        constexpr int w = kLanes<T>;
        const bool scored = p.softcap > 0 || p.alibi_slopes;
        for (int64_t key = s.begin; key < s.end; ++key, block += width)
            for (int v = s.vec_begin; v < s.vec_end; ++v) {
                T* cell = block + (v - s.vec_begin) * w;
                const int64_t lane = at + v * w;
                Vec<T> x = load(cell), tangent;
                if (scored) x = modify_score<T>(x, lanes, lane, key, T(p.softcap * kLog2e), &tangent);
                if (s.partial) x = sees<T>(lanes, lane, key) ? x : splat(-kInfinity<T>);
                store(cell, x);
            }
    }

    void finish(int64_t row, int64_t at, int64_t rows) {
        constexpr int w = kLanes<T>;
        const int64_t width = padded<T>(rows);
        const T* o = out + at * p.dim_v;
        if (item.partial) return keep_partial(row, at, rows);
        T lse[kStripRows];
        for (int64_t i = 0; i < rows; i += w) {
            const Vec<T> s = load(sum + at + i);
            store(factor + i, s == T(0) ? Vec<T>{} : T(1) / s);
            const Vec<T> l = (load(top + at + i) + vlog2(s)) * T(kLn2);
            store(lse + i, s == T(0) ? splat(-kInfinity<T>) : l);
        }
        untranspose_rows(o, width, factor, out_rows + at, rows, p.dim_v);
        for (int64_t i = 0; i < rows; ++i) *lse_of_row[at + i] = lse[i];
    }

    void keep_partial(int64_t row, int64_t at, int64_t rows) const {
        const int64_t width = padded<T>(rows), stride = p.dim_v + 2;
        T* to = static_cast<T*>(item.partial) + (row + at - row_begin) * stride;
        for (int64_t i = 0; i < rows; ++i, to += stride) {
            for (int64_t d = 0; d < p.dim_v; ++d) to[d] = out[at * p.dim_v + d * width + i];
            to[p.dim_v] = top[at + i], to[p.dim_v + 1] = sum[at + i];
        }
    }
};

}  // namespace

void varlen_forward(const VarlenParams& p, const ForwardItem& item) {
    by_dtype(p.dtype, [&]<class E>() { Forward<E>(p, item).run(); });
}

/// One row of a tile from its parts, in their order.
template <class E, class T = typename Compute<E>::type>
void merge_row(const VarlenParams& p, const T* part, int64_t parts, int64_t stride, E* out, T* lse) {
    T top = -kInfinity<T>;
    for (int64_t i = 0; i < parts; ++i) top = part[i * stride + p.dim_v] > top ? part[i * stride + p.dim_v] : top;
    const T base = top == -kInfinity<T> ? T(0) : top;
    T sum = 0;
    T row[256] = {};
    for (int64_t i = 0; i < parts; ++i, part += stride) {
        const T weight = vexp2(splat(part[p.dim_v] - base))[0];
        sum += part[p.dim_v + 1] * weight;
        for (int64_t d = 0; d < p.dim_v; ++d) row[d] += part[d] * weight;
    }
    for (int64_t d = 0; d < p.dim_v; ++d) narrow(sum == T(0) ? T(0) : row[d] / sum, out + d);
    *lse = sum == T(0) ? -kInfinity<T> : (top + vlog2(splat(sum))[0]) * T(kLn2);
}

void varlen_merge(const VarlenParams& p, const MergeItem& item) {
    by_dtype(p.dtype, [&]<class E>() {
        using T = typename Compute<E>::type;
        const int32_t* tile = p.tiles + 3 * item.tile;
        const int64_t group = p.heads / p.kv_heads, rows = (tile[2] - tile[1]) * group, width = p.dim_v + 2;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t token = p.cu_seqlens_q[tile[0]] + tile[1] + row / group, head = item.kv_head * group + row % group;
            merge_row<E>(p, static_cast<const T*>(item.partials) + row * width, item.parts, rows * width,
                         static_cast<E*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride,
                         static_cast<T*>(p.lse) + head * p.total_q + token);
        }
    });
}

}  // namespace gapless::cpu::GAPLESS_ISA
