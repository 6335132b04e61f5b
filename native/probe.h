/* The probe: a static program that says as one JSON object on stdout what a task sees and may do.
 * Tests and `sandbox doctor --deep` put it into an image, run it by every way into a task, and hold
 * what it says to sandbox/model/protections.py. It is no part of what runs tasks.
 *
 *     probe [-o FILE] [-s]
 *     probe -w FILE
 *
 * -o writes the report to FILE, which is there once it is whole; -s stays until it is killed. -w
 * waits for such a FILE and shows it.
 *
 * An outcome is an errno, 0 for success; -N means that signal N ended the attempt. Every attempt
 * is made with arguments that do no harm where it is allowed.
 */
#ifndef PROBE_H
#define PROBE_H

#include <stddef.h>
#include <stdint.h>

/* JSON, written as it goes. */
void json_open(const char *key, char bracket);
void json_close(char bracket);
void json_number(const char *key, long long value);
void json_string(const char *key, const char *value);
void json_text(const char *key, const char *path); /* a file without its last newline, or null */

void report_descriptors(void);
void report_process(char **environment);
void report_mounts(void);
void report_devices(void);
void report_storage(void);
void report_paths(void);
void report_network(void);
void report_system_calls(void);

/* The outcome of a system call of the native ABI, made in this process. */
int outcome(long result);

/* One attempt. The number is the text of __NR_name: a name where the headers have none. */
struct call {
    const char *label, *number;
    long argument[5];
};

extern const struct call native_calls[];
extern const struct call i386_calls[];

#endif
