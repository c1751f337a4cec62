/* many.cu: many rows of activations times a matrix of bf16 rows, on the tensor cores: frames that are
 * given, and more callers than tensor.h reads the weights once for.
 *
 * A block makes a tile of outputs for 128 rows. Weights and arranged rows (tensor.h) come a chunk of
 * 64 columns at a time, by copies that run ahead of the products: two or three chunks lie in shared
 * memory. A warp makes 16 or 32 pairs of outputs for 32 rows.
 *
 * A row has the bits that tensor.h gives it, where 8 warps take the chunks in turn and their sums are
 * added in the order of the warps: here a block goes through the chunks of the first of those warps,
 * then through those of the second, and adds up after each one's last. So who is in how much company
 * changes no bit, a prompt read at once has the bits of stepping it, and which kernel is used, or how
 * large a tile, may depend on the number of rows and on the card.
 *
 * On compute capability 9.0 warpgroups can do the same, if MOSHI_C_WARPGROUPS=1: wgmma takes the weights
 * from registers, in the words that mma.sync gets, and the rows from shared memory, where they are
 * arranged so that the same 16 columns meet. Whether a card's wgmma gives the bits of its mma.sync,
 * tests/c/test_kernels.c says there; until one has, they are not used unasked.
 *
 * The block formats stay with tensor.h, whose tiles of 32 outputs and 64 rows meet twice as many
 * numbers for each byte and need their weights in one part alone; f32 and f16 rows with product.cu.
 *
 * What it costs, for R rows and a matrix of P numbers: 4 R P operations, as the rows have two parts; in
 * tiles of 128 x 128 P (2 R / 128 + 4 R / 128) bytes from the second cache. An H200 does some 790
 * TFLOP/s by wgmma, and by mma.sync perhaps 60 % of that; its second cache gives 5.5 to 8 TB/s. 500
 * frames of the 7B are 13 TFLOP: 17 ms by wgmma, 28 ms by mma.sync; and 158 GB, 20 to 29 ms. Expected:
 * 32 to 45 ms by mma.sync, 24 to 32 ms by wgmma. Bound: the tensor cores; with wgmma the second cache,
 * until blocks of a cluster share what they read of the rows. */
#include "product.h"

#define TILE_ROWS 128
#define ROW_TILES 4 /* of a warp: 8 rows each */
#define ROW_WARPS 4 /* side by side, and OUTPUT_WARPS of them */
#define OUTPUT_WARPS 2
#define MOST_STAGES 3 /* chunks in shared memory */
#define WEIGHT_BYTES (ARRANGED_CHUNK * 2) /* of a row of a chunk */
#define X_BYTES (ARRANGED_CHUNK * 4)
#define PIECE 16 /* bytes of a copy */

/* A chunk in shared memory, for M times 16 outputs a warp: rows of weights, then rows of activations. A
 * row's pieces of 16 bytes are in an order that depends on whether it is odd, so that the lanes that
 * read at once, of two rows, ask no bank twice. */
template <int M> struct stage {
    static const int PAIRS = OUTPUT_WARPS * M * 8;
    static const int X = 2 * PAIRS * WEIGHT_BYTES;
    static const int X_ROW = X_BYTES;
    static const int BYTES = X + TILE_ROWS * X_BYTES;

    __device__ static __forceinline__ int weight_at(int row, int piece)
    {
        return row * WEIGHT_BYTES + (piece ^ row % 2 * 4) * PIECE;
    }

    __device__ static __forceinline__ int x_at(int row, int piece)
    {
        return X + row * X_ROW + (piece ^ row % 2) * PIECE;
    }
};

/* The same for warpgroups: of the activations all nearest numbers, then all that is left, in rows of 128
 * bytes whose pieces are in the order that wgmma calls a swizzle of 128 bytes. */
struct group_stage : stage<4> {
    static const int X_ROW = X_BYTES / 2;
    static const int PART = TILE_ROWS * X_ROW;

    __device__ static __forceinline__ int x_at(int row, int piece)
    {
        return X + piece / 8 * PART + row * X_ROW + (piece % 8 ^ row % 8) * PIECE;
    }
};

/* The chunk after this one: a warp's of tensor.h, then the next warp's. */
__device__ static __forceinline__ int next_chunk(int chunk, int chunks)
{
    return chunk + WARPS < chunks ? chunk + WARPS : chunk % WARPS + 1;
}

