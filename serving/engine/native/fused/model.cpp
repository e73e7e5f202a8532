// A whole forward pass of a decoder of Llama's shape on a CPU, for tokens of many sequences and many LoRA adapters.
//
// Rows are tokens, of whichever sequence; a pass over 8 decoding sequences and one over a chunk of a prompt are the same
// code. The residual stream is float; what enters a matrix product is rounded to the type of the weights. Every phase is
// shared by all threads (pool.h). Structures here are mirrored field by field in library.py.
#include <stdlib.h>

#include "attention.h"
#include "pool.h"
#include "quant.h"

enum Kind { PLAIN = 0, INT8 = 8, INT4 = 4 };
enum Act { SILU = 0, GELU_TANH = 1, GELU = 2 };

struct Side { // one adapter in one linear layer
    const void *a; // [rank, in]
    const void *b; // [out / 16, rank, 16], scaled
    int32_t rank, unused;
};

struct Linear {
    const void *w;      // [out / 16, in / W, 16, W] (dot.h), or packed (quant.h)
    const bf16 *scales; // of packed weights
    const float *bias;  // [out] or none
    const Side *sides;  // [slots]
    int32_t in, out, kind, unused;
};

struct View { // rows first ... first + rows - 1 of a linear
    int32_t linear, first, rows, unused;
};

struct Layer {
    View q, k, v, o, gate, up, down;
    const float *norm_in, *norm_mid;         // [hidden]
    const float *norm_out_attn, *norm_out_mlp; // [hidden] or none: on what is added to the residual
    const float *norm_q, *norm_k;            // [head_dim] or none
    const float *cosine, *sine;              // [context, rotary / 2]
    void *keys, *values;                     // [pages, kv_heads, page_tokens * head_dim], as attention.h lays them out
    int32_t window, unused;                  // positions that are read; 0: all
};

struct Model {
    const void *embedding; // [vocabulary, hidden], or in panels if it is also the head
    const float *norm;     // [hidden]
    const Layer *layer;
    const Linear *linear;
    View head;
    int32_t wide;   // 1: float, 0: bfloat16
    int32_t panels; // 1: the embedding lies in panels
    int32_t unused;
    int32_t layers, hidden, heads, kv_heads, head_dim, rotary, inter, context, page_tokens, slots, max_rank, act;
    float eps, embedding_scale, attention_scale, attention_cap, logit_cap, logit_scale, residual_scale;
};

struct Batch {
    int32_t tokens, parts, wanted, unused;
    const int32_t *ids, *positions, *part; // [tokens]
    const int32_t *slot;                   // [parts], -1: none
    const int32_t *pages, *pages_at;       // all page tables, and where each part's begins [parts]
    const int32_t *want;                   // [wanted] tokens whose logits are wanted
    float *logits;                         // [wanted, vocabulary]
};

struct Run { // neighbouring tokens of one adapter
    int32_t from, count, slot;
};

static constexpr int TILE_TOKENS = 64;
static constexpr int CHUNK = PANEL * PANELS;
static constexpr int MANY = 24; // tokens from which packed weights are unpacked once a pass

struct Engine { // all zero at first
    Model model;
    Pool pool;
    int32_t room;    // tokens in a pass
    float *h, *qkv, *side, *low, *scores;
    void *x, *q, *att, *act, *plain;
    Rounded rounded;
    Run *runs;
    int32_t count_runs;
    long ld_qkv, ld_low, ld_scores, ld_plain;
    Batch batch;
};

static void *fresh(void *old, size_t bytes) {
    free(old);
    return aligned_alloc(64, (bytes + 127) / 64 * 64);
}

static inline float activate(float x, int act) {
    if (act == SILU) return x / (1.0f + expf(-x));
    if (act == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return 0.5f * x * (1.0f + erff(x * 0.70710678f));
}

static inline void gated(const float *gate, const float *up, int n, int act, float *out) {
    int i = 0;
    if (act == SILU)
        for (; i + 16 <= n; i += 16) {
            __m512 g = _mm512_loadu_ps(gate + i);
            __m512 s = _mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), g))));
            _mm512_storeu_ps(out + i, _mm512_mul_ps(s, _mm512_loadu_ps(up + i)));
        }
    for (; i < n; i++) out[i] = activate(gate[i], act) * up[i];
}

