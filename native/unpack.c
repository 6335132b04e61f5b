/* unpack: the jail around the reading of one layer, and its report.
 *
 *     unpack ID_BASE STREAM_BYTES ENTRIES FILE_BYTES
 *         fd 0   the uncompressed tar stream
 *         fd 3   an empty directory that receives the layer
 *         fd 4   the report: records of one letter and bytes, each ended by a NUL
 *                    W path          a whiteout of path
 *                    O path          directory path hides what lower layers have in it
 *                    D path          a device node that was skipped
 *                    K entries bytes the last record: all is well, and on disk
 *                    E text          the last record: the layer is refused
 *
 * Two processes. The outer one is host root, reads nothing of the stream and waits. The inner one
 * is id 0 of a user namespace whose ids are ID_BASE.. on the host, in empty mount, network, pid,
 * ipc and uts namespaces. Its root is an idmapped mount of fd 3, so the ids that it writes are on
 * disk what the archive says while it is nobody on the host. It keeps five capabilities in its own
 * namespace and some twenty system calls, and dies with the outer one.
 *
 * The inner one could be taken over and then write any layer it likes; whoever reads the report
 * must not trust it more than the archive.
 */
#define _GNU_SOURCE
#include "unpack.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LAYER_FD = 3, REPORT_FD = 4, FIRST_FREE_FD = 5 };

#define NAMESPACES                                                                                 \
    (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS)

/* CHOWN for owners; FSETID, SETFCAP for set-id bits and capabilities of files; DAC_OVERRIDE and
 * FOWNER because directories and files may already belong to somebody else or have mode 0. */
static const unsigned kept_capabilities[] = {CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID,
                                             CAP_SETFCAP};

static const int allowed_calls[] = {
    SYS_read,      SYS_write,      SYS_pwrite64, SYS_close,     SYS_openat,    SYS_openat2,
    SYS_fstat,     SYS_newfstatat, SYS_mkdirat,  SYS_symlinkat, SYS_linkat,    SYS_unlinkat,
    SYS_fchown,    SYS_fchownat,   SYS_fchmod,   SYS_fchmodat,  SYS_utimensat, SYS_fsetxattr,
    SYS_ftruncate, SYS_getdents64, SYS_syncfs,   SYS_exit,      SYS_exit_group};

#if defined(__x86_64__)
#define OWN_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define OWN_ARCH AUDIT_ARCH_AARCH64
#else
#error "the seccomp filter does not know this machine"
#endif

struct settings {
    uint64_t id_base, stream_bytes, entries, file_bytes;
};

static void write_report(const char *bytes, size_t length) {
    while (length) {
        ssize_t wrote = write(REPORT_FD, bytes, length);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            _exit(2); /* nobody listens */
        bytes += wrote;
        length -= (size_t)wrote;
    }
}

void report(char kind, const char *text) {
    char record[PATH_BYTES + 512];
    size_t length = strnlen(text, sizeof record - 2);
    record[0] = kind;
    memcpy(record + 1, text, length);
    record[1 + length] = 0;
    write_report(record, length + 2);
}

_Noreturn void refuse(const char *path, const char *format, ...) {
    char text[PATH_BYTES + 256];
    int length = path && *path ? snprintf(text, sizeof text, "%s: ", path) : 0;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + length, sizeof text - (size_t)length, format, arguments);
    va_end(arguments);
    report('E', text);
    _exit(1);
}

static _Noreturn void refuse_call(const char *call) {
    refuse(NULL, "the unpacker cannot be confined: %s: %s", call, strerror(errno));
}

static uint64_t argument(const char *text) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno || end == text || *end || *text == '-')
        refuse(NULL, "not a number: %s", text);
    return value;
}

static struct settings read_arguments(int count, char **texts) {
    if (count != 5)
        refuse(NULL, "usage: unpack ID_BASE STREAM_BYTES ENTRIES FILE_BYTES");
    struct settings settings = {argument(texts[1]), argument(texts[2]), argument(texts[3]),
                                argument(texts[4])};
    if (settings.id_base < IDS || settings.id_base > UINT32_MAX - IDS)
        refuse(NULL, "ids %s.. are the host's own", texts[1]);
    if (settings.stream_bytes > INT64_MAX || settings.file_bytes > INT64_MAX)
        refuse(NULL, "a limit is out of range");
    return settings;
}

static void write_map(pid_t pid, const char *name, uint64_t id_base) {
    char path[64], map[64];
    snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
    int length = snprintf(map, sizeof map, "0 %llu %d", (unsigned long long)id_base, IDS);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, map, (size_t)length) != length)
        refuse_call(name);
    close(fd);
}

static void idmap(int tree, pid_t pid) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/user", pid);
    int userns = open(path, O_RDONLY | O_CLOEXEC);
    if (userns < 0)
        refuse_call(path);
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_IDMAP | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV |
                                          MOUNT_ATTR_NOEXEC,
                              .propagation = MS_PRIVATE,
                              .userns_fd = (uint64_t)userns};
    if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attr, sizeof attr)) {
        if (errno == EINVAL)
            refuse(NULL, "the file system of the layer store has no idmapped mounts");
        refuse_call("mount_setattr");
    }
    close(userns);
}

/* Does nothing until its ids are mapped, then becomes id 0. Ends if the outer process is gone: a
 * parent that died before PDEATHSIG was set shows as a hang-up of the pipe. */
static void become_root(int from_outer) {
    char go;
    if (read(from_outer, &go, 1) != 1)
        _exit(2);
    if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setresgid, 0, 0, 0) ||
        syscall(SYS_setresuid, 0, 0, 0))
        refuse_call("setresuid");
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) || prctl(PR_SET_DUMPABLE, 0))
        refuse_call("prctl");
    struct pollfd outer = {.fd = from_outer};
    if (poll(&outer, 1, 0) < 0 || outer.revents & POLLHUP)
        _exit(2);
}