/* What a thread copies of every chunk: one piece of each of some rows. */
template <class S> struct copier {
    static const int WEIGHT_STEP = THREADS * PIECE / WEIGHT_BYTES,
                     X_STEP = THREADS * PIECE / X_BYTES;
    static const int WEIGHTS = 2 * S::PAIRS / WEIGHT_STEP, XS = TILE_ROWS / X_STEP;
    const uint16_t *weights[WEIGHTS];
    const unsigned char *x;
    long x_step;
    int columns, column, weight_to, x_to;

    /* Row r of a tile of 16 is the first one of a pair, row r + 8 its second one. */
    template <class E>
    __device__ copier(const struct product<E> &p, int pair, int row, long row_bytes)
    {
        const int thread = (int)threadIdx.x;
        const int piece = thread % (WEIGHT_BYTES / PIECE), x_piece = thread % (X_BYTES / PIECE);
        const int line = thread / (WEIGHT_BYTES / PIECE), x_line = thread / (X_BYTES / PIECE);

#pragma unroll
        for (int i = 0; i < WEIGHTS; i++) {
            int r = line + i * WEIGHT_STEP, of = pair + r / 16 * 8 + r % 8;

            if (of >= p.pairs) of = p.pairs - 1; /* its sums are not stored */
            weights[i] = (const uint16_t *)p.matrix() +
                         (long)(r % 16 < 8 ? p.first_of(of) : p.second_of(of)) * p.columns;
        }
        x = p.arranged + (row + x_line) * row_bytes + x_piece * PIECE;
        x_step = X_STEP * row_bytes;
        columns = p.columns;
        column = piece * 8;
        weight_to = S::weight_at(line, piece);
        x_to = S::x_at(x_line, x_piece);
    }

    __device__ __forceinline__ void begin(int chunk, unsigned char *to) const
    {
        const int at = chunk * ARRANGED_CHUNK + column, there = at < columns;

#pragma unroll
        for (int i = 0; i < WEIGHTS; i++)
            copy_piece(to + weight_to + i * WEIGHT_STEP * WEIGHT_BYTES,
                       weights[i] + (there ? at : 0), there);
#pragma unroll
        for (int i = 0; i < XS; i++)
            copy_piece(to + x_to + i * X_STEP * S::X_ROW, x + i * x_step + (long)chunk * X_BYTES,
                       1);
    }
};

/* A warp's part of a chunk; the rows from `tiles` on are not there. */
template <int M>
__device__ static __forceinline__ void multiply(const unsigned char *from, int weight_row,
                                                int x_row, int tiles,
                                                float (&sums)[ROW_TILES][M][4])
{
    const int g = (int)threadIdx.x % WARP / 4, t = (int)threadIdx.x % 4;

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int piece = half * 4 + t;
        uint4 a[M], b[M];

#pragma unroll
        for (int m = 0; m < M; m++) {
            const int row = weight_row + m * 16 + g;

            a[m] = *(const uint4 *)(const void *)(from + stage<M>::weight_at(row, piece));
            b[m] = *(const uint4 *)(const void *)(from + stage<M>::weight_at(row + 8, piece));
        }
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            if (n >= tiles) break;
            const int row = x_row + n * 8 + g;
            uint4 high = *(const uint4 *)(const void *)(from + stage<M>::x_at(row, 2 * piece));
            uint4 low = *(const uint4 *)(const void *)(from + stage<M>::x_at(row, 2 * piece + 1));

#pragma unroll
            for (int part = 0; part < 4; part++) {
                const uint4 x = part % 2 ? high : low;

#pragma unroll
                for (int m = 0; m < M; m++) {
                    const unsigned first[4] = {a[m].x, b[m].x, a[m].y, b[m].y};
                    const unsigned second[4] = {a[m].z, b[m].z, a[m].w, b[m].w};

                    if (part < 2)
                        multiply_bf16(sums[n][m], first, x.x, x.y);
                    else
                        multiply_bf16(sums[n][m], second, x.z, x.w);
                }
            }
        }
    }
}

template <int M>
__device__ static __forceinline__ void add_up(float (&sums)[ROW_TILES][M][4],
                                              float (&totals)[ROW_TILES][M][4])
{
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                totals[n][m][i] += sums[n][m][i];
                sums[n][m][i] = 0;
            }
}