// to = from / rms(from) * weight; `to` and `from` may be the same.
static inline void normalize(const float *from, const float *weight, int n, float eps, float *to) {
    int i = 0;
    __m512 acc = _mm512_setzero_ps();
    for (; i + 16 <= n; i += 16) {
        __m512 v = _mm512_loadu_ps(from + i);
        acc = _mm512_fmadd_ps(v, v, acc);
    }
    float square = _mm512_reduce_add_ps(acc);
    for (; i < n; i++) square += from[i] * from[i];
    float scale = 1.0f / sqrtf(square / n + eps);
    for (i = 0; i < n; i++) to[i] = from[i] * scale * weight[i];
}

// The first `rotary` values of a head turned, pairs half of them apart (as transformers' rotate_half).
static inline void turn(float *x, const float *cosine, const float *sine, int rotary) {
    int half = rotary / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

// tile[t][j] += low[t] . b[.., first + j], for the tokens of one adapter.
template <class T>
static inline void add_side(const Side &side, const float *low, long ld_low, int count, int first, int n, float *tile, long ld) {
    const T *b = (const T *)side.b;
    const int rank = side.rank;
    for (int j = 0; j < n; j += 16) {
        const T *block = b + (long)((first + j) / 16) * rank * 16;
        __mmask16 mask = n - j >= 16 ? 0xffff : (__mmask16)((1u << (n - j)) - 1);
        for (int t = 0; t < count; t++) {
            float *to = tile + t * ld + j;
            const float *l = low + t * ld_low;
            __m512 even = _mm512_maskz_loadu_ps(mask, to), odd = _mm512_setzero_ps();
            int r = 0;
            for (; r + 2 <= rank; r += 2) {
                even = _mm512_fmadd_ps(_mm512_set1_ps(l[r]), load16(block + r * 16), even);
                odd = _mm512_fmadd_ps(_mm512_set1_ps(l[r + 1]), load16(block + r * 16 + 16), odd);
            }
            if (r < rank) even = _mm512_fmadd_ps(_mm512_set1_ps(l[r]), load16(block + r * 16), even);
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(even, odd));
        }
    }
}

