// GPT-2's forward step on a CPU with AVX2, for many sequences at once. native.py compiles this file
// and calls `forward` (at the end), once per step.
//
// A row is one token of one sequence. No row's result depends on the other rows: each sum adds its
// products in the order of the inputs, however many rows share a tile. A prompt therefore gets the
// same text in any batch, and a sampled token's cache entries equal those of a prefill.
//
// Two macros are set when this file is compiled: WEIGHTS, one of the structs Float32, Float16,
// BFloat16 and Int8 below, and CACHE, the type of keys and values (float, or uint16_t for float16).
#include <immintrin.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

// ---- The model, as native.py passes it ----------------------------------------------------------

struct Norm { const float *weight, *bias; };
struct Matrix {  // (outputs, inputs), padded to a multiple of 64 outputs
    const void* weight;         // in panels (outputs / 16, inputs / group, 16, group)
    const float *bias, *scale;  // of each output
    const int32_t* start;       // initial value of each output's sum (int8 only)
    int64_t inputs, outputs;
};
struct Layer { Norm ln_1; Matrix c_attn, c_proj; Norm ln_2; Matrix c_fc, mlp_c_proj; };
struct Model {
    int64_t n_layer, n_head, n_embd, exact_gelu;
    const Layer* layers;
    Norm ln_f;
    Matrix head;
};
struct Row {
    char* cache;  // of the row's sequence: (n_layer, 2, n_head, capacity, head size)
    int64_t capacity, position;
};

// ---- Vectors of eight numbers -------------------------------------------------------------------

typedef float f8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4), may_alias));

static f8 load(const float* p) { return *(const f8*)p; }
static f8 load(const uint16_t* p) {  // float16
    return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
static void store(float* p, f8 x) { *(f8*)p = x; }
static void store(uint16_t* p, f8 x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0));
}
static f8 fma(f8 a, f8 b, f8 c) { return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
static f8 max(f8 a, f8 b) { return a > b ? a : b; }
static float sum_of(f8 x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
static float max_of(f8 x) { return *std::max_element((float*)&x, (float*)&x + 8); }

// e^x = 2^n e^r with |r| <= ln(2) / 2, where a polynomial of degree 6 is accurate to float32
static f8 exp(f8 x) {
    x = max(x, f8{} - 87) < f8{} + 88 ? max(x, f8{} - 87) : f8{} + 88;
    i8 n = (i8)_mm256_cvtps_epi32((__m256)(x * 1.44269504f));  // round(x / ln(2))
    f8 r = x - __builtin_convertvector(n, f8) * 0.693147181f;
    f8 p = f8{} + 1.f / 720;
    for (float c : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f}) p = fma(p, r, f8{} + c);
    return p * (f8)((n + 127) << 23);
}

// ---- Weight types -------------------------------------------------------------------------------
//
// Each struct says how to compute eight outputs of a matrix product. `prepare` converts a row of
// inputs and returns its scale. `begin` gives the initial sums. For each `step` inputs, `get` loads
// the weights, `spread` repeats the inputs, and `add` adds their products. `end` scales the sums.

struct Float32 {
    using Weight = float;
    using Input = float;
    using Sums = f8;
    static constexpr int group = 1, step = 1;
    static float prepare(const float* x, float* input, int64_t C) {
        std::copy_n(x, C, input);
        return 1;
    }
    static f8 begin(const Matrix&, int64_t) { return f8{}; }
    static f8 get(const float* w) { return load(w); }
    static f8 spread(const float* x) { return f8{} + *x; }
    static f8 add(f8 sums, f8 w, f8 x) { return fma(w, x, sums); }
    static f8 end(f8 sums, const Matrix&, int64_t, float) { return sums; }
};
struct Float16 : Float32 {
    using Weight = uint16_t;
    static f8 get(const Weight* w) { return load(w); }
};
struct BFloat16 : Float32 {
    using Weight = uint16_t;
    static f8 get(const Weight* w) {
        __m128i bits = _mm_loadu_si128((const __m128i*)w);
        return (f8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
    }
};
struct Int8 {  // inputs are rounded to -63 ... 63 and stored with 64 added, which `begin` subtracts
    using Weight = int8_t;
    using Input = uint8_t;
    using Sums = i8;
    static constexpr int group = 4, step = 8;
    struct Eight { i8 low, high; };  // the first four inputs of a step, and the last four

    static float prepare(const float* x, uint8_t* input, int64_t C) {
        f8 largest = f8{} + 1e-12f;
        for (int64_t c = 0; c < C; c += 8) largest = max(largest, max(load(x + c), -load(x + c)));
        float scale = max_of(largest) / 63;
        for (int64_t c = 0; c < C; c += 8) {
            i8 q = (i8)_mm256_cvtps_epi32((__m256)(load(x + c) / scale)) + 64;
            // pack eight int32 into eight bytes
            __m128i low = _mm256_castsi256_si128((__m256i)q);
            __m128i high = _mm256_extracti128_si256((__m256i)q, 1);
            __m128i words = _mm_packs_epi32(low, high);
            _mm_storel_epi64((__m128i*)(input + c), _mm_packus_epi16(words, words));
        }
        return scale;
    }
    static i8 begin(const Matrix& m, int64_t n) { return *(const i8*)(m.start + n); }
    static Eight get(const int8_t* w) { return {*(const i8*)w, *(const i8*)(w + 16 * group)}; }
    static Eight spread(const uint8_t* x) {
        return {i8{} + *(const int32_t*)x, i8{} + *(const int32_t*)(x + group)};
    }
    static i8 add(i8 sums, Eight w, Eight x) {
#ifdef __AVX512VNNI__
        sums = (i8)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)x.low, (__m256i)w.low);
        return (i8)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)x.high, (__m256i)w.high);
