/* What a process of the task is: identity, rights, limits, signals, session; and the JSON writer.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timex.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int comma;

static void put_string(const char *s) {
    putchar('"');
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\')
            printf("\\%c", c);
        else if (c < 32 || c > 126) /* bytes, not characters: Latin-1 keeps each of them */
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

static void put_key(const char *key) {
    if (comma)
        putchar(',');
    comma = 1;
    if (!key)
        return;
    put_string(key);
    putchar(':');
}

void json_open(const char *key, char bracket) {
    put_key(key);
    putchar(bracket);
    comma = 0;
}

void json_close(char bracket) {
    putchar(bracket);
    comma = 1;
}

void json_number(const char *key, long long value) {
    put_key(key);
    printf("%lld", value);
}

void json_string(const char *key, const char *value) {
    put_key(key);
    if (value)
        put_string(value);
    else
        printf("null");
}

/* NULL if it cannot be read. Files of proc have no size; what is longer than the buffer is cut. */
static char *file_text(const char *path) {
    static char text[1 << 18]; /* a report of ours is the longest */
    size_t used = 0;
    ssize_t n;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    while ((n = read(fd, text + used, sizeof text - 1 - used)) > 0)
        used += (size_t)n;
    close(fd);
    text[used] = 0;
    return text;
}

void json_text(const char *key, const char *path) {
    char *text = file_text(path);
    size_t length = text ? strlen(text) : 0;
    if (length && text[length - 1] == '\n')
        text[length - 1] = 0;
    json_string(key, text);
}

int outcome(long result) {
    return result < 0 && result > -4096 ? (int)-result : 0;
}

static int is_of_rights(const char *name) {
    static const char *const names[] = {
        "Uid",    "Gid",    "Groups",          "TracerPid", "CapInh",    "CapPrm",
        "CapEff", "CapBnd", "CapAmb",          "SigPnd",    "ShdPnd",    "SigBlk",
        "SigIgn", "SigCgt", "Seccomp_filters", "Seccomp",   "NoNewPrivs"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i]))
            return 1;
    return 0;
}

/* Lines "Name:<tab>value" of /proc/self/status; most others are counters. */
static void report_status(void) {
    json_open("status", '{');
    char *rest = file_text("/proc/self/status");
    for (char *line; rest && (line = strsep(&rest, "\n"));) {
        char *value = strchr(line, ':');
        if (!value)
            continue;
        *value++ = 0;
        if (is_of_rights(line))
            json_string(line, value + strspn(value, "\t "));
    }
    json_close('}');
}

static void report_limits(void) {
    static const char *const names[] = {
        "cpu",     "fsize", "data",  "stack",      "core",     "rss",  "nproc",  "nofile",
        "memlock", "as",    "locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime"};
    json_open("limits", '{');
    for (int i = 0; i < (int)(sizeof names / sizeof *names); i++) {
        struct rlimit limit;
        if (getrlimit(i, &limit))
            continue;
        json_open(names[i], '[');
        json_number(NULL, (long long)limit.rlim_cur); /* RLIM_INFINITY is -1 */
        json_number(NULL, (long long)limit.rlim_max);
        json_close(']');
    }
    json_close('}');
}

static void report_namespaces(void) {
    static const char *const names[] = {"cgroup", "ipc",  "mnt",  "net",
                                        "pid",    "time", "user", "uts"};
    json_open("namespaces", '{');
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[64], target[64] = "";
        snprintf(path, sizeof path, "/proc/self/ns/%s", names[i]);
        if (readlink(path, target, sizeof target - 1) > 0)
            json_string(names[i], target);
    }
    json_close('}');
}

/* The attempt to lower oom_score_adj by one; it is put back if it worked. */
static int lower_oom_score(const char *current) {
    char text[16];
    int error = 0, fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    snprintf(text, sizeof text, "%d", atoi(current) - 1);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        error = errno;
    else if (write(fd, current, strlen(current)) < 0)
        error = -1;
    if (fd >= 0)
        close(fd);
    return error;
}

static void report_session(void) {
    json_number("pid", getpid());
    json_number("ppid", getppid());
    json_number("leads_process_group", getpgrp() == getpid());
    json_number("leads_session", getsid(0) == getpid());
    int terminal = open("/dev/tty", O_RDWR | O_CLOEXEC);
    json_number("controlling_terminal", terminal < 0 ? errno : 0);
    if (terminal >= 0)
        close(terminal);
}