/* The old root goes wholly: what is left to see is the layer. */
static int enter_layer(int tree) {
    if (syscall(SYS_move_mount, tree, "", AT_FDCWD, "/", MOVE_MOUNT_F_EMPTY_PATH))
        refuse_call("move_mount");
    if (fchdir(tree) || syscall(SYS_pivot_root, ".", ".") || umount2(".", MNT_DETACH) || chdir("/"))
        refuse_call("pivot_root");
    int root = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        refuse_call("open");
    if (syscall(SYS_close_range, FIRST_FREE_FD, root - 1, 0) && root > FIRST_FREE_FD)
        refuse_call("close_range");
    if (syscall(SYS_close_range, root + 1, ~0U, 0))
        refuse_call("close_range");
    return root;
}

static void limit(int resource, rlim_t value) {
    struct rlimit now;
    if (getrlimit(resource, &now))
        refuse_call("getrlimit");
    if (now.rlim_max < value)
        value = now.rlim_max;
    if (setrlimit(resource, &(struct rlimit){value, value}))
        refuse_call("setrlimit");
}

static void limit_resources(const struct settings *settings) {
    limit(RLIMIT_FSIZE, settings->file_bytes);
    limit(RLIMIT_NOFILE, PATH_BYTES / 2 + 64); /* one a level while a tree is removed */
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_MEMLOCK, 0);
    limit(RLIMIT_AS, 64 << 20);
    signal(SIGXFSZ, SIG_IGN); /* EFBIG names the entry */
    umask(0);
}

static void drop_capabilities(void) {
    uint64_t kept = 0;
    for (size_t i = 0; i < sizeof kept_capabilities / sizeof *kept_capabilities; i++)
        kept |= 1ULL << kept_capabilities[i];
    for (unsigned capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
        if (!(kept >> capability & 1) && prctl(PR_CAPBSET_DROP, capability))
            refuse_call("prctl");
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {0};
    for (int half = 0; half < 2; half++)
        data[half].effective = data[half].permitted = (uint32_t)(kept >> 32 * half);
    if (syscall(SYS_capset, &header, data) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        refuse_call("capset");
}

/* mknodat only for FIFOs: a 0:0 character node needs no capability, and hides lower files. */
static void filter_calls(void) {
    enum { CALLS = sizeof allowed_calls / sizeof *allowed_calls };
    struct sock_filter code[CALLS + 10];
    size_t at = 0;
#define EMIT(...) code[at++] = (struct sock_filter)__VA_ARGS__
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no)
    EMIT(LOAD(arch));
    EMIT(EQUAL(OWN_ARCH, 1, 0));
    EMIT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS));
    EMIT(LOAD(nr));
    for (size_t i = 0; i < CALLS; i++)
        EMIT(EQUAL((unsigned)allowed_calls[i], (unsigned char)(CALLS - i + 4), 0));
    EMIT(EQUAL(SYS_mknodat, 0, 3));
    EMIT(LOAD(args[2]));
    EMIT(BPF_STMT(BPF_ALU | BPF_AND | BPF_K, S_IFMT));
    EMIT(EQUAL(S_IFIFO, 1, 0));
    EMIT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS));
    EMIT(BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW));
    struct sock_fprog program = {.len = (unsigned short)at, .filter = code};
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        refuse_call("seccomp");
}

static void unpack(const struct settings *settings, int root) {
    static struct tar tar;
    static struct tree tree;
    tar.limit = settings->stream_bytes;
    tree_open(&tree, root, settings->file_bytes, settings->entries);
    while (tar_next(&tar))
        tree_add(&tree, &tar);
    tree_close(&tree);
    if (syncfs(root))
        refuse(NULL, "syncfs: %s", strerror(errno));
    char text[64];
    snprintf(text, sizeof text, "%llu %llu", (unsigned long long)tree.entries,
             (unsigned long long)tree.bytes);
    report('K', text);
}

static _Noreturn void inner(const struct settings *settings, int tree, int from_outer) {
    become_root(from_outer);
    int root = enter_layer(tree);
    limit_resources(settings);
    drop_capabilities();
    filter_calls();
    unpack(settings, root);
    _exit(0);
}

static int wait_for(pid_t pid) {
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            refuse_call("waitpid");
    if (WIFSIGNALED(status))
        refuse(NULL, "the unpacker was ended by signal %d", WTERMSIG(status));
    return WEXITSTATUS(status);
}

int main(int count, char **texts) {
    struct settings settings = read_arguments(count, texts);
    int gate[2];
    signal(SIGPIPE, SIG_DFL);
    if (pipe2(gate, O_CLOEXEC))
        refuse_call("pipe2");
    int tree = (int)syscall(SYS_open_tree, LAYER_FD, "",
                            OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
    if (tree < 0)
        refuse_call("open_tree");
    pid_t pid = (pid_t)syscall(SYS_clone, NAMESPACES | SIGCHLD, NULL, NULL, NULL, NULL);
    if (pid < 0)
        refuse_call("clone");
    if (!pid) {
        close(gate[1]);
        inner(&settings, tree, gate[0]);
    }
    close(gate[0]);
    close(STDIN_FILENO); /* or a writer would not learn that the inner one is gone */
    write_map(pid, "uid_map", settings.id_base);
    write_map(pid, "gid_map", settings.id_base);
    idmap(tree, pid);
    if (write(gate[1], "", 1) != 1)
        refuse_call("write");
    return wait_for(pid);
}