#else
        // the sum of four products fits into 16 bits: see quantize_rows in packed.py
        auto pairs = [](i8 a, i8 b) { return _mm256_maddubs_epi16((__m256i)a, (__m256i)b); };
        __m256i fours = _mm256_add_epi16(pairs(x.low, w.low), pairs(x.high, w.high));
        return sums + (i8)_mm256_madd_epi16(fours, _mm256_set1_epi16(1));
#endif
    }
    static f8 end(i8 sums, const Matrix& m, int64_t n, float scale) {
        return __builtin_convertvector(sums, f8) * (load(m.scale + n) * scale);
    }
};
using Kind = WEIGHTS;

// ---- Threads ------------------------------------------------------------------------------------

struct Phase { std::atomic<int64_t> taken{0}, done{0}; };  // numbers of items

struct Thread {  // all threads pass through the same phases, in order
    Phase* phase;

    // Calls item(i) for every i < n. Threads take `chunk` items at a time while any are left, and
    // then wait until all items are done. They do not wait for each other: if the system runs a
    // thread late, it finds its share of the work done.
    template <class Item> void share(int64_t n, int64_t chunk, Item item) {
        for (int64_t i; (i = phase->taken.fetch_add(chunk)) < n;) {
            int64_t stop = std::min(n, i + chunk);
            for (int64_t j = i; j < stop; j++) item(j);
            phase->done += stop - i;
        }
        for (int spins = 0; phase->done < n; spins++)
            spins < 1000 ? _mm_pause() : std::this_thread::yield();
        phase++;
    }
};

struct Team {
    std::mutex in_use;
    std::function<void()> work;
    std::atomic<int> call{0};     // odd while there is work
    std::atomic<int> working{0};  // threads that look for work or do it
    std::atomic<int> members{1};

    void run(int threads, std::function<void()> new_work) {
        std::unique_lock lock(in_use, std::try_to_lock);
        if (!lock || threads == 1) return new_work();  // the team is busy
        for (; members < threads; members++) std::thread([this] { serve(); }).detach();
        work = new_work;
        call++, call.notify_all();
        work();
        call++;
        while (working) std::this_thread::yield();
    }

    void serve() {
        for (int seen = 0;; call.wait(seen)) {
            working++;
            if ((seen = call) % 2) work();
            working--;
        }
    }
};

// ---- LayerNorm and matrix products; all threads call `linear` together --------------------------

struct Buffers {
    std::vector<Kind::Input> inputs;
    std::vector<float> scales, normed, a, b;
};
enum After { STORE, ADD, GELU, EXACT_GELU };  // what happens to the result of a product

static void layer_norm(const Norm& norm, const float* x, float* y, int64_t C) {
    f8 total{}, squares{};
    for (int64_t c = 0; c < C; c += 8) total += load(x + c);
    float mean = sum_of(total) / C;
    for (int64_t c = 0; c < C; c += 8)
        squares = fma(load(x + c) - mean, load(x + c) - mean, squares);
    float rstd = 1 / std::sqrt(sum_of(squares) / C + 1e-5f);
    for (int64_t c = 0; c < C; c += 8) {
        f8 normed = (load(x + c) - mean) * rstd;
        store(y + c, fma(normed, load(norm.weight + c), load(norm.bias + c)));
    }
}

