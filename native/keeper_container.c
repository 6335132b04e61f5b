/* B: the records of the container, in their order, up to execve. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "keeper_child.h"

#define SEARCH_MAX 4096
#ifndef TIOCGPTPEER
#define TIOCGPTPEER _IO('T', 0x41)
#endif

static int write_sysctl(const struct child *c, const char *name, const char *value) {
    char path[256];
    if (snprintf(path, sizeof path, "proc/sys/%s", name) >= (int)sizeof path)
        return errno = ENAMETOOLONG, -1;
    int fd = open_in_root(c, path, O_WRONLY);
    if (fd < 0)
        return -1;
    ssize_t written = write(fd, value, strlen(value));
    int saved = errno;
    close(fd);
    errno = saved;
    return written == (ssize_t)strlen(value) ? 0 : -1;
}

static int send_descriptor(int socket, int fd) {
    char byte = 0, control[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    return sendmsg(socket, &message, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

/* The pty is one of the container's own devpts; the keeper gets the master. */
static int open_terminal(const struct child *c, unsigned short rows, unsigned short columns) {
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    int unlock = 0;
    int master = open_in_root(c, "dev/pts/ptmx", O_RDWR | O_NOCTTY);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) || ioctl(master, TIOCSWINSZ, &size))
        return -1;
    int peer = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (peer < 0 || send_descriptor(c->fds->terminal, master))
        return -1;
    close(master);
    if (dup2(peer, 0) < 0 || dup2(peer, 1) < 0 || dup2(peer, 2) < 0)
        return -1;
    /* With our init, the terminal belongs to the session of the program, which the init starts. */
    if (!program_find(c->program, OP_INIT) && ioctl(0, TIOCSCTTY, 0))
        return -1;
    return 0;
}

static int set_limit(const struct record *r) {
    struct rlimit limit = {r->n[1], r->n[2]};
    return setrlimit((int)r->n[0], &limit);
}

static int load_filter(const struct record *r) {
    struct sock_fprog program = {(unsigned short)(r->bytes_length / sizeof(struct sock_filter)),
                                 (struct sock_filter *)r->bytes};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

/* The bounding set now; permitted and effective once the ids are set. */
static int bound_capabilities(uint64_t keep) {
    for (unsigned cap = 0; cap < 64; cap++) {
        if (keep >> cap & 1)
            continue;
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) == 0)
            continue;
        if (errno == EINVAL)
            break; /* past the last capability of this kernel */
        return -1;
    }
    return 0;
}

static int set_capabilities(uint64_t set) {
    struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{(uint32_t)set, (uint32_t)set, 0},
                                             {(uint32_t)(set >> 32), (uint32_t)(set >> 32), 0}};
    return (int)syscall(SYS_capset, &head, data);
}

static int become(const struct child *c, const struct record *r) {
    const struct record *capabilities = program_find(c->program, OP_CAPABILITIES);
    uid_t uid = (uid_t)r->n[0];
    gid_t gid = (gid_t)r->n[1];
    if (r->bytes_length % sizeof(gid_t))
        return errno = EINVAL, -1;
    if (setgroups(r->bytes_length / sizeof(gid_t), (const gid_t *)r->bytes))
        return -1;
    if (setresgid(gid, gid, gid) || setresuid(uid, uid, uid) || stay_unreadable())
        return -1;
    return set_capabilities(uid || !capabilities ? 0 : capabilities->n[0]);
}

/* As Docker does: a container's first process has its directory made, a later one must find it. */
static int go_to(const struct child *c, const char *path) {
    char where[PATH_MAX];
    int may_make = !program_find(c->program, OP_JOIN);
    if (chdir(path) && (!may_make || make_directories(c, path) || chdir(path)))
        return -1;
    /* A directory that is not below the root has no absolute name. */
    if (!getcwd(where, sizeof where))
        return -1;
    return *where == '/' ? 0 : (errno = ENOENT, -1);
}