template <class T> struct Pass {
    Engine &e;
    const Model &m;
    const Batch &b;
    explicit Pass(Engine &engine) : e(engine), m(engine.model), b(engine.batch) {}

    T *x() { return (T *)e.x; }
    const Linear &linear(const View &v) const { return m.linear[v.linear]; }

    // Row t of the input of `l` in int8.
    void round(const Linear &l, long t, const float *row) {
        const int groups = l.in / GROUP, offset = l.kind == INT8 ? Packed<8>::OFFSET : Packed<4>::OFFSET;
        round_row(row, l.in, offset, e.rounded.values + t * l.in, e.rounded.scales + t * groups, e.rounded.lifts + t * groups * 16);
    }

    // Row t of the input of `linear` from floats: rounded to T, which adapters read, and to int8 if its weights are packed.
    void input(const Linear &l, int t, const float *row, T *to) {
        store_row(to + (long)t * l.in, row, l.in);
        if (l.kind != PLAIN) round(l, t, row);
    }

    // Room for unpacked rows: two chunks a thread.
    T *scratch(int thread, int which) { return (T *)e.plain + (2L * thread + which) * e.ld_plain; }

    bool adapted(const Linear &l) const {
        for (int i = 0; i < e.count_runs; i++)
            if (e.runs[i].slot >= 0 && l.sides[e.runs[i].slot].rank) return true;
        return false;
    }

    // low[t] = A x[t], for each of `views` and every run of tokens; views of one linear share theirs.
    void lower(const View *views, int count, const T *in) {
        bool any = false;
        for (int v = 0; v < count; v++) any |= adapted(linear(views[v]));
        if (!any) return;
        for (int64_t c; (c = e.pool.take()) < (int64_t)e.count_runs * count;) {
            const Run &run = e.runs[c / count];
            int v = c % count;
            if (run.slot < 0 || (v && views[v].linear == views[v - 1].linear)) continue;
            const Linear &l = linear(views[v]);
            const Side &side = l.sides[run.slot];
            if (side.rank)
                dots(in + (long)run.from * l.in, l.in, run.count, (const T *)side.a, l.in, side.rank, l.in,
                     e.low + run.from * e.ld_low + v * m.max_rank, e.ld_low);
        }
        e.pool.barrier();
    }

    // Packed rows first ... first + n - 1 of a view as T, or null if the pass is too short for that.
    const T *unpacked(const View &view, int first, int n, int tokens, T *scratch) {
        const Linear &l = linear(view);
        const long row = view.first + first, groups = l.in / GROUP;
        if (l.kind == PLAIN || tokens < MANY) return nullptr;
        if (l.kind == INT8) unpack<8>((const uint8_t *)l.w + row * groups * 64, l.scales + row * groups, n, l.in, scratch);
        else unpack<4>((const uint8_t *)l.w + row * groups * 32, l.scales + row * groups * 2, n, l.in, scratch);
        return scratch;
    }

    // tile[t - from][j] = row first + j of `view`, with bias and adapters, for tokens from ... from + count - 1.
    void tile(const View &view, const T *weights, int index, const T *in, int from, int count, int first, int n, float *to) {
        const Linear &l = linear(view);
        const long row = view.first + first, groups = l.in / GROUP;
        if (l.kind == PLAIN) panel_dots(in + (long)from * l.in, l.in, count, (const T *)l.w + row * l.in, (long)l.in * PANEL, n, l.in, to, CHUNK);
        else if (weights) dots(in + (long)from * l.in, l.in, count, weights, l.in, n, l.in, to, CHUNK);
        else if (l.kind == INT8)
            quant_dots<8>(e.rounded, from, count, (const uint8_t *)l.w + row * groups * 64, l.scales + row * groups, n, l.in, to, CHUNK);
        else
            quant_dots<4>(e.rounded, from, count, (const uint8_t *)l.w + row * groups * 32, l.scales + row * groups * 2, n, l.in, to, CHUNK);
        if (l.bias)
            for (int t = 0; t < count; t++)
                for (int j = 0; j < n; j++) to[t * CHUNK + j] += l.bias[row + j];
        if (!l.sides) return;
        for (int i = 0; i < e.count_runs; i++) {
            const Run &run = e.runs[i];
            if (run.slot < 0 || run.from + run.count <= from || run.from >= from + count) continue;
            const Side &side = l.sides[run.slot];
            if (side.rank)
                add_side<T>(side, e.low + run.from * e.ld_low + index * m.max_rank, e.ld_low, run.count, row, n,
                            to + (run.from - from) * CHUNK, CHUNK);
        }
    }

    // Chunks of rows of all views, for all tokens; `take(v, first, n, from, count, tile)` gets each tile.
    template <class F> void multiply(const View *views, int count, const T *in, int tokens, int thread, F take) {
        float buffer[TILE_TOKENS * CHUNK];
        int chunks[3], total = 0;
        for (int v = 0; v < count; v++) total += chunks[v] = (views[v].rows + CHUNK - 1) / CHUNK;
        for (int64_t c; (c = e.pool.take()) < total;) {
            int v = 0, shared = 0;
            for (; c >= chunks[v]; v++) c -= chunks[v];
            for (int i = v; i > 0 && views[i].linear == views[i - 1].linear; i--) shared++;
            int first = c * CHUNK, n = views[v].rows - first < CHUNK ? views[v].rows - first : CHUNK;
            const T *weights = unpacked(views[v], first, n, tokens, scratch(thread, 0));
            for (int from = 0; from < tokens; from += TILE_TOKENS) {
                int some = tokens - from < TILE_TOKENS ? tokens - from : TILE_TOKENS;
                tile(views[v], weights, v - shared, in, from, some, first, n, buffer);
                take(v, first, n, from, some, buffer);
            }
        }
        e.pool.barrier();
    }

    // What `view` gives is added to the residual stream, normalized before if the model does so.
    void add(const View &view, const T *in, const float *norm, int thread) {
        float *to = norm ? e.side : e.h;
        multiply(&view, 1, in, b.tokens, thread, [&](int, int first, int n, int from, int count, const float *tile) {
            for (int t = 0; t < count; t++) {
                float *row = to + (long)(from + t) * m.hidden + first;
                if (norm) memcpy(row, tile + t * CHUNK, n * sizeof(float));
                else for (int j = 0; j < n; j++) row[j] += m.residual_scale * tile[t * CHUNK + j];
            }
        });
        if (!norm) return;
        for (int64_t t; (t = e.pool.take()) < b.tokens;) {
            float *row = e.side + t * m.hidden, *h = e.h + t * m.hidden;
            normalize(row, norm, m.hidden, m.eps, row);
            for (int j = 0; j < m.hidden; j++) h[j] += m.residual_scale * row[j];
        }
        e.pool.barrier();
    }

    void norm_input(const Linear &l, const float *weight) {
        float row[m.hidden];
        for (int64_t t; (t = e.pool.take()) < b.tokens;) {
            normalize(e.h + t * m.hidden, weight, m.hidden, m.eps, row);
            input(l, t, row, x());
        }
        e.pool.barrier();
    }

    // Rows of type T that are already written: only packed weights want them once more, in int8.
    void round_again(const Linear &l, const T *rows) {
        if (l.kind == PLAIN) return;
        float row[l.in];
        for (int64_t t; (t = e.pool.take()) < b.tokens;) {
            for (int i = 0; i < l.in; i++) row[i] = to_float(rows[t * l.in + i]);
            round(l, t, row);
        }
        e.pool.barrier();
    }

    // Queries and keys turned; keys and values into their pages.
    void place(const Layer &layer) {
        const int d = m.head_dim, half = m.rotary / 2, heads = m.heads + m.kv_heads;
        for (int64_t t; (t = e.pool.take()) < b.tokens;) {
            float *row = e.qkv + t * e.ld_qkv;
            int part = b.part[t], position = b.positions[t];
            const float *cosine = layer.cosine + (long)position * half, *sine = layer.sine + (long)position * half;
            Reach reach = {b.pages + b.pages_at[part], m.page_tokens, m.kv_heads, 0, position};
            bool end = t + 1 == b.tokens || b.part[t + 1] != part;
            for (int h = 0; h < heads; h++) {
                float *head = row + h * d;
                const float *norm = h < m.heads ? layer.norm_q : layer.norm_k;
                if (norm) normalize(head, norm, d, m.eps, head);
                if (layer.cosine) turn(head, cosine, sine, m.rotary);
            }
            store_row((T *)e.q + t * m.heads * d, row, m.heads * d);
            for (int g = 0; g < m.kv_heads; g++)
                write(row + (m.heads + g) * d, row + (heads + g) * d, (T *)layer.keys, (T *)layer.values, reach, g, position, d, end);
        }
        e.pool.barrier();
    }

    void attention(const Layer &layer, int thread) {
        const int d = m.head_dim, group = m.heads / m.kv_heads;
        const int split = b.tokens * m.kv_heads >= 4 * e.pool.threads ? 1 : group, heads = group / split;
        float *scores = e.scores + (long)thread * 4 * e.ld_scores;
        const int64_t items = (int64_t)b.tokens * m.kv_heads * split;
        for (int64_t c; (c = e.pool.take()) < items;) {
            int64_t t = c / (m.kv_heads * split);
            int first = c % (m.kv_heads * split) * heads, position = b.positions[t];
            Reach reach = {b.pages + b.pages_at[b.part[t]], m.page_tokens, m.kv_heads, 0, position};
            if (layer.window && position >= layer.window) reach.first = position - layer.window + 1;
            long at = (t * m.heads + first) * d;
            attend((const T *)e.q + at, heads, (const T *)layer.keys, (const T *)layer.values, reach, first / group, d,
                   m.attention_scale, m.attention_cap, scores, e.ld_scores, (T *)e.att + at);
        }
        e.pool.barrier();
    }

    void layer(const Layer &layer, int thread) {
        norm_input(linear(layer.q), layer.norm_in);
        const View qkv[3] = {layer.q, layer.k, layer.v};
        const int at[3] = {0, layer.q.rows, layer.q.rows + layer.k.rows};
        lower(qkv, 3, x());
        multiply(qkv, 3, x(), b.tokens, thread, [&](int v, int first, int n, int from, int count, const float *tile) {
            for (int t = 0; t < count; t++)
                memcpy(e.qkv + (from + t) * e.ld_qkv + at[v] + first, tile + t * CHUNK, n * sizeof(float));
        });
        place(layer);
        attention(layer, thread);
        round_again(linear(layer.o), (const T *)e.att);
        lower(&layer.o, 1, (const T *)e.att);
        add(layer.o, (const T *)e.att, layer.norm_out_attn, thread);

        norm_input(linear(layer.gate), layer.norm_mid);
        const View pair[2] = {layer.gate, layer.up};
        lower(pair, 2, x());
        feed(layer, thread);
        round_again(linear(layer.down), (const T *)e.act);
        lower(&layer.down, 1, (const T *)e.act);
        add(layer.down, (const T *)e.act, layer.norm_out_mlp, thread);
    }

    // act = activation(gate) * up: the same rows of both at once.
    void feed(const Layer &layer, int thread) {
        float gate[TILE_TOKENS * CHUNK], up[TILE_TOKENS * CHUNK];
        const int same = layer.gate.linear == layer.up.linear ? 0 : 1, total = (m.inter + CHUNK - 1) / CHUNK;
        for (int64_t c; (c = e.pool.take()) < total;) {
            int first = c * CHUNK, n = m.inter - first < CHUNK ? m.inter - first : CHUNK;
            const T *gates = unpacked(layer.gate, first, n, b.tokens, scratch(thread, 0));
            const T *ups = unpacked(layer.up, first, n, b.tokens, scratch(thread, 1));
            for (int from = 0; from < b.tokens; from += TILE_TOKENS) {
                int some = b.tokens - from < TILE_TOKENS ? b.tokens - from : TILE_TOKENS;
                tile(layer.gate, gates, 0, x(), from, some, first, n, gate);
                tile(layer.up, ups, same, x(), from, some, first, n, up);
                for (int t = 0; t < some; t++) {
                    gated(gate + t * CHUNK, up + t * CHUNK, n, m.act, gate + t * CHUNK);
                    store_row((T *)e.act + (long)(from + t) * m.inter + first, gate + t * CHUNK, n);
                }
            }
        }
        e.pool.barrier();
    }

    void embed() {
        for (int64_t t; (t = e.pool.take()) < b.tokens;) {
            const T *table = (const T *)m.embedding, *row = table + (long)b.ids[t] * m.hidden;
            const T *lane = table + (long)(b.ids[t] / PANEL) * PANEL * m.hidden + b.ids[t] % PANEL * W<T>;
            for (int j = 0; j < m.hidden; j++)
                e.h[t * m.hidden + j] = m.embedding_scale * to_float(m.panels ? lane[(long)(j / W<T>) * PANEL * W<T> + j % W<T>] : row[j]);
        }
        e.pool.barrier();
    }

    void logits(int thread) {
        const Linear &l = linear(m.head);
        float row[m.hidden];
        for (int64_t i; (i = e.pool.take()) < b.wanted;) {
            normalize(e.h + (long)b.want[i] * m.hidden, m.norm, m.hidden, m.eps, row);
            input(l, i, row, x());
        }
        e.pool.barrier();
        multiply(&m.head, 1, x(), b.wanted, thread, [&](int, int first, int n, int from, int count, const float *tile) {
            for (int t = 0; t < count; t++)
                for (int j = 0; j < n; j++) {
                    float y = tile[t * CHUNK + j] * m.logit_scale;
                    b.logits[(long)(from + t) * m.head.rows + first + j] = m.logit_cap > 0 ? m.logit_cap * tanhf(y / m.logit_cap) : y;
                }
        });
    }

    void run(int thread) {
        embed();
        for (int i = 0; i < m.layers; i++) layer(m.layer[i], thread);
        if (b.wanted) logits(thread);
    }

    static void work(void *engine, int thread) { Pass<T>(*(Engine *)engine).run(thread); }
};

