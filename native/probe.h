/* The probe: a static program that tests put into an image, to say as one JSON object on stdout
 * what a task sees and may do. It is no part of what runs tasks.
 *
 *     probe [-o FILE] [-s] [PATH...]
 *
 * PATHs are reported on like the masked and read-only ones. -o writes the report to FILE, which is
 * there once it is whole; -s stays until it is killed.
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
void json_text(const char *key, const char *path); /* a whole file, or null */

void report_descriptors(void);
void report_process(char **environment);
void report_mounts(void);
void report_devices(void);
void report_paths(char **more);
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
