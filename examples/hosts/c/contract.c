/* contract.c: what a call promises before any GPU takes part: versions, workspace queries, and errors as sentences. Runs
   without a GPU. Exit status: 0 if the library answers as its header says, else 1. */
#include <ett_kernels.h>

#include <stdio.h>
#include <string.h>

static int wrong = 0;

/* The launcher returned `code`; of a failure, prints the sentence, which is about `arg`. */
static void expect(const char* what, int32_t code, int32_t want, const char* arg) {
    ett_status s;
    int ok = code == want;
    printf("%s: %s\n", what, ett_status_name(code));
    if (want != ETT_OK) {
        ett_last_status(&s);
        ok = ok && s.code == want && strcmp(s.arg, arg) == 0;
        printf("    %s: argument `%s` is %s, wanted %s\n", s.op, s.arg, s.got, s.want);
    }
    if (!ok) {
        printf("    WRONG: wanted `%s` and the argument `%s`\n", ett_status_name(want), arg);
        wrong = 1;
    }
}

/* A vector of n elements, without memory: nothing below reaches a launch. Members that are not named are zero. */
static ett_view vector(int32_t dtype, int64_t n) {
    ett_view v = {ETT_PLACEHOLDER, 0, 1, {1, 1, 1, 1}, 0};
    v.dtype = dtype;
    v.dims[0] = v.ld = n;
    return v;
}

static ett_view image(int64_t b, int64_t h, int64_t w, int64_t c) {
    ett_view v = vector(ETT_F32, c);
    v.rank = 4;
    v.dims[0] = b, v.dims[1] = h, v.dims[2] = w, v.dims[3] = c;
    return v;
}

int main(void) {
    const int64_t n = 1000000;
    ett_sum_squares_args args = {{0}, {0}};
    ett_group_norm_fwd_args channels = {{0}, {0}, {0}, {0}, {0}, {0}, 1e-5, 0};
    ett_launch launch = {0};
    int64_t bytes;
    ett_status first, second;

    printf("version %s for `%s`, interface %d; header: version %s, interface %d\n", ett_version(), ett_targets(), (int)ett_abi_version(),
           ETT_VERSION, ETT_ABI_VERSION);
    printf("implementations of sum_squares: %s\n", ett_implementations("sum_squares"));
    if (ett_abi_version() != ETT_ABI_VERSION) return 1; /* structs may differ */

    /* A view whose address is null is absent. */
    expect("an absent tensor", ett_sum_squares(&args, &launch), ETT_BAD_ARGUMENT, "x");
    expect("no arguments", ett_sum_squares(NULL, &launch), ETT_BAD_ARGUMENT, "args");
    expect("no launch", ett_sum_squares(&args, NULL), ETT_BAD_ARGUMENT, "launch");

    args.x = vector(ETT_F32, n);
    args.out = vector(ETT_F32, 3);
    expect("a wrong shape", ett_sum_squares(&args, &launch), ETT_BAD_ARGUMENT, "out");
    args.out = vector(ETT_BF16, 2);
    expect("a wrong type", ett_sum_squares(&args, &launch), ETT_BAD_ARGUMENT, "out");
    args.out = vector(ETT_F32, 2);
    args.x.dtype = ETT_F64;
    expect("within the contract, but not implemented on a GPU", ett_sum_squares(&args, &launch), ETT_UNSUPPORTED, "x");
    args.x.dtype = ETT_F32;

    /* The query answers for the arguments as they are, and -1 where the launcher would refuse them. It does not read
       the memory, which may not exist yet. */
    bytes = ett_sum_squares_workspace(&args);
    printf("workspace of %ld elements: %ld bytes\n", (long)n, (long)bytes);
    if (bytes <= 0) wrong = 1;
    args.out.ptr = NULL;
    if (ett_sum_squares_workspace(&args) != -1) wrong = 1;
    args.out.ptr = ETT_PLACEHOLDER;

    expect("no workspace", ett_sum_squares(&args, &launch), ETT_BAD_ARGUMENT, "launch.workspace");
    launch.workspace = ETT_PLACEHOLDER;
    launch.workspace_bytes = bytes - 1;
    expect("a workspace that is too small", ett_sum_squares(&args, &launch), ETT_BAD_ARGUMENT, "launch.workspace");
    launch.workspace_bytes = bytes;
    launch.force = "fast";
    expect("an implementation that does not exist", ett_sum_squares(&args, &launch), ETT_BAD_ARGUMENT, "launch.force");
    launch.force = NULL;

    /* An empty problem is not an error, launches nothing, and leaves the last error in place. */
    ett_last_status(&first);
    args.x = vector(ETT_F32, 0);
    expect("no elements", ett_sum_squares(&args, &launch), ETT_OK, "");
    ett_last_status(&second);
    if (*ett_last_kernel() || memcmp(&first, &second, sizeof first) != 0) wrong = 1;

    /* Nor is a tensor without channels, which has no statistics. */
    channels.x = channels.y = image(1, 2, 2, 0);
    channels.w = channels.b = vector(ETT_F32, 0);
    channels.mean = channels.rstd = image(1, 1, 1, 2);
    channels.mean.rank = channels.rstd.rank = 2;
    channels.mean.dims[1] = channels.rstd.dims[1] = 2;
    channels.mean.dims[3] = channels.rstd.dims[3] = 1;
    launch.workspace_bytes = ett_group_norm_fwd_workspace(&channels);
    expect("no channels", ett_group_norm_fwd(&channels, &launch), ETT_OK, "");

    puts(wrong ? "the library does not keep its contract" : "the library keeps its contract");
    return wrong;
}