/* Grid: tiles of rows, so that those that read the same weights run together; of outputs; matrices. */
template <int M, class E>
__global__ static void __launch_bounds__(THREADS, 1)
    k_many(const __grid_constant__ struct product<E> p)
{
    after_earlier_kernels();
    SHARED_BYTES(shared);
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, last = p.rows - 1;
    const int chunks = ceil_div(p.columns, ARRANGED_CHUNK);
    const int first_row = (int)blockIdx.x * TILE_ROWS,
              first_pair = (int)blockIdx.y * stage<M>::PAIRS;
    const int weight_row = warp % OUTPUT_WARPS * M * 16,
              x_row = warp / OUTPUT_WARPS * ROW_TILES * 8;
    const int tiles = ceil_div(last + 1 - first_row - x_row, 8);
    const struct copier<struct stage<M>> copies(p, first_pair, first_row, (long)chunks * X_BYTES);
    float sums[ROW_TILES][M][4] = {}, totals[ROW_TILES][M][4] = {};
    int coming = 0, begun = 0;

    for (; begun < p.stages - 1; begun++) {
        if (begun < chunks) copies.begin(coming, shared + begun * stage<M>::BYTES);
        copies_end();
        coming = next_chunk(coming, chunks);
    }
    for (int i = 0, chunk = 0; i < chunks; i++, begun++) {
        if (p.stages == 2)
            copies_wait<0>();
        else
            copies_wait<MOST_STAGES - 2>();
        __syncthreads(); /* this chunk is there, and the one before it is no longer read */
        if (begun < chunks) copies.begin(coming, shared + begun % p.stages * stage<M>::BYTES);
        copies_end();
        coming = next_chunk(coming, chunks);
        multiply<M>(shared + i % p.stages * stage<M>::BYTES, weight_row, x_row, tiles, sums);
        if (chunk + WARPS >= chunks) add_up<M>(sums, totals);
        chunk = next_chunk(chunk, chunks);
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int m = 0; m < M; m++) {
            const int row = first_row + x_row + n * 8 + lane % 4 * 2;
            const int pair = first_pair + weight_row / 2 + m * 8 + lane / 4;

            if (pair >= p.pairs) continue;
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (row + i <= last)
                    p.end.store(row + i, pair, p.outputs, totals[n][m][i], totals[n][m][2 + i]);
        }
}

/* ---- warpgroups ------------------------------------------------------------------------- */

/* What wgmma is told of TILE_ROWS rows in shared memory: where they begin, how far it is from eight of
 * them to the next eight, and their swizzle. The offset from column to column is not used then. */
__device__ static __forceinline__ uint64_t describe_rows(const unsigned char *rows)
{
    const uint64_t start = shared_address(rows) / 16, eight = 8 * group_stage::X_ROW / 16;
    const uint64_t swizzle_128 = 1;

    return start | (uint64_t)1 << 16 | eight << 32 | swizzle_128 << 62;
}

/* A warpgroup's part of a chunk: of 64 rows of weights, which its warps read, and all activations. */
__device__ static __forceinline__ void multiply_chunk(const unsigned char *from, int weight_row,
                                                      float (&sums)[TILE_ROWS / 2])
{
    const int g = (int)threadIdx.x % WARP / 4, t = (int)threadIdx.x % 4;
    unsigned words[4][4];

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = weight_row + g, piece = half * 4 + t;
        uint4 a = *(const uint4 *)(const void *)(from + group_stage::weight_at(row, piece));
        uint4 b = *(const uint4 *)(const void *)(from + group_stage::weight_at(row + 8, piece));
        const unsigned w[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};

#pragma unroll
        for (int i = 0; i < 8; i++) words[2 * half + i / 4][i % 4] = w[i / 4][i % 4];
    }
    group_begin();
#pragma unroll
    for (int step = 0; step < 4; step++) { /* of 16 columns; 32 bytes of a row */
        const unsigned char *rows = from + group_stage::X + step * 32;

        group_multiply(sums, words[step], describe_rows(rows + group_stage::PART));
        group_multiply(sums, words[step], describe_rows(rows));
    }
    group_wait();
}