static bool make_room(Engine &e, int tokens) {
    if (tokens <= e.room) return true;
    const Model &m = e.model;
    int wide = m.hidden, largest = m.heads * m.head_dim;
    if (largest < m.inter) largest = m.inter;
    if (largest < wide) largest = wide;
    e.ld_qkv = (long)(m.heads + 2 * m.kv_heads) * m.head_dim;
    e.ld_low = 3L * m.max_rank;
    e.ld_scores = (m.context + 63) / 16 * 16;
    e.room = tokens;
    e.ld_plain = (long)largest * CHUNK;
    e.plain = fresh(e.plain, 4L * 2 * e.pool.threads * e.ld_plain);
    e.h = (float *)fresh(e.h, sizeof(float) * tokens * wide);
    e.side = (float *)fresh(e.side, sizeof(float) * tokens * wide);
    e.qkv = (float *)fresh(e.qkv, sizeof(float) * tokens * e.ld_qkv);
    e.low = (float *)fresh(e.low, sizeof(float) * tokens * e.ld_low);
    e.scores = (float *)fresh(e.scores, sizeof(float) * e.pool.threads * 4 * e.ld_scores);
    e.x = fresh(e.x, 4L * tokens * wide);
    e.q = fresh(e.q, 4L * tokens * m.heads * m.head_dim);
    e.att = fresh(e.att, 4L * tokens * m.heads * m.head_dim);
    e.act = fresh(e.act, 4L * tokens * m.inter);
    e.rounded.values = (int8_t *)fresh(e.rounded.values, (long)tokens * largest);
    e.rounded.scales = (float *)fresh(e.rounded.scales, sizeof(float) * tokens * (largest / GROUP + 1));
    e.rounded.lifts = (int32_t *)fresh(e.rounded.lifts, 64L * tokens * (largest / GROUP + 1));
    e.runs = (Run *)fresh(e.runs, sizeof(Run) * tokens);
    return e.h && e.side && e.qkv && e.low && e.scores && e.x && e.plain && e.q && e.att && e.act && e.rounded.values && e.rounded.scales &&
           e.rounded.lifts && e.runs;
}

