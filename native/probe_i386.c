/* The numbers of the 32-bit ABI, which an x86_64 process can call by int 0x80. */
#ifdef __x86_64__
#include <asm/unistd_32.h>

#include "probe_calls.h"

const struct call i386_calls[] = {CALLS(ENTRY){0}};
#endif