// M rows of x (M, inputs) times V vectors of 8 outputs, starting at output `first`
template <int M, int V>
static void tile(const Matrix& m, int64_t first, const Kind::Input* x, const float* scales,
                 float* y, After after) {
    Kind::Sums sums[M][V];
    for (auto& row : sums)
        for (int v = 0; v < V; v++) row[v] = Kind::begin(m, first + 8 * v);
    auto w = (const Kind::Weight*)m.weight + first * m.inputs;
    for (int64_t k = 0; k < m.inputs; k += Kind::step, w += 16 * Kind::step) {
        // load the weights once for all rows
        decltype(Kind::get(w)) weights[V];
        for (int v = 0; v < V; v++)
            weights[v] = Kind::get(w + v / 2 * 16 * m.inputs + v % 2 * 8 * Kind::group);
        // prefetch the next panel while this one is computed
        for (int i = 0; M > 1 && i < 16 * Kind::step; i += 64 / sizeof *w)
            _mm_prefetch((const char*)(w + 16 * m.inputs + i), _MM_HINT_T1);
        for (int i = 0; i < M; i++) {
            auto input = Kind::spread(x + i * m.inputs + k);
            for (int v = 0; v < V; v++) sums[i][v] = Kind::add(sums[i][v], weights[v], input);
        }
    }
    for (int i = 0; i < M; i++)
        for (int64_t v = 0, n = first; v < V && n < m.outputs; v++, n += 8) {
            f8 result = Kind::end(sums[i][v], m, n, scales[i]) + load(m.bias + n), z = result;
            float* to = y + i * m.outputs + n;
            // z (1 + tanh(u)) / 2 = z / (1 + exp(-2 u)) with u = sqrt(2 / pi) (z + 0.044715 z^3)
            if (after == GELU) result /= 1 + exp(-1.59576912f * (z + 0.044715f * z * z * z));
            if (after == EXACT_GELU)
                for (int j = 0; j < 8; j++) result[j] *= 0.5f * (1 + std::erf(z[j] * 0.707106781f));
            if (after == ADD) result += load(to);
            if (m.outputs - n >= 8) store(to, result);
            else std::copy_n((float*)&result, m.outputs - n, to);
        }
}

// y (R, outputs) = the product of x (R, inputs), normalized first if `norm` is given
static void linear(Thread& thread, const Matrix& m, const Norm* norm, const float* x, int64_t R,
                   float* y, After after, Buffers& buffers) {
    // prepare the inputs
    thread.share(R, 1, [&](int64_t r) {
        const float* from = x + r * m.inputs;
        if (norm) {
            layer_norm(*norm, from, &buffers.normed[r * m.inputs], m.inputs);
            from = &buffers.normed[r * m.inputs];
        }
        buffers.scales[r] = Kind::prepare(from, &buffers.inputs[r * m.inputs], m.inputs);
    });
    // multiply, 64 outputs an item
    constexpr decltype(&tile<1, 2>) tiles[] = {tile<1, 2>, tile<2, 2>, tile<3, 2>, tile<4, 2>};
    thread.share((m.outputs + 63) / 64, 2, [&](int64_t block) {
        const auto *inputs = buffers.inputs.data();
        const float *scales = buffers.scales.data();
        if (R == 1) return tile<1, 8>(m, block * 64, inputs, scales, y, after);
        for (int64_t first = block * 64; first < block * 64 + 64; first += 16)
            for (int64_t r = 0; r < R; r += 4) {
                auto rows = tiles[std::min<int64_t>(4, R - r) - 1];  // 1 to 4 rows at a time
                rows(m, first, inputs + r * m.inputs, scales + r, y + r * m.outputs, after);
            }
    });
}

// ---- Attention ----------------------------------------------------------------------------------

// y (8 * N), part of a head's output: the mean of values v (count, size) with weights p / total
template <int N>
static void weighted_mean(const float* p, const CACHE* v, int64_t count, int64_t size, float total,
                          float* y) {
    f8 sums[N] = {};
    for (int64_t t = 0; t < count; t++)
        for (int j = 0; j < N; j++)
            sums[j] = fma(f8{} + p[t], load(v + t * size + 8 * j), sums[j]);
    for (int j = 0; j < N; j++) store(y + 8 * j, sums[j] / total);
}