/* As k_many<4>, by wgmma: a warpgroup makes 32 pairs of outputs for all rows of the tile. */
template <class E>
__global__ static void __launch_bounds__(THREADS, 1)
    k_many_groups(const __grid_constant__ struct product<E> p)
{
    after_earlier_kernels();
    GROUP_SHARED_BYTES(tiles);
    const int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, last = p.rows - 1;
    const int chunks = ceil_div(p.columns, ARRANGED_CHUNK), weight_row = warp * 16;
    const int first_row = (int)blockIdx.x * TILE_ROWS;
    const int first_pair = (int)blockIdx.y * group_stage::PAIRS;
    const struct copier<struct group_stage> copies(p, first_pair, first_row,
                                                   (long)chunks * X_BYTES);
    float sums[TILE_ROWS / 2] = {}, totals[TILE_ROWS / 2] = {};
    int coming = 0, begun = 0;

    for (; begun < MOST_STAGES - 1; begun++) {
        if (begun < chunks) copies.begin(coming, tiles + begun * group_stage::BYTES);
        copies_end();
        coming = next_chunk(coming, chunks);
    }
    for (int i = 0, chunk = 0; i < chunks; i++, begun++) {
        copies_wait<MOST_STAGES - 2>();
        copies_show();
        __syncthreads(); /* this chunk is there, and the one before it is no longer read */
        if (begun < chunks) copies.begin(coming, tiles + begun % MOST_STAGES * group_stage::BYTES);
        copies_end();
        coming = next_chunk(coming, chunks);
        multiply_chunk(tiles + i % MOST_STAGES * group_stage::BYTES, weight_row, sums);
        if (chunk + WARPS >= chunks)
#pragma unroll
            for (int j = 0; j < TILE_ROWS / 2; j++) {
                totals[j] += sums[j];
                sums[j] = 0;
            }
        chunk = next_chunk(chunk, chunks);
    }
#pragma unroll
    for (int n = 0; n < TILE_ROWS / 8; n++) {
        const int row = first_row + n * 8 + lane % 4 * 2;
        const int pair = first_pair + weight_row / 2 + lane / 4;

        if (pair >= p.pairs) continue;
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (row + i <= last)
                p.end.store(row + i, pair, p.outputs, totals[n * 4 + i], totals[n * 4 + 2 + i]);
    }
}

/* ---- the host's side -------------------------------------------------------------------- */

template <int M, class E>
static void launch_many(struct cuda_backend *cuda, struct product<E> &p, int room)
{
    p.stages = room < MOST_STAGES ? room : MOST_STAGES;
    launch(cuda, k_many<M, E>,
           dim3((unsigned)ceil_div(p.rows, TILE_ROWS), (unsigned)ceil_div(p.pairs, stage<M>::PAIRS),
                (unsigned)p.matrices),
           THREADS, (size_t)p.stages * stage<M>::BYTES, p);
}

template <class E> static void launch_groups(struct cuda_backend *cuda, struct product<E> &p)
{
    launch(cuda, k_many_groups<E>,
           dim3((unsigned)ceil_div(p.rows, TILE_ROWS),
                (unsigned)ceil_div(p.pairs, group_stage::PAIRS), (unsigned)p.matrices),
           THREADS, MOST_STAGES * group_stage::BYTES, p);
}

/* How long the blocks take, one on each processor at a time, in units of M. */
template <int M>
static int time_of(const struct cuda_backend *cuda, int rows, int pairs, int matrices)
{
    int blocks = ceil_div(rows, TILE_ROWS) * ceil_div(pairs, stage<M>::PAIRS) * matrices;

    return M * ceil_div(blocks, cuda->processors);
}

static bool better_small(const struct cuda_backend *cuda, int rows, int pairs, int matrices)
{
    return time_of<2>(cuda, rows, pairs, matrices) < time_of<4>(cuda, rows, pairs, matrices);
}

bool many_product_fits(const struct cuda_backend *cuda)
{
    return cuda->shared_limit >= 2 * stage<4>::BYTES;
}

template <class E> static void choose_tile(struct cuda_backend *cuda, struct product<E> &p)
{
    if (cuda->groups)
        launch_groups(cuda, p);
    else if (better_small(cuda, p.rows, p.pairs, p.matrices))
        launch_many<2>(cuda, p, (int)cuda->shared_limit / stage<2>::BYTES);
    else
        launch_many<4>(cuda, p, (int)cuda->shared_limit / stage<4>::BYTES);
}

void many_product(struct cuda_backend *cuda, struct product<struct row_end> &p)
{
    choose_tile(cuda, p);
}

void many_product(struct cuda_backend *cuda, struct product<struct gate_end> &p)
{
    choose_tile(cuda, p);
}

void many_product(struct cuda_backend *cuda, struct product<struct qkv_end> &p)
{
    choose_tile(cuda, p);
}