/* As execvp, but with the container's PATH, and a file that is there but may not run is told. */
int exec_search(const char *path, char *const argv[], char *const envp[]) {
    int refused = ENOENT;
    if (!argv[0] || !*argv[0])
        return ENOENT;
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, envp);
        return errno;
    }
    for (const char *end; *path; path = *end ? end + 1 : end) {
        char file[SEARCH_MAX];
        end = strchr(path, ':');
        if (!end)
            end = path + strlen(path);
        int length = (int)(end - path);
        if (snprintf(file, sizeof file, "%.*s/%s", length, length ? path : ".", argv[0]) >=
            (int)sizeof file)
            continue;
        execve(file, argv, envp);
        if (errno != ENOENT && errno != ENOTDIR)
            refused = errno;
        if (refused != ENOENT && refused != EACCES)
            break;
    }
    return refused;
}

static char **strings(const struct list *list, char **into) {
    const char *s = list->first;
    for (uint32_t i = 0; i < list->count; i++, s += strlen(s) + 1)
        *into++ = (char *)s;
    *into++ = NULL;
    return into;
}

static int run_init(const struct child *c, char *path, char **argv, char **envp) {
    char index[16];
    snprintf(index, sizeof index, "%u", c->index);
    argv[-3] = "sandbox-init";
    argv[-2] = path;
    argv[-1] = index;
    /* Both stay open over exec; the init closes the notice pipe when the program runs. The dup2
     * cannot meet the file: its number is kept above 3. */
    int self = fcntl(c->fds->self, F_DUPFD_CLOEXEC, 10);
    if (self < 0 || dup2(c->fds->notice, 3) < 0)
        return errno;
    syscall(SYS_close_range, 4, self - 1, 0);
    syscall(SYS_close_range, self + 1, ~0u, 0);
    syscall(SYS_execveat, self, "", argv - 3, envp, 0x1000 /* AT_EMPTY_PATH */);
    return errno;
}

static int run_program(const struct child *c, const struct record *r) {
    size_t words = (size_t)r->l[0].count + r->l[1].count + 8;
    char **table = calloc(words, sizeof *table);
    if (!table)
        return -1;
    char **argv = table + 3, **envp = strings(&r->l[0], argv);
    strings(&r->l[1], envp);
    if (program_find(c->program, OP_INIT)) {
        errno = run_init(c, (char *)r->s[0], argv, envp);
        return -1;
    }
    /* The last step on every path: only 0, 1 and 2 reach the image's program. */
    if (syscall(SYS_close_range, 3, ~0u, 4 /* CLOSE_RANGE_CLOEXEC */))
        return -1;
    errno = exec_search(r->s[0], argv, envp);
    return -1;
}

static int step(struct child *c, const struct record *r) {
    switch (r->op) {
    case OP_ROOT:
        return root_attach(c, (int)r->n[0]);
    case OP_MOUNT:
        return mount_new(c, r);
    case OP_BIND:
        return mount_bind(c, (int)r->n[0], r->n[1], r->s[0]);
    case OP_DEVICE:
        return mount_device(c, (unsigned)r->n[0], (unsigned)r->n[1], r->s[0]);
    case OP_MASK:
        return mount_mask(c, r->s[0]);
    case OP_READONLY:
        return mount_readonly(c, r->s[0]);
    case OP_SYMLINK:
        return make_symlink(c, r->s[0], r->s[1]);
    case OP_FILE:
        return make_file(c, r);
    case OP_SYSCTL:
        return write_sysctl(c, r->s[0], r->s[1]);
    case OP_PIVOT:
        return root_pivot(c, r->n[0]);
    case OP_HOSTNAME:
        return sethostname(r->s[0], strlen(r->s[0]));
    case OP_TERMINAL:
        return open_terminal(c, (unsigned short)r->n[0], (unsigned short)r->n[1]);
    case OP_RLIMIT:
        return set_limit(r);
    case OP_WORKDIR:
        return go_to(c, r->s[0]);
    case OP_NO_NEW_PRIVS:
        return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    case OP_SECCOMP:
        return load_filter(r);
    case OP_CAPABILITIES:
        return bound_capabilities(r->n[0]);
    case OP_USER:
        return become(c, r);
    case OP_EXEC:
        return run_program(c, r);
    default:
        return 0; /* a record of the keeper's or of A's */
    }
}

void container_step(struct child *c, const struct record *r) {
    if (step(c, r))
        child_fail(c, errno);
}