// y (R, n_embd) of qkv (R, 3 * n_embd): each row attends to its sequence's cache, up to itself
static void attend(Thread& thread, const Model& m, int64_t layer, const float* qkv, const Row* rows,
                   int64_t R, float* y) {
    int64_t C = m.n_embd, size = C / m.n_head;
    // the cache entry of token t; the value heads follow the key heads
    auto entry = [&](const Row& row, int64_t head, int64_t t) {
        return (CACHE*)row.cache + ((layer * 2 * m.n_head + head) * row.capacity + t) * size;
    };
    // store the new keys and values
    thread.share(R, 1, [&](int64_t r) {
        for (int64_t c = 0; c < 2 * C; c += 8)
            store(entry(rows[r], c / size, rows[r].position) + c % size,
                  load(qkv + (3 * r + 1) * C + c));
    });
    // attend, one head of one row an item
    std::vector<float> p;
    thread.share(R * m.n_head, 1, [&](int64_t i) {
        int64_t r = i / m.n_head, head = i % m.n_head, count = rows[r].position + 1;
        const float* q = qkv + 3 * r * C + head * size;
        const CACHE *k = entry(rows[r], head, 0), *v = entry(rows[r], m.n_head + head, 0);
        p.resize(rows[r].capacity);  // a multiple of eight
        f8 largest = f8{} - INFINITY, total{};
        // scores of eight tokens at a time
        for (int64_t t = 0; t < count; t += 8) {
            __m256 dot[8] = {};
            for (int64_t d = 0; d < size; d += 8)
                for (int j = 0; j < 8; j++)
                    dot[j] = (__m256)fma(load(q + d), load(k + (t + j) * size + d), (f8)dot[j]);
            // add up each of the eight vectors
            auto hadd = [](__m256 a, __m256 b) { return _mm256_hadd_ps(a, b); };
            __m256 low = hadd(hadd(dot[0], dot[1]), hadd(dot[2], dot[3]));
            __m256 high = hadd(hadd(dot[4], dot[5]), hadd(dot[6], dot[7]));
            f8 scores = (f8)_mm256_permute2f128_ps(low, high, 0x20)
                        + (f8)_mm256_permute2f128_ps(low, high, 0x31);
            for (int64_t j = count - t; j < 8; j++) scores[j] = -INFINITY;  // later tokens
            store(&p[t], scores / std::sqrt((float)size));
            largest = max(largest, load(&p[t]));
        }
        // softmax
        largest = f8{} + max_of(largest);
        for (int64_t t = 0; t < count; t += 8) {
            f8 e = exp(load(&p[t]) - largest);
            for (int64_t j = count - t; j < 8; j++) e[j] = 0;
            store(&p[t], e), total += e;
        }
        // the mean of the values
        float* out = y + r * C + head * size;
        float sum = sum_of(total);
        int64_t d = 0;
        for (; d + 64 <= size; d += 64)
            weighted_mean<8>(p.data(), v + d, count, size, sum, out + d);
        for (; d < size; d += 8)
            weighted_mean<1>(p.data(), v + d, count, size, sum, out + d);
    });
}

// ---- The step -----------------------------------------------------------------------------------

// Computes the logits (L, vocabulary) of the rows `selected`. x (R, n_embd) holds the embeddings of
// all rows, and is overwritten with the output of the last layer.
extern "C" void forward(const Model& m, int64_t R, const Row* rows, float* x, int64_t L,
                        const int64_t* selected, float* logits, int threads) {
    int64_t C = m.n_embd;
    auto floats = [](int64_t n) { return std::vector<float>(n); };
    Buffers buffers{std::vector<Kind::Input>(R * 4 * C),
                    floats(R), floats(R * C), floats(R * 4 * C), floats(R * C)};
    float *a = buffers.a.data(), *b = buffers.b.data();
    After gelu = m.exact_gelu ? EXACT_GELU : GELU;
    std::vector<Phase> phases(10 * m.n_layer + 3);
    static Team& team = *new Team;  // never deleted: its threads run until the program ends
    team.run(threads, [&] {
        Thread thread{phases.data()};
        for (int64_t i = 0; i < m.n_layer; i++) {
            const Layer& layer = m.layers[i];
            linear(thread, layer.c_attn, &layer.ln_1, x, R, a, STORE, buffers);
            attend(thread, m, i, a, rows, R, b);
            linear(thread, layer.c_proj, nullptr, b, R, x, ADD, buffers);
            linear(thread, layer.c_fc, &layer.ln_2, x, R, a, gelu, buffers);
            linear(thread, layer.mlp_c_proj, nullptr, a, R, x, ADD, buffers);
        }
        thread.share(L, 1, [&](int64_t l) { std::copy_n(x + selected[l] * C, C, b + l * C); });
        linear(thread, m.head, &m.ln_f, b, L, logits, STORE, buffers);
    });
}
