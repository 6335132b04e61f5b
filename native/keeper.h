/* The keeper: one small static process a container.
 *
 * It reads a sealed program (records compiled by sandbox/kernel/program.py), starts the container's
 * first process by it, holds its output as a log, reaps it and writes down how it ended. It takes
 * no commands and has no socket: what it knows it wrote into its status directory.
 *
 *     status directory             flock held while the keeper lives
 *                          pid     who runs, and at which numbers the keeper holds descriptors
 *                          log/N   segments of frames (keeper_log.c), from the first output on
 *                          exit    how it ended: written whole, renamed into place; behind
 *                                  that, before the keeper leaves, what a client refused
 *
 * Three processes take part in a start:
 *
 *     K  the keeper: host root, never enters a namespace of the task
 *     A  K's child: enters the cgroup, the user and the network namespace, clones B, exits
 *     B  A's clone with CLONE_PARENT, so K is its parent: in all namespaces of the container,
 *        executes the records in their order and ends in execve
 *
 * A and B tell K what went wrong by one `struct notice` on a pipe that exec closes.
 */
#ifndef SANDBOX_KEEPER_H
#define SANDBOX_KEEPER_H

#include <stddef.h>
#include <stdint.h>

#define PROGRAM_FD 3
#define STATUS_FD 4
#define REPORT_FD 5
#define NO_FD UINT32_MAX

/* name, number, shape, who runs it.  Shapes: u = u32, U = u64, s = NUL-terminated string,
 * b = u32 length + bytes, l = u32 count + NUL-terminated strings.
 * K = settings of the keeper, A = before and while entering, B = in the container, in order.
 * `keeper --records` prints this table; a test compares it with the compiler's. */
#define RECORDS(X)                                                                                 \
    X(LOG, 1, "uu", K)       /* max segments, what to do when full */                              \
    X(STDIO, 2, "uuuuuu", K) /* flags; a client's stdin, stdout, stderr; owner uid and gid */      \
    X(INIT, 3, "", K)        /* our init becomes pid 1 and the program its child */                \
    X(SYNC, 4, "", K)        /* log and exit outlive a power cut: synced at the end */             \
    X(RELEASE, 5, "u", K) /* a descriptor to be closed when the container runs: it takes long */   \
    X(CGROUP, 10, "u", A) /* v2 directory: the clone starts in it */                               \
    X(TASKS, 11, "u", A)  /* v1 tasks file: the clone writes itself into it */                     \
    X(OOM_SCORE, 12, "u", A) /* oom_score_adj, 0..1000 */                                          \
    X(RLIMIT, 13, "uUU", B)  /* resource, soft, hard: A raises the hard limit first */             \
    X(USERNS, 14, "u", A)    /* enter, and become its uid and gid 0 */                             \
    X(NETNS, 15, "u", A)                                                                           \
    X(PIDNS, 16, "u", A)    /* share this pid namespace instead of a new one */                    \
    X(JOIN, 17, "u", A)     /* pidfd: enter all of its namespaces, make none */                    \
    X(ROOT, 30, "u", B)     /* detached mount: becomes the root at PIVOT */                        \
    X(MOUNT, 31, "ussl", B) /* attributes, type, target, key=value options */                      \
    X(BIND, 32, "uus", B)   /* detached mount, attributes, target directory */                     \
    X(DEVICE, 33, "uus", B) /* major, minor, name in /dev */                                       \
    X(MASK, 34, "s", B)     /* hide a file or directory, if it exists */                           \
    X(READONLY, 35, "s", B) /* make a path read-only, if it exists */                              \
    X(SYMLINK, 36, "ss", B) /* target, path */                                                     \
    X(FILE, 37, "usb", B)   /* mode, path, content */                                              \
    X(SYSCTL, 38, "ss", B)  /* path below /proc/sys, value */                                      \
    X(PIVOT, 39, "u", B)    /* attributes of the root, e.g. read-only */                           \
    X(HOSTNAME, 40, "s", B)                                                                        \
    X(TERMINAL, 41, "uu", B) /* rows, columns: a pty of the container's own devpts */              \
    X(WORKDIR, 42, "s", B)                                                                         \
    X(NO_NEW_PRIVS, 43, "", B)                                                                     \
    X(SECCOMP, 44, "b", B)                                                                         \
    X(CAPABILITIES, 45, "U", B) /* bounding set, and permitted and effective of uid 0 */           \
    X(USER, 46, "uub", B)       /* uid, gid, supplementary groups as u32s */                       \
    X(EXEC, 47, "sll", B)       /* search path, arguments, environment; always the last record */