extern "C" {
size_t metier_sizes(int which) {
    const size_t sizes[] = {sizeof(Side), sizeof(Linear), sizeof(View), sizeof(Layer), sizeof(Model), sizeof(Batch)};
    return sizes[which];
}

void *metier_open(const Model *model, int threads) {
    void *memory = aligned_alloc(64, (sizeof(Engine) + 63) / 64 * 64);
    memset(memory, 0, sizeof(Engine));
    Engine *engine = (Engine *)memory;
    engine->model = *model;
    engine->pool.start(threads);
    return engine;
}

void metier_close(void *handle) {
    Engine *e = (Engine *)handle;
    e->pool.stop();
    void *all[] = {e->h, e->side, e->qkv, e->low, e->scores, e->x, e->q, e->att, e->act, e->plain, e->rounded.values, e->rounded.scales, e->rounded.lifts, e->runs};
    for (void *each : all) free(each);
    free(e);
}

// 0, or 1 if there is no memory for so many tokens.
int metier_forward(void *handle, const Batch *batch) {
    Engine &e = *(Engine *)handle;
    if (!make_room(e, batch->tokens)) return 1;
    e.batch = *batch;
    e.count_runs = 0;
    for (int t = 0; t < batch->tokens; t++) {
        int slot = batch->slot[batch->part[t]];
        Run *last = e.count_runs ? &e.runs[e.count_runs - 1] : nullptr;
        // Runs end with tiles, so that a tile finds whole ones, and after 8 tokens, so that threads can share them.
        if (last && last->slot == slot && last->count < 8 && t % TILE_TOKENS) last->count++;
        else e.runs[e.count_runs++] = {t, 1, slot};
    }
    e.pool.run(e.model.wide ? &Pass<float>::work : &Pass<bf16>::work, &e);
    return 0;
}
}
