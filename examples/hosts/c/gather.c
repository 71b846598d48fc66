/* gather.c: rows of a table by index, an index out of bounds, and a tensor that is read and written in one call. Exit status:
   0 if all is as the header says, 1 if not, 2 without a GPU. */
#include <cuda_runtime_api.h>
#include <ett_kernels.h>

#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 8, COLS = 4, N = 5 };

static void cuda(cudaError_t e, const char* what) {
    if (e == cudaSuccess) return;
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    exit(1);
}

static void launched(int32_t code) {
    ett_status s;
    if (code == ETT_OK) return;
    ett_last_status(&s);
    fprintf(stderr, "%s: argument `%s` is %s, wanted %s\n", s.op, s.arg, s.got, s.want);
    exit(1);
}

/* Device memory with a copy of the host's. */
static void* device(const void* host, size_t bytes) {
    void* p;
    cuda(cudaMalloc(&p, bytes), "cudaMalloc");
    cuda(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    return p;
}

/* Rows of f32 that begin ld elements apart. */
static ett_view rows(float* p, int64_t n, int64_t cols, int64_t ld) {
    ett_view v = {0};
    v.ptr = p;
    v.dtype = ETT_F32;
    v.rank = 2;
    v.dims[0] = n;
    v.dims[1] = cols;
    v.dims[2] = v.dims[3] = 1;
    v.ld = ld;
    return v;
}

int main(void) {
    const int32_t idx[N] = {3, 0, ROWS, -1, 7}; /* ROWS is out of bounds; a negative index means a row of zeros */
    float table[ROWS * COLS], y[N * 2 * COLS] = {0};
    float *table_on, *y_on;
    ett_fault fault = {0}, *fault_on;
    ett_gather_fwd_args gather = {{0}, {0}, {0}};
    ett_cast_args copy = {{0}, {0}};
    ett_launch launch = {0};
    int devices = 0, wrong = 0, i, c;
    cudaError_t found = cudaGetDeviceCount(&devices);

    if (found != cudaSuccess || devices == 0) {
        printf("no GPU (%s): this program needs one of compute capability 8.0 or newer, with its driver\n",
               found == cudaSuccess ? "no device" : cudaGetErrorString(found));
        return 2;
    }
    for (i = 0; i < ROWS * COLS; i++) table[i] = (float)(i + 1);
    table_on = device(table, sizeof table);
    y_on = device(y, sizeof y);
    fault_on = device(&fault, sizeof fault);

    /* y has 2 * COLS columns; the rows go into its left half. */
    gather.table = rows(table_on, ROWS, COLS, COLS);
    gather.idx = rows(device(idx, sizeof idx), 1, N, N);
    gather.idx.dtype = ETT_I32;
    gather.y = rows(y_on, N, COLS, 2 * COLS);
    launch.fault = fault_on;
    launch.number = 42; /* to recognise the launch; a host counts them */
    launched(ett_gather_fwd(&gather, &launch));

    /* The left half to the right one, in one call. That is allowed: slices of different columns share no byte. An output that
       shares a byte with an input is not, unless the header says `may be`; launchers do not check it. */
    copy.x = gather.y;
    copy.y = rows(y_on + COLS, N, COLS, 2 * COLS);
    launch.number++;
    launched(ett_cast(&copy, &launch));

    cuda(cudaMemcpy(y, y_on, sizeof y, cudaMemcpyDeviceToHost), "cudaMemcpy"); /* waits for both kernels */
    cuda(cudaMemcpy(&fault, fault_on, sizeof fault, cudaMemcpyDeviceToHost), "cudaMemcpy");
    for (i = 0; i < N; i++)
        for (c = 0; c < 2 * COLS; c++)
            wrong |= y[i * 2 * COLS + c] != (idx[i] >= 0 && idx[i] < ROWS ? table[idx[i] * COLS + c % COLS] : 0.f);
    printf("gathered rows, beside their copy: %s\n", wrong ? "WRONG" : "ok");
    printf("launch %d: index %ld at %ld, wanted below %ld\n", (int)fault.launch, (long)fault.value, (long)fault.where, (long)fault.limit);
    if (fault.kind != ETT_FAULT_INDEX || fault.launch != 42 || fault.where != 2 || fault.value != ROWS || fault.limit != ROWS) {
        puts("WRONG: this is not the fault of index 2");
        wrong = 1;
    }
    return wrong;
}