/* One step up from what it has; each in a child, which ends with it. */
static int raise_priority(void) {
    return setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) - 1) ? errno : 0;
}

static int raise_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit))
        return errno;
    limit.rlim_max++;
    return setrlimit(RLIMIT_NOFILE, &limit) ? errno : 0;
}

static int become_realtime(void) {
    struct sched_param lowest = {.sched_priority = 1};
    return syscall(SYS_sched_setscheduler, 0, SCHED_FIFO, &lowest) ? errno : 0;
}

static int in_child(int (*attempt)(void)) {
    int status;
    pid_t pid = fork();
    if (!pid)
        _exit(attempt());
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void report_raises(void) {
    json_open("raise", '{');
    json_number("priority", in_child(raise_priority));
    json_number("nofile", in_child(raise_limit));
    json_number("realtime", in_child(become_realtime));
    json_close('}');
}

/* Setting the clock with a tick that no kernel takes: EINVAL says that it would have been allowed.
 */
static int set_clock(void) {
    struct timex bad = {.modes = ADJ_TICK, .tick = 1};
    return syscall(SYS_clock_adjtime, CLOCK_REALTIME, &bad) < 0 ? errno : 0;
}

static int parent_death_signal(void) {
    int number = -1;
    prctl(PR_GET_PDEATHSIG, &number);
    return number;
}

void report_process(char **environment) {
    char buffer[4096];
    struct utsname machine;
    report_status();
    report_session();
    report_limits();
    report_raises();
    report_namespaces();
    mode_t mask = umask(0);
    umask(mask);
    json_number("umask", mask);
    json_number("nice", getpriority(PRIO_PROCESS, 0));
    json_number("scheduler", syscall(SYS_sched_getscheduler, 0)); /* musl has only a stub */
    json_number("dumpable", prctl(PR_GET_DUMPABLE));
    json_number("securebits", prctl(PR_GET_SECUREBITS));
    json_number("parent_death_signal", parent_death_signal());
    json_number("set_clock", set_clock());
    json_text("uid_map", "/proc/self/uid_map");
    json_text("gid_map", "/proc/self/gid_map");
    json_text("setgroups", "/proc/self/setgroups");
    json_text("cgroup", "/proc/self/cgroup");
    const char *score = file_text("/proc/self/oom_score_adj");
    snprintf(buffer, sizeof buffer, "%s", score ? score : "0");
    json_number("oom_score_adj", atoi(buffer));
    json_number("lower_oom_score_adj", lower_oom_score(buffer));
    uname(&machine);
    json_string("hostname", machine.nodename);
    json_string("domainname", machine.domainname);
    json_string("working_directory", getcwd(buffer, sizeof buffer));
    json_open("environment", '[');
    for (; *environment; environment++)
        json_string(NULL, *environment);
    json_close(']');
}

/* What was put so far is still in the buffer and goes there as well. */
static void write_to(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || dup2(fd, 1) < 0)
        _exit(2);
    close(fd);
}

/* What another probe wrote with -o. */
static int show_once_there(const char *path) {
    const char *text;
    while (!(text = file_text(path)))
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    return fputs(text, stdout) < 0;
}

int main(int argc, char **argv, char **environment) {
    const char *to = NULL;
    char name[PATH_MAX], buffer[1 << 16];
    int stay = 0, option;
    while ((option = getopt(argc, argv, "so:w:")) != -1) {
        if (option == 'w')
            return show_once_there(optarg);
        stay |= option == 's';
        to = option == 'o' ? optarg : to;
    }
    snprintf(name, sizeof name, "%s.new", to ? to : "");
    setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
    json_open(NULL, '{');
    report_descriptors(); /* first: before any is opened here */
    if (to)
        write_to(name);
    report_process(environment);
    report_mounts();
    report_devices();
    report_storage();
    report_paths();
    report_network();
    fflush(stdout); /* or every child that attempts a call would inherit what is buffered */
    report_system_calls();
    json_close('}');
    putchar('\n');
    if (fflush(stdout) || (to && rename(name, to)))
        return 1;
    if (stay)
        pause();
    return 0;
}
