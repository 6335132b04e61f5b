/* Between the container and its log, and between it and a client's own descriptors. */
#ifndef SANDBOX_KEEPER_STREAMS_H
#define SANDBOX_KEEPER_STREAMS_H

#include "keeper.h"

struct streams {
    struct log log;
    struct stream out[2]; /* stdout and stderr, or the terminal alone */
    struct stream in;     /* a client's stdin, towards the container's */
    int child[3];         /* the container's ends; closed here once it has them */
    int terminal, peer;   /* the pty's master, and a slave kept open: no hang-up while we live */
};

int streams_make(struct streams *s, const struct program *program);
void streams_started(struct streams *s);
void streams_terminal(struct streams *s, int master);
/* Waits for something to do and does it; true when `signals` is readable. */
int streams_turn(struct streams *s, int signals, int ended);
/* Forget the clients: their descriptors are closed, and a full log drops. */
void streams_detach(struct streams *s);
/* Whether output is still to come or to be passed on. */
int streams_open(const struct streams *s);

#endif
