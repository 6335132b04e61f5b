/* What A and B share: where they stand in the program, and the descriptors B collects. */
#ifndef SANDBOX_KEEPER_CHILD_H
#define SANDBOX_KEEPER_CHILD_H

#include "keeper.h"

struct child {
    const struct program *program;
    const struct child_fds *fds;
    uint32_t index; /* the record that runs now; named when something fails */
    int root;       /* the container's root, before PIVOT; afterwards "/" is it */
    int null;       /* the host's /dev/null, checked, to mask files with */
};

_Noreturn void child_fail(const struct child *c, int error);
int stay_unreadable(void);

/* Executes one of B's records; does not return when it fails, nor from EXEC. */
void container_step(struct child *c, const struct record *r);

/* keeper_mounts.c: all return 0 or -1 with errno */
int root_attach(struct child *c, int mount);
int root_pivot(struct child *c, uint64_t attributes);
int mount_new(struct child *c, const struct record *r);
int mount_bind(struct child *c, int mount, uint64_t attributes, const char *target);
int mount_device(struct child *c, unsigned major, unsigned minor, const char *name);
int mount_mask(struct child *c, const char *path);
int mount_readonly(struct child *c, const char *path);
int make_symlink(struct child *c, const char *target, const char *path);
int make_file(struct child *c, const struct record *r);
int open_in_root(const struct child *c, const char *path, int flags);
int make_directories(const struct child *c, const char *path);

#endif