enum op {
#define X(name, number, shape, stage) OP_##name = number,
    RECORDS(X)
#undef X
};

enum { STDIO_KEEP_STDIN = 1, STDIO_TERMINAL = 2 };
enum { ON_FULL_WAIT = 0, ON_FULL_DROP_NEW = 1, ON_FULL_DROP_OLDEST = 2 };
enum { STREAM_STDOUT = 1, STREAM_STDERR = 2, STREAM_TERMINAL = 3, STREAM_KEEPER = 255 };

/* Some hosts have thousands of processors, and each can have a directory to mask. */
#define MAX_RECORDS 16384
#define MAX_PROGRAM (4u << 20)
#define MAX_LIST 65536
#ifndef START_TIMEOUT_MS /* tests have less patience */
#define START_TIMEOUT_MS 30000
#endif

/* A list of NUL-terminated strings inside the program. */
struct list {
    uint32_t count;
    const char *first;
};

/* One checked record, its fields taken apart in the order of its shape. */
struct record {
    uint16_t op;
    uint8_t numbers, strings, lists;
    uint64_t n[7];
    const char *s[2];
    struct list l[2];
    const uint8_t *bytes;
    uint32_t bytes_length;
};

struct program {
    uint32_t count;
    struct record record[MAX_RECORDS];
};

/* Checks every bound of the program; returns NULL, or what is wrong with it. */
const char *program_read(struct program *program, const uint8_t *data, size_t size);
const struct record *program_find(const struct program *program, enum op op);
const char *op_name(unsigned op);

enum { NOTICE_PID = 1, NOTICE_FAILED = 2 };

/* What A, B and our init tell K. `record` is the index of the record that failed. */
struct notice {
    uint32_t kind;
    uint32_t record;
    int32_t value; /* the pid, or the errno */
};

enum { REPORT_STARTED = 1, REPORT_FAILED = 2, REPORT_ENDED = 3 };

/* What K tells the agent on REPORT_FD; 32 bytes, written at once. */
struct report {
    uint32_t kind;
    uint32_t record; /* FAILED: which record */
    int32_t value;   /* STARTED: pid; FAILED: errno; ENDED: wait status */
    uint32_t reserved;
    uint64_t start_time; /* STARTED: of that pid, in clock ticks since boot */
    uint64_t at_ns;
};

/* The container's end of the descriptors that K made. */
struct child_fds {
    int in, out, err;
    int notice;   /* write end */
    int terminal; /* socket on which B sends the pty's master, or -1 */
    int self;     /* the keeper's own program file, for INIT */
};

/* In a fresh clone: runs A's records and then, in another clone, B's. Never returns. */
_Noreturn void child_run(const struct program *program, const struct child_fds *fds);
int sys_clone3(uint64_t flags, int cgroup_fd, uint64_t exit_signal);

/* Every signal to its default. By the system call: a C library keeps 32 to 34 for itself. */
void default_signals(void);

/* execve of argv[0], looked for in `path` when it has no slash; returns the errno. */
int exec_search(const char *path, char *const argv[], char *const envp[]);

/* pid 1 of a container with INIT: starts `argv`, passes signals on, reaps, ends as it ended. */
_Noreturn void init_run(char **argv, char **envp);

/* The log and the streams of one container. */
struct stream {
    int from;       /* read end of the container's pipe or the pty's master; -1 when done */
    int to;         /* a client's descriptor; -1 when there is none (any more) */
    uint8_t number; /* STREAM_* */
    int logged;     /* what the buffer holds is in the log already */
    int lost;       /* errno with which a client refused output; 0 also when it only went away */
    uint32_t begin, end;
    char *buffer; /* what was read and is not yet logged and passed on to the client */
};

struct log {
    int status;    /* the status directory */
    int directory; /* -1 until the first output */
    int segment;
    uint32_t newest, oldest;
    uint32_t max_segments, on_full;
    uint64_t used; /* bytes in the newest segment */
    uint64_t dropped;
};

#define CHUNK 65536

void log_begin(struct log *log, int status_fd, uint32_t max_segments, uint32_t on_full);
/* False only with ON_FULL_WAIT and no room: keep the data and try again. */
int log_append(struct log *log, uint8_t stream, const char *data, uint32_t length);
/* Nothing more will be appended. */
void log_end(struct log *log);
void log_sync(struct log *log);
uint64_t now_ns(void);

#endif
