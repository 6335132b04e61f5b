/* What the task may do on its network, and whose names it sees there. */
#define _GNU_SOURCE
#include "probe.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void report_socket(const char *key, int family, int type, int protocol) {
    int fd = socket(family, type | SOCK_CLOEXEC, protocol);
    json_number(key, fd < 0 ? errno : 0);
    if (fd >= 0)
        close(fd);
}

static int bind_outcome(uint16_t port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int error = 0, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
        error = errno;
    if (fd >= 0)
        close(fd);
    return error;
}

static void report_interfaces(void) {
    struct if_nameindex *list = if_nameindex();
    json_open("interfaces", '[');
    for (struct if_nameindex *i = list; i && i->if_name; i++)
        json_string(NULL, i->if_name);
    json_close(']');
    if_freenameindex(list);
}

/* Names of bound unix sockets: "@..." are abstract and belong to the network namespace. */
static void report_unix_sockets(void) {
    char *line = NULL;
    size_t size = 0;
    FILE *sockets = fopen("/proc/net/unix", "re");
    json_open("unix_sockets", '[');
    if (sockets && getline(&line, &size, sockets) < 0) /* the head of the table */
        fclose(sockets), sockets = NULL;
    while (sockets && getline(&line, &size, sockets) > 0) {
        int name = 0;
        if (sscanf(line, "%*s %*s %*s %*s %*s %*s %*s %n", &name) != EOF && name && line[name]) {
            line[strcspn(line, "\n")] = 0;
            json_string(NULL, line + name);
        }
    }
    json_close(']');
    free(line);
    if (sockets)
        fclose(sockets);
}

/* A datagram socket's connect asks for a route and sends nothing. */
static int route_outcome(const char *to) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(80)};
    inet_pton(AF_INET, to, &address.sin_addr);
    int error = 0, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        error = errno;
    if (fd >= 0)
        close(fd);
    return error;
}

/* The kernel's answer to a change of lo that changes nothing (rtnetlink(7), ifi_change 0). */
static int change_link_outcome(void) {
    struct {
        struct nlmsghdr head;
        struct ifinfomsg link;
    } request = {{sizeof request, RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK, 1, 0}, {.ifi_index = 1}};
    struct {
        struct nlmsghdr head;
        struct nlmsgerr error;
    } answer = {0};
    int error, fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0 || send(fd, &request, sizeof request, 0) < 0 ||
        recv(fd, &answer, sizeof answer, MSG_TRUNC) < 0)
        error = errno;
    else
        error = -answer.error.error;
    if (fd >= 0)
        close(fd);
    return error;
}

static void report_sysctls(void) {
    static const char *const names[] = {
        "ipv4/conf/all/accept_redirects",
        "ipv4/conf/default/accept_redirects",
        "ipv4/ip_forward",
        "ipv4/ip_unprivileged_port_start",
        "ipv4/ping_group_range",
        "ipv6/conf/all/accept_ra",
        "ipv6/conf/all/accept_redirects",
        "ipv6/conf/all/forwarding",
        "ipv6/conf/default/accept_ra",
        "ipv6/conf/default/accept_redirects",
    };
    json_open("sysctls", '{');
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[96];
        snprintf(path, sizeof path, "/proc/sys/net/%s", names[i]);
        json_text(names[i], path);
    }
    json_close('}');
}

void report_network(void) {
    json_open("network", '{');
    report_socket("raw_socket", AF_INET, SOCK_RAW, IPPROTO_ICMP);
    report_socket("raw_socket_6", AF_INET6, SOCK_RAW, IPPROTO_ICMPV6);
    report_socket("packet_socket", AF_PACKET, SOCK_RAW, 0);
    report_socket("ping_socket", AF_INET, SOCK_DGRAM, IPPROTO_ICMP);
    json_number("bind_80", bind_outcome(80));
    json_number("route_to_instance_metadata", route_outcome("169.254.169.254"));
    json_number("route_to_task_metadata", route_outcome("169.254.170.2"));
    json_number("change_link", change_link_outcome());
    report_sysctls();
    report_interfaces();
    report_unix_sockets();
    json_close('}');
}
